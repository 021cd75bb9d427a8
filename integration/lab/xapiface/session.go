package xapiface

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// session is what a session has besides its row: the context that its blocked calls hang on.
type session struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	host   string // of an emergency login: the only host it is good on; empty for a pool session
}

// activeEvery is how often last_active is written (upstream: 10 minutes in new releases).
const activeEvery = 10 * time.Minute

func (f *Face) openSession(c *Call, user, originator string) (any, error) {
	now := f.db.Now()
	ref, err := f.db.Create("session", map[string]any{
		"this_host": c.Host, "last_active": now, "validation_time": now, "is_local_superuser": true, "originator": originator, "auth_user_name": user,
	})
	if err != nil {
		return nil, err
	}
	f.keepSession(ref, "")
	f.evictSessions(originator)
	return ref, nil
}

func (f *Face) keepSession(ref, host string) {
	ctx, cancel := context.WithCancelCause(f.base)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions[ref] = &session{ctx: ctx, cancel: cancel, host: host}
}

// evictSessions destroys the least recently active sessions of an originator beyond the limit.
func (f *Face) evictSessions(originator string) {
	limit := f.limit
	if originator == "" {
		limit = limit * 4 / 5
	}
	var mine []xapidb.Record
	for _, r := range f.db.Records("session") {
		if r.Get("originator") == originator {
			mine = append(mine, r)
		}
	}
	slices.SortStableFunc(mine, func(a, b xapidb.Record) int {
		return cmp.Compare(a.Get("last_active").(time.Time).Unix(), b.Get("last_active").(time.Time).Unix())
	})
	for len(mine) > limit {
		f.endSession(mine[0].Ref())
		mine = mine[1:]
	}
}

// endSession destroys a session and wakes what is blocked on it with SESSION_INVALID.
func (f *Face) endSession(ref string) {
	f.mu.Lock()
	s := f.sessions[ref]
	delete(f.sessions, ref)
	delete(f.queues, ref)
	f.mu.Unlock()
	if s != nil {
		s.cancel(xapidb.Errorf("SESSION_INVALID", ref))
	}
	_ = f.db.Destroy("session", ref) // Emergency sessions have no row.
}

// checkSession refuses unknown sessions, and emergency sessions for anything but emergency calls on their host.
func (f *Face) checkSession(ref, host string, emergency bool) error {
	f.mu.Lock()
	s := f.sessions[ref]
	f.mu.Unlock()
	if s == nil || s.host != "" && (s.host != host || !emergency) {
		return xapidb.Errorf("SESSION_INVALID", ref)
	}
	if s.host != "" {
		return nil
	}
	if now := f.db.Now(); now.Sub(xapidb.Value[time.Time](f.db, "session", ref, "last_active")) >= activeEvery {
		return f.db.Set("session", ref, "last_active", now)
	}
	return nil
}

// sessionContext is a context that ends with the call's or with its session, whichever is first.
func (f *Face) sessionContext(ctx context.Context, ref string) (context.Context, func()) {
	f.mu.Lock()
	s := f.sessions[ref]
	f.mu.Unlock()
	merged, cancel := context.WithCancelCause(ctx)
	if s == nil {
		cancel(xapidb.Errorf("SESSION_INVALID", ref))
		return merged, func() {}
	}
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	return merged, func() { stop(); cancel(nil) }
}

func (f *Face) login(_ context.Context, c *Call) (any, error) {
	if !c.Local && (c.Str(0) != "root" || c.Str(1) != f.password) {
		return nil, xapidb.Errorf("SESSION_AUTHENTICATION_FAILED", c.Str(0), "Authentication failure")
	}
	return f.openSession(c, c.Str(0), c.Str(3))
}

func (f *Face) localLogin(_ context.Context, c *Call) (any, error) {
	if !c.Local && (c.Str(0) != "root" || c.Str(1) != f.password) {
		return nil, xapidb.Errorf("SESSION_AUTHENTICATION_FAILED", c.Str(0), "Authentication failure")
	}
	ref := "OpaqueRef:" + f.db.NewUUID()
	f.keepSession(ref, c.Host)
	return ref, nil
}

func (f *Face) logout(_ context.Context, c *Call) (any, error) {
	f.endSession(c.Session)
	return nil, nil
}

// guards are the checks of upstream's message_forwarding.ml that come before a behaviour: who may write what the storage manager owns.
func guards() map[string]func(*Call) error {
	g := map[string]func(*Call) error{}
	for _, name := range []string{"SR.set_physical_size", "SR.set_physical_utilisation", "SR.set_virtual_allocation"} {
		g[name] = func(c *Call) error { return c.storageAccess(c.Str(0)) }
	}
	for _, name := range []string{
		"VDI.set_physical_utilisation", "VDI.set_virtual_size", "VDI.set_managed", "VDI.set_missing", "VDI.set_is_a_snapshot", "VDI.set_snapshot_of", "VDI.set_snapshot_time",
		"VDI.set_sharable", "VDI.set_read_only", "VDI.db_forget",
	} {
		g[name] = func(c *Call) error { return c.storageAccess(xapidb.Value[string](c.DB, "VDI", c.Str(0), "SR")) }
	}
	return g
}

// storageAccess asks that the session's other_config has _sm_session = the SR (upstream sm.ml, assert_session_has_internal_sr_access).
func (c *Call) storageAccess(sr string) error {
	if xapidb.Value[map[string]string](c.DB, "session", c.Session, "other_config")["_sm_session"] != sr {
		return xapidb.Errorf("PERMISSION_DENIED", "")
	}
	return nil
}
