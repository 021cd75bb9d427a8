package heartbeat

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
)

// KernelSockets are the sockets that one device of the kernel's nbd client uses. When the kernel gives one of them up, it
// sends what was in flight there again on another, in an order of its own: it shuts the socket down, then it repeats. So
// while one of the sockets is shut down, and for the kernel's time-out after it went, a write that must not be repeated is
// refused on all of them.
type KernelSockets struct {
	front *forwarder

	shut  atomic.Bool // No more is taken from the kernel.
	mu    sync.Mutex
	alive map[*kernelSession]func() bool
}

// KernelSockets returns the sessions of a new device.
func (d *Daemon) KernelSockets() *KernelSockets {
	return &KernelSockets{front: d.front, alive: map[*kernelSession]func() bool{}}
}

// Session is the session for a socket whose other end is handed to the kernel.
func (k *KernelSockets) Session(conn net.Conn) nbd.Session {
	s := &kernelSession{localSession: k.front.session(conn), sockets: k, conn: conn}
	k.mu.Lock()
	k.alive[s] = hangUp(conn)
	if k.shut.Load() {
		shutRead(conn)
	}
	k.mu.Unlock()
	return s
}

// HangUp refuses to take more from the kernel, which keeps it for the sockets of the next process, and returns when all that it
// had sent is answered, or after limit. A request that is in flight when a socket closes would be repeated only after the kernel's
// time-out.
func (k *KernelSockets) HangUp(limit time.Duration) {
	k.mu.Lock()
	for s := range k.alive {
		shutRead(s.conn)
	}
	k.shut.Store(true) // Sockets that come now are shut by Session.
	k.mu.Unlock()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); time.Now().Before(end); <-tick.C {
		k.mu.Lock()
		left := len(k.alive)
		k.mu.Unlock()
		if left == 0 {
			return
		}
	}
}

// shutRead makes the other end unable to send. What it had sent can still be read, and answered.
func shutRead(conn net.Conn) {
	if c, ok := conn.(interface{ CloseRead() error }); ok {
		_ = c.CloseRead() // It is closed already, then.
	}
}

// complete says whether the kernel has given up none of the sockets.
func (k *KernelSockets) complete() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, alive := range k.alive {
		if !alive() {
			return false
		}
	}
	return true
}

// kernelSession is the session of one of the sockets.
type kernelSession struct {
	*localSession
	sockets *KernelSockets
	conn    net.Conn
}

func (s *kernelSession) mayRepeat(off, n int64) bool {
	return (!s.w.slots || !Repeatable(off, n)) && !s.sockets.complete()
}

func (s *kernelSession) Write(p []byte, off int64, fua bool) error {
	if s.mayRepeat(off, int64(len(p))) {
		return nbd.EIO
	}
	return s.localSession.Write(p, off, fua)
}

func (s *kernelSession) Zero(off, n int64, fua bool) error {
	if s.mayRepeat(off, n) {
		return nbd.EIO
	}
	return s.localSession.Zero(off, n, fua)
}

func (s *kernelSession) Close() {
	s.sockets.mu.Lock()
	defer s.sockets.mu.Unlock()
	delete(s.sockets.alive, s)
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.w.f.Repeating(time.Now())
}
