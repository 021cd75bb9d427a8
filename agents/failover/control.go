package failover

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
)

// DefaultSocket is where the agent of a host listens for `xostor controller`. Only root may talk to it.
const DefaultSocket = "/run/xostor/failover.sock"

// request and reply are one line of JSON each.
type request struct {
	Do string `json:"do"` // "status", "move"
	To string `json:"to,omitempty"`
}

// Report is what an agent tells of its host, and of the pool as seen from there.
type Report struct {
	Text     string           `json:"text"` // who owns it, or what is missing
	Mode     Mode             `json:"mode"`
	ModeWhy  string           `json:"mode_why"`
	Owner    string           `json:"owner,omitempty"`
	JVM      JVM              `json:"jvm,omitempty"`
	Move     *Move            `json:"move,omitempty"`
	Hosts    []HostReport     `json:"hosts"`
	Findings []agents.Finding `json:"findings"`
	Actions  []agents.Action  `json:"actions"` // what would be done next
	Snapshot *Snapshot        `json:"snapshot,omitempty"`
	Error    string           `json:"error,omitempty"` // a refused request
}

// HostReport is one host in a Report.
type HostReport struct {
	Name     string `json:"name"`
	Role     string `json:"role"`
	Mode     Mode   `json:"mode"`
	JVM      JVM    `json:"jvm"`
	Usable   bool   `json:"usable"`
	Failures int    `json:"failures"`
	Heard    string `json:"heard"` // how long ago
}

func (s *Service) serveControl(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = s.control.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := s.control.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		wg.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			var r request
			line, err := bufio.NewReader(io.LimitReader(c, 4096)).ReadBytes('\n')
			if err == nil {
				err = json.Unmarshal(line, &r)
			}
			var out Report
			if err != nil {
				out.Error = "unreadable request: " + err.Error()
			} else {
				out = s.answer(r)
			}
			_ = json.NewEncoder(c).Encode(out) // the asker may be gone
		})
	}
}

func (s *Service) answer(r request) Report {
	now := time.Now()
	snap := s.agent.Last()
	out := s.report(now, &snap)
	if r.Do == "move" {
		m, err := PlanMove(now, snap, r.To)
		if err != nil {
			out.Error = err.Error()
			return out
		}
		s.net.order(m)
		out.Move = &m
	}
	return out
}

func (s *Service) report(now time.Time, snap *Snapshot) Report {
	plan := Decide(now, *snap)
	out := Report{Text: Describe(now, *snap), Mode: snap.Mode, ModeWhy: snap.ModeWhy, Move: snap.Move, Findings: plan.Findings, Actions: plan.Actions, Snapshot: snap}
	self := beat(snap)
	out.Hosts = append(out.Hosts, HostReport{Name: snap.Self, Role: self.Role, Mode: self.Mode, JVM: self.JVM, Usable: self.Usable, Failures: self.Failures, Heard: "this host"})
	if self.Owner {
		out.Owner, out.JVM = snap.Self, self.JVM
	}
	for i := range snap.Peers {
		p := &snap.Peers[i]
		h := HostReport{Name: p.Name, Role: p.Says.Role, Mode: p.Says.Mode, JVM: p.Says.JVM, Usable: p.Says.Usable, Failures: p.Says.Failures, Heard: "never"}
		if !p.Heard.IsZero() {
			h.Heard = now.Sub(p.Heard).Round(100*time.Millisecond).String() + " ago"
		}
		if snap.alive(now, p) && p.Says.Owner && out.Owner == "" {
			out.Owner, out.JVM = p.Name, p.Says.JVM
		}
		out.Hosts = append(out.Hosts, h)
	}
	return out
}

// PlanMove checks whether the controller can be moved, and makes the order. to "": the best other host.
func PlanMove(now time.Time, s Snapshot, to string) (Move, error) {
	if s.Mode == Guard {
		return Move{}, fmt.Errorf("move the controller: %s; use `drbd-reactorctl evict` on the host that runs it", s.ModeWhy)
	}
	if s.Mode != Owner {
		return Move{}, fmt.Errorf("move the controller: %s", s.ModeWhy)
	}
	if s.Move != nil && s.Move.Age < s.Policy.MoveHold {
		return Move{}, fmt.Errorf("move the controller: a move to %s has been going on for %s", s.Move.To, s.Move.Age.Round(time.Second))
	}
	self := beat(&s)
	self.Node = s.Self
	hosts := []Beat{self}
	for i := range s.Peers {
		p := &s.Peers[i]
		if s.alive(now, p) {
			b := p.Says
			b.Node = p.Name
			hosts = append(hosts, b)
		} else if p.Name == to {
			return Move{}, fmt.Errorf("move the controller: the agent on %s does not answer", to)
		}
	}
	from, target := "", -1
	for _, b := range hosts {
		if b.Owner {
			from = b.Node
		}
	}
	if from == "" {
		return Move{}, errors.New("move the controller: no host owns the database")
	}
	for i, b := range hosts {
		better := target < 0 || b.Failures < hosts[target].Failures
		if b.Node == to || to == "" && b.Node != from && b.Usable && b.Mode == Owner && better {
			target = i
		}
	}
	switch {
	case target < 0 && to == "":
		return Move{}, errors.New("move the controller: no other host can take it: none has an up-to-date replica and a living agent")
	case target < 0:
		return Move{}, fmt.Errorf("move the controller: there is no host %s", to)
	case hosts[target].Node == from:
		return Move{}, fmt.Errorf("move the controller: it is on %s already", from)
	case hosts[target].Mode != Owner:
		return Move{}, fmt.Errorf("move the controller: the agent on %s is in mode %s", to, hosts[target].Mode)
	case !hosts[target].Usable:
		return Move{}, fmt.Errorf("move the controller: %s has no up-to-date replica, or its units or mount point are not ready", hosts[target].Node)
	}
	return Move{ID: s.Self + "-" + strconv.FormatInt(now.UnixNano(), 36), From: from, To: hosts[target].Node}, nil
}

// ErrNotRunning says that no agent answers on this host.
var ErrNotRunning = errors.New("the failover agent does not run on this host")

// Client talks to the agent of this host.
type Client struct {
	Socket string // DefaultSocket
}

// Status asks for a report. Error: ErrNotRunning.
func (c Client) Status(ctx context.Context) (Report, error) { return c.ask(ctx, request{Do: "status"}) }

func (c Client) ask(ctx context.Context, r request) (Report, error) {
	path := c.Socket
	if path == "" {
		path = DefaultSocket
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Report{}, fmt.Errorf("%w; start it with: systemctl start xostor-failover", ErrNotRunning)
	case errors.Is(err, fs.ErrPermission):
		return Report{}, fmt.Errorf("ask the failover agent of this host: %w; only root may", err)
	case err != nil:
		return Report{}, fmt.Errorf("ask the failover agent of this host: %w; look at: systemctl status xostor-failover", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return Report{}, fmt.Errorf("ask the failover agent of this host: %w", err)
	}
	var out Report
	if err := json.NewDecoder(conn).Decode(&out); err != nil {
		return Report{}, fmt.Errorf("ask the failover agent of this host: %w", err)
	}
	if out.Error != "" {
		return out, errors.New(out.Error)
	}
	return out, nil
}

// ErrRolledBack says that a move did not happen.
var ErrRolledBack = errors.New("the controller was not moved")

const moveLook = 200 * time.Millisecond

// Move hands the controller to another host ("": the best one) and waits for it to run there. report hears each change. When the target does not become
// owner in time, the former owner takes it back and the error matches ErrRolledBack.
func (c Client) Move(ctx context.Context, to string, report func(string)) error {
	r, err := c.ask(ctx, request{Do: "move", To: to})
	if err != nil {
		return err
	}
	m := *r.Move
	report("moving from " + m.From + " to " + m.To)
	tick := time.NewTicker(moveLook)
	defer tick.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the move: %w", ctx.Err())
		case <-tick.C:
		}
		r, err := c.Status(ctx)
		if err != nil {
			return err
		}
		if r.Text != last {
			last = r.Text
			report(last)
		}
		if r.Owner == m.To && r.JVM == JVMUp {
			return nil
		}
		if r.Owner != "" && r.Owner != m.To && r.JVM == JVMUp && (r.Move == nil || r.Move.ID != m.ID || r.Move.Age > DefaultPolicy().MoveHold) {
			return fmt.Errorf("%w: %s has it again", ErrRolledBack, r.Owner)
		}
	}
}

// Command is `xostor controller ...`.
type Command struct {
	Client Client
	Store  string // folder of the backups; below DefaultPaths().StateDir
	Names  Names  // DefaultNames
	JSON   bool
	Out    io.Writer
}

// ErrUsage says that the arguments make no sense.
var ErrUsage = errors.New("usage: xostor controller status | move [HOST] | backups | restore --plan [BACKUP]")

// Run carries out one command line, such as ["move", "host2"].
func (c Command) Run(ctx context.Context, args []string) error {
	if c.Names == (Names{}) {
		c.Names = DefaultNames()
	}
	if c.Store == "" {
		c.Store = DefaultPaths().backups()
	}
	switch {
	case len(args) == 1 && args[0] == "status":
		return c.status(ctx)
	case len(args) >= 1 && len(args) <= 2 && args[0] == "move":
		to := ""
		if len(args) == 2 {
			to = args[1]
		}
		return c.move(ctx, to)
	case len(args) == 1 && args[0] == "backups":
		return c.backups()
	case len(args) >= 2 && len(args) <= 3 && args[0] == "restore" && args[1] == "--plan":
		return c.restore(ctx, strings.Join(args[2:], ""))
	}
	return ErrUsage
}

// print writes a value as JSON for programs.
func (c Command) print(v any) error {
	enc := json.NewEncoder(c.Out)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// move prints each change, or with JSON one object at the end.
func (c Command) move(ctx context.Context, to string) error {
	began := time.Now()
	say := func(s string) { fmt.Fprintln(c.Out, s) }
	if c.JSON {
		say = func(string) {}
	}
	if err := c.Client.Move(ctx, to, say); err != nil {
		return err
	}
	r, err := c.Client.Status(ctx)
	if err != nil || !c.JSON {
		return err
	}
	return c.print(struct {
		Owner string        `json:"owner"`
		Took  time.Duration `json:"took_ns"`
	}{r.Owner, time.Since(began)})
}

func (c Command) status(ctx context.Context) error {
	r, err := c.Client.Status(ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		return c.print(r)
	}
	fmt.Fprintln(c.Out, r.Text)
	fmt.Fprintf(c.Out, "mode %s: %s\n", r.Mode, r.ModeWhy)
	if r.Move != nil {
		fmt.Fprintf(c.Out, "move from %s to %s, ordered %s ago\n", r.Move.From, r.Move.To, r.Move.Age.Round(time.Second))
	}
	w := tabwriter.NewWriter(c.Out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tROLE\tMODE\tCONTROLLER\tCAN TAKE IT\tFAILURES\tHEARD")
	for _, h := range r.Hosts {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%t\t%d\t%s\n", h.Name, h.Role, h.Mode, h.JVM, h.Usable, h.Failures, h.Heard)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("print status: %w", err)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(c.Out, "\n%s %s: %s\n", f.Severity, f.Code, f.Text)
		if f.Fix != "" {
			fmt.Fprintf(c.Out, "  next: %s\n", f.Fix)
		}
	}
	return nil
}

// checkedBackup is a kept backup and what reading it again found: "good", or what is wrong.
type checkedBackup struct {
	Backup
	Check string `json:"check"`
}

func (c Command) backups() error {
	store := &Store{Dir: c.Store}
	list, err := store.List()
	if err != nil {
		return err
	}
	checked := make([]checkedBackup, len(list))
	for i, b := range list {
		checked[i] = checkedBackup{b, "good"}
		if err := store.Check(b); err != nil {
			checked[i].Check = err.Error()
		}
	}
	if c.JSON {
		return c.print(checked)
	}
	if len(list) == 0 {
		fmt.Fprintln(c.Out, "No backup on this host. The host that runs the controller and two others keep them.")
		return nil
	}
	w := tabwriter.NewWriter(c.Out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tTAKEN\tBYTES\tWHY\tCHECK")
	for _, b := range checked {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", b.Name, b.Taken.Format(time.RFC3339), b.Size, b.Why, b.Check)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("print backups: %w", err)
	}
	return nil
}

// restore prints the steps for the backup named, or for the newest one that is good.
func (c Command) restore(ctx context.Context, name string) error {
	store := &Store{Dir: c.Store}
	list, err := store.List()
	if err != nil {
		return err
	}
	owner := "the host that holds the database"
	if r, err := c.Client.Status(ctx); err == nil && r.Owner != "" {
		owner = r.Owner
	}
	for _, b := range list {
		if name != "" && b.Name != name {
			continue
		}
		if err := store.Check(b); err != nil {
			if name != "" {
				return err
			}
			continue
		}
		steps := RestorePlan(c.Names, b, c.Store, owner)
		if c.JSON {
			return c.print(struct {
				Backup Backup   `json:"backup"`
				Steps  []string `json:"steps"`
			}{b, steps})
		}
		fmt.Fprintf(c.Out, "To restore %s, taken %s, by hand:\n", b.Name, b.Taken.Format(time.RFC3339))
		for i, step := range steps {
			fmt.Fprintf(c.Out, "%2d. %s\n", i+1, step)
		}
		return nil
	}
	if name != "" {
		return fmt.Errorf("plan the restore: there is no backup %s on this host; `xostor controller backups` lists them", name)
	}
	return errors.New("plan the restore: there is no good backup on this host; look on the others with `xostor controller backups`")
}
