package bus

import (
	"encoding/json"
	"testing"
	"time"
	"unicode/utf8"
)

// FuzzTableHeader: what a table writes its mirrors can read, and no header makes reading panic.
func FuzzTableHeader(f *testing.F) {
	f.Add("put", uint64(1), uint64(2), "key", "", "0000000000000001", "00000000000000000002", "1")
	f.Add("page", uint64(1<<63), uint64(0), "", "größe", "zz", "-1", "x")
	f.Add("alive", uint64(0), ^uint64(0), "\xff\r\n", "%41", "", "", "")
	f.Fuzz(func(t *testing.T, k string, epoch, seq uint64, key, stale, rawEpoch, rawSeq, rawPage string) {
		raw := Header{HeaderTable: "t", HeaderType: typePrefix + "t." + k, HeaderEpoch: rawEpoch, HeaderSequence: rawSeq, HeaderPage: rawPage, HeaderPages: rawPage}
		if h, err := decodeTableHeader("t", raw); err == nil && string(h.kind) != k {
			t.Fatalf("kind %q became %q", k, h.kind)
		}
		in := tableHeader{kind: kind(k), epoch: epoch, seq: seq, key: key, stale: stale}
		out, err := decodeTableHeader("t", in.encode("t", "/test", time.Unix(0, 0)))
		if err != nil {
			t.Fatalf("read %+v: %v", in, err)
		}
		if utf8.ValidString(key) && utf8.ValidString(stale) && out != in {
			t.Fatalf("%+v became %+v", in, out)
		}
	})
}

// FuzzPage: a page is JSON whatever the keys are, and holds what the table held.
func FuzzPage(f *testing.F) {
	f.Add("a", "b", 10)
	f.Add("\"", "\n\x00", 1)
	f.Add("größe", "\xff", 0)
	f.Fuzz(func(t *testing.T, a, b string, pageSize int) {
		rows := map[string][]byte{a: []byte(`{"x":1}`), b: []byte(`[]`)}
		s := newSnapshot(1, "", rows, pageSize)
		got := map[string]string{}
		for n := range s.pages() {
			var page []struct {
				Key  string
				Data json.RawMessage
			}
			if err := json.Unmarshal(s.page(n), &page); err != nil {
				t.Fatalf("page %q: %v", s.page(n), err)
			}
			for _, row := range page {
				got[row.Key] = string(row.Data)
			}
		}
		for key, value := range rows {
			if utf8.ValidString(key) && got[key] != string(value) {
				t.Fatalf("key %q: %q, want %q", key, got[key], value)
			}
		}
	})
}
