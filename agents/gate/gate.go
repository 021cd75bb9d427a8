// Package gate has the gates that agents share: which risks are allowed, a breaker for actions that keep failing, and chains of gates.
package gate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
)

// Func makes a gate of a function that only says yes (nil) or no.
type Func func(ctx context.Context, a agents.Action) error

// Enter implements agents.Gate.
func (f Func) Enter(ctx context.Context, a agents.Action) (context.Context, func(error), error) {
	if err := f(ctx, a); err != nil {
		return nil, nil, err
	}
	return ctx, func(error) {}, nil
}

// Chain enters several gates in order and leaves them in reverse. The first refusal leaves those that were entered, with that refusal.
type Chain []agents.Gate

// Enter implements agents.Gate.
func (gs Chain) Enter(ctx context.Context, a agents.Action) (context.Context, func(error), error) {
	var entered []func(error)
	leave := func(err error) {
		for i := len(entered) - 1; i >= 0; i-- {
			entered[i](err)
		}
	}
	for _, g := range gs {
		next, done, err := g.Enter(ctx, a)
		if err != nil {
			leave(err)
			return nil, nil, err
		}
		entered = append(entered, done)
		ctx = next
	}
	return ctx, leave, nil
}

// ObserveOnly refuses everything: `mode = "observe"`, and `xostor plan`.
func ObserveOnly() agents.Gate {
	return Func(func(context.Context, agents.Action) error {
		return &agents.Refusal{Gate: "mode", Why: "this agent only observes"}
	})
}

// UpTo refuses every action that is riskier than limit.
func UpTo(limit agents.Risk) agents.Gate {
	return Func(func(_ context.Context, a agents.Action) error {
		if a.Risk.Above(limit) {
			return &agents.Refusal{Gate: "mode", Why: "risk " + string(a.Risk) + " is above the configured limit " + string(limit)}
		}
		return nil
	})
}

// Breaker stops an agent that keeps failing at the same thing: after Failures failures in a row of one verb on one target it refuses that pair
// for Pause, then lets one try pass. Its zero value never opens.
type Breaker struct {
	Failures int
	Pause    time.Duration

	mu    sync.Mutex
	trips map[[2]string]trip // verb and target of what failed last
}

type trip struct {
	failures int
	until    time.Time
}

// Enter implements agents.Gate.
func (b *Breaker) Enter(ctx context.Context, a agents.Action) (context.Context, func(error), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	k := [2]string{a.Verb, a.Target}
	if t := b.trips[k]; time.Now().Before(t.until) {
		return nil, nil, &agents.Refusal{Gate: "breaker",
			Why: fmt.Sprintf("failed %d times in a row, next try after %s", t.failures, t.until.UTC().Format(time.RFC3339))}
	}
	return ctx, func(err error) { b.record(k, err != nil) }, nil
}

func (b *Breaker) record(k [2]string, failed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !failed || b.Failures <= 0 {
		delete(b.trips, k)
		return
	}
	t := b.trips[k]
	t.failures++
	if t.failures >= b.Failures {
		t.until = time.Now().Add(b.Pause)
	}
	if b.trips == nil {
		b.trips = map[[2]string]trip{}
	}
	b.trips[k] = t
}
