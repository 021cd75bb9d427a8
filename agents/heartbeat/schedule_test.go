package heartbeat

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// schedule runs one seeded schedule of faults and returns what is wrong, "" if nothing is, and how many requests were made.
func schedule(seed uint64, broken string, log func(string, ...any)) (wrong string, ops int) {
	sizes := []int{3, 3, 3, 4, 5, 6, 9}
	n := sizes[seed%uint64(len(sizes))]
	if seed%1000 == 999 {
		n = 64
	}
	timeout := 20 * time.Second
	if seed%3 == 0 {
		timeout = 60 * time.Second
	}
	s := newSim(seed, n, timeout)
	s.log = log
	s.broken = func(name string) bool { return name == broken }
	s.cycle = 1300 * time.Millisecond
	if broken == "repeats all" {
		s.cycle, s.rare = 300*time.Millisecond, 4
	}
	faults := 3 + s.rng.IntN(6)
	if n == 64 {
		faults, s.cycle = 2, 3*time.Second
	}
	s.run(2 * time.Second)
	for range faults {
		s.fault()
		s.run(200*time.Millisecond + s.upTo(6*time.Second))
	}
	s.heal()
	s.run(15 * time.Second)
	before := make([]int, n)
	for _, op := range s.ops {
		if op.ok {
			before[op.host]++
		}
	}
	s.run(8 * time.Second)
	after := make([]int, n)
	for _, op := range s.ops {
		if op.ok {
			after[op.host]++
		}
	}
	for i, h := range s.hosts {
		if h.up && after[i] == before[i] {
			return fmt.Sprintf("%s was not served after everything had healed", h.name), len(s.ops)
		}
	}
	return s.check(20 * time.Second), len(s.ops)
}

// fault breaks one thing, half of the time around the owner.
func (s *sim) fault() {
	h := s.hosts[s.rng.IntN(len(s.hosts))]
	if s.rng.IntN(2) == 0 {
		for _, o := range s.hosts {
			if o.owner != nil {
				h = o
			}
		}
	}
	if !h.up {
		h.bootHost()
		return
	}
	node := s.drbd.nodes[h.index]
	switch kind := s.rng.IntN(10); kind {
	case 0: // The daemon dies and is started again.
		s.log("%v fault: %s daemon killed", s.at(), h.name)
		h.stopDaemon()
		s.after(s.upTo(4*time.Second), func() {
			if h.up && !h.running {
				h.startDaemon()
			}
		})
	case 1, 2: // SIGSTOP of the daemon, short or long.
		d := s.upTo(2 * time.Second)
		if kind == 2 {
			d = s.upTo(20 * time.Second)
		}
		s.log("%v fault: %s daemon frozen for %v", s.at(), h.name, d)
		h.freeze()
		s.after(d, func() {
			if h.running && !node.frozen {
				h.thaw()
			}
		})
	case 3: // The whole machine stalls.
		d := s.upTo(15 * time.Second)
		s.log("%v fault: %s machine frozen for %v", s.at(), h.name, d)
		node.frozen = true
		h.freeze()
		s.after(d, func() { s.thawMachine(h) })
	case 4:
		s.log("%v fault: %s crashes", s.at(), h.name)
		h.crash()
		s.after(s.upTo(20*time.Second), h.bootHost)
	case 5: // Both networks of a host.
		s.log("%v fault: %s isolated", s.at(), h.name)
		s.cutHost(h, true, true, s.upTo(20*time.Second))
	case 6:
		s.log("%v fault: %s loses the NBD network", s.at(), h.name)
		s.cutHost(h, true, false, s.upTo(20*time.Second))
	case 7:
		s.log("%v fault: %s loses the replication network", s.at(), h.name)
		s.cutHost(h, false, true, s.upTo(20*time.Second))
	case 8:
		s.log("%v fault: %s device fails", s.at(), h.name)
		node.broken = true
		s.after(s.upTo(8*time.Second), func() { node.broken = false })
	case 9:
		h.do(h.life, func() { h.handover(s.hosts[s.rng.IntN(len(s.hosts))].name) })
	}
}

func (s *sim) thawMachine(h *simHost) {
	s.drbd.nodes[h.index].frozen = false
	if h.running {
		h.thaw()
	}
}

// cutHost cuts a host off from each other host with a chance of 3/4, in one or both networks.
func (s *sim) cutHost(h *simHost, nbd, drbd bool, d time.Duration) {
	whole := s.rng.IntN(4) > 0
	for _, o := range s.hosts {
		if o == h || !whole && s.rng.IntN(2) == 0 {
			continue
		}
		if nbd {
			s.net[h.index][o.index], s.net[o.index][h.index] = false, false
			s.after(d, func() { s.net[h.index][o.index], s.net[o.index][h.index] = true, true })
		}
		if drbd {
			s.drbd.setPhys(h.index, o.index, false)
			s.after(d, func() { s.drbd.setPhys(h.index, o.index, true) })
		}
	}
}

// heal ends all faults.
func (s *sim) heal() {
	s.log("%v heal", s.at())
	for i, h := range s.hosts {
		for j := range s.hosts {
			s.net[i][j] = true
			s.drbd.setPhys(i, j, true)
		}
		s.drbd.nodes[i].broken = false
		s.thawMachine(h)
		if !h.up {
			h.bootHost()
		} else if !h.running {
			h.startDaemon()
		}
	}
}

func seeds(t testing.TB, name string, normal int) int {
	if v := os.Getenv(name); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return normal
}

// TestSchedules runs seeded schedules and checks their histories. XOSTOR_SOAK_SEEDS sets how many, XOSTOR_SEED replays
// one with its log.
func TestSchedules(t *testing.T) {
	if v := os.Getenv("XOSTOR_SEED"); v != "" {
		seed, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if wrong, _ := schedule(seed, os.Getenv("XOSTOR_BROKEN"), t.Logf); wrong != "" {
			t.Fatal(wrong)
		}
		return
	}
	normal := 2000
	if raceEnabled {
		normal = 40
	}
	n := seeds(t, "XOSTOR_SOAK_SEEDS", normal)
	var next, ops atomic.Uint64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := next.Add(1) - 1; seed < uint64(n); seed = next.Add(1) - 1 {
				wrong, made := schedule(seed, "", func(string, ...any) {})
				ops.Add(uint64(made))
				if wrong != "" {
					t.Errorf("seed %d: %s; replay: XOSTOR_SEED=%d go test -run TestSchedules -v ./agents/heartbeat", seed, wrong, seed)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d schedules, %d requests", n, ops.Load())
}

// A checker that notices nothing proves nothing: without a rule, some seed must fail. Settling is not among them: with
// DRBD's default ping-timeout a promotion away from a living owner takes longer than its lease, so here it is spare.
func TestCheckerNoticesMissingRules(t *testing.T) {
	rules := []string{"no fencing", "no order", "no lease", "repeats all"}
	if raceEnabled {
		rules = rules[:2]
	}
	for _, rule := range rules {
		t.Run(rule, func(t *testing.T) {
			limit := uint64(seeds(t, "XOSTOR_MUTANT_SEEDS", 600))
			for seed := range limit {
				if seed%1000 == 999 {
					continue
				}
				if wrong, _ := schedule(seed, rule, func(string, ...any) {}); strings.Contains(wrong, "linearizable") {
					t.Logf("seed %d: %s", seed, wrong)
					return
				}
			}
			t.Errorf("%s: no seed of %d noticed", rule, limit)
		})
	}
}

func TestScheduleReplays(t *testing.T) {
	run := func() string {
		var b strings.Builder
		wrong, ops := schedule(4711, "", func(f string, a ...any) { fmt.Fprintf(&b, f+"\n", a...) })
		return fmt.Sprint(b.String(), wrong, ops)
	}
	if a, b := run(), run(); a != b {
		t.Errorf("one seed, two runs:\n%s\n---\n%s", a, b)
	}
}
