package heartbeat

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// sim runs hosts with the real state machines under virtual time. Everything that happens is an event; the same seed
// gives the same events.
type sim struct {
	now    time.Time
	start  time.Time
	events simQueue
	serial int
	rng    *rand.Rand
	x      statefile.Timeouts
	t      Timing
	drbd   *simDRBD
	net    [][]bool // The network that NBD uses.
	xnet   [][]bool // The network of xhad's heartbeats.
	hosts  []*simHost
	unique uint64
	ops    []simOp
	cycle  time.Duration // Pause between two cycles of a client.
	rare   int           // One of so many reads becomes a write of the global section.
	calm   bool          // No faults but those that the test makes.
	log    func(format string, args ...any)
	broken func(name string) bool // Mutations of the machines, to see that the checker notices.
}

type simEvent struct {
	at     time.Time
	serial int
	do     func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at.Before(q[j].at) || q[i].at.Equal(q[j].at) && q[i].serial < q[j].serial
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

func (s *sim) after(d time.Duration, do func()) {
	s.serial++
	heap.Push(&s.events, simEvent{s.now.Add(d), s.serial, do})
}

func (s *sim) every(d time.Duration, do func()) {
	s.after(d, func() { do(); s.every(d, do) })
}

func (s *sim) upTo(d time.Duration) time.Duration { return time.Duration(s.rng.Int64N(int64(d) + 1)) }

// run passes virtual time.
func (s *sim) run(d time.Duration) {
	end := s.now.Add(d)
	for len(s.events) > 0 && !s.events[0].at.After(end) {
		e := heap.Pop(&s.events).(simEvent)
		s.now = e.at
		e.do()
	}
	s.now = end
}

// simHost is one host: xhad, its kernel's nbd device, and the daemon.
type simHost struct {
	s       *sim
	index   int
	name    string
	boot    int
	up      bool
	running bool // The daemon's process exists.
	life    int  // Of the daemon's process.
	frozen  bool // The daemon's process, or with kernelFrozen the whole machine.
	late    []func()

	// Daemon, owner side.
	owner   *Owner
	waiting []*simRequest
	links   map[*simLink]bool
	closing bool

	// Daemon, candidate side.
	view      View
	successor string

	// Daemon, front side.
	front *Front
	link  *simLink
	asked map[*simHost]*simLink // Connections that have not been answered.
	done  map[*simHost]simAsked
	asks  int // How often this host was asked to serve.
	count uint64
	call  *simRequest // The client's request that the daemon has.

	// Client.
	model  *statefile.Model
	heard  []statefile.Heard
	maxGap time.Duration // Longest time of a request that succeeded.
	failed int           // Requests that failed.
}

// simAsked is when an ask ended, and the jitter of the pause after it.
type simAsked struct {
	at     time.Time
	jitter float64
}

// simLink is one connection of a front to an owner.
type simLink struct {
	from, to *simHost
	session  Session
	fromOpen bool
	toOpen   bool
	lastTo   time.Time // FIFO in each direction.
	lastFrom time.Time
	fromLife int
	toLife   int
	busy     *simRequest
}

// simRequest is a request on its way.
type simRequest struct {
	link    *simLink
	at      Request // At the owner.
	entered bool
	write   bool
	reg     int
	cell    simCell
	arrived time.Time
	ping    bool
	done    func(cell simCell, ok bool)
}

// simOp is an entry of the history. Failed writes have ok false.
type simOp struct {
	host, reg  int
	write      bool
	id         uint64
	call, ret  time.Time
	ok, closed bool
}

func newSim(seed uint64, hosts int, timeout time.Duration) *sim {
	s := &sim{rng: rand.New(rand.NewPCG(seed, 0x5eed)), now: time.Unix(1000, 0), x: statefile.Derive(timeout), log: func(string, ...any) {},
		broken: func(string) bool { return false }}
	s.start = s.now
	s.t, _ = DeriveTiming(s.x)
	s.cycle, s.rare = s.x.StateFileInterval, 4*hosts
	s.drbd = newSimDRBD(s, hosts)
	for i := range hosts {
		s.net, s.xnet = append(s.net, make([]bool, hosts)), append(s.xnet, make([]bool, hosts))
		for j := range hosts {
			s.net[i][j], s.xnet[i][j] = true, true
		}
		h := &simHost{s: s, index: i, name: fmt.Sprintf("h%02d", i), up: true}
		s.hosts = append(s.hosts, h)
	}
	for _, h := range s.hosts {
		h.startDaemon()
		h.startClient()
	}
	s.every(100*time.Millisecond, s.heartbeats)
	return s
}

func (s *sim) at() time.Duration { return s.now.Sub(s.start) }

// heartbeats is xhad's network heartbeat and its judgement.
func (s *sim) heartbeats() {
	for _, h := range s.hosts {
		if !h.alive() {
			continue
		}
		for _, o := range s.hosts {
			if o != h && o.alive() && s.xnet[o.index][h.index] && !s.drbd.nodes[o.index].frozen {
				h.heard[o.index] = statefile.Heard{At: s.now, Access: o.model.Access(s.now)}
			}
		}
		if f := h.model.Tick(s.now, h.heard); f == statefile.Fenced || f == statefile.Watchdog {
			s.log("%v %s is reset by xhad (%v)", s.at(), h.name, f)
			h.crash()
		}
	}
}

func (h *simHost) alive() bool { return h.up && !h.s.drbd.nodes[h.index].frozen }

// do runs something in the daemon: at once, after its thaw, or never if that process has ended.
func (h *simHost) do(life int, f func()) {
	switch {
	case !h.running || h.life != life:
	case h.frozen:
		h.late = append(h.late, func() { h.do(life, f) })
	default:
		f()
	}
}

// in runs something in the daemon after d.
func (h *simHost) in(d time.Duration, f func()) {
	life := h.life
	h.s.after(d, func() { h.do(life, f) })
}

func (h *simHost) startDaemon() {
	s := h.s
	h.life++
	var before time.Duration
	if h.life > 1 {
		before = s.t.KernelTimeout()
	}
	h.running, h.frozen, h.late, h.owner, h.waiting, h.links, h.closing = true, false, nil, nil, nil, map[*simLink]bool{}, false
	h.front, h.link, h.call, h.asked = NewFront(s.now, s.t, before), nil, nil, map[*simHost]*simLink{}
	h.done = map[*simHost]simAsked{}
	h.view = View{Self: h.name, Diskful: h.index < s.drbd.diskful, LostAt: s.now, Cut: map[string]time.Time{}}
	for _, o := range s.hosts {
		if o != h {
			h.view.Peers = append(h.view.Peers, Peer{Host: o.name, At: s.now, Diskful: o.index < s.drbd.diskful})
		}
	}
	life := h.life
	var tick func()
	tick = func() {
		h.do(life, h.search)
		h.do(life, h.decide)
		h.do(life, h.probe)
		h.do(life, h.ping)
		if h.running && h.life == life {
			s.after(50*time.Millisecond+s.upTo(10*time.Millisecond), tick)
		}
	}
	s.after(s.upTo(50*time.Millisecond), tick)
}

// stopDaemon is kill -9: the kernel closes its sockets and its device.
func (h *simHost) stopDaemon() {
	if !h.running {
		return
	}
	h.running = false
	h.drop()
	if h.up {
		h.s.drbd.close(h.index)
	}
}

// drop closes all connections of the process.
func (h *simHost) drop() {
	for _, l := range h.sortedLinks() {
		h.closeTo(l)
	}
	if h.link != nil {
		h.link.fromOpen = false
		h.finTo(h.link)
	}
}

func (h *simHost) sortedLinks() []*simLink {
	var out []*simLink
	for l := range h.links {
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b *simLink) int {
		return a.from.index - b.from.index + int(a.session.Count) - int(b.session.Count)
	})
	return out
}

func (h *simHost) crash() {
	h.up, h.running = false, false
	h.s.drbd.kill(h.index)
}

// bootHost starts a host that was reset; its HA state is as after a fresh start.
func (h *simHost) bootHost() {
	if h.up {
		return
	}
	h.up = true
	h.boot++
	h.s.drbd.nodes[h.index].up = true
	clear(h.s.drbd.nodes[h.index].cut)
	h.startDaemon()
	h.startClient()
}

func (h *simHost) freeze() { h.frozen = true }

func (h *simHost) thaw() {
	h.frozen = false
	late := h.late
	h.late = nil
	for _, f := range late {
		h.s.after(h.s.upTo(2*time.Millisecond), f)
	}
}

// --- connections

func (s *sim) latency() time.Duration {
	if !s.calm && s.rng.IntN(200) == 0 {
		return s.upTo(1500 * time.Millisecond)
	}
	return 50*time.Microsecond + s.upTo(500*time.Microsecond)
}

// toOwner delivers f at the owner's end in order; while the network is cut it waits like TCP does.
func (l *simLink) toOwner(f func()) {
	s := l.from.s
	at := s.now.Add(s.latency())
	if at.Before(l.lastTo) {
		at = l.lastTo
	}
	l.lastTo = at
	var deliver func()
	deliver = func() {
		switch {
		case !l.toOpen:
		case !s.net[l.from.index][l.to.index]:
			s.after(200*time.Millisecond, deliver)
		default:
			l.to.do(l.toLife, f)
		}
	}
	s.after(at.Sub(s.now), deliver)
}

func (l *simLink) toFront(f func()) {
	s := l.from.s
	at := s.now.Add(s.latency())
	if at.Before(l.lastFrom) {
		at = l.lastFrom
	}
	l.lastFrom = at
	var deliver func()
	deliver = func() {
		switch {
		case !l.fromOpen:
		case !s.net[l.to.index][l.from.index]:
			s.after(200*time.Millisecond, deliver)
		default:
			l.from.do(l.fromLife, f)
		}
	}
	s.after(at.Sub(s.now), deliver)
}

// finTo tells the owner that the front closed; closeTo is the owner's close.
func (h *simHost) finTo(l *simLink) {
	l.toOwner(func() { l.toOpen = false; delete(l.to.links, l) })
}

func (h *simHost) closeTo(l *simLink) {
	if !l.toOpen {
		return
	}
	l.toOpen = false
	delete(h.links, l)
	l.toFront(func() { l.from.lost(l) })
}

// --- owner

// serve is the owner's side of a request.
func (h *simHost) serve(q *simRequest) {
	if h.owner == nil {
		return
	}
	if !q.entered {
		q.entered = true
		q.at = Request{Host: q.link.from.name, Session: q.link.session, Off: int64(q.reg) * statefile.SlotSize, Len: statefile.HostIO, Write: q.write}
		h.owner.Enter(&q.at)
	}
	if h.s.broken("no fencing") {
		q.at.Session = h.owner.sessions[q.link.from.name]
	}
	if h.s.broken("no order") {
		q.at.Host = ""
		q.at.Len = 0
	}
	switch h.owner.Try(&q.at) {
	case Leaving:
	case Stale:
		h.closeTo(q.link)
	case Wait:
		h.waiting = append(h.waiting, q)
	case Run:
		h.submit(q)
	}
}

// end lets waiting requests in.
func (h *simHost) end(o *Owner, q *simRequest) {
	o.End(&q.at)
	if o.Left() {
		h.closeDevice(o)
		return
	}
	waiting := h.waiting
	h.waiting = nil
	for _, q := range waiting {
		h.serve(q)
	}
}

func (h *simHost) submit(q *simRequest) {
	o, life, start := h.owner, h.life, h.s.now
	if q.write {
		h.s.drbd.write(h.index, q.reg, q.cell, func(ok bool) {
			h.do(life, func() {
				if !ok {
					h.leave(o, "write failed")
					h.end(o, q)
					return
				}
				h.end(o, q)
				o.Wrote(start)
				h.reply(q, simCell{})
			})
		})
		return
	}
	h.s.drbd.read(h.index, q.reg, func(c simCell, ok bool) {
		h.do(life, func() {
			if !ok {
				h.leave(o, "read failed")
				h.end(o, q)
				return
			}
			if o.Current(h.s.now) || h.s.broken("no lease") {
				h.end(o, q)
				h.reply(q, c)
				return
			}
			h.vouch(o, func(ok bool) {
				h.end(o, q)
				if ok {
					h.reply(q, c)
				}
			})
		})
	})
}

// vouch writes a probe; then learns whether it was acknowledged.
func (h *simHost) vouch(o *Owner, then func(ok bool)) {
	life, start := h.life, h.s.now
	h.s.drbd.write(h.index, regProbe, simCell{}, func(ok bool) {
		h.do(life, func() {
			if ok {
				o.Wrote(start)
			} else {
				h.leave(o, "probe failed")
			}
			then(ok)
		})
	})
}

const regProbe, regGlobal = -1, 0

func (h *simHost) reply(q *simRequest, c simCell) {
	l := q.link
	if !l.toOpen {
		return
	}
	l.toFront(func() { l.from.answered(l, q, c) })
}

func (h *simHost) probe() {
	if h.owner != nil && !h.owner.Left() && h.owner.ProbeIn(h.s.now) == 0 && !h.closing {
		h.closing = true // One probe at a time.
		h.vouch(h.owner, func(bool) { h.closing = false })
	}
}

func (h *simHost) leave(o *Owner, why string) {
	if o.Left() {
		return
	}
	h.s.log("%v %s leaves: %s", h.s.at(), h.name, why)
	o.Leave()
	h.view.LeftAt, h.view.LostAt = h.s.now, later(h.view.LostAt, h.s.now)
	for _, l := range h.sortedLinks() {
		h.closeTo(l)
	}
	h.waiting = nil
	h.closeDevice(o)
}

func (h *simHost) closeDevice(o *Owner) {
	if h.owner == o && len(h.s.drbd.nodes[h.index].pending) == 0 {
		h.owner, h.closing = nil, false
		h.s.drbd.close(h.index)
	} else if h.owner == o {
		h.in(20*time.Millisecond, func() { h.closeDevice(o) })
	}
}

// handover is a planned one: drain, mark clean, close, tell.
func (h *simHost) handover(successor string) {
	o := h.owner
	if o == nil || o.Left() {
		return
	}
	h.s.log("%v %s hands over to %s", h.s.at(), h.name, successor)
	h.successor = successor
	o.Leave()
	var finish func()
	finish = func() {
		if !o.Idle() {
			h.in(time.Millisecond, finish)
			return
		}
		life := h.life
		h.s.drbd.write(h.index, regProbe, simCell{id: recordClean}, func(bool) {
			h.do(life, func() {
				h.view.LeftAt, h.view.LostAt = h.s.now, h.s.now
				h.waiting = nil
				h.owner, h.closing = nil, false
				h.s.drbd.close(h.index)
				for _, l := range h.sortedLinks() {
					h.closeTo(l)
				}
			})
		})
	}
	finish()
}

const recordClean = 1

// --- candidate

func (h *simHost) decide() {
	_, outage := h.front.Outage()
	primary := ""
	for j, n := range h.s.drbd.nodes {
		if n.primary && h.s.drbd.nodes[h.index].conn[j] {
			primary = h.s.hosts[j].name
		}
	}
	h.view.See(h.s.now, primary)
	if !outage {
		h.view.Successor = ""
		if h.owner == nil && h.view.Owner != h.name && h.view.Heard.After(h.view.LeftAt) {
			h.successor = ""
		}
	}
	v := h.view
	v.Served = !outage || h.owner != nil
	step := DecideCandidate(h.s.now, h.s.t, v)
	me := h.s.drbd.nodes[h.index]
	switch {
	case step.Join != "":
		delete(h.view.Cut, step.Join)
		me.cut[h.s.find(step.Join).index] = false
	case step.Cut != "":
		h.s.log("%v %s cuts its link to %s", h.s.at(), h.name, step.Cut)
		j := h.s.find(step.Cut).index
		h.view.Cut[step.Cut] = h.s.now
		me.cut[j] = true
		h.in(300*time.Millisecond, func() { h.s.drbd.drop(h.index, j) })
	case step.Open:
		h.open()
	}
}

func (s *sim) find(name string) *simHost {
	i := slices.IndexFunc(s.hosts, func(h *simHost) bool { return h.name == name })
	return s.hosts[i]
}

func (h *simHost) open() {
	s, life := h.s, h.life
	h.view.Opening = true
	s.log("%v %s opens", s.at(), h.name)
	s.drbd.open(h.index, func(ok bool) {
		if !h.running || h.life != life {
			if ok {
				s.drbd.close(h.index) // The process is gone; the kernel closes what it opened.
			}
			return
		}
		h.do(life, func() {
			h.view.Opened, h.view.Held = s.now, !ok
			if !ok {
				h.view.Opening = false
				return
			}
			s.log("%v %s owns", s.at(), h.name)
			s.drbd.read(h.index, regProbe, func(c simCell, ok bool) {
				h.do(life, func() {
					h.view.Opening = false
					o := NewOwner(s.now, s.t, ok && c.id == recordClean)
					h.owner, h.closing = o, false
					if !ok {
						h.leave(o, "cannot read the record")
						return
					}
					h.vouch(o, func(bool) {})
				})
			})
		})
	})
}

// --- front

// search asks all hosts to serve while there is no link, and hosts whose DRBD link was cut whether they still own. The real front asks a few at a time; here all at once.
func (h *simHost) search() {
	s := h.s
	var outage time.Duration
	if began, out := h.front.Outage(); out {
		outage = s.now.Sub(began)
	}
	for _, o := range s.hosts {
		if _, cut := h.view.Cut[o.name]; h.asked[o] != nil || h.link != nil && !cut {
			continue
		}
		last, pause := h.done[o], s.t.Reopen
		if h.link == nil {
			pause = s.t.AskAgain(len(s.hosts), outage, last.jitter)
		}
		if s.now.Sub(last.at) < pause {
			continue
		}
		h.count++
		l := &simLink{from: h, to: o, session: Session{fmt.Sprint(h.index, h.boot), uint64(s.now.UnixNano()) + h.count}, fromOpen: true, toOpen: true,
			fromLife: h.life, toLife: o.life}
		if !o.up || s.drbd.nodes[o.index].frozen || !s.net[h.index][o.index] {
			continue
		}
		if !o.running {
			h.done[o] = simAsked{s.now, s.rng.Float64()}
			h.in(s.latency(), func() { h.note(o, Refused) })
			continue
		}
		o.asks++
		h.asked[o] = l
		h.in(time.Second, func() { h.giveUp(l) })
		l.toOwner(func() { o.accept(l) })
	}
}

// giveUp ends a connection that was not answered.
func (h *simHost) giveUp(l *simLink) {
	if h.asked[l.to] == l {
		h.said(l.to)
		l.fromOpen = false
		h.finTo(l)
		h.note(l.to, Silent)
	}
}

// said ends an ask.
func (h *simHost) said(o *simHost) {
	delete(h.asked, o)
	h.done[o] = simAsked{h.s.now, h.s.rng.Float64()}
}

func (h *simHost) note(o *simHost, a Answer) { h.view.Note(h.s.now, o.name, a) }

// accept is the owner's side of a new connection.
func (h *simHost) accept(l *simLink) {
	if h.owner != nil && !h.owner.Left() {
		if wait := h.owner.ServesIn(h.s.now); wait > 0 || h.owner.vouched.IsZero() {
			h.in(max(wait, time.Millisecond), func() { h.accept(l) })
			return
		}
		if h.owner.Hello(l.from.name, l.session) {
			h.links[l] = true
			l.toFront(func() { l.from.accepted(l) })
			return
		}
	}
	answer := NotOwner
	if h.view.Opening {
		answer = Opening
	}
	l.toFront(func() {
		l.from.said(l.to)
		l.from.note(l.to, answer)
		if l.from.link == nil && l.to.successor != "" {
			l.from.view.Successor = l.to.successor
		}
	})
	l.toOpen = false
}

func (h *simHost) accepted(l *simLink) {
	h.said(l.to)
	h.note(l.to, Serves)
	if h.link != nil {
		l.fromOpen = false
		h.finTo(l)
		return
	}
	h.link = l
	h.forward()
}

// forward sends the client's request, if the link is free.
func (h *simHost) forward() {
	l, q := h.link, h.call
	if l == nil || q == nil || l.busy != nil {
		return
	}
	h.ask(l, &simRequest{link: l, write: q.write, reg: q.reg, cell: q.cell, arrived: q.arrived, done: q.done})
}

func (h *simHost) ask(l *simLink, q *simRequest) {
	l.busy = q
	stuck := !h.s.calm && h.s.rng.IntN(400) == 0 // The connection breaks, and what was sent arrives late.
	if stuck {
		l.lastTo = h.s.now.Add(h.s.upTo(2 * time.Second))
	}
	l.toOwner(func() { l.to.serve(q) })
	patience := h.s.t.Attempt
	if stuck {
		patience = h.s.upTo(3 * time.Millisecond)
	}
	h.in(patience, func() {
		if l.busy == q && h.link == l {
			l.fromOpen = false
			h.finTo(l)
			h.lost(l)
		}
	})
}

func (h *simHost) ping() {
	_, outage := h.front.Outage()
	if l := h.link; l != nil && l.busy == nil && (outage || h.s.now.Sub(h.view.Heard) >= h.s.t.Ping) {
		h.ask(l, &simRequest{link: l, reg: regProbe, ping: true, arrived: h.s.now})
	}
}

func (h *simHost) answered(l *simLink, q *simRequest, c simCell) {
	if h.link != l || l.busy != q {
		return
	}
	l.busy = nil
	h.view.Owner, h.view.Heard = l.to.name, h.s.now
	h.front.Answered()
	if !q.ping && h.call != nil {
		h.call = nil
		q.done(c, true)
	}
	h.forward()
}

// outage begins an outage, unless there is one.
func (h *simHost) outage(since time.Time) {
	if _, already := h.front.Outage(); !already {
		h.view.LostAt = h.s.now
		h.front.Lost(since)
	}
}

func (h *simHost) lost(l *simLink) {
	if h.link != l {
		return
	}
	since := h.s.now
	if l.busy != nil {
		since = l.busy.arrived
	}
	h.link = nil
	h.outage(since)
	if q := h.call; q != nil && l.busy != nil && !l.busy.ping && q.write && !Repeatable(q.offset(), statefile.GlobalIO) && !h.s.broken("repeats all") {
		h.call = nil
		q.done(simCell{}, false) // It may have happened, and must not happen again.
	}
	h.search()
}

// request is the kernel handing a request to the front.
func (h *simHost) request(q *simRequest) {
	if q.write && !Repeatable(q.offset(), statefile.GlobalIO) && !h.front.TakesShared(h.s.now) {
		q.done(simCell{}, false)
		return
	}
	h.call = q
	h.watchBudget(q)
	h.forward()
}

func (h *simHost) watchBudget(q *simRequest) {
	if h.call != q {
		return
	}
	until, ok := h.front.Until(h.s.now, q.arrived)
	if ok {
		h.in(until.Sub(h.s.now)+time.Millisecond, func() { h.watchBudget(q) })
		return
	}
	h.call = nil
	if l := h.link; l != nil && l.busy != nil && !l.busy.ping { // Its outcome is unknown: only a new session fences it.
		l.fromOpen = false
		h.finTo(l)
		h.lost(l)
	}
	q.done(simCell{}, false)
}

func (q *simRequest) offset() int64 { return int64(q.reg) * statefile.SlotSize }

// --- client

func (h *simHost) startClient() {
	s := h.s
	h.model = statefile.NewModel(s.now, s.x, h.index, len(s.hosts))
	h.heard = make([]statefile.Heard, len(s.hosts))
	for i := range h.heard {
		h.heard[i].At = s.now
	}
	h.pause(h.boot, s.upTo(s.cycle))
}

func (h *simHost) pause(boot int, d time.Duration) {
	h.s.after(d, func() {
		if h.boot == boot && h.up {
			h.model.Begin(h.s.now)
			h.step(boot)
		}
	})
}

// step makes the model's next request.
func (h *simHost) step(boot int) {
	s := h.s
	if !h.up || h.boot != boot {
		return
	}
	op, ok := h.model.Next()
	if !ok {
		h.pause(boot, s.cycle/2+s.upTo(s.cycle))
		return
	}
	if s.drbd.nodes[h.index].frozen {
		s.after(100*time.Millisecond, func() { h.step(boot) })
		return
	}
	q := &simRequest{write: op.Write, reg: op.Host + 1, arrived: s.now}
	if !s.calm && s.rng.IntN(s.rare) == 0 && !op.Write { // Now and then the global section is written, by anybody.
		q = &simRequest{write: true, reg: regGlobal, arrived: s.now}
	}
	if q.write {
		s.unique++
		q.cell = simCell{id: s.unique<<8 | uint64(h.index), data: slices.Clone(op.Data)}
	}
	entry := len(s.ops)
	s.ops = append(s.ops, simOp{host: h.index, reg: q.reg, write: q.write, id: q.cell.id, call: s.now})
	q.done = func(c simCell, ok bool) {
		if h.boot != boot || !h.up {
			return
		}
		e := &s.ops[entry]
		e.ret, e.ok, e.closed = s.now, ok, true
		if !e.write {
			e.id = c.id
		}
		if ok {
			h.maxGap = max(h.maxGap, s.now.Sub(e.call))
		} else {
			h.failed++
		}
		if q.write != op.Write { // The extra write: the model's own request comes next.
			s.after(0, func() { h.step(boot) })
			return
		}
		var err error
		if !ok {
			err = errSim
		}
		data := c.data
		if data == nil {
			data = op.Data
		}
		h.model.Done(s.now, data, err)
		s.after(10*time.Microsecond, func() { h.step(boot) })
	}
	h.hand(q, boot)
}

// hand gives the kernel's request to the daemon. When the daemon dies with it, the kernel sends it again after its
// time-out; when there is no daemon, as soon as there is one.
func (h *simHost) hand(q *simRequest, boot int) {
	s := h.s
	if !h.up || h.boot != boot {
		return
	}
	if !h.running {
		s.after(50*time.Millisecond, func() { h.hand(q, boot) })
		return
	}
	life, finished := h.life, false
	done := q.done
	copied := *q
	copied.arrived = s.now
	copied.done = func(c simCell, ok bool) {
		if !finished {
			finished = true
			done(c, ok)
		}
	}
	h.do(life, func() { h.request(&copied) })
	var resend func()
	resend = func() {
		switch {
		case finished:
		case h.life != life:
			finished = true
			h.hand(q, boot)
		default:
			s.after(time.Second, resend)
		}
	}
	s.after(s.t.KernelTimeout(), resend)
}

var errSim = fmt.Errorf("input/output error")

// --- history

type simInput struct {
	write bool
	id    uint64
}

var simModel = porcupine.Model{
	Init: func() any { return uint64(0) },
	Step: func(state, input, output any) (bool, any) {
		in := input.(simInput)
		if in.write {
			// A host's writes take effect in their order: ids grow, and their low byte is the host.
			old := state.(uint64)
			return old&0xff != in.id&0xff || old <= in.id, in.id
		}
		return output.(uint64) == state.(uint64), state
	},
	Equal: func(a, b any) bool { return a == b },
}

// check returns what is wrong with the history, "" if nothing is. A write that failed, or whose host died, may have
// happened or not; but once the host's next write to the register is acknowledged it must not happen any more.
func (s *sim) check(limit time.Duration) string {
	byReg := map[int][]porcupine.Operation{}
	lastOK := map[[2]int]int64{}
	// A failed write that nobody read can be left out; one that was read happened before the first such read ended.
	firstRead := map[uint64]int64{}
	for _, op := range s.ops {
		if at := op.ret.Sub(s.start).Nanoseconds(); !op.write && op.ok {
			if old, ok := firstRead[op.id]; !ok || at < old {
				firstRead[op.id] = at
			}
		}
	}
	for i := len(s.ops) - 1; i >= 0; i-- {
		op := s.ops[i]
		key := [2]int{op.host, op.reg}
		ret := op.ret.Sub(s.start).Nanoseconds()
		if !op.ok {
			read, seen := firstRead[op.id]
			if !op.write || !seen {
				continue
			}
			ret = read
			if next, ok := lastOK[key]; ok {
				ret = min(ret, next)
			}
		} else if op.write {
			lastOK[key] = ret
		}
		byReg[op.reg] = append(byReg[op.reg], porcupine.Operation{ClientId: op.host, Input: simInput{op.write, op.id}, Output: op.id,
			Call: op.call.Sub(s.start).Nanoseconds(), Return: ret})
	}
	for reg := 0; reg <= len(s.hosts); reg++ {
		switch porcupine.CheckOperationsTimeout(simModel, byReg[reg], limit) {
		case porcupine.Illegal:
			return fmt.Sprintf("register %d is not linearizable", reg)
		case porcupine.Unknown:
			return fmt.Sprintf("register %d: not decided in %v", reg, limit)
		}
	}
	return ""
}
