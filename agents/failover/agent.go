// Package failover keeps exactly one healthy LINSTOR controller running, on a host that holds the database with DRBD quorum.
//
// It promises: it never starts a controller without the database's filesystem, never promotes by force, never discards data, never resumes frozen
// I/O, never reboots; a restart of the agent changes nothing. It does not promise to be the only one who promotes: DRBD sees to that. See DESIGN.md.
package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/bus/subject"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// Name is the agent's name.
const Name = "failover"

// DRBD is the resource on this host.
type DRBD interface {
	View() drbd.View
	Status(ctx context.Context) (*drbd.Resource, error) // for when the view is stale
	Options() drbd.Options                              // last known; zero: never read
	Primary(ctx context.Context) error
	Secondary(ctx context.Context, force bool) error
	Connect(ctx context.Context, peerNodeID int) error
	Adjust(ctx context.Context) error
}

// Units is systemd on this host. No call waits for a job to end.
type Units interface {
	State(ctx context.Context, unit string) (systemd.Unit, error)
	Start(ctx context.Context, unit string) error
	Restart(ctx context.Context, unit string) error
	Stop(ctx context.Context, unit string, mode systemd.StopMode) error
	Kill(ctx context.Context, unit string, signal syscall.Signal) error
	SignalMain(ctx context.Context, unit string, signal syscall.Signal) error
}

// Mounts is the mount table of this host. minor is the DRBD device's; -1: not known.
type Mounts interface {
	Look(mountPoint string, minor int) (Mount, error)
	Unmount(ctx context.Context, mountPoint string) error // plain, once; never lazy
	Holders(mountPoint string, minor int) []string
}

// Prober probes the controller while it runs.
type Prober interface {
	// Health returns what is known of the controller with this main process; another process starts from scratch. 0: none runs.
	Health(pid int) Health
}

// Talk is what hosts say to each other.
type Talk interface {
	Hear(now time.Time) ([]Peer, *Move)
	Tell(b Beat)
}

// Files is what is kept on this host's disk.
type Files interface {
	ResFile() ResFile
	RestoreRes() error
	SaveRes() error
	ActivateVolume(ctx context.Context) error // lvchange -ay of the backing volume that the .res file names
	Reactor() drbd.Tri                        // drbd-reactor is configured to promote the resource
	// Held are the peers whose connections were taken down by hand, as KeepHeld last wrote them.
	Held() []string
	KeepHeld(peers []string) error
}

// Config is what an Agent stands on. All ports are compulsory.
type Config struct {
	Self   string // this host's name in DRBD and LINSTOR
	Names  Names
	Policy Policy
	Force  Mode // overrides the choice of the mode; "": from facts
	DRBD   DRBD
	Units  Units
	Mounts Mounts
	Prober Prober
	Talk   Talk
	Files  Files
	// Prepared tells, before each start of the controller, whether all is done that needs the database mounted and at rest, and begins it if not. It does
	// not block, and says yes after a while in any case. Nil: nothing needs to be done.
	Prepared func() bool
	// BackupTrouble says what is wrong with the backups; nil or "": nothing.
	BackupTrouble func() string
	Now           func() time.Time // nil: time.Now
	Log           *slog.Logger     // nil: none
}

// Agent is the failover agent of one host. Run it with agents.Run and RunOptions.
type Agent struct {
	c      Config
	mu     sync.Mutex // guards what status readers see
	memory Memory
	last   Snapshot
}

// New makes the agent. It does nothing until it is run.
func New(c Config) *Agent {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Agent{c: c}
}

// RunOptions are the timings of agents.Run for this agent: wakes are acted on at once, without settling, because DRBD's come one per transition and the
// others are gathered where they arise; failures are retried fast.
func RunOptions() agents.Options {
	return agents.Options{Settle: time.Nanosecond, SettleMax: time.Nanosecond, Resync: 5 * time.Second, PassTimeout: 20 * time.Second,
		BackoffMin: 100 * time.Millisecond, BackoffMax: 2 * time.Second}
}

// Name implements agents.Agent.
func (a *Agent) Name() string { return Name }

// Wakes implements agents.Agent: this agent's hints come from DRBD, systemd and its own kind, not from the bus.
func (a *Agent) Wakes() []subject.Subject { return nil }

// Last returns the latest snapshot, for status.
func (a *Agent) Last() Snapshot {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

// Observe implements agents.Agent. It fails never: what cannot be read is unknown in the snapshot.
func (a *Agent) Observe(ctx context.Context) (Snapshot, error) {
	now := a.c.Now()
	s := Snapshot{Policy: a.c.Policy, Self: a.c.Self, Names: a.c.Names, Reactor: a.c.Files.Reactor(), File: a.c.Files.ResFile()}
	a.observeDRBD(ctx, &s)
	s.Options = a.c.DRBD.Options()
	s.NodeID = s.Options.NodeID
	a.observeUnits(ctx, &s)
	minor := -1
	if s.Res != nil && len(s.Res.Devices) > 0 {
		minor = s.Res.Devices[0].Minor
	}
	var err error
	if s.Mount, err = a.c.Mounts.Look(s.Names.MountPoint, minor); err != nil {
		a.c.Log.Debug("mount table unreadable", agents.KeyErr, err)
		s.Mount = Mount{}
	}
	s.Peers, s.Move = a.c.Talk.Hear(now)
	s.Mode, s.ModeWhy = chooseMode(a.c.Force, &s)
	pid := 0
	if s.UnitsKnown && s.Controller.Active == "active" {
		pid = s.Controller.MainPID
	}
	s.Health = a.c.Prober.Health(pid)
	if a.c.BackupTrouble != nil {
		s.BackupTrouble = a.c.BackupTrouble()
	}

	s.Kept = a.c.Files.Held()
	if !a.memory.HeldRead {
		a.memory.Held, a.memory.HeldRead = s.Kept, true
	}
	a.memory = remember(now, a.memory, &s)
	if s.Move != nil && s.Move.ID == a.memory.MoveDone {
		s.Move = nil // nobody holds for a target that has had its turn: it may die the next moment
	}
	if !a.memory.Releasing.IsZero() && now.Sub(a.memory.Releasing) > s.Policy.HoldersAfter {
		s.Holders = a.c.Mounts.Holders(s.Names.MountPoint, minor)
	}
	s.Memory = a.memory
	s.Memory.Asked = maps.Clone(a.memory.Asked)
	a.c.Talk.Tell(beat(&s))
	a.mu.Lock()
	a.last = s
	a.mu.Unlock()
	return s, nil
}

func (a *Agent) observeDRBD(ctx context.Context, s *Snapshot) {
	v := a.c.DRBD.View()
	s.Fresh, s.Known, s.Res, s.DRBDErr = v.Fresh, v.Fresh, v.Resource, v.Err
	if v.Fresh {
		return
	}
	r, err := a.c.DRBD.Status(ctx)
	switch {
	case err == nil:
		s.Known, s.Res = true, r
	case errors.Is(err, drbd.ErrNoResource):
		s.Known, s.Res = true, nil
	default:
		s.DRBDErr = err.Error()
	}
}

func (a *Agent) observeUnits(ctx context.Context, s *Snapshot) {
	s.UnitsKnown = true
	for _, u := range []struct {
		name string
		into *systemd.Unit
	}{{s.Names.Controller, &s.Controller}, {s.Names.MountUnit, &s.MountUnit}, {s.Names.Target, &s.Target}} {
		st, err := a.c.Units.State(ctx, u.name)
		if err != nil {
			a.c.Log.Debug("unit unreadable", agents.KeyErr, err)
			s.UnitsKnown = false
		}
		*u.into = st
	}
}

// chooseMode picks the mode from facts, and says why.
func chooseMode(forced Mode, s *Snapshot) (Mode, string) {
	if forced != "" && forced != Owner {
		return forced, "configured"
	}
	if s.Options.Quorum == "" {
		return Observe, "the resource's options are not known"
	}
	if s.Reactor == drbd.Yes {
		return Guard, "drbd-reactor on this host promotes the resource"
	}
	for _, p := range s.Peers {
		if p.Reactor == drbd.Yes {
			return Guard, "drbd-reactor on " + p.Name + " promotes the resource"
		}
	}
	if !s.quorumOn() {
		return Observe, "quorum is off"
	}
	if forced == Owner {
		return Owner, "configured"
	}
	if s.Reactor != drbd.No {
		return Observe, "drbd-reactor's configuration cannot be read"
	}
	if s.Res == nil {
		return Observe, "the resource is not up, so its hosts are not known"
	}
	for _, c := range s.Res.Connections {
		if p := s.peer(c.Name); p == nil || p.Reactor != drbd.No {
			return Observe, "host " + c.Name + " has not said whether drbd-reactor promotes there"
		}
	}
	return Owner, "no host of the pool has a drbd-reactor promoter"
}

// beat says what the others need to know.
func beat(s *Snapshot) Beat {
	b := Beat{Node: s.Self, Mode: s.Mode, NodeID: s.NodeID, Mounted: s.Mount.Ours || len(s.Mount.Elsewhere) > 0, Reactor: s.Reactor == drbd.Yes, Move: s.Move}
	if s.Res != nil && s.Known {
		b.Role, b.Owner = string(s.Res.Role), s.owns()
		b.Usable = s.Res.LocalUpToDate() == drbd.Yes && s.Res.ForceIOFailure != drbd.Yes && !s.Mount.Foreign && !s.Mount.NotDir && len(s.Mount.Elsewhere) == 0 &&
			s.UnitsKnown && s.Controller.Load == "loaded" && s.MountUnit.Load == "loaded"
	}
	b.Failures, _ = s.Memory.failed()
	switch {
	case s.jvmGone():
		b.JVM = JVMDown
	case s.UnitsKnown && s.Controller.Active == "active":
		b.JVM = JVMUp
	case s.UnitsKnown:
		b.JVM = JVMStarting
	}
	return b
}

// Decide implements agents.Agent.
func (a *Agent) Decide(now time.Time, s Snapshot) agents.Plan { return Decide(now, s) }

// asked notes an attempt, for back-off. ok: it had the effect, so the next one starts from scratch.
func (a *Agent) asked(key string, err error) {
	at := a.memory.Asked[key]
	at.Last, at.N, at.Err = a.c.Now(), at.N+1, ""
	if err != nil {
		at.Err = err.Error()
	}
	if a.memory.Asked == nil {
		a.memory.Asked = map[string]Attempt{}
	}
	a.memory.Asked[key] = at
}

func (a *Agent) forget(keys ...string) {
	for _, k := range keys {
		delete(a.memory.Asked, k)
	}
}

// Act implements agents.Agent.
func (a *Agent) Act(ctx context.Context, act agents.Action) error {
	n := a.c.Names
	switch act.Verb {
	case VerbRelease:
		return a.release(ctx)
	case VerbYield:
		if act.Args["hand-over"] != "" && a.memory.Yielding.IsZero() {
			a.memory.HandOver = a.c.Now()
		}
		return a.yield(ctx)
	case VerbPromote:
		return a.promote(ctx, act)
	case VerbCheckPeers:
		return a.checkPeers(ctx)
	case VerbMount:
		if err := a.needOwner(); err != nil {
			return err
		}
		return a.mount(ctx)
	case VerbStart:
		return a.start(ctx)
	case VerbSignal:
		return a.signal(ctx, act)
	case VerbConnect:
		id, err := strconv.Atoi(act.Args["node-id"])
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		err = a.c.DRBD.Connect(ctx, id)
		a.asked("connect/"+act.Args["peer"], err)
		return err
	case VerbBringUp:
		// The volume may be active already, or the disk not an LV: adjust tells what counts.
		actErr := a.c.Files.ActivateVolume(ctx)
		err := a.c.DRBD.Adjust(ctx)
		if err != nil {
			err = errors.Join(err, actErr)
		}
		a.asked("bring-up", err)
		return err
	case VerbRestoreRes:
		err := a.c.Files.RestoreRes()
		a.asked("restore", err)
		return err
	case VerbKeepHeld:
		err := a.c.Files.KeepHeld(a.memory.Held)
		a.asked("held", err)
		return err
	case VerbSaveRes:
		err := a.c.Files.SaveRes()
		a.asked("save", err)
		return err
	}
	return fmt.Errorf("do %s on %s: unknown verb", act.Verb, n.Resource)
}

// needOwner re-checks at DRBD that this host owns the resource.
func (a *Agent) needOwner() error {
	v := a.c.DRBD.View()
	if v.Fresh && (v.Resource == nil || v.Resource.Owner() != drbd.Yes) {
		return fmt.Errorf("this host does not own the database any more: %w", agents.ErrMoot)
	}
	return nil
}

// release lets go at once: what fails is tried again by the next pass, and nothing waits for anything but the kernel.
func (a *Agent) release(ctx context.Context) error {
	if a.memory.Releasing.IsZero() {
		a.memory.Releasing = a.c.Now()
	}
	a.forget("mount", "start", "promote")
	// Without systemd's help the demotion still ends the controller's I/O. A kill that was refused is tried again by the next pass, 50 ms later.
	if err := a.kill(ctx); err != nil {
		a.c.Log.Warn("controller not killed yet", agents.KeyErr, err)
	}
	var refused error
	if a.role(ctx) != drbd.Secondary {
		refused = a.c.DRBD.Secondary(ctx, true)
		a.asked("demote", refused)
		if r := a.c.DRBD.View().Resource; refused != nil && (r == nil || r.SuspendedQuorum() != drbd.No) {
			return fmt.Errorf("demote: %w", refused) // with frozen I/O the unmount would only hang
		}
	}
	if err := a.unmount(ctx, systemd.Irreversibly); err != nil {
		a.c.Log.Debug("not unmounted yet", agents.KeyErr, err)
	}
	if refused != nil {
		return fmt.Errorf("demote: %w", refused)
	}
	a.forget("demote")
	return nil
}

// role asks for the role when the view may lag behind.
func (a *Agent) role(ctx context.Context) drbd.Role {
	if v := a.c.DRBD.View(); v.Fresh && v.Resource != nil {
		return v.Resource.Role
	}
	if r, err := a.c.DRBD.Status(ctx); err == nil {
		return r.Role
	}
	return drbd.RoleUnknown
}

// kill ends every process of the controller and keeps a queued start or a Restart= from bringing it back.
func (a *Agent) kill(ctx context.Context) error {
	u, err := a.c.Units.State(ctx, a.c.Names.Controller)
	if err == nil && u.Down() {
		return nil
	}
	return errors.Join(a.c.Units.Kill(ctx, a.c.Names.Controller, syscall.SIGKILL), a.c.Units.Stop(ctx, a.c.Names.Controller, systemd.Irreversibly))
}

// unmount unmounts the database if it is mounted, and then takes the mount unit down so that it can be started again.
func (a *Agent) unmount(ctx context.Context, mode systemd.StopMode) error {
	minor := -1
	if r := a.c.DRBD.View().Resource; r != nil && len(r.Devices) > 0 {
		minor = r.Devices[0].Minor
	}
	m, err := a.c.Mounts.Look(a.c.Names.MountPoint, minor)
	if err != nil {
		return err
	}
	if m.Ours {
		if err := a.c.Mounts.Unmount(ctx, a.c.Names.MountPoint); err != nil {
			return err
		}
	}
	return a.c.Units.Stop(ctx, a.c.Names.MountUnit, mode)
}

// yield lets go politely, a step at a time, so that the passes see what happens meanwhile.
func (a *Agent) yield(ctx context.Context) error {
	now := a.c.Now()
	if a.memory.Yielding.IsZero() {
		a.memory.Yielding, a.memory.Releasing = now, now
	}
	u, err := a.c.Units.State(ctx, a.c.Names.Controller)
	if err != nil {
		return err
	}
	if !u.Down() {
		if now.Sub(a.memory.Yielding) > a.c.Policy.StopTime {
			return a.kill(ctx)
		}
		if u.Active == "active" || u.Active == "activating" {
			return a.c.Units.Stop(ctx, a.c.Names.Controller, systemd.Replace)
		}
		return nil
	}
	if err := a.unmount(ctx, systemd.Replace); err != nil {
		return err
	}
	err = a.c.DRBD.Secondary(ctx, false)
	if errors.Is(err, drbd.ErrHeldOpen) {
		return nil // the last close may take a moment; the next pass sees
	}
	a.forget("mount", "start", "promote")
	return err
}

// promote asks DRBD for the role. A no is an answer, not a failure: somebody else was first, or the suspect lives.
func (a *Agent) promote(ctx context.Context, act agents.Action) error {
	v := a.c.DRBD.View()
	probe := act.Args["probe"]
	if !v.Fresh || v.Resource == nil || v.Resource.Role != drbd.Secondary || probe == "" && v.Resource.MayPromote != drbd.Yes {
		return fmt.Errorf("DRBD says something else now: %w", agents.ErrMoot)
	}
	err := a.c.DRBD.Primary(ctx)
	key := "promote"
	if probe != "" {
		key = "probe"
	}
	a.asked(key, err)
	if err != nil {
		if _, refused := errors.AsType[*drbd.CommandError](err); refused {
			return fmt.Errorf("%w: %w", agents.ErrMoot, err)
		}
		return err
	}
	a.forget("promote", "probe", "mount", "start")
	// The filesystem need not wait for the event that says what drbdsetup just said.
	return a.mount(ctx)
}

func (a *Agent) mount(ctx context.Context) error {
	u, err := a.c.Units.State(ctx, a.c.Names.MountUnit)
	if err != nil {
		return err
	}
	if u.Active == "active" {
		err = a.c.Units.Restart(ctx, a.c.Names.MountUnit) // active, but nothing is mounted
	} else {
		err = a.c.Units.Start(ctx, a.c.Names.MountUnit)
	}
	a.asked("mount", err)
	if err != nil { // such a refusal leaves no trace at the unit
		a.memory.MountFailures = append(slices.Clone(a.memory.MountFailures), a.c.Now())
	}
	return err
}

// checkPeers makes DRBD ask its peers. It is no promotion: the role is re-checked right before.
func (a *Agent) checkPeers(ctx context.Context) error {
	v := a.c.DRBD.View()
	if !v.Fresh || v.Resource == nil || v.Resource.Role != drbd.Primary {
		return fmt.Errorf("this host is not primary any more: %w", agents.ErrMoot)
	}
	err := a.c.DRBD.Primary(ctx)
	a.asked("check", err)
	if _, refused := errors.AsType[*drbd.CommandError](err); refused {
		return nil // the loss of quorum that this brings out comes as an event
	}
	return err
}

// start starts the controller, after a last look at what must be so.
func (a *Agent) start(ctx context.Context) error {
	if err := a.needOwner(); err != nil {
		return err
	}
	minor := -1
	if r := a.c.DRBD.View().Resource; r != nil && len(r.Devices) > 0 {
		minor = r.Devices[0].Minor
	}
	m, err := a.c.Mounts.Look(a.c.Names.MountPoint, minor)
	if err != nil || !m.Ours || m.ReadOnly {
		return errors.Join(fmt.Errorf("the database is not mounted for writing: %w", agents.ErrMoot), err)
	}
	if a.c.Prepared != nil && !a.c.Prepared() {
		return fmt.Errorf("the database is being saved before another version opens it: %w", agents.ErrMoot) // asked again shortly
	}
	err = a.c.Units.Start(ctx, a.c.Names.Controller)
	a.asked("start", err)
	if err == nil {
		a.forget("mount")
	}
	return err
}

var signals = map[string]syscall.Signal{"QUIT": syscall.SIGQUIT, "TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL}

func (a *Agent) signal(ctx context.Context, act agents.Action) error {
	sig, ok := signals[act.Args["signal"]]
	if !ok {
		return fmt.Errorf("signal %q: unknown", act.Args["signal"])
	}
	if sig == syscall.SIGQUIT {
		a.memory.Hung = a.c.Now()
	}
	a.asked(act.Args["signal"], nil)
	if act.Args["stop"] != "" {
		return a.kill(ctx)
	}
	if sig == syscall.SIGKILL {
		return a.c.Units.Kill(ctx, a.c.Names.Controller, sig)
	}
	return a.c.Units.SignalMain(ctx, a.c.Names.Controller, sig)
}

// Describe says in one line who owns the database and what is missing, for `xostor controller status`.
func Describe(now time.Time, s Snapshot) string {
	switch {
	case !s.Known:
		return "unknown: " + s.DRBDErr
	case s.Res == nil:
		return "the resource is not up on this host"
	}
	if w := waitingFor(&s); w != "" {
		return w
	}
	owner := ""
	if s.owns() {
		owner = s.Self
	} else if p := s.Res.PrimaryPeer(); p != "" {
		owner = p
	}
	if owner == "" {
		return "no host owns the database"
	}
	jvm := JVM("")
	if owner == s.Self {
		jvm = beat(&s).JVM
	} else if p := s.peer(owner); s.alive(now, p) {
		jvm = p.Says.JVM
	}
	text := owner + " owns the database"
	if jvm != "" {
		text += ", its controller is " + string(jvm)
	}
	if owner == s.Self && !s.Memory.Up.IsZero() && jvm == JVMUp {
		text += " for " + now.Sub(s.Memory.Up).Round(time.Second).String()
	}
	return text
}

// sortPeers orders peers by name, so that decisions do not depend on the order of beats.
func sortPeers(ps []Peer) {
	slices.SortFunc(ps, func(a, b Peer) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
}
