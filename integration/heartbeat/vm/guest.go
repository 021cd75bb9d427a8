package vm

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// InGuest says whether this process runs inside the machine.
func InGuest() bool { return os.Getenv("XOSTOR_IN_VM") == "1" }

// order is one line from the host to the guest.
type order struct {
	ID     int      `json:"id"`
	Op     string   `json:"op"` // "run", "signal", "write", "address".
	Argv   []string `json:"argv,omitempty"`
	Signal int      `json:"signal,omitempty"` // To the program that order Target started.
	Target int      `json:"target,omitempty"`
	Path   string   `json:"path,omitempty"`
	Data   []byte   `json:"data,omitempty"`
}

// report is one line from the guest to the host: output of a program, or the end of an order.
type report struct {
	ID   int    `json:"id"`
	Out  []byte `json:"out,omitempty"`
	Done bool   `json:"done,omitempty"`
	Code int    `json:"code,omitempty"`
	Err  string `json:"err,omitempty"`
}

const (
	modulesFolder = "/modules"
	modulesList   = "/modules/list" // File names in order, one per line.
	talkTTY       = "/dev/ttyS1"
)

// BeGuest is what the machine's process 1 does. It returns only on an error, and the machine ends with it.
func BeGuest() error {
	for _, m := range []struct{ fs, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		if err := unix.Mount(m.fs, m.at, m.fs, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	_ = os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin") // Cannot fail for such a name.
	_ = os.Setenv("HOME", "/")
	_ = os.Setenv("XOSTOR_IN_VM", "1")
	talk, err := openTTY()
	if err != nil {
		return err
	}
	g := &guest{out: json.NewEncoder(talk), started: map[int]*exec.Cmd{}}
	if err := loadModules(); err != nil {
		return err
	}
	if err := linkUp("lo"); err != nil {
		return err
	}
	g.tell(report{Done: true})
	lines := bufio.NewReaderSize(talk, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("read order: %w", err)
		}
		var o order
		if err := json.Unmarshal(line, &o); err != nil {
			return fmt.Errorf("parse order: %w", err)
		}
		g.obey(o)
	}
}

func openTTY() (*os.File, error) {
	f, err := os.OpenFile(talkTTY, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open line to the host: %w", err)
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("open line to the host: %w", err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^unix.CBAUD | unix.CREAD | unix.CLOCAL | unix.CS8 | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("open line to the host: %w", err)
	}
	return f, nil
}

func loadModules() error {
	list, err := os.ReadFile(modulesList)
	if err != nil {
		return fmt.Errorf("read list of modules: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		name, options, _ := strings.Cut(strings.TrimSpace(line), " ")
		if err := loadModule(modulesFolder+"/"+name, options); err != nil {
			return err
		}
	}
	return nil
}

func loadModule(path, options string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open module: %w", err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), options, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}

func linkUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("switch %s on: %w", name, err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("switch %s on: %w", name, err)
	}
	req.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("switch %s on: %w", name, err)
	}
	return nil
}

// setAddress gives a network card an IPv4 address of a /24 network and switches it on.
func setAddress(name, address string) error {
	ip := net.ParseIP(address).To4()
	if ip == nil {
		return fmt.Errorf("set address of %s: %q is no IPv4 address", name, address)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set address of %s: %w", name, err)
	}
	defer unix.Close(fd)
	for _, step := range []struct {
		request uint
		address net.IP
	}{{unix.SIOCSIFADDR, ip}, {unix.SIOCSIFNETMASK, net.IPv4(255, 255, 255, 0).To4()}} {
		req, err := unix.NewIfreq(name)
		if err == nil {
			err = req.SetInet4Addr(step.address)
		}
		if err == nil {
			err = unix.IoctlIfreq(fd, step.request, req)
		}
		if err != nil {
			return fmt.Errorf("set address of %s: %w", name, err)
		}
	}
	return linkUp(name)
}

// guest obeys the host.
type guest struct {
	mu      sync.Mutex
	out     *json.Encoder
	started map[int]*exec.Cmd
}

func (g *guest) tell(r report) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = g.out.Encode(r) // Without the line there is nobody to tell.
}

func (g *guest) end(id int, err error) {
	r := report{ID: id, Done: true}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		if r.Code = exit.ExitCode(); r.Code < 0 {
			r.Err = exit.String()
		}
	case err != nil:
		r.Err = err.Error()
	}
	g.tell(r)
}

func (g *guest) obey(o order) {
	switch o.Op {
	case "run":
		g.run(o)
	case "signal":
		g.mu.Lock()
		cmd := g.started[o.Target]
		g.mu.Unlock()
		if cmd == nil {
			g.end(o.ID, fmt.Errorf("no program runs under order %d", o.Target))
			return
		}
		g.end(o.ID, cmd.Process.Signal(syscall.Signal(o.Signal)))
	case "write":
		g.end(o.ID, os.WriteFile(o.Path, o.Data, 0o700))
	case "address":
		g.end(o.ID, setAddress(o.Argv[0], o.Argv[1]))
	default:
		g.end(o.ID, fmt.Errorf("unknown order %q", o.Op))
	}
}

// run starts a program; its output and its end are reported as they come.
func (g *guest) run(o order) {
	cmd := exec.Command(o.Argv[0], o.Argv[1:]...)
	r, w, err := os.Pipe()
	if err != nil {
		g.end(o.ID, err)
		return
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		g.end(o.ID, err)
		return
	}
	g.mu.Lock()
	g.started[o.ID] = cmd
	g.mu.Unlock()
	go func() {
		defer r.Close()
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				g.tell(report{ID: o.ID, Out: buf[:n]})
			}
			if errors.Is(err, io.EOF) || err != nil {
				break
			}
		}
		err := cmd.Wait()
		g.mu.Lock()
		delete(g.started, o.ID)
		g.mu.Unlock()
		g.end(o.ID, err)
	}()
}
