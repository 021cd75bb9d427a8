package failover

import (
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// Mode says what this agent may do. The zero value is Observe.
type Mode string

// The modes.
const (
	Observe Mode = "observe" // not known yet who promotes: nothing is promoted
	Guard   Mode = "guard"   // drbd-reactor promotes; we supervise, release, repair, back up
	Owner   Mode = "owner"   // we promote
)

// Policy are the timings. DefaultPolicy gives them; tests shorten them.
type Policy struct {
	SuspendGrace   time.Duration // a loss of quorum under suspend-io that ends within this is ignored
	HoldersAfter   time.Duration // a release that takes longer than this looks up who holds the device
	RankStep       time.Duration // a promotion waits this long per better-ranked host
	DisklessDelay  time.Duration // and this long without a local disk
	Settle         time.Duration // may_promote must stand this long when the local disk does not prove it
	ConfirmOld     time.Duration // wait for the former owner's word that its JVM is gone, when it is alive
	SuspectAfter   time.Duration // silence that founds a suspicion
	ProbeBackoff   time.Duration // after a refused probe; doubles
	ProbeMax       time.Duration
	RestartBackoff time.Duration // second restart of the JVM; doubles
	RestartWindow  time.Duration // failures older than this no longer count
	MaxFailures    int           // failures in the window until another host's turn
	HungFailures   int           // failed probes in a row
	QuitToTerm     time.Duration // thread dump to SIGTERM
	TermToKill     time.Duration // SIGTERM to SIGKILL of a hung JVM
	StopTime       time.Duration // SIGTERM to SIGKILL of a healthy JVM in a move
	StartTime      time.Duration // activating longer than this is a failure (the unit's own limit is 240 s)
	RetryUnit      time.Duration // a start that had no effect is repeated after this
	RepairBackoff  time.Duration // between two connects of one peer; doubles
	BootBackoff    time.Duration // between two attempts to bring the resource up; doubles
	PenaltyMax     time.Duration
	MoveHold       time.Duration // the others hold this long for the target of a move
}

// DefaultPolicy returns the timings of DESIGN.md.
func DefaultPolicy() Policy {
	return Policy{
		SuspendGrace: 500 * time.Millisecond, HoldersAfter: time.Second,
		RankStep: 300 * time.Millisecond, DisklessDelay: 2 * time.Second, Settle: 20 * time.Millisecond, ConfirmOld: 12 * time.Second,
		SuspectAfter: time.Second, ProbeBackoff: 5 * time.Second, ProbeMax: time.Minute,
		RestartBackoff: 2 * time.Second, RestartWindow: 10 * time.Minute, MaxFailures: 3, HungFailures: 3,
		QuitToTerm: time.Second, TermToKill: 5 * time.Second, StopTime: 10 * time.Second, StartTime: 250 * time.Second, RetryUnit: 2 * time.Second,
		RepairBackoff: 3 * time.Second, BootBackoff: 5 * time.Second, PenaltyMax: 5 * time.Minute, MoveHold: 15 * time.Second,
	}
}

// Mount is what mountinfo says.
type Mount struct {
	Known     bool     `json:"known"`
	Ours      bool     `json:"ours"`    // our device is mounted at the mount point
	Foreign   bool     `json:"foreign"` // something else is mounted there
	ReadOnly  bool     `json:"read_only"`
	Elsewhere []string `json:"elsewhere,omitempty"` // other places where our device is mounted
	NotDir    bool     `json:"not_dir,omitempty"`   // the mount point is missing or no directory
}

// Clear tells whether nothing of our device is mounted in this mount namespace.
func (m Mount) Clear() bool { return m.Known && !m.Ours && len(m.Elsewhere) == 0 }

// Probe is the outcome of one kind of health probe.
type Probe struct {
	Fails int    `json:"fails"` // in a row; 0: the last one was good, or none was made
	Err   string `json:"err,omitempty"`
}

// Health is what the probes of the running controller found. The unit and DRBD are the other two kinds; they are read directly.
type Health struct {
	REST     Probe     `json:"rest"`      // GET /health did not answer in time
	Internal Probe     `json:"internal"`  // GET /health answered 500: H2 has closed itself
	List     Probe     `json:"list"`      // a cheap list call
	Disk     Probe     `json:"disk"`      // write and fsync on the database's filesystem
	DiskFull bool      `json:"disk_full"` // the write failed for want of space: no reason to restart
	GoodAt   time.Time `json:"good_at"`   // last time that REST was good; zero: never
}

// JVM says how the controller is, in a beat.
type JVM string

// The states of a JVM. The zero value is unknown.
const (
	JVMDown     JVM = "down"
	JVMStarting JVM = "starting"
	JVMUp       JVM = "up"
)

// Peer is another host, as far as this one knows.
type Peer struct {
	Name string `json:"name"`
	// Heard is when its last beat came, by any path; zero: never since this agent runs.
	Heard time.Time `json:"heard"`
	// Storage is when its last beat came by the storage network.
	Storage time.Time `json:"storage"`
	// Kernel is when its kernel last answered although its agent did not; zero: never.
	Kernel time.Time `json:"kernel"`
	Says   Beat      `json:"says"` // its last beat; the zero Beat when none came
	// Reactor is its last known word on drbd-reactor, perhaps from before this agent's start. Unknown: it never said.
	Reactor drbd.Tri `json:"reactor"`
}

// Beat is what an agent tells the others.
type Beat struct {
	Node     string   `json:"node"`
	Mode     Mode     `json:"mode"`
	Role     string   `json:"role"`   // DRBD's role
	Owner    bool     `json:"owner"`  // (Primary, quorum:yes)
	Usable   bool     `json:"usable"` // local disk UpToDate, nothing held
	NodeID   int      `json:"node_id"`
	JVM      JVM      `json:"jvm"`
	Mounted  bool     `json:"mounted"`
	Failures int      `json:"failures"` // mounts of the database, and starts or runs of the JVM, that failed lately
	Reactor  bool     `json:"reactor"`  // has a promoter for the resource
	Silent   []string `json:"silent"`   // whom it has not heard for SuspectAfter, by name
	Move     *Move    `json:"move,omitempty"`
	Backups  []Backup `json:"backups,omitempty"` // the newest ones it holds
}

// Move is an order to hand the controller to another host.
type Move struct {
	ID   string        `json:"id"`
	From string        `json:"from"`
	To   string        `json:"to"`
	Age  time.Duration `json:"age_ns"` // since it was given: clocks are not compared
}

// ResFile is the state of the resource's .res file.
type ResFile struct {
	Known bool   `json:"known"`
	Valid bool   `json:"valid"`
	Why   string `json:"why,omitempty"` // why it is not valid
	Copy  bool   `json:"copy"`          // a valid copy is kept
	Saved bool   `json:"saved"`         // the copy equals the file
}

// Memory is what the agent remembers between passes: times that something has been so since. Zero times mean that it is not so. The monotonic
// clock counts, so a jump of the wall clock changes nothing.
type Memory struct {
	Began      time.Time // of the agent; zero for a single look
	NoQuorum   time.Time // Primary without quorum since
	MayPromote time.Time // may_promote:yes, with data, since
	PrimaryWas string    // the last peer seen as Primary
	PrimaryEnd time.Time // and when it stopped to be seen so
	Releasing  time.Time // the release goes on since
	Yielding   time.Time // told to let go since
	Hung       time.Time // taken for hung since
	Up         time.Time // the controller has been active since
	Stopping   time.Time // it has been deactivating since
	Asked      map[string]Attempt
	Failures   []time.Time // of the controller on this host
	Counted    string      // the last failure that was counted, to count each once
	// MountFailures are those of mounting the database on this host, since it was mounted last; MountCounted is the last one that the unit showed.
	MountFailures []time.Time
	MountCounted  string
	MoveDone      string    // the last order to move whose target became owner
	HandOver      time.Time // gave the database away because the controller failed or cannot run here
	Attached      bool      // the local disk was attached at some time: if it is not now, it failed
	Held          []string  // peers whose connection was taken down by hand on this host, by name
	HeldRead      bool      // Held has been read from disk
	StartedJVM    bool      // this agent, or the host's reactor, had it running: a stop is a failure
}

// Attempt remembers tries of one kind, for back-off.
type Attempt struct {
	Last time.Time
	N    int
	Err  string
}

// Snapshot is all that Decide reads.
type Snapshot struct {
	Policy Policy `json:"-"`
	Self   string `json:"self"`
	NodeID int    `json:"node_id"` // DRBD's, -1 unknown

	Mode    Mode   `json:"mode"`
	ModeWhy string `json:"mode_why"`
	Names   Names  `json:"names"`

	Fresh   bool           `json:"fresh"`    // the events stream is alive
	DRBDErr string         `json:"drbd_err"` // why nothing is known, or why the view is stale
	Known   bool           `json:"known"`    // Res is a fact, nil included
	Res     *drbd.Resource `json:"resource"` // nil: absent
	Options drbd.Options   `json:"options"`

	UnitsKnown bool         `json:"units_known"`
	Controller systemd.Unit `json:"controller"`
	MountUnit  systemd.Unit `json:"mount_unit"`
	Target     systemd.Unit `json:"target"`

	Mount   Mount    `json:"mount"`
	Holders []string `json:"holders,omitempty"`
	Health  Health   `json:"health"`
	Peers   []Peer   `json:"peers"` // by name
	Move    *Move    `json:"move,omitempty"`
	File    ResFile  `json:"res_file"`
	Kept    []string `json:"kept,omitempty"` // Memory.Held as it is on disk
	Reactor drbd.Tri `json:"reactor"`        // this host has a promoter
	// BackupTrouble is what went wrong with the last backup.
	BackupTrouble string `json:"backup_trouble,omitempty"`
	Memory        Memory `json:"-"`
}

// Names are the objects that the agent is about. DefaultNames gives XOSTOR's.
type Names struct {
	Resource   string `json:"resource"`
	Controller string `json:"controller"` // unit
	MountUnit  string `json:"mount_unit"` // unit that mounts the database
	MountPoint string `json:"mount_point"`
	Target     string `json:"target"` // the reactor's target
}

// DefaultNames returns XOSTOR's names (SM drivers/linstorvolumemanager.py, drbd-utils scripts/drbd-services@.target).
func DefaultNames() Names {
	return Names{Resource: "xcp-persistent-database", Controller: "linstor-controller.service", MountUnit: "var-lib-linstor.service",
		MountPoint: "/var/lib/linstor", Target: `drbd-services@xcp\x2dpersistent\x2ddatabase.target`}
}

func (s *Snapshot) peer(name string) *Peer {
	i := slices.IndexFunc(s.Peers, func(p Peer) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	return &s.Peers[i]
}

// alive tells whether a peer's agent was heard lately.
func (s *Snapshot) alive(now time.Time, p *Peer) bool {
	return p != nil && !p.Heard.IsZero() && now.Sub(p.Heard) < s.Policy.SuspectAfter
}

// answers tells whether anything of the peer, agent or kernel, was heard lately.
func (s *Snapshot) answers(now time.Time, p *Peer) bool {
	return s.alive(now, p) || p != nil && !p.Kernel.IsZero() && now.Sub(p.Kernel) < s.Policy.SuspectAfter
}

// owns tells whether this host is (Primary, quorum:yes) by a live view.
func (s *Snapshot) owns() bool { return s.Res != nil && s.Known && s.Res.Owner() == drbd.Yes }

// jvmGone tells whether certainly no process of the controller is left on this host.
func (s *Snapshot) jvmGone() bool {
	return s.UnitsKnown && s.Controller.Down() && s.Controller.MainPID == 0
}

// quorumOn tells whether the resource is protected by quorum. Unknown counts as no.
func (s *Snapshot) quorumOn() bool { return s.Options.Quorum != "" && s.Options.Quorum != "off" }

// remember derives the next memory from the last one and what is seen now. It is pure.
func remember(now time.Time, m Memory, s *Snapshot) Memory {
	since := func(t *time.Time, is bool) {
		if !is {
			*t = time.Time{}
		} else if t.IsZero() {
			*t = now
		}
	}
	if s.Known {
		since(&m.NoQuorum, s.Res != nil && s.Res.Role == drbd.Primary && (s.Res.Quorum() == drbd.No || s.Res.SuspendedQuorum() == drbd.Yes))
		since(&m.MayPromote, s.Fresh && s.Res != nil && s.Res.MayPromote == drbd.Yes && dataInReach(s.Res))
		m.Attached = m.Attached || s.Res != nil && s.Res.LocalUpToDate() == drbd.Yes
		m.Held = held(m.Held, s)
		primary := ""
		if s.Res != nil {
			primary = s.Res.PrimaryPeer()
		}
		if s.Move != nil && (primary == s.Move.To || s.Move.To == s.Self && s.owns()) {
			m.MoveDone = s.Move.ID
		}
		if primary != "" {
			m.PrimaryWas, m.PrimaryEnd = primary, time.Time{}
		} else if m.PrimaryWas != "" && m.PrimaryEnd.IsZero() {
			m.PrimaryEnd = now
		}
	}
	if s.Known && (s.Res == nil || s.Res.Role == drbd.Secondary && s.Res.ForceIOFailure != drbd.Yes) && s.Mount.Clear() && s.jvmGone() {
		m.Releasing, m.Yielding = time.Time{}, time.Time{}
	}
	if !m.Yielding.IsZero() && now.Sub(m.Yielding) > s.Policy.MoveHold {
		m.Yielding = time.Time{} // it did not work: the chain is started again here
	}
	if m.Yielding.IsZero() && s.owns() {
		m.Releasing = time.Time{} // quorum came back before anything was let go
	}
	if s.UnitsKnown {
		since(&m.Up, s.Controller.Active == "active")
		since(&m.Stopping, s.Controller.Active == "deactivating")
		m.countFailure(now, s)
		m.countMount(now, s)
		if s.Controller.Active == "active" {
			m.StartedJVM = true
		} else if s.Controller.Down() {
			m.Hung = time.Time{}
		}
	}
	if !m.Up.IsZero() && now.Sub(m.Up) > s.Policy.RestartWindow {
		m.Failures = nil // a long healthy run makes up for all
	}
	old := func(t time.Time) bool { return now.Sub(t) > s.Policy.RestartWindow }
	m.Failures, m.MountFailures = slices.DeleteFunc(slices.Clone(m.Failures), old), slices.DeleteFunc(slices.Clone(m.MountFailures), old)
	return m
}

// held returns the peers whose connections were taken down by hand. One stays so until it tries to connect again, which nobody but a person makes it do.
func held(before []string, s *Snapshot) (names []string) {
	if !s.Fresh {
		return before // only the stream of events tells who ended a connection
	}
	if s.Res == nil {
		return nil // taken down whole; it begins anew
	}
	for _, c := range s.Res.Connections {
		ended := c.State == drbd.StandAlone || c.State == drbd.Disconnecting
		if ended && (c.ByHand == drbd.Yes || c.ByHand == drbd.Unknown && slices.Contains(before, c.Name)) {
			names = append(names, c.Name)
		}
	}
	return names
}

// countFailure notes that the controller went down without our doing. Each fall is counted once.
func (m *Memory) countFailure(now time.Time, s *Snapshot) {
	if s.Controller.Active != "failed" && !(s.Controller.Active == "inactive" && m.StartedJVM) {
		return
	}
	id := s.Controller.InactiveSince.UTC().Format(time.RFC3339Nano)
	if id == m.Counted || s.Controller.InactiveSince.IsZero() {
		return
	}
	m.Counted = id
	m.StartedJVM = false
	// Only a fall while we own counts: the rest is a release, a move, or history from before this agent.
	if s.owns() && m.Releasing.IsZero() && m.Yielding.IsZero() {
		m.Failures = append(slices.Clone(m.Failures), now)
	}
}

// countMount notes that the database could not be mounted, each time once: the cause may be this host.
func (m *Memory) countMount(now time.Time, s *Snapshot) {
	if s.Mount.Ours {
		m.MountFailures = nil
	}
	u := &s.MountUnit
	id := u.InactiveSince.UTC().Format(time.RFC3339Nano)
	if u.Active != "failed" || u.InactiveSince.IsZero() || id == m.MountCounted {
		return
	}
	m.MountCounted = id
	if s.owns() && m.Releasing.IsZero() && m.Yielding.IsZero() && m.Asked["mount"].N > 0 {
		m.MountFailures = append(slices.Clone(m.MountFailures), now)
	}
}

// failed is how often the chain failed on this host lately, and when it did so last.
func (m *Memory) failed() (n int, last time.Time) {
	for _, t := range slices.Concat(m.Failures, m.MountFailures) {
		n++
		if t.After(last) {
			last = t
		}
	}
	return n, last
}

// dataInReach tells whether promoting would give good data: a local disk UpToDate, or none on purpose and a peer that has it.
func dataInReach(r *drbd.Resource) bool {
	if r.LocalUpToDate() == drbd.Yes {
		return true
	}
	return diskless(r) && r.UpToDatePeer()
}

func diskless(r *drbd.Resource) bool {
	return len(r.Devices) > 0 && !slices.ContainsFunc(r.Devices, func(d drbd.Device) bool { return d.Disk != drbd.Diskless })
}

// ResMissing is ResFile.Why when there is no file at all, as on a host that never had the resource.
const ResMissing = "no such file"
