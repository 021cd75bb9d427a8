package failover_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// world is a pool in virtual time: the DRBD model, and on every host systemd, a mount table, a controller, and the real agent. One thing runs at a time,
// so a seed always leads to the same history.
type world struct {
	clock   *drbdsim.Virtual
	cl      *drbdsim.Cluster
	hosts   []*host
	rng     *rand.Rand
	guard   bool
	mgmtCut map[[2]int]bool
	log     []string
	faults  []string // violations of the invariants
	verbose bool
}

// host is one host's user space.
type host struct {
	w     *world
	node  *drbdsim.Node
	boots int // a new one with every boot: late events of an old life are dropped

	// Kept over reboots.
	known map[string]string
	held  []string
	// systemd and the filesystem.
	mounted, readOnly bool
	mountUnit         unit
	ctl               unit
	target            unit // the reactor's, in guard mode
	ctlAlive          bool // some process of the controller is left, in state D perhaps
	sick              string
	sickSince         time.Time
	startFails        int
	mountFails        int
	unitGone          bool // the mount unit has no file
	unitGoneSeen      bool // and the agent's systemd client knows
	pids              int

	agent   *failover.Agent
	table   *failover.Table
	proc    *proc
	state   drbd.State
	fresh   bool
	lastRun time.Time
	crashIn int // the agent dies after so many actions; 0: never
}

type unit struct {
	active string
	job    bool
	since  time.Time // of the last change into inactivity
	result string
	pid    int
	gen    int // bumped by everything that overtakes what was scheduled
}

func (w *world) note(format string, args ...any) {
	line := fmt.Sprintf("%8.3f ", w.clock.Now().Sub(start).Seconds()) + fmt.Sprintf(format, args...)
	w.log = append(w.log, line)
	if w.verbose {
		fmt.Println(line)
	}
}

func (w *world) violate(format string, args ...any) {
	w.faults = append(w.faults, fmt.Sprintf(format, args...))
	w.note("VIOLATION "+format, args...)
}

var start = drbdsim.NewVirtual().Now()

func (w *world) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)+1))
}

// later runs f on the host after d, if it has not been rebooted by then; a frozen host does it when it goes on.
func (h *host) later(d time.Duration, f func()) {
	boots := h.boots
	var run func()
	run = func() {
		if h.boots != boots || !h.node.Alive() {
			return
		}
		if !h.node.Runs() {
			h.w.clock.After(10*time.Millisecond, run)
			return
		}
		f()
	}
	h.w.clock.After(d, run)
}

// --- boot and agent

func (h *host) boot() {
	h.boots++
	h.mounted, h.readOnly, h.ctlAlive, h.sick = false, false, false, ""
	h.mountUnit, h.ctl, h.target = unit{active: "inactive"}, unit{active: "inactive"}, unit{active: "inactive"}
	h.w.cl.Start(h.node)
	h.w.note("%s boots", h.node.Name)
	h.later(h.w.between(500*time.Millisecond, 2*time.Second), h.startAgent)
	if h.w.guard {
		h.later(2*time.Second, h.reactor)
	}
}

func (h *host) down() {
	h.w.note("%s loses power", h.node.Name)
	h.boots++
	h.stopAgent()
	h.mounted, h.ctlAlive = false, false
	h.ctl, h.mountUnit, h.target = unit{active: "inactive"}, unit{active: "inactive"}, unit{active: "inactive"}
	h.w.cl.Kill(h.node)
}

// frozenAction keeps a policy's timings apart from the world's.
func policy() failover.Policy { return failover.DefaultPolicy() }

func (h *host) startAgent() {
	if h.proc != nil || !h.node.Alive() {
		return
	}
	h.table = failover.NewTable(h.node.Name, policy().SuspectAfter, h.known)
	h.agent = failover.New(failover.Config{Self: h.node.Name, Names: failover.DefaultNames(), Policy: policy(), DRBD: simDRBD{h}, Units: simUnits{h}, Mounts: simMounts{h},
		Prober: simProber{h}, Talk: simTalk{h}, Files: simFiles{h}, Now: h.w.clock.Now})
	h.listen()
	h.proc = newProc(h, h.run)
	h.beats(h.proc)
	h.proc.step()
}

func (h *host) stopAgent() {
	if h.proc == nil {
		return
	}
	h.w.note("%s: agent ends", h.node.Name)
	p := h.proc
	h.proc = nil
	p.kill()
	h.node.Deaf()
	h.fresh = false
}

// listen is the child that runs events2.
func (h *host) listen() {
	h.state = drbd.State{}
	p := h.proc
	h.node.Listen(func(lines []string) {
		var ev drbd.Event
		for _, l := range lines {
			if err := errors.Join(ev.Parse(l), h.state.Apply(&ev)); err != nil {
				h.w.violate("the model prints what the parser refuses: %v", err)
			}
		}
		h.fresh = true
		if h.proc != nil {
			h.proc.wake()
		}
	})
	_ = p
}

// run is agents.Run's loop, in virtual time.
func (h *host) run(p *proc) {
	ctx := context.Background()
	failures := 0
	for {
		h.lastRun = h.w.clock.Now()
		s, _ := h.agent.Observe(ctx)
		plan := h.agent.Decide(h.w.clock.Now(), s)
		p.sleep(300*time.Microsecond, false)
		var failed error
		for _, a := range plan.Actions {
			err := h.agent.Act(ctx, a)
			h.w.note("%s %s %v: %v (%s)", h.node.Name, a.Verb, a.Args, err, a.Why)
			if err != nil && !errors.Is(err, agents.ErrMoot) {
				failed = err
				break
			}
			h.w.check()
			if h.crashIn > 0 {
				if h.crashIn--; h.crashIn == 0 {
					h.later(0, func() { h.stopAgent(); h.later(2*time.Second, h.startAgent) })
					p.sleep(time.Hour, false)
				}
			}
		}
		next := 5 * time.Second
		if failed == nil {
			failures = 0
			if plan.Recheck > 0 {
				next = min(next, plan.Recheck)
			}
		} else {
			next = min(100*time.Millisecond<<min(failures, 10), 2*time.Second)
			failures++
		}
		p.sleep(next, failed == nil)
	}
}

// beats sends and ticks for as long as this agent lives.
func (h *host) beats(p *proc) {
	if h.proc != p {
		return
	}
	now := h.w.clock.Now()
	if h.table.Tick(now) {
		p.wake()
	}
	b := h.table.Beat(now)
	for _, o := range h.w.hosts {
		if o == h {
			continue
		}
		storage := h.w.cl.Linked(h.node, o.node)
		mgmt := !h.w.mgmtCut[edge(h, o)]
		if !storage && !mgmt || !o.node.Runs() {
			continue
		}
		if o.proc == nil { // its kernel says that nobody listens
			h.table.Answered(now, o.node.Name)
			continue
		}
		if o.table.Receive(now, b, storage) {
			o.known = o.table.Known()
			o.proc.wake()
		}
	}
	h.later(failover.BeatInterval, func() { h.beats(p) })
}

func edge(a, b *host) [2]int { return [2]int{min(a.node.ID, b.node.ID), max(a.node.ID, b.node.ID)} }

// --- a process that can wait in virtual time

type proc struct {
	h     *host
	next  func() (struct{}, bool)
	stop  func()
	yield func(struct{}) bool
	token int  // what it waits for; older wakers are ignored
	open  bool // it sleeps and a wake may end that
	woken bool
	dead  bool
}

type killed struct{}

func newProc(h *host, run func(*proc)) *proc {
	p := &proc{h: h}
	p.next, p.stop = iter.Pull(func(yield func(struct{}) bool) {
		defer func() {
			if v := recover(); v != nil {
				if _, ok := v.(killed); !ok {
					panic(v)
				}
			}
		}()
		p.yield = yield
		run(p)
	})
	return p
}

func (p *proc) step() {
	if !p.dead {
		p.next()
	}
}

func (p *proc) kill() {
	p.dead = true
	p.stop()
}

// wait suspends until resume, given to begin, is called.
func (p *proc) wait(begin func(resume func())) {
	p.token++
	token := p.token
	begin(func() {
		if p.token == token && !p.dead {
			p.token++
			p.h.later(0, p.step)
		}
	})
	if !p.yield(struct{}{}) {
		panic(killed{})
	}
}

func (p *proc) sleep(d time.Duration, wakeable bool) {
	if wakeable && p.woken {
		d = time.Millisecond
	}
	if wakeable {
		p.woken = false
	}
	p.wait(func(resume func()) {
		p.open = wakeable
		p.h.later(d, resume)
	})
	p.open = false
}

func (p *proc) wake() {
	if !p.open {
		p.woken = true
		return
	}
	p.open = false
	p.token++
	token := p.token
	p.h.later(time.Millisecond, func() {
		if p.token == token && !p.dead {
			p.token++
			p.step()
		}
	})
}

// --- ports

type simDRBD struct{ h *host }

func (d simDRBD) View() drbd.View {
	v := drbd.View{Fresh: d.h.fresh, Err: "events2 was killed"}
	if r := d.h.state.Resources[failover.DefaultNames().Resource]; r != nil {
		v.Resource = r.Clone()
	}
	return v
}

func (d simDRBD) Status(context.Context) (*drbd.Resource, error) {
	list, err := drbd.ParseStatus([]byte(d.h.node.StatusJSON()))
	if err != nil || len(list) == 0 {
		return nil, errors.Join(drbd.ErrNoResource, err)
	}
	return &list[0], nil
}

func (d simDRBD) Options() drbd.Options {
	return drbd.Options{Quorum: d.h.w.cl.Quorum, OnNoQuorum: d.h.w.cl.OnNoQuorum, RRConflict: d.h.w.cl.RRConflict, NodeID: d.h.node.ID}
}

func (d simDRBD) answer(e *drbdsim.Error) error {
	if e == nil {
		return nil
	}
	return &drbd.CommandError{Exit: e.Exit, Code: e.Code, Text: e.Text}
}

func (d simDRBD) Primary(context.Context) error {
	h := d.h
	if h.w.guard {
		h.w.violate("I7: %s promotes beside a reactor", h.node.Name)
	}
	var out *drbdsim.Error
	h.proc.wait(func(resume func()) {
		h.node.Primary(func(e *drbdsim.Error) { out = e; resume() })
	})
	h.w.check()
	return d.answer(out)
}

func (d simDRBD) Secondary(_ context.Context, force bool) error {
	d.h.proc.sleep(5*time.Millisecond, false)
	if force && d.h.node.IsPrimary() && d.h.node.HasQuorum() {
		d.h.w.note("%s: forced demotion of an owner whose quorum came back", d.h.node.Name)
	}
	return d.answer(d.h.node.Secondary(force))
}

func (d simDRBD) Connect(_ context.Context, id int) error {
	e := d.h.node.Connect(id)
	if e != nil && e.Code == 125 {
		return nil
	}
	return d.answer(e)
}

func (d simDRBD) Adjust(context.Context) error {
	d.h.proc.sleep(50*time.Millisecond, false)
	return d.answer(d.h.node.Adjust())
}

type simUnits struct{ h *host }

func (u simUnits) pick(name string) *unit {
	switch n := failover.DefaultNames(); name {
	case n.Controller:
		return &u.h.ctl
	case n.MountUnit:
		return &u.h.mountUnit
	}
	return &u.h.target
}

func (u simUnits) State(_ context.Context, name string) (systemd.Unit, error) {
	k := u.pick(name)
	out := systemd.Unit{Name: name, Load: "loaded", Active: k.active, InactiveSince: k.since, Result: k.result, MainPID: k.pid}
	if k.job {
		out.Job = 1
	}
	if k == &u.h.mountUnit && u.h.unitGoneSeen {
		out.Load = "not-found"
	}
	return out, nil
}

func (u simUnits) Start(_ context.Context, name string) error {
	switch k := u.pick(name); {
	case name == failover.DefaultNames().Controller:
		u.h.startController()
	case name == failover.DefaultNames().MountUnit && u.h.unitGone:
		u.h.unitGoneSeen = true
		return errors.New("unit not found")
	case name == failover.DefaultNames().MountUnit && k.active != "active":
		u.h.startMount()
	case k == &u.h.target:
		u.h.w.violate("I7: the reactor's target is started by the agent")
	}
	return nil
}

func (u simUnits) Restart(ctx context.Context, name string) error {
	u.pick(name).active = "inactive"
	return u.Start(ctx, name)
}

func (u simUnits) Stop(_ context.Context, name string, _ systemd.StopMode) error {
	switch name {
	case failover.DefaultNames().Controller:
		u.h.stopController(false)
	case failover.DefaultNames().MountUnit:
		u.h.mountUnit.gen++
		u.h.mountUnit.active, u.h.mountUnit.job = "inactive", false
		if u.h.mounted && !u.h.ctlAlive {
			u.h.umount()
		}
	}
	return nil
}

func (u simUnits) Kill(_ context.Context, name string, _ syscall.Signal) error {
	if name == failover.DefaultNames().Controller {
		u.h.killController()
	}
	return nil
}

func (u simUnits) SignalMain(_ context.Context, name string, sig syscall.Signal) error {
	if sig == syscall.SIGTERM {
		u.h.stopController(true)
	}
	return nil
}

// startController is the unit's start: minutes are allowed, seconds are usual.
func (h *host) startController() {
	k := &h.ctl
	if k.active == "active" || k.active == "activating" || h.ctlAlive {
		return
	}
	k.gen++
	gen := k.gen
	k.active, k.result = "activating", ""
	h.ctlAlive = true
	h.pids++
	k.pid = h.pids
	h.sick = ""
	if !h.mounted {
		h.w.violate("I2: %s starts a controller without the database", h.node.Name)
	}
	h.later(h.w.between(2*time.Second, 6*time.Second), func() {
		if k.gen != gen || k.active != "activating" {
			return
		}
		if h.startFails > 0 || !h.node.Writable() || h.readOnly || !h.mounted {
			h.startFails = max(h.startFails-1, 0)
			h.ctlGone("exit-code")
			return
		}
		k.active = "active"
		h.node.SetBusy(true)
		h.w.note("%s: controller is up", h.node.Name)
		h.w.check()
		h.ctlWrites(gen)
		h.changed()
	})
	h.changed()
}

// ctlWrites writes to the database now and then.
func (h *host) ctlWrites(gen int) {
	if h.ctl.gen != gen || h.ctl.active != "active" {
		return
	}
	h.node.Write()
	if !h.node.Writable() && !h.node.Suspended() && h.sick == "" {
		h.sick, h.sickSince, h.readOnly = "h2", h.w.clock.Now(), true
		h.changed()
	}
	h.later(time.Second, func() { h.ctlWrites(gen) })
}

func (h *host) ctlGone(result string) {
	h.ctl.gen++
	h.ctl.active, h.ctl.result, h.ctl.pid, h.ctl.since = "failed", result, 0, h.w.clock.Now()
	if result == "success" {
		h.ctl.active = "inactive"
	}
	h.ctlAlive = false
	h.node.SetBusy(false)
	h.w.note("%s: controller is gone (%s)", h.node.Name, result)
	h.changed()
}

func (h *host) stopController(sigterm bool) {
	k := &h.ctl
	if k.active != "active" && k.active != "activating" {
		return
	}
	k.gen++
	gen := k.gen
	k.active = "deactivating"
	d := h.w.between(300*time.Millisecond, 2*time.Second)
	if h.sick == "hang" {
		return // only SIGKILL helps
	}
	h.later(d, func() {
		if k.gen == gen && k.active == "deactivating" && !h.node.Suspended() {
			if !sigterm && h.w.guard {
				h.target.active = "inactive" // an ordered stop tears the chain down; an exit by itself does not
			}
			h.ctlGone("success")
		}
	})
}

// killController is SIGKILL to the cgroup: at once, but for processes that wait for frozen I/O.
func (h *host) killController() {
	if !h.ctlAlive {
		return
	}
	h.ctl.gen++
	gen := h.ctl.gen
	h.ctl.active = "deactivating"
	var try func()
	try = func() {
		if h.ctl.gen != gen {
			return
		}
		if h.node.Suspended() && h.mounted {
			h.later(20*time.Millisecond, try)
			return
		}
		h.ctlGone("signal")
	}
	h.later(5*time.Millisecond, try)
}

func (h *host) startMount() {
	k := &h.mountUnit
	k.gen++
	gen := k.gen
	k.active = "activating"
	h.later(h.w.between(50*time.Millisecond, 300*time.Millisecond), func() {
		if k.gen != gen {
			return
		}
		if !h.mounted {
			failed := h.mountFails > 0
			h.mountFails = max(h.mountFails-1, 0)
			if failed || h.node.Open("mount") != nil {
				k.active, k.since = "failed", h.w.clock.Now()
				h.changed()
				return
			}
			h.mounted, h.readOnly = true, false
		}
		k.active = "active"
		h.w.note("%s: mounted", h.node.Name)
		h.changed()
	})
}

// dropUnit takes the mount unit's file away, or puts it back. The agent hears of it later.
func (h *host) dropUnit(gone bool) {
	h.unitGone = gone
	h.later(h.w.between(10*time.Millisecond, 2*time.Second), func() {
		h.unitGoneSeen = h.unitGone
		h.changed()
	})
}

func (h *host) umount() {
	h.mounted, h.readOnly = false, false
	h.node.Close("mount")
	h.w.note("%s: unmounted", h.node.Name)
	h.changed()
}

// changed is systemd's signal, or mountinfo's poll.
func (h *host) changed() {
	h.w.check()
	if h.proc != nil {
		h.later(2*time.Millisecond, func() {
			if h.proc != nil {
				h.proc.wake()
			}
		})
	}
}

type simMounts struct{ h *host }

func (m simMounts) Look(string, int) (failover.Mount, error) {
	return failover.Mount{Known: true, Ours: m.h.mounted, ReadOnly: m.h.readOnly}, nil
}

func (m simMounts) Unmount(context.Context, string) error {
	m.h.proc.sleep(3*time.Millisecond, false)
	switch {
	case !m.h.mounted:
		return nil
	case m.h.ctlAlive:
		return errors.New("target is busy")
	case m.h.node.Suspended():
		m.h.proc.sleep(time.Second, false)
		return context.DeadlineExceeded
	}
	m.h.umount()
	return nil
}

func (m simMounts) Holders(string, int) []string { return nil }

type simProber struct{ h *host }

func (p simProber) Health(pid int) failover.Health {
	h := p.h
	if pid == 0 || h.sick == "" {
		return failover.Health{}
	}
	n := int(h.w.clock.Now().Sub(h.sickSince) / (10 * time.Second))
	bad := failover.Probe{Fails: n, Err: h.sick}
	if h.sick == "h2" {
		return failover.Health{Internal: bad}
	}
	return failover.Health{REST: bad, List: bad}
}

type simTalk struct{ h *host }

func (t simTalk) Hear(now time.Time) ([]failover.Peer, *failover.Move) { return t.h.table.Hear(now) }
func (t simTalk) Tell(b failover.Beat)                                 { t.h.table.Tell(b) }

type simFiles struct{ h *host }

func (simFiles) ResFile() failover.ResFile {
	return failover.ResFile{Known: true, Valid: true, Copy: true, Saved: true}
}
func (simFiles) RestoreRes() error                    { return nil }
func (simFiles) SaveRes() error                       { return nil }
func (simFiles) ActivateVolume(context.Context) error { return nil }
func (f simFiles) Held() []string                     { return slices.Clone(f.h.held) }
func (f simFiles) KeepHeld(peers []string) error      { f.h.held = slices.Clone(peers); return nil }
func (f simFiles) Reactor() drbd.Tri                  { return drbd.TriOf(f.h.w.guard) }

// --- drbd-reactor, as far as guard mode meets it (controller-failover.md 1.3-1.5)

func (h *host) reactor() {
	lastStart := h.w.clock.Now().Add(-time.Minute)
	busy := false
	var tick func()
	tick = func() {
		defer h.later(50*time.Millisecond, tick)
		h.node.BringUp()
		if busy {
			return
		}
		switch n := h.node; {
		case h.target.active == "active" && (!n.IsPrimary() || !n.HasQuorum()):
			busy = true
			h.w.note("%s: reactor stops", n.Name)
			h.stopController(false)
			h.reactorStop(0, func() { busy = false })
		case h.target.active != "active" && !h.mounted && !h.ctlAlive && n.MayPromote() && h.w.clock.Now().Sub(lastStart) > 20*time.Second:
			busy, lastStart = true, h.w.clock.Now()
			h.w.note("%s: reactor starts", n.Name)
			h.later(6*time.Millisecond, func() {
				n.Primary(func(e *drbdsim.Error) {
					if e != nil {
						busy = false
						return
					}
					h.target.active = "activating"
					h.startMount()
					h.later(400*time.Millisecond, func() {
						busy = false
						if !h.mounted {
							h.target.active = "inactive"
							_ = n.Secondary(true)
							return
						}
						h.target.active = "active"
						h.startController()
						h.changed()
					})
				})
			})
		}
	}
	tick()
}

// reactorStop waits for the controller to die, unmounts, demotes. SM's units give it 90 s phases; with nothing to wait for it is quick.
func (h *host) reactorStop(waited time.Duration, done func()) {
	const step = 100 * time.Millisecond
	switch {
	case h.ctlAlive && waited < 90*time.Second:
		if h.ctl.active == "active" {
			h.stopController(false)
		}
		h.later(step, func() { h.reactorStop(waited+step, done) })
		return
	case h.ctlAlive:
		h.killController()
	}
	if h.mounted && !h.ctlAlive && !h.node.Suspended() {
		h.umount()
	}
	_ = h.node.Secondary(true)
	h.mountUnit.active = "inactive"
	if h.mounted || h.ctlAlive {
		h.later(step, func() { h.reactorStop(waited+step, done) })
		return
	}
	h.target.active = "inactive"
	h.changed()
	done()
}

// --- invariants that hold at every moment

// check looks for two live databases.
func (w *world) check() {
	var live []string
	for _, h := range w.hosts {
		if h.ctl.active == "active" && h.mounted && !h.readOnly && h.node.Writable() && h.node.Alive() {
			live = append(live, h.node.Name)
		}
	}
	if len(live) > 1 && !w.staleAll(live) {
		w.violate("I1: controllers with a live database on %v", live)
	}
	for _, v := range w.cl.Violations {
		w.violate("DRBD: %s", v)
	}
	w.cl.Violations = nil
}

// staleAll tells whether all but one of the hosts cannot in truth write: they have not noticed yet that they are cut off.
func (w *world) staleAll(names []string) bool {
	n := 0
	for _, name := range names {
		if h := w.host(name); w.cl.Commits(h.node) {
			n++
		}
	}
	return n <= 1
}

func (w *world) host(name string) *host {
	i := slices.IndexFunc(w.hosts, func(h *host) bool { return h.node.Name == name })
	return w.hosts[i]
}
