// Package bustest has a bus in memory for tests in virtual time.
package bustest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
)

// Wire is a bus.Wire in memory, for use in a bubble of testing/synctest. Each delivery asks Fate what happens to it, so
// that a test chooses loss, duplication, delay and with that reordering.
type Wire struct {
	// Fate says after which delays the message is delivered to one subscription: none is loss, two are a duplicate. It is called one at a
	// time. Default: one delivery at once. Set it before the first use.
	Fate func(m *bus.Message) []time.Duration
	// Max is what MaxPayload returns; larger bodies are refused. Default 64 KiB. Set it before the first use.
	Max int

	mu    sync.Mutex
	subs  map[int]*subscription
	next  int
	inbox int
	cut   bool // Nothing is delivered.

	done   chan struct{}
	flying sync.WaitGroup
}

type subscription struct {
	patterns []bus.Subject
	fn       func(*bus.Message)
	mu       sync.Mutex // One message at a time.
	closed   bool
}

// NewWire is a wire that delivers everything once, in order, at once, until the test ends.
func NewWire(t testing.TB) *Wire {
	w := &Wire{
		subs: map[int]*subscription{}, Max: 64 << 10, Fate: func(*bus.Message) []time.Duration { return []time.Duration{0} },
		done: make(chan struct{}),
	}
	t.Cleanup(func() {
		close(w.done)
		w.flying.Wait()
	})
	return w
}

// MaxPayload implements bus.Wire.
func (w *Wire) MaxPayload() int { return w.Max }

// Publish implements bus.Wire.
func (w *Wire) Publish(m *bus.Message) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(m.Data) > w.Max {
		return fmt.Errorf("publish %s: %d bytes are more than %d", m.Subject, len(m.Data), w.Max)
	}
	if w.cut {
		return fmt.Errorf("publish %s: the wire is cut", m.Subject)
	}
	for _, id := range slices.Sorted(maps.Keys(w.subs)) {
		s := w.subs[id]
		for _, p := range s.patterns {
			if p.Matches(bus.Subject(m.Subject)) {
				for _, d := range w.Fate(m) {
					w.deliver(s, m, d)
				}
				break
			}
		}
	}
	return nil
}

// deliver is called with the lock held. Without delay the order of publishing stays.
func (w *Wire) deliver(s *subscription, m *bus.Message, d time.Duration) {
	d += time.Nanosecond * time.Duration(w.sequence())
	// Not time.AfterFunc: under the race detector of Go 1.26.8 its goroutines crash the detector now and then in a bubble.
	w.flying.Go(func() {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-w.done:
			return
		case <-timer.C:
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.closed {
			s.fn(m)
		}
	})
}

// sequence spreads deliveries of one instant by nanoseconds, because timers of one instant fire in no order.
func (w *Wire) sequence() int {
	w.inbox++
	return 1 + w.inbox%1000
}

// Subscribe implements bus.Wire.
func (w *Wire) Subscribe(fn func(*bus.Message), subjects ...string) (func(), error) {
	s := &subscription{fn: fn}
	for _, p := range subjects {
		s.patterns = append(s.patterns, bus.Subject(p))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := w.next
	w.subs[id] = s
	return func() {
		w.mu.Lock()
		delete(w.subs, id)
		w.mu.Unlock()
		go func() { // From fn itself the lock would be held.
			s.mu.Lock()
			s.closed = true
			s.mu.Unlock()
		}()
	}, nil
}

// Request implements bus.Wire.
func (w *Wire) Request(ctx context.Context, m *bus.Message) (*bus.Message, error) {
	w.mu.Lock()
	served := false
	for _, s := range w.subs {
		for _, p := range s.patterns {
			served = served || p.Matches(bus.Subject(m.Subject))
		}
	}
	w.inbox++
	inbox := fmt.Sprintf("_INBOX.%d", w.inbox)
	cut := w.cut
	w.mu.Unlock()
	if !served && !cut {
		return nil, bus.ErrNoResponder
	}
	got := make(chan *bus.Message, 16)
	stop, err := w.Subscribe(func(m *bus.Message) {
		select {
		case got <- m:
		default:
		}
	}, inbox)
	if err != nil {
		return nil, err
	}
	defer stop()
	request := *m
	request.Reply = inbox
	if err := w.Publish(&request); err != nil {
		return nil, err
	}
	select {
	case m := <-got:
		return m, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Cut stops all deliveries, or lets them go on. Publishing fails meanwhile.
func (w *Wire) Cut(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
}
