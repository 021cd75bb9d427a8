package heartbeat

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// scripted is a device in memory whose I/O can be made to fail.
type scripted struct {
	mu     sync.Mutex
	data   []byte
	fail   atomic.Bool
	held   *atomic.Bool
	closed atomic.Bool
}

func (s *scripted) Size() int64 { return int64(len(s.data)) }
func (s *scripted) Read(p []byte, off int64) error {
	if s.fail.Load() {
		return syscall.EIO
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(p, s.data[off:])
	return nil
}
func (s *scripted) Write(p []byte, off int64) error {
	if s.fail.Load() {
		return syscall.EIO
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(s.data[off:], p)
	return nil
}
func (s *scripted) Flush() error { return nil }
func (s *scripted) Close() error { s.closed.Store(true); s.held.Store(false); return nil }

// An owner whose device fails answers no success, closes the device and drops its clients; the requests are held and
// served by the next owner.
func TestDeviceErrorMovesTheOwnership(t *testing.T) {
	timing, _ := DeriveTiming(statefile.Derive(60 * time.Second))
	data := make([]byte, 4<<20)
	var held atomic.Bool
	var opened []*scripted
	var mu sync.Mutex
	open := func() (Device, error) {
		if !held.CompareAndSwap(false, true) {
			return nil, ErrHeld
		}
		d := &scripted{data: data, held: &held}
		mu.Lock()
		opened = append(opened, d)
		mu.Unlock()
		return d, nil
	}
	var peers []PeerAddress
	var listeners []net.Listener
	for _, name := range []string{"n1", "n2"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		peers = append(peers, PeerAddress{name, []string{l.Addr().String()}})
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	ctx := t.Context()
	var daemons []*Daemon
	for i, p := range peers {
		d, err := New(Config{Host: p.Host, Boot: "boot", Export: "statefile", Statefile: true, Peers: peers, Timing: timing, Open: open, Size: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		daemons = append(daemons, d)
		wg.Go(func() {
			if err := d.Remote().Serve(ctx, listeners[i]); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() { _ = d.Run(ctx) })
	}
	near, far := net.Pipe()
	go func() { _ = daemons[1].Local().ServeConn(ctx, far) }()
	c, err := nbd.Connect(ctx, near, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := nbd.AlignedBuffer(1024)
	for i := range 5 {
		p[0] = byte(i)
		if err := c.Write(p, statefile.Offset(1), true, time.Minute); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		now := opened[len(opened)-1]
		mu.Unlock()
		now.fail.Store(true)
		got := nbd.AlignedBuffer(1024)
		if err := c.Read(got, statefile.Offset(1), time.Minute); err != nil || got[0] != byte(i) {
			t.Fatalf("round %d: read %d, %v", i, got[0], err)
		}
		if !now.closed.Load() {
			t.Error("the failed device is still open")
		}
	}
	// A shared write meets the failure itself: it may have happened, so it is not repeated.
	mu.Lock()
	opened[len(opened)-1].fail.Store(true)
	mu.Unlock()
	if err := c.Write(p[:512], 0, true, time.Minute); !errors.Is(err, nbd.EIO) && err != nil {
		t.Errorf("shared write: %v", err)
	}
	if err := c.Read(p[:512], 0, time.Minute); err != nil {
		t.Errorf("after it: %v", err)
	}
}
