package heartbeat

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// kernelPair is our end of a socket and the kernel's.
func kernelPair(t *testing.T) (ours net.Conn, kernel int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(pair[0]), "pair")
	defer f.Close()
	if ours, err = net.FileConn(f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); _ = unix.Close(pair[1]) })
	return ours, pair[1]
}

// A write to the global section that the kernel repeats on its second socket must not be done twice: the first copy may
// have taken effect, and another host may have written since.
func TestKernelsRepetitionIsRefused(t *testing.T) {
	tm, _ := DeriveTiming(statefile.Derive(60 * time.Second))
	d, err := New(Config{Host: "n1", Boot: "b", Export: "statefile", Statefile: true, Timing: tm, Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	sockets := d.KernelSockets()
	connA, kernelA := kernelPair(t)
	connB, _ := kernelPair(t)
	a, b := sockets.Session(connA), sockets.Session(connB)
	d.front.stop() // Requests that are passed on fail at once: there is no owner in this test.
	buf := make([]byte, 512)
	refused := func(s nbd.Session, off int64) bool {
		before := d.front.stats.Requests
		err := s.Write(buf, off, false)
		if err == nil {
			t.Fatal("a write without an owner succeeded")
		}
		if !errors.Is(err, nbd.EIO) {
			t.Errorf("write at %d: %v", off, err)
		}
		return d.front.stats.Requests == before
	}
	if refused(b, 0) || refused(a, 0) {
		t.Error("a write was refused although both sockets live")
	}
	if err := unix.Shutdown(kernelA, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if !refused(b, 0) || b.Zero(0, 512, false) == nil {
		t.Error("a write that may be the kernel's repetition was passed on")
	}
	if refused(b, statefile.Offset(3)) {
		t.Error("a host slot was refused; it has one writer and may be repeated")
	}
	a.Close()
	now := time.Now()
	if d.front.f.TakesShared(now.Add(tm.KernelTimeout())) || !d.front.f.TakesShared(now.Add(tm.KernelTimeout()+time.Second)) {
		t.Error("after the socket has gone, shared writes are not refused for the kernel's time-out")
	}
	if refused(b, 0) {
		t.Error("the socket that went still counts")
	}
}
