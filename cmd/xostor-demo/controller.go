package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
)

const (
	outageLimit = 3 * time.Minute // of one step; a healthy run needs a fraction
	moveTries   = 5
	demoProbe   = time.Second            // instead of the shipped 10 s: who looks on does not want to wait
	askEvery    = 20 * time.Millisecond  // of the client, and so how exact outages are
	askTimeout  = 300 * time.Millisecond // of one question
)

// controllerScene shows what becomes of LINSTOR's controller when it dies, hangs, its host is cut off, it is moved, and its host loses its power.
func controllerScene(ctx context.Context, o options, t *timeline) error {
	if why := realpool.Missing(); why != "" {
		return fmt.Errorf("%w: %s", errCannot, why)
	}
	return onStage(ctx, func(s *stage) error {
		c := &controllers{t: t, xostor: o.xostor}
		return c.play(s)
	})
}

// controllers narrates.
type controllers struct {
	*realpool.Pool
	t       *timeline
	xostor  string
	client  *client
	results []string
}

func (c *controllers) play(s *stage) error {
	t := c.t
	t.text(heading, "LINSTOR's controller must run on one host only, the one that holds its database. Three hosts keep it running; there is no XAPI, no bus, no LINSTOR.")
	t.text(plain, "")
	t.text(plain, "  hosts       h1, h2, h3: a real systemd each, with a real ext4 filesystem for the database and xostor agent failover as a unit")
	t.text(plain, "  stand-ins   DRBD is a model behind a program called drbdsetup. The controller is a small daemon: the real one adds its own start, some 4 to 10 s")
	t.text(plain, "  the point   an outage as a client of the controller sees it: it asks every host all the time, and the longest time without an answer counts")
	t.begin()
	c.Pool = realpool.New(s, realpool.Options{Xostor: c.xostor, OnNoQuorum: "suspend-io", ProbeEvery: demoProbe})
	c.client = ask(s, c.Hosts)
	watchActions(s, t, c.Hosts)
	o := c.Settled()
	t.line(right, "pool", "the agents agreed: %s promoted, mounted the database and started the controller", o.Name)
	for _, step := range []struct {
		title string
		notes []string
		do    func(o *realpool.Host) (*realpool.Host, string, error)
	}{
		{"The controller's process is killed", []string{"systemd does not start it again, and neither does drbd-reactor: today it stays down until a person acts."}, c.killed},
		{"The controller hangs", []string{"It accepts connections and answers nobody. Here it is probed each second, as shipped each 10 s; three probes of 5 s must fail."}, c.hung},
		{"The controller's host is cut off from the storage network, with a write under way", []string{"Its writes freeze. On a real pool it took 6 min 12 s until such a host had let go."}, c.cutOff},
		{"An administrator moves the controller: xostor controller move", nil, c.moved},
		{"The controller's host loses its power", []string{"DRBD itself would notice by its ping, after up to 10.5 s. The agents miss its beats after one second, and make DRBD ask."}, c.dead},
	} {
		c.ready()
		t.text(plain, "")
		t.line(heading, "event", "%d. %s", len(c.results)+1, step.title)
		for _, note := range step.notes {
			t.note("%s", note)
		}
		began := time.Now()
		next, more, err := step.do(o)
		if err != nil {
			return err
		}
		o = next
		c.Until(outageLimit, "the controller answers", func() bool { return c.client.answeredSince(o.Name, time.Now().Add(-askTimeout)) })
		outage := c.client.longestGap(began)
		t.line(right, "client", "the controller answers again on %s; outage %s%s", o.Name, seconds(outage), more)
		c.results = append(c.results, fmt.Sprintf("  %-84s %9s%s", step.title, seconds(outage), more))
	}
	t.text(right, fmt.Sprintf("\nAll %d steps came true. Outages:\n%s", len(c.results), strings.Join(c.results, "\n")))
	return nil
}

// seconds is a duration as people read it.
func seconds(d time.Duration) string {
	if d < 950*time.Millisecond {
		return strconv.Itoa(int(d.Round(time.Millisecond).Milliseconds())) + " ms"
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// ready waits until all living hosts could take over.
func (c *controllers) ready() {
	c.Until(outageLimit, "all hosts are connected and can take the controller", func() bool {
		if !c.Connected() {
			return false
		}
		for _, h := range c.Hosts {
			r, err := h.Client().Status(context.Background()) // bounded by itself
			if err != nil || slices.ContainsFunc(r.Hosts, func(h failover.HostReport) bool { return !h.Usable || h.Mode != failover.Owner }) {
				return false
			}
		}
		return true
	})
}

// signalled sends a signal to the controller and waits for another process on the same host.
func (c *controllers) signalled(o *realpool.Host, sig syscall.Signal) (*realpool.Host, string, error) {
	pid, began := o.State(realpool.Controller).MainPID, time.Now()
	o.SignalController(sig)
	c.Until(outageLimit, "another controller process on the same host", func() bool {
		u := o.State(realpool.Controller)
		return u.Active == "active" && u.MainPID != 0 && u.MainPID != pid && u.BegunAt.After(began)
	})
	return o, ", of which " + seconds(o.State(realpool.Controller).BegunAt.Sub(began)) + " until systemd began to start it", nil
}

func (c *controllers) killed(o *realpool.Host) (*realpool.Host, string, error) {
	return c.signalled(o, syscall.SIGKILL)
}

func (c *controllers) hung(o *realpool.Host) (*realpool.Host, string, error) {
	return c.signalled(o, syscall.SIGSTOP)
}

func (c *controllers) cutOff(o *realpool.Host) (*realpool.Host, string, error) {
	began := time.Now()
	c.Cut(o, true)
	c.Until(outageLimit, "the cut-off host has let go", func() bool {
		free := false
		c.Wall.Do(func() { free = !o.Node.IsPrimary() && !o.Node.Held() })
		return free && !o.Mounted() && o.State(realpool.Controller).Down() && !o.Since(began, "unmounted").IsZero()
	})
	let := seconds(o.Since(began, "unmounted").Sub(o.Since(began, "no quorum")))
	c.t.line(right, o.Name, "has let go: quorum lost -> process dead, Secondary and unmounted in %s, half a second of it patience with a short flap", let)
	next := c.Settled()
	if next == o {
		return nil, "", fmt.Errorf("%s is cut off and runs the controller", o.Name)
	}
	c.Cut(o, false)
	c.Until(outageLimit, "all hosts are connected again", c.Connected)
	if got := c.Settled(); got != next {
		return nil, "", fmt.Errorf("the controller moved again, from %s to %s, when the link healed", next.Name, got.Name)
	}
	c.t.line(plain, "pool", "the link is mended: DRBD is connected and in sync again, and the controller stays on %s", next.Name)
	return next, "; the old host let go in " + let, nil
}

func (c *controllers) moved(o *realpool.Host) (*realpool.Host, string, error) {
	target := c.Others(o)[0]
	for try := 1; ; try++ {
		cmd := target.Xostor("controller", "move", target.Name)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		c.t.line(plain, "admin", "xostor controller move %s", target.Name)
		err := cmd.Run() // bounded by itself; when the scene is interrupted, its host ends and so does it
		for line := range strings.Lines(out.String()) {
			c.t.line(dim, "xostor", "%s", line)
		}
		// An agent that has no processor for a second counts as away: the order is refused, or rolled back.
		if err != nil && try < moveTries {
			c.ready()
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("xostor controller move %s: %w", target.Name, err)
		}
		return target, "", nil
	}
}

func (c *controllers) dead(o *realpool.Host) (*realpool.Host, string, error) {
	c.Wall.Do(func() { c.Cluster.PingInt = 10 * time.Second }) // DRBD's default; the steps before looked each second
	began := time.Now()
	c.Die(o)
	var next *realpool.Host
	c.Until(outageLimit, "another host runs the controller", func() bool {
		next = c.Owner()
		return next != nil && next != o
	})
	return next, ", database mounted after " + seconds(next.Since(began, "mounted").Sub(began)), nil
}

// client asks every host's controller all the time.
type client struct {
	mu   sync.Mutex
	good []answer
}

// answer is one that was good.
type answer struct {
	at   time.Time
	host string
}

func ask(s *stage, hosts []*realpool.Host) *client {
	c := &client{}
	web := &http.Client{Timeout: askTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	var wg sync.WaitGroup
	s.Cleanup(wg.Wait)
	for _, h := range hosts {
		url := h.URL() + "/health"
		wg.Go(func() {
			tick := time.NewTicker(askEvery)
			defer tick.Stop()
			for s.ctx.Err() == nil {
				if r, err := web.Get(url); err == nil {
					_ = r.Body.Close()
					if r.StatusCode == http.StatusOK {
						c.note(h.Name)
					}
				}
				select {
				case <-s.ctx.Done():
				case <-tick.C:
				}
			}
		})
	}
	return c
}

func (c *client) note(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.good = append(c.good, answer{time.Now(), host})
}

func (c *client) answeredSince(host string, t time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.good, func(a answer) bool { return a.host == host && a.at.After(t) })
}

// longestGap is the longest time without a good answer that ended after began.
func (c *client) longestGap(began time.Time) (gap time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := 1; i < len(c.good); i++ {
		if c.good[i].at.After(began) {
			gap = max(gap, c.good[i].at.Sub(c.good[i-1].at))
		}
	}
	return gap
}

// watchActions prints what the agents do, from their logs, until the scene ends.
func watchActions(s *stage, t *timeline, hosts []*realpool.Host) {
	var wg sync.WaitGroup
	s.Cleanup(wg.Wait)
	for _, h := range hosts {
		wg.Go(func() {
			tick := time.NewTicker(50 * time.Millisecond)
			defer tick.Stop()
			seen, last := 0, ""
			for s.ctx.Err() == nil {
				text, _ := os.ReadFile(h.AgentLog())
				whole := bytes.LastIndexByte(text, '\n') + 1
				for line := range strings.Lines(string(text[min(seen, whole):whole])) {
					if what := action(line); what != "" && what != last { // a release is repeated until all is verified
						t.line(agent, h.Name, "%s", what)
						last = what
					}
				}
				seen = whole
				select {
				case <-s.ctx.Done():
				case <-tick.C:
				}
			}
		})
	}
}

var logField = regexp.MustCompile(`(\w+)=("(?:[^"\\]|\\.)*"|\S*)`)

// action tells of an action from a line of an agent's log; "" for other lines and for actions that keep what is kept on disk.
func action(line string) string {
	f := map[string]string{}
	for _, m := range logField.FindAllStringSubmatch(line, -1) {
		f[m[1]] = m[2]
		if text, err := strconv.Unquote(m[2]); err == nil {
			f[m[1]] = text
		}
	}
	if f["msg"] != "action" || f["outcome"] != "done" || f["verb"] == failover.VerbSaveRes {
		return ""
	}
	return f["verb"] + ": " + f["why"]
}
