package failover_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/sdns"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// pool is three hosts with real systemd and one DRBD model.
type pool struct {
	tb     testing.TB
	dir    string
	wall   *drbdsim.Wall
	cl     *drbdsim.Cluster
	server *drbdsim.Server
	hosts  []*host
	port   int
}

type host struct {
	p     *pool
	in    *sdns.Instance
	node  *drbdsim.Node
	name  string
	dir   string
	mp    string
	loop  string
	units *systemd.Units
	agent *exec.Cmd
	ended chan struct{}
	stop  chan struct{}
	once  sync.Once

	mu      sync.Mutex
	changes []change // of what the model says of this host, and of the mount
	mounted bool
	frozen  bool
	notify  chan struct{}
}

// change is one moment of a host.
type change struct {
	at   time.Time
	what string
}

func (h *host) note(what string) {
	h.mu.Lock()
	h.changes = append(h.changes, change{time.Now(), what})
	h.mu.Unlock()
	select {
	case h.notify <- struct{}{}:
	default:
	}
}

// since returns when something was first noted after t; zero: not yet.
func (h *host) since(t time.Time, what string) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.changes {
		if !c.at.Before(t) && c.what == what {
			return c.at
		}
	}
	return time.Time{}
}

var testNames = failover.Names{Resource: "xcp-persistent-database", Controller: "linstor-controller.service", MountUnit: "var-lib-linstor.service", Target: `drbd-services@xcp\x2dpersistent\x2ddatabase.target`}

func need(tb testing.TB) {
	tb.Helper()
	sdns.Need(tb)
	for _, p := range []string{"losetup", "mkfs.ext4", "fsfreeze", "umount"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
				tb.Fatalf("%s is missing (Debian packages util-linux, mount, e2fsprogs)", p)
			}
			tb.Skipf("%s is missing (Debian packages util-linux, mount, e2fsprogs)", p)
		}
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func run(tb testing.TB, argv ...string) string {
	tb.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// newPool boots three hosts and their agents.
func newPool(tb testing.TB, onNoQuorum string) *pool {
	tb.Helper()
	need(tb)
	dir, err := os.MkdirTemp("", "fo")
	must(tb, err)
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &pool{tb: tb, dir: dir, wall: &drbdsim.Wall{}}
	p.cl = drbdsim.New(drbdsim.Config{Resource: testNames.Resource, OnNoQuorum: onNoQuorum, RRConflict: "disconnect", OnSuspended: "disconnect", Seed: 1, PingInt: time.Second,
		Nodes: []drbdsim.NodeConfig{{Name: "h1", Diskful: true}, {Name: "h2", Diskful: true}, {Name: "h3", Diskful: true}}}, p.wall)
	p.server = &drbdsim.Server{Cluster: p.cl, Wall: p.wall}
	l, err := net.Listen("unix", filepath.Join(dir, "drbd"))
	must(tb, err)
	served := make(chan struct{})
	go func() { p.server.Serve(l); close(served) }()
	tb.Cleanup(func() { _ = l.Close() }) // streams end with their programs
	exe, err := os.Executable()
	must(tb, err)
	face := exe
	if _, ok := tb.(*testing.B); ok {
		// A small program starts as fast as drbd-utils does; the test binary takes milliseconds more.
		face = filepath.Join(dir, "face")
		run(tb, "go", "build", "-o", face, "github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdsetup")
	}
	for _, name := range []string{"drbdsetup", "drbdadm"} {
		must(tb, os.Symlink(face, filepath.Join(dir, name)))
	}
	p.port = freePort(tb)
	for i := range 3 {
		p.hosts = append(p.hosts, p.newHost(i, exe))
	}
	for _, h := range p.hosts {
		h.startAgent()
	}
	return p
}

// freePort is a port that is free on all hosts' addresses, for UDP and TCP.
func freePort(tb testing.TB) int {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (p *pool) newHost(i int, exe string) *host {
	tb := p.tb
	name := fmt.Sprintf("h%d", i+1)
	h := &host{p: p, name: name, node: p.cl.Node(name), dir: filepath.Join(p.dir, name), notify: make(chan struct{}, 1), stop: make(chan struct{})}
	h.mp = filepath.Join(h.dir, "linstor")
	must(tb, os.MkdirAll(h.mp, 0o755))
	image := filepath.Join(h.dir, "disk")
	must(tb, os.WriteFile(image, nil, 0o600))
	must(tb, os.Truncate(image, 32<<20))
	run(tb, "mkfs.ext4", "-q", image)
	h.loop = run(tb, "losetup", "--find", "--show", image)
	tb.Cleanup(func() { _ = exec.Command("losetup", "--detach", h.loop).Run() })
	var st syscall.Stat_t
	must(tb, syscall.Stat(h.loop, &st))
	h.node.Minor = int(st.Rdev & 0xff)
	env := fmt.Sprintf("Environment=%s=%s %s=%s\n", drbdsim.EnvSocket, filepath.Join(p.dir, "drbd"), drbdsim.EnvNode, name)
	out := "StandardOutput=append:" + filepath.Join(h.dir, "units.log") + "\nStandardError=append:" + filepath.Join(h.dir, "units.log") + "\n"
	drbdsetup := filepath.Join(p.dir, "drbdsetup")
	units := map[string]string{
		testNames.MountUnit: "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nRemainAfterExit=yes\n" + env + out +
			fmt.Sprintf("ExecStart=/bin/sh -c '%s sim-may-open && mount -w %s %s'\nExecStop=/bin/umount %s\n", drbdsetup, h.loop, h.mp, h.mp),
		testNames.Controller: "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nTimeoutStartSec=240\nTimeoutStopSec=90\nSuccessExitStatus=143\n" + out +
			fmt.Sprintf("Environment=%s=controller DIR=%s ADDRESS=%s:3370 MODE=%s\nExecStart=%s\n", envProgram, h.mp, h.node.Address(), filepath.Join(h.dir, "mode"), exe),
	}
	h.in = sdns.Start(tb, h.dir, units)
	h.units = &systemd.Units{Private: "/nonexistent", Bus: h.in.Bus()}
	tb.Cleanup(h.units.Close)
	tb.Cleanup(h.end)
	h.node.OnForced = func() { go h.thaw() }
	p.wall.Do(func() { p.cl.Boot(h.node) })
	go h.watchMounts()
	go h.watchModel()
	return h
}

// end stops what runs on the host.
func (h *host) end() {
	h.once.Do(func() {
		h.endAgent()
		h.thaw()
		_ = syscall.Kill(h.in.PID, syscall.SIGKILL)
		close(h.stop)
	})
}

// close ends a pool before its test does, so that the next one has the addresses.
func (p *pool) close() {
	for _, h := range p.hosts {
		h.end()
		h.p.until(5*time.Second, "the controller's address is free", func() bool {
			l, err := net.Listen("tcp", h.node.Address()+":3370")
			if err == nil {
				_ = l.Close()
			}
			return err == nil
		})
	}
}

// watchMounts lets the model know when the device is opened and closed.
func (h *host) watchMounts() {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	file := fmt.Sprintf("/proc/%d/mountinfo", h.in.PID)
	for {
		select {
		case <-h.stop:
			return
		case <-tick.C:
		}
		text, err := os.ReadFile(file)
		now := err == nil && bytes.Contains(text, []byte(" "+h.mp+" "))
		h.mu.Lock()
		was := h.mounted
		h.mounted = now
		h.mu.Unlock()
		if now == was {
			continue
		}
		h.p.wall.Do(func() {
			if now {
				_ = h.node.Open("mount") // a refusal was given to the mount unit already
			} else {
				h.node.Close("mount")
			}
		})
		h.note(map[bool]string{true: "mounted", false: "unmounted"}[now])
	}
}

// watchModel notes what the model says, and freezes the filesystem when writes would hang.
func (h *host) watchModel() {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	last := map[string]bool{}
	for {
		select {
		case <-h.stop:
			return
		case <-tick.C:
		}
		now := map[string]bool{}
		h.p.wall.Do(func() {
			now["may-promote"] = h.node.MayPromote()
			now["primary"] = h.node.IsPrimary()
			now["quorum"] = h.node.HasQuorum()
			now["suspended"] = h.node.Suspended()
		})
		for _, k := range []string{"may-promote", "primary", "quorum", "suspended"} {
			if now[k] != last[k] {
				h.note(map[bool]string{true: k, false: "no " + k}[now[k]])
			}
		}
		if now["suspended"] && !last["suspended"] {
			h.freeze()
		}
		last = now
	}
}

func (h *host) freeze() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mounted && !h.frozen && h.in.Command("fsfreeze", "--freeze", h.mp).Run() == nil {
		h.frozen = true
	}
}

func (h *host) thaw() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.frozen && h.in.Command("fsfreeze", "--unfreeze", h.mp).Run() == nil {
		h.frozen = false
	}
}

func policy() failover.Policy {
	p := failover.DefaultPolicy()
	p.QuitToTerm, p.TermToKill = 200*time.Millisecond, 500*time.Millisecond
	return p
}

func (h *host) startAgent() {
	tb := h.p.tb
	exe, err := os.Executable()
	must(tb, err)
	names := testNames
	names.MountPoint = h.mp
	state := filepath.Join(h.dir, "state")
	res := filepath.Join(h.dir, "res")
	must(tb, os.MkdirAll(res, 0o755))
	cfg, err := json.Marshal(agentConfig{Self: h.name, Names: names, Policy: policy(), Paths: failover.Paths{ResDir: res, StateDir: state, ReactorCfg: filepath.Join(h.dir, "reactor.toml"), ReactorDir: filepath.Join(h.dir, "reactor.d")},
		Controller: "http://" + h.node.Address() + ":3370", Socket: filepath.Join(h.dir, "s"), Listen: h.node.Address(), Port: h.p.port, Major: 7,
		Drbdsetup: filepath.Join(h.p.dir, "drbdsetup"), Drbdadm: filepath.Join(h.p.dir, "drbdadm"), ProbeEvery: 300 * time.Millisecond})
	must(tb, err)
	log, err := os.OpenFile(filepath.Join(h.dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(tb, err)
	defer log.Close()
	h.agent = h.in.Command(exe)
	h.agent.Env = append(os.Environ(), envProgram+"=agent", "XOSTOR_TEST_CONFIG="+string(cfg), drbdsim.EnvSocket+"="+filepath.Join(h.p.dir, "drbd"), drbdsim.EnvNode+"="+h.name)
	h.agent.Stdout, h.agent.Stderr = log, log
	must(tb, h.agent.Start())
	ended := make(chan struct{})
	agent := h.agent
	go func() { _ = agent.Wait(); close(ended) }()
	h.ended = ended
}

// endAgent kills the agent as a crash does.
func (h *host) endAgent() {
	if h.agent == nil {
		return
	}
	// nsenter forks for the PID namespace: the agent is its child, and dies of the pipe to nobody only if it is told.
	for _, pid := range h.pids("agent") {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	<-h.ended
	h.agent = nil
}

// pids finds the host's processes of one program by their environment, as seen from outside.
func (h *host) pids(program string) (out []int) {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.in.PID))
	if err != nil {
		return nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if to, err := os.Readlink(d + "/ns/pid"); err != nil || to != ns {
			continue
		}
		env, _ := os.ReadFile(d + "/environ")
		exe, _ := os.Readlink(d + "/exe")
		if slices.Contains(strings.Split(string(env), "\x00"), envProgram+"="+program) && strings.HasSuffix(exe, ".test") {
			pid, _ := strconv.Atoi(filepath.Base(d))
			cmd, _ := os.ReadFile(d + "/cmdline")
			if !strings.Contains(string(cmd), "drbdsetup") {
				out = append(out, pid)
			}
		}
	}
	return out
}

// until waits for a condition, looking at every change and every few milliseconds.
func (p *pool) until(limit time.Duration, what string, cond func() bool) {
	p.tb.Helper()
	end := time.NewTimer(limit)
	defer end.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-end.C:
			p.dump()
			p.tb.Fatalf("not within %s: %s", limit, what)
		}
	}
}

func (p *pool) dump() {
	for _, h := range p.hosts {
		log, _ := os.ReadFile(filepath.Join(h.dir, "agent.log"))
		units, _ := os.ReadFile(filepath.Join(h.dir, "units.log"))
		lines := strings.Split(string(log), "\n")
		p.tb.Logf("%s agent:\n%s\nunits:\n%s\nevents: %v", h.name, strings.Join(lines[max(0, len(lines)-40):], "\n"), units, h.changes[max(0, len(h.changes)-12):])
	}
}

// state reads the controller's unit.
func (h *host) state(unit string) systemd.Unit {
	u, err := h.units.State(context.Background(), unit)
	if err != nil {
		return systemd.Unit{Active: "unknown"}
	}
	return u
}

func (h *host) isMounted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mounted
}

// owner returns the one host whose controller is active on the mounted database.
func (p *pool) owner() *host {
	var found *host
	for _, h := range p.hosts {
		if h.isMounted() && h.state(testNames.Controller).Active == "active" {
			if found != nil {
				return nil
			}
			found = h
		}
	}
	return found
}

// settled waits for a controller and returns its host.
func (p *pool) settled() *host {
	p.tb.Helper()
	var o *host
	p.until(40*time.Second, "one controller on one host", func() bool { o = p.owner(); return o != nil })
	return o
}

func (p *pool) others(h *host) (out []*host) {
	for _, o := range p.hosts {
		if o != h {
			out = append(out, o)
		}
	}
	return out
}

// die kills a host: all its processes, and its kernel in the model. Nothing answers at its address any more.
func (p *pool) die(h *host) {
	p.wall.Do(func() { p.cl.Kill(h.node) })
	_ = syscall.Kill(h.in.PID, syscall.SIGKILL)
	var silent *net.UDPConn
	p.until(5*time.Second, "the address of the dead host is free", func() bool {
		var err error
		silent, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(h.node.Address()), Port: p.port})
		return err == nil
	})
	p.tb.Cleanup(func() { _ = silent.Close() })
	<-h.ended
	h.agent = nil
}

func (h *host) client() failover.Client { return failover.Client{Socket: filepath.Join(h.dir, "s")} }

// connected tells whether all living hosts are connected with UpToDate disks.
func (p *pool) connected() (all bool) {
	all = true
	p.wall.Do(func() {
		for _, a := range p.cl.Nodes() {
			for _, b := range p.cl.Nodes() {
				if a != b && a.Alive() && b.Alive() && (a.ConnState(b) != "Connected" || a.Disk() != "UpToDate") {
					all = false
				}
			}
		}
	})
	return all
}

// cut breaks or mends a host's storage links.
func (p *pool) cut(h *host, broken bool) {
	p.wall.Do(func() {
		for _, o := range p.others(h) {
			p.cl.Cut(h.node, o.node, broken)
		}
	})
}
