package xapi

import (
	"bufio"
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/kolo/xmlrpc"
)

// xmlWire is XML-RPC on / through the encoder and decoder of kolo/xmlrpc. Its client is not used: that makes one call at a time, has no
// deadlines, and dies of the first reply it cannot decode. What its codec lacks is made up for here: plainArg before encoding, normalise
// before decoding.
type xmlWire struct{}

func (xmlWire) path() string        { return "/" }
func (xmlWire) contentType() string { return "text/xml" }

func (xmlWire) encode(method string, args []any) ([]byte, error) {
	params := make([]any, len(args))
	for i, a := range args {
		v, err := plainArg(a, xmlArgs)
		if err != nil {
			return nil, fmt.Errorf("argument %d: %w", i, err)
		}
		params[i] = v
	}
	return xmlrpc.EncodeMethodCall(method, params...)
}

// argForm is how a wire wants its arguments.
type argForm int

const (
	jsonArgs argForm = iota
	xmlArgs          // xmlArgs has integers as text and map keys escaped.
)

// errNilArg tells that an argument is nil: kolo/xmlrpc would send an empty param, which XAPI rejects without naming it.
var errNilArg = errors.New("is nil; XAPI has no null: pass NullRef or an empty text, list or map")

// plainArg reduces an argument to string, bool, float64, int64 (JSON only), time, []any and map[string]any, and refuses what XAPI or
// kolo/xmlrpc would garble without saying so.
func plainArg(a any, form argForm) (any, error) {
	if t, ok := a.(time.Time); ok {
		if form == jsonArgs {
			return t.UTC().Format(timeLayout), nil
		}
		return t.UTC(), nil
	}
	v := reflect.ValueOf(a)
	switch v.Kind() {
	case reflect.Invalid:
		return nil, errNilArg
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return nil, errNilArg
		}
		return plainArg(v.Elem().Interface(), form)
	case reflect.String:
		return v.String(), checkText(v.String())
	case reflect.Bool:
		return v.Bool(), nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		if form == xmlArgs {
			return strconv.FormatInt(v.Int(), 10), nil
		}
		return v.Int(), nil
	case reflect.Float32, reflect.Float64:
		if f := v.Float(); !math.IsNaN(f) && !math.IsInf(f, 0) {
			return f, nil
		}
		return nil, fmt.Errorf("float %v cannot be sent", v.Float())
	case reflect.Slice, reflect.Array:
		return plainSlice(v, form)
	case reflect.Map:
		return plainMap(v, form)
	}
	return nil, fmt.Errorf("type %s cannot be sent; pass records as map[string]any", v.Type())
}

func plainSlice(v reflect.Value, form argForm) (any, error) {
	out := make([]any, v.Len())
	for i := range out {
		e, err := plainArg(v.Index(i).Interface(), form)
		if err != nil {
			return nil, fmt.Errorf("element %d: %w", i, err)
		}
		out[i] = e
	}
	return out, nil
}

func plainMap(v reflect.Value, form argForm) (any, error) {
	if v.Type().Key().Kind() != reflect.String {
		return nil, fmt.Errorf("type %s cannot be sent; map keys must be text", v.Type())
	}
	out := make(map[string]any, v.Len())
	for it := v.MapRange(); it.Next(); {
		key := it.Key().String()
		if err := checkText(key); err != nil {
			return nil, fmt.Errorf("key %q: %w", key, err)
		}
		e, err := plainArg(it.Value().Interface(), form)
		if err != nil {
			return nil, fmt.Errorf("key %q: %w", key, err)
		}
		if form == xmlArgs {
			key = escapeXML(key) // kolo/xmlrpc writes member names as they are.
		}
		out[key] = e
	}
	return out, nil
}

// checkText refuses text that XAPI would answer with INVALID_VALUE (bad UTF-8) or that XML cannot carry and kolo/xmlrpc would silently
// replace. The JSON wire is held to the same, because XAPI stores what it is given and must show it on both wires.
func checkText(s string) error {
	if !utf8.ValidString(s) {
		return fmt.Errorf("text %.40q is not valid UTF-8", s)
	}
	for _, r := range s {
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == 0xFFFE || r == 0xFFFF {
			return fmt.Errorf("text %.40q has the character %U, which XML cannot carry", s, r)
		}
	}
	return nil
}

func escapeXML(s string) string {
	var b strings.Builder
	// A strings.Builder never fails.
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}

// decode reads the whole reply, normalises it, lets kolo/xmlrpc decode it to plain values, and brings those into the
// same shape as the JSON wire's, so that there is one set of record types for both.
func (xmlWire) decode(method string, body *bufio.Reader, out sink) error {
	if out.records != nil {
		return errors.New("records are read over JSON-RPC only")
	}
	b, err := firstByte(body)
	if err != nil {
		return fmt.Errorf("read reply: %w", err)
	}
	if head, _ := body.Peek(512); b != '<' || looksHTML(head) {
		return notXAPI(fmt.Errorf("answer is not XML-RPC: %s", firstLine(body)))
	}
	raw, err := io.ReadAll(body)
	if err != nil {
		return fmt.Errorf("read reply: %w", err)
	}
	raw, err = normalise(raw)
	if err != nil {
		return fmt.Errorf("decode reply: %w", err)
	}
	reply, err := koloDecode(raw)
	if err != nil {
		return fmt.Errorf("decode reply: %w", err)
	}
	value, err := unwrap(method, jsonShape(reply))
	if err != nil || out.into == nil {
		return err
	}
	return assign(value, out.into)
}

func looksHTML(head []byte) bool {
	h := bytes.ToLower(head)
	return bytes.HasPrefix(h, []byte("<!doctype")) || bytes.HasPrefix(h, []byte("<html")) || bytes.Contains(h, []byte("<html"))
}

// unwrap takes the value out of XAPI's envelope, a struct of Status and either Value or ErrorDescription. XML-RPC's own fault is not used
// by XAPI for refusals, but a proxy may send one.
func unwrap(method string, reply any) (any, error) {
	env, ok := reply.(map[string]any)
	if !ok {
		return nil, notXAPI(fmt.Errorf("answer holds %T where XAPI's envelope was expected", reply))
	}
	switch env["Status"] {
	case "Success":
		value, ok := env["Value"]
		if !ok {
			return nil, notXAPI(errors.New("answer says Success without a Value"))
		}
		return value, nil
	case "Failure":
		list, _ := env["ErrorDescription"].([]any)
		texts := make([]string, len(list))
		for i, e := range list {
			texts[i] = fmt.Sprint(e)
		}
		if len(texts) == 0 || texts[0] == "" {
			return nil, notXAPI(errors.New("answer says Failure without a code"))
		}
		return nil, &Error{Code: texts[0], Params: texts[1:], Method: method}
	}
	if fault, ok := env["faultString"]; ok {
		return nil, notXAPI(fmt.Errorf("answer is an XML-RPC fault: %.120v", fault))
	}
	return nil, notXAPI(errors.New("answer has no Status"))
}

// assign brings a decoded value into result by way of JSON.
func assign(value, result any) error {
	b, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("decode result: %w", err)
	}
	if err := json.Unmarshal(b, result); err != nil {
		return fmt.Errorf("decode result: %w", err)
	}
	return nil
}

// jsonShape gives times, floats, empty structs and empty text the form they have on the JSON wire.
func jsonShape(v any) any {
	switch v := v.(type) {
	case nil:
		return "" // kolo/xmlrpc leaves the place of an empty string untouched; XAPI never sends a nil of its own.
	case map[string]any:
		out := make(map[string]any, len(v)) // kolo/xmlrpc gives a nil map for an empty struct.
		for k, e := range v {
			out[k] = jsonShape(e)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = jsonShape(e)
		}
		return out
	case time.Time:
		return Time{v}
	case float64:
		return Float(v)
	}
	return v
}

// koloDecode lets kolo/xmlrpc decode a normalised reply. It reflects on what it reads and is known to panic on shapes it did not
// foresee, which must not take a daemon down.
func koloDecode(raw []byte) (v any, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, fmt.Errorf("xml-rpc decoder: %v", p)
		}
	}()
	err = xmlrpc.Response(raw).Unmarshal(&v)
	if errors.Is(err, io.EOF) {
		err = errors.New("no value in the reply")
	}
	return v, err
}

// maxDepth bounds the nesting of a reply, which kolo/xmlrpc decodes by recursion. XAPI's records nest less than 20 elements deep.
const maxDepth = 200

// normalise rewrites a reply so that every value has a typed child: XAPI writes text and integers with no type and empty text as
// <value></value> (add_value, src/lib/xmlrpc.ml of mirage/ocaml-rpc), after which kolo/xmlrpc loses its place and returns no error. White space
// in text is kept, white space between elements dropped, and so are comments, processing instructions and attributes.
func normalise(in []byte) ([]byte, error) {
	dec := xml.NewDecoder(bytes.NewReader(mendNames(in)))
	n := normaliser{out: bytes.NewBuffer(make([]byte, 0, len(in)+len(in)/4))}
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, cutOff(err, len(in))
		}
		switch t := tok.(type) {
		case xml.StartElement:
			err = n.start(t.Name.Local)
		case xml.EndElement:
			err = n.end()
		case xml.CharData:
			err = n.chars(t)
		}
		if err != nil {
			return nil, err
		}
	}
	if !n.rooted {
		return nil, errors.New("reply holds no XML element")
	}
	return n.out.Bytes(), nil
}

// cutOff names the most common of the decoder's errors, a reply that ends too soon.
func cutOff(err error, size int) error {
	var syntax *xml.SyntaxError
	if errors.As(err, &syntax) && strings.Contains(syntax.Msg, "unexpected EOF") {
		return fmt.Errorf("reply was cut off after %d bytes: %w", size, io.ErrUnexpectedEOF)
	}
	return err
}

// normaliser is the state of normalise: the open elements and the text of the innermost.
type normaliser struct {
	out    *bytes.Buffer
	open   []element
	rooted bool
}

type element struct {
	name     string
	text     []byte
	children bool
}

// leaf tells which elements hold text; all others hold elements only.
func leaf(name string) bool {
	switch name {
	case "value", "name", "string", "int", "i4", "i8", "double", "boolean", "dateTime.iso8601", "base64":
		return true
	}
	return false
}

func (n *normaliser) start(name string) error {
	if !elementNames[name] {
		return notXAPI(fmt.Errorf("element <%.40s> is not XML-RPC", name))
	}
	if len(n.open) == 0 && n.rooted {
		return errors.New("reply goes on after its end")
	}
	if len(n.open) >= maxDepth {
		return fmt.Errorf("reply nests more than %d elements", maxDepth)
	}
	if len(n.open) > 0 {
		parent := &n.open[len(n.open)-1]
		if leaf(parent.name) && (parent.name != "value" || parent.children) {
			return fmt.Errorf("element <%s> holds more than one thing", parent.name)
		}
		if len(bytes.TrimSpace(parent.text)) > 0 {
			return fmt.Errorf("text beside elements in <%s>", parent.name)
		}
		parent.children, parent.text = true, nil
	}
	n.rooted = true
	n.open = append(n.open, element{name: name})
	n.tag("<", name)
	return nil
}

// elementNames are the elements of XML-RPC.
var elementNames = map[string]bool{
	"methodResponse": true, "params": true, "param": true, "fault": true, "value": true, "struct": true, "member": true, "name": true,
	"array": true, "data": true, "string": true, "int": true, "i4": true, "i8": true, "double": true, "boolean": true,
	"dateTime.iso8601": true, "base64": true, "nil": true,
}

func (n *normaliser) chars(text []byte) error {
	if len(n.open) == 0 {
		if len(bytes.TrimSpace(text)) > 0 {
			return errors.New("text outside of the reply's elements")
		}
		return nil
	}
	top := &n.open[len(n.open)-1]
	if leaf(top.name) && !top.children {
		top.text = append(top.text, text...)
		return nil
	}
	if len(bytes.TrimSpace(text)) > 0 {
		return fmt.Errorf("text beside elements in <%s>", top.name)
	}
	return nil
}

func (n *normaliser) end() error {
	top := n.open[len(n.open)-1]
	n.open = n.open[:len(n.open)-1]
	untyped := top.name == "value" && !top.children
	if untyped {
		n.tag("<", "string")
	}
	// Writing to a bytes.Buffer never fails.
	_ = xml.EscapeText(n.out, top.text)
	if untyped {
		n.tag("</", "string")
	}
	n.tag("</", top.name)
	return nil
}

func (n *normaliser) tag(open, name string) {
	n.out.WriteString(open)
	n.out.WriteString(name)
	n.out.WriteByte('>')
}

// mendNames escapes member names that XAPI wrote as they are (a key of other_config may hold & or <). A name that is well-formed
// stays, so that a server which does escape is read right as well. Without such a name the reply itself is given back.
func mendNames(in []byte) []byte {
	var out []byte
	open, shut := []byte("<name>"), []byte("</name>")
	copied, at := 0, 0
	for {
		start := bytes.Index(in[at:], open)
		if start < 0 {
			break
		}
		start += at + len(open)
		end := bytes.Index(in[start:], shut)
		if end < 0 {
			break
		}
		end += start
		if name := in[start:end]; !wellFormed(name) {
			out = append(out, in[copied:start]...)
			out = append(out, escapeXML(string(name))...)
			copied = end
		}
		at = end + len(shut)
	}
	if out == nil {
		return in
	}
	return append(out, in[copied:]...)
}

// wellFormed tells whether text between tags is XML as it stands.
func wellFormed(text []byte) bool {
	if bytes.IndexByte(text, '<') >= 0 || bytes.Contains(text, []byte("]]>")) {
		return false
	}
	for {
		amp := bytes.IndexByte(text, '&')
		if amp < 0 {
			return true
		}
		text = text[amp+1:]
		semi := bytes.IndexByte(text, ';')
		if semi < 0 || !isEntity(string(text[:semi])) {
			return false
		}
	}
}

func isEntity(s string) bool {
	switch s {
	case "amp", "lt", "gt", "quot", "apos":
		return true
	}
	num, ok := strings.CutPrefix(s, "#")
	if !ok {
		return false
	}
	base := 10
	if hex, ok := strings.CutPrefix(num, "x"); ok {
		num, base = hex, 16
	}
	_, err := strconv.ParseUint(num, base, 21)
	return err == nil
}
