package statefile

import "time"

// Op is one request of xhad's cycle.
type Op struct {
	Write bool
	// Host is the slot, or -1 for the global section.
	Host int
	// Data is what a write stores; a read is to return as many bytes as it is long.
	Data []byte
}

// Fate is what a survival rule said last.
type Fate int

// The fates of a modelled host.
const (
	Lives      Fate = iota
	LivesRule2      // All statefile access lost, but nobody is missing who could have it.
	Fenced          // It reset itself by the survival rules.
	Watchdog        // It was reset because a cycle hung longer than Ws.
)

// Heard is what a host hears of another on the network.
type Heard struct {
	At       time.Time
	Access   bool // The other has the statefile.
	Excluded bool
}

// Model is an xhad-like user of the statefile. It does no I/O and has no clock: Begin starts a cycle, Next and Done walk
// through its requests one at a time, Tick judges. Not safe for concurrent use.
type Model struct {
	t     Timeouts
	index int
	hosts int
	slot  Host

	lastSeq     [MaxHosts]uint32
	seen        [MaxHosts]time.Time
	peers       [MaxHosts]*Host
	pending     []Op
	failed      bool // In this cycle.
	access      bool
	readOnce    bool // xhad writes nothing after a failed read until a read succeeds.
	cycleStart  time.Time
	busy        bool
	fate        Fate
	liveset     Set
	suspectFrom time.Time
	doomedFrom  time.Time
	want, owns  bool
	buf         []byte
}

// NewModel is host index of hosts, all of them in the liveset.
func NewModel(now time.Time, t Timeouts, index, hosts int) *Model {
	m := &Model{t: t, index: index, hosts: hosts, access: true, readOnce: true, buf: make([]byte, HostIO)}
	m.slot = Host{Index: uint32(index), ID: Nobody, Weight: 1, Phase: 1}
	for i := range hosts {
		m.seen[i] = now
		m.liveset |= Of(i)
	}
	return m
}

// Begin starts a cycle and feeds the watchdog, as xhad does before the I/O.
func (m *Model) Begin(now time.Time) {
	m.cycleStart, m.busy, m.failed = now, true, false
	m.pending = m.pending[:0]
	if m.readOnce {
		m.slot.Sequence++
		m.slot.Request = m.want
		m.slot.Current, m.slot.SFDomain = m.liveset, m.Domain(now)
		m.slot.Encode(m.buf)
		m.pending = append(m.pending, Op{Write: true, Host: m.index, Data: m.buf})
	}
	m.pending = append(m.pending, Op{Host: -1, Data: make([]byte, GlobalIO)})
	for i := range m.hosts {
		m.pending = append(m.pending, Op{Host: i, Data: make([]byte, HostIO)})
	}
}

// Next is the request to make; none is left when ok is false, and the cycle is over.
func (m *Model) Next() (op Op, ok bool) {
	if len(m.pending) == 0 {
		return Op{}, false
	}
	return m.pending[0], true
}

// Done reports the outcome of Next's request: a read's data, or an error. The last one ends the cycle.
func (m *Model) Done(now time.Time, data []byte, err error) {
	op := m.pending[0]
	m.pending = m.pending[1:]
	if err != nil {
		m.failed = true
		m.readOnce = m.readOnce && op.Write
	} else if !op.Write {
		m.readOnce = true
		m.read(now, op.Host, data)
	}
	if len(m.pending) > 0 {
		return
	}
	m.busy = false
	m.access = !m.failed
	if !m.failed {
		m.lock(now)
	}
}

func (m *Model) read(now time.Time, host int, data []byte) {
	if host < 0 {
		return
	}
	h, err := DecodeHost(data)
	if err != nil {
		return
	}
	if h.Sequence != m.lastSeq[host] {
		m.lastSeq[host], m.seen[host] = h.Sequence, now
	}
	m.peers[host] = h
}

// Domain is the sfdomain: whose slots changed less than T2 ago.
func (m *Model) Domain(now time.Time) Set {
	var s Set
	for i := range m.hosts {
		if now.Sub(m.seen[i]) < m.t.StateFileTimeout {
			s |= Of(i)
		}
	}
	return s
}

// Access says whether the last cycle succeeded and the own slot is fresh: what this host tells others.
func (m *Model) Access(now time.Time) bool {
	return m.access && m.Domain(now).Has(m.index)
}

// Liveset is who this host believes to be alive.
func (m *Model) Liveset() Set { return m.liveset }

// Fate is what became of the host.
func (m *Model) Fate() Fate { return m.fate }

// Margin is how much of T2 has passed since the own slot was last seen to change.
func (m *Model) Margin(now time.Time) time.Duration { return now.Sub(m.seen[m.index]) }

// Tick judges the host at now, with what it hears of the others. It applies the survival rules of sm.c.
func (m *Model) Tick(now time.Time, heard []Heard) Fate {
	if m.fate == Fenced || m.fate == Watchdog {
		return m.fate
	}
	hb := Of(m.index)
	for i := range m.hosts {
		if i != m.index && now.Sub(heard[i].At) < m.t.HeartbeatTimeout {
			hb |= Of(i)
		}
	}
	sf := m.Domain(now) & m.liveset
	if m.busy && m.fate != LivesRule2 && now.Sub(m.cycleStart) > m.t.StateFileWatchdog {
		m.fate = Watchdog
		return m.fate
	}
	if hb&m.liveset == m.liveset && sf == m.liveset {
		m.fate, m.suspectFrom, m.doomedFrom = Lives, time.Time{}, time.Time{}
		return m.fate
	}
	fate := m.survives(hb&m.liveset, sf, heard)
	if fate != Fenced {
		m.doomedFrom = time.Time{}
	} else if m.doomedFrom.IsZero() {
		m.doomedFrom = now
	}
	// Hosts lose and regain the statefile at slightly different times; xhad waits until the views are stable (FH1, FH2).
	if fate == Fenced && now.Sub(m.doomedFrom) < 2*(m.t.StateFileInterval+time.Second) {
		return m.fate
	}
	m.fate = fate
	if m.fate == Lives {
		m.shrink(now, hb&sf)
	}
	return m.fate
}

// survives is the rule of sm.c:1026 for a host with domains hb and sf in the liveset.
func (m *Model) survives(hb, sf Set, heard []Heard) Fate {
	if sf.Has(m.index) {
		if sf&^hb == 0 {
			return Lives
		}
		mine, others := sf&hb, sf&^hb
		if mine.Len() > others.Len() || mine.Len() == others.Len() && mine&-mine < others&-others {
			return Lives
		}
		return Fenced
	}
	for i := range m.hosts {
		switch {
		case i == m.index || !m.liveset.Has(i):
		case hb.Has(i) && heard[i].Access, !hb.Has(i) && !heard[i].Excluded:
			return Fenced
		}
	}
	return LivesRule2
}

// shrink drops those who are not in keep from the liveset, after the winners' wait for the losers to be fenced
// (sm.c, FH4): max(Wh,Ws) - min(T1,T2) + max(t1,t2), at least 10 s.
func (m *Model) shrink(now time.Time, keep Set) {
	if m.suspectFrom.IsZero() {
		m.suspectFrom = now
	}
	wait := max(10*time.Second, max(m.t.HeartbeatWatchdog, m.t.StateFileWatchdog)-min(m.t.HeartbeatTimeout, m.t.StateFileTimeout)+
		max(m.t.HeartbeatInterval, m.t.StateFileInterval))
	if now.Sub(m.suspectFrom) >= wait {
		m.liveset &= keep
		m.suspectFrom = time.Time{}
	}
}

// Want asks for the master lock, or gives it back.
func (m *Model) Want(want bool) {
	if !want {
		m.want, m.owns = false, false
	} else if m.mayRequest() {
		m.want = true
	}
}

// Owns says whether the host holds the master lock.
func (m *Model) Owns() bool { return m.owns }

// mayRequest keeps the entry conditions of lock_mgr.c: no online host still shows an old grant for this one, and this one
// grants nobody of lower rank.
func (m *Model) mayRequest() bool {
	for i := range m.hosts {
		if p := m.peers[i]; i != m.index && (p == nil || p.Grant.Has(m.index) || m.slot.Grant.Has(i) && i > m.index) {
			return false
		}
	}
	return true
}

// lock runs after a complete cycle: grants, and sees whether all online hosts grant. Rank is the index, lower first.
func (m *Model) lock(now time.Time) {
	online := m.Domain(now) & m.liveset
	granted := true
	for i := range m.hosts {
		p := m.peers[i]
		if i == m.index || p == nil {
			continue
		}
		switch {
		case !p.Request:
			m.slot.Grant &^= Of(i)
		case !m.want, i < m.index && !m.owns:
			m.slot.Grant |= Of(i)
		}
		if online.Has(i) && !p.Grant.Has(m.index) {
			granted = false
		}
	}
	// The request must have been on the disk before the grants that count were read.
	m.owns = m.want && m.slot.Request && granted && m.fate == Lives
}
