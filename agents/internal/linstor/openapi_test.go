package linstor_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
)

// referenceFile finds a file of the shared reference folder: in $XOSTOR_REFERENCE, else beside the module.
func referenceFile(name string) (string, bool) {
	var roots []string
	if dir := os.Getenv("XOSTOR_REFERENCE"); dir != "" {
		roots = append(roots, dir)
	}
	if dir, err := os.Getwd(); err == nil {
		for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
				roots = append(roots, filepath.Join(dir, "..", "shared", "reference"))
			}
		}
	}
	for _, root := range roots {
		file := filepath.Join(root, name)
		if _, err := os.Stat(file); err == nil {
			return file, true
		}
	}
	return "", false
}

var openAPI = sync.OnceValues(func() (routers.Router, error) {
	file, ok := referenceFile("linstor-data/rest_v1_openapi-1.33.3.yaml")
	if !ok {
		return nil, os.ErrNotExist
	}
	doc, err := openapi3.NewLoader().LoadFromFile(file)
	if err != nil {
		return nil, err
	}
	doc.Servers = nil
	return legacy.NewRouter(doc, openapi3.DisableExamplesValidation())
})

// validateRequest checks a call that we send against LINSTOR's own OpenAPI document of 1.33.3.
func validateRequest(t *testing.T, method, uri, body string) {
	t.Helper()
	router, err := openAPI()
	if os.IsNotExist(err) {
		t.Log("LINSTOR's OpenAPI document is not at hand: request not validated")
		return
	}
	if err != nil {
		t.Fatalf("load openapi document: %v", err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+uri, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body == "" {
		req.Body = http.NoBody
	} else {
		req.Header.Set("Content-Type", "application/json")
	}
	route, params, err := router.FindRoute(req)
	if err != nil {
		t.Fatalf("%s %s is not in the openapi document: %v", method, uri, err)
	}
	input := &openapi3filter.RequestValidationInput{
		Request: req, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc},
	}
	if err := openapi3filter.ValidateRequest(t.Context(), input); err != nil {
		t.Errorf("%s %s: %v", method, uri, err)
	}
}
