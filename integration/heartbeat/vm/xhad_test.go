package vm

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestXhad lets three real xhads heartbeat over our shims and the kernel's nbd, each in a network of its own, and repeats
// what was measured of xhad over other servers. XOSTOR_XHAD is the path of xhad; writestatefile and calldaemon lie beside it.
// XOSTOR_XHAD_ROW chooses rows by a regular expression. It takes minutes: xhad's own time-outs are of T=20, the least for which the shim does not warn.
func TestXhad(t *testing.T) {
	if InGuest() {
		for i, row := range xhadRows {
			t.Run(row.name, func(t *testing.T) {
				t.Parallel()
				row.run(newXhads(t, i))
			})
		}
		return
	}
	xhad := os.Getenv("XOSTOR_XHAD")
	if xhad == "" {
		t.Skip("XOSTOR_XHAD is not set: path of a built xhad, with writestatefile and calldaemon beside it")
	}
	ip, err := exec.LookPath("ip")
	if err != nil {
		lack(t, "ip is missing: apt-get install iproute2")
	}
	k := kernel(t)
	init, shim := programs(t)
	beside := filepath.Dir(xhad)
	m := boot(t, Config{Kernel: k, Init: init, Memory: 1024, CPUs: 2, Modules: []string{"nbd nbds_max=64", fmt.Sprintf("brd rd_nr=%d rd_size=4096", len(xhadRows)), "veth", "bridge"},
		Files: map[string]string{"/var/run/empty": "", "/var/log/empty": ""},
		Programs: map[string]string{shimPath: shim, "/xha/xhad": xhad, "/xha/writestatefile": filepath.Join(beside, "writestatefile"), "/xha/calldaemon": filepath.Join(beside, "calldaemon"),
			"/sbin/ip": ip, "/opt/xensource/libexec/xapi-health-check": "/bin/true"}})
	inGuest(t, m, "-test.parallel", "3", "-test.run", "^TestXhad$/("+os.Getenv("XOSTOR_XHAD_ROW")+")")
}

// inHost is the guest's way into a host: process 1's program under this name mounts the host's folders and becomes another.
const inHost = "in-host"

// enterHost gives this process the folders that xhad has fixed names for, and becomes argv. It is in the host's network and
// in a mount namespace of its own already.
func enterHost(dir string, argv []string) error {
	for _, fixed := range []string{"/var/run", "/var/log"} {
		own := filepath.Join(dir, fixed)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(own, fixed, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	// xhad closes every descriptor up to the limit.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 256, Max: 256}); err != nil {
		return err
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

// xhads is a pool of three hosts.
type xhads struct {
	t     *testing.T
	dir   string
	disk  string
	start time.Time
	hosts []*xhadHost

	mu   sync.Mutex
	said map[string]string // Last state by host, so that changes are logged only.
}

type xhadHost struct {
	*shim
	pool  *xhads
	name  string
	index int
	net   string
	conf  string
	xhad  *exec.Cmd
	ended chan error // Gets a value when xhad has ended: it fenced itself, or was killed.
	at    time.Duration
	dead  bool
}

func hostID(i int) string { return fmt.Sprintf("00000000-0000-0000-0000-00000000000%d", i+1) }

// newXhads starts shims and xhads and waits until all see all.
func newXhads(t *testing.T, number int) *xhads {
	t.Helper()
	p := &xhads{t: t, dir: t.TempDir(), disk: fmt.Sprintf("/dev/ram%d", number), start: time.Now(), said: map[string]string{}}
	bridge := fmt.Sprintf("p%d", number)
	ip(t, "link", "add", bridge, "type", "bridge")
	ip(t, "link", "set", bridge, "up")
	var peers, hosts strings.Builder
	for i := range 3 {
		fmt.Fprintf(&peers, "n%d=127.0.%d.%d:8076,", i+1, number+1, i+1)
		fmt.Fprintf(&hosts, "<host><HostID>%s</HostID><IPaddress>10.9.0.%d</IPaddress></host>", hostID(i), i+1)
	}
	for i := range 3 {
		h := &xhadHost{pool: p, name: fmt.Sprintf("n%d", i+1), index: i, net: fmt.Sprintf("p%dn%d", number, i+1), conf: filepath.Join(p.dir, fmt.Sprintf("xhad%d.conf", i+1))}
		p.hosts = append(p.hosts, h)
		ip(t, "netns", "add", h.net)
		ip(t, "link", "add", h.net, "type", "veth", "peer", "name", "eth0", "netns", h.net)
		ip(t, "link", "set", h.net, "master", bridge, "up")
		for _, args := range [][]string{{"addr", "add", fmt.Sprintf("10.9.0.%d/24", i+1), "dev", "eth0"}, {"link", "set", "eth0", "up"}, {"link", "set", "lo", "up"}} {
			ip(t, append([]string{"-n", h.net}, args...)...)
		}
		h.write(hosts.String(), "/dev/null") // For the shim, which wants its times.
		dir := filepath.Join(p.dir, h.name)
		h.shim = &shim{t: t, dir: dir, log: &syncBuffer{}, args: []string{"run", "--host", h.name, "--resource", "statefile", "--disk", p.disk, "--peers", strings.TrimSuffix(peers.String(), ","),
			"--insecure", "--xhad-conf", h.conf, "--run-dir", dir, "--kernel", "auto"}}
		t.Cleanup(h.shim.disconnect)
		h.shim.start()
		h.write(hosts.String(), h.shim.path)
	}
	eventually(t, "statefile is initialised", func() bool {
		_, err := p.hosts[0].run("/xha/writestatefile", "setinit", p.hosts[0].conf) // Fails until somebody owns.
		return err == nil
	})
	for _, h := range p.hosts {
		h.begin()
	}
	p.log("xhads started")
	p.until("all are in the liveset of all", 3*time.Minute, func() bool {
		return !slices.ContainsFunc(p.hosts, func(h *xhadHost) bool { return len(h.liveset()) != 3 })
	})
	p.start = time.Now()
	p.log("liveset formed")
	return p
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("/sbin/ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// write writes xhad.conf as XAPI does for T=20. USER is the watchdog without a hypervisor: xhad aborts instead of resetting.
func (h *xhadHost) write(hosts, statefile string) {
	h.pool.t.Helper()
	var parameters strings.Builder
	for _, p := range []struct {
		name    string
		seconds int
	}{{"HeartbeatInterval", 3}, {"HeartbeatTimeout", 20}, {"StateFileInterval", 2}, {"StateFileTimeout", 20}, {"HeartbeatWatchdogTimeout", 20}, {"StateFileWatchdogTimeout", 35},
		{"BootJoinTimeout", 80}, {"EnableJoinTimeout", 80}, {"XapiHealthCheckInterval", 600}, {"XapiHealthCheckTimeout", 120}, {"XapiRestartAttempts", 1}, {"XapiRestartTimeout", 300}} {
		fmt.Fprintf(&parameters, "<%s>%d</%s>", p.name, p.seconds, p.name)
	}
	text := fmt.Sprintf(`<?xml version="1.0" encoding="utf-8"?><xhad-config version="1.0"><common-config><GenerationUUID>00000000-0000-0000-0000-0000000000ff</GenerationUUID><UDPport>694</UDPport>%s<parameters>%s</parameters></common-config><local-config><localhost><HostID>%s</HostID><HeartbeatInterface>eth0</HeartbeatInterface><HeartbeatPhysicalInterface>eth0</HeartbeatPhysicalInterface><StateFile>%s</StateFile><WatchdogMode>USER</WatchdogMode></localhost></local-config></xhad-config>`,
		hosts, parameters.String(), hostID(h.index), statefile)
	if err := os.WriteFile(h.conf, []byte(text), 0o600); err != nil {
		h.pool.t.Fatal(err)
	}
}

// command is a program inside the host.
func (h *xhadHost) command(argv ...string) *exec.Cmd {
	return exec.Command("/sbin/ip", append([]string{"netns", "exec", h.net, "/init", inHost, filepath.Join(h.pool.dir, h.name)}, argv...)...)
}

// inNet runs a program in the host's network and with this program's files: cheap enough to ask often.
func (h *xhadHost) inNet(argv ...string) ([]byte, error) {
	type answer struct {
		out []byte
		err error
	}
	c := make(chan answer)
	go func() {
		runtime.LockOSThread() // And never unlocked: the thread ends with the goroutine, in the network that it is in.
		f, err := os.Open("/run/netns/" + h.net)
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
		}
		var out []byte
		if err == nil {
			out, err = exec.Command(argv[0], argv[1:]...).Output()
		}
		c <- answer{out, err}
	}()
	a := <-c
	return a.out, a.err
}

func (h *xhadHost) run(argv ...string) (string, error) {
	out, err := h.command(argv...).CombinedOutput()
	return string(out), err
}

// begin starts xhad.
func (h *xhadHost) begin() {
	h.pool.t.Helper()
	h.xhad, h.ended = h.command("/xha/xhad", h.conf), make(chan error, 1)
	if err := h.xhad.Start(); err != nil {
		h.pool.t.Fatal(err)
	}
	cmd, ended := h.xhad, h.ended
	h.pool.t.Cleanup(func() { _ = cmd.Process.Kill() })
	go func() {
		ended <- cmd.Wait()
	}()
}

// fenced says whether xhad has ended.
func (h *xhadHost) fenced() bool {
	if h.dead {
		return true
	}
	select {
	case err := <-h.ended:
		h.dead, h.at = true, time.Since(h.pool.start)
		h.pool.log("%s: xhad ended: %v", h.name, err)
	default:
	}
	return h.dead
}

// livesetInfo is what XAPI reads.
type livesetInfo struct {
	Status string `xml:"status"`
	Hosts  []struct {
		ID        string `xml:"HostID"`
		Live      string `xml:"liveness"`
		Statefile string `xml:"statefile_access"`
	} `xml:"host"`
	Warning struct {
		Lost        string `xml:"statefile_lost"`
		Approaching string `xml:"statefile_approaching_timeout"`
	} `xml:"warning_on_local_host"`
	Raw struct {
		LatencyMax int `xml:"statefile_latency_max"`
	} `xml:"raw_status_on_local_host"`
}

// liveset asks the host's xhad who lives, and logs what changed since it was asked last.
func (h *xhadHost) liveset() (live []string) {
	if h.fenced() {
		return nil
	}
	out, err := h.inNet("/xha/calldaemon", "query_liveset")
	var info livesetInfo
	if err == nil {
		err = xml.Unmarshal(out, &info)
	}
	if err != nil { // Not yet up, or just gone.
		h.say("no answer: %v", err)
		return nil
	}
	sf := ""
	for i, host := range info.Hosts {
		if host.Live == "TRUE" {
			live = append(live, fmt.Sprintf("n%d", i+1))
		}
		sf += host.Statefile[:1]
	}
	h.say("%s, live %s, statefile access %s, lost %s, approaching %s", info.Status, strings.Join(live, " "), sf, info.Warning.Lost, info.Warning.Approaching)
	return live
}

// say logs a state that is not the one of before.
func (h *xhadHost) say(format string, args ...any) {
	h.pool.t.Helper()
	now := fmt.Sprintf(format, args...)
	h.pool.mu.Lock()
	changed := h.pool.said[h.name] != now
	h.pool.said[h.name] = now
	h.pool.mu.Unlock()
	if changed {
		h.pool.log("%s: %s", h.name, now)
	}
}

func (p *xhads) log(format string, args ...any) {
	p.t.Helper()
	_, row, _ := strings.Cut(p.t.Name(), "/")
	p.t.Logf("%s %6.1f s  "+format, append([]any{row, time.Since(p.start).Seconds()}, args...)...)
}

// until polls all hosts once a second.
func (p *xhads) until(what string, limit time.Duration, cond func() bool) bool {
	p.t.Helper()
	for end := time.Now().Add(limit); ; {
		for _, h := range p.hosts {
			h.liveset()
		}
		if cond() {
			return true
		}
		if time.Now().After(end) {
			p.t.Errorf("%s: not after %v", what, limit)
			for _, h := range p.hosts {
				log, _ := os.ReadFile(filepath.Join(p.dir, h.name, "var/log/xha.log"))
				p.t.Logf("%s: %s\n%s", h.name, h.shim.log, tail(string(log), 60))
			}
			return false
		}
		<-time.After(time.Second)
	}
}

// watch polls for a while.
func (p *xhads) watch(d time.Duration) {
	end := time.Now().Add(d)
	p.until("time passes", d+time.Minute, func() bool { return !time.Now().Before(end) })
}

// whole checks that nobody was fenced and everybody sees everybody.
func (p *xhads) whole() {
	p.t.Helper()
	p.until("all are in the liveset of all", time.Minute, func() bool {
		return !slices.ContainsFunc(p.hosts, func(h *xhadHost) bool { return len(h.liveset()) != 3 })
	})
}

// owner is the host whose shim owns the device, and is not the one given.
func (p *xhads) owner(but *xhadHost) (owner *xhadHost) {
	p.t.Helper()
	eventually(p.t, "somebody owns", func() bool {
		for _, h := range p.hosts {
			if h != but && h.shim.owns() {
				owner = h
				return true
			}
		}
		return false
	})
	return owner
}

// without takes the device away from everybody for as long as it takes, beginning with the death of the owner's shim, as if
// DRBD had no quorum.
func (p *xhads) without(owner *xhadHost, during func()) {
	p.t.Helper()
	f, err := os.OpenFile(p.disk, os.O_RDWR, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	locked := make(chan error, 1)
	go func() { locked <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	<-time.After(200 * time.Millisecond) // So that the lock is waited for when the owner lets it go.
	owner.shim.kill()
	if err := await(p.t, "lock", locked); err != nil {
		p.t.Fatal(err)
	}
	p.log("nobody owns the statefile")
	during()
	p.log("the statefile may be owned again")
}

// die ends a host: shim and xhad.
func (h *xhadHost) die() {
	h.pool.t.Helper()
	if err := h.xhad.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		h.pool.t.Fatal(err)
	}
	if h.shim.cmd.ProcessState == nil {
		_ = h.shim.cmd.Process.Kill()
	}
	eventually(h.pool.t, "xhad ends", h.fenced)
	h.pool.log("%s is dead", h.name)
}

// outage takes the statefile from all for d, all hosts alive. The owner's shim is started again at once, by systemd as it were.
func outage(d time.Duration) func(*xhads) {
	return func(p *xhads) {
		owner := p.owner(nil)
		started, watched := make(chan error, 1), make(chan struct{})
		p.without(owner, func() {
			go func() { started <- owner.shim.try() }()
			// Asking three xhads takes seconds in an emulated machine: it must not make the outage longer.
			go func() { defer close(watched); p.watch(d + 20*time.Second) }()
			<-time.After(d)
		})
		await(p.t, "end of the watch", watched)
		if err := await(p.t, "start of the shim", started); err != nil {
			p.t.Error(err)
		}
		if d > 14*time.Second && d < 20*time.Second { // Between F and T2 it is a matter of phases whether a host falls out.
			return
		}
		p.whole()
	}
}

// death kills the owner's host and takes the statefile from the survivors for d (0: no longer than the failover takes).
func death(d time.Duration, survive bool) func(*xhads) {
	return func(p *xhads) {
		owner := p.owner(nil)
		if d == 0 {
			owner.shim.kill()
			owner.die()
		} else {
			p.without(owner, func() {
				owner.die()
				p.watch(d)
			})
		}
		survivors := slices.DeleteFunc(slices.Clone(p.hosts), func(h *xhadHost) bool { return h == owner })
		if !survive {
			p.until("all survivors have fenced themselves", 2*time.Minute, func() bool { return survivors[0].fenced() && survivors[1].fenced() })
			return
		}
		p.until("the survivors drop the dead host", 3*time.Minute, func() bool {
			return len(survivors[0].liveset()) == 2 && len(survivors[1].liveset()) == 2
		})
		p.watch(30 * time.Second)
		for _, h := range survivors {
			if len(h.liveset()) != 2 {
				p.t.Errorf("%s did not stay", h.name)
			}
		}
	}
}

// xhadRows are the experiments of the table that was measured with other servers.
var xhadRows = []struct {
	name string
	run  func(*xhads)
}{
	{"owners process dies", func(p *xhads) {
		owner := p.owner(nil)
		owner.shim.kill()
		p.log("the owner's shim is dead")
		second := p.owner(owner)
		p.log("%s owns", second.name)
		owner.shim.start()
		p.watch(20 * time.Second)
		p.whole()
	}},
	{"outage 10 s", outage(10 * time.Second)},
	{"outage 12 s", outage(12 * time.Second)},
	{"outage 16 s", outage(16 * time.Second)},
	{"outage 45 s", outage(45 * time.Second)},
	{"outage 60 s", outage(60 * time.Second)},
	{"owners host dies", death(0, true)},
	{"owners host dies and outage 8 s", death(8*time.Second, true)},
	{"owners host dies and outage 30 s", death(30*time.Second, false)},
	{"one host hangs", func(p *xhads) {
		owner := p.owner(nil)
		i := slices.IndexFunc(p.hosts, func(h *xhadHost) bool { return h != owner })
		victim := p.hosts[i]
		victim.shim.signal(syscall.SIGSTOP)
		p.log("%s: shim is stopped", victim.name)
		p.until("the victim is fenced and dropped", 3*time.Minute, func() bool {
			return victim.fenced() && !slices.ContainsFunc(p.hosts, func(h *xhadHost) bool { return h != victim && len(h.liveset()) != 2 })
		})
	}},
	{"one host fails", func(p *xhads) {
		owner := p.owner(nil)
		i := slices.IndexFunc(p.hosts, func(h *xhadHost) bool { return h != owner })
		victim := p.hosts[i]
		victim.shim.kill()
		p.log("%s: shim is dead and stays so", victim.name)
		p.until("the victim is fenced and dropped", 3*time.Minute, func() bool {
			return victim.fenced() && !slices.ContainsFunc(p.hosts, func(h *xhadHost) bool { return h != victim && len(h.liveset()) != 2 })
		})
	}},
	{"handover", func(p *xhads) {
		owner := p.owner(nil)
		if out, err := exec.Command(shimPath, "handover", "--run-dir", owner.shim.dir).CombinedOutput(); err != nil {
			p.t.Errorf("%v: %s", err, out)
		}
		p.watch(20 * time.Second)
		p.whole()
	}},
}
