package xapiface

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// MaxRequest is the size of the largest request body, in bytes (upstream constants.ml, http_limit_max_rpc_size).
const MaxRequest = 300 * 1024

// Endpoint is one listening socket of one host.
type Endpoint struct {
	face    *Face
	host    string
	network string // unix or tcp
	tls     *tls.Config

	mu       sync.Mutex
	address  string
	server   *http.Server
	finished chan struct{}
	closed   bool
}

// ServeUnix serves a host's local socket: every login is root without a password, and a supporter forwards to the coordinator. A stale socket file is replaced.
func (f *Face) ServeUnix(path, hostRef string) (*Endpoint, error) {
	return f.open(&Endpoint{face: f, host: hostRef, network: "unix", address: path})
}

// ServeTCP serves a host over TCP, with TLS when tlsConfig is not nil. An address with port 0 gets a free port, see Endpoint.Addr.
func (f *Face) ServeTCP(addr, hostRef string, tlsConfig *tls.Config) (*Endpoint, error) {
	return f.open(&Endpoint{face: f, host: hostRef, network: "tcp", address: addr, tls: tlsConfig})
}

func (f *Face) open(e *Endpoint) (*Endpoint, error) {
	if err := e.resume(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.endpoints = append(f.endpoints, e)
	f.mu.Unlock()
	if f.down(e.host) {
		e.suspend()
	}
	return e, nil
}

// Addr is the address to dial: host:port, or the path of the socket.
func (e *Endpoint) Addr() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.address
}

// resume listens, unless it does already.
func (e *Endpoint) resume() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.server != nil || e.closed {
		return nil
	}
	if e.network == "unix" {
		if err := os.Remove(e.address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("replace stale socket: %w", err)
		}
	}
	l, err := net.Listen(e.network, e.address)
	if err != nil {
		return fmt.Errorf("serve xapi: %w", err)
	}
	e.address = l.Addr().String()
	if e.tls != nil {
		l = tls.NewListener(l, e.tls)
	}
	e.server = &http.Server{
		Handler: e, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return e.face.base },
	}
	e.finished = make(chan struct{})
	go func(s *http.Server, done chan struct{}) {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			e.face.log.Warn("xapi endpoint ended", "address", e.address, "error", err)
		}
	}(e.server, e.finished)
	return nil
}

// suspend closes the listener and every connection.
func (e *Endpoint) suspend() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.server == nil {
		return
	}
	_ = e.server.Close() // Closing a listener that is in use does not fail in a way that matters here.
	<-e.finished
	e.server = nil
}

// dropConnections cuts every connection and listens on.
func (e *Endpoint) dropConnections() {
	e.mu.Lock()
	serving := e.server != nil
	e.mu.Unlock()
	if !serving {
		return
	}
	e.suspend()
	if err := e.resume(); err != nil {
		e.face.log.Warn("xapi endpoint lost", "address", e.Addr(), "error", err)
	}
}

// Close ends the endpoint for good. It is safe to call twice.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.suspend()
	return nil
}

// ServeHTTP routes by longest prefix: /jsonrpc is JSON-RPC, everything else that is posted is XML-RPC.
func (e *Endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		e.other(w, r)
		return
	}
	if r.ContentLength > MaxRequest {
		refuseLarge(w)
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, MaxRequest+1))
	if err != nil {
		return
	}
	if len(body) > MaxRequest {
		refuseLarge(w)
		return
	}
	if strings.HasPrefix(r.URL.Path, "/jsonrpc") {
		e.serveJSON(w, r, body)
	} else {
		e.serveXML(w, r, body)
	}
}

func refuseLarge(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	http.Error(w, "request larger than 300 KiB", http.StatusRequestEntityTooLarge)
}

// other answers what is no call: the welcome page, and CORS preflight.
func (e *Endpoint) other(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodOptions:
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Access-Control-Allow-Headers", "X-Requested-With")
	case http.MethodGet, http.MethodHead:
		e.write(w, http.StatusOK, "text/html", []byte("<html><body><h1>Stand-in XAPI</h1></body></html>\n"))
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (e *Endpoint) request(r *http.Request, method string, params []any, transport string) request {
	return request{method: method, params: params, host: e.host, local: e.network == "unix", transport: transport, userAgent: r.UserAgent()}
}

func (e *Endpoint) serveXML(w http.ResponseWriter, r *http.Request, body []byte) {
	if !utf8.Valid(body) {
		e.write(w, http.StatusOK, "text/xml", appendXMLReply(nil, "", nil, invalidUTF8(body)))
		return
	}
	name, params, err := parseXML(body)
	if err != nil {
		e.write(w, http.StatusOK, "text/xml", appendXMLReply(nil, "", nil, xapidb.Errorf("INTERNAL_ERROR", "XML-RPC request: "+err.Error())))
		return
	}
	e.answer(w, r, e.request(r, name, params, "xml"), "text/xml", func(v any, failure *xapidb.Error) []byte {
		return appendXMLReply(nil, name, v, failure)
	})
}

func (e *Endpoint) serveJSON(w http.ResponseWriter, r *http.Request, body []byte) {
	if !utf8.Valid(body) {
		e.write(w, http.StatusOK, "application/json", appendJSONReply(nil, jsonCall{two: true}, nil, invalidUTF8(body)))
		return
	}
	call, err := parseJSON(body)
	if err != nil {
		call.two = true
		e.write(w, http.StatusOK, "application/json", appendJSONReply(nil, call, nil, xapidb.Errorf("INTERNAL_ERROR", "JSON-RPC request: "+err.Error())))
		return
	}
	e.answer(w, r, e.request(r, call.method, call.params, "json"), "application/json", func(v any, failure *xapidb.Error) []byte {
		return appendJSONReply(nil, call, v, failure)
	})
}

func invalidUTF8(body []byte) *xapidb.Error {
	return xapidb.Errorf("INVALID_VALUE", "Invalid UTF-8 string in parameter", strings.ToValidUTF8(string(body), "\uFFFD"))
}

// answer runs the call and writes what it gave, or what a fault makes of it.
func (e *Endpoint) answer(w http.ResponseWriter, r *http.Request, q request, contentType string, reply func(any, *xapidb.Error) []byte) {
	if _, ok := e.face.strike(e.host, q.method, Reset); ok {
		e.reset(w)
		return
	}
	if x, ok := e.face.strike(e.host, q.method, Slow); ok {
		pause := time.NewTimer(x.Delay)
		defer pause.Stop()
		select {
		case <-pause.C:
		case <-r.Context().Done():
			return
		}
	}
	if _, ok := e.face.strike(e.host, q.method, HTML); ok {
		e.write(w, http.StatusBadGateway, "text/html", []byte("<html><head><title>502 Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>\n"))
		return
	}
	v, err := e.face.serve(r.Context(), q)
	if r.Context().Err() != nil {
		return
	}
	body := reply(v, asErrorOrNil(err))
	if _, ok := e.face.strike(e.host, q.method, Truncate); ok {
		e.truncate(w, contentType, body)
		return
	}
	e.write(w, http.StatusOK, contentType, body)
}

func (e *Endpoint) header(w http.ResponseWriter, contentType string, length int) {
	h := w.Header()
	h.Set("Connection", "keep-alive")
	h.Set("Cache-Control", "no-cache, no-store")
	h.Set("Content-Type", contentType)
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Headers", "X-Requested-With")
	h.Set("Content-Length", strconv.Itoa(length))
}

func (e *Endpoint) write(w http.ResponseWriter, status int, contentType string, body []byte) {
	e.header(w, contentType, len(body))
	w.WriteHeader(status)
	if _, err := w.Write(body); err != nil {
		e.face.log.Debug("xapi client went away", "error", err)
	}
}

// truncate promises the whole body and ends the connection in its middle.
func (e *Endpoint) truncate(w http.ResponseWriter, contentType string, body []byte) {
	e.header(w, contentType, len(body))
	if _, err := w.Write(body[:len(body)/2]); err != nil {
		e.face.log.Debug("xapi client went away", "error", err)
	}
	_ = http.NewResponseController(w).Flush() // What stays in a buffer makes the cut earlier, no more.
	panic(http.ErrAbortHandler)
}

// reset ends the connection with RST where the transport has one.
func (e *Endpoint) reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // Without it the client sees an orderly end, which is a reset to it just as well.
	}
	_ = conn.Close()
}
