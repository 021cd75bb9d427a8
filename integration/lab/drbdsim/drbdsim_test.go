package drbdsim_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
)

// lab is three diskful hosts, as in the recordings, with everything connected and the first one Primary and holding the device.
type lab struct {
	*testing.T
	clock      *drbdsim.Virtual
	c          *drbdsim.Cluster
	n1, n2, n3 *drbdsim.Node
}

func newLab(t *testing.T, seed uint64, onNoQuorum, rrConflict, onSuspended string) *lab {
	t.Helper()
	l := &lab{T: t, clock: drbdsim.NewVirtual()}
	l.c = drbdsim.New(drbdsim.Config{Resource: "r0", OnNoQuorum: onNoQuorum, RRConflict: rrConflict, OnSuspended: onSuspended, Seed: seed,
		Nodes: []drbdsim.NodeConfig{{Name: "n1", Diskful: true}, {Name: "n2", Diskful: true}, {Name: "n3", Diskful: true}}}, l.clock)
	l.n1, l.n2, l.n3 = l.c.Node("n1"), l.c.Node("n2"), l.c.Node("n3")
	for _, n := range l.c.Nodes() {
		l.c.Boot(n)
	}
	l.clock.Run(30 * time.Second)
	if _, err := l.primary(l.n1); err != nil {
		t.Fatal(err)
	}
	if err := l.n1.Open("holder"); err != nil {
		t.Fatal(err)
	}
	l.n1.Write()
	l.clock.Run(time.Second)
	return l
}

// primary runs `drbdsetup primary` and returns how long it took.
func (l *lab) primary(n *drbdsim.Node) (time.Duration, *drbdsim.Error) {
	began := l.clock.Now()
	var err *drbdsim.Error
	var took time.Duration
	done := false
	n.Primary(func(e *drbdsim.Error) { done, err, took = true, e, l.clock.Now().Sub(began) })
	for range 5000 {
		if done {
			break
		}
		l.clock.Run(10 * time.Millisecond)
	}
	if !done {
		l.Fatal("primary never returned")
	}
	return took, err
}

func (l *lab) cut(n *drbdsim.Node, broken bool) {
	for _, o := range l.c.Nodes() {
		if o != n {
			l.c.Cut(n, o, broken)
		}
	}
}

// seeds runs a test over many seeds: times are drawn.
func seeds(t *testing.T, f func(t *testing.T, seed uint64)) {
	t.Helper()
	for seed := uint64(1); seed <= 100; seed++ {
		f(t, seed)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func within(t *testing.T, what string, got, lo, hi time.Duration) {
	t.Helper()
	if got < lo || got > hi {
		t.Errorf("%s took %s, the lab measured %s to %s", what, got, lo, hi)
	}
}

const ms = time.Millisecond

// The tables of drbd-lab.md, with the ranges measured there and a margin of 150 ms for the slow guests.
func TestLabTables(t *testing.T) {
	t.Run("1.1 secondary dead, probe by the owner", func(t *testing.T) {
		seeds(t, func(t *testing.T, seed uint64) {
			l := newLab(t, seed, "io-error", "disconnect", "disconnect")
			l.c.Kill(l.n3)
			took, err := l.primary(l.n1)
			if err != nil || !l.n1.HasQuorum() {
				t.Errorf("owner's probe: %v", err)
			}
			within(t, "owner's probe", took, 500*ms, 1350*ms)
		})
	})
	t.Run("1.1 owner dead, probe by a secondary", func(t *testing.T) {
		seeds(t, func(t *testing.T, seed uint64) {
			l := newLab(t, seed, "io-error", "disconnect", "disconnect")
			l.c.Kill(l.n1)
			took, err := l.primary(l.n2)
			if err != nil || !l.n2.Writable() {
				t.Fatalf("probe: %v", err)
			}
			// Less than the lab's 1.23 s when the other survivor's own clock happened to run out first.
			within(t, "takeover", took, 600*ms, 1710*ms)
		})
	})
	t.Run("1.2 healthy owner", func(t *testing.T) {
		seeds(t, func(t *testing.T, seed uint64) {
			l := newLab(t, seed, "io-error", "disconnect", "disconnect")
			took, err := l.primary(l.n2)
			if err == nil || err.Exit != 11 || err.Code != -1 || l.n2.ConnState(l.n1) != "Connected" {
				t.Errorf("got %v, connection %s", err, l.n2.ConnState(l.n1))
			}
			within(t, "refusal", took, 510*ms, 780*ms)
		})
	})
	t.Run("1.3 frozen owner", func(t *testing.T) {
		seeds(t, func(t *testing.T, seed uint64) {
			l := newLab(t, seed, "io-error", "disconnect", "disconnect")
			l.c.Freeze(l.n1)
			l.clock.After(300*ms, func() { l.c.Thaw(l.n1) })
			if _, err := l.primary(l.n2); err == nil {
				t.Error("an owner frozen for 0.3 s lost the resource")
			}
			l = newLab(t, seed, "io-error", "disconnect", "disconnect")
			l.c.Freeze(l.n1)
			l.clock.After(2*time.Second, func() { l.c.Thaw(l.n1) })
			took, err := l.primary(l.n2)
			if err != nil {
				t.Fatalf("an owner frozen for 2 s kept it: %v", err)
			}
			within(t, "takeover from the frozen", took, 600*ms, 1820*ms)
			l.clock.Run(2*time.Second - took + 20*ms)
			if l.n1.HasQuorum() {
				t.Error("20 ms after the thaw the old owner still has quorum")
			}
		})
	})
	t.Run("1.4 DRBD's own detection of a cut", func(t *testing.T) {
		var idle []time.Duration
		seeds(t, func(t *testing.T, seed uint64) {
			l := newLab(t, seed, "io-error", "disconnect", "disconnect")
			l.n1.SetBusy(true)
			l.cut(l.n1, true)
			began := l.clock.Now()
			var idleAt, busyAt time.Duration
			for range 1300 {
				l.clock.Run(10 * ms)
				at := l.clock.Now().Sub(began)
				if idleAt == 0 && l.n2.ConnState(l.n1) != "Connected" {
					idleAt = at
				}
				if busyAt == 0 && !l.n1.HasQuorum() {
					busyAt = at
				}
			}
			within(t, "busy owner", busyAt, 10590*ms, 10820*ms)
			within(t, "idle secondary", idleAt, 500*ms, 10510*ms)
			idle = append(idle, idleAt)
		})
		slices.Sort(idle)
		if spread := idle[len(idle)-1] - idle[0]; spread < 8*time.Second {
			t.Errorf("idle detection spreads over %s only", spread)
		}
	})
	t.Run("3.1 forced demotion", func(t *testing.T) {
		for _, policy := range []string{"io-error", "suspend-io"} {
			l := newLab(t, 3, policy, "disconnect", "disconnect")
			l.n1.SetBusy(true)
			l.cut(l.n1, true)
			l.clock.Run(12 * time.Second)
			if l.n1.Suspended() != (policy == "suspend-io") {
				t.Errorf("%s: suspended %t", policy, l.n1.Suspended())
			}
			if err := l.n1.Secondary(false); err == nil || err.Code != -12 {
				t.Errorf("%s: unforced demotion of a held device: %v", policy, err)
			}
			if err := l.n1.Secondary(true); err != nil || l.n1.IsPrimary() || !l.n1.FailIO() {
				t.Errorf("%s: forced demotion: %v", policy, err)
			}
			if _, err := l.primary(l.n1); err == nil || err.Code != -12 {
				t.Errorf("%s: promotion while held: %v", policy, err)
			}
			if err := l.n1.Open("other"); err == nil {
				t.Errorf("%s: a new open succeeded", policy)
			}
			l.n1.Close("holder")
			if l.n1.FailIO() {
				t.Errorf("%s: fail-io stays after the last close", policy)
			}
			// 3.2: only suspend-io acknowledges the write that is then lost.
			if lost := l.n1.Lost() > 0; lost != (policy == "suspend-io") {
				t.Errorf("%s: lost acknowledged writes: %d", policy, l.n1.Lost())
			}
		}
	})
}

// Section 4: the other side promoted and wrote; then the link comes back.
func TestLabHeal(t *testing.T) {
	type end struct{ n1Role, n1Disk, link string }
	tests := []struct {
		name, onNoQuorum, rrConflict, onSuspended string
		hold                                      end
	}{
		{"r0", "io-error", "disconnect", "disconnect", end{"Primary", "UpToDate", "StandAlone"}},
		{"r1", "suspend-io", "disconnect", "disconnect", end{"Primary", "Outdated", "StandAlone"}},
		{"r2", "io-error", "retry-connect", "disconnect", end{"Primary", "UpToDate", "Connecting"}},
		{"r3", "suspend-io", "retry-connect", "force-secondary", end{"Secondary", "UpToDate", "Connected"}},
		{"r4", "io-error", "auto-discard", "disconnect", end{"Primary", "UpToDate", "StandAlone"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			seeds(t, func(t *testing.T, seed uint64) {
				partition := func() *lab {
					l := newLab(t, seed, tt.onNoQuorum, tt.rrConflict, tt.onSuspended)
					l.n1.SetBusy(true)
					l.cut(l.n1, true)
					l.clock.Run(13 * time.Second)
					if _, err := l.primary(l.n2); err != nil {
						t.Fatal(err)
					}
					return l
				}
				role := func(n *drbdsim.Node) string {
					if n.IsPrimary() {
						return "Primary"
					}
					return "Secondary"
				}
				l := partition()
				l.cut(l.n1, false)
				l.clock.Run(20 * time.Second)
				for _, p := range []*drbdsim.Node{l.n2, l.n3} {
					if got := (end{role(l.n1), l.n1.Disk(), l.n1.ConnState(p)}); got != tt.hold {
						t.Errorf("(a) still held: n1 to %s is %+v, the lab had %+v", p.Name, got, tt.hold)
					}
					if got := p.ConnState(l.n1); got != tt.hold.link {
						t.Errorf("(a) still held: %s to n1 is %s, the lab had %s", p.Name, got, tt.hold.link)
					}
				}
				if !l.n2.Writable() {
					t.Error("(a) the new owner was disturbed")
				}
				// The repair: Secondary, then plain connect on all ends.
				_ = l.n1.Secondary(true)
				l.n1.Close("holder")
				for _, p := range []*drbdsim.Node{l.n2, l.n3} {
					_, _ = l.n1.Connect(p.ID), p.Connect(l.n1.ID)
				}
				l.clock.Run(15 * time.Second)
				for _, p := range []*drbdsim.Node{l.n2, l.n3} {
					if l.n1.ConnState(p) != "Connected" || l.n1.Disk() != "UpToDate" {
						t.Errorf("after the repair n1 is %s, %s to %s", l.n1.Disk(), l.n1.ConnState(p), p.Name)
					}
				}

				l = partition()
				_ = l.n1.Secondary(true)
				l.n1.Close("holder")
				l.cut(l.n1, false)
				l.clock.Run(15 * time.Second)
				if l.n1.ConnState(l.n2) != "Connected" || l.n1.ConnState(l.n3) != "Connected" || l.n1.Disk() != "UpToDate" {
					t.Errorf("(b) left before the heal: n1 is %s, %s, %s", l.n1.Disk(), l.n1.ConnState(l.n2), l.n1.ConnState(l.n3))
				}
				if len(l.c.Violations) > 0 {
					t.Errorf("violations: %v", l.c.Violations)
				}
			})
		})
	}
}

// levels follows the states of one resource through lines of events2 and returns each new one, by the keys asked for.
func levels(lines []string, resource string, keys ...string) (out []string) {
	facts := map[string]string{}
	flush := func() {
		var w []string
		for _, k := range keys {
			w = append(w, facts[k])
		}
		if s := strings.Join(w, " "); len(out) == 0 || out[len(out)-1] != s {
			out = append(out, s)
		}
	}
	stamp := ""
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) < 3 || strings.HasPrefix(line, "#") {
			continue
		}
		if f[0] != stamp && stamp != "" {
			flush() // one time stamp is one transition
		}
		stamp = f[0]
		if !slices.Contains(f, "name:"+resource) || f[2] != "resource" && f[2] != "device" {
			continue
		}
		for _, w := range f[3:] {
			if k, v, ok := strings.Cut(w, ":"); ok {
				facts[k] = v
			}
		}
	}
	flush()
	return out
}

// recordedPhase reads the lines of a phase, and all before it so that the first state is known.
func recordedPhase(t *testing.T, file, phase string) (before, lines []string) {
	t.Helper()
	dir := os.Getenv("XOSTOR_REFERENCE")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "reference")
	}
	f, err := os.Open(filepath.Join(dir, "traces", file))
	if err != nil {
		t.Skipf("no recorded traces: set XOSTOR_REFERENCE to the folder that holds traces/ (%v)", err)
	}
	defer f.Close()
	in := false
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if line := sc.Text(); strings.HasPrefix(line, "# PHASE") {
			if in {
				return before, lines
			}
			in = strings.HasPrefix(line, "# PHASE "+phase+" ")
		} else if in {
			lines = append(lines, line)
		} else {
			before = append(before, line)
		}
	}
	if !in {
		t.Fatalf("no phase %s in %s", phase, file)
	}
	return before, lines
}

// The model passes through the same states in the same order as the recorded kernels.
func TestRecordedSequences(t *testing.T) {
	listen := func(l *lab, n *drbdsim.Node) *[]string {
		var lines []string
		group := 0
		n.Listen(func(g []string) {
			group++
			for _, x := range g {
				lines = append(lines, fmt.Sprintf("%06d %s", group, x))
			}
		})
		return &lines
	}
	tail := func(all []string, n int) []string { return all[max(0, len(all)-n):] }
	contains := func(all, want []string) bool {
		for i := range all {
			if len(all)-i >= len(want) && slices.Equal(all[i:i+len(want)], want) {
				return true
			}
		}
		return false
	}
	t.Run("owner killed, probe", func(t *testing.T) {
		keys := []string{"role", "may_promote", "disk", "quorum"}
		want := []string{"Secondary no UpToDate yes", "Secondary no Consistent yes", "Secondary yes Consistent yes", "Secondary no Consistent yes", "Secondary yes UpToDate yes", "Primary no UpToDate yes"}
		for run := 1; run <= 3; run++ {
			before, lines := recordedPhase(t, "lab/probe-freeze/events2-n2-boot1.log", fmt.Sprintf("kill9-primary-n1 run=%d", run))
			if got := levels(append(before, lines...), "r0", keys...); !contains(got, want) {
				t.Fatalf("the recording of run %d does not have %v but %v", run, want, tail(got, 12))
			}
		}
		seeds(t, func(t *testing.T, seed uint64) {
			l := newLab(t, seed, "io-error", "disconnect", "disconnect")
			lines := listen(l, l.n2)
			l.c.Kill(l.n1)
			if _, err := l.primary(l.n2); err != nil {
				t.Fatal(err)
			}
			if got := levels(*lines, "r0", keys...); !contains(got, want) {
				t.Errorf("the model went through %v", got)
			}
		})
	})
	t.Run("quorum lost under suspend-io, and back", func(t *testing.T) {
		keys := []string{"role", "suspended", "quorum"}
		want := []string{"Primary no yes", "Primary quorum no"}
		before, lines := recordedPhase(t, "events2-n1-boot1.log", "quorum-loss-partition-n1")
		if got := levels(append(before, lines...), "r1", keys...); !contains(got, want) {
			t.Fatalf("the recording has %v", tail(got, 12))
		}
		l := newLab(t, 1, "suspend-io", "disconnect", "disconnect")
		out := listen(l, l.n1)
		l.cut(l.n1, true)
		l.clock.Run(12 * time.Second)
		l.cut(l.n1, false)
		l.clock.Run(12 * time.Second)
		got := levels(*out, "r0", keys...)
		if !contains(got, want) || got[len(got)-1] != "Primary no yes" {
			t.Errorf("the model went through %v", got)
		}
	})
	t.Run("forced demotion", func(t *testing.T) {
		keys := []string{"role", "suspended", "force-io-failures", "quorum"}
		want := []string{"Primary quorum no no", "Secondary quorum yes no", "Secondary quorum no no"}
		before, lines := recordedPhase(t, "lab/forced-demote/events2-n1-boot1.log", "quorum-loss-forced-demote variant=force-first run=1")
		if got := levels(append(before, lines...), "r1", keys...); !contains(got, want) {
			t.Fatalf("the recording has %v", tail(got, 12))
		}
		l := newLab(t, 1, "suspend-io", "disconnect", "disconnect")
		out := listen(l, l.n1)
		l.cut(l.n1, true)
		l.clock.Run(12 * time.Second)
		_ = l.n1.Secondary(true)
		l.n1.Close("holder")
		if got := levels(*out, "r0", keys...); !contains(got, want) {
			t.Errorf("the model went through %v", got)
		}
	})
}
