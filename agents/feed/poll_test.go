package feed

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// called makes the stamp of a call that began so long before noon.
func called(ago, took time.Duration) stamp {
	return stamp{began: noon.Add(-ago), took: took, waited: took}
}

// quiet is a state in which everything was just called and nothing is known to change.
func quiet() pollState {
	s := pollState{thin: true, grew: noon.Add(-time.Hour), probeEvery: probeSlow}
	for c := range calls {
		s.last[c] = called(0, 10*time.Millisecond)
	}
	return s
}

func TestNextPoll(t *testing.T) {
	for _, tc := range []struct {
		name  string
		state func(*pollState)
		want  string // Calls, then the wait.
	}{
		{"at the start one call per lane", func(s *pollState) { *s = pollState{} }, "cached pools, pools"},
		{"quiet: the cached pools come next", func(s *pollState) {}, "wait 1s"},
		{"cached pools each second", func(s *pollState) { s.last[callPools] = called(time.Second, 0) }, "cached pools"},
		{"nodes each two seconds", func(s *pollState) { s.last[callNodes] = called(2*time.Second, 0) }, "nodes"},
		{"what is longer due goes first", func(s *pollState) {
			s.last[callPools], s.last[callNodes] = called(1100*time.Millisecond, 0), called(2200*time.Millisecond, 0)
		}, "nodes"},
		{"growth was seen 59 s ago: probe each 300 ms", func(s *pollState) {
			s.grew, s.last[callProbe] = noon.Add(-59*time.Second), called(300*time.Millisecond, 10*time.Millisecond)
		}, "pools"},
		{"growth was seen 61 s ago: the slower interval counts", func(s *pollState) {
			s.grew, s.last[callProbe], s.probeEvery = noon.Add(-61*time.Second), called(500*time.Millisecond, 0), 4*time.Second
		}, "wait 1s"},
		{"a probe that took 200 ms waits for 1 s", func(s *pollState) {
			s.grew, s.last[callProbe] = noon, called(900*time.Millisecond, 200*time.Millisecond)
		}, "wait 100ms"},
		{"without thin pools a probe a minute", func(s *pollState) {
			s.thin, s.grew, s.last[callProbe] = false, noon, called(59*time.Second, 0)
		}, "wait 1s"},
		{"a hint: one resource, after the settling time", func(s *pollState) { s.mark(noon, "r1") }, "wait 100ms"},
		{"the settling time is over", func(s *pollState) {
			s.last[callResources] = stamp{}
			s.mark(noon.Add(-settle), "r1")
		}, "resources"},
		{"a resource view that took 100 ms waits for 500 ms", func(s *pollState) {
			s.last[callResources] = called(400*time.Millisecond, 100*time.Millisecond)
			s.mark(noon.Add(-settle), "r1")
		}, "wait 100ms"},
		{"a view that kept us busy for 200 ms, the satellites for 20 ms, waits for 600 ms", func(s *pollState) {
			s.markAll()
			s.last[callView] = stamp{began: noon.Add(-500 * time.Millisecond), took: 200 * time.Millisecond, waited: 20 * time.Millisecond}
		}, "wait 100ms"},
		{"many hints: all resources", func(s *pollState) {
			for i := range 9 {
				s.mark(noon.Add(-settle), fmt.Sprint(i))
			}
			s.last[callView] = called(time.Second, 0)
		}, "all resources"},
		{"all resources at most four times a second", func(s *pollState) {
			s.markAll()
			s.last[callView] = called(150*time.Millisecond, 0)
		}, "wait 100ms"},
		{"a view of all that took 1 s waits for 5 s", func(s *pollState) {
			s.markAll()
			s.last[callView] = called(4900*time.Millisecond, time.Second)
		}, "wait 100ms"},
		{"the volumes of one node changed their size", func(s *pollState) {
			s.markNode("a")
			s.last[callView] = called(time.Second, 50*time.Millisecond)
		}, "all resources"},
		{"all resources every two minutes anyway", func(s *pollState) { s.last[callView] = called(2*time.Minute, 0) }, "all resources"},
		{"a costly call under way holds up nothing cheap", func(s *pollState) {
			s.busy[laneCostly] = true
			s.markAll()
			s.last[callView], s.last[callPools] = called(time.Hour, 0), called(time.Second, 0)
		}, "cached pools"},
		{"away: only cached pools, and not before the retry", func(s *pollState) {
			*s = pollState{away: 3, retryAt: noon.Add(2 * time.Second)}
			s.markAll()
		}, "wait 2s"},
		{"away: the retry is due", func(s *pollState) { *s = pollState{away: 3, retryAt: noon} }, "cached pools"},
		{"a view that failed twice waits for 2 s", func(s *pollState) {
			s.markAll()
			s.last[callView] = stamp{began: noon.Add(-1900 * time.Millisecond), failures: 2}
		}, "wait 100ms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := quiet()
			tc.state(&s)
			due, wait := nextPoll(noon, &s)
			got := fmt.Sprintf("wait %s", wait)
			if len(due) > 0 {
				var names []string
				for _, c := range due {
					names = append(names, c.String())
				}
				got = strings.Join(names, ", ")
			}
			if got != tc.want {
				t.Errorf("next poll: %s, want %s", got, tc.want)
			}
		})
	}
}

// TestNextPollKeepsItsLimits simulates any mix of durations, failures and hints for ten minutes.
func TestNextPollKeepsItsLimits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := pollState{thin: true, probeEvery: probeFast}
		now, end := noon, noon.Add(10*time.Minute)
		var previous [calls]stamp
		cheap := 0
		for now.Before(end) {
			due, wait := nextPoll(now, &s)
			if len(due) == 0 {
				if wait <= 0 {
					t.Fatalf("neither a call nor a wait: %s", wait)
				}
				now = now.Add(wait)
				continue
			}
			for _, c := range due {
				took := time.Duration(rapid.Int64Range(int64(time.Millisecond), int64(2*time.Second)).Draw(t, "took"))
				gap := now.Sub(previous[c].began)
				if c.lane() == laneCostly && !previous[c].began.IsZero() && gap < max(selfLimit*previous[c].waited, ownLimit*previous[c].took) {
					t.Fatalf("%s again after %s, the last took %s", c, gap, previous[c].took)
				}
				if c.lane() == laneCheap {
					cheap++
				}
				previous[c] = stamp{began: now, took: took, waited: took / time.Duration(rapid.IntRange(1, 3).Draw(t, "share"))}
				s.last[c] = previous[c]
				switch c {
				case callProbe:
					s.probed(now, rapid.IntRange(0, 9).Draw(t, "growth") == 0)
				case callView:
					s.dirtyAll = false
				case callResources:
					clear(s.dirty)
				}
				if rapid.IntRange(0, 4).Draw(t, "hint") == 0 {
					s.mark(now, "r")
				}
			}
		}
		if limit := 2 * 600; cheap > limit {
			t.Fatalf("%d cheap calls in ten minutes, more than two a second", cheap)
		}
	})
}
