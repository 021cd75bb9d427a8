package linstor_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// seen is one request as the server got it.
type seen struct{ Method, URI, Body, UserAgent, Authorization string }

// server answers like a LINSTOR controller: healthy, with a version, and with the routes of the test. It records the
// calls other than the proof of its health.
type server struct {
	mu    sync.Mutex
	calls []seen
	mux   *http.ServeMux
}

func newServer(routes map[string]http.HandlerFunc) *server {
	s := &server{mux: http.NewServeMux()}
	defaults := map[string]http.HandlerFunc{
		"GET /health":                func(http.ResponseWriter, *http.Request) {},
		"GET /v1/controller/version": answer(200, `{"version":"1.33.1","rest_api_version":"1.27.0","git_hash":"x"}`),
	}
	for pattern, h := range defaults {
		if _, overridden := routes[pattern]; !overridden {
			s.mux.HandleFunc(pattern, h)
		}
	}
	for pattern, h := range routes {
		s.mux.HandleFunc(pattern, h)
	}
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/health" && r.URL.Path != "/v1/controller/version" {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		s.mu.Lock()
		s.calls = append(s.calls, seen{r.Method, r.RequestURI, string(body), r.UserAgent(), r.Header.Get("Authorization")})
		s.mu.Unlock()
	}
	s.mux.ServeHTTP(w, r)
}

func (s *server) seen() []seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]seen(nil), s.calls...)
}

// listen serves s on loopback.
func (s *server) listen(t testing.TB) *httptest.Server {
	t.Helper()
	h := httptest.NewUnstartedServer(s)
	h.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	h.Start()
	t.Cleanup(h.Close)
	return h
}

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// abort kills the connection without an answer.
func abort(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func newClient(t *testing.T, opts linstor.Options) *linstor.Client {
	t.Helper()
	c, err := linstor.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// single starts one controller with the given routes and a client of it.
func single(t *testing.T, routes map[string]http.HandlerFunc) (*linstor.Client, *server) {
	t.Helper()
	s := newServer(routes)
	return newClient(t, linstor.Options{Controllers: []string{s.listen(t).URL}, UserAgent: "xostor-test"}), s
}

// closedPort is an address on which nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// network is hosts in memory, so that timers run under testing/synctest.
type network struct {
	mu    sync.Mutex
	hosts map[string]*host
}

type host struct {
	accept chan net.Conn
	closed chan struct{}
	server *http.Server
	conns  []net.Conn
}

func newNetwork() *network { return &network{hosts: map[string]*host{}} }

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	h := n.hosts[addr]
	n.mu.Unlock()
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	if h == nil {
		return nil, refused
	}
	ours, theirs := net.Pipe()
	select {
	case h.accept <- theirs:
		n.mu.Lock()
		h.conns = append(h.conns, theirs)
		n.mu.Unlock()
		return ours, nil
	case <-h.closed:
		return nil, refused
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	}
}

func (h *host) Accept() (net.Conn, error) {
	select {
	case c := <-h.accept:
		return c, nil
	case <-h.closed:
		return nil, errors.New("host is down")
	}
}
func (h *host) Close() error   { return nil }
func (h *host) Addr() net.Addr { return &net.TCPAddr{} }

// start brings a controller up at addr, for example "a:3370".
func (n *network) start(addr string, handler http.Handler) {
	h := &host{accept: make(chan net.Conn), closed: make(chan struct{})}
	h.server = &http.Server{Handler: handler, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	n.mu.Lock()
	n.hosts[addr] = h
	n.mu.Unlock()
	go func() { _ = h.server.Serve(h) }()
}

// stop takes the controller at addr down; its connections are reset.
func (n *network) stop(addr string) {
	n.mu.Lock()
	h := n.hosts[addr]
	delete(n.hosts, addr)
	n.mu.Unlock()
	close(h.closed)
	_ = h.server.Close()
}

func (n *network) stopAll() {
	n.mu.Lock()
	var addrs []string
	for a := range n.hosts {
		addrs = append(addrs, a)
	}
	n.mu.Unlock()
	for _, a := range addrs {
		n.stop(a)
	}
}

// client connects through the network. Close it and stop all hosts before the bubble ends.
func (n *network) client(t *testing.T, controllers ...string) (*linstor.Client, func()) {
	t.Helper()
	transport := &http.Transport{DialContext: n.dial}
	c, err := linstor.New(linstor.Options{Controllers: controllers, Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	return c, func() {
		c.Close()
		n.stopAll()
		transport.CloseIdleConnections()
	}
}
