package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

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
	lists, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, fmt.Errorf("look for processes: %w", err)
	}
	for _, list := range lists {
		dir := filepath.Dir(list)
		pid, _ := strconv.Atoi(filepath.Base(dir)) // The pattern lets numbers through only.
		cmd, err := os.ReadFile(list)
		if err != nil || pid == os.Getpid() || !wanted(string(cmd)) {
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
