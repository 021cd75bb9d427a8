package xapiface

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

func (f *Face) eventFrom(ctx context.Context, c *Call) (any, error) {
	ctx, done := f.sessionContext(ctx, c.Session)
	defer done()
	batch, err := f.db.From(ctx, c.Set(0), c.Str(1), seconds(c.Float(2)))
	if errors.Is(err, xapidb.ErrRestarted) {
		return nil, xapidb.Errorf("SESSION_INVALID", c.Session)
	}
	if err != nil {
		return nil, err
	}
	return batch, nil
}

// seconds converts a timeout; what does not fit a Duration (infinity, NaN) is no timeout.
func seconds(s float64) time.Duration {
	const most = float64(1<<62) / float64(time.Second)
	if s != s || s > most || s < -most {
		return -1
	}
	return time.Duration(s * float64(time.Second))
}

func (f *Face) eventInject(_ context.Context, c *Call) (any, error) {
	return f.db.Inject(c.Str(0), c.Str(1))
}

// eventQueue is the subscription of a session that uses the legacy calls.
type eventQueue struct {
	classes map[string]bool
	token   string
	last    int64
}

func (f *Face) eventRegister(_ context.Context, c *Call) (any, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := f.queues[c.Session]
	if q == nil {
		q = &eventQueue{classes: map[string]bool{}, token: xapidb.Token(f.db.Generation(), 0)}
		f.queues[c.Session] = q
	}
	for _, class := range c.Set(0) {
		q.classes[class] = true
	}
	return nil, nil
}

func (f *Face) eventUnregister(_ context.Context, c *Call) (any, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := f.queues[c.Session]
	if q == nil {
		return nil, xapidb.Errorf("SESSION_NOT_REGISTERED", c.Session)
	}
	for _, class := range c.Set(0) {
		delete(q.classes, class)
	}
	if len(q.classes) == 0 {
		delete(f.queues, c.Session)
	}
	return nil, nil
}

// eventNext blocks until the registered classes have changed. Unlike the real one it merges changes as event.from does.
func (f *Face) eventNext(ctx context.Context, c *Call) (any, error) {
	f.mu.Lock()
	q := f.queues[c.Session]
	if q == nil {
		f.mu.Unlock()
		return nil, xapidb.Errorf("SESSION_NOT_REGISTERED", c.Session)
	}
	classes, token := make([]string, 0, len(q.classes)), q.token
	for class := range q.classes {
		classes = append(classes, class)
	}
	f.mu.Unlock()
	ctx, done := f.sessionContext(ctx, c.Session)
	defer done()
	batch, err := f.db.From(ctx, classes, token, -1)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	q.token = batch.Token
	out := make([]any, len(batch.Events))
	for i, ev := range batch.Events {
		q.last++
		m := map[string]any{
			"id": strconv.FormatInt(q.last, 10), "timestamp": strconv.FormatInt(f.db.Now().Unix(), 10) + ".", "class": ev.Class, "operation": ev.Operation,
			"ref": ev.Ref, "obj_uuid": "",
		}
		if ev.Snapshot != nil {
			m["snapshot"], m["obj_uuid"] = *ev.Snapshot, ev.Snapshot.Get("uuid")
		}
		out[i] = m
	}
	return out, nil
}

func (f *Face) eventCurrentID(context.Context, *Call) (any, error) { return f.db.Generation(), nil }
