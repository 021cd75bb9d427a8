// Package realpool makes a pool of xostor-heartbeat processes on one machine: for tests, and for the demo.
//
// Real are the processes, their mutual TLS, NBD, control sockets and timers. Stand-ins are the device, a file that one
// process may lock, where DRBD lets one host promote; drbdsetup, a script that shows and cuts links and takes the file
// from an owner that a majority has cut off; and the storage network, a relay per host that can be cut. Local clients use
// a unix socket in place of the kernel's /dev/nbdN. Nothing needs root.
package realpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// Resource is the name of the volume, as SM gives it.
const Resource = "xcp-persistent-ha-statefile"

// Secret is the pool's.
const Secret = "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"

// readyTime is how long a process gets to say that it is ready, on a busy machine.
const readyTime = 60 * time.Second

// Options say how a pool is made. Zero fields get defaults.
type Options struct {
	Program string        // xostor-heartbeat.
	Hosts   int           // 3.
	Timeout time.Duration // T of an xhad.conf; 0: there is none.
	DRBD    bool          // With the stand-in of drbdsetup; without it, nobody is evicted.
	Storage bool          // Hosts are reached over a storage network that can be cut, or else over a management network.
	Size    int64         // Of the device, in bytes: 4 MiB.
	Args    []string      // More options of `run`.
}

// Pool is the hosts.
type Pool struct {
	Dir   string
	Disk  string
	Peers string // As --peers has it.
	Hosts []*Host
	o     Options
	links []*link
}

// Host is one host.
type Host struct {
	Name   string
	Socket string // For local NBD clients.
	RunDir string
	Addr   string // Where it listens for other hosts, host:port.
	cmd    *exec.Cmd
	ended  chan struct{}
	log    buffer
}

// buffer is safe for concurrent use.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Open makes the pool's files; no host runs. Close ends everything.
func Open(o Options) (*Pool, error) {
	if o.Hosts == 0 {
		o.Hosts = 3
	}
	if o.Size == 0 {
		o.Size = 4 << 20
	}
	dir, err := os.MkdirTemp("", "hb") // Short: unix sockets' names are.
	if err != nil {
		return nil, err
	}
	p := &Pool{Dir: dir, Disk: filepath.Join(dir, "disk"), o: o}
	if err := p.prepare(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Pool) prepare() error {
	image := make([]byte, p.o.Size)
	if len(image) >= statefile.Size {
		statefile.Global{Generation: statefile.Nobody, State: statefile.StateActive, Master: statefile.Nobody, Hosts: uint32(p.o.Hosts)}.Encode(image)
	}
	files := map[string][]byte{p.Disk: image, p.path("ptoken"): []byte(Secret)}
	if p.o.Timeout > 0 {
		files[p.path("xhad.conf")] = xhadConf(p.o.Timeout, p.o.Hosts)
	}
	var peers, res []string
	for i := range p.o.Hosts {
		addr, err := freeAddr()
		if err != nil {
			return err
		}
		h := &Host{Name: fmt.Sprintf("n%d", i+1), Addr: addr, Socket: p.path(fmt.Sprintf("n%d.nbd", i+1)), RunDir: p.path(fmt.Sprintf("r%d", i+1))}
		p.Hosts = append(p.Hosts, h)
		if p.o.Storage {
			l, err := newLink(addr)
			if err != nil {
				return err
			}
			p.links = append(p.links, l)
			peers = append(peers, h.Name+"="+l.addr())
		}
		peers = append(peers, h.Name+"="+addr)
		res = append(res, fmt.Sprintf("  host %q address ipv4 127.0.0.1:%d;\n", h.Name, 7000+i))
	}
	p.Peers = strings.Join(peers, ",")
	if p.o.DRBD {
		files[p.path("r.res")] = []byte("resource r {\n" + strings.Join(res, "") + "}\n")
		files[p.path("policy.json")] = fmt.Appendf(nil, `[{"resource":%q,"options":{"quorum":"majority","on-no-quorum":"io-error"}}]`, Resource)
		files[p.path("drbdsetup")] = []byte(drbdsetup)
	}
	for name, data := range files {
		if err := os.WriteFile(name, data, 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pool) path(name string) string { return filepath.Join(p.Dir, name) }

// freeAddr finds an address that nobody uses: one of loopback's own for each host. A port of 127.0.0.1 could become the
// source of somebody's connection before it is listened on.
func freeAddr() (string, error) {
	for range 100 {
		n := rand.Uint32()
		addr := fmt.Sprintf("127.%d.%d.%d:8076", 64+n%128, n>>8%256, 1+n>>16%250)
		if l, err := net.Listen("tcp", addr); err == nil {
			return addr, l.Close()
		}
	}
	return "", errors.New("no free address on loopback")
}

// Command is what starts a host's process, with DRBD's stand-in in its way. The first argument of run is "run".
func (p *Pool) Command(h *Host, args ...string) *exec.Cmd {
	cmd := exec.Command(p.o.Program, args...)
	cmd.Env = append(os.Environ(), "PATH="+p.Dir+":"+os.Getenv("PATH"), "POOL="+p.Dir, "SELF="+h.Name, fmt.Sprintf("HOSTS=%d", p.o.Hosts))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Args are the arguments of a host's process.
func (p *Pool) Args(h *Host) []string {
	args := []string{"run", "--host", h.Name, "--resource", Resource, "--disk", p.Disk, "--peers", p.Peers, "--listen", h.Addr, "--secret", p.path("ptoken"),
		"--xhad-conf", p.path("xhad.conf"), "--run-dir", h.RunDir, "--socket-path", h.Socket, "--kernel", ""}
	if p.o.DRBD {
		args = append(args, "--res", p.path("r.res"))
	}
	return append(args, p.o.Args...)
}

// Start runs a host's process and returns when it is ready.
func (p *Pool) Start(h *Host) error {
	cmd := p.Command(h, p.Args(h)...)
	return p.launch(h, cmd, "Server ready!")
}

// launch runs a command as a host's process until it says ready at the end of a line, as SM waits for it.
func (p *Pool) launch(h *Host, cmd *exec.Cmd, ready string) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = &h.log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", h.Name, err)
	}
	ended := make(chan struct{})
	h.cmd, h.ended = cmd, ended
	if err := os.WriteFile(p.path("pid-"+h.Name), fmt.Appendln(nil, cmd.Process.Pid), 0o600); err != nil {
		return err
	}
	said := make(chan error, 1)
	go func() {
		var text []byte
		part := make([]byte, 256)
		for {
			n, err := out.Read(part)
			text = append(text, part[:n]...)
			if bytes.Contains(text, []byte(ready+"\n")) {
				said <- nil
				break
			}
			if err != nil {
				said <- fmt.Errorf("%s said %q, not %q", h.Name, text, ready)
				break
			}
		}
		for { // A full pipe would stop it.
			if _, err := out.Read(part); err != nil {
				break
			}
		}
		_ = cmd.Wait() // How it ended is asked of ProcessState.
		close(ended)
	}()
	select {
	case err = <-said:
	case <-time.After(readyTime):
		err = fmt.Errorf("%s is not ready after %v", h.Name, readyTime)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		<-ended
		return fmt.Errorf("%w\n%s", err, &h.log)
	}
	return nil
}

// StartAll runs every host.
func (p *Pool) StartAll() error {
	for _, h := range p.Hosts {
		if err := p.Start(h); err != nil {
			return err
		}
	}
	return nil
}

// PID is the process's.
func (h *Host) PID() int { return h.cmd.Process.Pid }

// Log is what the process wrote to its standard error.
func (h *Host) Log() string { return h.log.String() }

// Kill ends a host's process as a crash does.
func (h *Host) Kill() {
	_ = h.cmd.Process.Kill() // It may have ended.
	<-h.ended
}

// Stop ends a host's process in order and returns how it ended.
func (h *Host) Stop() error {
	if err := h.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	<-h.ended
	if s := h.cmd.ProcessState; !s.Success() {
		return fmt.Errorf("%s: %v", h.Name, s)
	}
	return nil
}

// Freeze stops a host's process without its knowing; Thaw lets it go on.
func (h *Host) Freeze() error { return h.cmd.Process.Signal(syscall.SIGSTOP) }

// Thaw ends Freeze.
func (h *Host) Thaw() error { return h.cmd.Process.Signal(syscall.SIGCONT) }

// Close ends all processes and removes the pool's files.
func (p *Pool) Close() error {
	for _, h := range p.Hosts {
		if h.cmd != nil {
			h.Kill()
		}
	}
	for _, l := range p.links {
		l.close()
	}
	return os.RemoveAll(p.Dir)
}

// Client connects to a host's front.
func (p *Pool) Client(ctx context.Context, h *Host) (*nbd.Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", h.Socket)
	if err != nil {
		return nil, err
	}
	return nbd.Connect(ctx, conn, nbd.Options{})
}

// Report asks a host's process.
func (p *Pool) Report(h *Host) (heartbeat.Report, error) {
	r, err := heartbeat.Ask(h.RunDir, "status")
	if err != nil {
		return heartbeat.Report{}, err
	}
	return r[0], nil
}

// Owner waits until one of the hosts, not counting one, owns the device.
func (p *Pool) Owner(ctx context.Context, but *Host) (*Host, error) {
	var owner *Host
	err := Until(ctx, func() error {
		for _, h := range p.Hosts {
			if h == but {
				continue
			}
			if r, err := p.Report(h); err == nil && r.Owns {
				owner = h
				return nil
			}
		}
		return errors.New("nobody owns the device")
	})
	return owner, err
}

// Until calls ready until it returns nil, and returns its last error when ctx ends.
func Until(ctx context.Context, ready func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// SetPolicy changes what DRBD's stand-in says of the resource.
func (p *Pool) SetPolicy(quorum, onNoQuorum string) error {
	text := fmt.Sprintf(`[{"resource":%q,"options":{"quorum":%q,"on-no-quorum":%q}}]`, Resource, quorum, onNoQuorum)
	return os.WriteFile(p.path("policy.json"), []byte(text), 0o600)
}

// SetQuorum changes what DRBD's stand-in says of a host's quorum.
func (p *Pool) SetQuorum(h *Host, yes bool) error {
	lost := p.path("noquorum-" + h.Name)
	if yes {
		return os.Remove(lost)
	}
	return os.WriteFile(lost, nil, 0o600)
}

// CutStorage cuts the storage network of all hosts; MendStorage ends that.
func (p *Pool) CutStorage() {
	for _, l := range p.links {
		l.cut()
	}
}

// MendStorage ends CutStorage.
func (p *Pool) MendStorage() {
	for _, l := range p.links {
		l.mend()
	}
}

// xhadConf is what XAPI writes.
func xhadConf(timeout time.Duration, hosts int) []byte {
	x := statefile.Derive(timeout)
	var b bytes.Buffer
	fmt.Fprint(&b, `<xhad-config version="1.0"><common-config><GenerationUUID>00000000-0000-0000-0000-000000000001</GenerationUUID><UDPport>694</UDPport>`)
	for i := range hosts {
		fmt.Fprintf(&b, "<host><HostID>%s</HostID><IPaddress>127.0.0.1</IPaddress></host>", HostID(i))
	}
	s := func(d time.Duration) int { return int(d / time.Second) }
	fmt.Fprintf(&b, `<parameters><HeartbeatInterval>%d</HeartbeatInterval><HeartbeatTimeout>%d</HeartbeatTimeout><StateFileInterval>%d</StateFileInterval><StateFileTimeout>%d</StateFileTimeout>`+
		`<HeartbeatWatchdogTimeout>%d</HeartbeatWatchdogTimeout><StateFileWatchdogTimeout>%d</StateFileWatchdogTimeout></parameters></common-config>`,
		s(x.HeartbeatInterval), s(x.HeartbeatTimeout), s(x.StateFileInterval), s(x.StateFileTimeout), s(x.HeartbeatWatchdog), s(x.StateFileWatchdog))
	fmt.Fprintf(&b, "<local-config><localhost><HostID>%s</HostID></localhost></local-config></xhad-config>", HostID(0))
	return b.Bytes()
}

// HostID is a host's uuid in xhad.conf.
func HostID(i int) string { return fmt.Sprintf("%08d-0000-4000-8000-000000000000", i+1) }
