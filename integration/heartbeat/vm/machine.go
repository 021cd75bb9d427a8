// Package vm runs programs inside emulated machines with Debian's kernel, for what needs a kernel of its own: the kernel's
// nbd client and DRBD. Emulation and not KVM: it works wherever the tests run, and is fast enough.
//
// A machine has no disk image and no shell. Its process 1 is the caller's own program (BeGuest), which obeys the host over
// a serial line; the rest of its root are the files that the test names.
package vm

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Emulator is the program that machines run in.
const Emulator = "qemu-system-x86_64"

// Config describes a machine.
type Config struct {
	Kernel *Kernel
	// Init is a static program that calls BeGuest when it is process 1.
	Init string
	// Modules to load before the machine is ready, with options after a blank. What they depend on is loaded, too.
	Modules []string
	// Programs of this machine to take along with their libraries, by their name in the guest.
	Programs map[string]string
	// Files of the guest by name.
	Files map[string]string
	// Memory in MiB: at least twice the size of programs and files.
	Memory int
	// CPUs of the machine, 1 if 0.
	CPUs int
	// Disks are images on this machine, /dev/vda and following (module virtio_blk).
	Disks []string
	// Netdev is qemu's -netdev without its id, for eth0 (module virtio_net); "" for none.
	Netdev string
	// MAC of eth0; must differ between machines of one network.
	MAC string
	// Name is the machine's host name.
	Name string
}

// Machine is a running machine. Its methods may be called from many goroutines.
type Machine struct {
	cmd     *exec.Cmd
	dir     string
	conn    net.Conn
	ended   chan struct{} // Closed when the emulator has ended.
	endedBy error         // Valid after ended.

	mu    sync.Mutex
	last  int
	calls map[int]*Process
	ready chan struct{}
}

// Process is a program running in a machine.
type Process struct {
	m    *Machine
	id   int
	done chan struct{}

	mu   sync.Mutex
	more *sync.Cond // Signalled at output and at the end.
	out  bytes.Buffer
	over bool
	code int
	err  error
}

// Boot starts a machine and waits until it obeys or ctx ends.
func Boot(ctx context.Context, c Config) (*Machine, error) {
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		return nil, fmt.Errorf("make folder of machine: %w", err)
	}
	m := &Machine{dir: dir, ended: make(chan struct{}), calls: map[int]*Process{}, ready: make(chan struct{})}
	if err := m.start(ctx, c); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	select {
	case <-m.ready:
		return m, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-m.ended:
		err = m.endedBy
	}
	err = fmt.Errorf("boot machine: %w; its console says:\n%s", err, m.Console())
	m.Kill()
	return nil, err
}

// build makes the machine's first root.
func (c Config) build() ([]byte, error) {
	a, have := newInitramfs(), map[string]bool{}
	if err := a.program("/init", c.Init, have); err != nil {
		return nil, err
	}
	for name, from := range c.Programs {
		if err := a.program(name, from, have); err != nil {
			return nil, err
		}
	}
	for name, text := range c.Files {
		a.file(name, 0o644, []byte(text))
	}
	var list strings.Builder
	loaded := map[string]bool{}
	for _, entry := range c.Modules {
		name, options, _ := strings.Cut(entry, " ")
		files, err := c.Kernel.Modules(name)
		if err != nil {
			return nil, err
		}
		for i, file := range files {
			if loaded[file] {
				continue
			}
			loaded[file] = true
			base := filepath.Base(file)
			if err := a.copy(modulesFolder+"/"+base, file); err != nil {
				return nil, err
			}
			list.WriteString(base)
			if i == len(files)-1 && options != "" {
				list.WriteString(" " + options)
			}
			list.WriteString("\n")
		}
	}
	a.file(modulesList, 0o644, []byte(list.String()))
	return a.bytes(), nil
}

func (m *Machine) start(ctx context.Context, c Config) error {
	root, err := c.build()
	if err != nil {
		return fmt.Errorf("build root of machine: %w", err)
	}
	initrd, line := filepath.Join(m.dir, "root"), filepath.Join(m.dir, "line")
	if err := os.WriteFile(initrd, root, 0o600); err != nil {
		return fmt.Errorf("build root of machine: %w", err)
	}
	l, err := net.Listen("unix", line)
	if err != nil {
		return fmt.Errorf("listen for machine: %w", err)
	}
	defer l.Close()
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg,thread=multi", "-M", "pc", "-cpu", "qemu64,+rdrand",
		"-m", strconv.Itoa(c.Memory), "-smp", strconv.Itoa(max(c.CPUs, 1)), "-kernel", c.Kernel.Image, "-initrd", initrd,
		// The emulated processor's time stamp counter runs wild when the host is busy. panic=-1 with -no-reboot ends the emulator.
		"-append", "console=ttyS0 loglevel=5 panic=-1 nokaslr tsc=unstable clocksource=acpi_pm mitigations=off audit=0 random.trust_cpu=on rdinit=/init hostname=" + cmp.Or(c.Name, "vm"),
		"-serial", "file:" + m.console(), "-chardev", "socket,id=line,path=" + line, "-serial", "chardev:line"}
	for i, disk := range c.Disks {
		args = append(args, "-drive", fmt.Sprintf("file=%s,if=none,format=raw,id=d%d,cache=unsafe,discard=unmap", disk, i), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	if c.Netdev != "" {
		args = append(args, "-netdev", c.Netdev+",id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=,mac="+c.MAC)
	}
	m.cmd = exec.Command(Emulator, args...)
	var complaint bytes.Buffer
	m.cmd.Stderr = &complaint
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return fmt.Errorf("start emulator: %w", err)
	}
	go func() {
		err := m.cmd.Wait()
		m.endedBy = fmt.Errorf("emulator ended: %w %s", errors.Join(err, errMachineEnded), bytes.TrimSpace(complaint.Bytes()))
		l.Close()
		close(m.ended)
	}()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	if m.conn, err = l.Accept(); err != nil {
		m.Kill()
		return fmt.Errorf("wait for machine: %w %s", errors.Join(err, ctx.Err()), bytes.TrimSpace(complaint.Bytes()))
	}
	go m.listen()
	return nil
}

var errMachineEnded = errors.New("machine ended")

func (m *Machine) console() string { return filepath.Join(m.dir, "console") }

// Console is what the kernel has said.
func (m *Machine) Console() string {
	b, _ := os.ReadFile(m.console()) // Nothing said is a good answer.
	return string(b)
}

// listen takes the guest's reports until the line breaks.
func (m *Machine) listen() {
	lines := bufio.NewReaderSize(m.conn, 1<<16)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			break
		}
		var r report
		if json.Unmarshal(line, &r) != nil {
			continue // The line's first bytes may be noise of the firmware.
		}
		if r.ID == 0 {
			close(m.ready)
			continue
		}
		m.mu.Lock()
		p := m.calls[r.ID]
		if r.Done {
			delete(m.calls, r.ID)
		}
		m.mu.Unlock()
		if p != nil {
			p.take(r)
		}
	}
	<-m.ended
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, p := range m.calls {
		delete(m.calls, id)
		p.take(report{Done: true, Err: m.endedBy.Error()})
	}
}

func (p *Process) take(r report) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out.Write(r.Out)
	if r.Done {
		p.over, p.code = true, r.Code
		if r.Err != "" {
			p.err = errors.New(r.Err)
		}
		close(p.done)
	}
	p.more.Broadcast()
}

// Lines calls each with each line of output as it comes, and returns when the program has ended.
func (p *Process) Lines(each func(string)) {
	read := 0
	for {
		p.mu.Lock()
		for p.out.Len() == read && !p.over {
			p.more.Wait()
		}
		fresh, over := string(p.out.Bytes()[read:]), p.over
		p.mu.Unlock()
		end := strings.LastIndexByte(fresh, '\n') + 1
		for line := range strings.Lines(fresh[:end]) {
			each(strings.TrimRight(line, "\r\n"))
		}
		if read += end; over && end == 0 {
			return
		}
		if end == 0 { // Half a line; more comes, or the end.
			p.mu.Lock()
			for p.out.Len() == read+len(fresh) && !p.over {
				p.more.Wait()
			}
			p.mu.Unlock()
		}
	}
}

func (m *Machine) send(o order) (*Process, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.ended:
		return nil, m.endedBy
	default:
	}
	m.last++
	o.ID = m.last
	line, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("encode order: %w", err)
	}
	p := &Process{m: m, id: o.ID, done: make(chan struct{})}
	p.more = sync.NewCond(&p.mu)
	m.calls[o.ID] = p
	if _, err := m.conn.Write(append(line, '\n')); err != nil {
		delete(m.calls, o.ID)
		return nil, fmt.Errorf("send order: %w", err)
	}
	return p, nil
}

// Start starts a program.
func (m *Machine) Start(argv ...string) (*Process, error) {
	return m.send(order{Op: "run", Argv: argv})
}

// Run runs a program to its end and returns its output. A code other than 0 is an error.
func (m *Machine) Run(ctx context.Context, argv ...string) (string, error) {
	p, err := m.Start(argv...)
	if err != nil {
		return "", err
	}
	code, err := p.Wait(ctx)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	if err != nil {
		err = fmt.Errorf("run %s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(p.Output()))
	}
	return p.Output(), err
}

// Write writes a file in the guest.
func (m *Machine) Write(ctx context.Context, path string, data []byte) error {
	return m.simple(ctx, order{Op: "write", Path: path, Data: data})
}

// Address gives a network card an IPv4 address of a /24 network.
func (m *Machine) Address(ctx context.Context, card, address string) error {
	return m.simple(ctx, order{Op: "address", Argv: []string{card, address}})
}

func (m *Machine) simple(ctx context.Context, o order) error {
	p, err := m.send(o)
	if err != nil {
		return err
	}
	_, err = p.Wait(ctx)
	return err
}

// Wait returns the program's exit code when it has ended.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return -1, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.code, p.err
}

// Output is what the program has written so far.
func (p *Process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// Signal sends the program a signal.
func (p *Process) Signal(ctx context.Context, s syscall.Signal) error {
	return p.m.simple(ctx, order{Op: "signal", Target: p.id, Signal: int(s)})
}

// Freeze stops the emulator, as a host that stalls; Thaw lets it go on.
func (m *Machine) Freeze() error { return m.cmd.Process.Signal(syscall.SIGSTOP) }

// Thaw undoes Freeze.
func (m *Machine) Thaw() error { return m.cmd.Process.Signal(syscall.SIGCONT) }

// Kill ends the machine as a loss of power does, and removes its folder.
func (m *Machine) Kill() {
	_ = m.cmd.Process.Kill() // It may have ended.
	select {
	case <-m.ended:
	case <-time.After(30 * time.Second): // An emulator in the hands of a dying kernel; nothing depends on it.
	}
	if m.conn != nil {
		m.conn.Close()
	}
	os.RemoveAll(m.dir)
}
