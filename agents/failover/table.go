package failover

import (
	"maps"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
)

// BeatInterval is the time between two beats.
const BeatInterval = 200 * time.Millisecond

// Table is what one host knows of the others from their beats. It does no I/O and has no clock. Not safe for concurrent use.
type Table struct {
	self    string
	suspect time.Duration
	peers   map[string]*Peer
	mine    Beat
	lastRun time.Time // last Tick
	move    *Move
	moveAt  time.Time         // when move had the age zero, by this host's clock
	silent  []string          // at the last tick
	known   map[string]string // peers' last words on drbd-reactor, "yes" or "no"; kept over restarts by the caller
}

// NewTable makes a table. known is what Known returned in an earlier life, or nil.
func NewTable(self string, suspect time.Duration, known map[string]string) *Table {
	t := &Table{self: self, suspect: suspect, peers: map[string]*Peer{}, known: maps.Clone(known)}
	if t.known == nil {
		t.known = map[string]string{}
	}
	return t
}

// Known returns the peers' last words on drbd-reactor, to be kept on disk.
func (t *Table) Known() map[string]string { return maps.Clone(t.known) }

// Tick notes that this host runs, and tells whether somebody fell silent or was heard again since the last tick. It must be called every BeatInterval.
func (t *Table) Tick(now time.Time) (news bool) {
	t.resume(now)
	t.lastRun = now
	old := t.silent
	t.silent = t.silentNow(now)
	return !slices.Equal(old, t.silent)
}

// resume makes up for time in which this host did not run: it could not hear then, and that counts against nobody. Every method calls it, because after a
// freeze a look may come before the tick.
func (t *Table) resume(now time.Time) {
	gap := now.Sub(t.lastRun)
	if t.lastRun.IsZero() || gap <= 2*BeatInterval {
		return
	}
	t.lastRun = now
	for _, p := range t.peers {
		shift(&p.Heard, gap)
		shift(&p.Storage, gap)
		shift(&p.Kernel, gap)
	}
}

func shift(at *time.Time, by time.Duration) {
	if !at.IsZero() {
		*at = at.Add(by)
	}
}

func (t *Table) silentNow(now time.Time) (names []string) {
	for _, p := range t.peers {
		if !p.Heard.IsZero() && now.Sub(p.Heard) >= t.suspect {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return names
}

func (t *Table) peer(name string) *Peer {
	if t.peers[name] == nil {
		t.peers[name] = &Peer{Name: name}
	}
	return t.peers[name]
}

// Receive takes a peer's beat in and tells whether it says anything new. storage: it came by the storage network.
func (t *Table) Receive(now time.Time, b Beat, storage bool) (news bool) {
	if b.Node == "" || b.Node == t.self {
		return false
	}
	t.resume(now)
	p := t.peer(b.Node)
	news = p.Heard.IsZero() || now.Sub(p.Heard) >= t.suspect || !sameBeat(p.Says, b)
	p.Heard, p.Says = now, b
	if storage {
		p.Storage = now
	}
	word := drbd.TriOf(b.Reactor).String()
	if t.known[b.Node] != word {
		t.known[b.Node], news = word, true
	}
	if b.Move != nil && (t.move == nil || t.move.ID != b.Move.ID && b.Move.Age < t.moveAge(now)) {
		t.move, t.moveAt = b.Move, now.Add(-b.Move.Age)
		news = true
	}
	return news
}

// sameBeat compares what decisions look at.
func sameBeat(a, b Beat) bool {
	a.Move, b.Move = nil, nil
	return a.Node == b.Node && a.Mode == b.Mode && a.Role == b.Role && a.Owner == b.Owner && a.Usable == b.Usable && a.NodeID == b.NodeID && a.JVM == b.JVM &&
		a.Mounted == b.Mounted && a.Failures == b.Failures && a.Reactor == b.Reactor && slices.Equal(a.Silent, b.Silent) && slices.Equal(a.Backups, b.Backups)
}

// Answered notes that a peer's kernel lives although its agent does not.
func (t *Table) Answered(now time.Time, name string) { t.peer(name).Kernel = now }

// Order gives an order to move.
func (t *Table) Order(now time.Time, m Move) {
	m.Age = 0
	t.move, t.moveAt = &m, now
}

func (t *Table) moveAge(now time.Time) time.Duration { return now.Sub(t.moveAt) }

// moveKept is how long an order is passed on: longer than anybody holds for it.
const moveKept = time.Minute

func (t *Table) currentMove(now time.Time) *Move {
	if t.move == nil || t.moveAge(now) > moveKept {
		return nil
	}
	m := *t.move
	m.Age = t.moveAge(now)
	return &m
}

// Hear returns the peers by name, and the order to move that is in force.
func (t *Table) Hear(now time.Time) ([]Peer, *Move) {
	t.resume(now)
	for name := range t.known {
		t.peer(name) // a host that spoke in an earlier life of this agent
	}
	out := make([]Peer, 0, len(t.peers))
	for _, p := range t.peers {
		q := *p
		switch t.known[p.Name] {
		case "yes":
			q.Reactor = drbd.Yes
		case "no":
			q.Reactor = drbd.No
		}
		out = append(out, q)
	}
	sortPeers(out)
	return out, t.currentMove(now)
}

// Tell sets what this host says.
func (t *Table) Tell(b Beat) { t.mine = b }

// Beat returns what this host says now.
func (t *Table) Beat(now time.Time) Beat {
	t.resume(now)
	b := t.mine
	b.Node = t.self
	b.Silent = t.silentNow(now)
	b.Move = t.currentMove(now)
	return b
}
