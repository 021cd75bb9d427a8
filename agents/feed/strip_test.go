package feed

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestStrip(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{`{}`, `{}`},
		{` { "a" : 1 , "VDIs":["x","y"],"b":"t\"wo" } `, `{"a":1,"b":"t\"wo"}`},
		{`{"VDIs":[]}`, `{}`},
		{`{"a":{"VDIs":1},"VDIs":{"a":[{"}":"]"}]},"z":null}`, `{"a":{"VDIs":1},"z":null}`},
	} {
		got, err := strip(json.RawMessage(tc.in), []string{"VDIs"})
		if err != nil || string(got) != tc.want {
			t.Errorf("strip %s: %s, %v; want %s", tc.in, got, err, tc.want)
		}
	}
	for _, in := range []string{``, `[]`, `"x"`, `null`, `{"a"`, `{"a":`, `{"a" 1}`, `{1:2}`} {
		if got, err := strip(json.RawMessage(in), nil); !errors.Is(err, errNotRecord) {
			t.Errorf("strip %s: %s, %v", in, got, err)
		}
	}
}

func TestRowLeavesPasswordsOut(t *testing.T) {
	got, err := row("pbd", "OpaqueRef:1", json.RawMessage(`{"uuid":"u","device_config":{"target":"10.0.0.1","chappassword":"x","cifspassword_secret":"y"}}`))
	if want := `{"ref":"OpaqueRef:1","device_config":{"target":"10.0.0.1"},"uuid":"u"}`; err != nil || string(got) != want {
		t.Errorf("row: %s, %v; want %s", got, err, want)
	}
	got, err = row("vm", "OpaqueRef:1", json.RawMessage(`{"uuid":"u","xenstore_data":{"vm-data/pw":"x"}}`))
	if want := `{"ref":"OpaqueRef:1","uuid":"u"}`; err != nil || string(got) != want {
		t.Errorf("row: %s, %v; want %s", got, err, want)
	}
}

// FuzzStrip: on valid JSON objects strip does what decoding, deleting and encoding do; on the rest it does not panic.
func FuzzStrip(f *testing.F) {
	for _, seed := range []string{`{}`, `{"a":1}`, `{"VDIs":["x"],"b":{"c":[1,2,{"d":"}"}]}}`, `{"\u0056DIs":1}`, `{"a":"\\"}`, `[`, `{"a"`, "{\"a\"\n:\ttrue}"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got, err := strip(json.RawMessage(in), []string{"VDIs", "b"})
		if _, err := member(json.RawMessage(in), "uuid"); err == nil && !json.Valid([]byte(in)) && len(in) > 0 && in[0] == '[' {
			t.Fatalf("a list has members: %q", in)
		}
		var want map[string]json.RawMessage
		if json.Unmarshal([]byte(in), &want) != nil || want == nil {
			return
		}
		if err != nil {
			t.Fatalf("strip %q: %v", in, err)
		}
		var have map[string]json.RawMessage
		if err := json.Unmarshal(got, &have); err != nil {
			t.Fatalf("strip %q made %q: %v", in, got, err)
		}
		// A name spelled with escapes is another spelling of the same name; XAPI writes none, and then too much is kept.
		for _, name := range []string{"VDIs", "b"} {
			if _, ok := have[name]; !ok {
				delete(want, name)
			}
		}
		if diff := cmp.Diff(want, have); diff != "" {
			t.Fatalf("strip %q made %q: %s", in, got, diff)
		}
	})
}
