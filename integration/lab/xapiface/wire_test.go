package xapiface

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// The expected texts are the dialect of upstream's codec (ocaml-rpc xmlrpc.ml and jsonrpc.ml).
func TestValuesOnTheWire(t *testing.T) {
	for _, c := range []struct {
		name string
		v    any
		xml  string
		json string
	}{
		{"void", nil, ``, `""`},
		{"string", "a b", `a b`, `"a b"`},
		{"empty string", "", ``, `""`},
		{"escapes", "<a & \"b\"'>\x01\n\té\\", "&lt;a &amp; &quot;b&quot;'&gt;\n\té\\", `"<a & \"b\"'>\u0001\n\té\\"`},
		{"int", int64(1) << 40, `1099511627776`, `1099511627776`},
		{"negative int", -1, `-1`, `-1`},
		{"count", typedInt(3), `<i4>3</i4>`, `3`},
		{"true", true, `<boolean>1</boolean>`, `true`},
		{"false", false, `<boolean>0</boolean>`, `false`},
		{"float", 1.0, `<double>1</double>`, `1.0`},
		{"fraction", 0.1, `<double>0.1</double>`, `0.1`},
		{"third", 1.0 / 3, `<double>0.3333333333333333</double>`, `0.3333333333333333`},
		{"large float", 1e15, `<double>1000000000000000</double>`, `1e+15`},
		{"huge float", 1e21, `<double>1e+21</double>`, `1e+21`},
		{"tiny float", 1e-7, `<double>1e-07</double>`, `1e-07`},
		{"NaN", math.NaN(), `<double>nan</double>`, `NaN`},
		{"infinity", math.Inf(1), `<double>inf</double>`, `Infinity`},
		{"minus infinity", math.Inf(-1), `<double>-inf</double>`, `-Infinity`},
		{"datetime", time.Date(2025, 3, 19, 4, 16, 24, 0, time.UTC), `<dateTime.iso8601>20250319T04:16:24Z</dateTime.iso8601>`, `"20250319T04:16:24Z"`},
		{"set", []string{"a", ""}, `<array><data><value>a</value><value></value></data></array>`, `["a",""]`},
		{"empty set", []string{}, `<array><data></data></array>`, `[]`},
		{"ints", []int64{0, 1}, `<array><data><value>0</value><value>1</value></data></array>`, `[0,1]`},
		{"map", map[string]string{"b": "", "a": "1"}, `<struct><member><name>a</name><value>1</value></member><member><name>b</name><value></value></member></struct>`, `{"a":"1","b":""}`},
		{"map of ints", map[string]int64{"a": 1}, `<struct><member><name>a</name><value>1</value></member></struct>`, `{"a":1}`},
		{"map of floats", map[string]float64{"0": 0.5}, `<struct><member><name>0</name><value><double>0.5</double></value></member></struct>`, `{"0":0.5}`},
		{"map of sets", map[string][]string{"0": {"x"}}, `<struct><member><name>0</name><value><array><data><value>x</value></data></array></value></member></struct>`, `{"0":["x"]}`},
		{"any", []any{map[string]any{"k": true}}, `<array><data><value><struct><member><name>k</name><value><boolean>1</boolean></value></member></struct></value></data></array>`, `[{"k":true}]`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := string(appendXMLValue(nil, c.v)); got != "<value>"+c.xml+"</value>" {
				t.Errorf("xml\n got %s\nwant <value>%s</value>", got, c.xml)
			}
			if got := string(appendJSONValue(nil, c.v)); got != c.json {
				t.Errorf("json\n got %s\nwant %s", got, c.json)
			}
		})
	}
}

func TestRepliesOnTheWire(t *testing.T) {
	failure := xapidb.Errorf("HANDLE_INVALID", "VM", "OpaqueRef:x")
	one, two := jsonCall{id: []byte("7")}, jsonCall{two: true, id: []byte(`"a"`)}
	const head, tail = `<?xml version="1.0"?><methodResponse><params><param>`, `</param></params></methodResponse>`
	for _, c := range []struct{ name, got, want string }{
		{"xml ok", string(appendXMLReply(nil, "VM.get_all", []string{"r"}, nil)), head +
			`<value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name><value><array><data><value>r</value></data></array></value></member></struct></value>` + tail},
		{"xml void", string(appendXMLReply(nil, "VM.start", nil, nil)), head +
			`<value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name><value></value></member></struct></value>` + tail},
		{"xml error", string(appendXMLReply(nil, "VM.start", nil, failure)), head +
			`<value><struct><member><name>Status</name><value>Failure</value></member><member><name>ErrorDescription</name><value><array><data><value>HANDLE_INVALID</value><value>VM</value><value>OpaqueRef:x</value></data></array></value></member></struct></value>` + tail},
		{"xml listMethods has no envelope", string(appendXMLReply(nil, "system.listMethods", []string{"a"}, nil)), head + `<value><array><data><value>a</value></data></array></value>` + tail},
		{"json 2.0 ok", string(appendJSONReply(nil, two, int64(1), nil)), `{"jsonrpc":"2.0","result":1,"id":"a"}`},
		{"json 2.0 error", string(appendJSONReply(nil, two, nil, failure)), `{"jsonrpc":"2.0","error":{"code":1,"message":"HANDLE_INVALID","data":["VM","OpaqueRef:x"]},"id":"a"}`},
		{"json 2.0 error without parameters", string(appendJSONReply(nil, two, nil, xapidb.Errorf("X"))), `{"jsonrpc":"2.0","error":{"code":1,"message":"X","data":[]},"id":"a"}`},
		{"json 1.0 ok", string(appendJSONReply(nil, one, nil, nil)), `{"result":"","error":null,"id":7}`},
		{"json 1.0 error", string(appendJSONReply(nil, one, nil, failure)), `{"result":null,"error":["HANDLE_INVALID","VM","OpaqueRef:x"],"id":7}`},
	} {
		if c.got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.name, c.got, c.want)
		}
	}
}

func TestEventsOnTheWire(t *testing.T) {
	db := xapidb.New(xapidb.Options{Rand: xapidb.SeededRand(1)})
	ref, err := db.Create("secret", map[string]any{"uuid": "u", "value": "v"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := db.Record("secret", ref)
	if err != nil {
		t.Fatal(err)
	}
	b := xapidb.Batch{
		Events: []xapidb.Event{{ID: 5, Class: "secret", Operation: "add", Ref: "OpaqueRef:a", Snapshot: &r}, {ID: 6, Class: "vm", Operation: "del", Ref: "OpaqueRef:b"}},
		Token:  xapidb.Token(6, 0), ValidRefCounts: map[string]int{"vm": 0, "secret": 1},
	}
	const wantJSON = `{"events":[{"id":"5","timestamp":"0.0","class":"secret","operation":"add","ref":"OpaqueRef:a","snapshot":{"uuid":"u","value":"v","other_config":{}}},` +
		`{"id":"6","timestamp":"0.0","class":"vm","operation":"del","ref":"OpaqueRef:b"}],"valid_ref_counts":{"secret":1,"vm":0},"token":"00000000000000000006,00000000000000000000"}`
	if diff := cmp.Diff(wantJSON, string(appendJSONValue(nil, b))); diff != "" {
		t.Errorf("json (-want +got):\n%s", diff)
	}
	const wantXML = `<value><struct><member><name>events</name><value><array><data><value><struct><member><name>id</name><value>5</value></member>` +
		`<member><name>timestamp</name><value>0.0</value></member><member><name>class</name><value>secret</value></member><member><name>operation</name><value>add</value></member>` +
		`<member><name>ref</name><value>OpaqueRef:a</value></member><member><name>snapshot</name><value><struct><member><name>uuid</name><value>u</value></member>` +
		`<member><name>value</name><value>v</value></member><member><name>other_config</name><value><struct></struct></value></member></struct></value></member></struct></value>` +
		`<value><struct><member><name>id</name><value>6</value></member><member><name>timestamp</name><value>0.0</value></member><member><name>class</name><value>vm</value></member>` +
		`<member><name>operation</name><value>del</value></member><member><name>ref</name><value>OpaqueRef:b</value></member></struct></value></data></array></value></member>` +
		`<member><name>valid_ref_counts</name><value><struct><member><name>secret</name><value><i4>1</i4></value></member><member><name>vm</name><value><i4>0</i4></value></member></struct></value></member>` +
		`<member><name>token</name><value>00000000000000000006,00000000000000000000</value></member></struct></value>`
	if diff := cmp.Diff(wantXML, string(appendXMLValue(nil, b))); diff != "" {
		t.Errorf("xml (-want +got):\n%s", diff)
	}
}

func TestParseXML(t *testing.T) {
	call := func(value string) string {
		return `<?xml version='1.0'?>` + "\n<methodCall> <methodName>a.b</methodName>\n<params><param>" + value + "</param></params>\n</methodCall>"
	}
	for _, c := range []struct {
		in   string
		want any
	}{
		{`<value>x</value>`, "x"},
		{`<value> x </value>`, " x "},
		{`<value></value>`, ""},
		{`<value/>`, ""},
		{`<value><string></string></value>`, ""},
		{`<value><string/></value>`, ""},
		{`<value> <string> a&amp;b </string> </value>`, " a&b "},
		{`<value><![CDATA[<x>]]></value>`, "<x>"},
		{`<value><int>5</int></value>`, int64(5)},
		{`<value><i8> 1099511627776 </i8></value>`, int64(1) << 40},
		{`<value><double>60</double></value>`, 60.0},
		{`<value><boolean>1</boolean></value>`, true},
		{`<value><nil/></value>`, nil},
		{`<value><dateTime.iso8601>20250319T04:16:24Z</dateTime.iso8601></value>`, "20250319T04:16:24Z"},
		{`<value><array><data><value>a</value> <value><int>1</int></value></data></array></value>`, []any{"a", int64(1)}},
		{`<value><array><data/></array></value>`, []any{}},
		{`<value><struct><member><name>k</name><value>v</value></member></struct></value>`, map[string]any{"k": "v"}},
		{`<value><struct/></value>`, map[string]any{}},
	} {
		name, params, err := parseXML([]byte(call(c.in)))
		if err != nil || name != "a.b" || !cmp.Equal(params, []any{c.want}) {
			t.Errorf("%s: %q %#v, error %v; want %#v", c.in, name, params, err, c.want)
		}
	}
	if name, params, err := parseXML([]byte(`<methodCall><methodName>x</methodName></methodCall>`)); name != "x" || params != nil || err != nil {
		t.Errorf("no params: %q %v %v", name, params, err)
	}
	for _, bad := range []string{
		``, `x`, `<a/>`, `<methodCall>`, `<methodCall/>`, `<methodCall><methodName>x</methodName><params>`, call(`<value><int>x</int></value>`), call(`<value><what>1</what></value>`), call(`x`),
		call(`<value>a<int>1</int>b</value>`), call(`<value><array><value>a</value></array></value>`), call(`<value><struct><name>a</name></struct></value>`), call(``),
	} {
		if name, params, err := parseXML([]byte(bad)); err == nil {
			t.Errorf("%s: accepted as %q %v", bad, name, params)
		}
	}
}

func TestParseJSON(t *testing.T) {
	for _, c := range []struct {
		in     string
		two    bool
		params []any
	}{
		{`{"jsonrpc":"2.0","method":"m","params":["a",1,2.5,true,null,{"k":[1]}],"id":1}`, true, []any{"a", int64(1), 2.5, true, nil, map[string]any{"k": []any{int64(1)}}}},
		{`{"jsonrpc":"2.0","method":"m","id":"x"}`, true, nil},
		{`{"method":"m","params":[],"id":0}`, false, []any{}},
		{`{"method":"m","params":[9007199254740993],"id":0}`, false, []any{int64(9007199254740993)}},
	} {
		got, err := parseJSON([]byte(c.in))
		if err != nil || got.two != c.two || got.method != "m" || !cmp.Equal(got.params, c.params) {
			t.Errorf("%s: %+v, error %v", c.in, got, err)
		}
	}
	for _, bad := range []string{
		``, `[]`, `{}`, `{"method":"m","params":[]}`, `{"method":"m","params":[],"id":null}`, `{"method":"m","id":1}`, `{"params":[],"id":1}`, `{"method":"m","params":{},"id":1}`,
		`{"jsonrpc":"3.0","method":"m","params":[],"id":1}`, `{"method":5,"params":[],"id":1}`, `{"method":"m","params":[],"id":true}`,
	} {
		if got, err := parseJSON([]byte(bad)); err == nil {
			t.Errorf("%s: accepted as %+v", bad, got)
		}
	}
}

// What the parser reads, the encoder writes, and the parser reads again as the same.
func FuzzXML(f *testing.F) {
	for _, seed := range []string{
		`<methodCall><methodName>VM.get_all</methodName><params><param><value>OpaqueRef:x</value></param></params></methodCall>`,
		`<methodCall><methodName>a</methodName><params><param><value><struct><member><name>k</name><value><array><data><value><i4>1</i4></value></data></array></value></member></struct></value></param></params></methodCall>`,
		`<?xml version="1.0" encoding="latin1"?><methodCall><methodName/></methodCall>`,
		`<methodCall><methodName>a</methodName><params><param><value><double>1e3</double></value></param></params></methodCall>`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		_, params, err := parseXML(body)
		if err != nil || !plainNames(params) {
			return
		}
		again := []byte("<methodCall><methodName>x</methodName><params>")
		for _, p := range params {
			again = append(again, "<param>"...)
			again = appendXMLValue(again, texts(p))
			again = append(again, "</param>"...)
		}
		again = append(again, "</params></methodCall>"...)
		_, back, err := parseXML(again)
		if err != nil || !cmp.Equal(texts(back), texts(params)) {
			t.Errorf("%s\nread %#v\nthen %#v, error %v", body, params, back, err)
		}
	})
}

// texts drops types that the untyped dialect does not keep.
func texts(v any) any {
	switch x := v.(type) {
	case []any:
		out := []any{}
		for _, e := range x {
			out = append(out, texts(e))
		}
		return out
	case map[string]any:
		out := map[string]any{}
		for k, e := range x {
			out[k] = texts(e)
		}
		return out
	case bool:
		return x
	case string:
		return visible(x)
	}
	return "number"
}

// visible drops what XML-RPC text does not carry unchanged.
func visible(s string) string {
	out := []rune{}
	for _, r := range s {
		if r >= ' ' && r != 0x7f {
			out = append(out, r)
		}
	}
	return string(out)
}

// plainNames says whether member names survive being written without escapes, as XAPI writes them.
func plainNames(v any) bool {
	switch x := v.(type) {
	case []any:
		for _, e := range x {
			if !plainNames(e) {
				return false
			}
		}
	case map[string]any:
		for k, e := range x {
			for _, r := range k {
				if r <= ' ' || r == '<' || r == '&' || r == '>' || r >= 0x7f {
					return false
				}
			}
			if !plainNames(e) {
				return false
			}
		}
	}
	return true
}

func FuzzJSON(f *testing.F) {
	for _, seed := range []string{
		`{"jsonrpc":"2.0","method":"VM.get_all","params":["OpaqueRef:x"],"id":0}`, `{"method":"m","params":[{"a":[1,2.5,null,true]}],"id":"x"}`, `{"id":1e999}`, `{"method":"m","params":[1e999],"id":1}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := parseJSON(body)
		if err != nil {
			return
		}
		reply := appendJSONReply(nil, c, c.params, nil)
		if len(c.id) == 0 || len(reply) == 0 {
			t.Errorf("call without an id: %+v", c)
		}
	})
}
