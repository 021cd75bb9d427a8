package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/knbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
)

// group runs servers until the context ends or one of them fails.
type group struct{ tasks []func(context.Context) error }

func (g *group) add(task func(context.Context) error) { g.tasks = append(g.tasks, task) }

// run runs main until ctx ends or a task fails; the tasks end after main.
func (g *group) run(ctx context.Context, main func(context.Context) error) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	tasks, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, task := range g.tasks {
		wg.Go(func() {
			if err := task(tasks); err != nil {
				fail(err)
			}
		})
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // Without systemd there is nobody to tell.
	err := main(ctx)
	stop()
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second): // A device that hangs in the kernel must not keep the process.
	}
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return err
}

// feedWatchdog tells systemd that passes are being finished.
func feedWatchdog(ctx context.Context, d *heartbeat.Daemon) error {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("read watchdog setting: %w", err)
	}
	if every == 0 {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	last := uint64(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if passes := d.Report().Passes; passes != last {
			last = passes
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		}
	}
}

// kernelNBD is the kernel's device for local xhad.
type kernelNBD struct {
	link     knbd.Link
	log      *slog.Logger
	index    int
	fixed    bool // The administrator chose the index.
	path     string
	memo     string // File that remembers the device over a restart.
	takeover bool
	before   time.Duration // The longest request time-out that the device has had; 0 unless it is taken over.
	release  bool          // The device ends with the process: who started it attaches it anew each time, as SM does.
	released atomic.Bool   // The kernel gets no more sockets of this process.
	sockets  *heartbeat.KernelSockets
	device   knbd.Device
}

// kernelSockets is how many sockets the kernel gets: with one, old kernels end the device at the first time-out.
const kernelSockets = 2

// kernelDevice finds the device to attach; nil if none is wanted.
func (s *settings) kernelDevice(log *slog.Logger) (*kernelNBD, error) {
	if !s.front || s.kernel == "" {
		return nil, nil
	}
	link, _, err := knbd.Dial() // Open until the process ends.
	if err != nil {
		return nil, err
	}
	k := &kernelNBD{link: link, log: log, index: -1, memo: s.kernelMemo(), release: !s.owner}
	if n, ok := strings.CutPrefix(s.kernel, "/dev/nbd"); ok {
		if k.index, err = strconv.Atoi(n); err != nil {
			return nil, fmt.Errorf("%w: --kernel %q", errUsage, s.kernel)
		}
		k.fixed = true
	} else if s.kernel != "auto" {
		return nil, fmt.Errorf("%w: --kernel %q", errUsage, s.kernel)
	}
	if m, ok := remembered(k.memo); ok && (!k.fixed || m.index == k.index) {
		k.index, k.takeover, k.before = m.index, true, m.timeout
	}
	return k, nil
}

func (s *settings) kernelMemo() string { return filepath.Join(s.runDir, s.name()+".nbd") }

// connection tells one connection of /dev/nbdN from the next: the kernel makes this file anew at each CONNECT. It is not
// read, because kernels before 5.10 look into the memory of the connecting process for it, which may have ended.
func connection(index int) (inode uint64, ok bool) {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/sys/block/nbd%d/pid", index), &st); err != nil {
		return 0, false
	}
	return st.Ino, true
}

// remembrance is what a process leaves for the next one about the kernel's device.
type remembrance struct {
	index   int
	inode   uint64
	boot    string
	timeout time.Duration // The longest request time-out that the device has had, in whole seconds.
}

// parseMemo reads a memo. One of an older version does not have the time-out: then it may have been the longest that there is.
func parseMemo(text string) (m remembrance, ok bool) {
	fields := strings.Fields(text)
	if len(fields) == 3 {
		fields = append(fields, strconv.Itoa(int(heartbeat.LongestKernelTimeout/time.Second)))
	}
	if len(fields) != 4 {
		return remembrance{}, false
	}
	var seconds uint32
	if _, err := fmt.Sscan(strings.Join(fields, " "), &m.index, &m.inode, &m.boot, &seconds); err != nil || seconds == 0 {
		return remembrance{}, false
	}
	m.timeout = time.Duration(seconds) * time.Second
	return m, true
}

func (m remembrance) String() string {
	return fmt.Sprintf("%d %d %s %d\n", m.index, m.inode, m.boot, m.timeout/time.Second)
}

// remembered is the device of a process before, if its connection still is the same. Another's device must not be touched:
// it would get our sockets and our size.
func remembered(memo string) (m remembrance, ok bool) {
	b, err := os.ReadFile(memo)
	if err != nil {
		return remembrance{}, false
	}
	if m, ok = parseMemo(string(b)); !ok || m.boot != bootID() {
		return remembrance{}, false
	}
	now, ok := connection(m.index)
	return m, ok && now == m.inode
}

func (k *kernelNBD) remember() error {
	inode, ok := connection(k.index)
	if !ok {
		return fmt.Errorf("remember nbd device: /dev/nbd%d ended", k.index)
	}
	fresh := k.memo + ".new"
	// Never less than before: requests that were sent under a longer time-out keep it.
	m := remembrance{k.index, inode, bootID(), max(k.before, k.device.Timeout)}
	err := os.WriteFile(fresh, []byte(m.String()), 0o600)
	if err == nil {
		err = os.Rename(fresh, k.memo)
	}
	if err != nil {
		return fmt.Errorf("remember nbd device: %w", err)
	}
	return nil
}

// socket makes a pair: our end, and the kernel's, which is to be closed once the kernel has its own reference.
func socket() (ours net.Conn, kernel int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("make socket pair: %w", err)
	}
	file := os.NewFile(uintptr(pair[0]), "nbd")
	defer file.Close()
	if ours, err = net.FileConn(file); err != nil {
		_ = unix.Close(pair[1])
		return nil, 0, fmt.Errorf("make socket pair: %w", err)
	}
	return ours, pair[1], nil
}

// attach hands sockets to the kernel and keeps it supplied with them.
func (k *kernelNBD) attach(g *group, d *heartbeat.Daemon, c heartbeat.Config) error {
	k.sockets = d.KernelSockets()
	// Older kernels take whole seconds; both must stay above Hold.
	k.device = knbd.Device{Size: uint64(c.Size), Block: 512, Timeout: c.Timing.KernelTimeout().Round(time.Second),
		DeadTimeout: c.Timing.KernelDead().Round(time.Second), ServerFlags: uint64(d.LocalSession(nil).Info().Flags) | 1}
	dev := k.device
	server := d.Local()
	for range kernelSockets {
		conn, fd, err := socket()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		dev.Sockets = append(dev.Sockets, fd)
		g.add(func(ctx context.Context) error { return k.keep(ctx, server, conn) })
	}
	if k.takeover {
		if err := k.remember(); err != nil { // First: this process may end in between.
			return err
		}
	}
	if err := k.hand(dev); err != nil {
		return err
	}
	k.path = fmt.Sprintf("/dev/nbd%d", k.index)
	return k.remember()
}

// hand gives the kernel the first sockets, for a device of before or a new one.
func (k *kernelNBD) hand(dev knbd.Device) error {
	dev.Index = k.index
	if k.takeover {
		err := knbd.Reconfigure(k.link, dev)
		if err == nil || !errors.Is(err, unix.EINVAL) {
			return err
		}
		// Disconnected, but still open somewhere. It cannot be connected again before it is closed.
		k.log.Warn("kernel device was disconnected by someone else; attaching another", "device", fmt.Sprintf("/dev/nbd%d", k.index))
		if !k.fixed {
			dev.Index = -1
		}
		k.before = 0
	}
	var err error
	if k.index, err = knbd.Connect(k.link, dev); errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: /dev/nbd%d is in use; end that use (nbd-client -d), or choose another with --kernel", err, dev.Index)
	}
	return err
}

// keep serves a socket of the kernel. The kernel gives a socket up when a request on it takes longer than its time-out, as
// when this process was stopped or starved, and drops one that it had no place for: at a takeover it may not have noticed
// yet that the process before is gone. Each time it is offered a new one, or the device would end in errors for ever.
func (k *kernelNBD) keep(ctx context.Context, server *nbd.Server, conn net.Conn) error {
	const least, most = 50 * time.Millisecond, 2 * time.Second
	pause := least
	for {
		began := time.Now()
		_ = server.Transmit(ctx, conn, k.sockets.Session(conn)) // Why it ended does not matter.
		if time.Since(began) > most {
			pause = least
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, most)
		if k.released.Load() {
			return nil
		}
		fresh, fd, err := socket()
		if err != nil {
			return err
		}
		dev := k.device
		dev.Index, dev.Sockets = k.index, []int{fd}
		err = knbd.Reconfigure(k.link, dev)
		_ = unix.Close(fd)
		switch {
		case k.released.Load():
			fresh.Close()
			return nil
		case err != nil:
			fresh.Close()
			return fmt.Errorf("%w: %s was disconnected by someone else", err, k.path)
		}
		k.log.Warn("kernel gave a socket up; offered another", "device", k.path)
		conn = fresh
	}
}

// hangUp leaves the device to the next process.
func (k *kernelNBD) hangUp(limit time.Duration) {
	k.released.Store(true)
	k.sockets.HangUp(limit)
}

// detach ends the device if it is to end with the process.
func (k *kernelNBD) detach() error {
	if k == nil || !k.release {
		return nil
	}
	k.released.Store(true)
	if err := knbd.Disconnect(k.link, k.index); err != nil {
		return err
	}
	if err := os.Remove(k.memo); err != nil {
		return fmt.Errorf("forget nbd device: %w", err)
	}
	return nil
}
