package linstorface

import (
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// trace is one recorded request and the normalised answer of a live LINSTOR controller.
type trace struct {
	Name           string          `json:"name"`
	Method         string          `json:"method"`
	Path           string          `json:"path"`
	Body           json.RawMessage `json:"body"`
	ExpectedStatus int             `json:"expectedStatus"`
	ExpectedBody   any             `json:"expectedBody"`
}

// explained lists traces that are allowed to differ, by file name, with the reason. None is.
var explained = map[string]string{}

// TestTracesOfALiveController replays the recorded traces in order against one fresh cluster without satellites.
func TestTracesOfALiveController(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(reference(t), "traces", "*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no traces: %v", err)
	}
	slices.Sort(files)
	sim := linstorsim.New(linstorsim.Config{})
	h := newChecker(t, New(sim).Handler())
	matched := 0
	for i, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var tr trace
		if err := json.Unmarshal(raw, &tr); err != nil {
			t.Fatal(err)
		}
		// Addresses were removed from the recording.
		body := strings.ReplaceAll(string(tr.Body), "<ip>", fmt.Sprintf("10.1.0.%d", i+1))
		body = strings.ReplaceAll(body, `\u003cip\u003e`, fmt.Sprintf("10.1.0.%d", i+1))
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(tr.Method, tr.Path, strings.NewReader(body)))
		var got any
		if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil {
			t.Errorf("%s: body is not JSON: %v", filepath.Base(file), err)
			continue
		}
		got = normalise(got)
		if rec.Code == tr.ExpectedStatus && reflect.DeepEqual(got, tr.ExpectedBody) {
			matched++
			continue
		}
		if why, ok := explained[filepath.Base(file)]; ok {
			t.Logf("%s differs, explained: %s", filepath.Base(file), why)
			continue
		}
		want, _ := json.Marshal(tr.ExpectedBody)
		have, _ := json.Marshal(got)
		t.Errorf("%s: status %d want %d\n got %s\nwant %s", filepath.Base(file), rec.Code, tr.ExpectedStatus, have, want)
	}
	t.Logf("%d of %d traces matched", matched, len(files))
	if matched+len(explained) < len(files) {
		t.Errorf("only %d of %d traces matched", matched, len(files))
	}
}

// dropped are the fields that the recorder took out of every object.
var dropped = []string{"uuid", "connection_status", "is_active", "storage_providers", "resource_layers",
	"unsupported_providers", "unsupported_layers", "flags", "description",
	"version", "git_hash", "build_time", "rest_api_version"}

// normalise does to an answer what the recorder did: returns codes as a class, the same class once; addresses, uuids and
// what a running cluster decides are gone; so are all properties but Aux/, and the default resource group.
func normalise(v any) any {
	switch x := v.(type) {
	case []any:
		out := []any{}
		for _, e := range x {
			if m, ok := e.(map[string]any); ok && m["name"] == linstorsim.DefaultGroup {
				continue
			}
			n := normalise(e)
			if m, ok := n.(map[string]any); ok && m["ret_code_class"] != nil && slices.ContainsFunc(out, func(o any) bool { return reflect.DeepEqual(o, n) }) {
				continue
			}
			out = append(out, n)
		}
		return out
	case map[string]any:
		if code, ok := x["ret_code"].(float64); ok {
			class := "<info>"
			if code < 0 {
				class = "<error>"
			}
			return map[string]any{"ret_code_class": class}
		}
		out := map[string]any{}
		for k, e := range x {
			switch {
			case slices.Contains(dropped, k):
			case k == "address":
				out[k] = "<ip>"
			case k == "props":
				if p := auxProps(e); len(p) > 0 {
					out[k] = p
				}
			case strings.Contains(k, "/") && !strings.HasPrefix(k, "Aux/"), strings.HasPrefix(k, "default"):
			default:
				out[k] = normalise(e)
			}
		}
		return out
	}
	return v
}

func auxProps(v any) map[string]any {
	out := map[string]any{}
	for k, e := range v.(map[string]any) {
		if strings.HasPrefix(k, "Aux/") {
			out[k] = e
		}
	}
	return out
}
