package feed

import (
	"time"
)

// call is one kind of request to the LINSTOR controller.
type call int

const (
	callPools       call = iota // Storage pools from the controller's cache: cheap.
	callNodes                   // Nodes: cheap.
	callDefinitions             // Resource definitions with their volumes: from memory, but long.
	callProbe                   // Storage pools asked of the satellites: the only way to see thin volumes grow.
	callResources               // View of a few resources: asks satellites.
	callView                    // View of all resources, or of those on a few nodes: asks satellites.
	calls
)

// lane: each runs one call at a time, so that a satellite that hangs does not hold up the cheap calls.
type lane int

const (
	laneCheap lane = iota
	laneCostly
	lanes
)

func (c call) lane() lane {
	if c <= callDefinitions {
		return laneCheap
	}
	return laneCostly
}

func (c call) String() string {
	return [...]string{"cached pools", "nodes", "definitions", "pools", "resources", "all resources"}[c]
}

const (
	poolsEvery       = time.Second
	nodesEvery       = 2 * time.Second
	definitionsEvery = 30 * time.Second       // When nothing hints at a change.
	definitionsGap   = 250 * time.Millisecond // When something does.
	probeFast        = 300 * time.Millisecond
	probeSlow        = 5 * time.Second
	probeNoThin      = time.Minute // Without thin pools only LINSTOR itself changes free space, and it knows.
	growthWindow     = time.Minute
	viewEvery        = 2 * time.Minute        // When nothing hints at a change.
	viewGap          = 250 * time.Millisecond // When something does.
	viewDoubtful     = 5 * time.Second        // While an online satellite does not tell, or tells nonsense, of a volume.
	settle           = 100 * time.Millisecond
	selfLimit        = 5 // What made satellites work for d is not asked again before 5 d after its start,
	ownLimit         = 3 // and what kept us busy for d not before 3 d.
	resourcesAtOnce  = 8
	awayFirst        = 500 * time.Millisecond
	awayLast         = 3 * time.Second // The controller moves often, and a question to one that is not there costs nothing.
	failedLast       = 10 * time.Second
)

// stamp is what we remember of the last call of a kind.
type stamp struct {
	began    time.Time // Zero: never called.
	took     time.Duration
	waited   time.Duration // The part of took until the answer began: the controller's and the satellites'.
	failures int           // In a row.
}

// pollState is all that the choice of the next poll depends on.
type pollState struct {
	last [calls]stamp
	busy [lanes]bool

	thin       bool          // A thin pool exists.
	grew       time.Time     // Last sign that thin volumes grow.
	probeEvery time.Duration // Between two probes outside the growth window.

	doubtful bool // Some replica on an online node has no believable size.

	dirtyDefinitions bool
	dirtyAll         bool
	dirtyNodes       map[string]bool      // Nodes whose volumes changed their size.
	dirty            map[string]time.Time // Resources to read again, and not before when.

	away    int // Failures in a row of the cheap lane. While it is not 0 the controller counts as gone.
	retryAt time.Time
}

// nextPoll chooses what to call now, at most one per idle lane, and when to look again if nothing else happens before.
// It is pure.
func nextPoll(now time.Time, s *pollState) (due []call, wait time.Duration) {
	wait = time.Hour
	for l := range lanes {
		if s.busy[l] {
			continue
		}
		best, at := s.earliest(now, l)
		switch {
		case at.IsZero():
		case !at.After(now):
			due = append(due, best)
		default:
			wait = min(wait, at.Sub(now))
		}
	}
	return due, wait
}

// earliest is the call of a lane that is due first; the zero time when there is none.
func (s *pollState) earliest(now time.Time, l lane) (best call, at time.Time) {
	for c := range calls {
		if c.lane() != l {
			continue
		}
		if t := s.dueAt(now, c); !t.IsZero() && (at.IsZero() || t.Before(at)) {
			best, at = c, t
		}
	}
	return best, at
}

// dueAt is when the call is to be made; the zero time when it is not needed.
func (s *pollState) dueAt(now time.Time, c call) time.Time {
	if s.away > 0 {
		if c == callPools {
			return s.retryAt
		}
		return time.Time{}
	}
	last := s.last[c]
	var at time.Time
	switch c {
	case callPools:
		at = last.began.Add(poolsEvery)
	case callNodes:
		at = last.began.Add(nodesEvery)
	case callDefinitions:
		at = last.limited(pick(s.dirtyDefinitions, definitionsGap, definitionsEvery))
	case callProbe:
		at = last.limited(s.probeGap(now))
	case callResources:
		first := s.firstDirty()
		if first.IsZero() || s.dirtyAll {
			return time.Time{} // The view of all will do it.
		}
		at = later(first, last.limited(settle))
	case callView:
		at = last.limited(pick(s.dirtyAll || len(s.dirtyNodes) > 0, viewGap, pick(s.doubtful, viewDoubtful, viewEvery)))
	}
	if last.began.IsZero() && c != callResources {
		return now
	}
	return at
}

// limited is the earliest time of the next call: gap after the last, later when the last was long, and later after failures.
func (t stamp) limited(gap time.Duration) time.Time {
	gap = max(gap, selfLimit*t.waited, ownLimit*t.took)
	if t.failures > 0 {
		gap = max(gap, min(failedLast, awayFirst<<min(t.failures, 10)))
	}
	return t.began.Add(gap)
}

func (s *pollState) probeGap(now time.Time) time.Duration {
	switch {
	case !s.thin:
		return probeNoThin
	case now.Sub(s.grew) < growthWindow:
		return probeFast
	}
	return max(probeFast, s.probeEvery)
}

func (s *pollState) firstDirty() (first time.Time) {
	for _, at := range s.dirty {
		if first.IsZero() || at.Before(first) {
			first = at
		}
	}
	return first
}

// mark asks for one resource to be read again, a moment later because LINSTOR tells of a change before it stores it.
func (s *pollState) mark(now time.Time, resource string) {
	if _, ok := s.dirty[resource]; ok || s.dirtyAll {
		return
	}
	if len(s.dirty) >= resourcesAtOnce {
		s.markAll()
		return
	}
	if s.dirty == nil {
		s.dirty = map[string]time.Time{}
	}
	s.dirty[resource] = now.Add(settle)
}

// markAll asks for everything to be read again.
func (s *pollState) markAll() {
	s.dirtyAll = true
	clear(s.dirty)
	clear(s.dirtyNodes)
}

// markNode asks for all volumes on a node to be read again.
func (s *pollState) markNode(node string) {
	if s.dirtyNodes == nil {
		s.dirtyNodes = map[string]bool{}
	}
	s.dirtyNodes[node] = true
}

// growing notes a sign that thin volumes grow or are about to.
func (s *pollState) growing(now time.Time) {
	s.grew, s.probeEvery = now, probeFast
}

// probed notes the end of a probe that saw growth or none.
func (s *pollState) probed(now time.Time, growth bool) {
	switch {
	case growth:
		s.growing(now)
	case now.Sub(s.grew) >= growthWindow:
		s.probeEvery = min(probeSlow, 2*max(probeFast, s.probeEvery))
	}
}

func pick(cond bool, yes, no time.Duration) time.Duration {
	if cond {
		return yes
	}
	return no
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
