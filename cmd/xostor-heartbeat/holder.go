package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
)

// otherHolder finds XCP-ng's http-disk-server with disk open on this host: DRBD would let both in. Ours goes by the same
// name, but is this executable; that two of ours do not meet is the lock's business.
func otherHolder(disk string) error {
	var want unix.Stat_t
	if err := unix.Stat(disk, &want); err != nil {
		return fmt.Errorf("find device: %w", err)
	}
	same := func(st unix.Stat_t) bool {
		if want.Mode&unix.S_IFMT == unix.S_IFBLK {
			return st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == want.Rdev
		}
		return st.Dev == want.Dev && st.Ino == want.Ino
	}
	var self unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &self); err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	lists, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, list := range lists {
		dir := filepath.Dir(list)
		cmd, err := os.ReadFile(list)
		if err != nil || !strings.Contains(string(cmd), "http-disk-server") && !strings.Contains(string(cmd), "http_disk_server") {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(dir+"/exe", &st) == nil && st.Dev == self.Dev && st.Ino == self.Ino {
			continue
		}
		fds, _ := filepath.Glob(dir + "/fd/*")
		for _, fd := range fds {
			if unix.Stat(fd, &st) == nil && same(st) {
				pid, _ := strconv.Atoi(filepath.Base(dir))
				return &heartbeat.HolderError{PID: pid, Command: strings.Join(strings.FieldsFunc(string(cmd), func(r rune) bool { return r == 0 }), " "), Disk: disk}
			}
		}
	}
	return nil
}
