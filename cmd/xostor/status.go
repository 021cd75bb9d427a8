package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/bus"
)

const (
	busTimeout  = 5 * time.Second
	statusAfter = time.Second // answers that take longer are not waited for
)

// dialBus connects a tool, which wants an answer now, unlike a daemon.
func dialBus(ctx context.Context, c *call) (*bus.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	return bus.Dial(ctx, c.config.Bus.Socket, "xostor-cli")
}

// agentStatus is one agent's answer with its decoded body, or a host from which none came.
type agentStatus struct {
	bus.Status
	Missing bool      `json:"missing,omitempty"` // the host belongs to the pool and nothing on it answered
	Report  busReport `json:"-"`
}

// poolStatus is what all of the pool answered.
type poolStatus struct {
	agents []agentStatus // by host and agent; of the bus only when it is clustered
	note   string        // what is to be said of a bus that is alone
}

func runStatus(ctx context.Context, c *call) error {
	conn, err := dialBus(ctx, c)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, statusAfter)
	defer cancel()
	answers, err := bus.Statuses(ctx, conn, nil)
	if err != nil {
		return err
	}
	pool, err := gather(answers)
	if err != nil {
		return err
	}
	if c.json {
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		if err := enc.Encode(pool.agents); err != nil {
			return err
		}
	} else {
		printStatus(c, pool)
	}
	unwell := func(s agentStatus) bool { return s.Missing || s.Report.State == agents.Failing }
	if !slices.ContainsFunc(pool.agents, func(s agentStatus) bool { return s.Status.Agent != busAgent }) || slices.ContainsFunc(pool.agents, unwell) {
		return errQuiet
	}
	return nil
}

// gather sorts the answers and adds the hosts that should have answered: any bus of the cluster knows them.
func gather(answers []bus.Status) (poolStatus, error) {
	p := poolStatus{agents: []agentStatus{}}
	expected, answered := map[string]bus.Host{}, map[string]bool{}
	for _, a := range answers {
		s := agentStatus{Status: a}
		if err := json.Unmarshal(a.Body, &s.Report); err != nil {
			return p, fmt.Errorf("read status of %s on %s: %w", a.Agent, a.HostName, err)
		}
		answered[a.Host] = true
		if a.Agent == busAgent && s.Report.Bus.Cluster == "" {
			for _, f := range s.Report.Findings {
				p.note = f.Text
			}
			continue
		}
		for _, h := range s.Report.Bus.Hosts {
			expected[h.UUID] = h
		}
		p.agents = append(p.agents, s)
	}
	for uuid, h := range expected {
		if !answered[uuid] {
			p.agents = append(p.agents, agentStatus{Status: bus.Status{Host: uuid, HostName: h.Name}, Missing: true})
		}
	}
	last := func(s agentStatus) int { // what is about a host rather than an agent comes behind its agents
		if s.Status.Agent == busAgent {
			return 1
		}
		return 0
	}
	slices.SortFunc(p.agents, func(a, b agentStatus) int {
		return cmp.Or(cmp.Compare(a.HostName, b.HostName), cmp.Compare(a.Host, b.Host), cmp.Compare(last(a), last(b)), cmp.Compare(a.Status.Agent, b.Status.Agent))
	})
	return p, nil
}

func printStatus(c *call, pool poolStatus) {
	defer func() {
		if pool.note != "" {
			fmt.Fprintln(c.out, "\nnote: "+pool.note)
		}
	}()
	if len(pool.agents) == 0 {
		fmt.Fprintln(c.out, "The bus is up, but no agent answers: systemctl status 'xostor-*'")
		return
	}
	w := tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tAGENT\tSTATE\tLAST PASS\tTOOK\tLAST ACTION\tFINDINGS\tLAG")
	for _, s := range pool.agents {
		fmt.Fprintln(w, row(s))
	}
	_ = w.Flush() // c.out is a terminal, a pipe or a buffer: a lost reader needs no answer
	for _, s := range pool.agents {
		if s.Report.LastError != "" {
			fmt.Fprintf(c.out, "\n%s on %s: %s\n", s.Status.Agent, s.HostName, s.Report.LastError)
		}
		printFindings(c, s.Report.Findings)
	}
}

// row is one line of the table. LAG is the time until the answer came.
func row(s agentStatus) string {
	if s.Missing {
		return fmt.Sprintf("%s\t-\tno answer\t-\t-\t-\t-\tover %s", s.HostName, statusAfter)
	}
	lag := s.RTT.Round(100 * time.Microsecond)
	if s.Status.Agent == busAgent {
		b := s.Report.Bus
		kept := "history " + cmp.Or(b.History, "paused")
		return fmt.Sprintf("%s\t%s\t%s\t-\t-\t%d of %d hosts connected, %s\t%d\t%s", s.HostName, busAgent, s.Report.State, len(b.Connected)+1, len(b.Hosts), kept,
			len(s.Report.Findings), lag)
	}
	last := "none yet"
	if r := s.Report.LastAction; r != nil {
		last = fmt.Sprintf("%s, %s %s", r.Action.Verb, r.Outcome, ago(r.At))
	}
	return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s", s.HostName, s.Status.Agent, s.Report.State, ago(s.Report.LastPass),
		s.Report.LastTook.Round(time.Millisecond), last, len(s.Report.Findings), lag)
}

func printFindings(c *call, fs []agents.Finding) {
	for _, f := range fs {
		since := ""
		if !f.Since.IsZero() {
			since = ", " + ago(f.Since)
		}
		fmt.Fprintf(c.out, "\n%s %s (%s%s)\n  %s\n", f.Severity, f.Code, f.Subject, since, f.Text)
		if f.Fix != "" {
			fmt.Fprintf(c.out, "  next: %s\n", f.Fix)
		}
	}
}

// ago says how long ago a moment was.
func ago(t time.Time) string {
	switch d := time.Since(t); {
	case t.IsZero():
		return "never"
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs ago", d.Seconds())
	default:
		return d.Round(time.Second).String() + " ago"
	}
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
