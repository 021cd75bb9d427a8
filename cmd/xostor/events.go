package main

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// eventJSON is an event in the JSON format of CloudEvents 1.0.
type eventJSON struct {
	SpecVersion string          `json:"specversion"`
	ID          string          `json:"id"`
	Source      string          `json:"source"`
	Type        string          `json:"type"`
	Time        time.Time       `json:"time"`
	Subject     string          `json:"subject,omitempty"`
	BusSubject  subject.Subject `json:"bussubject"`
	ContentType string          `json:"datacontenttype,omitempty"`
	Data        json.RawMessage `json:"data,omitempty"`
}

func runEvents(ctx context.Context, c *call) error {
	var since time.Duration
	if c.since != "" {
		var err error
		if since, err = time.ParseDuration(c.since); err != nil || since <= 0 {
			return &usageError{fmt.Sprintf("events: --since %q is not a time span such as 30m or 2h", c.since)}
		}
	}
	patterns := []string{c.subject}
	if c.subject == "" {
		patterns = nil
		for _, family := range []string{"xapi", "linstor", "drbd", "agent"} {
			patterns = append(patterns, subject.Prefix+"."+family+".>")
		}
	}
	conn, err := dialBus(ctx, c)
	if err != nil {
		return err
	}
	defer conn.Close()
	p := &eventPrinter{c: c, seen: map[string]bool{}}
	follow := c.follow || c.since == ""
	if follow {
		// Subscribed before the history is read, so that nothing falls between the two; what comes twice is printed once.
		for _, pattern := range patterns {
			stop, err := bus.SubscribeEvents(conn, bus.Subject(pattern), p.print, nil)
			if err != nil {
				return err
			}
			defer stop()
		}
	}
	if since > 0 {
		for _, pattern := range patterns {
			err := bus.Replay(ctx, conn, time.Now().Add(-since), bus.Subject(pattern), func(e bus.Event) error { p.print(e); return nil })
			if err != nil {
				return err
			}
		}
	}
	if !follow {
		return nil
	}
	if err := conn.Flush(ctx); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// eventPrinter prints events from several subscriptions, each once.
type eventPrinter struct {
	c    *call
	mu   sync.Mutex
	seen map[string]bool
}

const seenMost = 10000 // ids kept to recognise what history and live both bring

func (p *eventPrinter) print(e bus.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	id := e.Source + "\x00" + e.ID
	if p.seen[id] {
		return
	}
	if len(p.seen) >= seenMost {
		clear(p.seen)
	}
	p.seen[id] = true
	if p.c.json {
		_ = json.NewEncoder(p.c.out).Encode(eventJSON{SpecVersion: "1.0", ID: e.ID, Source: e.Source, Type: e.Type, Time: e.Time,
			Subject: e.Key, BusSubject: e.Subject, ContentType: e.DataContentType, Data: e.Data}) // a closed pipe ends the command by signal
		return
	}
	fmt.Fprintf(p.c.out, "%s  %-26s %-38s %s\n", e.Time.Local().Format("15:04:05.000"), e.Type, orDash(e.Key), summary(e))
}

// summary tells an event in a few words. Agents' events are told in full, records by what people look for first.
func summary(e bus.Event) string {
	switch e.Type {
	case dom0.TypeAction:
		var r agents.Record
		if json.Unmarshal(e.Data, &r) == nil {
			return fmt.Sprintf("%s %s: %s", r.Action.Verb, r.Outcome, r.Action.Why)
		}
	case dom0.TypeFinding:
		var f dom0.FindingEvent
		if json.Unmarshal(e.Data, &f) == nil {
			return map[bool]string{true: "raised ", false: "cleared "}[f.Raised] + f.Finding.Code + ": " + f.Finding.Text
		}
	case dom0.TypeStatus:
		var s agents.Status
		if json.Unmarshal(e.Data, &s) == nil {
			return fmt.Sprintf("%s, pass %d took %s, %d findings", s.State, s.Passes, s.LastTook.Round(time.Millisecond), len(s.Findings))
		}
	}
	var named struct {
		Label string `json:"name_label"`
		Name  string `json:"name"`
		Node  string `json:"node"`
	}
	_ = json.Unmarshal(e.Data, &named) // an event without a body has no name
	switch {
	case named.Label != "":
		return named.Label
	case named.Node != "":
		return named.Name + " on " + named.Node
	}
	return named.Name
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
