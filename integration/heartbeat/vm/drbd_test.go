package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// drbdResource is the statefile's resource as LINSTOR writes it: three diskful replicas, quorum, errors without it.
const drbdResource = `global { usage-count no; }
resource "statefile" {
  options { quorum majority; on-no-quorum io-error; auto-promote yes; }
  net { protocol C; }
  on "n1" { node-id 0; volume 0 { device minor 1000; disk /dev/ram0; meta-disk internal; } }
  on "n2" { node-id 1; volume 0 { device minor 1000; disk /dev/ram0; meta-disk internal; } }
  on "n3" { node-id 2; volume 0 { device minor 1000; disk /dev/ram0; meta-disk internal; } }
  connection {
    host "n1" address ipv4 10.77.0.1:7000;
    host "n2" address ipv4 10.77.0.2:7000;
  }
  connection {
    host "n1" address ipv4 10.77.0.1:7000;
    host "n3" address ipv4 10.77.0.3:7000;
  }
  connection {
    host "n2" address ipv4 10.77.0.2:7000;
    host "n3" address ipv4 10.77.0.3:7000;
  }
}
`

const drbdDevice = "/dev/drbd1000"

// beatProgram is the guest's stand-in for xhad: it writes its slot and reads all, and says how each cycle went.
const beatProgram = "beat"

// beat is one cycle.
type beat struct {
	Took  time.Duration // Of the longest request.
	Error string        // Of the first request that failed.
}

// runBeat beats on a device until it is killed.
func runBeat(path string, index int) error {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT|syscall.O_SYNC, 0)
	if err != nil {
		return err
	}
	slot := statefile.Host{Index: uint32(index), ID: statefile.Nobody, Phase: 1, Sequence: uint32(time.Now().Unix())}
	buf := nbd.AlignedBuffer(statefile.HostIO)
	seen := map[int]uint32{}
	out := json.NewEncoder(os.Stdout)
	for {
		var b beat
		do := func(request func() error) bool {
			start := time.Now()
			err := request()
			b.Took = max(b.Took, time.Since(start))
			if err != nil && b.Error == "" {
				b.Error = err.Error()
			}
			return err == nil
		}
		slot.Sequence++
		slot.Encode(buf)
		wrote := do(func() error { _, err := f.WriteAt(buf, statefile.Offset(index)); return err })
		for i := range 3 {
			if !do(func() error { _, err := f.ReadAt(buf, statefile.Offset(i)); return err }) {
				continue
			}
			h, err := statefile.DecodeHost(buf)
			switch {
			case errors.Is(err, statefile.ErrEmpty):
			case err != nil:
				b.Error = err.Error()
			case h.Sequence < seen[i] || i == index && wrote && h.Sequence != slot.Sequence:
				return fmt.Errorf("slot %d went back from %d to %d", i, seen[i], h.Sequence)
			default:
				seen[i] = h.Sequence
			}
		}
		if err := out.Encode(b); err != nil {
			return err
		}
		<-time.After(200 * time.Millisecond)
	}
}

// drbdPool is three machines with DRBD 9 and the shim.
type drbdPool struct {
	t     *testing.T
	sw    *Switch
	start time.Time
	hosts []*drbdHost
}

type drbdHost struct {
	pool *drbdPool
	*Machine
	index int
	name  string
	shim  *Process
	dev   string

	mu      sync.Mutex
	last    time.Time     // Of a cycle without an error, on this machine's clock.
	gap     time.Duration // Longest time between two of them since reset.
	longest time.Duration // Longest request since reset.
	errors  int           // Cycles with an error since reset.
	err     string        // The first of them.
	log     []string
}

// TestDRBD9 runs three shims on three kernels with DRBD 9, and measures what a xhad sees of its owner's troubles.
// XOSTOR_DRBD9_MODULE is the path of drbd.ko for the kernel in use, with the other modules of its build beside it;
// Debian's kernels have DRBD 8.4, which knows no quorum. XOSTOR_DRBD9_ROW chooses rows by a regular expression, and
// XOSTOR_DRBD9_CONF is the path of xhad.conf, with %s for the host's name; without it the shims' times are those of T=60.
func TestDRBD9(t *testing.T) {
	module := os.Getenv("XOSTOR_DRBD9_MODULE")
	if module == "" {
		t.Skip("XOSTOR_DRBD9_MODULE is not set: path of drbd.ko of DRBD 9 for the kernel in .tools/vm or XOSTOR_VM_KERNEL")
	}
	chosen, err := regexp.Compile(os.Getenv("XOSTOR_DRBD9_ROW"))
	if err != nil {
		t.Fatalf("XOSTOR_DRBD9_ROW: %v", err)
	}
	p := newDRBDPool(t, module)
	p.settle()
	for _, row := range drbdRows {
		if !chosen.MatchString(row.name) {
			continue
		}
		whole := t.Run(row.name, func(t *testing.T) {
			p.t = t
			p.row(row.name, row.what)
		})
		p.t = t
		if !whole {
			return // The next row would begin with a pool that is not whole.
		}
	}
}

// drbdRows are what happens to a pool that is whole. Each says which host's requests may fail, nil if none.
var drbdRows = []struct {
	name string
	what func(p *drbdPool, owner *drbdHost) (spared *drbdHost)
}{
	{"nothing happens", func(p *drbdPool, _ *drbdHost) *drbdHost {
		p.wait(10 * time.Second)
		return nil
	}},
	{"owners process is killed", func(p *drbdPool, owner *drbdHost) *drbdHost {
		p.must(owner.shim.Signal(p.t.Context(), syscall.SIGKILL))
		p.servedBut(owner) // Its own front died with it.
		owner.startShim()
		return nil
	}},
	{"planned hand-over", func(p *drbdPool, owner *drbdHost) *drbdHost {
		owner.must("/bin/xostor-heartbeat", "handover", "--run-dir", "/run/hb", p.another(owner).name)
		if p.owner() == owner {
			p.t.Error("the owner is the same")
		}
		return nil
	}},
	{"owners process is stopped and started", func(p *drbdPool, owner *drbdHost) *drbdHost {
		p.must(owner.shim.Signal(p.t.Context(), syscall.SIGTERM))
		p.servedBut(owner)
		owner.startShim()
		return nil
	}},
	{"owners process is frozen", func(p *drbdPool, owner *drbdHost) *drbdHost {
		p.must(owner.shim.Signal(p.t.Context(), syscall.SIGSTOP))
		p.ownedBut(owner)
		p.wait(5 * time.Second)
		p.must(owner.shim.Signal(p.t.Context(), syscall.SIGCONT))
		return owner // Its outage may have been longer than it holds requests.
	}},
	{"a host that cut its link dies before it restores it", func(p *drbdPool, owner *drbdHost) *drbdHost {
		p.must(owner.shim.Signal(p.t.Context(), syscall.SIGSTOP))
		next := p.ownedBut(owner)
		i := slices.IndexFunc(p.hosts, func(h *drbdHost) bool { return h != owner && h != next })
		p.must(p.hosts[i].shim.Signal(p.t.Context(), syscall.SIGKILL))
		p.hosts[i].startShim()
		p.wait(5 * time.Second)
		p.must(owner.shim.Signal(p.t.Context(), syscall.SIGCONT))
		return owner // Its outage may have been longer than it holds requests.
	}},
	{"owners host is frozen for 15 s", func(p *drbdPool, owner *drbdHost) *drbdHost {
		p.must(owner.Freeze())
		p.ownedBut(owner)
		p.wait(10 * time.Second)
		p.must(owner.Thaw())
		return owner // Its outage may have been longer than it holds requests.
	}},
	{"owner is cut off for 40 s", func(p *drbdPool, owner *drbdHost) *drbdHost {
		heal := p.sw.Cut(owner.index)
		next := p.ownedBut(owner)
		p.wait(40 * time.Second)
		owner.failed()
		if owner.owns() || !next.owns() {
			p.t.Errorf("%s is cut off and owns: %v; %s owns: %v", owner.name, owner.owns(), next.name, next.owns())
		}
		heal()
		return owner
	}},
	{"another host is cut off for 40 s", func(p *drbdPool, owner *drbdHost) *drbdHost {
		other := p.another(owner)
		heal := p.sw.Cut(other.index)
		p.wait(40 * time.Second)
		other.failed()
		if !owner.owns() {
			p.t.Error("the majority's owner left")
		}
		heal()
		return other
	}},
	{"one host does not reach the owner for 40 s", func(p *drbdPool, owner *drbdHost) *drbdHost {
		other := p.another(owner)
		heal := p.sw.CutBetween(owner.index, other.index)
		p.wait(40 * time.Second)
		heal()
		return other // Whether DRBD lets it take over is DRBD's business; the two others must not lose a request.
	}},
	{"owners host dies", func(p *drbdPool, owner *drbdHost) *drbdHost {
		owner.Kill()
		p.ownedBut(owner)
		return owner
	}},
}

// another is a host that is not the given one.
func (p *drbdPool) another(h *drbdHost) *drbdHost { return p.hosts[(h.index+1)%len(p.hosts)] }

// failed checks that a host's requests failed: it is without the storage, and xhad has to know.
func (h *drbdHost) failed() {
	h.pool.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.errors == 0 {
		h.pool.t.Errorf("%s was cut off and saw no error", h.name)
	}
}

func newDRBDPool(t *testing.T, module string) *drbdPool {
	t.Helper()
	k := kernel(t)
	modules, err := filepath.Glob(filepath.Join(filepath.Dir(module), "*.ko"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range modules {
		k.Use(file)
	}
	init, shim := programs(t)
	tools := map[string]string{shimPath: shim}
	for _, name := range []string{"drbdadm", "drbdsetup", "drbdmeta"} {
		path, err := exec.LookPath(name)
		if err != nil {
			lack(t, name+" is missing: apt-get install drbd-utils")
		}
		tools["/sbin/"+name] = path
	}
	sw, err := NewSwitch(3)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sw.Close)
	files := map[string]string{"/etc/drbd.conf": drbdResource, "/var/lib/linstor.d/statefile.res": drbdResource, "/etc/xensource/ptoken": "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc",
		"/var/lib/drbd/empty": "", "/var/run/drbd/empty": "", "/var/lock/empty": ""}
	p := &drbdPool{t: t, sw: sw, start: time.Now()}
	var wg sync.WaitGroup
	for i := range 3 {
		h := &drbdHost{pool: p, index: i, name: fmt.Sprintf("n%d", i+1)}
		p.hosts = append(p.hosts, h)
		files := maps.Clone(files)
		if path := os.Getenv("XOSTOR_DRBD9_CONF"); path != "" {
			conf, err := os.ReadFile(strings.ReplaceAll(path, "%s", h.name))
			if err != nil {
				t.Fatal(err)
			}
			files[statefile.ConfPath] = string(conf)
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			h.Machine, err = Boot(ctx, Config{Kernel: k, Init: init, Memory: 320, Name: h.name, Netdev: sw.Netdev(i), MAC: sw.MAC(i), Programs: tools,
				Modules: []string{"virtio_pci", "virtio_net", "nbd", "brd rd_nr=1 rd_size=16384", "drbd usermode_helper=/bin/true", "drbd_transport_tcp"},
				Files:   files})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("%6.1f s  all have booted", time.Since(p.start).Seconds())
	for i, h := range p.hosts {
		t.Cleanup(h.Kill)
		p.must(h.Address(t.Context(), "eth0", fmt.Sprintf("10.77.0.%d", i+1)))
		h.must("drbdadm", "create-md", "--force", "statefile")
		h.must("drbdadm", "up", "statefile")
	}
	p.until("all are connected", func() bool {
		return !slices.ContainsFunc(p.hosts, func(h *drbdHost) bool { return strings.Count(h.status(), `"connection-state": "Connected"`) != 2 })
	})
	p.hosts[0].must("drbdsetup", "new-current-uuid", "--clear-bitmap", "1000")
	p.until("all are UpToDate", func() bool {
		return !slices.ContainsFunc(p.hosts, func(h *drbdHost) bool { return strings.Count(h.status(), "UpToDate") != 3 })
	})
	for _, h := range p.hosts {
		h.startShim()
	}
	for _, h := range p.hosts {
		b, err := h.Start("/init", beatProgram, h.dev, fmt.Sprint(h.index))
		if err != nil {
			t.Fatal(err)
		}
		go b.Lines(h.take)
	}
	return p
}

// startShim starts the shim; the kernel's device is the one of before.
func (h *drbdHost) startShim() {
	h.pool.t.Helper()
	var err error
	h.shim, err = h.Start(shimPath, "run", "--resource", "statefile", "--disk", drbdDevice, "--run-dir", "/run/hb", "--kernel", "auto", "-v")
	if err != nil {
		h.pool.t.Fatal(err)
	}
	attachedTo := make(chan string, 1)
	go h.shim.Lines(func(line string) {
		if m := attached.FindStringSubmatch(line); m != nil {
			attachedTo <- m[1]
		}
		h.mu.Lock()
		h.log = append(h.log, fmt.Sprintf("%6.1f s %s: %s", time.Since(h.pool.start).Seconds(), h.name, line))
		h.mu.Unlock()
	})
	dev := await(h.pool.t, h.name+" attaches", attachedTo)
	if h.dev != "" && h.dev != dev {
		h.pool.t.Errorf("%s: attached %s, was %s", h.name, dev, h.dev)
	}
	h.dev = dev
}

// take notes a cycle of the host's heartbeat.
func (h *drbdHost) take(line string) {
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	var b beat
	if json.Unmarshal([]byte(line), &b) != nil {
		h.pool.t.Errorf("%s: %s", h.name, line)
		return
	}
	h.longest = max(h.longest, b.Took)
	if b.Error != "" {
		if h.errors++; h.err == "" {
			h.err = b.Error
		}
		return
	}
	if !h.last.IsZero() {
		h.gap = max(h.gap, now.Sub(h.last))
	}
	h.last = now
}

func (h *drbdHost) must(argv ...string) string {
	h.pool.t.Helper()
	ctx, cancel := context.WithTimeout(h.pool.t.Context(), 2*time.Minute)
	defer cancel()
	out, err := h.Run(ctx, argv...)
	if err != nil {
		h.pool.t.Fatalf("%s: %v", h.name, err)
	}
	return out
}

func (h *drbdHost) status() string { return h.must("drbdsetup", "status", "--json", "statefile") }

func (p *drbdPool) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *drbdPool) wait(d time.Duration) { <-time.After(d) }

func (p *drbdPool) until(what string, cond func() bool) {
	p.t.Helper()
	for end := time.Now().Add(3 * time.Minute); !cond(); p.wait(100 * time.Millisecond) {
		if time.Now().After(end) {
			p.dump()
			p.t.Fatalf("%s: not after 3 minutes", what)
		}
	}
}

func (p *drbdPool) dump() {
	for _, h := range p.hosts {
		h.mu.Lock()
		p.t.Log(strings.Join(h.log, "\n"))
		h.mu.Unlock()
	}
}

func (h *drbdHost) owns() bool {
	ctx, cancel := context.WithTimeout(h.pool.t.Context(), 10*time.Second)
	defer cancel()
	out, err := h.Run(ctx, shimPath, "status", "--json", "--run-dir", "/run/hb")
	var report struct{ Owns bool }
	return err == nil && json.Unmarshal([]byte(out), &report) == nil && report.Owns
}

func (p *drbdPool) owner() *drbdHost { return p.ownedBut(nil) }

// ownedBut waits until a host other than one owns.
func (p *drbdPool) ownedBut(but *drbdHost) (owner *drbdHost) {
	p.t.Helper()
	p.until("somebody owns", func() bool {
		for _, h := range p.hosts {
			if h != but && h.alive() && h.owns() {
				owner = h
				return true
			}
		}
		return false
	})
	return owner
}

func (h *drbdHost) alive() bool {
	select {
	case <-h.ended:
		return false
	default:
		return true
	}
}

// servedBut waits until every host that lives, except one, has had a cycle without an error from now on.
func (p *drbdPool) servedBut(but *drbdHost) {
	p.t.Helper()
	from := time.Now()
	p.until("all are served", func() bool {
		return !slices.ContainsFunc(p.hosts, func(h *drbdHost) bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h != but && h.alive() && !h.last.After(from.Add(time.Second))
		})
	})
}

// settle waits until DRBD and the shims are whole again.
func (p *drbdPool) settle() {
	p.t.Helper()
	p.servedBut(nil)
	living := slices.DeleteFunc(slices.Clone(p.hosts), func(h *drbdHost) bool { return !h.alive() })
	p.until("DRBD is whole", func() bool {
		return !slices.ContainsFunc(living, func(h *drbdHost) bool {
			s := h.status()
			return strings.Count(s, `"connection-state": "Connected"`) != len(living)-1 || strings.Count(s, "UpToDate") != len(living)
		})
	})
}

// row does something and says what the hosts' heartbeats saw of it, and what the shims did.
func (p *drbdPool) row(name string, what func(*drbdPool, *drbdHost) *drbdHost) {
	p.t.Helper()
	owner := p.owner()
	marks := make([]int, len(p.hosts))
	for i, h := range p.hosts {
		h.mu.Lock()
		h.gap, h.longest, h.errors, h.err, marks[i] = 0, 0, 0, "", len(h.log)
		h.mu.Unlock()
	}
	p.t.Logf("%6.1f s  %s; the owner is %s", time.Since(p.start).Seconds(), name, owner.name)
	spared := what(p, owner)
	p.servedBut(spared)
	for i, h := range p.hosts {
		h.mu.Lock()
		p.t.Log(strings.Join(h.log[marks[i]:], "\n"))
		p.t.Logf("%s: longest request %v, longest time between good cycles %v, %d cycles with errors %s", h.name, h.longest.Round(10*time.Millisecond), h.gap.Round(10*time.Millisecond), h.errors, h.err)
		if h != spared && h.errors > 0 {
			p.t.Errorf("%s: %d cycles with errors, first %s", h.name, h.errors, h.err)
		}
		h.mu.Unlock()
	}
	begun := time.Now()
	p.settle()
	p.t.Logf("whole again %.1f s later", time.Since(begun).Seconds())
}
