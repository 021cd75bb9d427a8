package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/knbd"
)

// detach disconnects the kernel device that a daemon of this host left, for when none is to come back: the kernel itself would
// keep it for ever. The device of a daemon that runs is refused, and one that somebody has open.
func detach(args []string, out io.Writer) error {
	s := settings{front: true}
	f := s.flags("detach")
	if err := parse(f, args); err != nil {
		return err
	}
	memos, err := filepath.Glob(filepath.Join(s.runDir, "*.nbd"))
	if err != nil {
		return fmt.Errorf("look for devices: %w", err)
	}
	if f.Arg(0) != "" {
		memos = slices.DeleteFunc(memos, func(memo string) bool { return resourceOf(memo) != f.Arg(0) })
	}
	if len(memos) == 0 {
		return fmt.Errorf("no daemon of this host left a kernel device (no memo in %s); nbd-client -d ends one that is somebody else's", s.runDir)
	}
	var failed []error
	for _, memo := range memos {
		failed = append(failed, s.detachOne(memo, out))
	}
	return errors.Join(failed...)
}

// resourceOf is the resource of a memo: a process that is front alone adds to its name.
func resourceOf(memo string) string {
	return strings.TrimSuffix(strings.TrimSuffix(filepath.Base(memo), ".nbd"), ".front")
}

func (s *settings) detachOne(memo string, out io.Writer) error {
	s.resource = resourceOf(memo)
	unlock, err := s.lock() // Held meanwhile, so that no daemon takes the device over.
	if err != nil {
		return fmt.Errorf("detach device of %s: %w; stop it first", s.resource, err)
	}
	defer unlock()
	m, ok := remembered(memo)
	path := fmt.Sprintf("/dev/nbd%d", m.index)
	if !ok {
		fmt.Fprintf(out, "the device of %s is gone already\n", s.resource)
	} else {
		if err := unused(m.index); err != nil {
			return fmt.Errorf("detach %s: %w", path, err)
		}
		link, done, err := knbd.Dial()
		if err != nil {
			return err
		}
		defer func() { _ = done() }() // This process ends with it.
		if err := knbd.Disconnect(link, m.index); err != nil {
			return err
		}
		fmt.Fprintf(out, "%s is detached\n", path)
	}
	if err := os.Remove(memo); err != nil {
		return fmt.Errorf("forget nbd device: %w", err)
	}
	return nil
}

// unused is an error that names who uses /dev/nbdN. The device is not opened for that: without a daemon its I/O hangs.
func unused(index int) error {
	text, err := os.ReadFile(fmt.Sprintf("/sys/block/nbd%d/dev", index))
	if err != nil {
		return fmt.Errorf("read number of device: %w", err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("read number of device: %w", err)
	}
	number := unix.Mkdev(major, minor)
	found, err := holders(func(string) bool { return true }, func(st unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == number })
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("process %d (%s) has it open: disable HA (xe pool-ha-disable) or end it", found[0].pid, found[0].command)
	}
	above, err := filepath.Glob(fmt.Sprintf("/sys/block/nbd%d/holders/*", index))
	if err != nil {
		return fmt.Errorf("look for devices above: %w", err)
	}
	if len(above) > 0 {
		return fmt.Errorf("device %s lies on it", filepath.Base(above[0]))
	}
	for _, table := range []string{"/proc/self/mountinfo", "/proc/swaps"} {
		used, err := mentions(table, strings.TrimSpace(string(text)), fmt.Sprintf("/dev/nbd%d", index))
		if err != nil {
			return err
		}
		if used != "" {
			return fmt.Errorf("it is in use: %s", used)
		}
	}
	return nil
}

// mentions is the first line of a file that has one of the words; no file has none.
func mentions(path string, words ...string) (string, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("look for uses: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if slices.ContainsFunc(strings.Fields(lines.Text()), func(word string) bool { return slices.Contains(words, word) }) {
			return lines.Text(), nil
		}
	}
	return "", lines.Err()
}
