package xapiface

import (
	"context"
	"slices"
	"sync"
	"time"
)

// CallRecord is one call that was answered. Params are as decoded, session first; Error is the XAPI code, empty for success.
type CallRecord struct {
	Time      time.Time
	Host      string
	Transport string // json, xml, direct
	Method    string
	Params    []any
	Error     string
	UserAgent string
}

// callRecord keeps the latest calls.
type callRecord struct {
	mu      sync.Mutex
	limit   int
	list    []CallRecord
	forgot  int // How often the record was emptied.
	changed chan struct{}
}

// begin returns what add wants for a call that begins now.
func (r *callRecord) begin() (forgot int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.forgot
}

// add records a call that has been answered, unless the record was emptied since it began.
func (r *callRecord) add(forgot int, c CallRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.limit < 0 || forgot != r.forgot {
		return
	}
	if len(r.list) >= 2*r.limit {
		r.list = slices.Clone(r.list[len(r.list)-r.limit:])
	}
	r.list = append(r.list, c)
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// Calls returns the remembered calls, oldest first.
func (f *Face) Calls() []CallRecord {
	f.calls.mu.Lock()
	defer f.calls.mu.Unlock()
	return slices.Clone(f.calls.list[max(0, len(f.calls.list)-max(0, f.calls.limit)):])
}

// ForgetCalls empties the record. Calls that have begun and are not answered yet are forgotten too.
func (f *Face) ForgetCalls() {
	f.calls.mu.Lock()
	defer f.calls.mu.Unlock()
	f.calls.list = nil
	f.calls.forgot++
}

// AwaitCall waits until a call for which match holds has been answered, and returns it. Calls that are in the record already count.
func (f *Face) AwaitCall(ctx context.Context, match func(CallRecord) bool) (CallRecord, error) {
	for {
		f.calls.mu.Lock()
		i := slices.IndexFunc(f.calls.list, match)
		if i >= 0 {
			found := f.calls.list[i]
			f.calls.mu.Unlock()
			return found, nil
		}
		if f.calls.changed == nil {
			f.calls.changed = make(chan struct{})
		}
		wait := f.calls.changed
		f.calls.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return CallRecord{}, context.Cause(ctx)
		}
	}
}
