package heartbeat

import (
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// ownerOf is the host that serves.
func (s *sim) ownerOf() *simHost {
	for _, h := range s.hosts {
		if h.owner != nil && h.running && !h.frozen && !h.owner.Left() {
			return h
		}
	}
	return nil
}

// scene is three hosts that have run for a while.
func scene(t *testing.T, seed uint64, timeout time.Duration) *sim {
	s := newSim(seed, 3, timeout)
	s.calm = true
	s.run(30 * time.Second)
	for _, h := range s.hosts {
		if h.failed > 0 && s.at() > 20*time.Second {
			t.Fatalf("seed %d: %s had errors at the start", seed, h.name)
		}
		h.maxGap, h.failed = 0, 0
	}
	if s.ownerOf() == nil {
		t.Fatalf("seed %d: nobody owns", seed)
	}
	return s
}

// fates tells what became of each host: L lives, 2 by Rule 2, x reset.
func (s *sim) fates() string {
	out := ""
	for _, h := range s.hosts {
		switch {
		case !h.up:
			out += "x"
		case h.model.Fate() == statefile.LivesRule2:
			out += "2"
		default:
			out += "L"
		}
	}
	return out
}

// survivors says whether all hosts but those given live, none by Rule 2, and their requests were served lately.
func (s *sim) survivors(but ...*simHost) string {
	for _, h := range s.hosts {
		gone := false
		for _, b := range but {
			gone = gone || b == h
		}
		switch {
		case gone:
		case !h.up || h.model.Fate() != statefile.Lives:
			return h.name + " did not survive: " + s.fates()
		case h.model.Margin(s.now) > s.x.StateFileTimeout/2:
			return h.name + " is not served"
		}
	}
	return ""
}

// isolate cuts all three networks of a host.
func (s *sim) isolate(h *simHost, nbd, drbd, xha bool) {
	for _, o := range s.hosts {
		if o == h {
			continue
		}
		i, j := h.index, o.index
		if nbd {
			s.net[i][j], s.net[j][i] = false, false
		}
		if drbd {
			s.drbd.setPhys(i, j, false)
		}
		if xha {
			s.xnet[i][j], s.xnet[j][i] = false, false
		}
	}
}

// TestWhatXhaIsPromised is the table of events of the reference (xha-nbd.md, section 5.4), row by row, at T=60 and T=20.
func TestWhatXhaIsPromised(t *testing.T) {
	rows := []struct {
		name  string
		event func(s *sim) (gone []*simHost)
		after time.Duration
		check func(s *sim, gone []*simHost) string
		gap   map[time.Duration]time.Duration // Longest wait of a survivor's request, by T.
	}{
		{name: "owner host dies", after: 150 * time.Second, event: func(s *sim) []*simHost {
			h := s.ownerOf()
			h.crash()
			return []*simHost{h}
		}, gap: map[time.Duration]time.Duration{60 * sec: 5 * sec, 20 * sec: 4 * sec}, check: func(s *sim, gone []*simHost) string {
			for _, h := range s.hosts {
				if h.up && h.model.Liveset().Has(gone[0].index) {
					return "the dead host is still in the liveset of " + h.name
				}
			}
			return s.survivors(gone...)
		}},
		{name: "owner isolated", after: 150 * time.Second, event: func(s *sim) []*simHost {
			h := s.ownerOf()
			s.isolate(h, true, true, true)
			return []*simHost{h}
		}, gap: map[time.Duration]time.Duration{60 * sec: 5 * sec, 20 * sec: 4 * sec}, check: func(s *sim, gone []*simHost) string {
			if gone[0].up {
				return "the isolated owner did not reset itself"
			}
			return s.survivors(gone...)
		}},
		{name: "non-owner isolated", after: 150 * time.Second, event: func(s *sim) []*simHost {
			h := s.hosts[(s.ownerOf().index+1)%3]
			s.isolate(h, true, true, true)
			return []*simHost{h}
		}, gap: map[time.Duration]time.Duration{60 * sec: 5 * sec, 20 * sec: 4 * sec}, check: func(s *sim, gone []*simHost) string {
			if gone[0].up {
				return "the isolated host did not reset itself"
			}
			return s.survivors(gone...)
		}},
		{name: "storage network down, management up", after: 90 * time.Second, event: func(s *sim) []*simHost {
			for _, h := range s.hosts {
				s.isolate(h, true, true, false)
			}
			return nil
		}, check: func(s *sim, _ []*simHost) string {
			if got := s.fates(); got != "222" {
				return "fates " + got + ", want Rule 2 on all"
			}
			for _, h := range s.hosts {
				if h.owner != nil && !h.owner.Left() {
					return h.name + " owns without quorum"
				}
			}
			for _, h := range s.hosts {
				for j := range s.hosts {
					s.net[h.index][j] = true
					s.drbd.setPhys(h.index, j, true)
				}
			}
			s.run(20 * time.Second)
			return s.survivors()
		}},
		{name: "the same with one host dead before", after: 200 * time.Second, event: func(s *sim) []*simHost {
			s.hosts[(s.ownerOf().index+1)%3].crash()
			s.run(time.Second)
			for _, h := range s.hosts {
				s.isolate(h, true, true, false)
			}
			return nil
		}, check: func(s *sim, _ []*simHost) string {
			if got := s.fates(); got != "xxx" {
				return "fates " + got + ", want all reset: xha's own rule"
			}
			return ""
		}},
		{name: "one host loses only the storage path", after: 150 * time.Second, event: func(s *sim) []*simHost {
			h := s.hosts[(s.ownerOf().index+1)%3]
			s.isolate(h, true, true, false)
			return []*simHost{h}
		}, gap: map[time.Duration]time.Duration{60 * sec: 5 * sec, 20 * sec: 4 * sec}, check: func(s *sim, gone []*simHost) string {
			if gone[0].up {
				return "the host without storage did not reset itself"
			}
			return s.survivors(gone...)
		}},
		{name: "two of three voters die", after: 200 * time.Second, event: func(s *sim) []*simHost {
			h := s.ownerOf()
			h.crash()
			s.hosts[(h.index+1)%3].crash()
			return nil
		}, check: func(s *sim, _ []*simHost) string {
			if got := s.fates(); got != "xxx" {
				return "fates " + got + ", want the survivor to reset itself: no quorum, no VMs"
			}
			return ""
		}},
		{name: "pool-wide reset", after: 60 * time.Second, event: func(s *sim) []*simHost {
			for _, h := range s.hosts {
				h.crash()
			}
			s.run(10 * time.Second)
			for _, h := range s.hosts {
				h.bootHost()
			}
			return nil
		}, check: func(s *sim, _ []*simHost) string { return s.survivors() }}, // The history check sees lost writes.
		{name: "daemons updated one by one, owner last after a hand-over", after: 60 * time.Second, event: func(s *sim) []*simHost {
			first := s.ownerOf()
			for _, h := range s.hosts {
				if h != first {
					s.restart(h)
				}
			}
			first.handover(s.hosts[(first.index+1)%3].name)
			s.run(5 * time.Second)
			s.restart(first)
			return nil
		}, check: func(s *sim, _ []*simHost) string { return s.survivors() }, gap: map[time.Duration]time.Duration{60 * sec: 25 * sec, 20 * sec: 12 * sec}},
		{name: "owner's daemon killed", after: 15 * time.Second, event: func(s *sim) []*simHost {
			h := s.ownerOf()
			h.stopDaemon()
			return []*simHost{h}
		}, check: func(s *sim, gone []*simHost) string {
			if n := s.ownerOf(); n == nil || n == gone[0] {
				return "nobody took over"
			}
			return s.survivors(gone...)
		}, gap: map[time.Duration]time.Duration{60 * sec: 1500 * time.Millisecond, 20 * sec: 1500 * time.Millisecond}},
		{name: "planned hand-over", after: 30 * time.Second, event: func(s *sim) []*simHost {
			h := s.ownerOf()
			h.handover(s.hosts[(h.index+2)%3].name)
			return nil
		}, check: func(s *sim, _ []*simHost) string { return s.survivors() },
			gap: map[time.Duration]time.Duration{60 * sec: sec, 20 * sec: sec}},
		{name: "owner's user space frozen", after: 60 * time.Second, event: func(s *sim) []*simHost {
			h := s.ownerOf()
			h.freeze()
			return []*simHost{h}
		}, check: func(s *sim, gone []*simHost) string {
			n := s.ownerOf()
			if n == nil || n == gone[0] {
				return "the frozen owner was not evicted"
			}
			if r := s.survivors(gone...); r != "" {
				return r
			}
			if !gone[0].up {
				return "" // Its own xhad reset it meanwhile, as it has to at T=20.
			}
			gone[0].thaw()
			s.run(20 * time.Second)
			for _, h := range s.hosts {
				if len(h.view.Cut) > 0 {
					return h.name + " did not restore its link"
				}
			}
			return ""
		}, gap: map[time.Duration]time.Duration{60 * sec: 15 * sec, 20 * sec: 8 * sec}},
	}
	seeds := uint64(10)
	if raceEnabled {
		seeds = 2
	}
	for _, row := range rows {
		for _, timeout := range []time.Duration{60 * sec, 20 * sec} {
			t.Run(row.name+"/T="+timeout.String(), func(t *testing.T) {
				var worst time.Duration
				for seed := range seeds {
					s := scene(t, seed, timeout)
					gone := row.event(s)
					s.run(row.after)
					if wrong := row.check(s, gone); wrong != "" {
						t.Fatalf("seed %d: %s", seed, wrong)
					}
					if wrong := s.check(20 * time.Second); wrong != "" {
						t.Fatalf("seed %d: %s", seed, wrong)
					}
					for _, h := range s.hosts {
						if len(gone) == 0 || h != gone[0] {
							worst = max(worst, h.maxGap)
							if row.gap != nil && h.failed > 0 {
								t.Errorf("seed %d: %d requests of %s failed", seed, h.failed, h.name)
							}
						}
					}
				}
				t.Logf("longest wait of a request that was served: %v", worst)
				if limit := row.gap[timeout]; limit > 0 && worst > limit {
					t.Errorf("a request waited %v, want at most %v", worst, limit)
				}
			})
		}
	}
}

// TestManyHosts: pools of 64 hosts keep the promises, and no host is asked so often that it does nothing else: to ask
// and to be asked cost it about a millisecond of a processor each (BenchmarkAsk).
func TestManyHosts(t *testing.T) {
	hosts := 64
	if raceEnabled {
		hosts = 12 // What the race detector is for is not here; 64 would take it a minute.
	}
	for _, row := range []struct {
		name  string
		event func(s *sim, owner *simHost)
		limit map[time.Duration]time.Duration // From the event until all are served, by T; nil: nobody is.
	}{
		{"owner's host dies", func(_ *sim, h *simHost) { h.crash() }, map[time.Duration]time.Duration{60 * sec: 5 * sec, 20 * sec: 4 * sec}},
		{"owner's daemon killed", func(_ *sim, h *simHost) { h.stopDaemon() }, map[time.Duration]time.Duration{60 * sec: 1500 * time.Millisecond, 20 * sec: 1500 * time.Millisecond}},
		{"planned hand-over", func(_ *sim, h *simHost) { h.handover("") }, map[time.Duration]time.Duration{60 * sec: sec, 20 * sec: sec}},
		{"nobody may own", func(s *sim, _ *simHost) {
			for _, h := range s.hosts {
				s.isolate(h, false, true, false)
			}
		}, nil},
	} {
		for _, timeout := range []time.Duration{60 * sec, 20 * sec} {
			t.Run(row.name+"/T="+timeout.String(), func(t *testing.T) {
				s := newSim(1, hosts, timeout)
				s.calm = true
				s.cycle = 30 * sec // Pings tell who is served.
				s.run(5 * sec)
				owner := s.ownerOf()
				if owner == nil {
					t.Fatal("nobody owns")
				}
				for _, h := range s.hosts {
					h.asks = 0
				}
				begun := s.at()
				row.event(s, owner)
				most, gap := 0, time.Duration(0)
				before := make([]int, len(s.hosts))
				for tick := range 1000 {
					s.run(10 * time.Millisecond)
					for i, h := range s.hosts {
						if _, out := h.front.Outage(); out && h.running {
							gap = s.at() - begun
						}
						if tick%100 == 99 {
							most = max(most, h.asks-before[i])
							before[i] = h.asks
						}
					}
				}
				t.Logf("not all are served for %v; a host was asked up to %d times a second", gap, most)
				if most > 10*hosts {
					t.Errorf("a host was asked %d times in a second", most)
				}
				if limit := row.limit[timeout]; limit > 0 && (gap > limit || gap == 0) {
					t.Errorf("a host was not served for %v, want at most %v", gap, limit)
				}
			})
		}
	}
}

func (s *sim) restart(h *simHost) {
	h.stopDaemon()
	s.run(500 * time.Millisecond)
	h.startDaemon()
	s.run(5 * time.Second)
}

const sec = time.Second
