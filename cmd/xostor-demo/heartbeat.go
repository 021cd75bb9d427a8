package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
)

const (
	heartbeatT     = 60 * time.Second       // ha-config:timeout, XAPI's default
	heartbeatCycle = 50 * time.Millisecond  // instead of xhad's 2 s, so that a gap of milliseconds shows
	heartbeatLimit = 120 * time.Second      // of one step, on a machine that has much else to do
	heartbeatCalm  = 500 * time.Millisecond // of cycles before and after a step
)

// heartbeatScene shows what the hosts' xhads see of the statefile when the host that has it dies, hands over, and freezes.
func heartbeatScene(ctx context.Context, o options, t *timeline) (err error) {
	program := filepath.Join(filepath.Dir(o.xostor), "xostor-heartbeat")
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("%w: %s is missing; make build makes it", errCannot, program)
	}
	for _, tool := range []string{"flock", "prlimit"} { // Of DRBD's stand-in.
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: the program %s is missing (Debian package util-linux)", errCannot, tool)
		}
	}
	p, err := realpool.Open(realpool.Options{Program: program, Timeout: heartbeatT, DRBD: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	h := &hearts{Pool: p, t: t, tolerated: statefile.Derive(heartbeatT).Tolerated()}
	return h.play(ctx)
}

// hearts narrates.
type hearts struct {
	*realpool.Pool
	t         *timeline
	tolerated time.Duration
	xhads     []*realpool.Xhad
	failed    []int // Requests of each until the present step.
	errors    int   // Failed requests of living hosts, in all.
	results   []string
}

func (h *hearts) play(ctx context.Context) error {
	t := h.t
	t.text(heading, "HA's statefile lies on a DRBD device that one host may open, and xhad needs it on every host. Three hosts share it.")
	t.text(plain, "")
	t.text(plain, "  processes   xostor-heartbeat on n1, n2, n3: one owns the device and serves the others, NBD over mutual TLS from the pool secret")
	t.text(plain, "  stand-ins   a file that one process may lock is the device; a script is drbdsetup and takes the file from an owner that a majority has cut off;")
	t.text(plain, "              a model of xhad per host writes its slot and reads all others, every 50 ms instead of every 2 s; it uses a socket instead of /dev/nbdN")
	t.text(plain, fmt.Sprintf("  the point   at HA time-out %v (the default), hosts fence themselves when the statefile is gone for more than %v and a host is dead", heartbeatT, h.tolerated))
	t.begin()
	if err := h.StartAll(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	owner, err := h.owned(ctx, nil)
	if err != nil {
		return err
	}
	if h.xhads, err = h.Beat(ctx, &wg, heartbeatCycle); err != nil {
		return err
	}
	if err := h.calm(ctx, nil); err != nil {
		return err
	}
	t.line(right, "pool", "%s owns the device; every host reads and writes; longest time without an answer %s", owner.Name, millis(h.longest(nil)))
	for _, step := range []struct {
		title string
		notes []string
		do    func(context.Context, *realpool.Host) (gone *realpool.Host, err error)
		after func(context.Context, *realpool.Host) error
	}{
		{"The owner's process is killed (kill -9)", []string{"Its port refuses connections, which is proof; the first in rank opens the device at once."}, h.killed, h.restarted},
		{"An administrator moves the ownership: xostor-heartbeat handover", []string{"Requests under way end, the record on the device says that it was left in order, and the next owner need not wait."}, h.handedOver, nil},
		{"The owner freezes (SIGSTOP): its kernel answers, its process does not", []string{
			"DRBD sees a healthy Primary and refuses everybody else. Each host that hears nothing for 10 s cuts its own DRBD link to the owner;",
			"when a majority has done so, the owner has no quorum and another host can open the device. One host alone cannot take it away."}, h.frozen, h.thawed},
	} {
		t.text(plain, "")
		t.line(heading, "event", "%d. %s", len(h.results)+1, step.title)
		for _, note := range step.notes {
			t.note("%s", note)
		}
		h.failed = h.failed[:0]
		for _, x := range h.xhads {
			_, failed, _ := x.Cycles()
			h.failed = append(h.failed, failed)
		}
		gone, err := step.do(ctx, owner)
		if err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
		next, err := h.owned(ctx, owner)
		if err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
		if err := h.calm(ctx, gone); err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
		if err := h.judge(next, gone, step.title); err != nil {
			return err
		}
		if step.after != nil {
			if err := step.after(ctx, owner); err != nil {
				return fmt.Errorf("%s: %w", step.title, err)
			}
		}
		owner = next
	}
	return h.end(owner)
}

// owned waits for an owner other than but.
func (h *hearts) owned(ctx context.Context, but *realpool.Host) (*realpool.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, heartbeatLimit)
	defer cancel()
	return h.Owner(ctx, but)
}

// calm waits until every host but one has finished some more cycles.
func (h *hearts) calm(ctx context.Context, gone *realpool.Host) error {
	ctx, cancel := context.WithTimeout(ctx, heartbeatLimit)
	defer cancel()
	before := make([]int, len(h.xhads))
	for i, x := range h.xhads {
		before[i], _, _ = x.Cycles()
	}
	return realpool.Until(ctx, func() error {
		for i, x := range h.xhads {
			if done, _, _ := x.Cycles(); h.Hosts[i] != gone && done < before[i]+int(heartbeatCalm/heartbeatCycle) {
				return fmt.Errorf("%s finished %d cycles of the statefile", h.Hosts[i].Name, done-before[i])
			}
		}
		return nil
	})
}

// longest is the longest gap of any host but one since it was last asked.
func (h *hearts) longest(gone *realpool.Host) (d time.Duration) {
	for i, x := range h.xhads {
		if longest := x.Gap(); h.Hosts[i] != gone {
			d = max(d, longest)
		}
	}
	return d
}

func (h *hearts) killed(_ context.Context, owner *realpool.Host) (*realpool.Host, error) {
	owner.Kill()
	return owner, nil
}

// restarted starts a killed host's process again and waits until it is served.
func (h *hearts) restarted(ctx context.Context, gone *realpool.Host) error {
	if err := h.Start(gone); err != nil {
		return err
	}
	err := h.calm(ctx, nil)
	h.longest(nil)
	return err
}

func (h *hearts) handedOver(_ context.Context, owner *realpool.Host) (*realpool.Host, error) {
	out, err := h.Command(owner, "handover", "--run-dir", owner.RunDir).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return nil, nil
}

func (h *hearts) frozen(_ context.Context, owner *realpool.Host) (*realpool.Host, error) {
	h.xhad(owner).Pause(true) // The user space of that host is one.
	return owner, owner.Freeze()
}

func (h *hearts) xhad(host *realpool.Host) *realpool.Xhad {
	for i, other := range h.Hosts {
		if other == host {
			return h.xhads[i]
		}
	}
	return nil
}

// thawed lets a frozen host go on and waits until it has left and its links are back.
func (h *hearts) thawed(ctx context.Context, gone *realpool.Host) error {
	limit, cancel := context.WithTimeout(ctx, heartbeatLimit)
	defer cancel()
	if err := gone.Thaw(); err != nil {
		return err
	}
	err := realpool.Until(limit, func() error {
		for _, host := range h.Hosts {
			r, err := h.Report(host)
			if err != nil {
				return err
			}
			if len(r.Cut) > 0 || host == gone && r.Owns {
				return fmt.Errorf("%s: owns %v, cut links %v", host.Name, r.Owns, r.Cut)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	h.xhad(gone).Pause(false)
	if err := h.calm(ctx, nil); err != nil {
		return err
	}
	h.t.line(right, gone.Name, "wakes, finds its I/O refused, leaves, and is a candidate again; the others have restored their DRBD links to it")
	return nil
}

// judge compares what the hosts saw with xha's limit.
func (h *hearts) judge(next, gone *realpool.Host, title string) error {
	var worst time.Duration
	for i, x := range h.xhads {
		host := h.Hosts[i]
		gap := x.Gap()
		_, failed, wrong := x.Cycles()
		switch {
		case wrong != nil:
			return fmt.Errorf("%s: %s read something that cannot be: %w", title, host.Name, wrong)
		case host == gone:
			continue
		case gap > h.tolerated:
			return fmt.Errorf("%s: %s was %v without the statefile, xha tolerates %v", title, host.Name, gap, h.tolerated)
		}
		if n := failed - h.failed[i]; n > 0 { // Of a machine that is too busy: xhad asks again, too.
			h.t.line(warning, host.Name, "%d requests failed when the budget of the outage was spent", n)
			h.errors += n
		}
		h.t.line(agent, host.Name, "longest time without an answer %s: %.0f %% of the %v that xha tolerates; sees the slots of %v change", millis(gap), 100*gap.Seconds()/h.tolerated.Seconds(), h.tolerated, x.Sees())
		worst = max(worst, gap)
	}
	h.t.line(right, "pool", "%s owns the device; %d requests failed, no slot went back, nobody would fence himself", next.Name, h.errors)
	h.results = append(h.results, fmt.Sprintf("%-76s %8s  %3.0f %%", title, millis(worst), 100*worst.Seconds()/h.tolerated.Seconds()))
	return nil
}

func (h *hearts) end(owner *realpool.Host) error {
	t := h.t
	out, err := h.Command(owner, "status", "--run-dir", owner.RunDir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("status: %w: %s", err, out)
	}
	t.text(plain, "\nWhat xostor-heartbeat status says on "+owner.Name+":\n")
	for line := range strings.Lines(string(out)) {
		t.text(dim, "  "+strings.TrimRight(line, "\n"))
	}
	t.text(heading, fmt.Sprintf("\nAll %d steps came true. The longest gap that a living host saw, and its share of what xha tolerates (%v):", len(h.results), h.tolerated))
	for _, r := range h.results {
		t.text(plain, "  "+r)
	}
	return nil
}

func millis(d time.Duration) string { return d.Round(time.Millisecond).String() }
