package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/knbd"
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
	index    int
	path     string
	memo     string // File that remembers the index over a restart.
	takeover bool
}

// kernelDevice finds the device to attach; nil if none is wanted.
func (s *settings) kernelDevice(heartbeat.Config) (*kernelNBD, error) {
	if !s.front || s.kernel == "" {
		return nil, nil
	}
	link, _, err := knbd.Dial() // Open until the process ends.
	if err != nil {
		return nil, err
	}
	k := &kernelNBD{link: link, index: -1, memo: filepath.Join(s.runDir, s.name()+".nbd")}
	if n, ok := strings.CutPrefix(s.kernel, "/dev/nbd"); ok {
		if k.index, err = strconv.Atoi(n); err != nil {
			return nil, fmt.Errorf("%w: --kernel %q", errUsage, s.kernel)
		}
	}
	if b, err := os.ReadFile(k.memo); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && connected(n) {
			k.index, k.takeover = n, true
		}
	}
	return k, nil
}

// connected says whether the kernel has /dev/nbdN configured.
func connected(n int) bool {
	_, err := os.Stat(fmt.Sprintf("/sys/block/nbd%d/pid", n))
	return err == nil
}

// attach hands two sockets to the kernel: with one, old kernels end the device at the first time-out.
func (k *kernelNBD) attach(g *group, d *heartbeat.Daemon, c heartbeat.Config) error {
	server := d.Local()
	dev := knbd.Device{Index: k.index, Size: uint64(c.Size), Block: 512, Timeout: c.Timing.KernelTimeout().Round(time.Second),
		DeadTimeout: c.Timing.KernelDead().Round(time.Second), ServerFlags: uint64(d.LocalSession(nil).Info().Flags) | 1}
	for range 2 {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make socket pair: %w", err)
		}
		file := os.NewFile(uintptr(pair[0]), "nbd")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			return fmt.Errorf("make socket pair: %w", err)
		}
		defer unix.Close(pair[1]) // The kernel keeps its own reference.
		dev.Sockets = append(dev.Sockets, pair[1])
		g.add(func(ctx context.Context) error {
			_ = server.Transmit(ctx, conn, d.LocalSession(conn)) // The kernel may give one socket up and use the other.
			return nil
		})
	}
	var err error
	if k.takeover {
		err = knbd.Reconfigure(k.link, dev)
	} else {
		k.index, err = knbd.Connect(k.link, dev)
	}
	if err != nil {
		return err
	}
	k.path = fmt.Sprintf("/dev/nbd%d", k.index)
	if err := os.WriteFile(k.memo, []byte(strconv.Itoa(k.index)), 0o600); err != nil {
		return fmt.Errorf("remember nbd device: %w", err)
	}
	return nil
}
