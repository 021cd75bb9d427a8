// Package heartbeat drives the built xostor-heartbeat: three hosts as processes, one file as the device that one of them
// may open (flock stands in for DRBD's promotion), mutual TLS between them.
package heartbeat

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

var built struct {
	once sync.Once
	path string
	err  error
}

// build makes the binary once.
func build(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		dir, err := os.MkdirTemp("", "xhb")
		if err != nil {
			built.err = err
			return
		}
		built.path = filepath.Join(dir, "xostor-heartbeat")
		cmd := exec.Command("go", "build", "-o", built.path, "github.com/xostor-agents/xostor-agents/cmd/xostor-heartbeat")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.path != "" {
		os.RemoveAll(filepath.Dir(built.path))
	}
	os.Exit(code)
}

// pool is three hosts.
type pool struct {
	t     testing.TB
	dir   string
	disk  string
	peers string
	hosts []*host
	runs  uint32
}

type host struct {
	name   string
	socket string
	runDir string
	cmd    *exec.Cmd
	log    bytes.Buffer
}

const secret = "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"

func newPool(t testing.TB, n int) *pool {
	t.Helper()
	bin := build(t)
	dir, err := os.MkdirTemp("", "hb")
	if err != nil {
		t.Fatal(err)
	}
	p := &pool{t: t, dir: dir, disk: filepath.Join(dir, "disk")}
	t.Cleanup(func() { os.RemoveAll(dir) })
	image := make([]byte, 4<<20)
	statefile.Global{Generation: statefile.Nobody, State: statefile.StateActive, Master: statefile.Nobody, Hosts: uint32(n)}.Encode(image)
	for name, data := range map[string][]byte{"disk": image, "ptoken": []byte(secret)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var list []string
	for i := range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("n%d=%s", i+1, l.Addr()))
		l.Close()
	}
	p.peers = strings.Join(list, ",")
	for i := range n {
		h := &host{name: fmt.Sprintf("n%d", i+1), socket: filepath.Join(dir, fmt.Sprintf("n%d.nbd", i+1)), runDir: filepath.Join(dir, fmt.Sprintf("r%d", i+1))}
		p.hosts = append(p.hosts, h)
		p.start(bin, h)
	}
	return p
}

func (p *pool) start(bin string, h *host) {
	p.t.Helper()
	h.cmd = exec.Command(bin, "run", "--host", h.name, "--resource", "xcp-persistent-ha-statefile", "--disk", p.disk, "--peers", p.peers,
		"--secret", filepath.Join(p.dir, "ptoken"), "--xhad-conf", filepath.Join(p.dir, "none"), "--run-dir", h.runDir, "--socket-path", h.socket, "--kernel", "")
	h.cmd.Stderr = &h.log
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := h.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	cmd := h.cmd
	p.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line := make([]byte, 256)
	n, err := out.Read(line)
	if err != nil || !strings.HasSuffix(strings.TrimSpace(string(line[:n])), "Server ready!") {
		p.t.Fatalf("%s did not get ready: %q %v\n%s", h.name, line[:n], err, &h.log)
	}
}

func (p *pool) client(h *host) *nbd.Client {
	p.t.Helper()
	conn, err := net.Dial("unix", h.socket)
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := nbd.Connect(p.t.Context(), conn, nbd.Options{})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.Close)
	return c
}

// owner asks the hosts, except one, who owns.
func (p *pool) owner(but *host) *host {
	p.t.Helper()
	for _, h := range p.hosts {
		if h == but {
			continue
		}
		out, err := exec.Command(build(p.t), "status", "--json", "--run-dir", h.runDir).Output()
		var r struct{ Owns bool }
		if err == nil && json.Unmarshal(out, &r) == nil && r.Owns {
			return h
		}
	}
	p.t.Fatal("nobody owns")
	return nil
}

// heart writes its slot and reads all others, one cycle after the other without a pause, and keeps the longest request.
type heart struct {
	longest time.Duration
	cycles  int
	err     error
}

func beat(ctx context.Context, c *nbd.Client, index, hosts int, from uint32) (r heart) {
	slot := statefile.Host{Sequence: from, Index: uint32(index), ID: statefile.Nobody, Phase: 1}
	buf := nbd.AlignedBuffer(statefile.HostIO)
	seen := make([]uint32, hosts)
	for ctx.Err() == nil {
		do := func(f func() error) {
			start := time.Now()
			if err := f(); err != nil && r.err == nil {
				r.err = err
			}
			r.longest = max(r.longest, time.Since(start))
		}
		slot.Sequence++
		slot.Encode(buf)
		do(func() error { return c.Write(buf, statefile.Offset(index), true, time.Minute) })
		for i := range hosts {
			do(func() error { return c.Read(buf, statefile.Offset(i), time.Minute) })
			h, err := statefile.DecodeHost(buf)
			switch {
			case errors.Is(err, statefile.ErrEmpty):
			case err != nil:
				r.err = err
			case h.Sequence < seen[i] || i == index && h.Sequence != slot.Sequence:
				r.err = fmt.Errorf("slot %d went from %d back to %d", i, seen[i], h.Sequence)
			default:
				seen[i] = h.Sequence
			}
			if r.err != nil {
				return r
			}
		}
		r.cycles++
	}
	return r
}

// run lets all hosts but one beat, waits until each has had a few cycles, does what happens, and returns the longest wait.
func (p *pool) run(but *host, what func()) time.Duration {
	p.t.Helper()
	ctx, cancel := context.WithCancel(p.t.Context())
	defer cancel()
	p.runs++
	results := make([]heart, len(p.hosts))
	var wg sync.WaitGroup
	for i, h := range p.hosts {
		if h == but {
			continue
		}
		c := p.client(h)
		wg.Go(func() { results[i] = beat(ctx, c, i, len(p.hosts), p.runs<<20) })
	}
	what()
	p.served(but)
	cancel()
	wg.Wait()
	var longest time.Duration
	for i, r := range results {
		if p.hosts[i] == but {
			continue
		}
		if r.err != nil || r.cycles == 0 {
			p.t.Errorf("%s: %d cycles, %v\n%s", p.hosts[i].name, r.cycles, r.err, &p.hosts[i].log)
		}
		longest = max(longest, r.longest)
	}
	return longest
}

// served waits until requests of each host but one are answered.
func (p *pool) served(but *host) {
	p.t.Helper()
	for _, h := range p.hosts {
		if h != but {
			if err := p.client(h).Read(make([]byte, 512), 0, time.Minute); err != nil {
				p.t.Fatalf("%s is not served: %v\n%s", h.name, err, &h.log)
			}
		}
	}
}

func TestOwnersDeath(t *testing.T) {
	p := newPool(t, 3)
	p.served(nil)
	first := p.owner(nil)
	gap := p.run(first, func() {
		if err := first.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = first.cmd.Wait()
	})
	t.Logf("owner killed: longest request of a survivor %v", gap)
	second := p.owner(first)
	p.start(build(t), first)
	gap = p.run(nil, func() {
		if out, err := exec.Command(build(t), "handover", "--run-dir", second.runDir, first.name).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	})
	t.Logf("planned hand-over: longest request %v", gap)
	third := p.owner(second)
	if third != first {
		t.Errorf("handed over to %s, want %s", third.name, first.name)
	}
	gap = p.run(third, func() {
		if err := third.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := third.cmd.Wait(); err != nil {
			t.Errorf("clean stop: %v\n%s", err, &third.log)
		}
	})
	t.Logf("clean stop: longest request of the others %v", gap)

	out, err := exec.Command(build(t), "dump", p.disk).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "pool: active") || !strings.Contains(string(out), "owner's record: host n") {
		t.Errorf("dump: %v\n%s", err, out)
	}
	out, err = exec.Command(build(t), "status", "--run-dir", p.owner(third).runDir).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "wrote") || !strings.Contains(string(out), "owner     this host, since") {
		t.Errorf("status: %v\n%s", err, out)
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	p := newPool(t, 1)
	h := p.hosts[0]
	out, err := exec.Command(build(t), "run", "--disk", p.disk, "--host", h.name, "--peers", p.peers, "--run-dir", h.runDir, "--kernel", "").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another xostor-heartbeat serves") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestOtherPoolIsRefused(t *testing.T) {
	p := newPool(t, 1)
	p.served(nil)
	_, addr, _ := strings.Cut(p.peers, "=")
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var refusal *nbd.Refusal
	if _, err := nbd.Connect(t.Context(), conn, nbd.Options{Name: "xcp-persistent-ha-statefile"}); !errors.As(err, &refusal) || refusal.Code != nbd.TLSRequired {
		t.Errorf("client in clear: %v", err)
	}
}

// The binary must stay small: it may not page in a bus or an HTTP stack from a stalled root disk.
func TestWhatTheBinaryLinks(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "github.com/xostor-agents/xostor-agents/cmd/xostor-heartbeat").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, dep := range strings.Fields(string(out)) {
		for _, banned := range []string{"nats-io", "golinstor", "prometheus", "net/http"} {
			if strings.Contains(dep, banned) {
				t.Errorf("links %s", dep)
			}
		}
	}
	f, err := os.ReadFile(build(t))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f[:4], []byte("\x7fELF")) || bytes.Contains(f, []byte("ld-linux")) {
		t.Error("the binary is not a static ELF file")
	}
}

// TestLockedMemory reads what the kernel counts for a daemon that has served.
func TestLockedMemory(t *testing.T) {
	p := newPool(t, 3)
	p.served(nil)
	h := p.owner(nil)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(status), "\n") {
		if strings.HasPrefix(line, "VmLck") || strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "RssAnon") {
			t.Log(line)
		}
	}
}
