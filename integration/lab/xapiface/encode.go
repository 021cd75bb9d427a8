package xapiface

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// typedInt is an integer that XML-RPC carries as <i4>: only valid_ref_counts does (upstream event_types.ml).
type typedInt int

// encoder writes values of one protocol. Arrays are begin, (item, value, end of item)*, end; objects likewise with names.
type encoder interface {
	str(s string)
	num(i int64)
	i4(i int)
	float(f float64)
	boolean(b bool)
	datetime(t time.Time)
	beginArray()
	item(n int)
	endItem()
	endArray()
	beginObject()
	member(n int, name string)
	endMember()
	endObject()
}

// encode walks a result value.
func encode(e encoder, v any) {
	switch x := v.(type) {
	case nil:
		e.str("")
	case string:
		e.str(x)
	case bool:
		e.boolean(x)
	case int:
		e.num(int64(x))
	case int64:
		e.num(x)
	case typedInt:
		e.i4(int(x))
	case float64:
		e.float(x)
	case time.Time:
		e.datetime(x)
	default:
		encodeCompound(e, v)
	}
}

func encodeCompound(e encoder, v any) {
	switch x := v.(type) {
	case []string:
		encodeList(e, x, e.str)
	case []int64:
		encodeList(e, x, e.num)
	case []any:
		encodeList(e, x, func(v any) { encode(e, v) })
	case map[string]string:
		encodeMap(e, x, e.str)
	case map[string]int64:
		encodeMap(e, x, e.num)
	case map[string]float64:
		encodeMap(e, x, e.float)
	case map[string]typedInt:
		encodeMap(e, x, func(i typedInt) { e.i4(int(i)) })
	case map[string][]string:
		encodeMap(e, x, func(l []string) { encodeList(e, l, e.str) })
	case map[string]any:
		encodeMap(e, x, func(v any) { encode(e, v) })
	case xapidb.Record:
		encodeRecord(e, x)
	case *xapidb.Record:
		encodeRecord(e, *x)
	case records:
		e.beginObject()
		for i, r := range x {
			e.member(i, r.Ref())
			encodeRecord(e, r)
			e.endMember()
		}
		e.endObject()
	case xapidb.Batch:
		encodeBatch(e, x)
	default:
		// A handler's result of another type is a defect of the handler, seen at once in any test that calls it.
		panic(fmt.Sprintf("xapiface: cannot encode a %T", v))
	}
}

func encodeList[V any](e encoder, list []V, value func(V)) {
	e.beginArray()
	for i, v := range list {
		e.item(i)
		value(v)
		e.endItem()
	}
	e.endArray()
}

func encodeMap[V any](e encoder, m map[string]V, value func(V)) {
	e.beginObject()
	for i, k := range slices.Sorted(maps.Keys(m)) {
		e.member(i, k)
		value(m[k])
		e.endMember()
	}
	e.endObject()
}

func encodeRecord(e encoder, r xapidb.Record) {
	n := 0
	e.beginObject()
	r.Each(func(f *xapidb.Field, v any) {
		e.member(n, f.Name)
		encode(e, v)
		e.endMember()
		n++
	})
	e.endObject()
}

func encodeBatch(e encoder, b xapidb.Batch) {
	counts := make(map[string]typedInt, len(b.ValidRefCounts))
	for class, n := range b.ValidRefCounts {
		counts[class] = typedInt(n)
	}
	e.beginObject()
	e.member(0, "events")
	encodeList(e, b.Events, func(ev xapidb.Event) { encodeEvent(e, ev) })
	e.endMember()
	e.member(1, "valid_ref_counts")
	encode(e, counts)
	e.endMember()
	e.member(2, "token")
	e.str(b.Token)
	e.endMember()
	e.endObject()
}

func encodeEvent(e encoder, ev xapidb.Event) {
	e.beginObject()
	for i, m := range [][2]string{
		{"id", strconv.FormatInt(ev.ID, 10)}, {"timestamp", "0.0"}, {"class", ev.Class}, {"operation", ev.Operation}, {"ref", ev.Ref},
	} {
		e.member(i, m[0])
		e.str(m[1])
		e.endMember()
	}
	if ev.Snapshot != nil {
		e.member(5, "snapshot")
		encodeRecord(e, *ev.Snapshot)
		e.endMember()
	}
	e.endObject()
}

// xmlEncoder writes XAPI's dialect of XML-RPC: strings and ints with no type tag, the empty string as nothing, doubles as %.16g, member names as they are.
type xmlEncoder struct{ buf []byte }

func appendXMLValue(buf []byte, v any) []byte {
	e := &xmlEncoder{buf: append(buf, "<value>"...)}
	encode(e, v)
	return append(e.buf, "</value>"...)
}

func (e *xmlEncoder) raw(s string)    { e.buf = append(e.buf, s...) }
func (e *xmlEncoder) num(i int64)     { e.buf = strconv.AppendInt(e.buf, i, 10) }
func (e *xmlEncoder) i4(i int)        { e.raw("<i4>" + strconv.Itoa(i) + "</i4>") }
func (e *xmlEncoder) float(f float64) { e.raw("<double>" + cFloat(f) + "</double>") }

func (e *xmlEncoder) datetime(t time.Time) {
	e.raw("<dateTime.iso8601>" + t.UTC().Format(xapidb.DatetimeLayout) + "</dateTime.iso8601>")
}

func (e *xmlEncoder) boolean(b bool) {
	if b {
		e.raw("<boolean>1</boolean>")
	} else {
		e.raw("<boolean>0</boolean>")
	}
}

func (e *xmlEncoder) str(s string) {
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '&':
			e.raw("&amp;")
		case c == '<':
			e.raw("&lt;")
		case c == '>':
			e.raw("&gt;")
		case c == '"':
			e.raw("&quot;")
		case c >= 0x20 || c == '\n' || c == '\r' || c == '\t':
			e.buf = append(e.buf, c)
		}
	}
}

func (e *xmlEncoder) beginArray()  { e.raw("<array><data>") }
func (e *xmlEncoder) item(int)     { e.raw("<value>") }
func (e *xmlEncoder) endItem()     { e.raw("</value>") }
func (e *xmlEncoder) endArray()    { e.raw("</data></array>") }
func (e *xmlEncoder) beginObject() { e.raw("<struct>") }
func (e *xmlEncoder) endMember()   { e.raw("</value></member>") }
func (e *xmlEncoder) endObject()   { e.raw("</struct>") }

func (e *xmlEncoder) member(_ int, name string) {
	e.raw("<member><name>")
	e.raw(name)
	e.raw("</name><value>")
}

// cFloat is C's %.16g, with the names of the values that have no digits.
func cFloat(f float64) string {
	switch {
	case math.IsNaN(f):
		return "nan"
	case math.IsInf(f, 1):
		return "inf"
	case math.IsInf(f, -1):
		return "-inf"
	}
	return cExponent(f)
}

// cExponent renders %.16g. Go's own 'g' switches to the exponent at 21 digits when the precision is the shortest, but at the precision when one is given, as C does; it
// also keeps no trailing zeros.
func cExponent(f float64) string { return strconv.FormatFloat(f, 'g', 16, 64) }

// jsonEncoder writes XAPI's JSON: numbers for ints, plain strings for datetimes, and bare NaN and Infinity, which is not JSON but what yojson prints.
type jsonEncoder struct{ buf []byte }

func appendJSONValue(buf []byte, v any) []byte {
	e := &jsonEncoder{buf: buf}
	encode(e, v)
	return e.buf
}

func (e *jsonEncoder) num(i int64)          { e.buf = strconv.AppendInt(e.buf, i, 10) }
func (e *jsonEncoder) i4(i int)             { e.num(int64(i)) }
func (e *jsonEncoder) boolean(b bool)       { e.buf = strconv.AppendBool(e.buf, b) }
func (e *jsonEncoder) datetime(t time.Time) { e.str(t.UTC().Format(xapidb.DatetimeLayout)) }

func (e *jsonEncoder) float(f float64) {
	switch {
	case math.IsNaN(f):
		e.buf = append(e.buf, "NaN"...)
	case math.IsInf(f, 1):
		e.buf = append(e.buf, "Infinity"...)
	case math.IsInf(f, -1):
		e.buf = append(e.buf, "-Infinity"...)
	default:
		s := strconv.FormatFloat(f, 'g', -1, 64)
		if !strings.ContainsAny(s, ".e") {
			s += ".0"
		}
		e.buf = append(e.buf, s...)
	}
}

const hexDigits = "0123456789abcdef"

func (e *jsonEncoder) str(s string) {
	e.buf = append(e.buf, '"')
	for i := 0; i < len(s); {
		c := s[i]
		switch {
		case c == '"' || c == '\\':
			e.buf = append(e.buf, '\\', c)
		case c == '\n':
			e.buf = append(e.buf, '\\', 'n')
		case c == '\r':
			e.buf = append(e.buf, '\\', 'r')
		case c == '\t':
			e.buf = append(e.buf, '\\', 't')
		case c < 0x20 || c == 0x7f:
			e.buf = append(e.buf, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		case c >= utf8.RuneSelf:
			r, n := utf8.DecodeRuneInString(s[i:])
			e.buf = utf8.AppendRune(e.buf, r)
			i += n
			continue
		default:
			e.buf = append(e.buf, c)
		}
		i++
	}
	e.buf = append(e.buf, '"')
}

func (e *jsonEncoder) comma(n int) {
	if n > 0 {
		e.buf = append(e.buf, ',')
	}
}

func (e *jsonEncoder) beginArray()  { e.buf = append(e.buf, '[') }
func (e *jsonEncoder) item(n int)   { e.comma(n) }
func (e *jsonEncoder) endItem()     {}
func (e *jsonEncoder) endArray()    { e.buf = append(e.buf, ']') }
func (e *jsonEncoder) beginObject() { e.buf = append(e.buf, '{') }
func (e *jsonEncoder) endMember()   {}
func (e *jsonEncoder) endObject()   { e.buf = append(e.buf, '}') }

func (e *jsonEncoder) member(n int, name string) {
	e.comma(n)
	e.str(name)
	e.buf = append(e.buf, ':')
}
