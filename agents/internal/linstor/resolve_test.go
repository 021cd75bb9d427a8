package linstor

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestResolve_IsAskedEachTimeAControllerMustBeFound(t *testing.T) {
	serve := func(version string) *httptest.Server {
		mux := http.NewServeMux()
		mux.HandleFunc("/health", func(http.ResponseWriter, *http.Request) {})
		mux.HandleFunc("/v1/controller/version", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(`{"version":"` + version + `","rest_api_version":"1.27.0"}`))
		})
		s := httptest.NewServer(mux)
		t.Cleanup(s.Close)
		return s
	}
	first, second := serve("1.33.1"), serve("1.33.2")
	addresses := []string{first.URL}
	var trouble error
	c, err := New(Options{Resolve: func(context.Context) ([]string, error) { return addresses, trouble }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v, err := c.Version(t.Context()); err != nil || v.Version != "1.33.1" {
		t.Fatalf("first controller: %+v, %v", v, err)
	}
	first.Close()
	addresses = []string{first.URL, second.URL} // the pool has grown meanwhile
	if v, err := c.Version(t.Context()); err != nil || v.Version != "1.33.2" {
		t.Fatalf("after the move: %+v, %v; want the new host's controller", v, err)
	}
	second.Close()
	trouble = errors.New("XAPI is away")
	if _, err := c.Version(t.Context()); err == nil || !strings.Contains(err.Error(), "XAPI is away") {
		t.Errorf("without addresses: %v, want the reason", err)
	}
}
