package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/knbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// shimPath is the shim in the guest.
const shimPath = "/bin/xostor-heartbeat"

// conf10 are the times of T=10, the shortest that XAPI takes: the shim holds requests for 3 s, the kernel's time-outs are
// 5 s for a request and 10 s for a new socket.
const conf10 = `<?xml version="1.0"?><xhad-config version="1.0"><common-config><GenerationUUID>00000000-0000-0000-0000-000000000001</GenerationUUID>
<UDPport>694</UDPport><host><HostID>00000000-0000-0000-0000-00000000000a</HostID><IPaddress>127.0.0.1</IPaddress></host>
<parameters><HeartbeatInterval>2</HeartbeatInterval><HeartbeatTimeout>10</HeartbeatTimeout><StateFileInterval>2</StateFileInterval><StateFileTimeout>10</StateFileTimeout>
<HeartbeatWatchdogTimeout>10</HeartbeatWatchdogTimeout><StateFileWatchdogTimeout>25</StateFileWatchdogTimeout></parameters></common-config>
<local-config><localhost><HostID>00000000-0000-0000-0000-00000000000a</HostID><HeartbeatInterface>lo</HeartbeatInterface><HeartbeatPhysicalInterface>lo</HeartbeatPhysicalInterface>
<StateFile>/dev/nbd0</StateFile></localhost></local-config></xhad-config>`

const kernelTimeout10 = 5 * time.Second

// shim is a running xostor-heartbeat with a kernel device.
type shim struct {
	t    *testing.T
	dir  string
	args []string
	cmd  *exec.Cmd
	log  *syncBuffer
	path string // Of its device.
	// device is path while the device is attached: an index that was given back may be another test's at once.
	device string
	end    chan error
}

// syncBuffer is a buffer that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// disks hands out ram disks and ports; each is used by one test.
var disks struct {
	mu   sync.Mutex
	last int
}

func disk(t *testing.T) (path string, port int) {
	t.Helper()
	disks.mu.Lock()
	defer disks.mu.Unlock()
	path, port = fmt.Sprintf("/dev/ram%d", disks.last), 20000+disks.last
	disks.last++
	return path, port
}

// newShim starts a pool of one host with a device. xhad's times are those of text, or of T=60 if that is empty.
func newShim(t *testing.T, text string) *shim {
	t.Helper()
	path, port := disk(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "xhad.conf")
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &shim{t: t, dir: dir, log: &syncBuffer{}, args: []string{"run", "--host", "n1", "--resource", "statefile", "--disk", path, "--peers", fmt.Sprintf("n1=127.0.0.1:%d", port),
		"--insecure", "--xhad-conf", conf, "--run-dir", dir, "--kernel", "auto"}}
	t.Cleanup(s.disconnect)
	s.start()
	return s
}

var attached = regexp.MustCompile("^NBD `(/dev/nbd[0-9]+)` is now attached\\.$")

// start starts the shim and waits until its device is attached. The device ends with the test.
func (s *shim) start() {
	s.t.Helper()
	if err := s.try(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *shim) try() error {
	s.cmd = exec.Command(shimPath, s.args...)
	s.cmd.Stderr = s.log
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	cmd, end, lines := s.cmd, make(chan error, 1), make(chan string, 16)
	s.end = end
	go func() {
		in := bufio.NewScanner(out)
		for in.Scan() {
			select {
			case lines <- in.Text():
			default:
			}
		}
		close(lines)
		end <- cmd.Wait()
	}()
	s.t.Cleanup(func() { _ = cmd.Process.Kill() })
	deadline := time.After(2 * time.Minute)
	for {
		select {
		case line, ok := <-lines:
			if m := attached.FindStringSubmatch(line); m != nil {
				s.path, s.device = m[1], m[1]
				return nil
			}
			if !ok {
				return fmt.Errorf("the shim ended: %s", s.log)
			}
		case <-deadline:
			return fmt.Errorf("the shim attached nothing in 2 minutes: %s", s.log)
		}
	}
}

// disconnect ends the device if it is attached.
func (s *shim) disconnect() {
	link, done, err := knbd.Dial()
	if err != nil {
		s.t.Error(err)
		return
	}
	defer func() { _ = done() }()
	var n int
	if _, err := fmt.Sscanf(s.device, "/dev/nbd%d", &n); err == nil {
		s.device = ""
		if err := knbd.Disconnect(link, n); err != nil {
			s.t.Error(err)
		}
	}
}

// kill ends the shim without a chance to tidy up.
func (s *shim) kill() {
	s.t.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	_ = await(s.t, "end of the shim", s.end)
}

// owns says whether this shim owns its device.
func (s *shim) owns() bool {
	out, err := exec.Command(shimPath, "status", "--json", "--run-dir", s.dir).Output()
	var report struct{ Owns bool }
	return err == nil && json.Unmarshal(out, &report) == nil && report.Owns
}

func (s *shim) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// open opens the attached device as xhad does, and keeps it open.
func (s *shim) open() *device {
	s.t.Helper()
	f, err := os.OpenFile(s.path, os.O_RDWR|syscall.O_DIRECT|syscall.O_SYNC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { f.Close() })
	return &device{t: s.t, f: f}
}

// slot is the first sector of a host's slot.
func slot(host int) int64 { return statefile.Offset(host) / 512 }

// works waits until a write to a slot and a read of it succeed.
func works(t *testing.T, d *device, host int, value byte) {
	t.Helper()
	eventually(t, "device works", func() bool { return await(t, "write", d.write(slot(host), value)).err == nil })
	if got := await(t, "read", d.read(slot(host))); got.err != nil || got.value != value {
		t.Errorf("read %d, want %d: %v", got.value, value, got.err)
	}
}

// testShimRestart: the device outlives the shim. A write that was in flight when the shim was killed is done by the next.
func testShimRestart(t *testing.T) {
	t.Parallel()
	s := newShim(t, "") // An emulated machine on a busy host may need seconds to own the device; T=10 has none to spare.
	d := s.open()
	works(t, d, 0, 1)
	first := s.path
	s.signal(syscall.SIGSTOP) // So that the write is in the socket, and unanswered, when the shim dies.
	inFlight := d.write(slot(1), 2)
	eventually(t, "write reaches the socket", func() bool { return inflight(t, s.path) > 0 })
	s.kill()
	s.start()
	if s.path != first {
		t.Errorf("the next shim attached %s, not %s", s.path, first)
	}
	o := await(t, "write in flight", inFlight)
	t.Logf("write in flight at the kill: %v after %v", o.err, o.took)
	if o.err != nil {
		t.Errorf("write in flight at the kill: %v\n%s", o.err, s.log)
	}
	if got := await(t, "read", d.read(slot(1))); got.err != nil || got.value != 2 {
		t.Errorf("read %d, %v", got.value, got.err)
	}
	// Again and again, at once: the kernel may not have noticed yet that the old sockets are dead.
	for i := range 10 {
		s.kill()
		s.start()
		if o := await(t, "write", d.write(slot(2), byte(10+i))); o.err != nil || s.path != first {
			t.Fatalf("restart %d: %s, %v\n%s", i, s.path, o.err, s.log)
		}
	}
	works(t, d, 2, 30)
	if !s.owns() {
		t.Errorf("the last shim does not own: %s", s.log)
	}
}

// inflight is how many requests the kernel has sent for a device and not yet got back.
func inflight(t *testing.T, path string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/inflight")
	if err != nil {
		t.Fatal(err)
	}
	var reads, writes int
	if _, err := fmt.Sscan(string(b), &reads, &writes); err != nil {
		t.Fatal(err)
	}
	return reads + writes
}

// testShimFrozen: the kernel gives sockets of a shim up that is stopped for longer than its time-outs, and gets new ones. What
// it repeats then is done in a host slot, and refused in the global section, where it could undo another host's write.
func testShimFrozen(t *testing.T) {
	t.Parallel()
	s := newShim(t, conf10)
	d := s.open()
	works(t, d, 0, 1)
	s.signal(syscall.SIGSTOP)
	inSlot, inGlobal := d.write(slot(1), 2), d.write(0, 3)
	<-time.After(2*kernelTimeout10 + 2*time.Second) // The time-outs of both sockets, one after the other.
	s.signal(syscall.SIGCONT)
	a, b := await(t, "write to a slot", inSlot), await(t, "write to the global section", inGlobal)
	t.Logf("in flight: slot %v after %v, global section %v after %v", a.err, a.took, b.err, b.took)
	if !errors.Is(b.err, syscall.EIO) {
		t.Errorf("write to the global section, repeated by the kernel: %v", b.err)
	}
	works(t, d, 2, 4)
	if !strings.Contains(s.log.String(), "kernel gave a socket up") {
		t.Errorf("the loss of a socket was not said: %s", s.log)
	}
}

// testShimHolds: a request waits for an owner, fails in time and leaves the sockets alive.
func testShimHolds(t *testing.T) {
	t.Parallel()
	s := newShim(t, conf10)
	d := s.open()
	works(t, d, 0, 1)
	s.kill()
	path := s.args[6]
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Stands in for another host that holds the device.
	eventually(t, "device free", func() bool { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil })
	s.start()
	o := await(t, "write without an owner", d.write(slot(0), 2))
	t.Logf("write without an owner: %v after %v", o.err, o.took)
	if !errors.Is(o.err, syscall.EIO) {
		t.Errorf("write without an owner: %v", o.err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	works(t, d, 0, 3)
	if strings.Contains(s.log.String(), "kernel gave a socket up") && o.took < kernelTimeout10 {
		t.Errorf("the kernel's time-out ended a socket that was holding a request: %s", s.log)
	}
}

// testShimForDriver: under the names that SM starts the device is attached anew each time, so it ends with the process.
func testShimForDriver(t *testing.T) {
	path, port := disk(t)
	dir := t.TempDir()
	owner := exec.Command(shimPath, "http-disk-server", "--disk", path, "--ip", "127.0.0.1", "--port", fmt.Sprint(port), "--host", "127.0.0.1", "--peers", fmt.Sprintf("127.0.0.1=127.0.0.1:%d", port),
		"--insecure", "--run-dir", dir, "--xhad-conf", filepath.Join(dir, "none"))
	log := &syncBuffer{}
	owner.Stderr = log
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = owner.Process.Kill(); _ = owner.Wait() }()
	s := &shim{t: t, dir: dir, log: &syncBuffer{}, args: []string{"nbd-http-server", "--socket-path", filepath.Join(dir, "s"), "--nbd-name", filepath.Base(filepath.Dir(path)),
		"--urls", fmt.Sprintf("http://127.0.0.1:%d", port), "--device-size", "4194304", "--host", "127.0.0.1", "--insecure", "--run-dir", dir, "--xhad-conf", filepath.Join(dir, "none")}}
	t.Cleanup(s.disconnect)
	s.start()
	d := s.open()
	works(t, d, 0, 1)
	s.signal(syscall.SIGTERM)
	if err := await(t, "end of the shim", s.end); err != nil {
		t.Errorf("clean stop: %v: %s", err, s.log)
	}
	if o := await(t, "write after the end", d.write(slot(0), 2)); !errors.Is(o.err, syscall.EIO) {
		t.Errorf("write after the end: %v", o.err)
	}
	d.f.Close()
	s.device = ""
	eventually(t, "device free", func() bool {
		_, err := os.Stat("/sys/block/" + filepath.Base(s.path) + "/pid")
		return errors.Is(err, os.ErrNotExist)
	})
	s.start()
	d = s.open()
	works(t, d, 0, 3)
}

// testShimOthersDevice: a device that was the shim's and now is another's is left alone; a device in use is refused by name.
func testShimOthersDevice(t *testing.T) {
	s := newShim(t, conf10)
	m := newMemory()
	fds, _ := m.sockets(t, 2)
	other := attach(t, long, fds)
	s.kill()
	s.disconnect()
	memo := filepath.Join(s.dir, "statefile.nbd")
	b, err := os.ReadFile(memo)
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b))
	if len(fields) != 4 {
		t.Fatalf("memo %q", b)
	}
	fields[0] = fmt.Sprint(other.index) // As if the kernel had given the index to another connection since.
	if err := os.WriteFile(memo, []byte(strings.Join(fields, " ")), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	if s.path == other.path() {
		t.Errorf("took %s over, which is another's", s.path)
	}
	works(t, s.open(), 0, 5)
	if size, err := ioctlUint64(other.f, unix.BLKGETSIZE64); err != nil || size != exportSize {
		t.Errorf("the other's device changed: size %d, %v", size, err)
	}
	s.kill()
	if err := os.Remove(memo); err != nil {
		t.Fatal(err)
	}
	s.args[len(s.args)-1] = other.path()
	if err := s.try(); err == nil || !strings.Contains(s.log.String(), other.path()+" is in use") {
		t.Errorf("attached %s, which is in use: %v: %s", other.path(), err, s.log)
	}
}

// testShimDisconnected: when somebody else disconnects the device, the shim ends and says so; the next one attaches another,
// because the kernel keeps the index for whoever still has it open.
func testShimDisconnected(t *testing.T) {
	s := newShim(t, conf10)
	d := s.open()
	works(t, d, 0, 1)
	first := s.path
	s.disconnect()
	if err := await(t, "end of the shim", s.end); err == nil || !strings.Contains(s.log.String(), first+" was disconnected by someone else") {
		t.Errorf("the shim ended with %v: %s", err, s.log)
	}
	s.start()
	if s.path == first {
		t.Errorf("attached %s again, which is open and disconnected", first)
	}
	works(t, s.open(), 0, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, shimPath, "dump", s.path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "owner's record: host n1") {
		t.Errorf("dump: %v: %s", err, out)
	}
}

// testShimDetach: a device that a stopped shim left is disconnected by hand, unless it is in use.
func testShimDetach(t *testing.T) {
	s := newShim(t, "")
	d := s.open()
	works(t, d, 0, 1)
	detach := func() string {
		out, err := exec.Command(shimPath, "detach", "--run-dir", s.dir).CombinedOutput()
		return fmt.Sprint(string(out), err)
	}
	if out := detach(); !strings.Contains(out, "another xostor-heartbeat serves") {
		t.Errorf("a shim runs: %s", out)
	}
	s.kill()
	if out := detach(); !strings.Contains(out, fmt.Sprintf("process %d (", os.Getpid())) || !strings.Contains(out, s.path) {
		t.Errorf("this process has it open: %s", out)
	}
	d.f.Close()
	if out := detach(); out != s.path+" is detached\n<nil>" {
		t.Errorf("nobody uses it: %s", out)
	}
	s.device = ""
	eventually(t, "device free", func() bool {
		_, err := os.Stat("/sys/block/" + filepath.Base(s.path) + "/pid")
		return errors.Is(err, os.ErrNotExist)
	})
	s.start()
	works(t, s.open(), 0, 2)
}

// testShimStopped: a shim that is stopped in order and started again, as at an update, leaves nothing in the kernel that only a
// time-out would end. What xhad asks meanwhile waits for the next shim.
func testShimStopped(t *testing.T) {
	t.Parallel()
	s := newShim(t, "")
	d := s.open()
	works(t, d, 0, 1)
	for i := range 3 {
		s.signal(syscall.SIGTERM)
		if err := await(t, "end of the shim", s.end); err != nil {
			t.Errorf("clean stop: %v: %s", err, s.log)
		}
		meanwhile := d.write(slot(1), byte(i))
		s.start()
		o := await(t, "write without a shim", meanwhile)
		t.Logf("write without a shim: %v after %v", o.err, o.took)
		if o.err != nil {
			t.Errorf("write without a shim: %v\n%s", o.err, s.log)
		}
	}
}

// testShimShorterTimeout: a shim that takes a device over under a shorter HA time-out knows that the kernel still repeats requests
// after the longer one.
func testShimShorterTimeout(t *testing.T) {
	t.Parallel()
	s := newShim(t, "")
	d := s.open()
	works(t, d, 0, 1)
	s.signal(syscall.SIGSTOP)
	inFlight := d.write(0, 2)
	eventually(t, "write reaches the socket", func() bool { return inflight(t, s.path) > 0 })
	s.kill()
	if err := os.WriteFile(filepath.Join(s.dir, "xhad.conf"), []byte(conf10), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	o := await(t, "write in flight", inFlight)
	t.Logf("write to the global section, in flight at the kill: %v after %v", o.err, o.took)
	if !errors.Is(o.err, syscall.EIO) {
		t.Errorf("write to the global section, repeated by the kernel: %v", o.err)
	}
	works(t, d, 2, 3)
	eventually(t, "global section is written again", func() bool { return await(t, "write", d.write(0, 4)).err == nil })
}
