// Package linstorface is the HTTP face of the stand-in LINSTOR: the REST API and event streams of LINSTOR's controller
// over the model of package linstorsim, with the faults that clients have to survive.
package linstorface

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// Cost says what a call costs a real controller: Mem is answered from memory, Sat asks satellites and has no time limit.
type Cost string

// Costs of calls.
const (
	Mem Cost = "mem"
	Sat Cost = "sat"
)

// Call is one recorded request.
type Call struct {
	Method, Path, Query string
	Cost                Cost
	Status              int
	UserAgent           string
}

// callsKept bounds the record.
const callsKept = 4096

// Face serves one cluster. The zero value is not usable: New makes one.
type Face struct {
	sim *linstorsim.Cluster
	mux *http.ServeMux

	mu      sync.Mutex
	faults  []*Fault
	calls   []Call
	total   map[Cost]int
	servers map[*server]struct{}
	cut     chan struct{} // closed to cut the event streams
	ports   chan struct{} // closed when a port opens or closes
}

// New makes a face over the model.
func New(sim *linstorsim.Cluster) *Face {
	f := &Face{sim: sim, mux: http.NewServeMux(), total: map[Cost]int{}, servers: map[*server]struct{}{}, cut: make(chan struct{}), ports: make(chan struct{})}
	f.routes()
	return f
}

// Handler returns the face as a handler, for tests without a socket of the face's own. A controller that is down aborts
// the connection there, the nearest thing to refusing it.
func (f *Face) Handler() http.Handler { return http.HandlerFunc(f.serve) }

// Calls returns the recorded calls, oldest first; at most the last 4096.
func (f *Face) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// ResetCalls forgets the recorded calls and counts.
func (f *Face) ResetCalls() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.total = nil, map[Cost]int{}
}

// Total returns how many calls of a cost were made since ResetCalls.
func (f *Face) Total(cost Cost) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total[cost]
}

func (f *Face) record(c Call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total[c.Cost]++
	if len(f.calls) == callsKept {
		f.calls = slices.Delete(f.calls, 0, callsKept/4)
	}
	f.calls = append(f.calls, c)
}

func (f *Face) serve(w http.ResponseWriter, r *http.Request) {
	ctl := f.sim.Controller()
	if ctl.Phase != linstorsim.Up || f.fault(Down, r.URL.Path) != nil {
		panic(http.ErrAbortHandler)
	}
	call := Call{Method: r.Method, Path: r.URL.Path, Query: r.URL.RawQuery, UserAgent: r.UserAgent(), Cost: f.cost(r)}
	rec := &statusWriter{ResponseWriter: w, status: http.StatusOK}
	defer func() {
		call.Status = rec.status
		f.record(call)
	}()
	delay := ctl.Delay
	if slow := f.fault(Slow, r.URL.Path); slow != nil {
		delay += slow.Delay
	}
	if !wait(r.Context(), delay) {
		panic(http.ErrAbortHandler)
	}
	if f.disturb(rec, r) {
		return
	}
	f.mux.ServeHTTP(rec, r)
}

func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(code int) {
	w.status = code
	w.ResponseWriter.WriteHeader(code)
}

// Unwrap lets http.ResponseController reach Flush.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// send writes v as JSON, compressed when the client takes gzip and it is worth it, as LINSTOR's server does.
func (f *Face) send(w http.ResponseWriter, r *http.Request, status int, v any) {
	body, err := marshal(v)
	if err != nil {
		panic(fmt.Sprintf("linstorface: encode %T: %v", v, err))
	}
	f.sendBytes(w, r, status, "application/json", body)
}

func marshal(v any) ([]byte, error) {
	if rs, ok := v.([]linstorsim.Resource); ok {
		return linstorsim.AppendResources(nil, rs), nil
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimRight(buf.Bytes(), "\n"), err
}

func (f *Face) sendBytes(w http.ResponseWriter, r *http.Request, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	if t := f.fault(TruncatedJSON, r.URL.Path); t != nil {
		body = body[:len(body)/2]
	}
	if len(body) > 1000 && strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		body = compress(body)
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(status)
	if d := f.fault(DieMidBody, r.URL.Path); d != nil {
		_, _ = w.Write(body[:len(body)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(body) // a client that is gone is its own problem
}

var gzips = sync.Pool{New: func() any {
	z, err := gzip.NewWriterLevel(io.Discard, gzip.BestSpeed)
	if err != nil {
		panic(err) // the level is a constant
	}
	return z
}}

func compress(body []byte) []byte {
	var buf bytes.Buffer
	z := gzips.Get().(*gzip.Writer)
	defer gzips.Put(z)
	z.Reset(&buf)
	_, _ = z.Write(body)
	_ = z.Close() // a bytes.Buffer takes everything
	return buf.Bytes()
}

// reply answers a mutation: the first error entry decides the status.
func (f *Face) reply(w http.ResponseWriter, r *http.Request, success int, rc linstorsim.Reply) {
	if rc == nil {
		rc = linstorsim.Reply{}
	}
	f.send(w, r, httpStatus(rc, success), rc)
}

func httpStatus(rc linstorsim.Reply, success int) int {
	for _, e := range rc {
		if !e.IsError() {
			continue
		}
		switch n := e.Number(); {
		case n >= 300 && n < 400:
			return http.StatusNotFound
		case n >= 400 && n < 500:
			return http.StatusForbidden
		}
		return http.StatusInternalServerError
	}
	return success
}

// server is one listening address. It follows the controller's phase: it does not listen while the controller is down.
type server struct {
	face *Face
	addr string
	open bool // under face.mu
	http *http.Server
	stop chan struct{}
	done chan struct{}
}

// ServeTCP listens on addr ("127.0.0.1:0" picks a port) and returns the address. While the controller is down or starting
// the port refuses connections.
func (f *Face) ServeTCP(addr string) (string, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return "", fmt.Errorf("serve LINSTOR face: %w", err)
	}
	s := &server{face: f, addr: ln.Addr().String(), open: true, stop: make(chan struct{}), done: make(chan struct{})}
	f.mu.Lock()
	f.servers[s] = struct{}{}
	f.mu.Unlock()
	go s.run(ln)
	return s.addr, nil
}

func (s *server) run(ln net.Listener) {
	defer close(s.done)
	for {
		if ln != nil {
			s.http = &http.Server{Handler: s.face.Handler(), ReadHeaderTimeout: 10 * time.Second, ErrorLog: quiet}
			srv, open := s.http, ln
			go func() { _ = srv.Serve(open) }() // always ErrServerClosed or the listener's end
		}
		up := ln != nil
		if !s.await(func() bool { return s.listening() != up }) {
			if s.http != nil {
				_ = s.http.Close()
			}
			if ln != nil {
				_ = ln.Close()
			}
			return
		}
		if up {
			_ = s.http.Close()
			_ = ln.Close() // A server that has not got to its listener yet leaves it open for a moment.
			ln = nil
			s.setOpen(false)
			continue
		}
		// Another process may have taken the port meanwhile: then the controller stays unreachable until the next change.
		again, err := net.Listen("tcp", s.addr)
		if err == nil {
			ln = again
			s.setOpen(true)
		}
	}
}

func (s *server) setOpen(open bool) {
	s.face.mu.Lock()
	defer s.face.mu.Unlock()
	s.open = open
	close(s.face.ports)
	s.face.ports = make(chan struct{})
}

// AwaitPort waits until the port of an address that ServeTCP returned takes connections, or until it refuses them. It follows the
// controller's phase and the fault Down from a goroutine, so both take effect on new connections shortly after they are set.
func (f *Face) AwaitPort(ctx context.Context, addr string, open bool) error {
	for {
		f.mu.Lock()
		changed, is := f.ports, false
		for s := range f.servers {
			is = is || s.addr == addr && s.open
		}
		f.mu.Unlock()
		if is == open {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("await port %s open=%v: %w", addr, open, ctx.Err())
		}
	}
}

func (s *server) listening() bool {
	return s.face.sim.Controller().Phase == linstorsim.Up && !s.face.faultSet(Down)
}

// await blocks until ok holds and returns true, or false when the server is to stop.
func (s *server) await(ok func() bool) bool {
	for {
		changed := s.face.sim.Changed()
		cut := s.face.cutChannel()
		if ok() {
			return true
		}
		select {
		case <-changed:
		case <-cut:
		case <-s.stop:
			return false
		}
	}
}

// StopTCP ends the listener on an address that ServeTCP returned, with its connections.
func (f *Face) StopTCP(addr string) error {
	f.mu.Lock()
	var found *server
	for s := range f.servers {
		if s.addr == addr {
			found = s
			delete(f.servers, s)
		}
	}
	f.mu.Unlock()
	if found == nil {
		return fmt.Errorf("stop LINSTOR face: nothing listens on %s", addr)
	}
	close(found.stop)
	<-found.done
	return nil
}

// Move ends the listener on from and serves on to: the controller was started on another host. It returns the new address.
func (f *Face) Move(from, to string) (string, error) {
	if err := f.StopTCP(from); err != nil {
		return "", err
	}
	return f.ServeTCP(to)
}

// Close ends all listeners and event streams.
func (f *Face) Close() error {
	f.mu.Lock()
	var all []string
	for s := range f.servers {
		all = append(all, s.addr)
	}
	f.mu.Unlock()
	var errs []error
	for _, addr := range all {
		errs = append(errs, f.StopTCP(addr))
	}
	f.CutStreams()
	return errors.Join(errs...)
}
