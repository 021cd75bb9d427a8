package linstorface

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

const gib = 1 << 20 // KiB

// reference finds the reference data, from XOSTOR_REFERENCE or beside the module, or skips the test.
func reference(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("XOSTOR_REFERENCE"); dir != "" {
		return filepath.Join(dir, "linstor-data")
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir != filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			data := filepath.Join(dir, "..", "shared", "reference", "linstor-data")
			if _, err := os.Stat(data); err == nil {
				return data
			}
		}
		dir = filepath.Dir(dir)
	}
	t.Skip("LINSTOR's OpenAPI document and traces are not here: set XOSTOR_REFERENCE to the folder that has linstor-data")
	return ""
}

// document loads the OpenAPI document once, with LINSTOR's deviations from it.
var document = sync.OnceValues(func() (routers.Router, error) {
	doc, err := openapi3.NewLoader().LoadFromFile(documentPath)
	if err != nil {
		return nil, err
	}
	adaptDocument(doc)
	return legacy.NewRouter(doc, openapi3.DisableExamplesValidation(), openapi3.DisableSchemaDefaultsValidation())
})

var documentPath string

// checker validates each answer of a handler against LINSTOR's OpenAPI document.
type checker struct {
	t       testing.TB
	next    http.Handler
	router  routers.Router
	mu      sync.Mutex
	checked int
}

// checked puts the OpenAPI check around a face; without the reference data it returns the plain handler.
func checked(t testing.TB, f *Face) http.Handler {
	if os.Getenv("XOSTOR_REFERENCE") == "" && !haveReference() {
		return f.Handler()
	}
	return newChecker(t, f.Handler())
}

func haveReference() bool {
	matches, _ := filepath.Glob(filepath.Join("..", "..", "..", "..", "shared", "reference", "linstor-data", "*.yaml"))
	return len(matches) > 0
}

func newChecker(t testing.TB, next http.Handler) *checker {
	t.Helper()
	documentPath = filepath.Join(reference(t), "rest_v1_openapi-1.33.3.yaml")
	router, err := document()
	if err != nil {
		t.Fatal(err)
	}
	return &checker{t: t, next: next, router: router}
}

func (c *checker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/v1/events/") {
		c.next.ServeHTTP(w, r)
		return
	}
	rec := httptest.NewRecorder()
	c.next.ServeHTTP(rec, r)
	res := rec.Result()
	body, _ := io.ReadAll(res.Body)
	c.check(r, res, body)
	for k, v := range res.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(res.StatusCode)
	_, _ = w.Write(body)
}

func (c *checker) check(r *http.Request, res *http.Response, body []byte) {
	c.t.Helper()
	if res.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(bytes.NewReader(body))
		if err == nil {
			body, err = io.ReadAll(z)
		}
		if err != nil {
			c.t.Errorf("%s %s: bad gzip: %v", r.Method, r.URL, err)
		}
	}
	req := r.Clone(context.Background())
	req.URL.Host, req.Host = "", ""
	route, params, err := c.router.FindRoute(req)
	if err != nil {
		if _, known := undocumented[r.Method+" "+r.URL.Path]; !known && !undocumentedPrefix(r) {
			c.t.Errorf("%s %s: answered %d but not in the document: %v", r.Method, r.URL.Path, res.StatusCode, err)
		}
		return
	}
	c.mu.Lock()
	c.checked++
	c.mu.Unlock()
	var raw any
	if err := json.Unmarshal(body, &raw); err != nil {
		c.t.Errorf("%s %s: status %d is not JSON: %.80q", r.Method, r.URL.Path, res.StatusCode, body)
		return
	}
	for _, where := range emptyValues("", raw) {
		c.t.Errorf("%s %s: %s is empty; LINSTOR leaves empty values out", r.Method, r.URL.Path, where)
	}
	in := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: req, PathParams: params, Route: route},
		Status:                 res.StatusCode, Header: http.Header{"Content-Type": {"application/json"}},
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true},
	}
	in.SetBodyBytes(body)
	if !statusDocumented(route, res.StatusCode) {
		return
	}
	if err := openapi3filter.ValidateResponse(context.Background(), in); err != nil {
		c.t.Errorf("%s %s %d: %.600v\nbody: %.400s", r.Method, r.URL.Path, res.StatusCode, err, body)
	}
}

// emptyValues finds what LINSTOR's serialiser never writes: null, and empty strings, lists and maps inside a body. The
// exceptions are answers whose top is an empty list or object, messages, and layer objects that only have a type.
func emptyValues(at string, v any) (bad []string) {
	switch x := v.(type) {
	case map[string]any:
		for k, v := range x {
			where := at + "." + k
			switch y := v.(type) {
			case nil:
				bad = append(bad, where)
			case string:
				if y == "" {
					bad = append(bad, where)
				}
			case []any:
				if len(y) == 0 {
					bad = append(bad, where)
				}
			case map[string]any:
				// Jackson's "non-empty" looks at maps and lists; an object without set fields is written as {}.
				if len(y) == 0 && !strings.HasSuffix(where, ".storage") && !strings.HasSuffix(where, ".select_filter") &&
					!strings.HasSuffix(where, ".state") {
					bad = append(bad, where)
				}
			}
			bad = append(bad, emptyValues(where, v)...)
		}
	case []any:
		for _, v := range x {
			bad = append(bad, emptyValues(at+"[]", v)...)
		}
	}
	return bad
}

// lab is a cluster of three nodes with one thin and one thick pool each, and its face on an httptest server.
type lab struct {
	*testing.T
	sim  *linstorsim.Cluster
	face *Face
	url  string
	now  time.Time
}

func newLab(t *testing.T, version string) *lab {
	l := &lab{T: t, now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)}
	l.sim = linstorsim.New(linstorsim.Config{Version: version, Now: func() time.Time { return l.now }, Rand: rand.New(rand.NewPCG(7, 7))})
	for i, n := range []string{"hostA", "hostB", "hostC"} {
		l.sim.AddNode(n, "10.0.0."+string(rune('1'+i)))
		l.sim.AddPool(n, "thin", "LVM_THIN", 100*gib)
		l.sim.AddPool(n, "thick", "LVM", 50*gib)
	}
	if err := l.sim.CreateGroup("xcp-sr-thin", "thin", 2).Err(); err != nil {
		t.Fatal(err)
	}
	l.face = New(l.sim)
	srv := httptest.NewUnstartedServer(checked(t, l.face))
	srv.Config.ErrorLog = quiet
	srv.Start()
	t.Cleanup(func() {
		l.face.CutStreams()
		srv.CloseClientConnections()
		srv.Close()
	})
	l.url = srv.URL
	return l
}

// call makes a request and returns status and body.
func (l *lab) call(method, path, body string) (int, string) {
	l.Helper()
	req, err := http.NewRequestWithContext(l.Context(), method, l.url+path, strings.NewReader(body))
	if err != nil {
		l.Fatal(err)
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		l.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	out, err := io.ReadAll(res.Body)
	if err != nil {
		l.Fatalf("%s %s: %v", method, path, err)
	}
	return res.StatusCode, string(out)
}

// rc makes a mutating request and returns status and entries.
func (l *lab) rc(method, path, body string) (int, linstorsim.Reply) {
	l.Helper()
	status, out := l.call(method, path, body)
	var rc linstorsim.Reply
	if err := json.Unmarshal([]byte(out), &rc); err != nil {
		l.Fatalf("%s %s: %d %.200q is no ApiCallRc list: %v", method, path, status, out, err)
	}
	return status, rc
}
