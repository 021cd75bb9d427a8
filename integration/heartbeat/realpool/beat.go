package realpool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// Xhad uses the statefile of a host as xhad does, by the model of package statefile: a cycle is a write of the own slot and
// reads of all. It only cycles faster, so that a gap of milliseconds shows.
type Xhad struct {
	Index int
	every time.Duration

	mu     sync.Mutex
	model  *statefile.Model
	served time.Time     // When the last request succeeded.
	gap    time.Duration // Longest time without a success, since Gap was last asked.
	cycles int
	failed int
	err    error
	paused bool
}

// ErrBackwards is a slot whose sequence went back: an old read, or a lost write.
var ErrBackwards = errors.New("a slot went back")

// Beat makes every host but one beat until ctx ends.
func (p *Pool) Beat(ctx context.Context, wg *sync.WaitGroup, every time.Duration) ([]*Xhad, error) {
	x := statefile.Derive(p.o.Timeout)
	var out []*Xhad
	for i, h := range p.Hosts {
		b := &Xhad{Index: i, every: every, model: statefile.NewModel(time.Now(), x, i, len(p.Hosts))}
		c, err := p.Client(ctx, h)
		if err != nil {
			return nil, fmt.Errorf("connect to %s: %w", h.Name, err)
		}
		out = append(out, b)
		wg.Go(func() {
			defer func() { c.Close() }()
			seen := make([]uint32, len(p.Hosts))
			for ctx.Err() == nil {
				select {
				case <-c.Ended(): // The process was started again.
					if fresh, err := p.Client(ctx, h); err == nil {
						c = fresh
					}
				default:
				}
				b.cycle(c, seen)
				select {
				case <-ctx.Done():
				case <-time.After(every):
				}
			}
		})
	}
	return out, nil
}

// cycle is one of xhad's.
func (b *Xhad) cycle(c *nbd.Client, seen []uint32) {
	b.mu.Lock()
	if b.paused {
		b.mu.Unlock()
		return
	}
	b.model.Begin(time.Now())
	op, more := b.model.Next()
	b.mu.Unlock()
	buf := nbd.AlignedBuffer(statefile.HostIO)
	for more {
		off, n := int64(0), len(op.Data)
		if op.Host >= 0 {
			off = statefile.Offset(op.Host)
		}
		var err error
		if op.Write {
			err = c.Write(op.Data, off, true, time.Minute)
		} else {
			err = c.Read(buf[:n], off, time.Minute)
		}
		b.mu.Lock()
		if err != nil {
			b.failed++
		} else {
			b.answered(time.Now())
			if !op.Write && op.Host >= 0 {
				b.check(op.Host, buf[:n], seen)
			}
		}
		b.model.Done(time.Now(), buf[:n], err)
		op, more = b.model.Next()
		if !more && err == nil {
			b.cycles++
		}
		b.mu.Unlock()
	}
}

func (b *Xhad) check(host int, slot []byte, seen []uint32) {
	h, err := statefile.DecodeHost(slot)
	switch {
	case errors.Is(err, statefile.ErrEmpty):
	case err != nil:
		b.err = fmt.Errorf("slot %d: %w", host, err)
	case h.Sequence < seen[host]:
		b.err = fmt.Errorf("%w: host %d's from %d to %d", ErrBackwards, host, seen[host], h.Sequence)
	default:
		seen[host] = h.Sequence
	}
}

// answered ends a gap. The caller holds mu.
func (b *Xhad) answered(now time.Time) {
	if !b.served.IsZero() {
		b.gap = max(b.gap, now.Sub(b.served))
	}
	b.served = now
}

// Pause makes a host's xhad silent, as one whose user space is frozen.
func (b *Xhad) Pause(paused bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.paused, b.served = paused, time.Time{}
}

// Gap is the longest time that this host was without a successful request since the last call, pauses between its cycles
// included.
func (b *Xhad) Gap() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	gap := b.gap
	if now := time.Now(); !b.paused && !b.served.IsZero() {
		gap = max(gap, now.Sub(b.served))
	}
	b.gap = 0
	return gap
}

// Cycles is how many cycles succeeded, how many requests failed, and what was wrong with what was read.
func (b *Xhad) Cycles() (done, failed int, wrong error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cycles, b.failed, b.err
}

// Sees is whom this host sees alive on the statefile: xhad's sfdomain.
func (b *Xhad) Sees() statefile.Set {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.model.Domain(time.Now())
}
