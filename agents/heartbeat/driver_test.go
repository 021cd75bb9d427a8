package heartbeat

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// runs starts a daemon, and its server on l, until the test ends.
func runs(t *testing.T, c Config, l net.Listener) *Daemon {
	t.Helper()
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	wg.Go(func() {
		if err := d.Remote().Serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() { _ = d.Run(ctx) })
	return d
}

func listener(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// eventually polls until cond is true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not after 2 minutes", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func testConfig(host string, peers []PeerAddress, open func() (Device, error)) Config {
	timing, _ := DeriveTiming(statefile.Derive(60 * time.Second))
	return Config{Host: host, Boot: "boot", Export: "statefile", Statefile: true, Peers: peers, Timing: timing, Open: open, Size: 4 << 20}
}

// A host whose open takes long says so, and is not taken for a silent one.
func TestOpeningIsNotSilence(t *testing.T) {
	t.Parallel()
	l1, l2 := listener(t), listener(t)
	peers := []PeerAddress{{"n1", []string{l1.Addr().String()}}, {"n2", []string{l2.Addr().String()}}}
	var held atomic.Bool
	opens, go1 := make(chan struct{}, 1), make(chan struct{})
	runs(t, testConfig("n1", peers, func() (Device, error) {
		select {
		case opens <- struct{}{}:
		default:
		}
		<-go1
		held.Store(true)
		return &scripted{data: make([]byte, 4<<20), held: &held}, nil
	}), l1)
	<-opens
	d := runs(t, testConfig("n2", peers, func() (Device, error) { return nil, ErrHeld }), l2)
	said := func() Peer {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.view.Peers[0]
	}
	eventually(t, "n2 hears that n1 opens", func() bool { return said().Answer == Opening })
	if p := said(); p.Heard.IsZero() {
		t.Error("opening does not count as a sign of life")
	}
	close(go1)
	eventually(t, "n1 serves n2", func() bool { return d.front.linked() })
}

// Silent hosts, of which each holds an ask for a second, must not keep the others from being asked. And a host that answers is
// not asked more often than the pauses allow.
func TestSilentHostsStarveNobody(t *testing.T) {
	t.Parallel()
	silent, last, asked := listener(t), listener(t), listener(t)
	var peers []PeerAddress
	for i := range 62 { // Three times the asks under way at once, and more.
		peers = append(peers, PeerAddress{fmt.Sprintf("n%02d", i), []string{silent.Addr().String()}})
	}
	peers = append(peers, PeerAddress{"n98", []string{asked.Addr().String()}}, PeerAddress{"n99", []string{last.Addr().String()}})
	var asks atomic.Int64
	refusing, err := New(testConfig("n98", peers, nil))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	wg.Go(func() { _ = refusing.Remote().Serve(ctx, counting{asked, &asks}) })
	var held atomic.Bool
	held.Store(true)
	start := time.Now()
	runs(t, testConfig("n99", peers, func() (Device, error) { return &scripted{data: make([]byte, 4<<20), held: &held}, nil }), last)
	d := runs(t, testConfig("n00", peers, nil), listener(t))
	eventually(t, "the last host is asked, and serves", d.front.linked)
	// Both daemons ask. Each ask is followed by a pause of no less than an eighth of a second.
	if n, most := asks.Load(), int64(2*(time.Since(start)/(125*time.Millisecond)+1)); n > most {
		t.Errorf("a host was asked %d times in %v, want at most %d", n, time.Since(start), most)
	}
}

// counting counts connections.
type counting struct {
	net.Listener
	n *atomic.Int64
}

func (c counting) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	c.n.Add(1)
	return conn, err
}

// A daemon that is told to end answers what the kernel has sent, and takes nothing more: the kernel would repeat the one only
// after its time-out, and keeps the other for the next process.
func TestStopAnswersTheKernel(t *testing.T) {
	t.Parallel()
	l1, l2 := listener(t), listener(t)
	peers := []PeerAddress{{"n1", []string{l1.Addr().String()}}, {"n2", []string{l2.Addr().String()}}}
	var held atomic.Bool
	held.Store(true)
	dev := &slow{scripted: scripted{data: make([]byte, 4<<20), held: &held}, at: statefile.Offset(1), asked: make(chan struct{}), answer: make(chan struct{})}
	c := testConfig("n1", peers, func() (Device, error) { return dev, nil })
	c.Timing.Suspect = 100 * time.Millisecond // It owns soon.
	runs(t, c, l1)
	c = testConfig("n2", peers, nil)
	c.Timing.Suspect, c.Timing.Attempt, c.Timing.Hold = 5*time.Minute, 5*time.Minute, 5*time.Minute // However slow the machine is.
	shut := make(chan struct{})
	var sockets *KernelSockets
	c.HangUp = func(limit time.Duration) {
		go func() {
			eventually(t, "sockets take no more", func() bool { return sockets.shut.Load() })
			close(shut)
		}()
		sockets.HangUp(limit)
	}
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	sockets = d.KernelSockets()
	ours, kernel := kernelPair(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended, closed := make(chan struct{}), make(chan struct{})
	go func() { defer close(ended); _ = d.Run(ctx) }()
	go func() { defer close(closed); _ = d.Local().Transmit(context.Background(), ours, sockets.Session(ours)) }()
	request := make([]byte, 28+1024) // A WRITE: magic, flags, type, cookie, offset, length, data.
	binary.BigEndian.PutUint32(request, 0x25609513)
	binary.BigEndian.PutUint16(request[6:], 1)
	binary.BigEndian.PutUint64(request[16:], uint64(dev.at))
	binary.BigEndian.PutUint32(request[24:], 1024)
	for range 2 { // The second waits in the socket, unread.
		if _, err := unix.Write(kernel, request); err != nil {
			t.Fatal(err)
		}
	}
	<-dev.asked
	cancel()
	<-shut
	if _, err := unix.Write(kernel, request); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after the stop: %v", err)
	}
	select {
	case <-ended:
		t.Error("the daemon ended before it answered")
	default:
	}
	close(dev.answer)
	<-closed
	<-ended
	reply := make([]byte, 64)
	n, err := unix.Read(kernel, reply)
	if err != nil || n != 32 || binary.BigEndian.Uint32(reply[4:]) != 0 || binary.BigEndian.Uint32(reply[20:]) != 0 {
		t.Errorf("replies to two requests: %d bytes %x, %v", n, reply[:max(n, 0)], err)
	}
}

// slow is a device of which writes at one place wait.
type slow struct {
	scripted
	at            int64
	asked, answer chan struct{}
	once          sync.Once
}

func (s *slow) Write(p []byte, off int64) error {
	if off == s.at {
		s.once.Do(func() { close(s.asked) })
		<-s.answer
	}
	return s.scripted.Write(p, off)
}

// A link that was cut is restored although the command that cut it seemed to fail, and although the process that did it has ended.
func TestCutIsNotForgotten(t *testing.T) {
	t.Parallel()
	c := testConfig("n2", []PeerAddress{{"n1", nil}, {"n2", nil}, {"n3", nil}}, func() (Device, error) { return nil, ErrHeld })
	c.CutMemo = filepath.Join(t.TempDir(), "sf.cut")
	first, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	first.noteCut("n1", now, false)
	first.noteCut("n3", now, false)
	first.noteCut("n3", now, true)
	second, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	second.view.Served, second.view.LostAt = true, time.Time{}
	for _, host := range []string{"n1", "n3"} {
		if join := rejoin(second.view); join != "" {
			t.Errorf("%s is to be joined before it answers", join)
		}
		second.view.Note(time.Now().Add(time.Millisecond), host, NotOwner)
		if join := rejoin(second.view); join != host {
			t.Errorf("%q is to be joined, want %s", join, host)
		}
		second.noteCut(host, time.Time{}, true)
	}
	third, err := New(c)
	if err != nil || len(third.view.Cut) != 0 {
		t.Errorf("still cut: %v, %v", third.view.Cut, err)
	}
	if err := os.WriteFile(c.CutMemo, []byte("n9 n2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d, err := New(c); err != nil || len(d.view.Cut) != 0 {
		t.Errorf("hosts of which none can be cut: %v, %v", d.view.Cut, err)
	}
}

// BenchmarkAsk is what it costs both sides together when a host is asked and does not own: a connection, a mutual TLS handshake
// and a refusal. AskAgain's pauses follow from it.
func BenchmarkAsk(b *testing.B) {
	secret := filepath.Join(b.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"), 0o600); err != nil {
		b.Fatal(err)
	}
	l := listener(b)
	peers := []PeerAddress{{"n1", []string{l.Addr().String()}}, {"n2", nil}}
	daemon := func(host string) *Daemon {
		c := testConfig(host, peers, nil)
		id, err := LoadIdentity(host, secret)
		if err != nil {
			b.Fatal(err)
		}
		c.Identity = id
		d, err := New(c)
		if err != nil {
			b.Fatal(err)
		}
		return d
	}
	n1, n2 := daemon("n1"), daemon("n2")
	go func() { _ = n1.Remote().Serve(b.Context(), l) }()
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		n2.try(b.Context(), peers[0], true)
	}
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		b.Fatal(err)
	}
	if said := n2.view.Peers[0].Answer; said != NotOwner {
		b.Fatalf("answer %v, %s", said, n2.lastErr)
	}
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	b.ReportMetric(float64(cpu.Microseconds())/float64(b.N), "cpu-us/op")
}
