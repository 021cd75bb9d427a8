package heartbeat

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
)

// forwarder is a host's front: it passes requests of local clients to the owner, holds them during an outage and tries
// again. It is what Dialer finds that it talks to.
type forwarder struct {
	size     int64
	slots    bool          // The export has xhad's host slots, which have one writer each.
	turn     chan struct{} // One request at a time; waiting senders are served in their order.
	attached time.Duration // The kernel's request time-out.

	mu      sync.Mutex
	t       Timing
	f       *Front
	link    *ownerLink
	changed chan struct{} // Closed and replaced at each change of link.
	stats   Stats
	heard   time.Time
	owner   string
	since   time.Time // When owner first answered, not having been the owner before.
	stopped bool
}

// stop fails all requests from now on.
func (w *forwarder) stop() {
	w.mu.Lock()
	l := w.link
	w.link, w.stopped = nil, true
	w.announce()
	w.mu.Unlock()
	if l != nil {
		l.client.Close()
	}
}

// ownerLink is a connection to an owner.
type ownerLink struct {
	client   *nbd.Client
	owner    string
	addr     string
	fallback bool // Not over the storage network.
}

// Stats are a front's counters.
type Stats struct {
	Requests      uint64                         `json:"requests"`
	Failed        uint64                         `json:"failed"`
	Outages       uint64                         `json:"outages"`           // The time before the first owner was found is none.
	Longest       time.Duration                  `json:"longest_ns"`        // Longest time of a request that was served.
	LongestOutage time.Duration                  `json:"longest_outage_ns"` // Of those that are over.
	Buckets       [len(LatencyBounds) + 1]uint64 `json:"buckets"`           // By latency, up to LatencyBounds; the last is everything slower.
}

// LatencyBounds are the upper bounds of the latency histogram.
var LatencyBounds = [...]time.Duration{time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond,
	2 * time.Second, 5 * time.Second, 10 * time.Second, 20 * time.Second}

func newForwarder(t Timing, size int64, slots bool, before time.Duration) *forwarder {
	return &forwarder{t: t, attached: t.KernelTimeout(), size: size, slots: slots, turn: make(chan struct{}, 1), f: NewFront(time.Now(), t, before), changed: make(chan struct{})}
}

func (w *forwarder) announce() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// attach gives the front a connection to an owner, unless it has one.
func (w *forwarder) attach(l *ownerLink) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped || w.link != nil {
		go l.client.Close()
		return
	}
	w.link = l
	w.announce()
}

func (w *forwarder) current() *ownerLink {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.link
}

// linked says whether there is a connection that has not ended.
func (w *forwarder) linked() bool {
	l := w.current()
	if l == nil {
		return false
	}
	select {
	case <-l.client.Ended():
		w.detach(l, time.Now())
		return false
	default:
		return true
	}
}

// dropFallback gives up a connection that does not run over the storage network.
func (w *forwarder) dropFallback(now time.Time) {
	if l := w.current(); l != nil && l.fallback {
		w.detach(l, now)
	}
}

// move replaces a connection by another one to the same owner. No request is under way meanwhile, so that none is lost with
// its session; requests wait for the handshake.
func (w *forwarder) move(from *ownerLink, connect func() (*ownerLink, error)) bool {
	w.turn <- struct{}{}
	defer func() { <-w.turn }()
	to, err := connect()
	if err != nil {
		return false
	}
	w.mu.Lock()
	if w.stopped || w.link != from {
		w.mu.Unlock()
		to.client.Close()
		return false
	}
	w.link = to
	w.announce()
	w.mu.Unlock()
	from.client.Close()
	return true
}

// setTiming changes the budget. The kernel's time-out was fixed when its device was attached: a longer hold than that
// would make it give the socket up.
func (w *forwarder) setTiming(t Timing) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.Hold = min(t.Hold, w.attached-kernelSlack)
	w.t, w.f.t = t, t
}

// detach takes a connection away that failed; since is when it began to owe an answer.
func (w *forwarder) detach(l *ownerLink, since time.Time) {
	l.client.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.link != l {
		return
	}
	w.link = nil
	w.beginOutage(since)
	w.announce()
}

func (w *forwarder) beginOutage(since time.Time) {
	if _, already := w.f.Outage(); !already {
		w.stats.Outages++
		w.f.Lost(since)
	}
}

// outage is how long the present outage has lasted by now, 0 if there is none.
func (w *forwarder) outage(now time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if began, out := w.f.Outage(); out {
		return now.Sub(began)
	}
	return 0
}

func (w *forwarder) answered(l *ownerLink, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if began, out := w.f.Outage(); out && !w.heard.IsZero() {
		w.stats.LongestOutage = max(w.stats.LongestOutage, now.Sub(began))
	}
	if w.owner != l.owner || w.since.IsZero() {
		w.owner, w.since = l.owner, now
	}
	w.heard = now
	w.f.Answered()
}

// wait returns a connection, or nil when the request has to fail.
func (w *forwarder) wait(arrived time.Time) (l *ownerLink, until time.Time, attempt time.Duration) {
	for {
		now := time.Now()
		w.mu.Lock()
		l, changed := w.link, w.changed
		until, ok := w.f.Until(now, arrived)
		ok = ok && !w.stopped
		attempt = w.t.Attempt
		w.mu.Unlock()
		if !ok {
			return nil, until, attempt
		}
		if l != nil {
			return l, until, attempt
		}
		timer := time.NewTimer(until.Sub(now))
		select {
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// verb does one attempt on a connection.
type verb func(c *nbd.Client, timeout time.Duration) error

// request passes one request on. write with n bytes at off says what may be repeated.
func (w *forwarder) request(alive func() bool, write bool, off, n int64, do verb) error {
	entered := time.Now()
	w.turn <- struct{}{}
	defer func() { <-w.turn }()
	arrived := time.Now()
	if !alive() {
		return nbd.ESHUTDOWN // The kernel has given this socket up and sends the request again on another.
	}
	w.mu.Lock()
	repeatable := !write || w.slots && Repeatable(off, n)
	takes := repeatable || w.f.TakesShared(arrived)
	w.mu.Unlock()
	err := error(nbd.EIO)
	if takes {
		err = w.attempts(arrived, !repeatable, do)
	}
	w.count(time.Since(entered), err)
	return err
}

func (w *forwarder) attempts(arrived time.Time, once bool, do verb) error {
	for {
		l, until, attempt := w.wait(arrived)
		if l == nil {
			return nbd.EIO
		}
		err := do(l.client, min(attempt, time.Until(until)))
		var wire nbd.Error
		isWire := errors.As(err, &wire)
		switch {
		case err == nil:
			w.answered(l, time.Now())
			return nil
		case isWire && wire != nbd.EIO && wire != nbd.ESHUTDOWN:
			w.answered(l, time.Now())
			return wire // The request was wrong; another owner would say the same.
		}
		w.detach(l, arrived)
		if once && !(isWire && wire == nbd.ESHUTDOWN) {
			return nbd.EIO // It may have been done; doing it again could undo another host's write.
		}
	}
}

func (w *forwarder) count(d time.Duration, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Requests++
	if err != nil {
		w.stats.Failed++
		return
	}
	w.stats.Longest = max(w.stats.Longest, d)
	i := 0
	for i < len(LatencyBounds) && d > LatencyBounds[i] {
		i++
	}
	w.stats.Buckets[i]++
}

// ping asks the owner for a sector if nothing else is under way.
func (w *forwarder) ping(buf []byte) {
	select {
	case w.turn <- struct{}{}:
		defer func() { <-w.turn }()
	default:
		return
	}
	w.mu.Lock()
	l, attempt := w.link, w.t.Attempt
	w.mu.Unlock()
	if l == nil {
		return
	}
	asked := time.Now()
	if err := l.client.Read(buf, 0, attempt); err != nil {
		w.detach(l, asked)
		return
	}
	w.answered(l, time.Now())
}

// localSession is one local client's connection to the front.
type localSession struct {
	w     *forwarder
	alive func() bool
	p     []byte
	off   int64
	fua   bool
	n     int64
	// The verbs are made once, so that a request allocates nothing.
	doRead, doWrite, doZero, doFlush verb
}

func (w *forwarder) session(conn net.Conn) *localSession {
	s := &localSession{w: w, alive: hangUp(conn)}
	s.doRead = func(c *nbd.Client, t time.Duration) error { return c.Read(s.p, s.off, t) }
	s.doWrite = func(c *nbd.Client, t time.Duration) error { return c.Write(s.p, s.off, s.fua, t) }
	s.doZero = func(c *nbd.Client, t time.Duration) error { return c.Zero(s.off, s.n, s.fua, t) }
	s.doFlush = func(c *nbd.Client, t time.Duration) error { return c.Flush(t) }
	return s
}

func (s *localSession) Info() nbd.Info {
	return nbd.Info{Size: uint64(s.w.size), MinBlock: 512, Preferred: 4096, Flags: nbd.FlagFlush | nbd.FlagFUA | nbd.FlagWriteZeroes | nbd.FlagMultiConn}
}

func (s *localSession) Read(p []byte, off int64) error {
	s.p, s.off = p, off
	return s.w.request(s.alive, false, off, int64(len(p)), s.doRead)
}

func (s *localSession) Write(p []byte, off int64, fua bool) error {
	s.p, s.off, s.fua = p, off, fua
	return s.w.request(s.alive, true, off, int64(len(p)), s.doWrite)
}

func (s *localSession) Zero(off, n int64, fua bool) error {
	s.off, s.n, s.fua = off, n, fua
	return s.w.request(s.alive, true, off, n, s.doZero)
}

func (s *localSession) Flush() error { return s.w.request(s.alive, false, 0, 0, s.doFlush) }
func (s *localSession) Close()       {}

// hangUp returns a check whether the peer still has conn open. The kernel shuts a socket down before it sends its requests
// again on another one, so a request from a socket that is shut down must not be passed on any more. It shuts down both
// directions; one alone is our own HangUp.
func hangUp(conn net.Conn) func() bool {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return func() bool { return true }
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return func() bool { return true }
	}
	fds := make([]unix.PollFd, 1)
	gone := false
	check := func(fd uintptr) {
		fds[0] = unix.PollFd{Fd: int32(fd), Events: 0}
		_, err := unix.Poll(fds, 0)
		gone = err == nil && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	}
	return func() bool {
		gone = false
		if err := raw.Control(check); err != nil {
			return false
		}
		return !gone
	}
}

// localExports serves the front under one name to local clients.
type localExports struct {
	name string
	w    *forwarder
}

func (e localExports) List(nbd.Peer) []string { return []string{e.name} }

func (e localExports) Stat(name string, p nbd.Peer) (nbd.Info, error) {
	if name != e.name && name != "" {
		return nbd.Info{}, &nbd.Refusal{Code: nbd.Unknown, Message: "no such export"}
	}
	return e.w.session(p.Conn).Info(), nil
}

func (e localExports) Open(_ context.Context, name string, p nbd.Peer) (nbd.Session, error) {
	if _, err := e.Stat(name, p); err != nil {
		return nil, err
	}
	return e.w.session(p.Conn), nil
}
