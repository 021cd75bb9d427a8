package linstor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxRedirects  = 3
	maxErrorBytes = 256 << 10 // An error body is a list of entries; more than this is not LINSTOR.
)

// request is one call. read and mutate fill in what decides about retries.
type request struct {
	method string
	path   string // Escaped, starts with "/".
	query  url.Values
	body   []byte // JSON; nil for none.
	// satellites says that the controller asks satellites, without a time limit of its own.
	satellites bool
	mutation   bool
	header     http.Header
	home       *string // When not nil, learns the base URL after a redirect on the same host.
}

func (r *request) url(base string) string {
	if len(r.query) == 0 {
		return base + r.path
	}
	return base + r.path + "?" + r.query.Encode()
}

// path builds an escaped path: LINSTOR names may contain anything.
func path(parts ...string) string {
	var b strings.Builder
	b.WriteString("/v1")
	for _, p := range parts {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(p))
	}
	return b.String()
}

// connectionError is a failure of the connection rather than an answer: the controller may have moved.
type connectionError struct {
	err    error
	unsent bool // The connection never stood, so the controller cannot have seen the call.
}

func (e *connectionError) Error() string { return e.err.Error() }
func (e *connectionError) Unwrap() error { return e.err }

// read performs an idempotent call. It is repeated once, on a controller found anew, when the connection failed or the
// controller answered 503. decode gets the body of a 2xx answer and must start from nothing each time.
func (c *Client) read(ctx context.Context, r *request, decode func(io.Reader) error) error {
	base, err := c.attempt(ctx, r, decode)
	if err == nil || !c.lost(ctx, r, base, err) {
		return err
	}
	_, err = c.attempt(ctx, r, decode)
	return err
}

// mutate performs a call that changes something. It is repeated only when the connection never stood.
func (c *Client) mutate(ctx context.Context, r *request) (Reply, error) {
	r.mutation = true
	var reply Reply
	decode := func(body io.Reader) error {
		reply = Reply{}
		return decodeEntries(body, &reply.Entries)
	}
	base, err := c.attempt(ctx, r, decode)
	var conn *connectionError
	if err != nil && c.lost(ctx, r, base, err) && errors.As(err, &conn) && conn.unsent {
		base, err = c.attempt(ctx, r, decode)
	}
	if base == "" {
		return Reply{}, err // No controller was found, so nothing was sent.
	}
	if err != nil {
		return Reply{}, uncertain(r, err)
	}
	if slices.ContainsFunc(reply.Entries, Entry.IsError) {
		return reply, &APIError{Status: http.StatusOK, Entries: reply.Entries, Method: r.method, Path: r.path, Controller: base}
	}
	return reply, nil
}

// uncertain marks a mutation that may have been carried out although no answer came.
func uncertain(r *request, err error) error {
	var api *APIError
	var conn *connectionError
	var redirect *redirectError
	switch {
	case errors.As(err, &api), errors.As(err, &redirect):
		return err
	case errors.As(err, &conn) && conn.unsent:
		return err
	default:
		return fmt.Errorf("%s %s: %w, not sent again, read the object back: %w", r.method, r.path, ErrUncertain, err)
	}
}

// lost decides whether err condemns the controller, and whether a second attempt makes sense. A call that timed out
// while satellites were asked says nothing about the controller, and repeating it would double the load.
func (c *Client) lost(ctx context.Context, r *request, base string, err error) bool {
	if base == "" || ctx.Err() != nil {
		return false
	}
	var api *APIError
	var conn *connectionError
	switch {
	case errors.As(err, &conn):
		if conn.timeout() && r.satellites && !conn.unsent {
			return false
		}
		c.forget(base)
		return !conn.timeout() || conn.unsent
	case errors.As(err, &api) && api.Status == http.StatusServiceUnavailable:
		c.forget(base)
		return true
	case errors.Is(err, ErrMalformed):
		c.forget(base) // Something else took the port: the next call proves it.
	}
	return false
}

func (e *connectionError) timeout() bool {
	var n net.Error
	return errors.Is(e.err, context.DeadlineExceeded) || errors.As(e.err, &n) && n.Timeout()
}

// attempt sends the call once to the current controller. base is "" when none was found.
func (c *Client) attempt(ctx context.Context, r *request, decode func(io.Reader) error) (base string, err error) {
	base, _, err = c.current(ctx)
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout(r))
	defer cancel()
	home := base
	r.home = &home
	resp, err := c.send(ctx, r, base)
	if err != nil {
		return base, fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if home != base {
		c.rehome(base, home)
	}
	if resp.StatusCode/100 != 2 {
		return base, c.refusal(resp, r.method, r.path, base)
	}
	if err := c.decode(resp, decode); err != nil {
		return base, fmt.Errorf("%s %s: read answer of %s: %w", r.method, r.path, base, err)
	}
	return base, nil
}

func (c *Client) timeout(r *request) time.Duration {
	if r.satellites {
		return c.opts.SatelliteTimeout
	}
	return c.opts.Timeout
}

// rehome remembers that the controller at base wants to be asked at home (HTTPS on the same host).
func (c *Client) rehome(base, home string) {
	if current, _ := c.known(); current == base {
		c.adopt(home)
	}
}

// send performs one HTTP exchange, following redirects by our rules: to HTTPS or on the same host only, with the same
// method and body, and for a mutation only on the same host. LINSTOR with a keystore redirects /v1 before it looks at
// the call, so a redirected mutation has not been carried out.
func (c *Client) send(ctx context.Context, r *request, base string) (*http.Response, error) {
	origin, err := url.Parse(r.url(base))
	if err != nil {
		return nil, fmt.Errorf("build url: %w", err)
	}
	target := origin
	for range maxRedirects + 1 {
		resp, err := c.exchange(ctx, r, target, target.Hostname() == origin.Hostname())
		if err != nil {
			return nil, err
		}
		location := resp.Header.Get("Location")
		if resp.StatusCode/100 != 3 || location == "" {
			return resp, nil
		}
		_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // Lets the connection be used again.
		_ = resp.Body.Close()
		next, err := target.Parse(location)
		if err != nil {
			return nil, fmt.Errorf("%w: redirect to %q", ErrMalformed, oneLine(location))
		}
		sameHost := next.Hostname() == origin.Hostname()
		switch {
		case r.mutation && !sameHost:
			return nil, &redirectError{to: next.Host}
		case next.Scheme != "https" && !(sameHost && next.Scheme == "http"):
			return nil, &redirectError{to: next.Scheme + "://" + next.Host}
		}
		if sameHost && r.home != nil {
			*r.home = next.Scheme + "://" + next.Host
		}
		target = next
	}
	return nil, fmt.Errorf("%w: more than %d redirects", ErrMalformed, maxRedirects)
}

// redirectError is a redirect that was not followed; nothing was carried out.
type redirectError struct{ to string }

func (e *redirectError) Error() string {
	return fmt.Sprintf("redirected to %s, not followed: configure the address of the controller itself", e.to)
}

func (c *Client) exchange(ctx context.Context, r *request, target *url.URL, trusted bool) (*http.Response, error) {
	var body io.Reader
	if r.body != nil {
		body = bytes.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, target.String(), body)
	if err != nil {
		return nil, fmt.Errorf("build request: %w", err)
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", c.opts.UserAgent)
	if req.Header.Get("Accept") == "" {
		req.Header.Set("Accept", "application/json")
	}
	if r.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.opts.Token != "" && trusted {
		req.Header.Set("Authorization", "Bearer "+c.opts.Token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, &connectionError{err: withoutURL(err), unsent: neverConnected(err)}
	}
	return resp, nil
}

// withoutURL drops the "Get http://...:" that net/http puts in front: the caller names the call already.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func neverConnected(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// decode reads a whole 2xx body. An answer that ends early is a connection error even when what came was valid JSON.
func (c *Client) decode(resp *http.Response, decode func(io.Reader) error) error {
	body := &boundedReader{r: resp.Body, left: c.opts.MaxResponseBytes}
	err := decode(body)
	if err == nil {
		err = onlySpaceLeft(body)
	}
	switch {
	case body.err != nil && !errors.Is(body.err, ErrTooLarge):
		return &connectionError{err: body.err}
	case body.err != nil:
		return body.err
	case err == nil && !body.text.valid():
		// Go's decoder would make one and the same character of any such bytes, and so one name of two.
		return fmt.Errorf("%w: invalid UTF-8", ErrMalformed)
	case err != nil:
		if t := resp.Header.Get("Content-Type"); strings.HasPrefix(t, "text/html") {
			return fmt.Errorf("%w: %s instead of JSON", ErrMalformed, t)
		}
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

// boundedReader limits a body and remembers why it ended.
type boundedReader struct {
	r    io.Reader
	left int64
	err  error // The first error other than io.EOF.
	text utf8Check
}

// utf8Check tells whether a stream of bytes is UTF-8, however it is cut into pieces.
type utf8Check struct {
	bad  bool
	rest []byte // The beginning of a character whose end has not come yet.
}

func (u *utf8Check) add(p []byte) {
	for len(u.rest) > 0 && len(p) > 0 && !u.bad && !utf8.FullRune(u.rest) {
		u.rest, p = append(u.rest, p[0]), p[1:]
	}
	if utf8.FullRune(u.rest) {
		u.bad = u.bad || !utf8.Valid(u.rest)
		u.rest = u.rest[:0]
	}
	// Keep at most the last three bytes for the next piece, if a character begins there and does not end.
	whole := len(p)
	for i := 1; i <= min(3, len(p)); i++ {
		if utf8.RuneStart(p[len(p)-i]) {
			if !utf8.FullRune(p[len(p)-i:]) {
				whole = len(p) - i
			}
			break
		}
	}
	u.bad = u.bad || !utf8.Valid(p[:whole])
	u.rest = append(u.rest, p[whole:]...)
}

// valid is asked at the end: half a character is none.
func (u *utf8Check) valid() bool { return !u.bad && len(u.rest) == 0 }

func (b *boundedReader) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.left <= 0 {
		// A body of exactly the allowed size is fine: look whether one byte more comes.
		var one [1]byte
		n, err := b.r.Read(one[:])
		if n > 0 {
			err = ErrTooLarge
		}
		if err != nil && err != io.EOF { //nolint:errorlint // Readers return io.EOF itself.
			b.err = err
		}
		return 0, err
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	b.text.add(p[:n])
	if err != nil && err != io.EOF { //nolint:errorlint // Readers return io.EOF itself.
		b.err = err
	}
	return n, err
}

// onlySpaceLeft reads on to the end: it must hold nothing, and reaching it proves that the body was complete.
func onlySpaceLeft(r io.Reader) error {
	var buf [512]byte
	for {
		n, err := r.Read(buf[:])
		if len(bytes.TrimSpace(buf[:n])) > 0 {
			return errors.New("text after the JSON value")
		}
		if err == io.EOF { //nolint:errorlint // Readers return io.EOF itself.
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// decodeJSON decodes the one JSON value of a body into v.
func decodeJSON(v any) func(io.Reader) error {
	return func(body io.Reader) error {
		dec := json.NewDecoder(body)
		if err := dec.Decode(v); err != nil {
			return err
		}
		return onlySpaceLeft(dec.Buffered())
	}
}

// decodeEntries decodes a list of entries. An empty body is an empty list; the OpenAPI document's single object is
// accepted as well.
func decodeEntries(body io.Reader, into *[]Entry) error {
	raw, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	raw = bytes.TrimSpace(raw)
	switch {
	case len(raw) == 0:
		return nil
	case raw[0] == '{':
		var one Entry
		if err := json.Unmarshal(raw, &one); err != nil {
			return err
		}
		*into = []Entry{one}
		return nil
	default:
		return json.Unmarshal(raw, into)
	}
}

// refusal turns a non-2xx answer into an APIError.
func (c *Client) refusal(resp *http.Response, method, path, base string) error {
	e := &APIError{Status: resp.StatusCode, Method: method, Path: path, Controller: base}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBytes))
	if err != nil {
		return &connectionError{err: fmt.Errorf("read answer %d: %w", resp.StatusCode, err)}
	}
	if decodeEntries(bytes.NewReader(raw), &e.Entries) != nil {
		e.Entries, e.Text = nil, oneLine(string(raw))
	}
	return e
}
