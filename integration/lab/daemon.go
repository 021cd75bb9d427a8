package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// WriteConfig writes <dir>/<host>/agents.toml, with which an agent process believes that it runs on that host, and returns its path. More is appended as it is. Serve comes first.
func (p *Pool) WriteConfig(host, more string) (string, error) {
	hf := p.FacesOf(host)
	dir := filepath.Dir(hf.Socket)
	quoted := make([]string, 0, len(p.hosts))
	for _, addr := range p.Controllers() {
		quoted = append(quoted, fmt.Sprintf("%q", addr))
	}
	cluster := "cluster = false\n"
	if p.o.Cluster {
		cluster = fmt.Sprintf("cluster = true\nroute_listen = %q\nptoken = %q\n", net.JoinHostPort(p.Host(host).Addr, p.routePort), p.secretFile())
	}
	text := fmt.Sprintf("[host]\npool_conf = %q\ninventory = %q\nname = %q\n\n[xapi]\nsocket = %q\n\n[linstor]\ncontrollers = [%s]\n\n[bus]\nsocket = %q\nstore = %q\n%s\n[agents]\nstate_dir = %q\n%s",
		hf.PoolConf, hf.Inventory, host, hf.Socket, strings.Join(quoted, ", "), filepath.Join(dir, "bus.sock"), filepath.Join(dir, "bus"), cluster, filepath.Join(dir, "state"), more)
	path := filepath.Join(dir, "agents.toml")
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// DaemonOptions say how a Daemon runs.
type DaemonOptions struct {
	Bin     string
	Args    []string
	Restart time.Duration // start it again this long after it ended by itself or was killed; 0: never
	Log     io.Writer     // gets its stdout and stderr too; nil: only Output keeps them
	// Notify is the path of a datagram socket to make for sd_notify; StartDaemon then returns when the process has said READY=1, as systemd waits for a unit of Type=notify.
	Notify string
}

// readyWithin is how long a process may take to say READY=1.
const readyWithin = 10 * time.Second

// Daemon is a real process, kept running the way systemd keeps a unit running. It has a process group of its own, so that a Ctrl-C meant for its parent lets the parent end it in order.
type Daemon struct {
	o    DaemonOptions
	out  tail
	over chan struct{} // closed when it has ended for good

	notify *net.UnixConn // nil without Notify
	ready  chan struct{} // closed at its first READY=1

	mu       sync.Mutex
	cmd      *exec.Cmd
	stopping bool
	wake     chan struct{} // closed by Stop
	starts   int
	err      error // of the last run
	changed  chan struct{}
}

// tail keeps the last of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const tailBytes = 256 << 10

// Write implements io.Writer.
func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.buf.Len() > 2*tailBytes {
		t.buf.Next(t.buf.Len() - tailBytes)
	}
	return t.buf.Write(b)
}

// StartDaemon starts a process. The error is that of the first start, not being ready included; later ones count as runs that ended at once.
func StartDaemon(o DaemonOptions) (*Daemon, error) {
	d := &Daemon{o: o, over: make(chan struct{}), wake: make(chan struct{}), changed: make(chan struct{}), ready: make(chan struct{})}
	if o.Notify != "" {
		var err error
		if d.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: o.Notify, Net: "unixgram"}); err != nil {
			return nil, fmt.Errorf("start %s: %w", strings.Join(o.Args, " "), err)
		}
		go d.hear()
	}
	done, err := d.start()
	if err != nil {
		return nil, errors.Join(err, d.closeNotify())
	}
	go d.keep(done)
	return d, d.awaitReady()
}

// hear reads the notifications until the socket is closed.
func (d *Daemon) hear() {
	buf := make([]byte, 4096)
	said := false
	for {
		n, err := d.notify.Read(buf)
		if err != nil {
			return
		}
		if !said && slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
			said = true
			close(d.ready)
		}
	}
}

func (d *Daemon) closeNotify() error {
	if d.notify == nil {
		return nil
	}
	return d.notify.Close()
}

func (d *Daemon) awaitReady() error {
	if d.notify == nil {
		return nil
	}
	patience := time.NewTimer(readyWithin)
	defer patience.Stop()
	select {
	case <-d.ready:
		return nil
	case <-patience.C:
	case <-d.over:
	}
	return errors.Join(fmt.Errorf("start %s: not ready; it printed: %s", strings.Join(d.o.Args, " "), d.Output()), d.Stop())
}

// start runs the process once; the channel gives its end.
func (d *Daemon) start() (<-chan error, error) {
	cmd := exec.Command(d.o.Bin, d.o.Args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if d.notify != nil {
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+d.o.Notify)
	}
	cmd.Stdout = &d.out
	if d.o.Log != nil {
		cmd.Stdout = io.MultiWriter(&d.out, d.o.Log)
	}
	cmd.Stderr = cmd.Stdout
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", strings.Join(d.o.Args, " "), err)
	}
	d.cmd = cmd
	d.starts++
	close(d.changed)
	d.changed = make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	return done, nil
}

func (d *Daemon) keep(done <-chan error) {
	defer close(d.over)
	defer func() { _ = d.closeNotify() }() // A socket that only this process reads.
	for {
		err := <-done
		d.mu.Lock()
		d.err, d.cmd = err, nil
		again := !d.stopping && d.o.Restart > 0
		d.mu.Unlock()
		if !again {
			return
		}
		pause := time.NewTimer(d.o.Restart)
		select {
		case <-pause.C:
		case <-d.wake:
			pause.Stop()
			return
		}
		if done, err = d.start(); err != nil {
			d.mu.Lock()
			d.err = err
			d.mu.Unlock()
			return
		}
	}
}

// Pid is the process id, 0 while it does not run.
func (d *Daemon) Pid() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// Starts is how often it was started, and a channel that is closed at the next start.
func (d *Daemon) Starts() (int, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starts, d.changed
}

// Kill ends the running process with SIGKILL; with Restart it comes back.
func (d *Daemon) Kill() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return nil
	}
	return d.cmd.Process.Kill()
}

// Stop ends it in order: SIGTERM, SIGKILL after 5 s. It does not come back. The error is that of its exit; not having stopped within 5 s is one too.
func (d *Daemon) Stop() error {
	d.mu.Lock()
	if !d.stopping {
		d.stopping = true
		close(d.wake)
	}
	if d.cmd != nil {
		_ = d.cmd.Process.Signal(syscall.SIGTERM) // A process that has just ended needs none.
	}
	d.mu.Unlock()
	patience := time.NewTimer(5 * time.Second)
	defer patience.Stop()
	select {
	case <-d.over:
		return d.exit()
	case <-patience.C:
	}
	err := errors.Join(fmt.Errorf("%s did not end within 5 s of SIGTERM", strings.Join(d.o.Args, " ")), d.Kill())
	<-d.over
	return err
}

// Over is closed when the process has ended for good.
func (d *Daemon) Over() <-chan struct{} { return d.over }

// exit is the error of the last run, which must be over.
func (d *Daemon) exit() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Output is the last that it printed, over all its runs.
func (d *Daemon) Output() string {
	d.out.mu.Lock()
	defer d.out.mu.Unlock()
	return d.out.buf.String()
}
