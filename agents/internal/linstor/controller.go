package linstor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

const (
	dialTimeout  = 3 * time.Second
	probeTimeout = 5 * time.Second // One address: health and version together.
)

// errNotLINSTOR marks an address that answers, but not as a LINSTOR controller.
var errNotLINSTOR = errors.New("not a linstor controller")

// Controller returns the base URL of the current controller, and finds it first when it is not known.
// Errors: *NoControllerError, or the context's.
func (c *Client) Controller(ctx context.Context) (string, error) {
	base, _, err := c.current(ctx)
	return base, err
}

// current returns the controller and a channel that is closed when another one takes over.
func (c *Client) current(ctx context.Context) (string, <-chan struct{}, error) {
	if base, moved := c.known(); base != "" {
		return base, moved, nil
	}
	if err := ctx.Err(); err != nil {
		return "", nil, fmt.Errorf("find linstor controller: %w", err)
	}
	// Concurrent callers share one discovery, so it must not die with the first caller's context.
	found := c.flight.DoChan("discover", func() (any, error) { return nil, c.discover() })
	select {
	case <-ctx.Done():
		return "", nil, fmt.Errorf("find linstor controller: %w", ctx.Err())
	case r := <-found:
		if r.Err != nil {
			return "", nil, r.Err
		}
	}
	base, moved := c.known()
	if base == "" {
		return "", nil, &NoControllerError{Hint: "the controller was lost again at once; it is probably moving"}
	}
	return base, moved, nil
}

func (c *Client) known() (string, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.base, c.moved
}

// forget makes the next call look for the controller again. Only the caller that used base may condemn it: another
// call may have found a new one meanwhile.
func (c *Client) forget(base string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.base == base {
		c.base = ""
	}
}

type probeResult struct {
	index int
	base  string // Where the controller answers; differs from the address after a redirect to HTTPS.
	err   error
}

// discover asks all addresses at once and takes the first that proves to be a healthy controller: a dead address
// costs nothing while another one answers.
func (c *Client) discover() error {
	if base, _ := c.known(); base != "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.ctx, probeTimeout)
	defer cancel()
	bases, err := c.addresses(ctx)
	if err != nil {
		return err
	}
	if !c.reserve(len(bases)) {
		return errors.New("find linstor controller: client closed")
	}
	results := make(chan probeResult, len(bases))
	for i, base := range bases {
		go func() {
			defer c.probes.Done()
			home, err := c.probe(ctx, base)
			results <- probeResult{index: i, base: home, err: err}
		}()
	}
	attempts := make([]Attempt, len(bases))
	for range bases {
		r := <-results
		if r.err == nil {
			c.adopt(r.base)
			return nil
		}
		attempts[r.index] = Attempt{Address: bases[r.index], Err: r.err}
	}
	return &NoControllerError{Attempts: attempts, Hint: hint(attempts)}
}

// addresses gives the base URLs where a controller may run.
func (c *Client) addresses(ctx context.Context) ([]string, error) {
	if c.bases != nil {
		return c.bases, nil
	}
	list, err := c.opts.Resolve(ctx)
	if err != nil {
		return nil, fmt.Errorf("find out where linstor controllers may run: %w", err)
	}
	return parseAddresses(list)
}

// reserve counts n probes in, unless the client is closed: Close waits for what was counted.
func (c *Client) reserve(n int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return false
	}
	c.probes.Add(n)
	return true
}

func hint(attempts []Attempt) string {
	for _, a := range attempts {
		var api *APIError
		if errors.As(a.Err, &api) && (api.Status == http.StatusUnauthorized || api.Status == http.StatusForbidden) {
			return "a controller runs but wants credentials: configure its bearer token"
		}
	}
	return "check that linstor-controller runs on one of these hosts and that its REST port is open"
}

// adopt makes base the controller. Streams on another one are told to move.
func (c *Client) adopt(base string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.base = base
	if c.last == base {
		return
	}
	c.last = base
	close(c.moved)
	c.moved = make(chan struct{})
	c.log.Info("found linstor controller", keyController, base)
}

// probe proves that a healthy controller answers at base. /health knows whether the database and the services run;
// only the version tells that it is LINSTOR at all.
func (c *Client) probe(ctx context.Context, base string) (string, error) {
	if err := c.probeHealth(ctx, base); err != nil {
		return "", err
	}
	home := base
	resp, err := c.send(ctx, &request{method: http.MethodGet, path: "/v1/controller/version", home: &home}, base)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return "", c.refusal(resp, http.MethodGet, "/v1/controller/version", base)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "", err
	}
	var v Version
	if err := json.Unmarshal(raw, &v); err != nil || v.Version == "" {
		return "", fmt.Errorf("%w: no version in the answer to /v1/controller/version", errNotLINSTOR)
	}
	return home, nil
}

func (c *Client) probeHealth(ctx context.Context, base string) error {
	resp, err := c.send(ctx, &request{method: http.MethodGet, path: "/health"}, base)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	return fmt.Errorf("/health answered %d: %s", resp.StatusCode, oneLine(string(text)))
}
