// Package agents runs one concern at a time: look, decide, act, wait.
//
// An Agent observes the world, decides purely, and acts one action at a time; Run drives it. See DESIGN.md for what a pass is and
// what happens when something fails. The package does no I/O of its own.
package agents

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// Agent keeps one thing true. S is its snapshot of the world, made by Observe and read by Decide.
type Agent[S any] interface {
	// Name is the agent's name in commands, subjects and logs, such as "sr-size".
	Name() string
	// Wakes are the subjects whose events hint at a look. Losing one costs at most a resync.
	Wakes() []subject.Subject
	// Observe reads all that Decide needs. It may be partial if the snapshot says so; an error means that nothing can be decided.
	Observe(ctx context.Context) (S, error)
	// Decide is pure: no clock, no I/O, no logger, and the same plan for the same input.
	Decide(now time.Time, s S) Plan
	// Act carries out one action. It re-checks a.Needs at the source of truth first and is safe to repeat. An action that has become
	// needless or wrong meanwhile is not an error: it returns an error matching ErrMoot.
	Act(ctx context.Context, a Action) error
}

// Risk says what an action can cost at worst. Gates and configuration speak in these.
type Risk string

// The risks, mildest first.
const (
	RiskObserve Risk = "observe" // writes nothing that matters to data: records, messages
	RiskAdd     Risk = "add"     // adds: a replica, a property
	RiskMove    Risk = "move"    // moves: changes where data or service is
	RiskRemove  Risk = "remove"  // removes: a replica, a volume
)

// Above tells whether r is riskier than limit. An unknown risk is above every limit.
func (r Risk) Above(limit Risk) bool {
	order := []Risk{RiskObserve, RiskAdd, RiskMove, RiskRemove}
	i := slices.Index(order, r)
	return i < 0 || i > slices.Index(order, limit)
}

// Need is one precondition of an action, as data: the fact Is of the subject Of must still hold when the action is carried out, such as
// {Of: "sr/<uuid>", Fact: "pbd-plugged-on", Is: "<host uuid>"}. The agent that plans it also knows how to check it.
type Need struct {
	Of   string `json:"of"`
	Fact string `json:"fact"`
	Is   string `json:"is"`
}

// Action is one thing to do, as plain data: compared in tests, printed by `xostor plan`, published on the bus.
type Action struct {
	Verb   string            `json:"verb"`           // what, such as "set-sr-size"
	Target string            `json:"target"`         // the object, by its uuid or LINSTOR name
	On     string            `json:"on,omitempty"`   // the host it concerns, empty for the pool
	Args   map[string]string `json:"args,omitempty"` // parameters; sizes in bytes unless the key says otherwise
	Needs  []Need            `json:"needs,omitempty"`
	Risk   Risk              `json:"risk"`
	Why    string            `json:"why"` // one sentence for the operator
}

// Severity ranks findings.
type Severity string

// The severities.
const (
	Info     Severity = "info"
	Warning  Severity = "warning"
	Critical Severity = "critical"
)

// Finding is something that is wrong, or worth knowing, and the next command to run. Code and Subject identify it from pass to pass.
type Finding struct {
	Code     string    `json:"code"`    // stable, such as "thin-pool-filling"
	Subject  string    `json:"subject"` // the object, such as "sr/<uuid>" or "node/<name>"
	Text     string    `json:"text"`
	Fix      string    `json:"fix,omitempty"` // what the operator does next, a command where there is one
	Severity Severity  `json:"severity"`
	Since    time.Time `json:"since"` // set by Run: first seen by this daemon
}

// Plan is what Decide wants. The zero Plan means: all is well, look again at the next resync.
type Plan struct {
	Actions  []Action      `json:"actions"`
	Findings []Finding     `json:"findings"`
	Recheck  time.Duration `json:"recheck"` // look again no later than this; 0 = at the next resync
}

// Add appends an action.
func (p *Plan) Add(a Action) { p.Actions = append(p.Actions, a) }

// Find appends a finding.
func (p *Plan) Find(f Finding) { p.Findings = append(p.Findings, f) }

// RecheckIn makes sure that the next look comes in d at the latest. Durations of zero or less are ignored.
func (p *Plan) RecheckIn(d time.Duration) {
	if d > 0 && (p.Recheck == 0 || d < p.Recheck) {
		p.Recheck = d
	}
}

// sortFindings orders findings by severity (worst first), code and subject, so that status and tests read alike on every pass.
func sortFindings(fs []Finding) {
	rank := func(f Finding) int { return slices.Index([]Severity{Critical, Warning, Info}, f.Severity) }
	slices.SortStableFunc(fs, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Subject, b.Subject))
	})
}

// ErrMoot says that an action is no longer needed or no longer right: its object is gone, or a precondition ended. It is no failure.
var ErrMoot = errors.New("action is moot")

// Gate gives permission for one action at the last moment. Enter returns the context to act under and a function that must be called with the
// action's error when it is over. When the permission is lost meanwhile, that context is cancelled with a *Refusal as its cause. A no is a *Refusal.
type Gate interface {
	Enter(ctx context.Context, a Action) (context.Context, func(error), error)
}

// Refusal is a gate's no, with the reason for the operator. It is recorded, not counted as a failure.
type Refusal struct {
	Gate string // which gate, such as "coordinator", "mode", "breaker"
	Why  string
}

// Error implements error.
func (r *Refusal) Error() string { return r.Gate + ": " + r.Why }
