package bus

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

const (
	lateFor    = 90 * time.Second // An election takes up to 10 s, and may have to wait for a host that restarts.
	lateBytes  = 4 << 20          // Of bodies that are remembered; what is older is forgotten first.
	lateSettle = 3 * time.Second  // From an election until everything that will be kept without our doing is there.
	lateInAir  = time.Second      // What was heard this recently may be on its way to the store.
	lateAgain  = 5 * time.Second

	lateFamily = subject.Prefix + ".late."
	elected    = server.JSAdvisoryStreamLeaderElectedPre + "." + historyStream
)

// lateSubject is where an event is kept that was not kept when it was published: not on its own subject, on which it was heard already.
func lateSubject(s string) string { return lateFamily + strings.TrimPrefix(s, subject.Prefix+".") }

// trueSubject undoes lateSubject.
func trueSubject(s string) string {
	if rest, ok := strings.CutPrefix(s, lateFamily); ok {
		return subject.Prefix + "." + rest
	}
	return s
}

// recall remembers the events of the last lateFor that this bus heard.
type recall struct {
	mu    sync.Mutex
	heard []heard
	bytes int
}

type heard struct {
	at  time.Time
	key string // Source and id: what makes an event one.
	msg *nats.Msg
}

// eventKey is "" for what is no event.
func eventKey(h nats.Header) string {
	id, source := h.Get(HeaderID), h.Get(HeaderSource)
	if id == "" || source == "" {
		return ""
	}
	return source + "\x00" + id
}

func (r *recall) add(now time.Time, m *nats.Msg) {
	key := eventKey(m.Header)
	if key == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard = append(r.heard, heard{now, key, m})
	r.bytes += len(m.Data)
	n := 0
	for n < len(r.heard) && (r.bytes > lateBytes || now.Sub(r.heard[n].at) > lateFor) {
		r.bytes -= len(r.heard[n].msg.Data)
		r.heard[n] = heard{} // The array behind may live on.
		n++
	}
	r.heard = r.heard[n:]
}

// between are the events heard in the last lateFor, without those that may be on their way to the store.
func (r *recall) between(now time.Time) []heard {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []heard
	for _, h := range r.heard {
		if age := now.Sub(h.at); age <= lateFor && age >= lateInAir {
			all = append(all, h)
		}
	}
	return all
}

// completeHistory adds to the history of a cluster what was published while it had no leader. That is when a host died: the very events that people look for
// afterwards. Each bus remembers what it heard; the one whose host becomes the leader adds what is missing.
func (b *Bus) completeHistory(ctx context.Context) error {
	c, err := b.Connect("xostor-history")
	if err != nil {
		return err
	}
	defer c.Close()
	var memory recall
	for _, s := range historySubjects() {
		if _, err := c.nc.Subscribe(s, func(m *nats.Msg) { memory.add(time.Now(), m) }); err != nil {
			return fmt.Errorf("listen for the history: %w", err)
		}
	}
	leader := make(chan string, 1)
	if _, err := c.nc.Subscribe(elected, func(m *nats.Msg) {
		var a server.JSStreamLeaderElectedAdvisory
		if json.Unmarshal(m.Data, &a) != nil {
			return
		}
		select {
		case <-leader: // Only the newest counts.
		default:
		}
		leader <- a.Leader
	}); err != nil {
		return fmt.Errorf("listen for the history's leader: %w", err)
	}
	due := time.NewTimer(time.Hour)
	due.Stop()
	defer due.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case name := <-leader:
			due.Stop()
			if name == b.opts.ServerName {
				since = time.Now()
				due.Reset(lateSettle)
			}
		case <-due.C:
			n, err := memory.complete(ctx, c.nc)
			switch {
			case err == nil && n > 0:
				b.opts.Log.Info("history completed with what was published while it had no leader", "events", n)
			case err != nil && ctx.Err() == nil:
				b.opts.Log.Debug("complete history", "err", err)
				if time.Since(since) < lateFor {
					due.Reset(lateAgain)
				}
			}
		}
	}
}

// complete adds what is missing to the store and returns the number.
func (r *recall) complete(ctx context.Context, nc *nats.Conn) (int, error) {
	events := r.between(time.Now())
	if len(events) == 0 {
		return 0, nil
	}
	oldest := events[0].at.Add(-time.Minute) // The leader's clock stamps what is kept.
	kept := map[string]bool{}
	err := eachKept(ctx, nc, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &oldest, HeadersOnly: true}, func(m jetstream.Msg) error {
		kept[eventKey(m.Headers())] = true
		return nil
	})
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range events {
		if kept[e.key] {
			continue
		}
		kept[e.key] = true
		n++
		if err := nc.PublishMsg(&nats.Msg{Subject: lateSubject(e.msg.Subject), Header: e.msg.Header, Data: e.msg.Data}); err != nil {
			return 0, fmt.Errorf("add to history: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, historyTimeout)
	defer cancel()
	if err := nc.FlushWithContext(ctx); err != nil {
		return 0, fmt.Errorf("add to history: %w", err)
	}
	return n, nil
}
