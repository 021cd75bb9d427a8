package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	leanFirst = 15 * time.Second // A daemon has made its connections by then.
	leanEvery = time.Hour
)

// span is a part of the address space.
type span struct{ from, to uintptr }

// stayLean gives back, shortly after the start and then every hour until ctx ends, the pages of the program itself that were mapped in. A third of a
// daemon's resident memory is code that only its start needed, because the kernel maps neighbours of each page that is touched. What is needed again comes
// back from the page cache. Not for failover: that must not need a page of a disk that is just failing.
func stayLean(ctx context.Context, debug func(string, ...any)) {
	timer := time.NewTimer(leanFirst)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if err := dropProgramPages(); err != nil {
			debug("program's pages not given back", "err", err)
		}
		timer.Reset(leanEvery)
	}
}

func dropProgramPages() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("find own pages: %w", err)
	}
	defer func() { _ = maps.Close() }()
	spans, err := programSpans(maps, exe)
	if err != nil {
		return err
	}
	var failed error
	for _, s := range spans {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, s.from, s.to-s.from, unix.MADV_DONTNEED); errno != 0 {
			failed = errors.Join(failed, fmt.Errorf("give back own pages: %w", errno))
		}
	}
	return failed
}

// programSpans are the mappings of the file exe that nobody can write, from text in the form of proc_pid_maps(5). A page that was written would be lost.
func programSpans(maps io.Reader, exe string) ([]span, error) {
	var all []span
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 6 || strings.Join(f[5:], " ") != exe || len(f[1]) != 4 || f[1][1] != '-' || f[1][3] != 'p' {
			continue
		}
		a, b, ok := strings.Cut(f[0], "-")
		from, err1 := strconv.ParseUint(a, 16, 8*int(unsafe.Sizeof(uintptr(0))))
		to, err2 := strconv.ParseUint(b, 16, 8*int(unsafe.Sizeof(uintptr(0))))
		if !ok || err1 != nil || err2 != nil || to <= from {
			return nil, fmt.Errorf("find own pages: line %q is not understood", lines.Text())
		}
		all = append(all, span{uintptr(from), uintptr(to)})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("find own pages: %w", err)
	}
	return all, nil
}
