package xapi

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// Defaults of Config.
const (
	DefaultSocket      = "/var/lib/xcp/xapi" // DefaultSocket is where XAPI listens in dom0 (ocaml/xapi/xapi_globs.ml).
	DefaultTimeout     = 60 * time.Second
	DefaultSlowTimeout = 10 * time.Minute
	DefaultMaxReply    = 128 << 20
	DefaultUserAgent   = "xostor-agents"
)

// MaxRequest is the size in bytes above which XAPI refuses a request (http_limit_max_rpc_size, ocaml/xapi-consts/constants.ml).
const MaxRequest = 300 << 10

// Config says how to reach XAPI and as whom. The zero value is right for a root process in dom0, except that each daemon should name
// its own Originator.
type Config struct {
	// Socket is the path of XAPI's unix socket; DefaultSocket when empty. It is used unless URL is set. Root needs no password there, and on
	// a supporter XAPI itself forwards calls to the coordinator.
	Socket string
	// URL is "https://host[:port]" (or http, for a lab) of any host of the pool. A supporter names its coordinator and
	// the client goes there with the same scheme and port.
	URL string
	// Username and Password log in over URL. Over the socket Username defaults to root and no password is asked.
	Username, Password string
	// Originator names the daemon among XAPI's sessions; "xostor-" and the program's name when empty. XAPI keeps at most 500 sessions per
	// originator. "SM" is refused: that bucket belongs to the storage manager.
	Originator string
	// UserAgent goes with every request; newer XAPI limits callers by it. DefaultUserAgent when empty.
	UserAgent string
	// TLS is used for https; nil means the system's CAs. XCP-ng's own certificate is self-signed by default.
	TLS *tls.Config
	// Timeout bounds every ordinary call, SlowTimeout those that run storage code (SR.scan, SR.update).
	Timeout, SlowTimeout time.Duration
	// MaxReply is the largest reply read, in bytes; DefaultMaxReply when zero. 2,000 VM records are about 10 MB.
	MaxReply int64
	// Dial opens connections instead of the system's dialer; nil outside of tests and tunnels.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Log receives what the client decided on its own (log-ins, moves to another coordinator); slog.Default() when nil.
	Log *slog.Logger
}

// Client is a connection to one pool. All its methods may be used from many goroutines.
type Client struct {
	cfg  Config
	log  *slog.Logger
	unix bool

	rpc  *http.Client // rpc carries calls.
	poll *http.Client // poll carries event.from alone, so that a call never waits behind a long poll.

	mu      sync.Mutex
	base    *url.URL // base is where calls go; moves with HOST_IS_SLAVE.
	home    *url.URL // home is what was configured.
	ref     Ref      // ref is the session, empty before the first log-in and after XAPI forgot it.
	pending *login   // pending is the log-in under way, if any.
	closed  bool

	sm smSession
}

// New checks cfg and makes a Client. It does not connect: a daemon may start before XAPI does, and the first call tells.
func New(cfg Config) (*Client, error) {
	c := &Client{cfg: cfg, unix: cfg.URL == ""}
	if err := c.cfg.complete(); err != nil {
		return nil, fmt.Errorf("configure xapi client: %w", err)
	}
	c.log = c.cfg.Log.With("component", "xapi")
	c.home = &url.URL{Scheme: "http", Host: "localhost"}
	if !c.unix {
		u, err := parseTarget(cfg.URL)
		if err != nil {
			return nil, fmt.Errorf("configure xapi client: %w", err)
		}
		c.home = u
	}
	c.base = c.home
	c.rpc = &http.Client{Transport: c.transport(), CheckRedirect: noRedirect}
	c.poll = &http.Client{Transport: c.transport(), CheckRedirect: noRedirect}
	c.sm.lock = make(chan struct{}, 1)
	return c, nil
}

func (c *Config) complete() error {
	if c.Socket == "" {
		c.Socket = DefaultSocket
	}
	if c.Username == "" {
		if c.URL != "" {
			return errors.New("a URL needs a user name and a password")
		}
		c.Username = "root"
	}
	if c.Originator == "" {
		c.Originator = "xostor-" + filepath.Base(os.Args[0])
	}
	if c.Originator == "SM" {
		return errors.New(`originator "SM" belongs to the storage manager: choose another`)
	}
	if c.UserAgent == "" {
		c.UserAgent = DefaultUserAgent
	}
	if c.Timeout <= 0 {
		c.Timeout = DefaultTimeout
	}
	if c.SlowTimeout <= 0 {
		c.SlowTimeout = max(DefaultSlowTimeout, c.Timeout)
	}
	if c.MaxReply <= 0 {
		c.MaxReply = DefaultMaxReply
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return nil
}

// parseTarget reads a URL that names only a scheme, a host and perhaps a port.
func parseTarget(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("parse URL: %w", err)
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("URL %q: scheme must be https or http", u.Redacted())
	case u.Hostname() == "":
		return nil, fmt.Errorf("URL %q: no host", u.Redacted())
	case u.User != nil:
		return nil, fmt.Errorf("URL %q: name and password go in their own settings", u.Redacted())
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "":
		return nil, fmt.Errorf("URL %q: only scheme, host and port are wanted", u.Redacted())
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}, nil
}

// noRedirect keeps the password from following a redirect; XAPI never sends one.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

func (c *Client) transport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	dial := c.cfg.Dial
	if dial == nil {
		dial = dialer.DialContext
	}
	t := &http.Transport{
		DialContext:         dial,
		TLSClientConfig:     c.cfg.TLS,
		TLSHandshakeTimeout: 10 * time.Second,
		DisableCompression:  true,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     30 * time.Second,
	}
	if c.unix {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, "unix", c.cfg.Socket) }
	}
	return t
}

// wire is one of XAPI's two encodings. sink reads the result; it may have consumed part of one when an error comes back.
type wire interface {
	path() string
	contentType() string
	encode(method string, args []any) ([]byte, error)
	decode(method string, body *bufio.Reader, sink sink) error
}

// sink takes the result of a call: into is filled, or records is called for each member of a map of records.
// A sink with neither drops the result.
type sink struct {
	into    any
	records func(ref Ref, decode func(any) error) error
}

// methodName is what may stand in a request; kolo/xmlrpc does not escape it.
var methodName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]*\.[A-Za-z0-9_.]+$`)

// exchange makes one call with the arguments as given (session included) and no second try.
func (c *Client) exchange(ctx context.Context, hc *http.Client, w wire, limit time.Duration, method string, args []any, out sink) error {
	if !methodName.MatchString(method) {
		return fmt.Errorf("call %.60q: not a method name of XAPI", method)
	}
	body, err := w.encode(method, args)
	if err != nil {
		return fmt.Errorf("encode %s: %w", method, err)
	}
	if len(body) > MaxRequest {
		return fmt.Errorf("encode %s: %w: %d bytes, at most %d; send less in one call", method, ErrRequestTooLarge, len(body), MaxRequest)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	target := c.target()
	err = c.post(ctx, hc, w, target, method, body, out)
	if err == nil {
		return nil
	}
	var refusal *Error
	if errors.As(err, &refusal) {
		return err
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		c.lostHost(target)
	}
	if cause := ctx.Err(); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	var unusable *unusableError
	return &TransportError{
		Method: method, Target: c.targetName(target), Hint: hintFor(err, c.unix, limit), Err: err,
		answered: errors.As(err, &unusable),
	}
}

func (c *Client) post(ctx context.Context, hc *http.Client, w wire, target *url.URL, method string, body []byte, out sink) error {
	u := *target
	u.Path = w.path()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", w.contentType())
	req.Header.Set("User-Agent", c.cfg.UserAgent)
	if isRead(method) {
		// An empty value makes net/http repeat the request when a kept-alive connection turns out dead, and is not sent.
		req.Header["Idempotency-Key"] = []string{}
	}
	resp, err := hc.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			return ue.Err // The method and the target are named by the TransportError.
		}
		return err
	}
	defer resp.Body.Close()
	limited := &limitReader{r: resp.Body, left: c.cfg.MaxReply, limit: c.cfg.MaxReply}
	in := bufio.NewReaderSize(limited, 64<<10)
	if resp.StatusCode != http.StatusOK {
		return notXAPI(fmt.Errorf("answered HTTP %s: %s", resp.Status, firstLine(in)))
	}
	err = w.decode(method, in, out)
	if err == nil {
		// Reading to the end gives the connection back for the next call.
		if _, err = io.Copy(io.Discard, in); err != nil {
			err = fmt.Errorf("read reply: %w", err)
		}
	}
	if err != nil && limited.broken == nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return &unusableError{err}
	}
	return err
}

// isRead tells whether repeating a call does no harm.
func isRead(method string) bool {
	_, name, _ := strings.Cut(method, ".")
	return strings.HasPrefix(name, "get_") || method == "event.from" || method == "event.inject"
}

func (c *Client) target() *url.URL {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.base
}

func (c *Client) targetName(u *url.URL) string {
	if c.unix {
		return c.cfg.Socket
	}
	return u.Host
}

// Call makes a control call over XML-RPC and decodes its result into result, which may be nil. The session is added. Integers arrive as text on
// this wire: decode them into Int. Allowed arguments are strings, Refs, bools, integers, finite floats, times, slices and
// maps with string keys of those; nil is refused. The call is made again once when XAPI has forgotten the session.
func (c *Client) Call(ctx context.Context, result any, method string, args ...any) error {
	return c.withSession(ctx, xmlWire{}, c.cfg.Timeout, sink{into: result}, method, args)
}

// Query is Call over JSON-RPC 2.0, the cheaper wire for large results.
func (c *Client) Query(ctx context.Context, result any, method string, args ...any) error {
	return c.withSession(ctx, jsonWire{}, c.cfg.Timeout, sink{into: result}, method, args)
}

// withSession calls with the client's session and renews that once.
func (c *Client) withSession(ctx context.Context, w wire, limit time.Duration, out sink, method string, args []any) error {
	for attempt := 0; ; attempt++ {
		session, err := c.session(ctx)
		if err != nil {
			return fmt.Errorf("call %s: %w", method, err)
		}
		err = c.exchange(ctx, c.rpc, w, limit, method, prepend(session, args), out)
		if attempt > 0 || !sessionLost(err) {
			return err
		}
		c.forget(session)
	}
}

func prepend(session Ref, args []any) []any {
	return append([]any{session}, args...)
}

// sessionLost tells whether XAPI no longer knows the session: it restarted, or another host is the coordinator now.
func sessionLost(err error) bool { return IsCode(err, codeSessionInvalid, codeHostIsSlave) }

// unusableError is a reply that came whole, or would have, and cannot be used.
type unusableError struct{ error }

func (e *unusableError) Unwrap() error { return e.error }

// limitReader fails, where io.LimitReader would end quietly and look like a cut reply.
type limitReader struct {
	r           io.Reader
	left, limit int64
	broken      error // broken is what the connection failed with.
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, &hintedError{fmt.Errorf("reply is over %d bytes", l.limit), "raise MaxReply if the pool is really this large"}
	}
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	l.left -= int64(n)
	if err != nil && err != io.EOF {
		l.broken = err
	}
	return n, err
}

func notXAPI(err error) error { return &hintedError{err, hintNotXAPI} }

// firstLine gives the beginning of a reply that is not XAPI's, fit for one line of log.
func firstLine(in *bufio.Reader) string {
	b, _ := in.Peek(512)
	s := strings.Join(strings.Fields(strings.ToValidUTF8(string(b), "?")), " ")
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
	if len(s) > 120 {
		s = s[:120]
		for !utf8.ValidString(s) {
			s = s[:len(s)-1]
		}
		s += "..."
	}
	if s == "" {
		return "no body"
	}
	return s
}

// firstByte looks past white space at the first byte of a reply without consuming it.
func firstByte(in *bufio.Reader) (byte, error) {
	for {
		b, err := in.ReadByte()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return 0, fmt.Errorf("empty reply: %w", io.ErrUnexpectedEOF)
			}
			return 0, err
		}
		switch b {
		case ' ', '\t', '\r', '\n':
		default:
			return b, in.UnreadByte()
		}
	}
}
