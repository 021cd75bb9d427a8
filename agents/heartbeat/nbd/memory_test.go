package nbd

import (
	"bytes"
	"context"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// memory is an export in memory that records misuse by the server.
type memory struct {
	t      testing.TB
	info   Info
	mu     sync.Mutex
	data   []byte
	fail   error // Returned by every operation when set.
	after  int   // Bytes from which on reads fail with fail.
	fua    int
	flush  int
	closed int
}

func newMemory(t testing.TB, size int) *memory {
	return &memory{t: t, data: make([]byte, size), info: Info{Size: uint64(size), MinBlock: 512,
		Flags: FlagFlush | FlagFUA | FlagWriteZeroes | FlagMultiConn}}
}

func (m *memory) Info() Info { return m.info }

// bytes is a copy of the content.
func (m *memory) bytes() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.data)
}

func (m *memory) check(p []byte, off int64) error {
	if len(p) == 0 || len(p)%512 != 0 || off%512 != 0 || off < 0 || off+int64(len(p)) > int64(len(m.data)) {
		m.t.Errorf("session got a request of %d bytes at %d", len(p), off)
	}
	if len(p) > 0 && uintptr(unsafe.Pointer(&p[0]))%Align != 0 {
		m.t.Errorf("session got a buffer that is not aligned")
	}
	if m.fail != nil && off+int64(len(p)) > int64(m.after) {
		return m.fail
	}
	return nil
}

func (m *memory) Read(p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(p, off); err != nil {
		return err
	}
	copy(p, m.data[off:])
	return nil
}

func (m *memory) Write(p []byte, off int64, fua bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(p, off); err != nil {
		return err
	}
	if fua {
		m.fua++
	}
	copy(m.data[off:], p)
	return nil
}

func (m *memory) Zero(off, n int64, fua bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return m.fail
}

func (m *memory) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flush++
	return m.fail
}

func (m *memory) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed++
}

// listen serves on a fresh loopback port until the test ends and returns the address.
func listen(t testing.TB, s *Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, l)
	return l.Addr().String()
}

func serveOn(t testing.TB, s *Server, l net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
}

func connect(t testing.TB, addr string, o Options) *Client {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := Connect(ctx, conn, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

const patience = 20 * time.Second

var errDevice error = syscall.EIO
