package agents

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// Log keys that every agent uses.
const (
	KeyAgent   = "agent"
	KeyHost    = "host"
	KeyVerb    = "verb"
	KeyOutcome = "outcome"
	KeyTarget  = "target"
	KeyOn      = "on"
	KeyWhy     = "why"
	KeyErr     = "err"
	KeyFinding = "finding"
	KeySubject = "subject"
	KeyText    = "text"
	KeyFix     = "fix"
	KeyTook    = "took"
)

const agentBug = "agent-bug" // the finding of a panic

// Reporter hears what an agent did and found. Calls come from the agent's loop, one at a time; they should not block.
type Reporter interface {
	Action(Record)
	Finding(f Finding, raised bool) // raised false: it is gone
	Status(Status)
}

// Options are the surroundings of an agent. Zero fields get the defaults of DefaultOptions.
type Options struct {
	Host string // this host's uuid, for status and events
	// Listen delivers wakes until ctx ends: it calls wake for each event on the subjects. It runs on its own goroutine. Nil: no wakes.
	Listen func(ctx context.Context, subjects []subject.Subject, wake func(subject.Subject)) error
	Gate   Gate     // nil: all is permitted
	Report Reporter // nil: nobody listens
	Board  *Board   // where the status is kept; nil: nowhere but Report
	Alive  func()   // called after each finished pass: systemd's watchdog. Nil: none
	Log    *slog.Logger

	Splay       time.Duration // the first pass comes after a random part of this
	Settle      time.Duration // a wake leads to a pass when no other came for this long
	SettleMax   time.Duration // and at this time after the first at the latest
	Resync      time.Duration // a pass without any wake, with 10 % jitter
	PassTimeout time.Duration // deadline of one pass, actions included
	BackoffMin  time.Duration // pause after the first failed pass
	BackoffMax  time.Duration
	// Rest spaces passes out under a stream of wakes: the next one begins no sooner than Rest times the length of the last one after its end.
	Rest float64
	// MaxQuiet bounds the time between two passes, whatever Resync and Recheck say: half the watchdog time. 0: no bound.
	MaxQuiet time.Duration
}

// DefaultOptions are the timings used where an Options field is zero. Splay and MaxQuiet stay zero.
func DefaultOptions() Options {
	return Options{
		Settle: 50 * time.Millisecond, SettleMax: 250 * time.Millisecond,
		Resync: time.Minute, PassTimeout: 30 * time.Second,
		BackoffMin: time.Second, BackoffMax: time.Minute,
	}
}

func (o Options) withDefaults() Options {
	d := DefaultOptions()
	o.Settle, o.SettleMax = cmp.Or(o.Settle, d.Settle), cmp.Or(o.SettleMax, d.SettleMax)
	o.Resync, o.PassTimeout = cmp.Or(o.Resync, d.Resync), cmp.Or(o.PassTimeout, d.PassTimeout)
	o.BackoffMin, o.BackoffMax = cmp.Or(o.BackoffMin, d.BackoffMin), cmp.Or(o.BackoffMax, d.BackoffMax)
	o.Log = cmp.Or(o.Log, slog.New(slog.DiscardHandler))
	o.Board = cmp.Or(o.Board, &Board{})
	if o.Report == nil {
		o.Report = silent{}
	}
	if o.Gate == nil {
		o.Gate = open{}
	}
	if o.Alive == nil {
		o.Alive = func() {}
	}
	return o
}

// open is the gate that permits all.
type open struct{}

func (open) Enter(ctx context.Context, _ Action) (context.Context, func(error), error) {
	return ctx, func(error) {}, nil
}

type silent struct{}

func (silent) Action(Record)         {}
func (silent) Finding(Finding, bool) {}
func (silent) Status(Status)         {}

// Look makes one observation and decides on it, without acting. `xostor plan` prints its result; Run uses it for each pass. A panic of the
// agent comes back as a *PanicError.
func Look[S any](ctx context.Context, a Agent[S]) (p Plan, err error) {
	err = guard(func() error {
		s, err := a.Observe(ctx)
		if err != nil {
			return err
		}
		p = a.Decide(time.Now(), s)
		return nil
	})
	sortFindings(p.Findings)
	return p, err
}

// PanicError is a panic of an agent's code, caught so that it is reported instead of killing the daemon without a word.
type PanicError struct {
	Value any
	Stack []byte
}

// Error implements error.
func (e *PanicError) Error() string { return fmt.Sprintf("agent panicked: %v", e.Value) }

func guard(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	return f()
}

// Run drives the agent until ctx ends, and returns nil then. It never returns because the agent failed: it reports, backs off and tries again.
func Run[S any](ctx context.Context, a Agent[S], o Options) error {
	o = o.withDefaults()
	l := &loop[S]{a: a, o: o, log: o.Log.With(KeyAgent, a.Name()), wakes: make(chan subject.Subject, 1)}
	l.o.Board.update(func(s *Status) {
		*s = Status{Agent: a.Name(), Host: o.Host, State: Starting, Started: time.Now()}
	})
	listening := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(listening)
		l.listen(ctx)
	}()
	// The listener must not outlive Run: it calls back into the loop.
	defer func() { cancel(); <-listening }()

	wait := time.Duration(rand.Float64() * float64(o.Splay))
	wakeable := true // a pause after a failure is not cut short by wakes
	for l.pause(ctx, wait, wakeable) {
		start := time.Now()
		wait, wakeable = l.pass(ctx)
		if rest := time.Duration(o.Rest * float64(time.Since(start))); !sleep(ctx, min(rest, wait)) {
			break
		}
	}
	return nil
}

type loop[S any] struct {
	a        Agent[S]
	o        Options
	log      *slog.Logger
	wakes    chan subject.Subject
	found    []Finding // of the last pass
	failures int       // passes failed in a row
}

// listen keeps the subscription alive. A listener that fails is started again; meanwhile resyncs carry the agent.
func (l *loop[S]) listen(ctx context.Context) {
	if l.o.Listen == nil {
		return
	}
	wake := func(s subject.Subject) {
		l.o.Board.update(func(st *Status) { st.Wakes++ })
		select {
		case l.wakes <- s:
		default: // a look is already due; it will see this change too
		}
	}
	for ctx.Err() == nil {
		err := guard(func() error { return l.o.Listen(ctx, l.a.Wakes(), wake) })
		if ctx.Err() != nil {
			return
		}
		l.log.Debug("listening ended", KeyErr, err)
		sleep(ctx, l.o.BackoffMin)
	}
}

// pause waits for d, or less when a wake comes and wakeable is set; then for the wakes to settle. It returns false when ctx ended.
func (l *loop[S]) pause(ctx context.Context, d time.Duration, wakeable bool) bool {
	if !wakeable {
		return sleep(ctx, d)
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	case <-l.wakes:
	}
	latest := time.After(l.o.SettleMax)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-l.wakes:
		case <-time.After(l.o.Settle):
			return true
		case <-latest:
			return true
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return ctx.Err() == nil // both may be ready
	}
}

// pass looks, decides and acts once, and says when the next pass is due and whether a wake may bring it forward.
func (l *loop[S]) pass(run context.Context) (next time.Duration, wakeable bool) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(run, l.o.PassTimeout)
	defer cancel()

	plan, err := Look(ctx, l.a)
	if run.Err() != nil {
		return 0, false // the daemon is being stopped: whatever the pass saw is no news
	}
	var records []Record
	if err == nil {
		records, err = l.act(ctx, plan.Actions)
	} else {
		// Nothing was seen, so nothing is known to be mended: what was found before stays.
		plan.Findings = l.known()
	}
	panicked := l.reportPanic(err, &plan)
	l.reportFindings(plan.Findings)

	if slices.ContainsFunc(records, func(r Record) bool { return r.Outcome == Moot }) {
		plan.RecheckIn(l.o.BackoffMin) // the world had moved on since the look
	}
	next, wakeable = l.due(plan, err)
	st := l.o.Board.update(func(s *Status) {
		s.LastPass, s.LastTook, s.NextPass = time.Now(), time.Since(start), time.Now().Add(next)
		s.Passes++
		s.Records, s.Findings = records, plan.Findings
		s.State, s.LastError = Healthy, ""
		if err != nil {
			s.State, s.LastError = Failing, err.Error()
			s.Failures++
		}
		if panicked {
			s.Panics++
		}
		for _, r := range records {
			s.count(r.Action.Verb, r.Outcome)
			if r.Outcome == Done || r.Outcome == Failed {
				s.LastAction = &r
			}
		}
	})
	if !panicked {
		l.o.Alive()
	}
	l.o.Report.Status(st)
	return next, wakeable
}

// due turns the plan and the outcome into the time of the next pass.
func (l *loop[S]) due(p Plan, err error) (next time.Duration, wakeable bool) {
	if err == nil {
		l.failures = 0
		next = l.o.Resync + time.Duration((rand.Float64()-0.5)*0.2*float64(l.o.Resync))
		if p.Recheck > 0 {
			next = min(next, p.Recheck)
		}
	} else {
		l.log.Warn("pass failed", KeyErr, err)
		next = l.o.BackoffMax
		if d := l.o.BackoffMin << min(l.failures, 20); d > 0 { // a shift that overflows is the maximum too
			next = min(next, d)
		}
		next = next/2 + time.Duration(rand.Float64()*float64(next/2))
		l.failures++
	}
	if l.o.MaxQuiet > 0 {
		next = min(next, l.o.MaxQuiet)
	}
	return next, err == nil
}

// act carries out the actions in order. Its error is the first failure.
func (l *loop[S]) act(ctx context.Context, actions []Action) (records []Record, first error) {
	failed := map[string]bool{}
	stop := false
	for _, a := range actions {
		r := Record{Action: a, At: time.Now()}
		var err error
		if stop || failed[a.Target] {
			r.Outcome = Skipped
		} else {
			r.Outcome, err = l.actOne(ctx, a)
		}
		r.Took = time.Since(r.At)
		if err != nil {
			r.Error = err.Error()
		}
		if r.Outcome == Failed {
			failed[a.Target] = true
			stop = stop || a.Risk.Above(RiskAdd)
			if first == nil {
				first = fmt.Errorf("%s %s: %w", a.Verb, a.Target, err)
			}
		}
		l.logRecord(r)
		l.o.Report.Action(r)
		records = append(records, r)
	}
	return records, first
}

func (l *loop[S]) actOne(ctx context.Context, a Action) (Outcome, error) {
	entered, leave, err := l.o.Gate.Enter(ctx, a)
	if err != nil {
		if _, no := errors.AsType[*Refusal](err); no {
			return Withheld, err
		}
		return Failed, fmt.Errorf("ask permission: %w", err)
	}
	err = guard(func() error { return l.a.Act(entered, a) })
	outcome := Done
	// A permission taken back is the gate's doing, whatever error the action made of its cancelled context.
	if lost, no := errors.AsType[*Refusal](context.Cause(entered)); no && err != nil {
		outcome, err = Withheld, lost
	} else if errors.Is(err, ErrMoot) {
		outcome = Moot
	} else if err != nil {
		outcome = Failed
	}
	if outcome == Failed {
		leave(err)
	} else {
		leave(nil)
	}
	return outcome, err
}

// logRecord writes one line per action: what changed the world is Info, why nothing was done is Debug.
func (l *loop[S]) logRecord(r Record) {
	level := slog.LevelDebug
	switch r.Outcome {
	case Done:
		level = slog.LevelInfo
	case Failed:
		level = slog.LevelError
	}
	l.log.Log(context.Background(), level, "action", KeyOutcome, string(r.Outcome), KeyVerb, r.Action.Verb, KeyTarget, r.Action.Target,
		KeyOn, r.Action.On, KeyWhy, r.Action.Why, KeyTook, r.Took, KeyErr, r.Error)
}

// reportPanic makes a panic loud: a log line with the stack and a finding. It tells whether there was one.
func (l *loop[S]) reportPanic(err error, p *Plan) bool {
	pe, ok := errors.AsType[*PanicError](err)
	if ok {
		l.log.Error("agent panicked", KeyErr, pe.Error(), "stack", string(pe.Stack))
		p.Find(Finding{Code: agentBug, Subject: "agent/" + l.a.Name(), Severity: Critical, Text: pe.Error(),
			Fix: "report it with the journal of this unit; the agent tries again, and systemd restarts it if that does not help"})
	}
	return ok
}

// known returns the findings of the last pass that saw something.
func (l *loop[S]) known() (fs []Finding) {
	for _, f := range l.found {
		if f.Code != agentBug {
			fs = append(fs, f)
		}
	}
	return fs
}

// reportFindings stamps each finding with the time it was first seen and reports what is new, changed in severity, or gone.
func (l *loop[S]) reportFindings(fs []Finding) {
	gone := make(map[[2]string]Finding, len(l.found))
	for _, f := range l.found {
		gone[[2]string{f.Code, f.Subject}] = f
	}
	for i := range fs {
		f, k := &fs[i], [2]string{fs[i].Code, fs[i].Subject}
		old, was := gone[k]
		delete(gone, k)
		if f.Since = time.Now(); was {
			f.Since = old.Since
		}
		if !was || old.Severity != f.Severity {
			level := slog.LevelWarn
			if f.Severity == Info {
				level = slog.LevelInfo
			}
			l.log.Log(context.Background(), level, "finding raised", KeyFinding, f.Code, KeySubject, f.Subject, KeyText, f.Text, KeyFix, f.Fix)
			l.o.Report.Finding(*f, true)
		}
	}
	for _, f := range l.found {
		if _, is := gone[[2]string{f.Code, f.Subject}]; is {
			l.log.Info("finding cleared", KeyFinding, f.Code, KeySubject, f.Subject)
			l.o.Report.Finding(f, false)
		}
	}
	l.found = fs
}
