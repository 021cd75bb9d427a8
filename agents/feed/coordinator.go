package feed

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	factInterval = time.Second // How often Fact.Holds is asked when nothing tells of changes.
	firstRetry   = 500 * time.Millisecond
	lastRetry    = 15 * time.Second
)

// Fact is something that is true of this host at times: that it is the pool's coordinator.
type Fact struct {
	// Holds tells whether it is true now. It is called often and must not block.
	Holds func() bool
	// Changed has something to receive when Holds may have changed. It may be nil: Holds is asked each second anyway.
	Changed <-chan struct{}
}

// Always is true: for a pool of one host, and for tests.
func Always() Fact { return Fact{Holds: func() bool { return true }} }

// during runs session whenever the fact holds and ends it when it no longer does, until ctx ends. A session that ends by
// itself is begun again after a pause that grows with each failure.
func (f Fact) during(ctx context.Context, session func(ctx context.Context)) {
	failures := 0
	for ctx.Err() == nil {
		if !f.wait(ctx, true) {
			return
		}
		began := time.Now()
		held, cancel := context.WithCancel(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			defer cancel()
			f.wait(held, false)
		}()
		session(held)
		lost := held.Err() != nil
		cancel()
		<-watched
		if lost || time.Since(began) > lastRetry {
			failures = 0
			continue
		}
		pause(ctx, retryIn(failures))
		failures++
	}
}

// wait returns true when Holds says want, false when ctx ends first.
func (f Fact) wait(ctx context.Context, want bool) bool {
	tick := time.NewTicker(factInterval)
	defer tick.Stop()
	for f.Holds() != want {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		case <-f.Changed:
		}
	}
	return ctx.Err() == nil
}

// retryIn is the pause after so many failures in a row: doubling to a ceiling, each shortened at random by up to a half.
func retryIn(failures int) time.Duration {
	d := min(lastRetry, firstRetry<<min(failures, 10))
	return d - rand.N(d/2)
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
