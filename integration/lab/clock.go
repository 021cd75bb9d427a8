package lab

import (
	"slices"
	"sync"
	"time"
)

// Clock is the pool's time.
type Clock interface {
	Now() time.Time
	// AfterFunc runs f on its own goroutine when d is over, unless stop is called before. stop tells whether it prevented that.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// WallClock is the time of the machine; inside testing/synctest it is the bubble's.
type WallClock struct{}

// Now implements Clock.
func (WallClock) Now() time.Time { return time.Now() }

// AfterFunc implements Clock.
func (WallClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Manual is a clock that stands still until Advance. The zero value starts at the zero time; Set it first.
type Manual struct {
	mu     sync.Mutex
	now    time.Time
	timers []*manualTimer
}

type manualTimer struct {
	at time.Time
	f  func()
}

// NewManual returns a clock that shows start.
func NewManual(start time.Time) *Manual { return &Manual{now: start} }

// Now implements Clock.
func (m *Manual) Now() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// AfterFunc implements Clock, except that f runs on the goroutine of Advance.
func (m *Manual) AfterFunc(d time.Duration, f func()) func() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := &manualTimer{at: m.now.Add(d), f: f}
	m.timers = append(m.timers, t)
	return func() bool { return m.drop(t) }
}

func (m *Manual) drop(t *manualTimer) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.Index(m.timers, t)
	if i < 0 {
		return false
	}
	m.timers = slices.Delete(m.timers, i, i+1)
	return true
}

// Advance moves the clock by d and runs what became due, in order of time, each at its own moment.
func (m *Manual) Advance(d time.Duration) {
	m.mu.Lock()
	end := m.now.Add(d)
	for {
		next := m.due(end)
		if next == nil {
			break
		}
		m.now = next.at
		m.mu.Unlock()
		next.f()
		m.mu.Lock()
	}
	m.now = end
	m.mu.Unlock()
}

// due takes the earliest timer that is due by end; nil when there is none.
func (m *Manual) due(end time.Time) *manualTimer {
	var first *manualTimer
	for _, t := range m.timers {
		if !t.at.After(end) && (first == nil || t.at.Before(first.at)) {
			first = t
		}
	}
	if first != nil {
		m.timers = slices.DeleteFunc(m.timers, func(t *manualTimer) bool { return t == first })
	}
	return first
}
