package main

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const someMaps = `00400000-00b12000 r-xp 00000000 fe:00 1234                               /usr/bin/xostor
00b12000-01540000 r--p 00712000 fe:00 1234                               /usr/bin/xostor
01540000-015b0000 rw-p 01140000 fe:00 1234                               /usr/bin/xostor
015b0000-01600000 rw-p 00000000 00:00 0 
c000000000-c000400000 rw-p 00000000 00:00 0 
7f0000000000-7f0000001000 r--s 00000000 fe:00 99                         /usr/bin/xostor
7f0000002000-7f0000003000 r--p 00000000 fe:00 98                         /usr/lib/other
7ffd0000-7ffe0000 r-xp 00000000 00:00 0                                  [vdso]
`

func TestProgramSpans_OnlyPrivatePagesOfTheProgramThatNobodyWrites(t *testing.T) {
	got, err := programSpans(strings.NewReader(someMaps), "/usr/bin/xostor")
	want := []span{{0x400000, 0xb12000}, {0xb12000, 0x1540000}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %x, %v", got, err)
	}
	if _, err := programSpans(strings.NewReader("x-y r-xp 0 fe:00 1 /p\n"), "/p"); err == nil {
		t.Error("a line that is not understood is no error")
	}
}

func FuzzProgramSpans(f *testing.F) {
	f.Add(someMaps)
	f.Add("0-0 r-xp 0 0 0 /usr/bin/xostor")
	f.Fuzz(func(t *testing.T, text string) {
		spans, err := programSpans(strings.NewReader(text), "/usr/bin/xostor")
		for _, s := range spans {
			if err == nil && s.to <= s.from {
				t.Errorf("empty span %x", s)
			}
		}
	})
}

// TestDropProgramPages_TheProgramGoesOn would not come back if a page that is needed were lost.
func TestDropProgramPages_TheProgramGoesOn(t *testing.T) {
	for range 3 {
		if err := dropProgramPages(); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(someMaps, "vdso") {
		t.Error("data of the program changed")
	}
}

func TestFollowLoad_TwoProcessorsWhileThereIsWork(t *testing.T) {
	t.Setenv("GOMAXPROCS", "")
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() { followLoad(ctx) })
	all.Go(func() {
		for ctx.Err() == nil { // Work.
		}
	})
	defer all.Wait()
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(time.Minute); runtime.GOMAXPROCS(0) != min(2, runtime.NumCPU()); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("a busy process still has one processor after a minute")
		}
	}
}

func TestRelaxTimers_TheFirstThreadHasTheSlack(t *testing.T) {
	if os.Geteuid() != 0 {
		const why = "the timer slack of other threads wants root"
		if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	if err := relaxTimers(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(os.Getpid()), "timerslack_ns"))
	if want := strconv.FormatInt(timerSlack.Nanoseconds(), 10); err != nil || strings.TrimSpace(string(raw)) != want {
		t.Errorf("the first thread's slack is %q ns, %v; want %s", raw, err, want)
	}
}
