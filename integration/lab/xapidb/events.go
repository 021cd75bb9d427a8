package xapidb

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrRestarted is returned by a From that was blocked when Restart was called.
var ErrRestarted = errors.New("xapi restarted")

// Event is one entry of a batch. Class is lower case, as on the wire. Snapshot is nil for "del". ID is the row's generation.
type Event struct {
	ID        int64
	Class     string
	Operation string // add, mod, del
	Ref       string
	Snapshot  *Record
}

// Batch is the reply of event.from. ValidRefCounts has an entry for every class, in lower case; messages are files and count 0.
type Batch struct {
	Events         []Event
	ValidRefCounts map[string]int
	Token          string
}

type subscription struct {
	all   bool
	class string // lower case
	ref   string // empty: every object of the class
}

func parseSubscriptions(classes []string) []subscription {
	subs := make([]subscription, 0, len(classes))
	for _, c := range classes {
		if c == "*" {
			subs = append(subs, subscription{all: true})
			continue
		}
		class, ref, _ := strings.Cut(c, "/")
		subs = append(subs, subscription{class: strings.ToLower(class), ref: ref})
	}
	return subs
}

// selects says whether the subscriptions want the whole class, or else which of its objects.
func selects(subs []subscription, class string) (whole bool, refs []string) {
	for _, s := range subs {
		switch {
		case s.all, s.class == class && s.ref == "":
			return true, nil
		case s.class == class:
			refs = append(refs, s.ref)
		}
	}
	slices.Sort(refs)
	return false, slices.Compact(refs)
}

// Token renders a position: the database generation and the message generation.
func Token(generation, messages int64) string {
	return fmt.Sprintf("%020d,%020d", generation, messages)
}

func parseToken(token string) (generation, messages int64, err error) {
	if token == "" {
		return 0, 0, nil
	}
	g, m, ok := strings.Cut(token, ",")
	generation, gerr := strconv.ParseInt(g, 10, 64)
	messages, merr := strconv.ParseInt(m, 10, 64)
	if !ok || gerr != nil || merr != nil {
		return 0, 0, Errorf("EVENT_FROM_TOKEN_PARSE_FAILURE", token)
	}
	return generation, messages, nil
}

// longTimeout stands for "no timeout": what current XAPI makes of a negative one.
const longTimeout = 24 * time.Hour

// From is event.from: the difference between the token's state and now for the given classes ("*", "class" or "class/ref"), at once when there is one, else
// as soon as there is one, else an empty batch with the same token when the timeout is over. The order is messages, adds, mods, dels. It returns the cause of ctx
// when that ends first, ErrRestarted, or EVENT_FROM_TOKEN_PARSE_FAILURE.
func (db *DB) From(ctx context.Context, classes []string, token string, timeout time.Duration) (Batch, error) {
	since, sinceMsg, err := parseToken(token)
	if err != nil {
		return Batch{}, err
	}
	if timeout < 0 {
		timeout = longTimeout
	}
	subs := parseSubscriptions(classes)
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	expired := timeout == 0
	for {
		batch, wait := db.attempt(subs, &since, &sinceMsg, expired)
		if wait == nil {
			return batch, nil
		}
		select {
		case <-ctx.Done():
			return Batch{}, context.Cause(ctx)
		case <-wait.restarted:
			return Batch{}, ErrRestarted
		case <-timer.C:
			expired = true
		case <-wait.changed:
			expired, err = pace(ctx, wait.pacing, timer)
			if err != nil {
				return Batch{}, err
			}
		}
	}
}

type waiting struct {
	changed, restarted <-chan struct{}
	pacing             time.Duration
}

func pace(ctx context.Context, d time.Duration, deadline *time.Timer) (expired bool, err error) {
	if d <= 0 {
		return false, nil
	}
	pause := time.NewTimer(d)
	defer pause.Stop()
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-deadline.C:
		return true, nil
	case <-pause.C:
		return false, nil
	}
}

// attempt collects once. It returns what to wait for when there is nothing to report yet, and moves since past what it has looked at.
func (db *DB) attempt(subs []subscription, since, sinceMsg *int64, expired bool) (Batch, *waiting) {
	db.mu.Lock()
	defer db.mu.Unlock()
	var c collection
	last, lastMsg := *since, *sinceMsg
	for _, class := range db.schema.Classes {
		if !class.Events {
			continue
		}
		if class.messages {
			lastMsg = db.collect(&c, db.tables[class.Name], subs, *sinceMsg)
			continue
		}
		last = max(last, db.collect(&c, db.tables[class.Name], subs, *since))
	}
	*since, *sinceMsg = last, lastMsg
	if c.empty() && !expired {
		if db.changed == nil {
			db.changed = make(chan struct{})
		}
		return Batch{}, &waiting{changed: db.changed, restarted: db.restarted, pacing: db.pacing}
	}
	return Batch{Events: c.ordered(), ValidRefCounts: db.counts(), Token: Token(last, lastMsg)}, nil
}

type collection struct{ messages, adds, mods, dels []Event }

func (c *collection) empty() bool { return len(c.messages)+len(c.adds)+len(c.mods)+len(c.dels) == 0 }

func (c *collection) ordered() []Event { return slices.Concat(c.messages, c.adds, c.mods, c.dels) }

func (c *collection) put(t *table, e Event) {
	e.Class = t.class.lower
	switch {
	case t.class.messages:
		e.ID = 0
		c.messages = append(c.messages, e)
	case e.Operation == "add":
		c.adds = append(c.adds, e)
	case e.Operation == "mod":
		c.mods = append(c.mods, e)
	default:
		c.dels = append(c.dels, e)
	}
}

// collect adds a table's difference since a generation and returns the highest stamp it saw. Rows are kept in the order of their changes, so the cost is the
// number of changes, not of rows.
func (db *DB) collect(c *collection, t *table, subs []subscription, since int64) int64 {
	last := since
	whole, refs := selects(subs, t.class.lower)
	if whole {
		e := t.changes.Back()
		for e != nil && e.Prev() != nil && e.Prev().Value.(*row).modified > since {
			e = e.Prev()
		}
		for ; e != nil; e = e.Next() {
			last = max(last, c.changed(t, e.Value.(*row), since))
		}
	}
	for _, ref := range refs {
		if r, ok := t.rows[ref]; ok {
			last = max(last, c.changed(t, r, since))
		}
	}
	if whole || len(refs) > 0 {
		last = max(last, c.deleted(t, since, func(ref string) bool { return whole || slices.Contains(refs, ref) }))
	}
	return last
}

func (c *collection) changed(t *table, r *row, since int64) int64 {
	if r.modified <= since {
		return 0
	}
	snapshot := t.record(r)
	if r.created > since {
		c.put(t, Event{ID: r.created, Operation: "add", Ref: r.ref, Snapshot: &snapshot})
	} else {
		c.put(t, Event{ID: r.modified, Operation: "mod", Ref: r.ref, Snapshot: &snapshot})
	}
	return r.modified
}

// deleted reports the tombstones that the token's owner has seen alive: created and deleted in between is nothing at all.
func (c *collection) deleted(t *table, since int64, wanted func(ref string) bool) (last int64) {
	for i := len(t.deleted) - 1; i >= 0 && t.deleted[i].deleted > since; i-- {
		d := t.deleted[i]
		if d.created <= since && wanted(d.ref) {
			c.put(t, Event{ID: d.deleted, Operation: "del", Ref: d.ref})
			last = max(last, d.deleted)
		}
	}
	return last
}

func (db *DB) counts() map[string]int {
	m := make(map[string]int, len(db.tables))
	for _, t := range db.tables {
		m[t.class.lower] = len(t.rows)
		if t.class.messages {
			m[t.class.lower] = 0
		}
	}
	return m
}

// Inject is event.inject: it touches the object and returns a token just below the touch. The class is the exact table name; anything that is not there is
// HANDLE_INVALID. The generation moves by two.
func (db *DB) Inject(class, ref string) (string, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, ok := db.tables[class]
	if !ok || t.rows[ref] == nil || t.class.messages {
		return "", Errorf("HANDLE_INVALID", class, ref)
	}
	token := Token(db.generation, db.messageGen)
	db.generation++
	db.touch(t, t.rows[ref], db.generation)
	db.generation++
	db.wake()
	return token, nil
}
