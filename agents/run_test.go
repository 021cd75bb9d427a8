package agents_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/gate"
	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// world is an agent whose four functions the test sets, and which writes down what was called when.
type world struct {
	observe func(ctx context.Context) (int, error)
	decide  func(now time.Time, s int) agents.Plan
	act     func(ctx context.Context, a agents.Action) error

	mu    sync.Mutex
	start time.Time
	looks []time.Duration
	acts  []string
	wake  chan subject.Subject // events, as a bus would deliver them
}

func newWorld() *world { return &world{start: time.Now(), wake: make(chan subject.Subject, 1000)} }

func (w *world) Name() string             { return "test" }
func (w *world) Wakes() []subject.Subject { return []subject.Subject{"xostor.v1.xapi.>"} }

func (w *world) Observe(ctx context.Context) (int, error) {
	w.mu.Lock()
	w.looks = append(w.looks, time.Since(w.start))
	n := len(w.looks)
	w.mu.Unlock()
	if w.observe != nil {
		return w.observe(ctx)
	}
	return n, nil
}

func (w *world) Decide(now time.Time, s int) agents.Plan {
	if w.decide != nil {
		return w.decide(now, s)
	}
	return agents.Plan{}
}

func (w *world) Act(ctx context.Context, a agents.Action) error {
	w.mu.Lock()
	w.acts = append(w.acts, a.Verb+" "+a.Target)
	w.mu.Unlock()
	if w.act != nil {
		return w.act(ctx, a)
	}
	return nil
}

func (w *world) listen(ctx context.Context, _ []subject.Subject, wake func(subject.Subject)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-w.wake:
			wake(s)
		}
	}
}

// at lets virtual time pass until the moment d after the start and waits until all is quiet there.
func (w *world) at(d time.Duration) {
	<-time.After(d - time.Since(w.start))
	synctest.Wait()
}

func (w *world) run(t *testing.T, o agents.Options) *agents.Board {
	t.Helper()
	o.Listen = w.listen
	o.Board = &agents.Board{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agents.Run(ctx, w, o) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run returned %v after its context ended, want nil", err)
		}
	})
	return o.Board
}

func seconds(ds []time.Duration) string {
	var parts []string
	for _, d := range ds {
		parts = append(parts, fmt.Sprintf("%.2f", d.Seconds()))
	}
	return strings.Join(parts, " ")
}

func TestRun_BurstOfWakesCostsOneLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.run(t, agents.Options{Resync: time.Hour, Settle: 50 * time.Millisecond, SettleMax: 250 * time.Millisecond})
		w.at(time.Second)
		for range 500 {
			w.wake <- "xostor.v1.xapi.vdi.x"
		}
		w.at(2 * time.Second)
		if got, want := seconds(w.looks), "0.00 1.05"; got != want {
			t.Errorf("looks at %s s, want %s", got, want)
		}
	})
}

func TestRun_EndlessWakesDoNotStarveTheLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.run(t, agents.Options{Resync: time.Hour, Settle: 50 * time.Millisecond, SettleMax: 250 * time.Millisecond})
		w.at(time.Second)
		for range 100 { // one wake each 10 ms, so it is never quiet
			w.wake <- "xostor.v1.xapi.vdi.x"
			w.at(time.Since(w.start) + 10*time.Millisecond)
		}
		if n := len(w.looks) - 1; n < 3 || n > 5 {
			t.Errorf("%d looks in one second of endless wakes, want one each SettleMax (3 to 5)", n)
		}
	})
}

func TestRun_LostEventCostsOneResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.run(t, agents.Options{Resync: 10 * time.Second})
		w.at(100 * time.Second) // no wake at all
		if n := len(w.looks); n < 9 || n > 12 {
			t.Errorf("%d looks in 100 s with a resync of 10 s, want about 10", n)
		}
	})
}

func TestRun_RecheckBringsTheNextLookForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.decide = func(_ time.Time, s int) (p agents.Plan) {
			if s < 3 {
				p.RecheckIn(7 * time.Second)
				p.RecheckIn(0)
				p.RecheckIn(9 * time.Second)
			}
			return p
		}
		w.run(t, agents.Options{Resync: time.Hour})
		w.at(time.Minute)
		if got, want := seconds(w.looks), "0.00 7.00 14.00"; got != want {
			t.Errorf("looks at %s s, want %s", got, want)
		}
	})
}

func TestRun_BackOffDoublesAndWakesDoNotShortenIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.observe = func(context.Context) (int, error) { return 0, errors.New("LINSTOR is away") }
		board := w.run(t, agents.Options{BackoffMin: time.Second, BackoffMax: 8 * time.Second})
		for s := 1; s <= 60; s++ {
			w.at(time.Duration(s) * time.Second)
			w.wake <- "xostor.v1.xapi.vdi.x"
		}
		w.at(61 * time.Second)
		last := time.Duration(0)
		for i, d := range w.looks[1:] {
			pause, full := d-last, min(time.Second<<i, 8*time.Second)
			if pause < full/2 || pause > full {
				t.Errorf("pause %d is %s, want between %s and %s", i+1, pause, full/2, full)
			}
			last = d
		}
		if s := board.Status(); s.State != agents.Failing || s.LastError != "LINSTOR is away" || s.Failures != int64(len(w.looks)) {
			t.Errorf("status %s, %q, %d failures; want failing with the error, %d failures", s.State, s.LastError, s.Failures, len(w.looks))
		}
	})
}

func TestRun_WakeDuringAPassLeadsToAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.observe = func(context.Context) (int, error) {
			if len(w.looks) == 1 {
				w.wake <- "xostor.v1.xapi.vdi.x" // changes after we read it
				<-time.After(3 * time.Second)
			}
			return 0, nil
		}
		w.run(t, agents.Options{Resync: time.Hour, Settle: 50 * time.Millisecond})
		w.at(10 * time.Second)
		if got, want := seconds(w.looks), "0.00 3.05"; got != want {
			t.Errorf("looks at %s s, want %s", got, want)
		}
	})
}

func TestRun_PermissionLostInTheMiddleOfAnAction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		coordinator := &lease{lost: make(chan struct{})}
		w.decide = func(_ time.Time, s int) (p agents.Plan) {
			if s == 1 {
				p.Add(agents.Action{Verb: "drop-replica", Target: "r1", Risk: agents.RiskRemove, Why: "surplus"})
				p.Add(agents.Action{Verb: "drop-replica", Target: "r2", Risk: agents.RiskRemove, Why: "surplus"})
			}
			return p
		}
		var ended error
		w.act = func(ctx context.Context, a agents.Action) error {
			select {
			case <-ctx.Done():
				ended = context.Cause(ctx)
				return ctx.Err()
			case <-time.After(20 * time.Second):
				return nil
			}
		}
		board := w.run(t, agents.Options{Resync: time.Hour, Gate: coordinator})
		w.at(5 * time.Second)
		close(coordinator.lost)
		w.at(6 * time.Second)
		if ended == nil || ended.Error() != "coordinator: this host is no longer it" {
			t.Fatalf("the action in flight ended with %v, want the gate's reason", ended)
		}
		var got []string
		for _, r := range board.Status().Records {
			got = append(got, r.Action.Target+" "+string(r.Outcome)+": "+r.Error)
		}
		want := []string{"r1 withheld: coordinator: this host is no longer it", "r2 withheld: coordinator: this host is no longer it"}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("records (-want +got):\n%s", d)
		}
		if s := board.Status(); s.State != agents.Healthy {
			t.Errorf("state %s after a withheld action, want healthy: losing the role is no failure", s.State)
		}
		if d := cmp.Diff([]string{"drop-replica r1"}, w.acts); d != "" {
			t.Errorf("actions begun (-want +got):\n%s", d)
		}
	})
}

// lease is a gate that can be lost at any time.
type lease struct{ lost chan struct{} }

func (l *lease) Enter(ctx context.Context, _ agents.Action) (context.Context, func(error), error) {
	no := &agents.Refusal{Gate: "coordinator", Why: "this host is no longer it"}
	select {
	case <-l.lost:
		return nil, nil, no
	default:
	}
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-l.lost:
			cancel(no)
		case <-ctx.Done():
		}
	}()
	return ctx, func(error) { cancel(nil) }, nil
}

func TestRun_WatchdogIsFedByFinishedPassesOnly(t *testing.T) {
	tests := []struct {
		name    string
		observe func(ctx context.Context) (int, error)
		fed     bool
	}{
		{"all is well", func(context.Context) (int, error) { return 0, nil }, true},
		{"an orderly error", func(context.Context) (int, error) { return 0, errors.New("away") }, true},
		{"deadline exceeded", func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, ctx.Err() }, true},
		{"a pass that ignores its context and hangs", func(context.Context) (int, error) { <-time.After(time.Hour); return 0, nil }, false},
		{"a panic", func(context.Context) (int, error) { panic("nil map") }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				w.observe = tt.observe
				var fed atomic.Int64
				w.run(t, agents.Options{PassTimeout: 10 * time.Second, Resync: 10 * time.Second, Alive: func() { fed.Add(1) }})
				w.at(5 * time.Minute)
				if (fed.Load() > 0) != tt.fed {
					t.Errorf("fed %d times in 5 minutes, want fed: %v", fed.Load(), tt.fed)
				}
				w.at(2 * time.Hour) // let the hanging pass end
			})
		})
	}
}

func TestRun_MaxQuietBoundsTheTimeBetweenPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		last, worst := time.Now(), time.Duration(0)
		w.run(t, agents.Options{Resync: time.Hour, MaxQuiet: 15 * time.Second, Alive: func() {
			worst, last = max(worst, time.Since(last)), time.Now()
		}})
		w.at(10 * time.Minute)
		if worst != 15*time.Second {
			t.Errorf("longest time without a sign of life %s, want 15s", worst)
		}
	})
}

func TestRun_PanicInDecideIsLoudAndSurvived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log safeLog
		w := newWorld()
		w.decide = func(_ time.Time, s int) agents.Plan {
			if s <= 2 {
				panic("index out of range")
			}
			return agents.Plan{}
		}
		rep := &journal{}
		board := w.run(t, agents.Options{BackoffMin: time.Second, Resync: 10 * time.Second, Report: rep,
			Log: slog.New(slog.NewTextHandler(&log, nil))})
		w.at(100 * time.Millisecond)
		s := board.Status()
		if s.State != agents.Failing || s.Panics != 1 || len(s.Findings) != 1 || s.Findings[0].Code != "agent-bug" {
			t.Errorf("after the first panic: state %s, %d panics, findings %v; want failing, 1, agent-bug", s.State, s.Panics, s.Findings)
		}
		if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "run_test.go") {
			t.Errorf("the log must have an error with the stack, got:\n%s", log.String())
		}
		w.at(time.Minute)
		if s := board.Status(); s.State != agents.Healthy || s.Panics != 2 || len(s.Findings) != 0 {
			t.Errorf("later: state %s, %d panics, findings %v; want healthy, 2, none", s.State, s.Panics, s.Findings)
		}
		if got, want := strings.Join(rep.lines, ", "), "raised agent-bug, cleared agent-bug"; got != want {
			t.Errorf("reported %s, want %s", got, want)
		}
	})
}

// safeLog is a log that can be read while the agent writes.
type safeLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *safeLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *safeLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// journal writes down findings and actions as they are reported.
type journal struct{ lines []string }

func (j *journal) Action(r agents.Record) {
	j.lines = append(j.lines, string(r.Outcome)+" "+r.Action.Verb+" "+r.Action.Target)
}
func (j *journal) Finding(f agents.Finding, raised bool) {
	j.lines = append(j.lines, map[bool]string{true: "raised ", false: "cleared "}[raised]+f.Code)
}
func (j *journal) Status(agents.Status) {}

func TestRun_FailedActions(t *testing.T) {
	boom := errors.New("boom")
	tests := []struct {
		name string
		risk agents.Risk
		want []string
	}{
		{"a failed add spares the other targets", agents.RiskAdd,
			[]string{"failed one r1", "skipped two r1", "done one r2", "moot one r3"}},
		{"a failed move ends the plan", agents.RiskMove,
			[]string{"failed one r1", "skipped two r1", "skipped one r2", "skipped one r3"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				w.decide = func(time.Time, int) agents.Plan {
					return agents.Plan{Actions: []agents.Action{
						{Verb: "one", Target: "r1", Risk: tt.risk}, {Verb: "two", Target: "r1", Risk: agents.RiskAdd},
						{Verb: "one", Target: "r2", Risk: agents.RiskAdd}, {Verb: "one", Target: "r3", Risk: agents.RiskAdd},
					}}
				}
				w.act = func(_ context.Context, a agents.Action) error {
					switch a.Target {
					case "r1":
						return boom
					case "r3":
						return fmt.Errorf("set size: %w", agents.ErrMoot)
					}
					return nil
				}
				rep := &journal{}
				board := w.run(t, agents.Options{Resync: time.Hour, BackoffMin: time.Hour, BackoffMax: time.Hour, Report: rep})
				w.at(time.Second)
				if d := cmp.Diff(tt.want, rep.lines); d != "" {
					t.Errorf("outcomes (-want +got):\n%s", d)
				}
				if s := board.Status(); s.State != agents.Failing || s.LastError != "one r1: boom" {
					t.Errorf("status %s %q, want failing with the first error", s.State, s.LastError)
				}
			})
		})
	}
}

func TestRun_FindingsKeepTheirFirstTimeAndSurviveABlindPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		rep := &journal{}
		w.observe = func(context.Context) (int, error) {
			if len(w.looks) == 3 {
				return 0, errors.New("away")
			}
			return len(w.looks), nil
		}
		w.decide = func(_ time.Time, s int) (p agents.Plan) {
			if s < 5 {
				p.Find(agents.Finding{Code: "pool-filling", Subject: "pool/a", Severity: agents.Warning})
			}
			if s == 2 || s == 4 {
				p.Find(agents.Finding{Code: "node-offline", Subject: "node/b", Severity: agents.Critical})
			}
			return p
		}
		board := w.run(t, agents.Options{Resync: 10 * time.Second, BackoffMin: 10 * time.Second, Report: rep})
		w.at(22500 * time.Millisecond) // after the blind third look and before the fourth, whatever the jitter
		fs := board.Status().Findings
		if len(fs) != 2 || fs[0].Code != "node-offline" || fs[1].Code != "pool-filling" || !fs[1].Since.Equal(w.start) {
			t.Errorf("findings %+v, want node-offline first, and pool-filling since the start", fs)
		}
		w.at(2 * time.Minute)
		want := "raised pool-filling, raised node-offline, cleared node-offline, cleared pool-filling"
		if got := strings.Join(rep.lines, ", "); got != want {
			t.Errorf("reported %s, want %s", got, want)
		}
	})
}

func TestRun_AMootActionLeadsToAnotherLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.decide = func(_ time.Time, s int) (p agents.Plan) {
			if s < 3 {
				p.Add(agents.Action{Verb: "one", Target: "r1", Risk: agents.RiskAdd})
			}
			return p
		}
		w.act = func(context.Context, agents.Action) error { return agents.ErrMoot }
		w.run(t, agents.Options{Resync: time.Hour, BackoffMin: time.Second})
		w.at(time.Minute)
		if got, want := seconds(w.looks), "0.00 1.00 2.00"; got != want {
			t.Errorf("looks at %s s, want %s", got, want)
		}
	})
}

func TestRun_ListenerThatFailsIsStartedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		tries := 0
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = agents.Run(ctx, w, agents.Options{Resync: time.Hour, BackoffMin: time.Second,
				Listen: func(ctx context.Context, s []subject.Subject, wake func(subject.Subject)) error {
					if tries++; tries < 4 {
						return errors.New("bus is away")
					}
					return w.listen(ctx, s, wake)
				}})
		}()
		w.at(10 * time.Second)
		w.wake <- "xostor.v1.xapi.vdi.x"
		w.at(11 * time.Second)
		cancel()
		<-done
		if len(w.looks) != 2 || tries != 4 {
			t.Errorf("%d looks after %d tries to listen, want 2 after 4", len(w.looks), tries)
		}
	})
}

func TestLook_DoesNotAct(t *testing.T) {
	w := newWorld()
	w.decide = func(time.Time, int) (p agents.Plan) {
		p.Add(agents.Action{Verb: "one", Target: "r1"})
		return p
	}
	p, err := agents.Look(t.Context(), w)
	if err != nil || len(p.Actions) != 1 || len(w.acts) != 0 {
		t.Errorf("plan %v, err %v, acted %v; want one planned action and none done", p, err, w.acts)
	}
}

func TestRisk_Above(t *testing.T) {
	order := []agents.Risk{agents.RiskObserve, agents.RiskAdd, agents.RiskMove, agents.RiskRemove}
	for i, a := range order {
		for j, b := range order {
			if got := a.Above(b); got != (i > j) {
				t.Errorf("%s above %s: %v, want %v", a, b, got, i > j)
			}
		}
	}
	if !agents.Risk("typo").Above(agents.RiskRemove) {
		t.Error("an unknown risk must be above every limit")
	}
}

var _ agents.Gate = gate.Chain(nil)

func TestRun_RestSpacesPassesOutUnderAStreamOfWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.observe = func(context.Context) (int, error) { <-time.After(time.Second); return 0, nil } // each look takes a second
		w.run(t, agents.Options{Resync: time.Hour, Settle: 10 * time.Millisecond, Rest: 3})
		for range 200 { // twenty seconds of wakes
			w.wake <- "xostor.v1.xapi.vdi.x"
			w.at(time.Since(w.start) + 100*time.Millisecond)
		}
		if n := len(w.looks); n < 5 || n > 6 {
			t.Errorf("%d looks in 20 s, want one each 4 s: a second of work, three of rest", n)
		}
	})
}
