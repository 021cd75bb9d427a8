package vm

import (
	"bytes"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/knbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
)

// TestKernelNBD is what a kernel's nbd client does with our sockets and our shim: what a fake kernel in other tests claims.
// Durations are those of the kernel's own timers, of which the shortest is a second.
func TestKernelNBD(t *testing.T) {
	if !InGuest() {
		alone(t)
		k := kernel(t)
		init, shim := programs(t)
		m := boot(t, Config{Kernel: k, Init: init, Memory: 512, Modules: []string{"nbd nbds_max=24", "brd rd_nr=12 rd_size=4096"}, Programs: map[string]string{shimPath: shim}})
		inGuest(t, m)
		return
	}
	// These give devices back, whose index another test would get at once: one after the other.
	t.Run("disconnect", testDisconnect)
	t.Run("shimForDriver", testShimForDriver)
	t.Run("shimOthersDevice", testShimOthersDevice)
	t.Run("shimDisconnected", testShimDisconnected)
	t.Run("shimDetach", testShimDetach)
	// These wait for time-outs: side by side.
	t.Run("geometry", testGeometry)
	t.Run("wire", testWire)
	t.Run("busy", testBusy)
	t.Run("reconfigureLive", testReconfigureLive)
	t.Run("sockets", testSockets)
	t.Run("shimRestart", testShimRestart)
	t.Run("shimFrozen", testShimFrozen)
	t.Run("shimStopped", testShimStopped)
	t.Run("shimShorterTimeout", testShimShorterTimeout)
	t.Run("shimHolds", testShimHolds)
}

// long are time-outs that do not matter in a test.
var long = knbd.Device{Timeout: 5 * time.Minute, DeadTimeout: 5 * time.Minute}

// testGeometry: the device is what CONNECT said.
func testGeometry(t *testing.T) {
	t.Parallel()
	fds, _ := newMemory().sockets(t, 2)
	d := attach(t, long, fds)
	if size, err := ioctlUint64(d.f, unix.BLKGETSIZE64); err != nil || size != exportSize {
		t.Errorf("size %d, %v", size, err)
	}
	if block, err := unix.IoctlGetInt(int(d.f.Fd()), unix.BLKSSZGET); err != nil || block != 512 {
		t.Errorf("block %d, %v", block, err)
	}
	for name, want := range map[string]string{"ro": "0", "queue/write_cache": "write back", "queue/fua": "1", "queue/logical_block_size": "512", "queue/discard_max_bytes": "0"} {
		if got := d.sysfs(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if n, err := d.f.ReadAt(nbd.AlignedBuffer(512), exportSize); n != 0 || err == nil {
		t.Errorf("read behind the end: %d bytes, %v", n, err)
	}
}

// testWire: xhad's requests reach the server as they are, and O_SYNC as FUA.
func testWire(t *testing.T) {
	t.Parallel()
	m := newMemory()
	fds, _ := m.sockets(t, 2)
	d := attach(t, long, fds)
	t.Logf("open: %s", m.requests())
	m.forget()
	for _, n := range []int{512, 1024, 266240} {
		p, q := nbd.AlignedBuffer(n), nbd.AlignedBuffer(n)
		for i := range p {
			p[i] = byte(n + i*7)
		}
		if _, err := d.f.WriteAt(p, 4096); err != nil {
			t.Fatal(err)
		}
		if _, err := d.f.ReadAt(q, 4096); err != nil || !bytes.Equal(p, q) {
			t.Errorf("%d bytes come back changed, %v", n, err)
		}
	}
	t.Logf("O_DIRECT: %s", m.requests())
	if !contains(m.requests(), "W4096+512", "R4096+512", "W4096+1024", "R4096+1024") {
		t.Errorf("requests were changed: %s", m.requests())
	}
	sync, err := os.OpenFile(d.path(), os.O_RDWR|syscall.O_DIRECT|syscall.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer sync.Close()
	m.forget()
	if _, err := sync.WriteAt(nbd.AlignedBuffer(1024), 8192); err != nil {
		t.Fatal(err)
	}
	t.Logf("O_SYNC: %s", m.requests())
	if !contains(m.requests(), "FUA8192+1024") {
		t.Errorf("O_SYNC came as %s", m.requests())
	}
}

// testBusy: a device that is in use is refused, and goes on as it was.
func testBusy(t *testing.T) {
	t.Parallel()
	m, other := newMemory(), newMemory()
	fds, _ := m.sockets(t, 2)
	d := attach(t, long, fds)
	if _, err := d.connectAgain(other.sockets(t, 2)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("connect of a device in use: %v", err)
	}
	if o := await(t, "write", d.write(0, 1)); o.err != nil || m.data[0] != 1 || other.requests() != "" {
		t.Errorf("write: %v, went to the other server: %q", o.err, other.requests())
	}
}

// testDisconnect: DISCONNECT ends the device for those that have it open, and only their close makes the index free.
func testDisconnect(t *testing.T) {
	m := newMemory()
	fds, _ := m.sockets(t, 2)
	d := attach(t, long, fds)
	if err := knbd.Disconnect(d.link, d.index); err != nil {
		t.Fatal(err)
	}
	if o := await(t, "write", d.write(0, 1)); !errors.Is(o.err, syscall.EIO) {
		t.Errorf("write after disconnect: %v", o.err)
	}
	fds, _ = m.sockets(t, 2)
	if err := d.reconfigure(fds); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("reconfigure after disconnect: %v", err)
	}
	if _, err := d.connectAgain(m.sockets(t, 2)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("connect after disconnect, still open: %v", err)
	}
	d.f.Close()
	eventually(t, "index free after close", func() bool {
		n, err := d.connectAgain(m.sockets(t, 2))
		return err == nil && n == d.index
	})
}

// testReconfigureLive: RECONFIGURE keeps live sockets, drops the new ones and reports success. The server sees the drop.
func testReconfigureLive(t *testing.T) {
	t.Parallel()
	m, other := newMemory(), newMemory()
	fds, _ := m.sockets(t, 2)
	d := attach(t, long, fds)
	fds, _ = other.sockets(t, 2)
	if err := d.reconfigure(fds); err != nil {
		t.Errorf("reconfigure: %v", err)
	}
	if o := await(t, "write", d.write(0, 3)); o.err != nil || other.requests() != "" {
		t.Errorf("write: %v, new sockets got %q", o.err, other.requests())
	}
	await(t, "end of the first new socket", other.ended)
	await(t, "end of the second new socket", other.ended)
}

// testSockets: what happens to requests when sockets die or stay silent. first was in flight, second came after.
func testSockets(t *testing.T) {
	t.Parallel()
	const s = time.Second
	for _, c := range []struct {
		name          string
		sockets       int
		timeout, dead time.Duration
		silent        time.Duration // The server answers nothing for so long; 0: its sockets die at once.
		fresh         time.Duration // New sockets after so long; 0: never.
		ok            bool
		resent        bool // The request in flight comes a second time.
	}{
		{"die, new ones come before the time-out", 2, 3 * s, 60 * s, 0, s, true, true},
		{"die, new ones come after the time-out", 2, 2 * s, 60 * s, 0, 5 * s, true, true},
		{"one dies, a new one comes", 1, 3 * s, 60 * s, 0, s, true, true},
		{"die, none comes", 2, 2 * s, 4 * s, 0, 0, false, false},
		{"silent, shorter than the time-out", 2, 60 * s, 60 * s, 3 * s, 0, true, false},
		{"silent, no time-out", 2, 0, 60 * s, 3 * s, 0, true, false},
		{"one silent, longer than the time-out, a new one comes", 1, 2 * s, 60 * s, 8 * s, 10 * s, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m, m2 := newMemory(), newMemory()
			fds, hangUp := m.sockets(t, c.sockets)
			d := attach(t, knbd.Device{Timeout: c.timeout, DeadTimeout: c.dead}, fds)
			m.forget()
			speak := m.quiet()
			defer speak()
			first := d.write(0, 7)
			await(t, "request", m.asked)
			if c.silent == 0 {
				hangUp()
			} else {
				defer time.AfterFunc(c.silent, speak).Stop()
			}
			second := d.read(8)
			reconfigured := make(chan error, 1)
			if c.fresh > 0 {
				fds, _ := m2.sockets(t, c.sockets)
				time.AfterFunc(c.fresh, func() { reconfigured <- d.reconfigure(fds) })
			} else {
				reconfigured <- nil
			}
			a, b := await(t, "request in flight", first), await(t, "request after it", second)
			if err := await(t, "reconfigure", reconfigured); err != nil {
				t.Error(err)
			}
			t.Logf("in flight: %v after %v; later: %v after %v; old sockets got %q, new %q", a.err, a.took, b.err, b.took, m.requests(), m2.requests())
			if (a.err == nil) != c.ok || (b.err == nil) != c.ok {
				t.Errorf("in flight: %v, later: %v", a.err, b.err)
			}
			if contains(m2.requests(), "W0+512") != c.resent {
				t.Errorf("resent: new sockets got %q", m2.requests())
			}
			if !c.ok {
				fds, _ := m2.sockets(t, c.sockets)
				if err := d.reconfigure(fds); err != nil {
					t.Fatal(err)
				}
				if o := await(t, "write", d.write(0, 9)); o.err != nil {
					t.Errorf("the open device did not come back with new sockets: %v", o.err)
				}
			}
		})
	}
}
