package linstor_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

// streamServer is a controller with an event stream: it says what the test writes into it.
type streamServer struct {
	*server
	mu        sync.Mutex
	lastIDs   []string // Last-Event-ID of each subscription, spelt as on the wire.
	subscribe chan chan string
}

// newStreamServer serves both streams: each subscription takes a channel from subscribe, writes what comes out of it,
// and ends when it is closed.
func newStreamServer() *streamServer {
	s := &streamServer{subscribe: make(chan chan string, 16)}
	h := func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.lastIDs = append(s.lastIDs, r.Header.Get("Last-Event-ID"))
		s.mu.Unlock()
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		var script chan string
		select {
		case script = <-s.subscribe:
		case <-r.Context().Done():
			return
		}
		for {
			select {
			case text, open := <-script:
				if !open {
					return
				}
				_, _ = io.WriteString(w, text)
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}
	s.server = newServer(map[string]http.HandlerFunc{"GET " + string(linstor.StreamPromotion): h, "GET " + string(linstor.StreamNodes): h})
	return s
}

// next scripts the next subscription.
func (s *streamServer) next(parts ...string) chan string {
	script := make(chan string, len(parts)+1)
	for _, p := range parts {
		script <- p
	}
	s.subscribe <- script
	return script
}

func (s *streamServer) subscriptions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.lastIDs...)
}

// recorder writes down what a handler hears.
type recorder struct {
	mu    sync.Mutex
	lines []string
	start time.Time
}

func newRecorder() *recorder { return &recorder{start: time.Now()} }

func (r *recorder) add(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, fmt.Sprintf(format, args...))
}

func (r *recorder) take() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := strings.Join(r.lines, "; ")
	r.lines = nil
	return got
}

func (r *recorder) handler() linstor.Handler {
	return linstor.Handler{
		Connected: func(controller string) { r.add("connected %s", controller) },
		Lost:      func(err error) { r.add("lost %v", err) },
		Event: func(e linstor.Event) {
			switch {
			case e.MayPromote != nil && e.MayPromote.MayPromote == nil:
				r.add("%s/%s unknown", e.MayPromote.Resource, e.MayPromote.Node)
			case e.MayPromote != nil:
				r.add("%s/%s %v", e.MayPromote.Resource, e.MayPromote.Node, *e.MayPromote.MayPromote)
			case e.OldNode != nil:
				r.add("%s %s>%s", e.Name, e.OldNode.Name, e.Node.Name)
			case e.Node != nil:
				r.add("%s %s", e.Name, e.Node.Name)
			default:
				r.add("%s %s", e.Name, e.Data)
			}
		},
	}
}

// subscribe runs Events until the returned function is called.
func subscribe(t *testing.T, c *linstor.Client, stream linstor.Stream, h linstor.Handler) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- c.Events(ctx, stream, h) }()
	return func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Events returned %v", err)
		}
	}
}

func expect(t *testing.T, r *recorder, want string) {
	t.Helper()
	synctest.Wait()
	if got := r.take(); got != want {
		t.Errorf("heard %q\n want %q", got, want)
	}
}

const promote = "event: may-promote-change\ndata: "

func TestEvents_Promotion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, s, r := newNetwork(), newStreamServer(), newRecorder()
		n.start("a:3370", s)
		c, done := n.client(t, "a")
		defer done()
		script := s.next()
		defer subscribe(t, c, linstor.StreamPromotion, r.handler())()
		expect(t, r, "connected http://a:3370")
		if got := s.subscriptions(); len(got) != 1 || got[0] != "current" {
			t.Errorf("Last-Event-ID %q, want current", got)
		}
		// The initial state comes, and comes again when anybody else subscribes; absent is unknown.
		same := promote + `{"resource_name":"r","node_name":"n","may_promote":true}` + "\n\n"
		script <- same
		script <- same
		script <- promote + "{\"resource_name\":\"r\",\r\ndata: \"node_name\":\"n\"}\r\n\r\n"
		script <- ": comment\n\n" + "event: something-new\ndata: {\"x\":1}\n\n" + same[:20]
		script <- same[20:]
		expect(t, r, `r/n true; r/n true; r/n unknown; something-new {"x":1}; r/n true`)
	})
}

func TestEvents_Nodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, s, r := newNetwork(), newStreamServer(), newRecorder()
		n.start("a:3370", s)
		c, done := n.client(t, "a")
		defer done()
		var all []string
		for _, name := range []string{"node-create", "node-delete", "node-evacuate", "node-evicted", "node-restored"} {
			all = append(all, "event: "+name+"\ndata: {\"node\":{\"name\":\"n1\"}}\n\n")
		}
		s.next(append(all, "event: node-modified\ndata: {\"old_node\":{\"name\":\"n1\"},\"new_node\":{\"name\":\"n1\"}}\n\n")...)
		defer subscribe(t, c, linstor.StreamNodes, r.handler())()
		expect(t, r, "connected http://a:3370; node-create n1; node-delete n1; node-evacuate n1; node-evicted n1; node-restored n1; node-modified n1>n1")
		if got := s.subscriptions(); got[0] != "" {
			t.Errorf("Last-Event-ID %q on the nodes stream", got)
		}
	})
}

// After each of these the owner hears Lost, then Connected: it reads again, and nothing half-read is delivered.
func TestEvents_ReconnectsAfter(t *testing.T) {
	whole := promote + `{"resource_name":"r","node_name":"n","may_promote":true}` + "\n\n"
	for name, tc := range map[string]struct {
		last string
		lost string
	}{
		"the end":                {"", "controller closed the event stream"},
		"a cut in the middle":    {whole[:len(whole)-10], "unexpected EOF"},
		"an error event":         {"event: error\ndata: [{\"ret_code\":-4611686018427386905,\"message\":\"no\"}]\n\n", "subscription refused: no: linstor error code 999"},
		"an error event as text": {"event: error\ndata: sorry\n\n", "subscription refused: sorry"},
		"broken JSON":            {promote + "{\n\n", "malformed answer: event may-promote-change: unexpected end of JSON input"},
		"no names":               {promote + "{}\n\n", "malformed answer: event may-promote-change: no resource or node name"},
		"no node":                {"event: node-create\ndata: {}\n\n", "malformed answer: event node-create: no node in it"},
		"null":                   {promote + "null\n\n", "malformed answer: event may-promote-change: no resource or node name"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, s, r := newNetwork(), newStreamServer(), newRecorder()
				n.start("a:3370", s)
				c, done := n.client(t, "a")
				defer done()
				close(s.next(whole, tc.last))
				s.next(whole)
				defer subscribe(t, c, linstor.StreamPromotion, r.handler())()
				expect(t, r, "connected http://a:3370; r/n true; lost read /v1/events/drbd/promotion: "+tc.lost)
				time.Sleep(time.Second)
				expect(t, r, "connected http://a:3370; r/n true")
			})
		})
	}
}

func TestEvents_NoStreamAtAll(t *testing.T) {
	for name, tc := range map[string]struct {
		answer http.HandlerFunc
		lost   string
	}{
		"old controller":     {answer(404, `[{"ret_code":-4611686018427386905,"message":"HTTP 404 Not Found"}]`), "answered 404"},
		"HTML":               {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }, `content type "text/html`},
		"503":                {answer(503, ""), "answered 503"},
		"connection dies":    {abort, "EOF"},
		"redirect elsewhere": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://b/", http.StatusFound) }, "not followed"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, r := newNetwork(), newRecorder()
				n.start("a:3370", newServer(map[string]http.HandlerFunc{"GET " + string(linstor.StreamNodes): tc.answer}))
				c, done := n.client(t, "a")
				defer done()
				defer subscribe(t, c, linstor.StreamNodes, r.handler())()
				synctest.Wait()
				if got := r.take(); !strings.HasPrefix(got, "lost ") || !strings.Contains(got, tc.lost) {
					t.Errorf("heard %q, want %q", got, tc.lost)
				}
			})
		})
	}
}

func TestEvents_BacksOffAndRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		c, done := n.client(t, "a")
		defer done()
		var at []time.Time
		connected := make(chan struct{}, 1)
		stop := subscribe(t, c, linstor.StreamNodes, linstor.Handler{
			Lost: func(err error) {
				if !errors.Is(err, linstor.ErrNoController) {
					t.Errorf("lost: %v", err)
				}
				at = append(at, time.Now())
			},
			Connected: func(string) { connected <- struct{}{} },
		})
		time.Sleep(2 * time.Minute)
		s := newStreamServer()
		s.next()
		n.start("a:3370", s)
		back := time.Now()
		<-connected
		if waited := time.Since(back); waited > 15*time.Second {
			t.Errorf("came back after %v", waited)
		}
		stop()
		for i := 1; i < len(at); i++ {
			ceiling := min(250*time.Millisecond<<(i-1), 15*time.Second)
			if gap := at[i].Sub(at[i-1]); gap < ceiling/2 || gap > ceiling {
				t.Errorf("gap %d is %v, want %v to %v", i, gap, ceiling/2, ceiling)
			}
		}
		if len(at) < 10 {
			t.Errorf("only %d tries in two minutes", len(at))
		}
	})
}

// A host that lost its power leaves the stream's connection standing: the next call that finds another controller
// must take the stream with it.
func TestEvents_FollowTheController(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, r := newNetwork(), newRecorder()
		a, b := newStreamServer(), newStreamServer()
		var dead atomic.Bool
		n.start("a:3370", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if dead.Load() {
				panic(http.ErrAbortHandler)
			}
			a.ServeHTTP(w, req)
		}))
		c, done := n.client(t, "a", "b")
		defer done()
		a.next()
		b.next()
		defer subscribe(t, c, linstor.StreamPromotion, r.handler())()
		expect(t, r, "connected http://a:3370")
		dead.Store(true) // Only new calls notice: the stream's connection stays as it is.
		n.start("b:3370", b)
		if _, err := c.Version(t.Context()); err != nil {
			t.Fatal(err)
		}
		expect(t, r, "lost another controller took over")
		time.Sleep(time.Second)
		expect(t, r, "connected http://b:3370")
	})
}

// A call that fails and then finds the same controller again is no reason to give up the stream.
func TestEvents_StayWhenTheControllerIsFoundAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, s, r := newNetwork(), newStreamServer(), newRecorder()
		var sick atomic.Bool
		n.start("a:3370", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if sick.CompareAndSwap(true, false) {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			s.ServeHTTP(w, req)
		}))
		c, done := n.client(t, "a")
		defer done()
		s.next()
		defer subscribe(t, c, linstor.StreamPromotion, r.handler())()
		expect(t, r, "connected http://a:3370")
		sick.Store(true)
		if _, err := c.Version(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		expect(t, r, "")
	})
}

func TestEvents_ConnectionHasAMaximumAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, s, r := newNetwork(), newStreamServer(), newRecorder()
		n.start("a:3370", s)
		c, done := n.client(t, "a")
		defer done()
		s.next()
		s.next()
		defer subscribe(t, c, linstor.StreamPromotion, r.handler())()
		expect(t, r, "connected http://a:3370")
		time.Sleep(9*time.Minute - time.Second)
		expect(t, r, "")
		time.Sleep(time.Minute + time.Second)
		expect(t, r, "connected http://a:3370")
	})
}
