// Package heartbeat drives the built xostor-heartbeat: hosts as processes, with the stand-ins that package realpool names.
package heartbeat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
	"github.com/xostor-agents/xostor-agents/bus/poolcert"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// patience is how long a condition is waited for; on a quiet machine all take seconds.
const patience = 120 * time.Second

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
		built.err = lab.Build(built.path, "github.com/xostor-agents/xostor-agents/cmd/xostor-heartbeat")
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

// pool is a realpool for a test.
type pool struct {
	*realpool.Pool
	t    testing.TB
	runs uint32
}

// files makes a pool of which no process runs.
func files(t testing.TB, o realpool.Options) *pool {
	t.Helper()
	o.Program = build(t)
	p, err := realpool.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return &pool{Pool: p, t: t}
}

// newPool makes a pool and runs it.
func newPool(t testing.TB, o realpool.Options) *pool {
	t.Helper()
	p := files(t, o)
	if err := p.StartAll(); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pool) start(h *realpool.Host) {
	p.t.Helper()
	if err := p.Start(h); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pool) client(h *realpool.Host) *nbd.Client {
	p.t.Helper()
	c, err := p.Client(p.t.Context(), h)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.Close)
	return c
}

// until waits for a condition of the hosts' own reports.
func (p *pool) until(what string, ready func() error) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	if err := realpool.Until(ctx, ready); err != nil {
		for _, h := range p.Hosts {
			r, err := p.Report(h)
			p.t.Logf("%s: %+v %v\n%s", h.Name, r, err, h.Log())
		}
		p.t.Fatalf("%s: %v", what, err)
	}
}

// owner waits until a host, except one, owns.
func (p *pool) owner(but *realpool.Host) *realpool.Host {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	h, err := p.Owner(ctx, but)
	if err != nil {
		p.t.Fatal(err)
	}
	return h
}

// tool runs a command of the program for a host, and returns what it printed and its exit code.
func (p *pool) tool(h *realpool.Host, args ...string) (string, int) {
	p.t.Helper()
	out, err := p.Command(h, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

// heart writes its slot and reads all others, one cycle after the other without a pause, and keeps the longest request.
type heart struct {
	longest time.Duration
	late    int // Requests that failed with EIO because the budget of an outage was spent, as on a machine that is too busy.
	err     error
}

// cycles is raised by each cycle that succeeds.
func beat(ctx context.Context, c *nbd.Client, index, hosts int, from uint32, cycles *atomic.Int64) (r heart) {
	slot := statefile.Host{Sequence: from, Index: uint32(index), ID: statefile.Nobody, Phase: 1}
	buf := nbd.AlignedBuffer(statefile.HostIO)
	seen := make([]uint32, hosts)
	for ctx.Err() == nil {
		do := func(f func() error) bool {
			start := time.Now()
			err := f()
			r.longest = max(r.longest, time.Since(start))
			switch {
			case errors.Is(err, nbd.EIO):
				r.late++
				return false
			case err != nil && r.err == nil:
				r.err = err
			}
			return err == nil
		}
		slot.Sequence++
		slot.Encode(buf)
		wrote := do(func() error { return c.Write(buf, statefile.Offset(index), true, time.Minute) })
		for i := range hosts {
			if !do(func() error { return c.Read(buf, statefile.Offset(i), time.Minute) }) {
				if r.err != nil {
					return r
				}
				wrote = false
				continue
			}
			h, err := statefile.DecodeHost(buf)
			switch {
			case errors.Is(err, statefile.ErrEmpty):
			case err != nil:
				r.err = err
			case h.Sequence < seen[i] || i == index && wrote && h.Sequence != slot.Sequence:
				r.err = fmt.Errorf("slot %d went from %d back to %d", i, seen[i], h.Sequence)
			default:
				seen[i] = h.Sequence
			}
			if r.err != nil {
				return r
			}
		}
		if wrote {
			cycles.Add(1)
		}
	}
	return r
}

// run lets all hosts but one beat, does what happens, waits until all are served, and returns the longest wait.
func (p *pool) run(but *realpool.Host, what func()) time.Duration {
	p.t.Helper()
	ctx, cancel := context.WithCancel(p.t.Context())
	p.runs++
	results := make([]heart, len(p.Hosts))
	cycles := make([]atomic.Int64, len(p.Hosts))
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }()
	for i, h := range p.Hosts {
		if h == but {
			continue
		}
		c := p.client(h)
		from := p.runs << 20
		wg.Go(func() {
			results[i] = beat(ctx, c, i, len(p.Hosts), from, &cycles[i])
			cycles[i].Store(-1) // It has ended: nobody need wait for it.
		})
	}
	more := func() {
		p.t.Helper()
		for i, h := range p.Hosts {
			before := cycles[i].Load()
			if h != but {
				p.until(h.Name+" does not beat", func() error {
					if now := cycles[i].Load(); now >= 0 && now < before+2 {
						return fmt.Errorf("%d cycles", now)
					}
					return nil
				})
			}
		}
	}
	more()
	what()
	p.served(but)
	more()
	cancel()
	wg.Wait()
	var longest time.Duration
	for i, r := range results {
		if p.Hosts[i] == but {
			continue
		}
		if r.err != nil {
			p.t.Errorf("%s: %v\n%s", p.Hosts[i].Name, r.err, p.Hosts[i].Log())
		}
		if r.late > 0 {
			p.t.Logf("%s: %d requests failed when the budget of the outage was spent", p.Hosts[i].Name, r.late)
		}
		longest = max(longest, r.longest)
	}
	return longest
}

// served waits until requests of each host but one are answered.
func (p *pool) served(but *realpool.Host) {
	p.t.Helper()
	for _, h := range p.Hosts {
		if h != but {
			c := p.client(h)
			p.until(h.Name+" is not served", func() error { return c.Read(make([]byte, 512), 0, time.Minute) })
		}
	}
}

func TestOwnersDeath(t *testing.T) {
	t.Parallel()
	p := newPool(t, realpool.Options{})
	p.served(nil)
	first := p.owner(nil)
	gap := p.run(first, first.Kill)
	t.Logf("owner killed: longest request of a survivor %v", gap)
	second := p.owner(first)
	p.start(first)
	for host, want := range map[string]string{"nobody": "no host nobody is known; there are n", second.Name: "is this host"} {
		if out, code := p.tool(second, "handover", "--run-dir", second.RunDir, host); code == 0 || !strings.Contains(out, want) {
			t.Errorf("hand-over to %s: %d %s, want a refusal with %q", host, code, out, want)
		}
	}
	gap = p.run(nil, func() {
		if out, code := p.tool(second, "handover", "--run-dir", second.RunDir, first.Name); code != 0 {
			t.Fatalf("hand-over: %s", out)
		}
	})
	t.Logf("planned hand-over: longest request %v", gap)
	third := p.owner(second)
	if third != first {
		t.Errorf("handed over to %s, want %s", third.Name, first.Name)
	}
	gap = p.run(third, func() {
		if err := third.Stop(); err != nil {
			t.Errorf("clean stop: %v\n%s", err, third.Log())
		}
	})
	t.Logf("clean stop: longest request of the others %v", gap)

	out, code := p.tool(third, "dump", p.Disk)
	if code != 0 || !strings.Contains(out, "pool: active") || !strings.Contains(out, "owner's record: host n") {
		t.Errorf("dump: %d\n%s", code, out)
	}
	last := p.owner(third)
	if byDaemon, code := p.tool(last, "dump", "--run-dir", last.RunDir); code != 0 || !strings.Contains(byDaemon, "host 0: 0000") {
		t.Errorf("dump through the daemon: %d\n%s", code, byDaemon)
	}
	out, code = p.tool(last, "status", "--run-dir", last.RunDir)
	if code != 0 || !strings.Contains(out, "wrote") || !strings.Contains(out, "owner     this host, since") || !strings.Contains(out, "tolerated outage") {
		t.Errorf("status: %d\n%s", code, out)
	}
	out, code = p.tool(third, "status", "--run-dir", third.RunDir)
	if code != 1 || !strings.Contains(out, "no heartbeat daemon runs on this host") {
		t.Errorf("status of a host whose daemon has ended: %d\n%s", code, out)
	}
	last.Kill()
	if out, code = p.tool(last, "status", "--run-dir", last.RunDir); code != 1 || !strings.Contains(out, "has died and left its socket") {
		t.Errorf("status of a host whose daemon has died: %d\n%s", code, out)
	}
}

// An owner whose user space is stopped keeps its lock on the device. The others evict it, by a majority, and take over;
// when it wakes it leaves, and its links are restored.
func TestFrozenOwnerIsEvicted(t *testing.T) {
	t.Parallel()
	p := newPool(t, realpool.Options{Timeout: 20 * time.Second, DRBD: true})
	p.served(nil)
	first := p.owner(nil)
	gap := p.run(first, func() {
		if err := first.Freeze(); err != nil {
			t.Fatal(err)
		}
		p.owner(first)
	})
	t.Logf("owner frozen at T=20: longest request of a survivor %v", gap)
	if err := first.Thaw(); err != nil {
		t.Fatal(err)
	}
	p.until("links are not restored", func() error {
		for _, h := range p.Hosts {
			r, err := p.Report(h)
			if err != nil {
				return err
			}
			if len(r.Cut) > 0 || h == first && r.Owns {
				return fmt.Errorf("%s: owns %v, cut %v", h.Name, r.Owns, r.Cut)
			}
		}
		return nil
	})
	p.served(nil)
}

func TestSecondDaemonIsRefused(t *testing.T) {
	t.Parallel()
	p := newPool(t, realpool.Options{Hosts: 1})
	h := p.Hosts[0]
	common := []string{"--host", h.Name, "--peers", p.Peers, "--run-dir", h.RunDir}
	link := filepath.Join(p.Dir, "by-res", realpool.Resource)
	if err := os.MkdirAll(link, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(p.Disk, filepath.Join(link, "0")); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		append([]string{"run", "--disk", p.Disk, "--kernel", ""}, common...),
		append([]string{"http-disk-server", "--disk", filepath.Join(link, "0"), "--ip", "127.0.0.1", "--port", "1"}, common...),
		append([]string{"nbd-http-server", "--nbd-name", realpool.Resource, "--socket-path", p.Dir + "/s", "--urls", "http://127.0.0.1:1"}, common...),
	} {
		if out, code := p.tool(h, c...); code != 1 || !strings.Contains(out, "another xostor-heartbeat serves") {
			t.Errorf("%s: %d %s", c[0], code, out)
		}
	}
}

func TestOtherPoolIsRefused(t *testing.T) {
	t.Parallel()
	p := newPool(t, realpool.Options{Hosts: 1})
	p.served(nil)
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", p.Hosts[0].Addr)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	var refusal *nbd.Refusal
	if _, err := nbd.Connect(t.Context(), dial(), nbd.Options{Name: realpool.Resource}); !errors.As(err, &refusal) || refusal.Code != nbd.TLSRequired {
		t.Errorf("client in clear: %v", err)
	}
	other, err := poolcert.NewIdentity("n1", "11111111-dddd/22222222-eeee/33333333-ffff")
	if err != nil {
		t.Fatal(err)
	}
	if c, err := nbd.Connect(t.Context(), dial(), nbd.Options{Name: realpool.Resource, TLS: other.Client(poolcert.PoolName)}); err == nil {
		c.Close()
		t.Error("another pool's host was let in")
	}
	// The pool's own secret, but a name that the certificate does not carry.
	id, err := poolcert.NewIdentity("n2", realpool.Secret)
	if err != nil {
		t.Fatal(err)
	}
	posed := nbd.Options{Name: realpool.Resource + "@n1/boot/1", TLS: id.Client(poolcert.PoolName)}
	if _, err := nbd.Connect(t.Context(), dial(), posed); !errors.As(err, &refusal) || refusal.Code != nbd.Policy {
		t.Errorf("a host that poses as another: %v", err)
	}
	p.served(nil)
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
