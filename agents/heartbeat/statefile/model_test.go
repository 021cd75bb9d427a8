package statefile

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var errIO = errors.New("input/output error")

// pool is N models on one image, with faults by time. Requests take no time unless the file hangs.
type pool struct {
	t      Timeouts
	now    time.Time
	start  time.Time
	models []*Model
	next   []time.Time // When the host's next cycle begins.
	in     []bool      // In a cycle.
	dead   []bool
	image  []byte
	hangs  func(host int, at time.Duration) bool
	fails  func(host int, at time.Duration) bool
	cutNet func(a, b int, at time.Duration) bool
	heard  [][]Heard
	rng    *rand.Rand
}

func newPool(n int, timeout time.Duration, seed uint64) *pool {
	p := &pool{t: Derive(timeout), start: time.Unix(0, 0), image: make([]byte, Size), rng: rand.New(rand.NewPCG(seed, 1))}
	p.now = p.start
	never := func(int, time.Duration) bool { return false }
	p.hangs, p.fails, p.cutNet = never, never, func(int, int, time.Duration) bool { return false }
	for i := range n {
		p.models = append(p.models, NewModel(p.now, p.t, i, n))
		p.heard = append(p.heard, make([]Heard, n))
		for j := range n {
			p.heard[i][j].At = p.now
		}
	}
	p.next, p.in, p.dead = make([]time.Time, n), make([]bool, n), make([]bool, n)
	for i := range n {
		p.next[i] = p.now.Add(time.Duration(p.rng.IntN(1000)) * time.Millisecond)
	}
	return p
}

func (p *pool) gone(i int) bool {
	return p.dead[i] || p.models[i].Fate() == Fenced || p.models[i].Fate() == Watchdog
}

// run passes d in steps of 100 ms.
func (p *pool) run(d time.Duration) {
	for end := p.now.Add(d); p.now.Before(end); p.now = p.now.Add(100 * time.Millisecond) {
		at := p.now.Sub(p.start)
		for i, m := range p.models {
			if p.gone(i) {
				continue
			}
			for j := range p.models {
				if j != i && !p.gone(j) && !p.cutNet(i, j, at) {
					p.heard[i][j] = Heard{At: p.now, Access: p.models[j].Access(p.now)}
				}
			}
			p.cycle(i, m, at)
			m.Tick(p.now, p.heard[i])
		}
	}
}

func (p *pool) cycle(i int, m *Model, at time.Duration) {
	if !p.in[i] && !p.now.Before(p.next[i]) {
		m.Begin(p.now)
		p.in[i] = true
	}
	for p.in[i] && !p.hangs(i, at) {
		op, ok := m.Next()
		if !ok {
			p.in[i] = false
			p.next[i] = p.now.Add(p.t.StateFileInterval + time.Duration(p.rng.IntN(1000)-500)*time.Millisecond)
			break
		}
		off := int64(0)
		if op.Host >= 0 {
			off = Offset(op.Host)
		}
		switch {
		case p.fails(i, at):
			m.Done(p.now, nil, errIO)
		case op.Write:
			copy(p.image[off:], op.Data)
			m.Done(p.now, nil, nil)
		default:
			copy(op.Data, p.image[off:])
			m.Done(p.now, op.Data, nil)
		}
	}
}

func (p *pool) fates() string {
	s := ""
	for i, m := range p.models {
		if p.dead[i] {
			s += "D"
			continue
		}
		s += [...]string{"L", "2", "F", "W"}[m.Fate()]
	}
	return s
}

func between(from, to time.Duration) func(int, time.Duration) bool {
	return func(_ int, at time.Duration) bool { return at >= from && at < to }
}

// The experiments with the real xhad, three hosts, T=20 (section 1.5 of the reference): D dead, L lives, 2 lives by
// Rule 2, F fenced, W reset by the watchdog.
func TestModelRepeatsMeasuredExperiments(t *testing.T) {
	cases := []struct {
		name       string
		set        func(p *pool)
		kill       int
		during     time.Duration // When to look first.
		wantDuring string
		want       string
	}{
		{name: "pause 12 s", kill: -1, set: func(p *pool) { p.hangs = between(20*sec, 32*sec) }, during: 31 * sec, wantDuring: "LLL", want: "LLL"},
		{name: "pause 60 s, all alive", kill: -1, set: func(p *pool) { p.hangs = between(20*sec, 80*sec) }, during: 60 * sec, wantDuring: "222", want: "LLL"},
		{name: "EIO for 45 s, all alive", kill: -1, set: func(p *pool) { p.fails = between(20*sec, 65*sec) }, during: 60 * sec, wantDuring: "222", want: "LLL"},
		{name: "one dead and pause 8 s", kill: 0, set: func(p *pool) { p.hangs = between(20*sec, 28*sec) }, during: 28 * sec, wantDuring: "DLL", want: "DLL"},
		{name: "one dead and pause 30 s", kill: 0, set: func(p *pool) { p.hangs = between(20*sec, 50*sec) }, during: 49 * sec, wantDuring: "DFF", want: "DFF"},
		{name: "one host loses its path, EIO", kill: -1, set: func(p *pool) {
			p.fails = func(h int, at time.Duration) bool { return h == 2 && at >= 20*sec }
		}, during: 30 * sec, wantDuring: "LLL", want: "LLF"},
		{name: "one host isolated", kill: -1, set: func(p *pool) {
			p.fails = func(h int, at time.Duration) bool { return h == 2 && at >= 20*sec }
			p.cutNet = func(a, b int, at time.Duration) bool { return (a == 2 || b == 2) && at >= 20*sec }
		}, during: 30 * sec, wantDuring: "LLL", want: "LLF"},
		{name: "network gone, statefile stays", kill: -1, set: func(p *pool) {
			p.cutNet = func(a, b int, at time.Duration) bool { return (a == 2) != (b == 2) && at >= 20*sec }
		}, during: 30 * sec, wantDuring: "LLL", want: "LLF"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(20) {
				p := newPool(3, 20*sec, seed)
				c.set(p)
				p.run(20 * sec)
				if c.kill >= 0 {
					p.dead[c.kill] = true
				}
				p.run(c.during - 20*sec)
				if got := p.fates(); got != c.wantDuring {
					t.Fatalf("seed %d: during %s, want %s", seed, got, c.wantDuring)
				}
				p.run(90 * sec)
				if got := p.fates(); got != c.want {
					t.Fatalf("seed %d: %s, want %s", seed, got, c.want)
				}
			}
		})
	}
}

func TestDeadHostLeavesTheLiveset(t *testing.T) {
	p := newPool(3, 20*sec, 1)
	p.run(10 * sec)
	p.dead[1] = true
	p.run(25 * sec)
	if p.models[0].Liveset() != Of(0, 1, 2) {
		t.Error("the dead host was dropped before it must have fenced itself")
	}
	p.run(25 * sec)
	if got := p.models[0].Liveset(); got != Of(0, 2) {
		t.Errorf("liveset %v, want {0 2}", got)
	}
}

func TestHangBecomesAWatchdogReset(t *testing.T) {
	p := newPool(3, 20*sec, 1)
	p.hangs = func(h int, at time.Duration) bool { return h == 0 && at > 10*sec }
	p.cutNet = func(a, b int, _ time.Duration) bool { return false }
	p.run(80 * sec)
	if f := p.models[0].Fate(); f != Fenced && f != Watchdog {
		t.Errorf("fate %v", f)
	}
}

func TestMasterLockExcludes(t *testing.T) {
	for seed := range uint64(50) {
		p := newPool(4, 20*sec, seed)
		owned := map[int]bool{}
		for range 3000 {
			p.run(100 * time.Millisecond)
			owners := ""
			for i, m := range p.models {
				if m.Owns() {
					owners += fmt.Sprint(i)
					owned[i] = true
					m.Want(p.rng.IntN(30) != 0)
				} else if p.rng.IntN(100) == 0 {
					m.Want(true)
				}
			}
			if len(owners) > 1 {
				t.Fatalf("seed %d: owners %s", seed, owners)
			}
		}
		if len(owned) < 2 {
			t.Fatalf("seed %d: only %v ever got the lock", seed, owned)
		}
	}
}
