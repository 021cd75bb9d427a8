package xapiface_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

// wire is a client that knows bytes only.
type wire struct {
	t    testing.TB
	base string
	http *http.Client
}

func dial(t testing.TB, e *xapiface.Endpoint) wire {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(e.Addr(), "/") {
		network = "unix"
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, e.Addr())
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return wire{t: t, base: "http://xapi", http: &http.Client{Transport: transport}}
}

// reply is an answer with its body read.
type reply struct {
	status  int
	header  http.Header
	chunked bool
}

// post returns the answer and its body; an error of the transport is returned.
func (w wire) post(path, body string) (reply, string, error) {
	w.t.Helper()
	r, err := w.http.Post(w.base+path, "text/plain", strings.NewReader(body))
	if err != nil {
		return reply{}, "", err
	}
	defer func() { _ = r.Body.Close() }()
	text, err := io.ReadAll(r.Body)
	return reply{status: r.StatusCode, header: r.Header, chunked: len(r.TransferEncoding) > 0}, string(text), err
}

// json does a JSON-RPC 2.0 call and returns the result, or the error's message.
func (w wire) json(method string, params ...any) (result any, code string) {
	w.t.Helper()
	if params == nil {
		params = []any{}
	}
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		w.t.Fatal(err)
	}
	_, text, err := w.post("/jsonrpc", string(body))
	if err != nil {
		w.t.Fatal(err)
	}
	var out struct {
		Result any
		Error  *struct {
			Message string
			Data    []string
		}
	}
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		w.t.Fatalf("%s: %v in %s", method, err, text)
	}
	if out.Error != nil {
		return out.Error.Data, out.Error.Message
	}
	return out.Result, ""
}

func serveTCP(t testing.TB, p pool, host int, c *tls.Config) *xapiface.Endpoint {
	t.Helper()
	e, err := p.face.ServeTCP("127.0.0.1:0", p.Hosts[host], c)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestPathsAndHeaders(t *testing.T) {
	p := newPool(t, 1)
	w := dial(t, serveTCP(t, p, 0, nil))
	const xmlCall = `<methodCall><methodName>session.login_with_password</methodName><params><param><value>root</value></param><param><value>secret</value></param></params></methodCall>`
	const json1 = `{"method":"session.login_with_password","params":["root","secret"],"id":1}`
	const json2 = `{"jsonrpc":"2.0","method":"session.login_with_password","params":["root","secret"],"id":1}`
	for _, c := range []struct{ path, body, contentType, prefix string }{
		{"/", xmlCall, "text/xml", `<?xml version="1.0"?><methodResponse>`},
		{"/RPC2", xmlCall, "text/xml", `<?xml version="1.0"?><methodResponse>`},
		{"/xmlrpc", xmlCall, "text/xml", `<?xml version="1.0"?><methodResponse>`},
		{"/json", xmlCall, "text/xml", `<?xml version="1.0"?><methodResponse>`},
		{"/jsonrpc", json1, "application/json", `{"result":"OpaqueRef:`},
		{"/jsonrpc", json2, "application/json", `{"jsonrpc":"2.0","result":"OpaqueRef:`},
		{"/jsonrpc/x?y=z", json2, "application/json", `{"jsonrpc":"2.0","result":"OpaqueRef:`},
	} {
		r, text, err := w.post(c.path, c.body)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(text, c.prefix) {
			t.Errorf("%s: %s", c.path, text)
		}
		want := map[string]string{
			"Content-Type": c.contentType, "Connection": "keep-alive", "Cache-Control": "no-cache, no-store", "Access-Control-Allow-Origin": "*",
			"Content-Length": fmt.Sprint(len(text)),
		}
		for name, v := range want {
			if got := r.header.Get(name); got != v {
				t.Errorf("%s: %s is %q, want %q", c.path, name, got, v)
			}
		}
		if r.chunked || r.status != http.StatusOK {
			t.Errorf("%s: status %d, chunked %v", c.path, r.status, r.chunked)
		}
	}
}

func TestBadRequests(t *testing.T) {
	p := newPool(t, 1)
	w := dial(t, serveTCP(t, p, 0, nil))
	for _, c := range []struct {
		name, path, body string
		status           int
		contains         string
	}{
		{"large", "/", strings.Repeat(" ", xapiface.MaxRequest+1), http.StatusRequestEntityTooLarge, "300 KiB"},
		{"largest", "/", strings.Repeat(" ", xapiface.MaxRequest), http.StatusOK, "INTERNAL_ERROR"},
		{"UTF-8 in XML", "/", "<methodCall><methodName>a\xff</methodName></methodCall>", http.StatusOK, "<value>INVALID_VALUE</value>"},
		{"UTF-8 in JSON", "/jsonrpc", "{\"method\":\"a\xff\"}", http.StatusOK, `"message":"INVALID_VALUE"`},
		{"no XML", "/", "hello", http.StatusOK, "INTERNAL_ERROR"},
		{"no JSON", "/jsonrpc", "hello", http.StatusOK, `"id":null`},
		{"unknown method", "/jsonrpc", `{"method":"a.b","params":[],"id":1}`, http.StatusOK, `"error":["MESSAGE_METHOD_UNKNOWN","a.b"]`},
	} {
		r, text, err := w.post(c.path, c.body)
		if err != nil || r.status != c.status || !strings.Contains(text, c.contains) {
			t.Errorf("%s: status %d, %v, %.200s", c.name, r.status, err, text)
		}
	}
	r, err := w.http.Get(w.base + "/")
	if err != nil {
		t.Fatal(err)
	}
	if r.Header.Get("Content-Type") != "text/html" {
		t.Errorf("GET gives %s", r.Header.Get("Content-Type"))
	}
	if err := r.Body.Close(); err != nil {
		t.Error(err)
	}
}

func TestLoginOverTCP(t *testing.T) {
	p := newPool(t, 2)
	w, supporter := dial(t, serveTCP(t, p, 0, nil)), dial(t, serveTCP(t, p, 1, nil))
	if data, code := w.json("session.login_with_password", "root", "wrong"); code != "SESSION_AUTHENTICATION_FAILED" {
		t.Errorf("wrong password: %v %s", data, code)
	}
	s, code := w.json("session.login_with_password", "root", "secret", "1.1", "me")
	if code != "" {
		t.Fatal(code)
	}
	if got := xapidb.Value[string](p.db, "session", s.(string), "originator"); got != "me" {
		t.Errorf("originator %q", got)
	}
	for method, params := range map[string][]any{"session.login_with_password": {"root", "secret"}, "VM.get_all": {s}} {
		data, code := supporter.json(method, params...)
		if diff := cmp.Diff([]string{"10.0.0.11"}, data); code != "HOST_IS_SLAVE" || diff != "" {
			t.Errorf("%s on a supporter: %v %s", method, data, code)
		}
	}
	if _, code := supporter.json("session.slave_local_login_with_password", "root", "secret"); code != "" {
		t.Errorf("emergency login on a supporter: %s", code)
	}
	if _, code := w.json("session.logout", s); code != "" {
		t.Error(code)
	}
	if data, code := w.json("VM.get_all", s); code != "SESSION_INVALID" || !cmp.Equal(data, []string{s.(string)}) {
		t.Errorf("after logout: %v %s", data, code)
	}
}

func TestTLS(t *testing.T) {
	p := newPool(t, 1)
	server := httptest.NewUnstartedServer(nil)
	server.StartTLS()
	certificate := server.TLS.Certificates
	server.Close()
	w := dial(t, serveTCP(t, p, 0, &tls.Config{Certificates: certificate}))
	w.base = "https://xapi"
	if _, code := w.json("session.login_with_password", "root", "secret"); code != "" {
		t.Error(code)
	}
}

func TestUnixSocketNeedsNoPassword(t *testing.T) {
	p := newPool(t, 2)
	path := filepath.Join(t.TempDir(), "x")
	e, err := p.face.ServeUnix(path, p.Hosts[1])
	if err != nil {
		t.Fatal(err)
	}
	w := dial(t, e)
	s, code := w.json("session.login_with_password", "root", "", "", "agent")
	if code != "" {
		t.Fatal(code)
	}
	if host, code := w.json("session.get_this_host", s, s); code != "" || host != p.Hosts[1] {
		t.Errorf("this host %v %s", host, code)
	}
}

func TestFaults(t *testing.T) {
	const method = "host.get_servertime"
	for _, c := range []struct {
		name  string
		fault xapiface.Fault
		want  func(r reply, text string, err error) bool
	}{
		{"refuse", xapiface.Fault{Kind: xapiface.Refuse}, func(_ reply, _ string, err error) bool { return strings.Contains(err.Error(), "refused") }},
		{"reset", xapiface.Fault{Kind: xapiface.Reset}, func(_ reply, _ string, err error) bool { return err != nil }},
		{"html", xapiface.Fault{Kind: xapiface.HTML}, func(r reply, text string, err error) bool {
			return err == nil && r.status == http.StatusBadGateway && strings.HasPrefix(text, "<html>")
		}},
		{"truncate", xapiface.Fault{Kind: xapiface.Truncate}, func(_ reply, _ string, err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		{"slow", xapiface.Fault{Kind: xapiface.Slow, Delay: time.Hour}, func(_ reply, _ string, err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
		{"fail", xapiface.Fault{Kind: xapiface.Fail, Code: "HOST_OFFLINE", Params: []string{"h"}}, func(_ reply, text string, _ error) bool {
			return strings.Contains(text, `"HOST_OFFLINE","data":["h"]`)
		}},
		{"emergency", xapiface.Fault{Kind: xapiface.Emergency}, func(_ reply, text string, _ error) bool { return strings.Contains(text, "HOST_STILL_BOOTING") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPool(t, 1)
			w := dial(t, serveTCP(t, p, 0, nil))
			body := fmt.Sprintf(`{"jsonrpc":"2.0","method":%q,"params":[%q,%q],"id":1}`, method, p.s, p.Hosts[0])
			ok := func() {
				t.Helper()
				if _, text, err := w.post("/jsonrpc", body); err != nil || !strings.Contains(text, `"result":"`) {
					t.Errorf("without a fault: %s %v", text, err)
				}
			}
			ok()
			p.face.SetFault(p.Hosts[0], c.fault)
			struck := w
			if c.name == "slow" {
				// The client's patience is what ends the call, so that no real time is asserted.
				struck.http = &http.Client{Transport: w.http.Transport, Timeout: 20 * time.Millisecond}
			}
			w.http.CloseIdleConnections() // A kept connection would end in its own way.
			r, text, err := struck.post("/jsonrpc", body)
			if !c.want(r, text, err) {
				t.Errorf("struck: status %d, %v, %s", r.status, err, text)
			}
			if err := p.face.ClearFaults(p.Hosts[0]); err != nil {
				t.Fatal(err)
			}
			ok()
		})
	}
}

func TestEndpointsOfADownHost(t *testing.T) {
	p := newPool(t, 1)
	closed := serveTCP(t, p, 0, nil)
	p.face.SetFault(p.Hosts[0], xapiface.Fault{Kind: xapiface.Refuse})
	late := serveTCP(t, p, 0, nil)
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := dial(t, late).post("/", ""); err == nil {
		t.Error("an endpoint opened on a host that is down answers")
	}
	if err := p.face.ClearFaults(p.Hosts[0]); err != nil {
		t.Fatal(err)
	}
	if _, _, err := dial(t, late).post("/", ""); err != nil {
		t.Errorf("the host is back, and: %v", err)
	}
	if _, _, err := dial(t, closed).post("/", ""); err == nil {
		t.Error("a closed endpoint came back")
	}
}

func TestFaultsStrikeMethodsAndEnd(t *testing.T) {
	p := newPool(t, 1)
	p.face.SetFault(p.Hosts[0], xapiface.Fault{Kind: xapiface.Fail, Code: "X", Methods: []string{"VM.get_all"}, Count: 2})
	var codes []string
	for _, m := range []string{"VM.get_all", "SR.get_all", "VM.get_all", "VM.get_all"} {
		_, err := p.try(m)
		codes = append(codes, fmt.Sprint(err))
	}
	if diff := cmp.Diff([]string{"X[]", "<nil>", "X[]", "<nil>"}, codes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRestartCutsConnections(t *testing.T) {
	p := newPool(t, 1)
	e, err := p.face.ServeUnix(filepath.Join(t.TempDir(), "x"), p.Hosts[0])
	if err != nil {
		t.Fatal(err)
	}
	w := dial(t, e)
	vm := p.create("VM", nil)
	s, _ := w.json("session.login_with_password", "root", "")
	blocked := make(chan error)
	go func() {
		_, text, err := w.post("/jsonrpc", fmt.Sprintf(`{"jsonrpc":"2.0","method":"event.from","params":[%q,["sr"],"",60],"id":1}`, s))
		if err == nil && !strings.Contains(text, "SESSION_INVALID") {
			err = errors.New("answered " + text)
		} else {
			err = nil
		}
		blocked <- err
	}()
	if _, err := p.face.AwaitCall(t.Context(), func(c xapiface.CallRecord) bool { return c.Method == "session.login_with_password" }); err != nil {
		t.Fatal(err)
	}
	p.face.Restart()
	if err := <-blocked; err != nil {
		t.Error(err)
	}
	if _, code := w.json("VM.get_all", s); code != "SESSION_INVALID" {
		t.Errorf("old session: %s", code)
	}
	s, _ = w.json("session.login_with_password", "root", "")
	if got, _ := w.json("VM.get_uuid", s, vm); got == nil {
		t.Error("rows are gone")
	}
}

func TestNaNIsBareInJSON(t *testing.T) {
	p := newPool(t, 1)
	w := dial(t, serveTCP(t, p, 0, nil))
	vm := p.create("VM", nil)
	p.call("VM.set_HVM_shadow_multiplier", vm, "NaN")
	_, text, err := w.post("/jsonrpc", fmt.Sprintf(`{"jsonrpc":"2.0","method":"VM.get_HVM_shadow_multiplier","params":[%q,%q],"id":1}`, p.s, vm))
	if err != nil || text != `{"jsonrpc":"2.0","result":NaN,"id":1}` {
		t.Errorf("%s %v", text, err)
	}
}

// A pool of 27,000 objects, all its VMs in one answer.
func BenchmarkGetAllRecords(b *testing.B) {
	p := newPool(b, 3)
	for n := range 2000 {
		p.create("VM", map[string]any{"name_label": fmt.Sprint("vm", n), "resident_on": p.Hosts[n%3], "other_config": map[string]string{"a": "b"}})
	}
	e, err := p.face.ServeTCP("127.0.0.1:0", p.Hosts[0], nil)
	if err != nil {
		b.Fatal(err)
	}
	w := dial(b, e)
	for _, c := range []struct{ name, path, body string }{
		{"json", "/jsonrpc", fmt.Sprintf(`{"jsonrpc":"2.0","method":"VM.get_all_records","params":[%q],"id":1}`, p.s)},
		{"xml", "/", `<methodCall><methodName>VM.get_all_records</methodName><params><param><value>` + p.s + `</value></param></params></methodCall>`},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				_, text, err := w.post(c.path, c.body)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(text)))
			}
		})
	}
}
