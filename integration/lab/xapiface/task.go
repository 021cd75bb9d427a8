package xapiface

import (
	"context"
	"errors"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// underTask runs a call with a task row: in the background for Async., else in the foreground, where the row goes when the call ends.
func (f *Face) underTask(ctx context.Context, c *Call, fn Handler) (any, error) {
	label := c.Method
	if c.Async {
		label = "Async." + label
	}
	task, err := f.db.Create("task", map[string]any{
		"name_label": label, "created": f.db.Now(), "status": "pending", "resident_on": c.Host, "type": "<none/>", "allowed_operations": []string{"cancel"},
	})
	if err != nil {
		return nil, err
	}
	c.Task = task
	if c.Async {
		ctx = f.base
	}
	ctx, cancel := context.WithCancelCause(ctx)
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		cancel(nil)
		return nil, xapidb.Errorf("INTERNAL_ERROR", "closed")
	}
	f.tasks[task] = cancel
	f.running.Add(1)
	f.mu.Unlock()
	work := func() (any, error) {
		defer f.running.Done()
		defer cancel(nil)
		v, err := fn(ctx, c)
		f.mu.Lock()
		delete(f.tasks, task)
		f.mu.Unlock()
		if cause := context.Cause(ctx); err != nil && cause != nil && errors.Is(err, ctx.Err()) {
			err = cause
		}
		return v, err
	}
	if c.Async {
		go func() {
			v, err := work()
			f.finish(task, v, err)
		}()
		return task, nil
	}
	v, err := work()
	_ = f.db.Destroy("task", task) // A restart may have taken it.
	return v, err
}

// finish writes the outcome of an asynchronous call, status last, so that who waits for the status sees the rest too. The task may have been destroyed meanwhile.
func (f *Face) finish(task string, v any, err error) {
	set := func(field string, v any) { _ = f.db.Set("task", task, field, v) }
	set("allowed_operations", []string{})
	set("finished", f.db.Now())
	set("progress", 1.0)
	switch e := asErrorOrNil(err); {
	case e == nil:
		if v != nil {
			set("result", string(appendXMLValue(nil, v)))
		}
		set("status", "success")
	case e.Code == "TASK_CANCELLED":
		set("error_info", append([]string{e.Code}, e.Params...))
		set("status", "cancelled")
	default:
		set("error_info", append([]string{e.Code}, e.Params...))
		set("status", "failure")
	}
}

func asErrorOrNil(err error) *xapidb.Error {
	if err == nil {
		return nil
	}
	return asError(err)
}

func (f *Face) taskCreate(_ context.Context, c *Call) (any, error) {
	return f.db.Create("task", map[string]any{
		"name_label": c.Str(0), "name_description": c.Str(1), "created": f.db.Now(), "status": "pending", "resident_on": c.Host, "type": "<none/>",
		"allowed_operations": []string{"cancel"},
	})
}

// taskDestroy removes a task that has ended; a pending one is only marked.
func (f *Face) taskDestroy(_ context.Context, c *Call) (any, error) {
	if pending(f.db, c.Str(0)) {
		return nil, f.db.PutInMap("task", c.Str(0), "current_operations", c.Str(0), "destroy")
	}
	return nil, f.db.Destroy("task", c.Str(0))
}

func pending(db *xapidb.DB, task string) bool {
	s := xapidb.Value[string](db, "task", task, "status")
	return s == "pending" || s == "cancelling"
}

// taskCancel ends the context of the call behind the task. A task of task.create has no call: only its status changes.
func (f *Face) taskCancel(_ context.Context, c *Call) (any, error) {
	task := c.Str(0)
	if !pending(f.db, task) {
		return nil, xapidb.Errorf("OPERATION_NOT_ALLOWED", "task is not pending")
	}
	f.mu.Lock()
	cancel := f.tasks[task]
	f.mu.Unlock()
	if err := f.db.Set("task", task, "status", "cancelling"); err != nil {
		return nil, err
	}
	if cancel != nil {
		cancel(xapidb.Errorf("TASK_CANCELLED", task))
	}
	return nil, nil
}
