// Package realpool makes a pool of three hosts with real systemd, mounts and processes, and one DRBD model: for tests of failover, and for the demo.
//
// Each host is a systemd in namespaces of its own with an ext4 filesystem on a loop device, a mount unit, a controller unit, and the agent as a process
// inside. The network is shared; hosts have addresses on loopback. It needs root; see Missing. DESIGN.md of integration/failover says what is not as on a dom0.
package realpool

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/sdns"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdface"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// Options say how a pool is made. Zero fields get defaults.
type Options struct {
	OnNoQuorum string // DRBD's on-no-quorum: "io-error" (default) or "suspend-io"
	Face       string // program that stands in for drbdsetup and drbdadm; the own executable, which must begin with Main
	// Xostor is the real program: the agent is then the unit AgentUnit, as on a dom0, configured by WriteConfig.
	Xostor     string
	ProbeEvery time.Duration // then: between two probes of the controller; the shipped default
	// Agent, without Xostor, makes the command that runs the failover agent on a host, inside its namespaces, such as h.In.Command(...). The pool adds the environment.
	Agent    func(h *Host) (*exec.Cmd, error)
	AgentExe string // the program that the agent's process runs; Xostor or the own executable
}

// Pool is three hosts with real systemd and one DRBD model.
type Pool struct {
	Dir     string
	Wall    *drbdsim.Wall // guards Cluster
	Cluster *drbdsim.Cluster
	Server  *drbdsim.Server // answers drbdsetup
	Hosts   []*Host
	Port    int // of beats, on all hosts

	tb  sdns.TB
	o   Options
	exe string
}

// Host is one host of a Pool.
type Host struct {
	Name       string
	Dir        string // its files: "res", "state", "mode" (of the controller), "agent.log", "units.log"
	MountPoint string
	In         *sdns.Instance
	Node       *drbdsim.Node

	p     *Pool
	loop  string
	units *systemd.Units
	agent *exec.Cmd
	ended chan struct{}
	stop  chan struct{}
	once  sync.Once
	// watched is closed when nothing holds the host's mount namespace any more.
	watched chan struct{}

	mu      sync.Mutex
	changes []change // of what the model says of this host, and of the mount
	mounted bool

	icing  sync.Mutex // held while the filesystem is frozen or thawed
	frozen bool
}

// change is one moment of a host.
type change struct {
	at   time.Time
	what string
}

func (h *Host) note(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.changes = append(h.changes, change{time.Now(), what})
}

// Since returns when something was first noted after t; zero: not yet. Noted are "may-promote", "primary", "quorum" and "suspended" of the model, each also with "no " before it, "mounted" and "unmounted".
func (h *Host) Since(t time.Time, what string) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.changes {
		if !c.at.Before(t) && c.what == what {
			return c.at
		}
	}
	return time.Time{}
}

// LastBefore returns the last time before t that something was noted; zero: never.
func (h *Host) LastBefore(t time.Time, what string) (at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.changes {
		if c.what == what && c.at.Before(t) {
			at = c.at
		}
	}
	return at
}

// Names are XOSTOR's names, with the mount point of this host.
func (h *Host) Names() failover.Names {
	n := names
	n.MountPoint = h.MountPoint
	return n
}

// names are XOSTOR's, without the mount point.
var names = failover.Names{Resource: "xcp-persistent-database", Controller: Controller, MountUnit: MountUnit, Target: `drbd-services@xcp\x2dpersistent\x2ddatabase.target`}

// The units of a host.
const (
	Controller = "linstor-controller.service"
	MountUnit  = "var-lib-linstor.service"
	AgentUnit  = "xostor-failover.service" // only with Options.Xostor
)

// Missing says what a pool needs and this machine lacks; "": nothing.
func Missing() string {
	if why := sdns.Missing(); why != "" {
		return why
	}
	for _, p := range []string{"losetup", "mkfs.ext4", "fsfreeze", "umount"} {
		if _, err := exec.LookPath(p); err != nil {
			return p + " is missing (Debian packages util-linux, mount, e2fsprogs)"
		}
	}
	return ""
}

func must(tb sdns.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func run(tb sdns.TB, argv ...string) string {
	tb.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// New boots three hosts and their agents. All of it ends when tb does.
func New(tb sdns.TB, o Options) *Pool {
	tb.Helper()
	if o.OnNoQuorum == "" {
		o.OnNoQuorum = "io-error"
	}
	exe, err := os.Executable()
	must(tb, err)
	if o.Xostor != "" {
		o.Xostor, err = filepath.Abs(o.Xostor)
		must(tb, err)
		o.AgentExe = o.Xostor
	}
	for _, program := range []*string{&o.Face, &o.AgentExe} {
		if *program == "" {
			*program = exe
		}
	}
	o.AgentExe, err = filepath.EvalSymlinks(o.AgentExe)
	must(tb, err)
	dir, err := os.MkdirTemp("", "fo") // short: a socket's path has 108 bytes at most
	must(tb, err)
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &Pool{tb: tb, o: o, exe: exe, Dir: dir, Wall: &drbdsim.Wall{}}
	p.Cluster = drbdsim.New(drbdsim.Config{Resource: names.Resource, OnNoQuorum: o.OnNoQuorum, RRConflict: "disconnect", OnSuspended: "disconnect", Seed: 1, PingInt: time.Second, Network: network(),
		Nodes: []drbdsim.NodeConfig{{Name: "h1", Diskful: true}, {Name: "h2", Diskful: true}, {Name: "h3", Diskful: true}}}, p.Wall)
	p.Server = &drbdsim.Server{Cluster: p.Cluster, Wall: p.Wall}
	l, err := net.Listen("unix", filepath.Join(dir, "drbd"))
	must(tb, err)
	go p.Server.Serve(l)
	tb.Cleanup(func() { _ = l.Close() }) // streams end with their programs
	for _, name := range []string{"drbdsetup", "drbdadm"} {
		must(tb, os.Symlink(o.Face, filepath.Join(dir, name)))
	}
	p.Port = freePort(tb)
	for i := range 3 {
		p.Hosts = append(p.Hosts, p.newHost(i))
	}
	for _, h := range p.Hosts {
		h.StartAgent()
	}
	return p
}

var pools atomic.Int32

// network is the first three numbers of loopback addresses that no other pool on this machine has: tests of several packages run at once.
func network() string {
	id := os.Getpid() + 251*int(pools.Add(1)-1)
	return fmt.Sprintf("127.%d.%d", 128+id>>8&127, id&255)
}

// freePort is a port that is free on all hosts' addresses, for UDP and TCP.
func freePort(tb sdns.TB) int {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Drbdsetup and Drbdadm are the stand-ins' paths.
func (p *Pool) Drbdsetup() string { return filepath.Join(p.Dir, "drbdsetup") }

// Drbdadm is drbdadm's stand-in.
func (p *Pool) Drbdadm() string { return filepath.Join(p.Dir, "drbdadm") }

func (p *Pool) newHost(i int) *Host {
	tb := p.tb
	name := fmt.Sprintf("h%d", i+1)
	h := &Host{p: p, Name: name, Node: p.Cluster.Node(name), Dir: filepath.Join(p.Dir, name), stop: make(chan struct{}), watched: make(chan struct{})}
	h.MountPoint = filepath.Join(h.Dir, "linstor")
	for _, d := range []string{h.MountPoint, h.ResDir()} {
		must(tb, os.MkdirAll(d, 0o755))
	}
	image := filepath.Join(h.Dir, "disk")
	must(tb, os.WriteFile(image, nil, 0o600))
	must(tb, os.Truncate(image, 32<<20))
	run(tb, "mkfs.ext4", "-q", image)
	h.loop = run(tb, "losetup", "--find", "--show", image)
	tb.Cleanup(func() { _ = exec.Command("losetup", "--detach", h.loop).Run() })
	var st syscall.Stat_t
	must(tb, syscall.Stat(h.loop, &st))
	h.Node.Minor = int(st.Rdev & 0xff)
	env := fmt.Sprintf("Environment=%s=%s %s=%s\n", drbdface.EnvSocket, filepath.Join(p.Dir, "drbd"), drbdface.EnvNode, name)
	out := "StandardOutput=append:" + filepath.Join(h.Dir, "units.log") + "\nStandardError=append:" + filepath.Join(h.Dir, "units.log") + "\n"
	units := map[string]string{
		MountUnit: "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nRemainAfterExit=yes\n" + env + out +
			fmt.Sprintf("ExecStart=/bin/sh -c '%s sim-may-open && mount -w %s %s'\nExecStop=/bin/umount %s\n", p.Drbdsetup(), h.loop, h.MountPoint, h.MountPoint),
		Controller: "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nTimeoutStartSec=240\nTimeoutStopSec=90\nSuccessExitStatus=143\n" + out +
			fmt.Sprintf("Environment=%s=controller DIR=%s ADDRESS=%s:3370 MODE=%s\nExecStart=%q\n", EnvProgram, h.MountPoint, h.Node.Address(), h.ModeFile(), p.exe),
	}
	if p.o.Xostor != "" {
		must(tb, h.WriteConfig(""))
		units[AgentUnit] = "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nWatchdogSec=30\nRestart=always\nRestartSec=100ms\n" + env +
			fmt.Sprintf("Environment=%s=%s\nStandardError=append:%s\nExecStart=%q agent failover --config %s --log-level debug\n", EnvProgram, programAgent, h.AgentLog(), p.o.Xostor, h.ConfigFile())
	}
	h.In = sdns.Start(tb, h.Dir, units)
	// os.Open would let Go's runtime poll the file too, and each event is told to one of them only.
	mounts, err := unix.Open(fmt.Sprintf("/proc/%d/mountinfo", h.In.PID), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(tb, err)
	host, err := unix.PidfdOpen(h.In.PID, 0)
	must(tb, err)
	go h.watchMounts(os.NewFile(uintptr(mounts), "mountinfo"), host)
	h.units = &systemd.Units{Private: "/nonexistent", Bus: h.In.Bus(), Timeout: time.Minute}
	tb.Cleanup(h.units.Close)
	tb.Cleanup(h.end)
	h.Node.OnForced = func() { go h.thaw() }
	h.watchModel()
	p.Wall.Do(func() { p.Cluster.Boot(h.Node) })
	return h
}

// ResDir is where the .res files are.
func (h *Host) ResDir() string { return filepath.Join(h.Dir, "res") }

// StateDir is where the agent keeps what survives it.
func (h *Host) StateDir() string { return filepath.Join(h.Dir, "state") }

// ConfigFile is the configuration of the shipped agent.
func (h *Host) ConfigFile() string { return filepath.Join(h.Dir, "agents.toml") }

// AgentLog is what the agent logs.
func (h *Host) AgentLog() string { return filepath.Join(h.Dir, "agent.log") }

// SecretFile is the host's copy of the pool secret.
func (h *Host) SecretFile() string { return h.file("ptoken") }

// WriteConfig writes ConfigFile and the dom0's files that it names; extra is appended. No XAPI is behind it. Whether a bus is, is the caller's choice: BusSocket.
func (h *Host) WriteConfig(extra string) error {
	probe := ""
	if h.p.o.ProbeEvery > 0 {
		probe = fmt.Sprintf("probe_every = %q\n", h.p.o.ProbeEvery)
	}
	text := fmt.Sprintf(`[host]
pool_conf = %q
inventory = %q
name = %q
[xapi]
socket = %q
[bus]
socket = %q
store = %q
cluster = false
ptoken = %q
[agents.failover]
name = %q
listen = %q
port = %d
socket = %q
state_dir = %q
backup_dir = %q
mount_point = %q
controller_url = %q
res_dir = %q
reactor_config = %q
reactor_dir = %q
drbdsetup = %q
drbdadm = %q
device_major = %d
%s%s`, h.file("pool.conf"), h.file("inventory"), h.Name, h.file("xapi"), h.BusSocket(), h.file("bus"), h.SecretFile(), h.Name, h.Node.Address(), h.p.Port, h.Socket(), h.StateDir(),
		h.file("backups"), h.MountPoint, h.URL(), h.ResDir(), h.file("reactor.toml"), h.file("reactor.d"), h.p.Drbdsetup(), h.p.Drbdadm(), LoopMajor, probe, extra)
	for path, text := range map[string]string{h.ConfigFile(): text, h.file("pool.conf"): "master", h.file("inventory"): "INSTALLATION_UUID='uuid-of-" + h.Name + "'\n", h.SecretFile(): "the secret of a pool for trying out\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
	}
	return nil
}

func (h *Host) file(name string) string { return filepath.Join(h.Dir, name) }

// BusSocket is where the bus of the host would be.
func (h *Host) BusSocket() string { return h.file("bus.sock") }

// ModeFile rules how the stand-in controller behaves; see Main.
func (h *Host) ModeFile() string { return filepath.Join(h.Dir, "mode") }

// Socket is the agent's control socket.
func (h *Host) Socket() string { return filepath.Join(h.Dir, "s") }

// URL is the base URL of the host's controller.
func (h *Host) URL() string { return "http://" + h.Node.Address() + ":3370" }

// Pool is the pool that the host belongs to.
func (h *Host) Pool() *Pool { return h.p }

// LoopMajor is the block device major of loop devices, which stand in for DRBD's (Linux devices.txt).
const LoopMajor = 7

// end stops what runs on the host.
func (h *Host) end() {
	h.once.Do(func() {
		h.EndAgent()
		h.thaw()
		_ = syscall.Kill(h.In.PID, syscall.SIGKILL)
		close(h.stop)
		<-h.watched
	})
}

// Close ends a pool before its test does, so that the next one has the addresses.
func (p *Pool) Close() {
	for _, h := range p.Hosts {
		h.end()
		h.p.Until(time.Minute, "the controller's address is free", func() bool {
			l, err := net.Listen("tcp", h.Node.Address()+":3370")
			if err == nil {
				_ = l.Close()
			}
			return err == nil
		})
	}
}

// watchMounts lets the model know when the device is opened and closed, as the kernel tells it (mountinfo, proc(5)), until the host is dead: to look at it every
// moment would take from the agents' processors what is measured here.
func (h *Host) watchMounts(mounts *os.File, host int) {
	defer close(h.watched)
	defer unix.Close(host)
	defer mounts.Close() // it holds the namespace, and all that is mounted there
	for dead := false; !dead; {
		wait := []unix.PollFd{{Fd: int32(mounts.Fd()), Events: unix.POLLPRI}, {Fd: int32(host), Events: unix.POLLIN}}
		text, err := io.ReadAll(io.NewSectionReader(mounts, 0, 1<<20))
		h.setMounted(err == nil && bytes.Contains(text, []byte(" "+h.MountPoint+" ")))
		_, _ = unix.Poll(wait, 100)
		select {
		case <-h.stop:
			return
		default:
			dead = wait[1].Revents != 0
		}
	}
	h.setMounted(false)
}

func (h *Host) setMounted(now bool) {
	h.mu.Lock()
	was := h.mounted
	h.mounted = now
	h.mu.Unlock()
	if now == was {
		return
	}
	h.p.Wall.Do(func() {
		if now {
			_ = h.Node.Open("mount") // a refusal was given to the mount unit already
		} else {
			h.Node.Close("mount")
		}
	})
	h.note(map[bool]string{true: "mounted", false: "unmounted"}[now])
}

// watchModel notes what the model says, and freezes the filesystem when writes would hang.
func (h *Host) watchModel() {
	facts := []struct {
		name string
		is   func() bool
		was  bool
	}{{name: "may-promote", is: h.Node.MayPromote}, {name: "primary", is: h.Node.IsPrimary}, {name: "quorum", is: h.Node.HasQuorum}, {name: "suspended", is: h.Node.Suspended}}
	h.p.Wall.Observe(func() {
		for i, f := range facts {
			now := f.is()
			if now == f.was {
				continue
			}
			facts[i].was = now
			h.note(map[bool]string{true: f.name, false: "no " + f.name}[now])
			if now && f.name == "suspended" {
				go h.freeze()
			}
		}
	})
}

func (h *Host) freeze() {
	h.icing.Lock()
	defer h.icing.Unlock()
	select {
	case <-h.stop:
		return
	default:
	}
	still := false
	h.p.Wall.Do(func() { still = h.Node.Suspended() })
	// Where nothing is mounted, fsfreeze would freeze the filesystem that the folder is on.
	if still && !h.frozen && h.In.Command("sh", "-c", `mountpoint -q "$0" && fsfreeze --freeze "$0"`, h.MountPoint).Run() == nil {
		h.frozen = true
	}
}

func (h *Host) thaw() {
	h.icing.Lock()
	defer h.icing.Unlock()
	if h.frozen && h.In.Command("fsfreeze", "--unfreeze", h.MountPoint).Run() == nil {
		h.frozen = false
	}
}

// StartAgent starts the host's agent. As a unit it is started again by systemd when it dies.
func (h *Host) StartAgent() {
	tb := h.p.tb
	if h.p.o.Xostor != "" {
		must(tb, h.units.Start(tb.Context(), AgentUnit))
		return
	}
	log, err := os.OpenFile(h.AgentLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(tb, err)
	defer log.Close()
	agent, err := h.p.o.Agent(h)
	must(tb, err)
	if agent.Env == nil {
		agent.Env = os.Environ()
	}
	agent.Env = append(agent.Env, EnvProgram+"="+programAgent, drbdface.EnvSocket+"="+filepath.Join(h.p.Dir, "drbd"), drbdface.EnvNode+"="+h.Name)
	agent.Stdout, agent.Stderr = log, log
	must(tb, agent.Start())
	ended := make(chan struct{})
	go func() { _ = agent.Wait(); close(ended) }()
	h.agent, h.ended = agent, ended
}

// Units is the host's systemd, from outside.
func (h *Host) Units() *systemd.Units { return h.units }

// Xostor is a call of the real program on the host, with the host's configuration. PIDs finds what still runs of it by the name of its command.
func (h *Host) Xostor(args ...string) *exec.Cmd {
	cmd := h.In.Command(append(append([]string{h.p.o.Xostor}, args...), "--config", h.ConfigFile())...)
	cmd.Env = append(os.Environ(), EnvProgram+"="+args[0], drbdface.EnvSocket+"="+filepath.Join(h.p.Dir, "drbd"), drbdface.EnvNode+"="+h.Name)
	return cmd
}

// SignalAgent sends a signal to the agent, from outside.
func (h *Host) SignalAgent(sig syscall.Signal) {
	for _, pid := range h.PIDs(programAgent) {
		_ = syscall.Kill(pid, sig) // it may have ended
	}
}

// EndAgent kills the agent as a crash does, and leaves it dead. Not for the unit.
func (h *Host) EndAgent() {
	if h.agent == nil {
		return
	}
	// nsenter forks for the PID namespace: the agent is its child, and dies of the pipe to nobody only if it is told.
	h.SignalAgent(syscall.SIGKILL)
	<-h.ended
	h.agent = nil
}

// SignalController sends a signal to the controller's process, from outside.
func (h *Host) SignalController(sig syscall.Signal) {
	for _, pid := range h.PIDs(programController) {
		must(h.p.tb, syscall.Kill(pid, sig))
	}
}

// PIDs finds the host's processes of one program ("agent", "controller", or what Xostor runs) by their environment, as seen from outside.
func (h *Host) PIDs(program string) (out []int) {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.In.PID))
	if err != nil {
		return nil
	}
	want := h.p.o.AgentExe
	if program == programController {
		want = h.p.exe
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if to, err := os.Readlink(d + "/ns/pid"); err != nil || to != ns {
			continue
		}
		env, _ := os.ReadFile(d + "/environ")
		exe, _ := os.Readlink(d + "/exe")
		if exe == want && slices.Contains(strings.Split(string(env), "\x00"), EnvProgram+"="+program) {
			pid, _ := strconv.Atoi(filepath.Base(d))
			cmd, _ := os.ReadFile(d + "/cmdline")
			if name, _, _ := strings.Cut(string(cmd), "\x00"); !isFace(filepath.Base(name)) { // the agent's children have its environment
				out = append(out, pid)
			}
		}
	}
	return out
}

// Until waits for a condition, and ends the test when it does not come.
func (p *Pool) Until(limit time.Duration, what string, cond func() bool) {
	p.tb.Helper()
	end := time.NewTimer(limit)
	defer end.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-p.tb.Context().Done():
			p.tb.Fatalf("ended while waiting: %s", what)
		case <-tick.C:
		case <-end.C:
			p.Dump()
			p.tb.Fatalf("not within %s: %s", limit, what)
		}
	}
}

// Dump logs the last words of all agents and units, and what happened on the hosts.
func (p *Pool) Dump() {
	for _, h := range p.Hosts {
		log, _ := os.ReadFile(h.AgentLog())
		units, _ := os.ReadFile(filepath.Join(h.Dir, "units.log"))
		lines := strings.Split(string(log), "\n")
		h.mu.Lock()
		changes := slices.Clone(h.changes[max(0, len(h.changes)-12):])
		h.mu.Unlock()
		p.tb.Logf("%s agent:\n%s\nunits:\n%s\nevents: %v", h.Name, strings.Join(lines[max(0, len(lines)-40):], "\n"), units, changes)
	}
}

// State reads a unit; one that cannot be read is "unknown".
func (h *Host) State(unit string) systemd.Unit {
	u, err := h.units.State(context.Background(), unit)
	if err != nil {
		return systemd.Unit{Active: "unknown"}
	}
	return u
}

// Mounted tells whether the database is mounted on the host.
func (h *Host) Mounted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mounted
}

// Owner returns the one host whose controller is active on the mounted database.
func (p *Pool) Owner() *Host {
	var found *Host
	for _, h := range p.Hosts {
		if h.Mounted() && h.State(Controller).Active == "active" {
			if found != nil {
				return nil
			}
			found = h
		}
	}
	return found
}

// settleTime is generous: it is only used up when something is wrong.
const settleTime = 3 * time.Minute

// Settled waits for a controller and returns its host.
func (p *Pool) Settled() *Host {
	p.tb.Helper()
	var o *Host
	p.Until(settleTime, "one controller on one host", func() bool { o = p.Owner(); return o != nil })
	return o
}

// Others are all hosts but h.
func (p *Pool) Others(h *Host) (out []*Host) {
	for _, o := range p.Hosts {
		if o != h {
			out = append(out, o)
		}
	}
	return out
}

// Die kills a host: all its processes, and its kernel in the model. Nothing answers at its address any more.
func (p *Pool) Die(h *Host) {
	p.Wall.Do(func() { p.Cluster.Kill(h.Node) })
	_ = syscall.Kill(h.In.PID, syscall.SIGKILL)
	var silent *net.UDPConn
	p.Until(time.Minute, "the address of the dead host is free", func() bool {
		var err error
		silent, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(h.Node.Address()), Port: p.Port})
		return err == nil
	})
	p.tb.Cleanup(func() { _ = silent.Close() })
	if h.agent != nil {
		<-h.ended
		h.agent = nil
	}
}

// Client talks to the host's agent.
func (h *Host) Client() failover.Client { return failover.Client{Socket: h.Socket()} }

// Connected tells whether all living hosts are connected with UpToDate disks.
func (p *Pool) Connected() (all bool) {
	all = true
	p.Wall.Do(func() {
		for _, a := range p.Cluster.Nodes() {
			for _, b := range p.Cluster.Nodes() {
				if a != b && a.Alive() && b.Alive() && (a.ConnState(b) != "Connected" || a.Disk() != "UpToDate") {
					all = false
				}
			}
		}
	})
	return all
}

// Cut breaks or mends a host's storage links.
func (p *Pool) Cut(h *Host, broken bool) {
	p.Wall.Do(func() {
		for _, o := range p.Others(h) {
			p.Cluster.Cut(h.Node, o.Node, broken)
		}
	})
}
