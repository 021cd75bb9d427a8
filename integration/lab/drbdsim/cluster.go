package drbdsim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// Config is a resource and its hosts.
type Config struct {
	Resource    string
	Nodes       []NodeConfig
	Quorum      string // as `show` tells it: "majority" (default) or "off"; the model always counts a majority
	OnNoQuorum  string // "io-error" or "suspend-io"
	RRConflict  string // "disconnect", "retry-connect" or "auto-discard"
	OnSuspended string // "disconnect" or "force-secondary"
	AutoPromote bool
	Minor       int
	PingInt     time.Duration // 10 s
	PingTimeout time.Duration // 0.5 s
	Seed        uint64
	Network     string // first three numbers of the hosts' addresses; "127.0.7"
}

// NodeConfig is one host.
type NodeConfig struct {
	Name    string
	Diskful bool
}

// Error is DRBD's no: the exit code of drbdsetup, the kernel's number, and the text.
type Error struct {
	Exit int
	Code int
	Text string
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("(%d) %s", e.Code, e.Text) }

// The refusals (drbd-lab.md 1.2, 3.1, 5; controller-failover.md 3.2).
var (
	errNoQuorum     = &Error{11, -25, "No quorum"}
	errOtherPrimary = &Error{11, -1, "Multiple primaries not allowed by config"}
	errHeldOpen     = &Error{11, -12, "Device is held open by someone"}
	errRefused      = &Error{11, -10, "State change was refused by peer node"}
	errNoData       = &Error{17, -2, "Need access to UpToDate data"}
	errUnknownRes   = &Error{10, 158, "Unknown resource"}
	errNoBacking    = &Error{10, 104, "Can not open backing device."}
	errNetConfig    = &Error{10, 125, "Device has a net-config (use disconnect first)"}
)

// Cluster is one resource on its hosts. Its methods must be called from the scheduler's functions, or while none runs.
type Cluster struct {
	Config
	sched Scheduler
	rng   *rand.Rand
	nodes []*Node
	cut   map[[2]int]bool
	// committed is the newest version of the data that was acknowledged to a writer by a quorate Primary.
	committed int
	promoting bool // one promotion commits at a time
	// Violations are breaches of DRBD's own promises, which show that the model is wrong.
	Violations []string
}

// Node is one host's kernel.
type Node struct {
	c       *Cluster
	ID      int
	Name    string
	Diskful bool

	alive, frozen, up bool
	primary           bool
	explicit          bool // promoted by command: not undone by the last close
	holders           []string
	failIO            bool
	disk              string
	quorum            bool
	suspended         bool
	version           int // of the data on the local disk
	knows             int // the newest version it was told of, by a writer or a sync source
	conns             []*conn
	flap              string // overrides may_promote for a moment: "yes" or "no"
	busy              bool   // somebody writes
	lost              int    // writes acknowledged and then lost
	unacked           bool   // a write hangs for want of quorum

	printed map[string]string
	order   []string

	listeners []*listener

	// Minor is this host's device minor; Config.Minor unless changed.
	Minor int
	// RefuseDemotion makes every demotion by command fail.
	RefuseDemotion bool
	// NoBacking: the local disk's volume is missing, so that adjust fails and the resource stays down.
	NoBacking bool
	// OnForced is called when the host is demoted by force while held; nil: nobody wants to know.
	OnForced func()
}

type conn struct {
	peer     *Node
	state    string // StandAlone, Unconnected, Connecting, NetworkFailure, Disconnecting, Connected
	primary  bool   // the peer's role, as seen
	disk     string // the peer's disk, as seen
	repl     string
	epoch    int
	wasOwner bool // the peer was Primary when it was lost
	outdated bool // the peer's disk was known Outdated when it left
	linked   bool // a path is up although it is not connected
}

// New makes the cluster, all hosts down.
func New(cfg Config, sched Scheduler) *Cluster {
	if cfg.Quorum == "" {
		cfg.Quorum = "majority"
	}
	if cfg.PingInt == 0 {
		cfg.PingInt = 10 * time.Second
	}
	if cfg.PingTimeout == 0 {
		cfg.PingTimeout = 500 * time.Millisecond
	}
	if cfg.Network == "" {
		cfg.Network = "127.0.7"
	}
	c := &Cluster{Config: cfg, sched: sched, rng: rand.New(rand.NewPCG(cfg.Seed, 1)), cut: map[[2]int]bool{}}
	for i, n := range cfg.Nodes {
		c.nodes = append(c.nodes, &Node{c: c, ID: i, Name: n.Name, Diskful: n.Diskful, printed: map[string]string{}, Minor: cfg.Minor})
	}
	for _, n := range c.nodes {
		for _, p := range c.nodes {
			if p != n {
				n.conns = append(n.conns, &conn{peer: p, state: "StandAlone", disk: "DUnknown", repl: "Off"})
			}
		}
	}
	return c
}

// Node returns a host by name.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// Nodes returns all hosts by id.
func (c *Cluster) Nodes() []*Node { return c.nodes }

func (c *Cluster) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(c.rng.Int64N(int64(hi-lo)+1))
}

func pair(a, b *Node) [2]int { return [2]int{min(a.ID, b.ID), max(a.ID, b.ID)} }

// reach tells whether a's and b's kernels can talk now.
func (c *Cluster) reach(a, b *Node) bool {
	return a.runs() && b.runs() && a.up && b.up && !c.cut[pair(a, b)]
}

func (n *Node) runs() bool { return n.alive && !n.frozen }

func (n *Node) conn(p *Node) *conn {
	for _, k := range n.conns {
		if k.peer == p {
			return k
		}
	}
	return nil
}

// --- faults

// Boot starts a host's kernel and, as drbdadm adjust would, the resource.
func (c *Cluster) Boot(n *Node) {
	n.alive, n.frozen = true, false
	n.BringUp()
}

// Start starts a host's kernel without the resource.
func (c *Cluster) Start(n *Node) { n.alive, n.frozen = true, false }

// Adjust is drbdadm adjust.
func (n *Node) Adjust() *Error {
	if n.NoBacking && !n.up {
		return errNoBacking
	}
	n.BringUp()
	return nil
}

// BringUp attaches the disk and connects, as drbdadm adjust does. What is up already stays.
func (n *Node) BringUp() {
	if !n.alive || n.up {
		return
	}
	n.up = true
	n.disk = "Diskless"
	if n.Diskful {
		n.disk = "Consistent"
		if n.version < n.c.committed {
			n.disk = "Outdated"
		}
	}
	for _, k := range n.conns {
		k.epoch++
		k.state, k.disk, k.repl, k.primary = "Connecting", "DUnknown", "Off", false
		n.c.tryConnect(n, k.peer)
		n.c.noticeClosed(k.peer, n) // a peer that has not missed the former life yet
	}
	n.settle()
}

// Kill stops a host at once, as a power failure does.
func (c *Cluster) Kill(n *Node) {
	n.alive, n.up, n.frozen = false, false, false
	n.primary, n.explicit, n.failIO, n.suspended, n.quorum, n.unacked, n.busy = false, false, false, false, false, false, false
	n.holders = nil
	n.printed, n.order = map[string]string{}, nil
	for _, k := range n.conns {
		k.epoch++
		k.state = "StandAlone"
	}
	c.unreachable(n)
}

// Freeze stops a host's processor; Thaw lets it go on.
func (c *Cluster) Freeze(n *Node) {
	n.frozen = true
	c.unreachable(n)
}

// Thaw ends Freeze. What the host missed, it notices within 10-18 ms (drbd-lab.md 1.3).
func (c *Cluster) Thaw(n *Node) {
	n.frozen = false
	c.reachable(n)
}

// Cut breaks or mends the storage link between two hosts.
func (c *Cluster) Cut(a, b *Node, broken bool) {
	if c.cut[pair(a, b)] == broken {
		return
	}
	c.cut[pair(a, b)] = broken
	if broken {
		c.watchLink(a, b)
		c.watchLink(b, a)
		return
	}
	c.reachable(a)
}

// Detach fails a host's local disk.
func (n *Node) Detach() {
	if n.up && n.Diskful {
		n.disk = "Diskless"
		for _, k := range n.conns {
			if back := k.peer.conn(n); k.state == "Connected" && n.c.reach(n, k.peer) {
				back.disk = "Diskless"
				k.peer.settle()
			}
		}
		n.settle()
	}
}

func (c *Cluster) unreachable(n *Node) {
	for _, p := range c.nodes {
		if p != n {
			c.watchLink(p, n)
			c.watchLink(n, p)
		}
	}
}

// watchLink starts x's ping clock for the loss of p: when it runs out and p still cannot be reached, x drops the connection.
func (c *Cluster) watchLink(x, p *Node) {
	k := x.conn(p)
	if k.state != "Connected" {
		return
	}
	d := c.between(c.PingTimeout, c.PingInt+c.PingTimeout)
	if x.primary && x.busy {
		// Each acknowledgement restarts the interval, so a busy owner is the last to notice (drbd-lab.md 1.4).
		d = c.PingInt + c.PingTimeout + c.between(90*time.Millisecond, 250*time.Millisecond)
	}
	epoch := k.epoch
	c.sched.After(d, func() {
		if k.epoch != epoch || k.state != "Connected" || c.reach(x, p) && p.conn(x).state == "Connected" || !x.alive {
			return
		}
		if x.frozen {
			c.watchLink(x, p) // its clock stood still
			return
		}
		x.drop(p)
	})
}

// reachable looks at all links of n that may have come back.
func (c *Cluster) reachable(n *Node) {
	for _, p := range c.nodes {
		if p == n || !c.reach(n, p) {
			continue
		}
		c.noticeClosed(n, p)
		c.noticeClosed(p, n)
		c.tryConnect(n, p)
	}
	c.sched.After(time.Second, c.repairDisks)
}

// noticeClosed makes x see that p closed the connection meanwhile: the reset is waiting on the wire.
func (c *Cluster) noticeClosed(x, p *Node) {
	k, back := x.conn(p), p.conn(x)
	if k.state != "Connected" || back.state == "Connected" {
		return
	}
	epoch := k.epoch
	c.sched.After(c.between(10*time.Millisecond, 18*time.Millisecond), func() {
		if k.epoch == epoch && k.state == "Connected" && c.reach(x, p) {
			x.drop(p)
		}
	})
}

// drop is the loss of a connection as n sees it.
func (n *Node) drop(p *Node) { n.leave(p, "NetworkFailure") }

// leave ends a connection, with the state that it has next.
func (n *Node) leave(p *Node, state string) {
	k := n.conn(p)
	k.epoch++
	k.wasOwner, k.outdated = k.primary, k.disk == "Outdated"
	k.state, k.disk, k.repl, k.primary = state, "DUnknown", "Off", false
	if k.wasOwner && !n.primary && n.disk == "UpToDate" {
		n.disk = "Consistent" // until the survivors have agreed
		n.agree(n.c.between(20*time.Millisecond, 120*time.Millisecond))
	}
	n.settle()
	if n.c.reach(n, p) {
		n.c.noticeClosed(p, n)
	}
	n.c.sched.After(time.Second, n.c.repairDisks)
	epoch := k.epoch
	// The user-mode helper runs first; then the connection is tried again.
	n.c.sched.After(n.c.between(100*time.Millisecond, 700*time.Millisecond), func() {
		if k.epoch == epoch && n.alive && k.state == "NetworkFailure" {
			k.state = "Connecting"
			n.settle()
			n.c.tryConnect(n, p)
		}
	})
}

// agree turns a Consistent disk into UpToDate, or Outdated when a peer still sees the Primary, once the survivors have asked each other.
func (n *Node) agree(d time.Duration) {
	n.c.sched.After(d, func() {
		if !n.runs() || !n.up || n.disk != "Consistent" || n.primary || !n.quorum {
			return
		}
		for _, m := range n.members() {
			if m != n && m.primary && m.quorum && n.conn(m).state != "Connected" {
				n.disk = "Outdated" // a peer is still connected to the owner
				n.settle()
				n.tellDisk()
				return
			}
		}
		if m, owner := n.silentOwner(); m != nil {
			// That member asks the Primary, which takes a ping.
			n.c.sched.After(n.c.PingTimeout, func() {
				if m.runs() && m.conn(owner).state == "Connected" && !n.c.reach(m, owner) {
					m.drop(owner)
				}
				n.agree(10 * time.Millisecond)
			})
			return
		}
		// The first may_promote:yes after a death is a flap of 2-3 ms with the disk still Consistent (drbd-lab.md 1.1).
		n.flap = "yes"
		n.settle()
		n.c.sched.After(n.c.between(2*time.Millisecond, 3*time.Millisecond), func() { n.flap = "no"; n.settle() })
		n.c.sched.After(n.c.between(90*time.Millisecond, 170*time.Millisecond), func() {
			n.flap = ""
			if n.up && n.disk == "Consistent" && n.quorum {
				n.disk = "UpToDate"
				if n.version < n.knows {
					n.disk = "Outdated" // the others have told it of newer data
				}
				n.tellDisk()
			}
			n.settle()
		})
	})
}

// members are the hosts that a cluster-wide change reaches from n: connected and answering, also through others.
func (n *Node) members() []*Node {
	out := []*Node{n}
	for i := 0; i < len(out); i++ {
		for _, k := range out[i].conns {
			if k.state == "Connected" && n.c.reach(out[i], k.peer) && !slices.Contains(out, k.peer) {
				out = append(out, k.peer)
			}
		}
	}
	return out
}

// silentOwner returns a member that still counts a Primary as connected which does not answer it.
func (n *Node) silentOwner() (member, owner *Node) {
	for _, m := range n.members() {
		for _, k := range m.conns {
			if k.state == "Connected" && k.primary && !n.c.reach(m, k.peer) {
				return m, k.peer
			}
		}
	}
	return nil, nil
}

func (n *Node) syncing() bool {
	return slices.ContainsFunc(n.conns, func(k *conn) bool { return k.state == "Connected" && k.repl == "SyncTarget" })
}

// silentPeer returns a member that still counts a host as connected which does not answer it.
func (n *Node) silentPeer() (member, gone *Node) {
	for _, m := range n.members() {
		for _, k := range m.conns {
			if k.state == "Connected" && !n.c.reach(m, k.peer) {
				return m, k.peer
			}
		}
	}
	return nil, nil
}

// repairDisks starts the resyncs that are due between connected disks.
func (c *Cluster) repairDisks() {
	for _, old := range c.nodes {
		if !old.up || old.disk != "Outdated" && (old.disk != "Consistent" || old.version == c.committed) && (old.disk != "Inconsistent" || old.syncing()) {
			continue
		}
		for _, k := range old.conns {
			if k.state == "Connected" && c.reach(old, k.peer) && k.peer.disk == "UpToDate" && k.repl == "Established" {
				c.resync(old, k.peer)
				break
			}
		}
	}
}

// tellDisk lets the connected peers see this host's disk state.
func (n *Node) tellDisk() {
	defer n.c.repairDisks()
	for _, k := range n.conns {
		if k.state == "Connected" && n.c.reach(n, k.peer) {
			k.peer.conn(n).disk = n.disk
			k.peer.settle()
		}
	}
}

func (n *Node) tellRole() {
	for _, k := range n.conns {
		if k.state == "Connected" && n.c.reach(n, k.peer) {
			k.peer.conn(n).primary = n.primary
			k.peer.settle()
		}
	}
}

// --- quorum

// settle recomputes what follows from the rest, and prints what changed.
func (n *Node) settle() {
	if !n.alive {
		return
	}
	if n.up {
		before := n.quorum
		n.quorum = n.computeQuorum()
		if n.Diskful && n.quorum != before {
			defer n.tellQuorum()
		}
		switch {
		case n.primary && !n.quorum && n.c.OnNoQuorum == "suspend-io":
			n.suspended = true
			n.unacked = n.unacked || n.busy
		case n.quorum && n.suspended:
			n.suspended = false
			n.unacked = false
		}
	}
	n.emit()
}

// tellQuorum lets the diskless peers, which have no opinion of their own, follow.
func (n *Node) tellQuorum() {
	for _, k := range n.conns {
		if !k.peer.Diskful && k.peer.up && k.peer.runs() && k.peer.conn(n).state == "Connected" {
			k.peer.settle()
		}
	}
}

// computeQuorum is calc_quorum for majority (DRBD drbd_state.c), with the tie-breaker: it keeps quorum, but never gives it.
func (n *Node) computeQuorum() bool {
	voters, present := 0, 0
	diskless, disklessUp := 0, 0
	sees := false
	for _, p := range n.c.nodes {
		k := n.conn(p)
		connected := p == n || k.state == "Connected"
		if p.Diskful {
			if p != n && !connected && k.outdated {
				continue // known to have left in order: not counted
			}
			voters++
			if connected && (p == n && n.disk != "Diskless" || p != n && k.disk != "Diskless") {
				present++
			}
			if p != n && connected && p.quorum && k.disk != "Diskless" {
				sees = true
			}
			continue
		}
		diskless++
		if connected {
			disklessUp++
		}
	}
	if !n.Diskful {
		// A diskless node has quorum when a connected quorate diskful peer says so.
		return sees
	}
	if present > voters/2 {
		return true
	}
	return voters%2 == 0 && present*2 == voters && n.quorum && diskless > 0 && disklessUp*2 > diskless
}

// --- connecting

// tryConnect lets two hosts that both want to connect meet after a while.
func (c *Cluster) tryConnect(a, b *Node) {
	if !c.wants(a, b) {
		return
	}
	ka, kb := a.conn(b), b.conn(a)
	ea, eb := ka.epoch, kb.epoch
	c.sched.After(c.between(300*time.Millisecond, 4*time.Second), func() {
		if ka.epoch == ea && kb.epoch == eb && c.wants(a, b) {
			c.handshake(a, b)
		}
	})
}

func (c *Cluster) wants(a, b *Node) bool {
	return c.reach(a, b) && a.conn(b).state == "Connecting" && b.conn(a).state == "Connecting"
}

// handshake decides what a new connection leads to.
func (c *Cluster) handshake(a, b *Node) {
	stale, fresh := a, b
	if b.primary && !a.primary || b.primary && a.quorum {
		stale, fresh = b, a
	}
	if stale.primary && c.movedOn(stale, fresh) {
		c.refuse(stale, fresh)
		return
	}
	if p, q := primaryIn(a.members()), primaryIn(b.members()); p != nil && q != nil && p != q {
		// The cluster-wide change "connected" is aborted: it would join two Primaries.
		c.tryConnect(a, b)
		return
	}
	for _, x := range []struct{ n, p *Node }{{a, b}, {b, a}} {
		k := x.n.conn(x.p)
		k.epoch++
		k.state, k.primary, k.disk, k.repl, k.outdated = "Connected", x.p.primary, x.p.disk, "Established", false
	}
	a.settle()
	b.settle()
	a.settle() // a diskless one's quorum follows from the other's
	c.compare(a, b)
	c.spread()
	c.repairDisks()
}

func primaryIn(nodes []*Node) *Node {
	for _, n := range nodes {
		if n.primary {
			return n
		}
	}
	return nil
}

// movedOn tells whether somebody was promoted and wrote since stale lost its quorum.
func (c *Cluster) movedOn(stale, fresh *Node) bool {
	if fresh.primary || stale.disk == "UpToDate" && stale.version < c.committed {
		return true
	}
	return slices.ContainsFunc(fresh.members(), func(m *Node) bool { return m.primary && m != stale })
}

// refuse is a handshake that a Primary without quorum cannot win (drbd-lab.md 4).
func (c *Cluster) refuse(stale, fresh *Node) {
	if c.RRConflict == "retry-connect" {
		if c.OnSuspended == "force-secondary" && stale.suspended {
			stale.forceSecondary()
		}
		c.tryConnect(stale, fresh)
		return
	}
	for _, x := range []struct{ n, p *Node }{{stale, fresh}, {fresh, stale}} {
		k := x.n.conn(x.p)
		k.epoch++
		k.linked = true
		x.n.settle()
		k.state = "Disconnecting"
		x.n.settle()
		k.linked = false
		x.n.standAlone(k)
	}
	if stale.suspended {
		stale.disk = "Outdated"
		stale.completeSuspended()
		stale.settle()
	}
}

// standAlone ends a connection that is Disconnecting.
func (n *Node) standAlone(k *conn) {
	epoch := k.epoch
	n.c.sched.After(n.c.between(60*time.Millisecond, 300*time.Millisecond), func() {
		if k.epoch == epoch && n.alive {
			k.state = "StandAlone"
			n.settle()
		}
	})
}

// compare starts a resync when the two disks differ.
func (c *Cluster) compare(a, b *Node) {
	for _, x := range []struct{ n, p *Node }{{a, b}, {b, a}} {
		if x.p.disk == "UpToDate" && x.p.version < x.n.knows && !x.p.primary {
			x.p.disk = "Outdated" // the other one has heard of newer data
			x.p.settle()
			x.p.tellDisk()
		}
	}
	if !a.Diskful || !b.Diskful || a.disk == "Diskless" || b.disk == "Diskless" {
		c.learn(a, b)
		return
	}
	old, good := a, b
	if b.version < a.version {
		old, good = b, a
	}
	if old.version == good.version && (old.disk == "Outdated" || old.disk == "Inconsistent") == (good.disk == "Outdated" || good.disk == "Inconsistent") {
		c.learn(a, b)
		return
	}
	if old.version == good.version && (good.disk == "Outdated" || good.disk == "Inconsistent") {
		old, good = good, old
	}
	if good.disk == "Outdated" || good.disk == "Inconsistent" {
		return // neither is a source: a third one has the data
	}
	c.resync(old, good)
}

// learn makes disks UpToDate that hold the same data and are not contradicted by anybody.
func (c *Cluster) learn(a, b *Node) {
	for _, n := range []*Node{a, b} {
		if n.disk == "Consistent" && n.quorum && (n.version == c.committed) {
			n.disk = "UpToDate"
			n.settle()
			n.tellDisk()
		}
	}
}

func (c *Cluster) resync(old, good *Node) {
	old.disk = "Inconsistent"
	old.knows = max(old.knows, good.version)
	old.conn(good).repl, good.conn(old).repl = "SyncTarget", "SyncSource"
	old.settle()
	old.tellDisk()
	epoch := old.conn(good).epoch
	var finish func()
	finish = func() {
		if old.conn(good).epoch != epoch {
			return
		}
		if old.disk != "Inconsistent" {
			old.conn(good).repl, good.conn(old).repl = "Established", "Established"
			c.repairDisks()
			return
		}
		if !c.reach(old, good) {
			c.sched.After(500*time.Millisecond, finish) // it goes on, or the loss of the connection is noticed
			return
		}
		old.version = good.version
		old.disk = "UpToDate"
		old.conn(good).repl, good.conn(old).repl = "Established", "Established"
		old.settle()
		good.settle()
		old.tellDisk()
	}
	c.sched.After(c.between(200*time.Millisecond, 2*time.Second), finish)
}

// spread lets every host's derived facts follow those of its peers.
func (c *Cluster) spread() {
	for range 2 {
		for _, n := range c.nodes {
			if n.up {
				n.settle()
				if n.disk == "Consistent" && n.quorum && n.version == c.committed && !n.wasLeftByOwner() {
					n.disk = "UpToDate"
					n.settle()
					n.tellDisk()
				}
			}
		}
	}
}

func (n *Node) wasLeftByOwner() bool {
	return slices.ContainsFunc(n.conns, func(k *conn) bool { return k.state != "Connected" && k.wasOwner })
}

// --- commands

// Primary promotes, or asks all peers when the host is Primary already. done is called with the answer; err nil: Primary.
func (n *Node) Primary(done func(*Error)) {
	c := n.c
	if !n.up {
		done(errUnknownRes)
		return
	}
	if n.failIO {
		done(errHeldOpen)
		return
	}
	// All connected peers are pinged; those that do not answer in ping-timeout are dropped.
	silent := false
	for _, k := range n.conns {
		silent = silent || k.state == "Connected" && !c.reach(n, k.peer)
	}
	wait := c.between(4*time.Millisecond, 15*time.Millisecond)
	if silent {
		wait = c.PingTimeout + c.between(10*time.Millisecond, 120*time.Millisecond)
	}
	c.sched.After(wait, func() {
		if !n.runs() || !n.up {
			done(errRefused)
			return
		}
		for _, k := range n.conns {
			if k.state == "Connected" && !c.reach(n, k.peer) {
				n.drop(k.peer)
			}
		}
		if n.primary {
			if !n.quorum {
				done(errNoQuorum)
				return
			}
			done(nil)
			return
		}
		n.promote(0, done)
	})
}

// promote waits for the disk to become UpToDate and commits.
func (n *Node) promote(waited time.Duration, done func(*Error)) {
	c := n.c
	again := func(d time.Duration) {
		c.sched.After(d, func() {
			if !n.runs() || !n.up {
				done(errRefused)
				return
			}
			n.promote(waited+d, done)
		})
	}
	var owner *conn
	for _, k := range n.conns {
		if k.state == "Connected" && k.peer.primary && c.reach(n, k.peer) {
			owner = k
		}
	}
	const patience = 2 * time.Second // auto-promote-timeout
	switch {
	case owner != nil:
		if waited < c.PingTimeout { // one retry after ping-timeout
			again(c.PingTimeout + c.between(20*time.Millisecond, 60*time.Millisecond) - waited)
			return
		}
		done(errOtherPrimary)
	case n.failIO:
		done(errHeldOpen)
	case !n.quorum:
		done(errNoQuorum)
	case n.disk == "Consistent" && waited < patience, c.promoting:
		again(20 * time.Millisecond)
	case n.disk != "UpToDate" && !n.peerUpToDate():
		done(errNoData)
	case n.bestVersion() == 0 && c.committed > 0 && waited < patience:
		again(20 * time.Millisecond)
	case n.bestVersion() == 0 && c.committed > 0:
		done(errNoData)
	default:
		n.commit(done)
	}
}

// commit is the two-phase commit of a promotion: every connected peer must agree, and one that another owner is connected to does not.
func (n *Node) commit(done func(*Error)) {
	c := n.c
	c.promoting = true
	c.sched.After(c.between(2*time.Millisecond, 10*time.Millisecond), func() {
		c.promoting = false
		if !n.runs() || !n.up || !n.quorum || n.failIO {
			done(errRefused)
			return
		}
		for _, k := range n.conns {
			if k.state != "Connected" {
				continue
			}
			if !c.reach(n, k.peer) {
				n.Primary(done) // lost meanwhile: asked again from the start
				return
			}
		}
		for _, m := range n.members() {
			if m.primary {
				done(errRefused)
				return
			}
		}
		if m, owner := n.silentPeer(); m != nil {
			c.sched.After(c.PingTimeout, func() {
				if m.runs() && m.conn(owner).state == "Connected" && !c.reach(m, owner) {
					m.drop(owner)
				}
				n.promote(0, done)
			})
			return
		}
		if n.bestVersion() == 0 && c.committed > 0 {
			done(errNoData)
			return
		}
		n.primary, n.explicit = true, true
		if n.bestVersion() < c.committed {
			c.Violations = append(c.Violations, fmt.Sprintf("%s was promoted on version %d of %d", n.Name, n.bestVersion(), c.committed))
		}
		n.Write() // the new owner begins a new data generation with its first write
		n.settle()
		n.tellRole()
		done(nil)
	})
}

func (n *Node) bestVersion() int {
	best := 0
	if n.disk == "UpToDate" {
		best = n.version
	}
	for _, k := range n.conns {
		if k.state == "Connected" && k.peer.disk == "UpToDate" && n.c.reach(n, k.peer) {
			best = max(best, k.peer.version)
		}
	}
	return best
}

func (n *Node) peerUpToDate() bool {
	return slices.ContainsFunc(n.conns, func(k *conn) bool { return k.state == "Connected" && k.disk == "UpToDate" })
}

// Write is one write of the owner. It is acknowledged when the owner has quorum and every connected disk has it.
func (n *Node) Write() (acknowledged bool) {
	if !n.primary || !n.quorum || n.failIO || !n.runs() {
		return false
	}
	if !n.c.Commits(n) {
		return false // in flight until the peers answer or are dropped
	}
	n.c.committed++
	if n.disk == "UpToDate" {
		n.version = n.c.committed
	}
	for _, m := range n.members() {
		m.knows = n.c.committed
	}
	for _, k := range n.conns {
		if k.state == "Connected" && (k.peer.disk == "UpToDate" || k.peer.disk == "Consistent") && k.peer.Diskful {
			k.peer.version = n.c.committed
		}
	}
	for _, m := range n.members() {
		if (m.disk == "UpToDate" || m.disk == "Consistent") && m != n && n.conn(m).state != "Connected" {
			m.disk = "Outdated" // it hears of the owner through others, but not what the owner writes
			m.settle()
			m.tellDisk()
		}
	}
	return true
}

// SetBusy says whether somebody writes on this host all the time.
func (n *Node) SetBusy(busy bool) { n.busy = busy }

// Secondary demotes.
func (n *Node) Secondary(force bool) *Error {
	switch {
	case !n.up:
		return nil // exit 0, as for a module that is not loaded
	case !n.primary:
		return nil
	case n.RefuseDemotion:
		return errRefused
	case len(n.holders) > 0 && !force:
		return errHeldOpen
	case len(n.holders) > 0:
		n.forceSecondary()
		return nil
	}
	n.demote()
	return nil
}

func (n *Node) demote() {
	n.primary, n.explicit = false, false
	n.settle()
	n.tellRole()
}

func (n *Node) forceSecondary() {
	n.failIO = len(n.holders) > 0
	n.completeSuspended()
	n.demote()
	if n.OnForced != nil {
		n.OnForced()
	}
}

// completeSuspended completes hanging writes with the local result: success, although they are on no other disk (drbd-lab.md 3.2).
func (n *Node) completeSuspended() {
	if n.unacked {
		n.lost++
		n.unacked = false
	}
}

// Lost counts the writes that were acknowledged on this host and then lost. Only suspend-io does that.
func (n *Node) Lost() int { return n.lost }

// Open opens the device for writing, on behalf of who. It promotes where auto-promote is on.
func (n *Node) Open(who string) error {
	switch {
	case !n.up:
		return fmt.Errorf("no such device")
	case n.failIO:
		return fmt.Errorf("state not recoverable")
	case !n.primary:
		return fmt.Errorf("read-only file system")
	}
	n.holders = append(n.holders, who)
	n.settle()
	return nil
}

// Close undoes Open. The last close of a demoted device ends fail-io; of one promoted by open, demotes.
func (n *Node) Close(who string) {
	if i := slices.Index(n.holders, who); i >= 0 {
		n.holders = slices.Delete(n.holders, i, i+1)
	}
	if len(n.holders) == 0 {
		n.failIO = false
		if n.primary && !n.explicit {
			n.demote()
			return
		}
	}
	n.settle()
}

// Connect takes a StandAlone connection back up on this end.
func (n *Node) Connect(peerID int) *Error {
	if !n.up || peerID < 0 || peerID >= len(n.c.nodes) || peerID == n.ID {
		return errUnknownRes
	}
	p := n.c.nodes[peerID]
	k := n.conn(p)
	if k.state != "StandAlone" {
		return errNetConfig
	}
	k.epoch++
	k.state = "Connecting"
	n.settle()
	n.c.tryConnect(n, p)
	return nil
}

// Disconnect leaves a peer for good, until Connect: drbdsetup disconnect --force.
func (n *Node) Disconnect(peerID int) *Error {
	if !n.up || peerID < 0 || peerID >= len(n.c.nodes) || peerID == n.ID {
		return errUnknownRes
	}
	p := n.c.nodes[peerID]
	switch k := n.conn(p); k.state {
	case "StandAlone":
		return nil
	case "Connected":
		n.leave(p, "Disconnecting")
		n.standAlone(k)
	default:
		k.epoch++
		k.state = "Disconnecting"
		n.settle()
		n.standAlone(k)
	}
	return nil
}

// Facts that tests and hosts ask for.

// Up tells whether the resource exists on the host.
func (n *Node) Up() bool { return n.up }

// Alive tells whether the host's kernel runs, frozen or not.
func (n *Node) Alive() bool { return n.alive }

// Runs tells whether the host's processor runs.
func (n *Node) Runs() bool { return n.runs() }

// IsPrimary tells the role.
func (n *Node) IsPrimary() bool { return n.primary }

// HasQuorum tells the quorum as the host sees it.
func (n *Node) HasQuorum() bool { return n.quorum }

// FailIO tells whether I/O fails after a forced demotion.
func (n *Node) FailIO() bool { return n.failIO }

// Suspended tells whether I/O hangs for want of quorum.
func (n *Node) Suspended() bool { return n.suspended && n.primary }

// Disk is the local disk state.
func (n *Node) Disk() string { return n.disk }

// Held tells whether the device is open.
func (n *Node) Held() bool { return len(n.holders) > 0 }

// ConnState is the state of the connection to a peer.
func (n *Node) ConnState(p *Node) string { return n.conn(p).state }

// Writable tells whether a write would be acknowledged by a quorate Primary: the database is live here.
func (n *Node) Writable() bool { return n.primary && n.quorum && !n.failIO && n.runs() }

// Linked tells whether the storage link between two hosts carries packets, whatever DRBD does with it.
func (c *Cluster) Linked(a, b *Node) bool { return a.runs() && b.runs() && !c.cut[pair(a, b)] }

// Commits tells whether a write on this host would be acknowledged now: it is Primary with quorum, and everybody it waits for answers.
func (c *Cluster) Commits(n *Node) bool {
	if !n.Writable() || n.disk != "UpToDate" && !n.peerUpToDate() {
		return false
	}
	return !slices.ContainsFunc(n.conns, func(k *conn) bool {
		return k.state == "Connected" && (!c.reach(n, k.peer) || k.peer.conn(n).state != "Connected")
	})
}

// MayPromote is what drbd-utils computes for this host.
func (n *Node) MayPromote() bool {
	may, _ := n.mayPromote()
	return n.up && may == "yes"
}
