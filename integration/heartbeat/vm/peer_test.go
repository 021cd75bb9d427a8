package vm

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/knbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
)

// memory is an export in memory that notes every request and can be told to keep silent.
type memory struct {
	mu     sync.Mutex
	data   []byte
	seen   []string
	silent chan struct{} // Requests wait until it is closed; nil to answer at once.
	asked  chan struct{} // Gets a value at each request, if there is room.
	ended  chan struct{} // Gets a value at each end of a socket, if there is room.
}

const exportSize = 1 << 20

func newMemory() *memory {
	return &memory{data: make([]byte, exportSize), asked: make(chan struct{}, 64), ended: make(chan struct{}, 64)}
}

func (m *memory) note(format string, args ...any) {
	m.mu.Lock()
	m.seen = append(m.seen, fmt.Sprintf(format, args...))
	silent := m.silent
	m.mu.Unlock()
	select {
	case m.asked <- struct{}{}:
	default:
	}
	if silent != nil {
		<-silent
	}
}

// quiet makes the export silent until the returned function is called.
func (m *memory) quiet() (speak func()) {
	c := make(chan struct{})
	m.mu.Lock()
	m.silent = c
	m.mu.Unlock()
	return sync.OnceFunc(func() {
		m.mu.Lock()
		m.silent = nil
		m.mu.Unlock()
		close(c)
	})
}

// forget empties the list of requests.
func (m *memory) forget() {
	m.mu.Lock()
	m.seen = nil
	m.mu.Unlock()
	for {
		select {
		case <-m.asked:
		default:
			return
		}
	}
}

func (m *memory) requests() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.seen, " ")
}

const exportFlags = nbd.FlagFlush | nbd.FlagFUA | nbd.FlagMultiConn

func (m *memory) Info() nbd.Info {
	return nbd.Info{Size: exportSize, MinBlock: 512, Preferred: 4096, Flags: exportFlags}
}

func (m *memory) Read(p []byte, off int64) error {
	m.note("R%d+%d", off, len(p))
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(p, m.data[off:])
	return nil
}

func (m *memory) Write(p []byte, off int64, fua bool) error {
	if fua {
		m.note("FUA%d+%d", off, len(p))
	} else {
		m.note("W%d+%d", off, len(p))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.data[off:], p)
	return nil
}

func (m *memory) Zero(off, n int64, _ bool) error {
	m.note("Z%d+%d", off, n)
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *memory) Flush() error {
	m.note("F")
	return nil
}

func (m *memory) Close() {
	select {
	case m.ended <- struct{}{}:
	default:
	}
}

// sockets serves m on n socket pairs and returns the kernel's ends. hangUp closes our ends.
func (m *memory) sockets(t *testing.T, n int) (fds []int, hangUp func()) {
	t.Helper()
	var ours []net.Conn
	for range n {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(pair[0]), "nbd")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		ours, fds = append(ours, conn), append(fds, pair[1])
		server := &nbd.Server{TransferTimeout: time.Minute}
		go func() { _ = server.Transmit(context.Background(), conn, m) }()
	}
	return fds, func() {
		for _, c := range ours {
			c.Close()
		}
	}
}

// device is an attached device that stays open, as xhad keeps it.
type device struct {
	t      *testing.T
	link   knbd.Link
	config knbd.Device
	index  int
	f      *os.File
}

func dial(t *testing.T) knbd.Link {
	t.Helper()
	link, done, err := knbd.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = done() })
	return link
}

// attach connects a device to fds and closes them here: the kernel has its own references.
func attach(t *testing.T, c knbd.Device, fds []int) *device {
	t.Helper()
	c.Index, c.Size, c.Block, c.ServerFlags, c.Sockets = -1, exportSize, 512, uint64(exportFlags)|1, fds
	d := &device{t: t, link: dial(t), config: c}
	var err error
	if d.index, err = knbd.Connect(d.link, c); err != nil {
		t.Fatal(err)
	}
	closeAll(fds)
	t.Cleanup(func() { _ = knbd.Disconnect(d.link, d.index) })
	if d.f, err = os.OpenFile(d.path(), os.O_RDWR|syscall.O_DIRECT, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.f.Close() })
	return d
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

func (d *device) path() string { return fmt.Sprintf("/dev/nbd%d", d.index) }

// sysfs is an attribute of the device.
func (d *device) sysfs(name string) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/nbd%d/%s", d.index, name))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// reconfigure gives the kernel new sockets.
func (d *device) reconfigure(fds []int) error {
	c := d.config
	c.Index, c.Sockets = d.index, fds
	err := knbd.Reconfigure(d.link, c)
	closeAll(fds)
	return err
}

// connectAgain asks for the same index once more.
func (d *device) connectAgain(fds []int, _ func()) (int, error) {
	c := d.config
	c.Index, c.Sockets = d.index, fds
	n, err := knbd.Connect(d.link, c)
	closeAll(fds)
	return n, err
}

// outcome is how a request ended.
type outcome struct {
	err  error
	took time.Duration
}

// write writes a sector of one value in the background, around the page cache.
func (d *device) write(sector int64, value byte) <-chan outcome {
	done, start := make(chan outcome, 1), time.Now()
	go func() {
		p := nbd.AlignedBuffer(512)
		for i := range p {
			p[i] = value
		}
		_, err := d.f.WriteAt(p, sector*512)
		done <- outcome{err, time.Since(start)}
	}()
	return done
}

// read reads a sector in the background and reports its first byte.
func (d *device) read(sector int64) <-chan struct {
	outcome
	value byte
} {
	done, start := make(chan struct {
		outcome
		value byte
	}, 1), time.Now()
	go func() {
		p := nbd.AlignedBuffer(512)
		_, err := d.f.ReadAt(p, sector*512)
		done <- struct {
			outcome
			value byte
		}{outcome{err, time.Since(start)}, p[0]}
	}()
	return done
}

// await takes a value or fails when it does not come in two minutes.
func await[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s: nothing after 2 minutes", what)
		panic("unreachable")
	}
}

// eventually polls until cond is true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not after 2 minutes", what)
		}
		pause := time.NewTimer(10 * time.Millisecond)
		<-pause.C
	}
}

func ioctlUint64(f *os.File, request uintptr) (v uint64, err error) {
	if _, _, no := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&v))); no != 0 {
		return 0, no
	}
	return v, nil
}

// contains says whether all words are in the list.
func contains(list string, words ...string) bool {
	have := strings.Fields(list)
	return !slices.ContainsFunc(words, func(w string) bool { return !slices.Contains(have, w) })
}
