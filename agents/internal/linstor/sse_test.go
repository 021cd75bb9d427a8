package linstor

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestFrameReader(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		want []string // name=data
		end  error
	}{
		"one":                     {"event: a\ndata: {}\n\n", []string{"a={}"}, io.EOF},
		"CRLF":                    {"event: a\r\ndata: {}\r\n\r\nevent: b\r\ndata: 1\r\n\r\n", []string{"a={}", "b=1"}, io.EOF},
		"CR":                      {"event: a\rdata: 1\r\revent: b\rdata: 2\r\r", []string{"a=1", "b=2"}, io.EOF},
		"mixed line ends":         {"event: a\r\ndata: 1\n\r\nevent: b\rdata: 2\n\n", []string{"a=1", "b=2"}, io.EOF},
		"data over several lines": {"data: [1,\ndata:2,\ndata: 3]\n\n", []string{"message=[1,\n2,\n3]"}, io.EOF},
		"empty data line":         {"event: a\ndata\n\n", []string{"a="}, io.EOF},
		"comments":                {": hello\n\n:\nevent: a\n: in between\ndata: 1\n\n", []string{"a=1"}, io.EOF},
		"unknown fields":          {"id: 7\nretry: 1\nfoo\nevent: a\ndata: 1\n\n", []string{"a=1"}, io.EOF},
		"no data, dropped":        {"event: a\n\ndata: 1\n\n", []string{"message=1"}, io.EOF},
		"one space is stripped":   {"event:a\ndata:  x\n\n", []string{"a= x"}, io.EOF},
		"colon in data":           {"data: {\"a\":1}\n\n", []string{`message={"a":1}`}, io.EOF},
		"last event name counts":  {"event: a\nevent: b\ndata: 1\n\n", []string{"b=1"}, io.EOF},
		"byte order mark":         {"\xef\xbb\xbfevent: a\ndata: 1\n\n", []string{"a=1"}, io.EOF},
		"cut after an event":      {"event: a\ndata: 1\n\n\n", []string{"a=1"}, io.EOF},
		"cut before the end":      {"event: a\ndata: 1\n\nevent: b\ndata: 2\n", []string{"a=1"}, io.ErrUnexpectedEOF},
		"cut in a line":           {"event: a\ndata: 1\n\nevent: b\ndata: {\"x", []string{"a=1"}, io.ErrUnexpectedEOF},
		"cut in an event name":    {"event: may-prom", nil, io.ErrUnexpectedEOF},
		"nothing":                 {"", nil, io.EOF},
		"twice the same":          {"event: a\ndata: 1\n\nevent: a\ndata: 1\n\n", []string{"a=1", "a=1"}, io.EOF},
		"line above the limit":    {"data: " + strings.Repeat("x", maxEventBytes) + "\n\n", nil, ErrMalformed},
		"event above the limit":   {strings.Repeat("data: "+strings.Repeat("x", 1000)+"\n", 1100), nil, ErrMalformed},
		"comments have no limit":  {strings.Repeat(":"+strings.Repeat("x", 1000)+"\n", 1100) + "data: 1\n\n", []string{"message=1"}, io.EOF},
	} {
		for how, wrap := range map[string]func(io.Reader) io.Reader{
			"at once": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader,
		} {
			if how != "at once" && len(tc.in) > maxEventBytes/2 {
				continue // Two seconds each under the race detector, and the limit does not depend on it.
			}
			t.Run(name+", "+how, func(t *testing.T) {
				got, err := readFrames(wrap(strings.NewReader(tc.in)))
				if !errors.Is(err, tc.end) || strings.Join(got, "|") != strings.Join(tc.want, "|") {
					t.Errorf("got %q, %v; want %q, %v", got, err, tc.want, tc.end)
				}
			})
		}
	}
}

func readFrames(r io.Reader) ([]string, error) {
	f := newFrameReader(r)
	var got []string
	for {
		fr, err := f.next()
		if err != nil {
			return got, err
		}
		got = append(got, fr.name+"="+string(fr.data))
	}
}

// A CR must dispatch at once: waiting for the LF that may follow would hold the event back until the next one.
func TestFrameReader_DoesNotWaitAfterCR(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	go func() { _, _ = io.WriteString(w, "data: 1\r\r") }()
	if fr, err := newFrameReader(r).next(); err != nil || string(fr.data) != "1" {
		t.Fatalf("got %q, %v", fr.data, err)
	}
}

func FuzzFrameReader(f *testing.F) {
	for _, seed := range []string{
		"event: may-promote-change\ndata: {\"resource_name\":\"r\",\"node_name\":\"n\",\"may_promote\":true}\n\n",
		"data: a\r\ndata: b\r\n\r\n", ": c\rdata\r\r", "\xef\xbb\xbfdata: 1\n\n", "event: error\ndata: [{}]\n\n", "data: cut",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := readFrames(bytes.NewReader(in))
		if err == nil {
			t.Fatal("a finite stream must end")
		}
		// How the bytes arrive must not matter.
		slow, slowErr := readFrames(iotest.OneByteReader(bytes.NewReader(in)))
		if strings.Join(got, "\x00") != strings.Join(slow, "\x00") || err.Error() != slowErr.Error() {
			t.Fatalf("at once %q %v, byte by byte %q %v", got, err, slow, slowErr)
		}
		// Line ends must not matter, where the input holds only LF.
		if !bytes.ContainsRune(in, '\r') {
			crlf, _ := readFrames(bytes.NewReader(bytes.ReplaceAll(in, []byte("\n"), []byte("\r\n"))))
			if strings.Join(got, "\x00") != strings.Join(crlf, "\x00") {
				t.Fatalf("LF %q, CRLF %q", got, crlf)
			}
		}
		for _, g := range got {
			name, data, _ := strings.Cut(g, "=")
			_, _ = parseEvent(frame{name: name, data: []byte(data)})
		}
	})
}

func FuzzDecodeResources(f *testing.F) {
	for _, seed := range []string{
		`[]`, `[{"name":"r","node_name":"n","flags":["A"],"state":{"in_use":true},"volumes":[{"volume_number":0,"allocated_size_kib":-1}]},{"name":"s"}]`,
		`[{"layer_object":{"children":[{"drbd":{"connections":{"n":{}}}}]},"volumes":[{},{}]},{"volumes":[{}]}]`, `null`, `[{`, `[]]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		list, err := decodeAll(bytes.NewReader(in))
		if err != nil && list != nil {
			t.Fatal("half an answer")
		}
	})
}

func FuzzParseAddress(f *testing.F) {
	for _, seed := range []string{"a", "a:1", "[::1]", "::1", "https://a", "linstor+ssl://a:1", "http://a/", "http://u@a"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		base, err := parseAddress(in)
		if err != nil {
			return
		}
		if again, err := parseAddress(base); err != nil || again != base {
			t.Fatalf("%q gives %q, which gives %q, %v", in, base, again, err)
		}
	})
}

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{
		"host": "http://host:3370", " host ": "http://host:3370", "host:1": "http://host:1", "10.0.0.1": "http://10.0.0.1:3370",
		"http://host": "http://host:3370", "https://host": "https://host:3371", "HTTPS://host/": "https://host:3371",
		"linstor://host": "http://host:3370", "linstor+ssl://host": "https://host:3371", "linstor+ssl://host:9": "https://host:9",
		"::1": "http://[::1]:3370", "[::1]": "http://[::1]:3370", "[fd00::1]:5": "http://[fd00::1]:5", "https://[::1]": "https://[::1]:3371",
	} {
		if got, err := parseAddress(in); err != nil || got != want {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
}

// Elements share one wire value while they are decoded: nothing of one may show in the next.
func TestDecodeResources_ElementsDoNotLeakIntoEachOther(t *testing.T) {
	full := `{"name":"a","node_name":"n","uuid":"u","flags":["F"],"props":{"k":"v"},"create_timestamp":1,"state":{"in_use":true},
		"layer_object":{"drbd":{"node_id":1,"connections":{"p":{"connected":true}}}},
		"volumes":[{"volume_number":1,"storage_pool_name":"p","allocated_size_kib":1,"usable_size_kib":2,"flags":["X"],
		"state":{"disk_state":"UpToDate","replication_states":{"p":{}}},"reports":[{"ret_code":1}]},{"volume_number":2}]}`
	list, err := decodeAll(strings.NewReader("[" + full + `,{"name":"b","volumes":[{},{}]},` + full + `,{"name":"c"}]`))
	if err != nil {
		t.Fatal(err)
	}
	b := list[1]
	if b.Node != "" || b.UUID != "" || b.Flags != nil || b.Props != nil || b.InUse != nil || b.DRBD != nil || b.CreatedMs != 0 {
		t.Errorf("leaked: %+v", b)
	}
	for _, v := range b.Volumes {
		if v.Number != 0 || v.Pool != "" || v.AllocatedKiB != nil || v.UsableKiB != nil || v.Flags != nil || v.DiskState != "" || v.Replication != nil || v.Reports != nil {
			t.Errorf("leaked: %+v", v)
		}
	}
	if len(list[3].Volumes) != 0 || *list[0].Volumes[0].AllocatedKiB != 1 || list[0].Flags[0] != "F" || list[2].Volumes[0].Flags[0] != "X" {
		t.Errorf("got %+v", list)
	}
}

// decodeAll collects what decodeEach gives; nothing after an error, as every caller does.
func decodeAll(body io.Reader) (list []Resource, err error) {
	if err = decodeEach(body, func(r Resource) { list = append(list, r) }); err != nil {
		return nil, err
	}
	return list, nil
}
