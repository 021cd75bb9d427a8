package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

const (
	stepLimit   = 90 * time.Second        // a lost event costs one resync of 60 s; the time is printed
	readingTime = 1500 * time.Millisecond // before each step, when a person looks on
	lull        = 150 * time.Millisecond  // an agent that was silent this long has said all about a change
)

// narrator plays the steps.
type narrator struct {
	*site
	t       *timeline
	slowest time.Duration // from a change to correct numbers
	disk    string
	vm      string
}

// step is one thing that happens. Its do changes the pool; await waits for the consequence and may print.
type step struct {
	title string
	notes []string
	do    func() error
	await func(ctx context.Context, heard int, before lab.Sizes) error
}

func story(ctx context.Context, o options, t *timeline) (err error) {
	s, err := openSite(o.xostor, func(dir string) (*lab.Pool, error) {
		return lab.New(lab.Options{Dir: dir, Seed: 1, DeadAfter: 2 * time.Second, Cluster: true})
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	n := &narrator{site: s, t: t}
	t.text(heading, "A pool of three XCP-ng hosts with XOSTOR, on this machine. The pool is a model; the xostor processes and their sockets are real.")
	t.text(plain, "")
	t.text(plain, "  hosts       xcp1 (XAPI's coordinator, LINSTOR's controller), xcp2, xcp3; 1 TiB of thin LVM each")
	t.text(plain, "  SR          XOSTOR, two replicas of each disk: 3 hosts x 1 TiB / 2 = 1.5 TiB")
	t.text(plain, "  processes   on each host: xostor bus, xostor agent sr-size; only the coordinator's agent writes")
	t.text(plain, "  the point   XAPI's three sizes of the SR must equal what LINSTOR's satellites really hold. Today a full scan does that every 720 s.")
	t.begin()
	s.log.hear = n.tell
	for _, h := range s.pool.Hosts() {
		if err := s.startHost(ctx, h.Name); err != nil {
			return err
		}
	}
	t.line(plain, "demo", "bus and agent run on %d hosts; XAPI shows %s", len(s.pool.Hosts()), s.pool.Shown(s.pool.SR()))
	steps := n.steps()
	for i, st := range steps {
		if t.color {
			wait(ctx, readingTime)
		}
		if err := n.play(ctx, i+1, st); err != nil {
			return fmt.Errorf("step %d did not come true: %s: %w\n%s", i+1, st.title, err, s.lastWords())
		}
	}
	t.text(right, fmt.Sprintf("\nAll %d steps came true. XAPI was right at most %.1f s after each change; with a scan every 720 s it takes 360 s on average.",
		len(steps), n.slowest.Seconds()))
	if o.stay {
		return n.stay(ctx)
	}
	return nil
}

func (n *narrator) steps() []step {
	write := func(bytes int64) func() error {
		return func() error { return n.pool.WriteDisk(n.disk, bytes) }
	}
	return []step{
		{"A disk of 20 GiB is created", []string{"The storage manager (SM) writes the sizes itself here. There is nothing to correct."}, n.create, n.correct(false)},
		{"A VM starts on xcp2 and writes 3 GiB", []string{"The disk is thin: its replicas grow on the hosts. Neither LINSTOR's controller nor XAPI is told."}, n.startAndWrite, n.correct(true)},
		{"A snapshot is taken, and the VM writes 1 GiB more", []string{"The data becomes a hidden base; the disk and the snapshot are new volumes on it."}, n.snapshot, n.correct(true)},
		{"The VM is stopped, its disk grows to 40 GiB, the VM starts and writes 1 GiB", nil, n.resize, n.correct(true)},
		{"Host xcp3 loses its power", []string{"LINSTOR no longer sees a third of the pool. From such a view nothing must be written."},
			func() error { n.pool.HostDown("xcp3"); return nil }, n.keepsLastGood},
		{"The periodic scan runs while xcp3 is away", nil, n.scanWrongly, n.seesWrongNumbers},
		{"Host xcp3 is back", nil, func() error { return n.pool.HostUp("xcp3") }, n.correct(true)},
		{"LINSTOR's controller moves to xcp3, and the VM writes 1 GiB", nil, n.then(func() error { return n.pool.MoveController("xcp3") }, write(gib)), n.correct(true)},
		{"XAPI's coordinator becomes xcp2, and the VM writes 1 GiB", []string{"The agent on xcp2 takes over; the one on xcp1 stops writing."},
			n.then(func() error { return n.pool.MoveCoordinator("xcp2") }, write(gib)), n.onlyFrom("xcp2")},
	}
}

// play announces a step, does it, and waits for what must follow.
func (n *narrator) play(ctx context.Context, number int, st step) error {
	before, heard := n.pool.Shown(n.pool.SR()), n.log.len()
	n.t.text(plain, "")
	n.t.line(heading, "event", "%d. %s", number, st.title)
	for _, note := range st.notes {
		n.t.note("%s", note)
	}
	if err := st.do(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	return st.await(ctx, heard, before)
}

func (n *narrator) then(first, second func() error) func() error {
	return func() error {
		if err := first(); err != nil {
			return err
		}
		return second()
	}
}

func (n *narrator) create() (err error) {
	n.disk, err = n.pool.CreateDisk(20 * gib)
	return err
}

func (n *narrator) startAndWrite() (err error) {
	if n.vm, err = n.pool.CreateVM("guest", n.disk); err != nil {
		return err
	}
	return n.then(func() error { return n.pool.StartVM(n.vm, "xcp2") }, func() error { return n.pool.WriteDisk(n.disk, 3*gib) })()
}

func (n *narrator) snapshot() error {
	if _, err := n.pool.SnapshotDisk(n.disk); err != nil {
		return err
	}
	return n.pool.WriteDisk(n.disk, gib)
}

func (n *narrator) resize() error {
	for _, do := range []func() error{
		func() error { return n.pool.StopVM(n.vm) },
		func() error { return n.pool.ResizeDisk(n.disk, 40*gib) },
		func() error { return n.pool.StartVM(n.vm, "xcp2") },
		func() error { return n.pool.WriteDisk(n.disk, gib) },
	} {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// correct waits until XAPI shows the truth; acts says that it needs the agent for that.
func (n *narrator) correct(acts bool) func(context.Context, int, lab.Sizes) error {
	return func(ctx context.Context, heard int, before lab.Sizes) error {
		took, err := n.settled(ctx)
		if err != nil {
			return err
		}
		n.slowest = max(n.slowest, took)
		if acts {
			if err := n.log.await(ctx, heard, func(s said) bool { return s.action() && s.record.Outcome == agents.Done }); err != nil {
				return fmt.Errorf("XAPI is right, but no decision was heard on the bus: %w", err)
			}
		}
		n.shows(before, took)
		return nil
	}
}

// settled waits until XAPI shows the truth and still does after everybody is silent, and says how long it took to become so for good.
func (n *narrator) settled(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	for {
		if _, err := n.trueWithin(ctx, stepLimit); err != nil {
			return 0, err
		}
		took := time.Since(begin)
		if n.silence(ctx); n.pool.True() {
			return took, nil
		}
	}
}

// silence waits until agents have nothing more to say about a change.
func (n *narrator) silence(ctx context.Context) {
	for {
		_, changed := n.log.since(n.log.len())
		quiet := time.NewTimer(lull)
		select {
		case <-changed:
			quiet.Stop()
		case <-quiet.C:
			return
		case <-ctx.Done():
			quiet.Stop()
			return
		}
	}
}

// shows prints XAPI's numbers before and after.
func (n *narrator) shows(before lab.Sizes, took time.Duration) {
	n.t.line(right, "XAPI", "%s (right %.1f s after the change)", difference(before, n.pool.Shown(n.pool.SR())), took.Seconds())
}

// difference names the sizes that changed.
func difference(a, b lab.Sizes) string {
	text := ""
	for _, f := range []struct {
		name string
		a, b int64
	}{{"size", a.Physical, b.Physical}, {"used", a.Utilisation, b.Utilisation}, {"allocated", a.Virtual, b.Virtual}} {
		if f.a != f.b {
			text += fmt.Sprintf(", %s %s -> %s", f.name, lab.Human(f.a), lab.Human(f.b))
		}
	}
	if text == "" {
		return "unchanged: " + b.String()
	}
	return text[2:]
}

func finding(code string) func(said) bool {
	return func(s said) bool { return s.raised && s.found.Code == code }
}

// keepsLastGood waits for the finding about the partial view, and checks that nothing was written.
func (n *narrator) keepsLastGood(ctx context.Context, heard int, before lab.Sizes) error {
	if err := n.log.await(ctx, heard, finding("partial-view")); err != nil {
		return fmt.Errorf("no finding about the partial view: %w", err)
	}
	if now := n.pool.Shown(n.pool.SR()); now != before {
		return fmt.Errorf("the sizes changed: %s", difference(before, now))
	}
	n.t.line(right, "XAPI", "unchanged, the last good values stay: %s", before)
	return nil
}

func (n *narrator) scanWrongly() error {
	good := n.pool.Shown(n.pool.SR())
	if err := n.pool.SRScan(); err != nil {
		return err
	}
	n.t.line(wrong, "XAPI", "%s (WRONG: the scan counts only the hosts that answer)", difference(good, n.pool.Shown(n.pool.SR())))
	return nil
}

func (n *narrator) seesWrongNumbers(ctx context.Context, heard int, _ lab.Sizes) error {
	if err := n.log.await(ctx, heard, finding("wrong-numbers")); err != nil {
		return fmt.Errorf("no finding about the wrong numbers: %w", err)
	}
	n.t.note("The agent sees it, but will not guess: it corrects the numbers as soon as it sees all hosts again.")
	return nil
}

// onlyFrom is correct(true), and all decisions must have been made on that host.
func (n *narrator) onlyFrom(host string) func(context.Context, int, lab.Sizes) error {
	return func(ctx context.Context, heard int, before lab.Sizes) error {
		if err := n.correct(true)(ctx, heard, before); err != nil {
			return err
		}
		list, _ := n.log.since(heard)
		for _, s := range list {
			if s.action() && s.record.Outcome == agents.Done && s.host != host {
				return fmt.Errorf("%s wrote on %s", s.record.Action.Verb, s.host)
			}
		}
		return nil
	}
}

// tell prints what an agent said.
func (n *narrator) tell(s said) {
	switch {
	case s.action() && s.record.Outcome == agents.Done:
		n.t.line(agent, "sr-size", "%s (%s): %s", s.record.Action.Verb, s.host, s.record.Action.Why)
	case s.action() && s.record.Outcome == agents.Failed:
		n.t.line(wrong, "sr-size", "%s (%s) failed: %s", s.record.Action.Verb, s.host, s.record.Error)
	case s.action() || s.found.Severity == agents.Info && s.raised:
	case s.raised:
		n.t.line(warning, "finding", "%s (%s): %s", s.found.Code, s.host, s.found.Text)
	case s.found.Severity != agents.Info:
		n.t.line(plain, "finding", "%s (%s) is over", s.found.Code, s.host)
	}
}

// stay keeps the pool busy until ctx ends, and says what can be tried.
func (n *narrator) stay(ctx context.Context) error {
	config := filepath.Join(n.dir, n.pool.Coordinator().Name, "agents.toml")
	n.t.text(heading, "\nThe pool stays, and its VM writes 64 MiB every 5 s. In another terminal:")
	for _, c := range [][2]string{
		{"status", "how the agents are, and what they found"},
		{"events --follow", "what happens, live; try it first"},
		{"plan sr-size", "what the agent would do now, without doing it"},
	} {
		n.t.text(plain, fmt.Sprintf("  %s %s --config %s\n      %s", n.bin, c[0], config, c[1]))
	}
	n.t.text(plain, fmt.Sprintf("  curl -s http://%s/v1/view/storage-pools\n      the controller's view of the pools\n\nCtrl-C ends everything.\n", n.controllerAddress()))
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := n.pool.WriteDisk(n.disk, 64*mib); err != nil {
				return err
			}
		}
	}
}

func (n *narrator) controllerAddress() string {
	for i, h := range n.pool.Hosts() {
		if h.Name == n.pool.Controller().Name {
			return n.pool.Controllers()[i]
		}
	}
	return ""
}
