package xapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"
)

// maxHops bounds how often one log-in follows HOST_IS_SLAVE, so that two hosts which each name the other end in an error.
const maxHops = 3

// logoutGrace bounds the log-out of a Close whose context has already ended.
const logoutGrace = 5 * time.Second

// login is a log-in under way that all callers share.
type login struct {
	done      chan struct{}
	ref       Ref
	err       error
	abandoned bool // abandoned tells that Close could not wait; the log-in then logs out by itself. Guarded by Client.mu.
}

// session gives the client's session and logs in first when there is none. Concurrent callers share one log-in, which outlives a caller
// that gives up: a log-in cut half way could leave a session behind that nobody knows.
func (c *Client) session(ctx context.Context) (Ref, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return "", ErrClosed
	}
	if c.ref != "" {
		defer c.mu.Unlock()
		return c.ref, nil
	}
	p := c.pending
	if p == nil {
		p = &login{done: make(chan struct{})}
		c.pending = p
		go c.runLogin(p)
	}
	c.mu.Unlock()
	select {
	case <-p.done:
		return p.ref, p.err
	case <-ctx.Done():
		return "", fmt.Errorf("wait for log-in: %w", ctx.Err())
	}
}

func (c *Client) runLogin(p *login) {
	p.ref, p.err = c.logIn(context.Background())
	c.mu.Lock()
	c.ref, c.pending = p.ref, nil
	abandoned := p.abandoned
	c.mu.Unlock()
	close(p.done)
	if abandoned {
		if err := c.logOut(context.Background(), p.ref); err != nil {
			c.log.Warn("session stays behind", "err", err)
		}
	}
}

// logIn opens a session and follows a supporter to its coordinator. A coordinator that moved away again is found from
// the configured host.
func (c *Client) logIn(ctx context.Context) (Ref, error) {
	var ref Ref
	for hop := 0; ; hop++ {
		args := []any{c.cfg.Username, c.cfg.Password, "1.1", c.cfg.Originator}
		err := c.exchange(ctx, c.rpc, xmlWire{}, c.cfg.Timeout, "session.login_with_password", args, sink{into: &ref})
		switch {
		case err == nil && ref.IsNull():
			return "", errors.New("log in: xapi gave no session")
		case err == nil:
			c.log.Debug("logged in", "originator", c.cfg.Originator, "target", c.targetName(c.target()))
			return ref, nil
		case hop >= maxHops || !c.redirect(err):
			return "", fmt.Errorf("log in: %w", err)
		}
	}
}

// redirect moves the client to where a failed log-in says the coordinator is, and tells whether trying again makes sense.
func (c *Client) redirect(err error) bool {
	if c.unix {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var refusal *Error
	if !errors.As(err, &refusal) {
		if c.base == c.home {
			return false
		}
		c.base = c.home
		return true
	}
	if refusal.Code != codeHostIsSlave || len(refusal.Params) == 0 || refusal.Params[0] == "" {
		return false
	}
	next := withHost(c.base, refusal.Params[0])
	c.log.Info("coordinator is another host", "from", c.base.Host, "to", next.Host)
	c.base = next
	return true
}

// withHost gives u with another address, which comes without port and without brackets, and u's own port.
func withHost(u *url.URL, address string) *url.URL {
	host := address
	switch ip := net.ParseIP(address); {
	case u.Port() != "":
		host = net.JoinHostPort(address, u.Port())
	case ip != nil && ip.To4() == nil:
		host = "[" + address + "]"
	}
	return &url.URL{Scheme: u.Scheme, Host: host}
}

// forget drops a session that XAPI no longer knows, unless it has been replaced already.
func (c *Client) forget(session Ref) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ref == session {
		c.ref = ""
	}
}

// lostHost is told that no connection could be made. When that was to a coordinator found through HOST_IS_SLAVE, its session is
// dropped too, so that the next call looks for the coordinator of now, starting from the configured host.
func (c *Client) lostHost(target *url.URL) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.base == target && c.base != c.home {
		c.ref = ""
	}
}

// holds tells whether session is still the client's.
func (c *Client) holds(session Ref) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ref == session
}

// Close logs out all sessions of the client, which also ends a blocked event.from, and refuses further calls. It may be called
// more than once. A context that has already ended still gets the log-out five seconds, because a daemon is often
// closed by the end of its context and XAPI keeps forgotten sessions for a day.
func (c *Client) Close(ctx context.Context) error {
	if ctx.Err() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), logoutGrace)
		defer cancel()
	}
	c.mu.Lock()
	c.closed = true
	p := c.pending
	c.mu.Unlock()
	if p != nil {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
	}
	c.mu.Lock()
	if c.pending != nil {
		c.pending.abandoned = true
	}
	ref := c.ref
	c.ref = ""
	c.mu.Unlock()
	err := errors.Join(c.closeSM(ctx), c.logOut(ctx, ref))
	c.rpc.CloseIdleConnections()
	c.poll.CloseIdleConnections()
	return err
}

func (c *Client) logOut(ctx context.Context, ref Ref) error {
	if ref == "" {
		return nil
	}
	err := c.exchange(ctx, c.rpc, xmlWire{}, c.cfg.Timeout, "session.logout", []any{ref}, sink{})
	if err == nil || sessionLost(err) {
		return nil
	}
	return fmt.Errorf("log out: %w", err)
}

// ThisHost gives the host that this process talks to: over the unix socket, the host it runs on, supporter or
// coordinator (session.get_this_host).
func (c *Client) ThisHost(ctx context.Context) (Ref, error) {
	for attempt := 0; ; attempt++ {
		session, err := c.session(ctx)
		if err != nil {
			return "", fmt.Errorf("call session.get_this_host: %w", err)
		}
		var host Ref
		err = c.exchange(ctx, c.rpc, xmlWire{}, c.cfg.Timeout, "session.get_this_host", []any{session, session}, sink{into: &host})
		if attempt > 0 || !sessionLost(err) {
			return host, err
		}
		c.forget(session)
	}
}

// smKey in a session's other_config names the SR whose storage fields that session may write
// (assert_session_has_internal_sr_access, ocaml/xapi/sm.ml). XAPI puts it on the sessions it hands to SM drivers.
const smKey = "_sm_session"

// smSession is a session apart that carries smKey for one SR at a time, so that the right to write never sticks to ordinary
// calls. The lock is a channel so that waiting for it can be given up.
type smSession struct {
	lock chan struct{}
	ref  Ref
	sr   Ref
}

// asSM runs fn with a session that may write the storage fields of sr and of its VDIs. A refusal matches ErrNoSMSession.
func (c *Client) asSM(ctx context.Context, sr Ref, fn func(session Ref) error) error {
	select {
	case c.sm.lock <- struct{}{}:
		defer func() { <-c.sm.lock }()
	case <-ctx.Done():
		return fmt.Errorf("wait for storage session: %w", ctx.Err())
	}
	for attempt := 0; ; attempt++ {
		err := c.grantSM(ctx, sr)
		if err == nil {
			err = fn(c.sm.ref)
		}
		if sessionLost(err) {
			c.sm.ref, c.sm.sr = "", ""
			if attempt == 0 {
				continue
			}
		}
		if IsCode(err, codePermissionDenied, codeRBACDenied) {
			return fmt.Errorf("%w: %w", ErrNoSMSession, err)
		}
		return err
	}
}

// grantSM makes the storage session hold the right for sr. The caller has the lock.
func (c *Client) grantSM(ctx context.Context, sr Ref) error {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return ErrClosed
	}
	if c.sm.ref == "" {
		// As for the shared session, a log-in cut half way would leave a session behind.
		ref, err := c.logIn(context.WithoutCancel(ctx))
		if err != nil {
			return err
		}
		c.sm.ref, c.sm.sr = ref, ""
	}
	if c.sm.sr == sr {
		return nil
	}
	if c.sm.sr != "" {
		if err := c.dropSMKey(ctx); err != nil {
			return err
		}
	}
	err := c.addSMKey(ctx, sr)
	if IsCode(err, codeMapDuplicateKey) {
		if err = c.dropSMKey(ctx); err == nil {
			err = c.addSMKey(ctx, sr)
		}
	}
	if err == nil {
		c.sm.sr = sr
	}
	return err
}

func (c *Client) addSMKey(ctx context.Context, sr Ref) error {
	return c.asSession(ctx, c.sm.ref, "session.add_to_other_config", c.sm.ref, smKey, sr)
}

// dropSMKey forgets the SR first: when the call fails it is not known whether the key is still there.
func (c *Client) dropSMKey(ctx context.Context) error {
	c.sm.sr = ""
	return c.asSession(ctx, c.sm.ref, "session.remove_from_other_config", c.sm.ref, smKey)
}

// asSession makes a control call with a session of the caller's choice and no renewal.
func (c *Client) asSession(ctx context.Context, session Ref, method string, args ...any) error {
	return c.exchange(ctx, c.rpc, xmlWire{}, c.cfg.Timeout, method, prepend(session, args), sink{})
}

func (c *Client) closeSM(ctx context.Context) error {
	select {
	case c.sm.lock <- struct{}{}:
		defer func() { <-c.sm.lock }()
	case <-ctx.Done():
		return fmt.Errorf("log out storage session: %w", ctx.Err())
	}
	ref := c.sm.ref
	c.sm.ref, c.sm.sr = "", ""
	return c.logOut(ctx, ref)
}
