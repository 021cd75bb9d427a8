// Package linstor talks to the LINSTOR controller for all agents.
//
// It promises: every call has a deadline; the controller is found again after it moved; a read is all of the answer or
// an error; a mutation is sent at most once after the connection stood; warnings of successful calls are kept; what the
// controller did not say stays unknown (nil), never zero. It does not promise fresh data: disk states, in_use and
// capacities are what the controller last heard. See DESIGN.md.
package linstor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// Defaults of Options.
const (
	DefaultTimeout          = 10 * time.Second
	DefaultSatelliteTimeout = 30 * time.Second
	DefaultMaxResponse      = 128 << 20
	DefaultUserAgent        = "xostor"
)

// Log keys.
const (
	keyController = "controller"
	keyStream     = "stream"
	keyErr        = "err"
	keyDelay      = "delay"
)

// Options configure a Client. Controllers or Resolve is compulsory.
type Options struct {
	// Controllers are the addresses where a controller may run: host, host:port, http://, https://, linstor:// or
	// linstor+ssl://. The default port is 3370, with TLS 3371.
	Controllers []string
	// Resolve gives the addresses when Controllers is empty. It is asked each time a controller must be found, so that hosts
	// which join the pool are known; it must return what it knows within the deadline of ctx.
	Resolve func(ctx context.Context) ([]string, error)
	// Transport replaces the HTTP transport, for tests. TLS and CAFile are then ignored.
	Transport http.RoundTripper
	// TLS is the base of the TLS configuration; nil means the system's roots.
	TLS *tls.Config
	// CAFile is a PEM file with the roots that may sign the controller's certificate.
	CAFile string
	// Token is sent as bearer token (LINSTOR 1.34 and later), never to a host that a redirect chose.
	Token string
	// UserAgent is what the controller logs for every call; keep it stable per agent.
	UserAgent string
	// Timeout bounds one attempt of a call that the controller answers from memory.
	Timeout time.Duration
	// SatelliteTimeout bounds one attempt of a call for which the controller asks satellites. LINSTOR itself has no limit.
	SatelliteTimeout time.Duration
	// MaxResponseBytes bounds an answer.
	MaxResponseBytes int64
	// Log hears controller changes and stream reconnects. nil discards.
	Log *slog.Logger
}

// Client is safe for concurrent use. Close it.
type Client struct {
	opts  Options
	bases []string // Configured controllers as base URLs, in order; nil when Options.Resolve gives them.
	http  *http.Client
	log   *slog.Logger

	ctx    context.Context // Ends with Close; bounds discovery, which outlives the call that started it.
	cancel context.CancelFunc
	flight singleflight.Group
	probes sync.WaitGroup

	mu    sync.Mutex
	base  string        // Current controller, "" when it must be found.
	last  string        // The controller before that, to tell a return from a move.
	moved chan struct{} // Closed when another base takes over; event streams listen.
}

// New checks the options. It does not connect: a pool whose controller is down must still get its agents.
func New(opts Options) (*Client, error) {
	if opts.Timeout <= 0 {
		opts.Timeout = DefaultTimeout
	}
	if opts.SatelliteTimeout <= 0 {
		opts.SatelliteTimeout = DefaultSatelliteTimeout
	}
	if opts.MaxResponseBytes <= 0 {
		opts.MaxResponseBytes = DefaultMaxResponse
	}
	if opts.UserAgent == "" {
		opts.UserAgent = DefaultUserAgent
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	var bases []string
	var err error
	if len(opts.Controllers) > 0 || opts.Resolve == nil {
		if bases, err = parseAddresses(opts.Controllers); err != nil {
			return nil, err
		}
	}
	transport := opts.Transport
	if transport == nil {
		if transport, err = newTransport(opts); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Client{
		opts:   opts,
		bases:  bases,
		http:   &http.Client{Transport: transport, CheckRedirect: keepRedirect},
		log:    opts.Log,
		ctx:    ctx,
		cancel: cancel,
		moved:  make(chan struct{}),
	}, nil
}

// keepRedirect hands redirects to our own code, which knows which of them are safe for a mutation.
func keepRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

func parseAddresses(addresses []string) ([]string, error) {
	var bases []string
	for _, a := range addresses {
		base, err := parseAddress(a)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(bases, base) {
			bases = append(bases, base)
		}
	}
	if len(bases) == 0 {
		return nil, errors.New("configure linstor client: no controller address given; name the hosts that may run linstor-controller")
	}
	return bases, nil
}

func newTransport(opts Options) (*http.Transport, error) {
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if opts.TLS != nil {
		tlsConfig = opts.TLS.Clone()
	}
	if opts.CAFile != "" {
		pem, err := os.ReadFile(opts.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read linstor CA file: %w", err)
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read linstor CA file %s: no PEM certificate in it", opts.CAFile)
		}
	}
	dialer := &net.Dialer{
		Timeout: dialTimeout,
		// The event streams have no heartbeat: only keepalive tells a dead connection from a quiet one.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
	}
	return &http.Transport{
		DialContext:         dialer.DialContext,
		TLSClientConfig:     tlsConfig,
		TLSHandshakeTimeout: dialTimeout,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     90 * time.Second,
		// The controller is in the same pool: compressing 60 MB costs both sides seconds, sending it does not.
		DisableCompression: true,
	}, nil
}

// Close ends discovery and drops idle connections. Calls in flight end by their own contexts.
func (c *Client) Close() {
	c.mu.Lock()
	c.cancel()
	c.mu.Unlock()
	c.probes.Wait()
	c.http.CloseIdleConnections()
}
