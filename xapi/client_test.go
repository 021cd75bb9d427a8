package xapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// unixClient runs s on a unix socket and gives a client of it.
func unixClient(t *testing.T, s http.Handler) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "xapi") // t.TempDir() may be too long for a socket.
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = web.Serve(l) }()
	c, err := New(Config{Socket: path, Originator: "xostor-test", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
		web.Close()
	})
	return c
}

func TestCallsOverTheSocket(t *testing.T) {
	s := newServer()
	vm := s.create("VM", map[string]any{
		"name_label": " two  words\n", "power_state": "", "memory_static_max": int64(1) << 40, "is_a_template": true,
		"VBDs": []any{"OpaqueRef:vbd"}, "other_config": map[string]any{"a&b": "", "k": "<v>"}, "HVM_shadow_multiplier": 1.5,
		"resident_on": "OpaqueRef:NULL",
	})
	c, ctx := unixClient(t, s), context.Background()

	want := VM{
		UUID: "uuid-2", NameLabel: " two  words\n", MemoryStaticMax: 1 << 40, IsATemplate: true, VBDs: []Ref{"OpaqueRef:vbd"},
		OtherConfig: map[string]string{"a&b": "", "k": "<v>"}, ResidentOn: NullRef,
	}
	var overXML VM
	if err := c.Call(ctx, &overXML, "VM.get_record", vm); err != nil || fmt.Sprint(overXML) != fmt.Sprint(want) {
		t.Errorf("xml: %+v, %v", overXML, err)
	}
	overJSON, err := GetRecord[VM](ctx, c, "vm", Ref(vm))
	if err != nil || fmt.Sprint(overJSON) != fmt.Sprint(want) {
		t.Errorf("json: %+v, %v", overJSON, err)
	}
	all, err := GetAllRecords[VM](ctx, c, "VM")
	if err != nil || len(all) != 1 || fmt.Sprint(all[Ref(vm)]) != fmt.Sprint(want) {
		t.Errorf("all: %+v, %v", all, err)
	}
	if ref, err := c.GetByUUID(ctx, "VM", "uuid-2"); err != nil || ref != Ref(vm) {
		t.Errorf("by uuid: %v, %v", ref, err)
	}
	if _, err := c.GetByUUID(ctx, "VM", "none"); !IsCode(err, "UUID_INVALID") {
		t.Errorf("by unknown uuid: %v", err)
	}
	if host, err := c.ThisHost(ctx); err != nil || host != "OpaqueRef:h1" {
		t.Errorf("this host: %v, %v", host, err)
	}
	if host, err := c.PoolMaster(ctx); err != nil || host != "OpaqueRef:h1" {
		t.Errorf("pool master: %v, %v", host, err)
	}
	if s.logins != 1 {
		t.Errorf("%d log-ins for one client", s.logins)
	}
	for _, o := range s.originOf {
		if o != "xostor-test" {
			t.Errorf("originator %q", o)
		}
	}
}

func TestMessageAndTaskCalls(t *testing.T) {
	s := newServer()
	got := map[string][]any{}
	for _, m := range []string{"message.create", "message.destroy", "task.create", "task.set_progress", "task.set_status", "task.destroy", "SR.update", "SR.scan"} {
		s.handlers[m] = func(args []any) (any, *refusal) { got[m] = args; return "OpaqueRef:new", nil }
	}
	s.handlers["message.get_all_records_where"] = func(args []any) (any, *refusal) {
		got["message.get_all_records_where"] = args
		return map[string]any{"OpaqueRef:m": map[string]any{"uuid": "u", "priority": int64(3), "timestamp": "20250319T04:16:24Z"}}, nil
	}
	c, ctx := unixClient(t, s), context.Background()
	message, err := c.MessageCreate(ctx, "XOSTOR_FULL", 2, "SR", "sr-uuid", "body & <more>")
	if err != nil || message != "OpaqueRef:new" {
		t.Errorf("message: %v, %v", message, err)
	}
	list, err := c.MessagesOf(ctx, "sr-uuid")
	if err != nil || list["OpaqueRef:m"].Priority != 3 || list["OpaqueRef:m"].Timestamp.Year() != 2025 {
		t.Errorf("messages: %v, %v", list, err)
	}
	task, err := c.TaskCreate(ctx, "label", "")
	if err != nil {
		t.Error(err)
	}
	for _, err := range []error{
		c.MessageDestroy(ctx, message), c.TaskSetProgress(ctx, task, 0.5), c.TaskSetStatus(ctx, task, "success"), c.TaskDestroy(ctx, task),
		c.SRUpdate(ctx, "OpaqueRef:sr"), c.SRScan(ctx, "OpaqueRef:sr"),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	for method, want := range map[string]string{
		"message.create":                "[XOSTOR_FULL 2 SR sr-uuid body & <more>]",
		"message.get_all_records_where": `[field "obj_uuid" = "sr-uuid"]`,
		"message.destroy":               "[OpaqueRef:new]",
		"task.create":                   "[label ]",
		"task.set_progress":             "[OpaqueRef:new 0.5]",
		"task.set_status":               "[OpaqueRef:new success]",
		"task.destroy":                  "[OpaqueRef:new]",
		"SR.update":                     "[OpaqueRef:sr]",
		"SR.scan":                       "[OpaqueRef:sr]",
	} {
		if fmt.Sprint(got[method]) != want {
			t.Errorf("%s got %v, want %s", method, got[method], want)
		}
	}
	if _, err := c.MessagesOf(ctx, `x" or true or "`); err == nil {
		t.Error("a quote in a filter was sent")
	}
}

func TestSetSizes(t *testing.T) {
	s := newServer()
	a, b := s.create("SR", nil), s.create("SR", nil)
	vdi := s.create("VDI", map[string]any{"SR": b})
	c, ctx := unixClient(t, s), context.Background()
	size, used, virtual := int64(1)<<50, int64(7), int64(9)
	if err := c.SRSetSizes(ctx, Ref(a), SRSizes{PhysicalSize: &size, PhysicalUtilisation: &used, VirtualAllocation: &virtual}); err != nil {
		t.Fatal(err)
	}
	if err := c.VDISetPhysicalUtilisation(ctx, Ref(b), Ref(vdi), 11); err != nil {
		t.Fatal(err)
	}
	if err := c.SRSetSizes(ctx, Ref(b), SRSizes{PhysicalSize: &size}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(s.calls, " "); got != strings.Join([]string{
		"session.login_with_password", "session.add_to_other_config",
		"SR.set_virtual_allocation", "SR.set_physical_size", "SR.set_physical_utilisation",
		"session.remove_from_other_config", "session.add_to_other_config", "VDI.set_physical_utilisation", "SR.set_physical_size",
	}, " ") {
		t.Errorf("calls: %s", got)
	}
	srs, err := GetAllRecords[SR](ctx, c, "SR")
	if err != nil || srs[Ref(a)].PhysicalSize != 1<<50 || srs[Ref(a)].PhysicalUtilisation != 7 || srs[Ref(a)].VirtualAllocation != 9 {
		t.Errorf("SRs: %+v, %v", srs, err)
	}
	if srs[Ref(b)].PhysicalUtilisation != 0 {
		t.Error("a field that was left out was written")
	}
	negative := int64(-1)
	before := len(s.calls)
	if c.SRSetSizes(ctx, Ref(a), SRSizes{PhysicalSize: &size, PhysicalUtilisation: &negative}) == nil || len(s.calls) != before {
		t.Error("a negative size was not refused before sending")
	}
	if err := c.SRSetSizes(ctx, "OpaqueRef:none", SRSizes{PhysicalSize: &size}); !IsCode(err, "HANDLE_INVALID") || errors.Is(err, ErrNoSMSession) {
		t.Errorf("unknown SR: %v", err)
	}
}

func TestSetSizesTroubles(t *testing.T) {
	size := int64(5)
	for name, tc := range map[string]struct {
		spoil  func(s *server)
		denied bool
	}{
		"setter refused":   {func(s *server) { s.refuse["SR.set_physical_size"] = "RBAC_PERMISSION_DENIED" }, true},
		"grant refused":    {func(s *server) { s.refuse["session.add_to_other_config"] = "PERMISSION_DENIED" }, true},
		"session gone":     {func(s *server) { s.dropSessions() }, false},
		"key there before": {func(s *server) { s.setKey("OpaqueRef:other") }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer()
			a, b := s.create("SR", nil), s.create("SR", nil)
			c, ctx := unixClient(t, s), context.Background()
			if err := c.SRSetSizes(ctx, Ref(a), SRSizes{PhysicalSize: &size}); err != nil {
				t.Fatal(err)
			}
			c.sm.sr = "" // As after a call whose answer was lost: the client does not know what the key says.
			tc.spoil(s)
			err := c.SRSetSizes(ctx, Ref(b), SRSizes{PhysicalSize: &size})
			if errors.Is(err, ErrNoSMSession) != tc.denied || (err == nil) == tc.denied {
				t.Errorf("got %v", err)
			}
		})
	}
}

func (s *server) setKey(sr string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.sessions {
		other[smKey] = sr
	}
}

func TestConcurrentWritersShareOneStorageSession(t *testing.T) {
	s := newServer()
	var srs []string
	for range 4 {
		srs = append(srs, s.create("SR", nil))
	}
	c := unixClient(t, s)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			size := int64(i)
			if err := c.SRSetSizes(context.Background(), Ref(srs[i%4]), SRSizes{PhysicalSize: &size, VirtualAllocation: &size}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s.logins != 1 {
		t.Errorf("%d log-ins", s.logins)
	}
}

func TestSessionIsSharedAndRenewed(t *testing.T) {
	s := newServer()
	c, ctx := unixClient(t, s), context.Background()
	burst := func() {
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() {
				if _, err := c.ThisHost(ctx); err != nil {
					t.Error(err)
				}
				if _, err := GetAllRecords[VM](ctx, c, "VM"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	burst()
	if s.logins != 1 {
		t.Errorf("%d log-ins for thirty callers", s.logins)
	}
	s.dropSessions()
	burst()
	if s.logins != 2 {
		t.Errorf("%d log-ins after the session was lost once", s.logins)
	}
	s.refuse["VM.get_all"] = "SESSION_INVALID"
	if err := c.Query(ctx, nil, "VM.get_all"); !IsCode(err, "SESSION_INVALID") {
		t.Errorf("a call that never succeeds: %v", err)
	}
	if s.callCount("VM.get_all") != 2 {
		t.Error("renewed more than once for one call")
	}
}

func TestLoginFailure(t *testing.T) {
	s := newServer()
	s.refuse["session.login_with_password"] = "SESSION_AUTHENTICATION_FAILED"
	c := unixClient(t, s)
	_, err := c.ThisHost(context.Background())
	if !IsCode(err, "SESSION_AUTHENTICATION_FAILED") || !strings.Contains(err.Error(), "session.get_this_host") {
		t.Errorf("got %v", err)
	}
	s.mu.Lock()
	clear(s.refuse)
	s.mu.Unlock()
	if _, err := c.ThisHost(context.Background()); err != nil {
		t.Errorf("after the password was mended: %v", err)
	}
}

func TestCloseLogsOut(t *testing.T) {
	s := newServer()
	sr := s.create("SR", nil)
	c := unixClient(t, s)
	size := int64(1)
	if err := c.SRSetSizes(context.Background(), Ref(sr), SRSizes{PhysicalSize: &size}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ThisHost(context.Background()); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for range 2 {
		if err := c.Close(ended); err != nil {
			t.Error(err)
		}
	}
	if s.logouts != 2 || len(s.sessions) != 0 {
		t.Errorf("%d log-outs, %d sessions left", s.logouts, len(s.sessions))
	}
	if _, err := c.ThisHost(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("call after close: %v", err)
	}
	if err := c.SRSetSizes(context.Background(), Ref(sr), SRSizes{PhysicalSize: &size}); !errors.Is(err, ErrClosed) {
		t.Errorf("storage write after close: %v", err)
	}
}

// TestCloseDuringLogin: neither a caller that gives up nor a Close that cannot wait may leave a session behind.
func TestCloseDuringLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer()
		s.before = func(method string) {
			if method == "session.login_with_password" {
				sleep(context.Background(), 10*time.Second)
			}
		}
		p := newPipeNet()
		web := &http.Server{Handler: s}
		go func() { _ = web.Serve(p) }()
		c, err := New(Config{Originator: "test", Dial: func(context.Context, string, string) (net.Conn, error) { return p.dial() }})
		if err != nil {
			t.Fatal(err)
		}
		impatient, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := c.ThisHost(impatient); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("impatient caller: %v", err)
		}
		_ = c.Close(impatient) // Waits five seconds of the remaining nine.
		sleep(context.Background(), time.Minute)
		synctest.Wait()
		if s.logins != 1 || s.logouts != 1 || len(s.sessions) != 0 {
			t.Errorf("%d log-ins, %d log-outs, %d sessions left", s.logins, s.logouts, len(s.sessions))
		}
		c.rpc.CloseIdleConnections()
		web.Close()
	})
}

// bodyHandler logs in and answers everything else with a fixed body.
func bodyHandler(status int, kind, body string) http.Handler {
	s := newServer()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in, _ := io.ReadAll(r.Body)
		if strings.Contains(string(in), "session.") {
			r.Body = io.NopCloser(strings.NewReader(string(in)))
			s.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", kind)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
}

func TestAnswersThatAreNotXAPI(t *testing.T) {
	page := "<!DOCTYPE html>\n<html><head><title>XCP-ng</title></head><body>" + strings.Repeat("welcome\n", 100) + "</body></html>"
	for name, tc := range map[string]struct {
		status     int
		body, want string
	}{
		"html":         {200, page, "<!DOCTYPE html>"},
		"html and 500": {500, page, "500 Internal Server Error"},
		"redirect":     {302, "", "302 Found"},
		"nothing":      {200, "", "empty reply"},
		"text":         {200, "stunnel: no\x1b[31m backend", "stunnel: no"},
		"empty object": {200, "{}", "answer"},
		"cut json":     {200, `{"jsonrpc":"2.0","result":{"a":`, "cut off"},
		"other xml":    {200, `<rss><channel/></rss>`, "rss"},
		"other result": {200, `{"jsonrpc":"2.0","result":[1]}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := unixClient(t, bodyHandler(tc.status, "text/html", tc.body))
			_, bulk := GetAllRecords[VM](context.Background(), c, "VM")
			control := c.Call(context.Background(), nil, "VM.get_all")
			shown := false
			for _, err := range []error{bulk, control} {
				var te *TransportError
				if !errors.As(err, &te) {
					t.Fatalf("got %v", err)
				}
				if strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 400 || !strings.Contains(err.Error(), "VM.get_all") {
					t.Errorf("not one clear line: %q", err)
				}
				shown = shown || strings.Contains(err.Error(), tc.want)
			}
			if !shown {
				t.Errorf("neither error tells %q:\n%v\n%v", tc.want, bulk, control)
			}
		})
	}
}

func TestCutReplies(t *testing.T) {
	s := newServer()
	for range 200 {
		s.create("VM", map[string]any{"name_label": strings.Repeat("x", 100)})
	}
	c, ctx := unixClient(t, s), context.Background()
	if _, err := c.ThisHost(ctx); err != nil {
		t.Fatal(err)
	}
	for _, get := range []func() error{
		func() error { _, err := GetAllRecords[VM](ctx, c, "VM"); return err },
		func() error { return c.Call(ctx, nil, "VM.get_all_records") },
	} {
		s.mu.Lock()
		s.abort["VM.get_all_records"] = true
		s.mu.Unlock()
		err := get()
		var te *TransportError
		if !errors.As(err, &te) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("got %v", err)
		}
		if err := get(); err != nil {
			t.Errorf("the call after a cut reply: %v", err)
		}
	}
}

func TestLimits(t *testing.T) {
	s := newServer()
	s.create("VM", map[string]any{"name_label": strings.Repeat("x", 1<<20)})
	c, ctx := unixClient(t, s), context.Background()
	c.cfg.MaxReply = 64 << 10
	_, bulk := GetAllRecords[VM](ctx, c, "VM")
	for _, err := range []error{bulk, c.Call(ctx, nil, "VM.get_all_records")} {
		if err == nil || !strings.Contains(err.Error(), "raise MaxReply") {
			t.Errorf("large reply: %v", err)
		}
	}
	calls := len(s.calls)
	long := strings.Repeat("x", MaxRequest)
	for _, err := range []error{c.Call(ctx, nil, "VM.set_name_label", long), c.Query(ctx, nil, "VM.set_name_label", long)} {
		if !errors.Is(err, ErrRequestTooLarge) {
			t.Errorf("large request: %v", err)
		}
	}
	for _, method := range []string{"", "x", "VM.<a>", "VM.x y"} {
		if err := c.Call(ctx, nil, method); err == nil {
			t.Errorf("method %q was sent", method)
		}
	}
	if len(s.calls) != calls {
		t.Error("a bad request was sent")
	}
}

func TestConnectionErrorsHint(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"missing": filepath.Join(dir, "none"), "nobody listens": file} {
		c, err := New(Config{Socket: path, Originator: "test"})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.ThisHost(context.Background())
		var te *TransportError
		if !errors.As(err, &te) || te.Hint != hintNotRunning || te.Target != path {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer()
		p := newPipeNet()
		web := &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)}
		go func() { _ = web.Serve(p) }()
		c, err := New(Config{Originator: "test", Dial: func(context.Context, string, string) (net.Conn, error) { return p.dial() }})
		if err != nil {
			t.Fatal(err)
		}
		s.hang["VM.get_all"], s.hang["SR.update"] = true, true
		for _, tc := range []struct {
			limit time.Duration
			call  func() error
		}{
			{DefaultTimeout, func() error { return c.Query(context.Background(), nil, "VM.get_all") }},
			{DefaultSlowTimeout, func() error { return c.SRUpdate(context.Background(), "OpaqueRef:sr") }},
		} {
			start := time.Now()
			err := tc.call()
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != tc.limit || !strings.Contains(err.Error(), "no answer within") {
				t.Errorf("after %s: %v", time.Since(start), err)
			}
		}
		s.mu.Lock()
		s.hang["VM.get_all"] = true
		s.mu.Unlock()
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, cancel)
		if err := c.Query(ctx, nil, "VM.get_all"); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled call: %v", err)
		}
		if err := c.Close(context.Background()); err != nil {
			t.Error(err)
		}
		web.Close()
	})
}

// pool is a set of TLS servers behind made-up addresses.
type fakePool struct {
	certs *x509.CertPool
	hosts map[string]string // hosts are listening addresses by host:port as the client dials it.
	mu    sync.Mutex
	dials []string
}

func newFakePool(t *testing.T, hosts map[string]http.Handler) *fakePool {
	p := &fakePool{certs: x509.NewCertPool(), hosts: map[string]string{}}
	for address, h := range hosts {
		web := httptest.NewUnstartedServer(h)
		web.Config.ErrorLog = log.New(io.Discard, "", 0)
		web.StartTLS()
		t.Cleanup(web.Close)
		p.certs.AddCert(web.Certificate())
		p.hosts[address] = web.Listener.Addr().String()
	}
	return p
}

func (p *fakePool) client(t *testing.T, url string) *Client {
	t.Helper()
	c, err := New(Config{
		URL: url, Username: "root", Password: "secret", Originator: "test", Log: slog.New(slog.DiscardHandler),
		TLS: &tls.Config{RootCAs: p.certs, ServerName: "example.com"},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			p.mu.Lock()
			p.dials = append(p.dials, address)
			real := p.hosts[address]
			p.mu.Unlock()
			if real == "" {
				return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("no such host here")}
			}
			return new(net.Dialer).DialContext(ctx, network, real)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func TestSupporterNamesItsCoordinator(t *testing.T) {
	for name, tc := range map[string]struct{ url, slaveOf, home, coordinator string }{
		"ipv4":      {"https://10.0.0.2", "10.0.0.1", "10.0.0.2:443", "10.0.0.1:443"},
		"ipv4 port": {"https://10.0.0.2:8443", "10.0.0.1", "10.0.0.2:8443", "10.0.0.1:8443"},
		"ipv6":      {"https://[fd00::2]", "fd00::1", "[fd00::2]:443", "[fd00::1]:443"},
		"ipv6 port": {"https://[fd00::2]:8443", "fd00::1", "[fd00::2]:8443", "[fd00::1]:8443"},
	} {
		t.Run(name, func(t *testing.T) {
			supporter, coordinator := newServer(), newServer()
			supporter.slaveOf = tc.slaveOf
			p := newFakePool(t, map[string]http.Handler{tc.home: supporter, tc.coordinator: coordinator})
			c := p.client(t, tc.url)
			if _, err := GetAllRecords[VM](context.Background(), c, "VM"); err != nil {
				t.Fatal(err)
			}
			if coordinator.logins != 1 {
				t.Errorf("%d log-ins on the coordinator; dialled %v", coordinator.logins, p.dials)
			}
		})
	}
}

// TestCoordinatorMoves: the coordinator is demoted while a session is held, then the new one dies and the first takes over again.
func TestCoordinatorMoves(t *testing.T) {
	a, b := newServer(), newServer()
	p := newFakePool(t, map[string]http.Handler{"10.0.0.1:443": a, "10.0.0.2:443": b})
	c, ctx := p.client(t, "https://10.0.0.1"), context.Background()
	if _, err := c.ThisHost(ctx); err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	a.slaveOf = "10.0.0.2"
	a.mu.Unlock()
	if _, err := c.ThisHost(ctx); err != nil || b.logins != 1 {
		t.Fatalf("after the move: %v, %d log-ins", err, b.logins)
	}
	a.mu.Lock()
	a.slaveOf = ""
	a.mu.Unlock()
	p.mu.Lock()
	delete(p.hosts, "10.0.0.2:443")
	p.mu.Unlock()
	c.rpc.CloseIdleConnections()
	if _, err := c.ThisHost(ctx); err == nil {
		t.Fatal("a dead coordinator answered")
	}
	if _, err := c.ThisHost(ctx); err != nil || a.logins != 2 {
		t.Errorf("back at the first host: %v, %d log-ins", err, a.logins)
	}
}

func TestTwoHostsNamingEachOther(t *testing.T) {
	a, b := newServer(), newServer()
	a.slaveOf, b.slaveOf = "10.0.0.2", "10.0.0.1"
	p := newFakePool(t, map[string]http.Handler{"10.0.0.1:443": a, "10.0.0.2:443": b})
	if _, err := p.client(t, "https://10.0.0.1").ThisHost(context.Background()); !IsCode(err, "HOST_IS_SLAVE") {
		t.Errorf("got %v", err)
	}
}

func TestUntrustedCertificate(t *testing.T) {
	p := newFakePool(t, map[string]http.Handler{"10.0.0.1:443": newServer()})
	p.certs = x509.NewCertPool()
	_, err := p.client(t, "https://10.0.0.1").ThisHost(context.Background())
	if err == nil || !strings.Contains(err.Error(), "self-signed") || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}

func TestConfigRefused(t *testing.T) {
	for name, cfg := range map[string]Config{
		"scheme":      {URL: "ftp://h", Username: "root"},
		"no host":     {URL: "https://", Username: "root"},
		"credentials": {URL: "https://root:pw@h", Username: "root"},
		"path":        {URL: "https://h/jsonrpc", Username: "root"},
		"no user":     {URL: "https://h"},
		"SM":          {Originator: "SM"},
		"not a URL":   {URL: "https://[::1", Username: "root"},
	} {
		if _, err := New(cfg); err == nil || strings.Contains(err.Error(), "pw") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestField(t *testing.T) {
	if got, err := Field("SR", "OpaqueRef:x"); err != nil || got != `field "SR" = "OpaqueRef:x"` {
		t.Errorf("%s, %v", got, err)
	}
}
