package linstor_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

func TestNew_RefusesBadOptions(t *testing.T) {
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		opts linstor.Options
		want string
	}{
		"no controller":  {linstor.Options{}, "no controller address"},
		"unknown scheme": {linstor.Options{Controllers: []string{"ftp://a"}}, `unknown scheme "ftp"`},
		"a path":         {linstor.Options{Controllers: []string{"http://a/v1"}}, "give only a host"},
		"a user":         {linstor.Options{Controllers: []string{"http://u:p@a"}}, "give only a host"},
		"empty address":  {linstor.Options{Controllers: []string{" "}}, "give only a host"},
		"bad port":       {linstor.Options{Controllers: []string{"a:port"}}, "parse controller address"},
		"CA missing":     {linstor.Options{Controllers: []string{"a"}, CAFile: notPEM + "x"}, "read linstor CA file"},
		"CA no PEM":      {linstor.Options{Controllers: []string{"a"}, CAFile: notPEM}, "no PEM certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := linstor.New(tc.opts)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestDiscovery_DeadAndForeignAddresses(t *testing.T) {
	good := newServer(nil).listen(t)
	hangs, err := net.Listen("tcp", "127.0.0.1:0") // The port is open, and nobody accepts.
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>welcome</html>")
	}))
	defer web.Close()
	sick := newServer(map[string]http.HandlerFunc{"GET /health": answer(500, "Services not running: DatabaseService")}).listen(t)

	for name, other := range map[string]string{
		"connection refused":         closedPort(t),
		"open port without answers":  hangs.Addr().String(),
		"open port, not LINSTOR":     web.URL,
		"controller that is not fit": sick.URL,
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, linstor.Options{Controllers: []string{other, good.URL}})
			base, err := c.Controller(t.Context())
			if err != nil || base != good.URL {
				t.Fatalf("got %q, %v; want %q", base, err, good.URL)
			}
		})
	}
}

func TestDiscovery_SaysWhyOfEachAddress(t *testing.T) {
	web := httptest.NewServer(answer(200, "<html>"))
	defer web.Close()
	sick := newServer(map[string]http.HandlerFunc{"GET /health": answer(500, "Services not\nrunning")}).listen(t)
	other := httptest.NewServer(answer(200, `{"status":"up"}`)) // JSON, but not LINSTOR's.
	defer other.Close()
	dead := closedPort(t)
	c := newClient(t, linstor.Options{Controllers: []string{dead, web.URL, sick.URL, other.URL}})
	_, err := c.Nodes(t.Context())
	var none *linstor.NoControllerError
	if !errors.Is(err, linstor.ErrNoController) || !errors.As(err, &none) {
		t.Fatalf("got %v, want ErrNoController", err)
	}
	if len(none.Attempts) != 4 || none.Hint == "" {
		t.Fatalf("attempts %v, hint %q", none.Attempts, none.Hint)
	}
	for _, want := range []string{dead, "connection refused", web.URL, "not a linstor controller", other.URL, sick.URL, "/health answered 500: Services not running"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %v", err)
	}
}

func TestDiscovery_ControllerThatWantsAToken(t *testing.T) {
	routes := map[string]http.HandlerFunc{"GET /v1/controller/version": func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" {
			w.Header().Set("WWW-Authenticate", "Bearer")
			answer(401, `[{"ret_code":-4611686018427377903,"message":"missing credentials"}]`)(w, r)
			return
		}
		answer(200, `{"version":"1.34.0"}`)(w, r)
	}}
	s := newServer(routes).listen(t)
	_, err := newClient(t, linstor.Options{Controllers: []string{s.URL}}).Version(t.Context())
	if !errors.Is(err, linstor.ErrNoController) || !strings.Contains(err.Error(), "configure its bearer token") {
		t.Fatalf("got %v", err)
	}
	v, err := newClient(t, linstor.Options{Controllers: []string{s.URL}, Token: "secret"}).Version(t.Context())
	if err != nil || v.Version != "1.34.0" {
		t.Fatalf("got %v, %v", v, err)
	}
}

func TestDiscovery_ConcurrentCallersShareOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var probes atomic.Int32
		n := newNetwork()
		n.start("a:3370", newServer(map[string]http.HandlerFunc{
			"GET /health":   func(http.ResponseWriter, *http.Request) { probes.Add(1); time.Sleep(time.Second) },
			"GET /v1/nodes": answer(200, `[]`),
		}))
		c, done := n.client(t, "a")
		defer done()
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		errs := make(chan error, 5)
		go func() { _, err := c.Nodes(impatient); errs <- err }()
		synctest.Wait()
		for range 4 {
			go func() { _, err := c.Nodes(t.Context()); errs <- err }()
		}
		if err := <-errs; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the caller with a deadline got %v", err)
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Errorf("a caller without one got %v", err)
			}
		}
		if probes.Load() != 1 {
			t.Errorf("%d probes, want 1", probes.Load())
		}
	})
}

func TestDiscovery_EndsWhenEveryAddressHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		for _, addr := range []string{"a:3370", "b:3370"} {
			n.start(addr, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		}
		c, done := n.client(t, "a", "b")
		defer done()
		start := time.Now()
		_, err := c.Nodes(t.Context())
		if took := time.Since(start); !errors.Is(err, linstor.ErrNoController) || took != 5*time.Second {
			t.Errorf("got %v after %v", err, took)
		}
	})
}

// The controller moves from a to b; the first read after it must succeed, once, on b.
func TestFailover_ReadIsRepeatedOnTheNewController(t *testing.T) {
	for name, die := range map[string]http.HandlerFunc{
		"connection dies": abort,
		"503":             answer(503, "shutting down"),
		"dies mid-body": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `[{"name":"half"},`)
			_ = http.NewResponseController(w).Flush()
			abort(w, r)
		},
		"dies mid-body, chunked, after valid JSON": func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, `[{"name":"half"}]`)
			_ = http.NewResponseController(w).Flush()
			abort(w, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var moved atomic.Bool
			old := newServer(map[string]http.HandlerFunc{
				"GET /health": func(w http.ResponseWriter, _ *http.Request) {
					if moved.Load() {
						w.WriteHeader(http.StatusInternalServerError)
					}
				},
				"GET /v1/nodes": func(w http.ResponseWriter, r *http.Request) { moved.Store(true); die(w, r) },
			})
			fresh := newServer(map[string]http.HandlerFunc{
				"GET /health": func(w http.ResponseWriter, _ *http.Request) {
					if !moved.Load() {
						w.WriteHeader(http.StatusInternalServerError)
					}
				},
				"GET /v1/nodes": answer(200, `[{"name":"n1","connection_status":"ONLINE"}]`),
			})
			c := newClient(t, linstor.Options{Controllers: []string{old.listen(t).URL, fresh.listen(t).URL}})
			nodes, err := c.Nodes(t.Context())
			if err != nil || len(nodes) != 1 || nodes[0].Name != "n1" {
				t.Fatalf("got %v, %v", nodes, err)
			}
			// net/http itself repeats a GET when a kept connection dies before the answer starts.
			if len(old.seen()) > 2 || len(fresh.seen()) != 1 {
				t.Fatalf("old saw %v, new saw %v", old.seen(), fresh.seen())
			}
		})
	}
}

func TestFailover_ReadGivesUpAfterTheSecondAttempt(t *testing.T) {
	for name, tc := range map[string]struct {
		die  http.HandlerFunc
		want error
	}{
		"always dies mid-body": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `[{"name":"half"}`)
			_ = http.NewResponseController(w).Flush()
			abort(w, r)
		}, io.ErrUnexpectedEOF},
		"always dies": {abort, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			c, s := single(t, map[string]http.HandlerFunc{"GET /v1/nodes": tc.die})
			nodes, err := c.Nodes(t.Context())
			if nodes != nil || !errors.Is(err, tc.want) {
				t.Fatalf("got %v, %v; want %v", nodes, err, tc.want)
			}
			// net/http itself doubles each attempt when a kept connection dies before the answer starts.
			if got := len(s.seen()); got < 2 || got > 4 {
				t.Fatalf("asked %d times, want 2", got)
			}
		})
	}
}

func TestFailover_MutationIsNeverSentTwice(t *testing.T) {
	put := "PUT /v1/resource-definitions/r/resources/n/toggle-disk/diskless"
	for name, tc := range map[string]struct {
		answer    http.HandlerFunc
		uncertain bool
	}{
		"dies after reading": {abort, true},
		"dies mid-answer": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `[{"ret_code":3}`)
			_ = http.NewResponseController(w).Flush()
			abort(w, r)
		}, true},
		"answers nonsense": {answer(200, `[{`), true},
		"503":              {answer(503, ``), false},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newServer(map[string]http.HandlerFunc{put: tc.answer}), newServer(map[string]http.HandlerFunc{put: tc.answer})
			c := newClient(t, linstor.Options{Controllers: []string{a.listen(t).URL, b.listen(t).URL}})
			reply, err := c.RemoveDisk(t.Context(), "r", "n")
			if err == nil || len(reply.Entries) != 0 {
				t.Fatalf("got %v, %v", reply, err)
			}
			if errors.Is(err, linstor.ErrUncertain) != tc.uncertain {
				t.Errorf("uncertain should be %v: %v", tc.uncertain, err)
			}
			if got := len(a.seen()) + len(b.seen()); got != 1 {
				t.Errorf("sent %d times", got)
			}
		})
	}
}

// A connection that never stood proves that nobody saw the call.
func TestFailover_MutationGoesToTheNewControllerWhenTheOldOneIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		fresh := newServer(map[string]http.HandlerFunc{"PUT /v1/nodes/n": answer(200, `[{"ret_code":3}]`)})
		n.start("a:3370", newServer(nil))
		c, done := n.client(t, "a", "b")
		defer done()
		if _, err := c.Version(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.stop("a:3370")
		synctest.Wait()
		n.start("b:3370", fresh)
		if _, err := c.ModifyNode(t.Context(), "n", linstor.PropChange{Set: map[string]string{"PrefNic": "storage"}}); err != nil {
			t.Fatal(err)
		}
		want := `{"override_props":{"PrefNic":"storage"}}`
		if got := fresh.seen(); len(got) != 1 || got[0].Body != want {
			t.Fatalf("got %v", got)
		}
	})
}

func TestDeadline_HungSatelliteCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
		s := newServer(map[string]http.HandlerFunc{"GET /v1/view/resources": hang, "GET /v1/nodes": hang})
		var probes atomic.Int32
		n := newNetwork()
		n.start("a:3370", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/health" {
				probes.Add(1)
			}
			s.ServeHTTP(w, r)
		}))
		c, done := n.client(t, "a")
		defer done()

		start := time.Now()
		_, err := c.ResourceView(t.Context(), linstor.ViewQuery{})
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != linstor.DefaultSatelliteTimeout {
			t.Errorf("satellite call: %v after %v", err, took)
		}
		start = time.Now()
		_, err = c.Nodes(t.Context())
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != linstor.DefaultTimeout {
			t.Errorf("memory call: %v after %v", err, took)
		}
		if got := len(s.seen()); got != 2 {
			t.Errorf("%d calls sent: a call that timed out was repeated", got)
		}
		// The hung satellite must not condemn the controller; the hung controller must be proved again.
		if probes.Load() != 1 {
			t.Errorf("%d probes before the next call, want 1", probes.Load())
		}
		if _, err = c.Version(t.Context()); err != nil || probes.Load() != 2 {
			t.Errorf("next call: %v, %d probes, want 2", err, probes.Load())
		}
	})
}

func TestDeadline_HungMutation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := newServer(map[string]http.HandlerFunc{"DELETE /": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }})
		n.start("a:3370", s)
		c, done := n.client(t, "a")
		defer done()
		start := time.Now()
		_, err := c.DeleteResource(t.Context(), "r", "n", false)
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, linstor.ErrUncertain) || took != linstor.DefaultSatelliteTimeout {
			t.Errorf("got %v after %v", err, took)
		}
		if len(s.seen()) != 1 {
			t.Errorf("sent %d times", len(s.seen()))
		}
	})
}

func TestMutation_ThatWasNotSentIsNotUncertain(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, ctx := range map[string]context.Context{"no controller": t.Context(), "caller gave up": canceled} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, linstor.Options{Controllers: []string{closedPort(t)}})
			if _, err := c.RemoveDisk(ctx, "r", "n"); err == nil || errors.Is(err, linstor.ErrUncertain) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestDeadline_AnswerThatStallsMidBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		n.start("a:3370", newServer(map[string]http.HandlerFunc{"GET /v1/nodes": func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, `[{"name":"n1"},`)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}}))
		c, done := n.client(t, "a")
		defer done()
		nodes, err := c.Nodes(t.Context())
		if nodes != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, %v", nodes, err)
		}
	})
}

// tlsPair is a plain controller that redirects /v1 to a TLS one under another name of the same machine.
func tlsPair(t *testing.T, host string, routes map[string]http.HandlerFunc) (plain string, secure *server, opts linstor.Options) {
	t.Helper()
	secure = newServer(routes)
	s := httptest.NewTLSServer(secure)
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" {
			w.Header().Set("Location", "https://"+net.JoinHostPort(host, u.Port())+r.RequestURI)
			w.WriteHeader(http.StatusFound) // A browser would turn a POST into a GET here.
		}
	}))
	t.Cleanup(p.Close)
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return p.URL, secure, linstor.Options{
		Controllers: []string{p.URL}, Token: "secret",
		TLS: &tls.Config{RootCAs: roots, ServerName: "example.com", MinVersion: tls.VersionTLS12},
	}
}

func TestRedirect_ToHTTPSOnTheSameHost(t *testing.T) {
	_, secure, opts := tlsPair(t, "127.0.0.1", map[string]http.HandlerFunc{
		"GET /v1/nodes":                  answer(200, `[{"name":"n1"}]`),
		"POST /v1/controller/properties": answer(201, `[{"ret_code":3}]`),
	})
	c := newClient(t, opts)
	if nodes, err := c.Nodes(t.Context()); err != nil || len(nodes) != 1 {
		t.Fatalf("read: %v, %v", nodes, err)
	}
	if _, err := c.ModifyController(t.Context(), linstor.PropChange{Delete: []string{"a"}}); err != nil {
		t.Fatalf("mutation: %v", err)
	}
	base, err := c.Controller(t.Context())
	if err != nil || !strings.HasPrefix(base, "https://127.0.0.1:") {
		t.Errorf("the HTTPS address is not remembered: %q, %v", base, err)
	}
	got := secure.seen()
	if len(got) != 2 || got[1].Method != http.MethodPost || got[1].Body != `{"delete_props":["a"]}` || got[1].Authorization != "Bearer secret" {
		t.Errorf("got %+v", got)
	}
}

// A keystore is configured while we run: the redirect appears between two calls, the first of them a mutation.
func TestRedirect_AppearsBeforeAMutation(t *testing.T) {
	secure := newServer(map[string]http.HandlerFunc{"PUT /v1/nodes/n": answer(200, `[{"ret_code":3}]`)})
	s := httptest.NewTLSServer(secure)
	defer s.Close()
	plain := newServer(map[string]http.HandlerFunc{"PUT /v1/nodes/n": func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, s.URL+r.RequestURI, http.StatusMovedPermanently)
	}})
	file := filepath.Join(t.TempDir(), "ca.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(file, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, linstor.Options{Controllers: []string{plain.listen(t).URL}, CAFile: file})
	for range 2 {
		if _, err := c.ModifyNode(t.Context(), "n", linstor.PropChange{Delete: []string{"PrefNic"}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(plain.seen()) != 1 || len(secure.seen()) != 2 {
		t.Errorf("plain saw %d calls, TLS %d; want 1 and 2", len(plain.seen()), len(secure.seen()))
	}
}

func TestRedirect_ToAnotherHost(t *testing.T) {
	plain, secure, opts := tlsPair(t, "localhost", map[string]http.HandlerFunc{
		"GET /v1/nodes":   answer(200, `[{"name":"n1"}]`),
		"PUT /v1/nodes/n": answer(200, `[]`),
	})
	c := newClient(t, opts)
	if nodes, err := c.Nodes(t.Context()); err != nil || len(nodes) != 1 {
		t.Fatalf("read: %v, %v", nodes, err)
	}
	_, err := c.ModifyNode(t.Context(), "n", linstor.PropChange{})
	if err == nil || !strings.Contains(err.Error(), "not followed") || errors.Is(err, linstor.ErrUncertain) {
		t.Errorf("mutation: %v", err)
	}
	if base, err := c.Controller(t.Context()); err != nil || base != plain {
		t.Errorf("controller %q, %v; want %q", base, err, plain)
	}
	if got := secure.seen(); len(got) != 1 || got[0].Authorization != "" {
		t.Errorf("the other host saw %+v; it must not get the token, nor the mutation", got)
	}
}

func TestRedirect_Refused(t *testing.T) {
	for name, location := range map[string]string{
		"plain HTTP on another host": "http://localhost:1/v1/nodes",
		"another scheme":             "file:///etc/passwd",
		"in a circle":                "/v1/nodes",
		"nonsense":                   "http://%zz",
	} {
		t.Run(name, func(t *testing.T) {
			c, s := single(t, map[string]http.HandlerFunc{"GET /v1/nodes": func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", location)
				w.WriteHeader(http.StatusTemporaryRedirect)
			}})
			if _, err := c.Nodes(t.Context()); err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v", err)
			}
			if len(s.seen()) > 4 {
				t.Errorf("followed %d times", len(s.seen()))
			}
		})
	}
}

func TestClose_EndsTheClient(t *testing.T) {
	c, _ := single(t, nil)
	c.Close()
	if _, err := c.Version(t.Context()); err == nil {
		t.Fatal("a closed client still finds its controller")
	}
	c.Close()
}

func TestController_ForgetsAfterNonsense(t *testing.T) {
	var probes atomic.Int32
	c, _ := single(t, map[string]http.HandlerFunc{
		"GET /health": func(http.ResponseWriter, *http.Request) { probes.Add(1) },
		"GET /v1/nodes": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			_, _ = fmt.Fprint(w, "<html>\nlogin</html>")
		},
	})
	_, err := c.Nodes(t.Context())
	if !errors.Is(err, linstor.ErrMalformed) || !strings.Contains(err.Error(), "text/html") || strings.Contains(err.Error(), "\n") {
		t.Fatalf("got %v", err)
	}
	if _, err := c.Version(t.Context()); err != nil || probes.Load() != 2 {
		t.Fatalf("%v, %d probes; want a second one", err, probes.Load())
	}
}
