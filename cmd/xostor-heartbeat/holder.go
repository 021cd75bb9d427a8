package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
)

// holder is a process that has something open.
type holder struct {
	pid     int
	command string
}

// holders are the other processes whose command line is wanted and that have a file open that same says is the one. What this
// process may not look into is an error; what ended meanwhile is not.
func holders(wanted func(command string) bool, same func(unix.Stat_t) bool) (found []holder, err error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for processes: %w", err)
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("look for processes: %w", err)
	}
	buf := make([]byte, 4096)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := "/proc/" + name
		cmd := start(dir+"/cmdline", buf)
		if !wanted(string(cmd)) {
			continue
		}
		fds, err := os.ReadDir(dir + "/fd")
		if errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("look into process %d: %w: call it as root", pid, err)
		}
		for _, fd := range fds {
			var st unix.Stat_t
			if unix.Stat(dir+"/fd/"+fd.Name(), &st) == nil && same(st) {
				found = append(found, holder{pid, strings.Join(strings.FieldsFunc(string(cmd), func(r rune) bool { return r == 0 }), " ")})
				break
			}
		}
	}
	return found, nil
}

// start reads the first bytes of a file into buf; none if it cannot be read. A dom0 has a thousand processes, and os.ReadFile makes twice the system calls.
func start(path string, buf []byte) []byte {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer func() { _ = unix.Close(fd) }()
	n, err := unix.Read(fd, buf)
	if err != nil {
		return nil
	}
	return buf[:n]
}

// watched looks for other holders of a device, in the background. A look takes tens of milliseconds in a large dom0, and for ever if a process hangs with its
// address space locked, as may be when storage is in trouble: that is when the device is to be taken over, so a takeover does not wait for its end.
type watched struct {
	look func() error // Such as otherHolder.
	log  *slog.Logger

	mu    sync.Mutex
	under chan struct{} // Closed when the look under way ends; nil when none is.
	done  bool          // A look has ended.
	err   error         // What the last one found.
}

const (
	lookEvery = time.Minute            // So that what is known is never old when looks hang.
	firstLook = 3 * time.Second        // For the first look, before the daemon starts.
	freshLook = 100 * time.Millisecond // For a fresh look, before the device is opened.
)

// watch looks at once and then every lookEvery, until ctx ends.
func watch(ctx context.Context, look func() error, log *slog.Logger) *watched {
	w := &watched{look: look, log: log}
	_ = w.fresh(firstLook) // What it finds is said when the device is opened.
	go func() {
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				w.begin()
			}
		}
	}()
	return w
}

// begin begins a look, unless one is under way, and returns what is closed at its end.
func (w *watched) begin() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.under != nil {
		return w.under
	}
	ended := make(chan struct{})
	w.under = ended
	go func() {
		err := w.look()
		w.mu.Lock()
		if _, held := errors.AsType[*heartbeat.HolderError](err); held && w.err == nil {
			w.log.Error("device has another holder", "err", err)
		}
		w.err, w.done, w.under = err, true, nil
		w.mu.Unlock()
		close(ended)
	}()
	return ended
}

// fresh is why the device must not be opened, nil if nothing is known: by a fresh look, or by the last one if that takes longer than limit.
func (w *watched) fresh(limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-w.begin():
	case <-timer.C:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.done {
		return errors.New("look for other holders of the device: not done yet")
	}
	return w.err
}

// otherHolder finds XCP-ng's http-disk-server with disk open on this host: DRBD would let both in. Ours goes by the same
// name, but is this executable; that two of ours do not meet is the lock's business.
func otherHolder(disk string) error {
	var want unix.Stat_t
	if err := unix.Stat(disk, &want); err != nil {
		return fmt.Errorf("find device: %w", err)
	}
	found, err := holders(func(command string) bool {
		return strings.Contains(command, "http-disk-server") || strings.Contains(command, "http_disk_server")
	}, func(st unix.Stat_t) bool {
		if want.Mode&unix.S_IFMT == unix.S_IFBLK {
			return st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == want.Rdev
		}
		return st.Dev == want.Dev && st.Ino == want.Ino
	})
	if err != nil {
		return err
	}
	var self unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &self); err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	for _, h := range found {
		var st unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d/exe", h.pid), &st) != nil || st.Dev != self.Dev || st.Ino != self.Ino {
			return &heartbeat.HolderError{PID: h.pid, Command: h.command, Disk: disk}
		}
	}
	return nil
}
