package agents

import (
	"maps"
	"sync"
	"time"
)

// State says how an agent is doing.
type State string

// The states of an agent.
const (
	Starting State = "starting" // no pass has ended yet
	Healthy  State = "healthy"  // the last pass ended without error
	Failing  State = "failing"  // the last pass ended with an error; LastError says which
)

// Outcome says what became of one action.
type Outcome string

// The outcomes of an action.
const (
	Done     Outcome = "done"
	Failed   Outcome = "failed"
	Withheld Outcome = "withheld" // a gate refused it or took its permission back
	Moot     Outcome = "moot"     // no longer needed or right when it was its turn
	Skipped  Outcome = "skipped"  // not tried, because an action before it failed
)

// Record is one action and what became of it.
type Record struct {
	Action  Action        `json:"action"`
	Outcome Outcome       `json:"outcome"`
	Error   string        `json:"error,omitempty"`
	At      time.Time     `json:"at"`
	Took    time.Duration `json:"took_ns"`
}

// Count is the tally of one verb's outcomes since the daemon started.
type Count map[Outcome]int64

// Status is what an agent tells about itself: shown by `xostor status`, published on the bus.
type Status struct {
	Agent      string           `json:"agent"`
	Host       string           `json:"host"`
	State      State            `json:"state"`
	Started    time.Time        `json:"started"`
	LastPass   time.Time        `json:"last_pass"` // zero: none ended yet
	LastTook   time.Duration    `json:"last_took_ns"`
	NextPass   time.Time        `json:"next_pass"` // the latest moment; a wake comes before it
	LastError  string           `json:"last_error,omitempty"`
	Passes     int64            `json:"passes"`
	Failures   int64            `json:"failures"` // passes that ended with an error
	Panics     int64            `json:"panics"`
	Wakes      int64            `json:"wakes"`
	LastAction *Record          `json:"last_action,omitempty"` // the last one done or failed
	Records    []Record         `json:"records"`               // what became of the last plan
	Findings   []Finding        `json:"findings"`
	Verbs      map[string]Count `json:"verbs"`
}

// Board holds the latest status of one agent. Its zero value is ready.
type Board struct {
	mu sync.Mutex
	s  Status
}

// Status returns a copy that the caller may keep.
func (b *Board) Status() Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.s.clone()
}

// clone copies what a later pass would change in place. Records and findings are replaced whole by each pass, never edited.
func (s Status) clone() Status {
	verbs := make(map[string]Count, len(s.Verbs))
	for verb, c := range s.Verbs {
		verbs[verb] = maps.Clone(c)
	}
	s.Verbs = verbs
	return s
}

func (b *Board) update(f func(*Status)) Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(&b.s)
	return b.s.clone()
}

func (s *Status) count(verb string, o Outcome) {
	if s.Verbs == nil {
		s.Verbs = map[string]Count{}
	}
	if s.Verbs[verb] == nil {
		s.Verbs[verb] = Count{}
	}
	s.Verbs[verb][o]++
}
