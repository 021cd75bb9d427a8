package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	rundebug "runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	leanFirst = 15 * time.Second // A daemon has made its connections by then.
	leanEvery = time.Minute

	// For failover, which is judged by milliseconds, and whose beats need most pages again at once.
	leanSeldom = time.Hour

	// restfulCycles of the garbage collector between two looks and no more mean that little happens. At rest sr-size has one, a bus of three hosts four.
	restfulCycles = 10

	// timerSlack lets the kernel gather wake-ups that are due within this time into one. Nothing that a daemon does by the clock is as urgent. Most wake-ups of
	// an idle bus are nats-server's clock of ten ticks a second and the Go runtime's short sleeps after each. 5 ms would save more, but the runtime then sees
	// late that a thread is stuck in a system call: events came 8 ms later.
	timerSlack = time.Millisecond
)

// relaxTimers gives every thread of this process the timer slack; later threads inherit it. Not for failover, which is judged by milliseconds.
// The files are Linux's since 4.6 (proc_pid_timerslack_ns(5)).
func relaxTimers() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("list own threads: %w", err)
	}
	slack := []byte(strconv.FormatInt(timerSlack.Nanoseconds(), 10))
	for _, t := range threads {
		// A thread that has ended meanwhile needs none.
		if err := os.WriteFile(filepath.Join("/proc", t.Name(), "timerslack_ns"), slack, 0); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("set timer slack: %w", err)
		}
	}
	return nil
}

// span is a part of the address space.
type span struct{ from, to uintptr }

// stayLean makes a daemon small while nothing happens, until ctx ends: its timers are relaxed and its pages given back.
func stayLean(ctx context.Context, debug func(string, ...any)) {
	if err := relaxTimers(); err != nil {
		debug("timers not relaxed", "err", err)
	}
	giveBackPages(ctx, leanEvery, debug)
}

// giveBackPages gives back to the kernel, shortly after the start and then after each interval in which little happened until ctx ends, the pages that hold nothing.
// The first are the program's own: a third of a daemon's resident memory is code that only its start needed, because the kernel maps neighbours of each page
// that is touched; what is needed again comes back from the page cache. The others are free ones of the heap, of which the runtime keeps more than a daemon
// at rest has in use. It takes a collection, 2 ms for an agent.
func giveBackPages(ctx context.Context, every time.Duration, debug func(string, ...any)) {
	timer := time.NewTimer(leanFirst)
	defer timer.Stop()
	seen := cycles()
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if now := cycles(); first || now-seen <= restfulCycles {
			rundebug.FreeOSMemory()
			if err := dropProgramPages(); err != nil {
				debug("program's pages not given back", "err", err)
			}
		}
		seen = cycles()
		timer.Reset(every)
	}
}

// cycles is how often the garbage collector has run.
func cycles() uint64 {
	s := []metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

const (
	loadEvery = time.Second
	loadBusy  = 50 * time.Millisecond // Of processor time in loadEvery; ten times what a bus at rest takes.
	loadCalm  = time.Minute           // Without a busy second.
)

// followLoad gives a bus that has work a second processor until ctx ends: with one alone, all events wait while a thread is in a slow write to the history.
func followLoad(ctx context.Context) {
	tick := time.NewTicker(loadEvery)
	defer tick.Stop()
	before, busyAt := cpuTime(), time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			used := cpuTime()
			if used-before >= loadBusy {
				busyAt = now
			}
			before = used
			if now.Sub(busyAt) < loadCalm {
				processors(2)
			} else {
				processors(1)
			}
		}
	}
}

// cpuTime is the processor time that this process has taken.
func cpuTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		return 0 // No Linux is without it.
	}
	return time.Duration(t.Nano())
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
