package xapiface

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// maxNesting bounds the depth of a request's values.
const maxNesting = 200

// parseXML reads a methodCall. Values come out as string, int64, float64, bool, []any, map[string]any, nil. It is as lenient as XAPI: bare text and <string> are strings, <int>,
// <i4> and <i8> are ints; white space between tags is ignored.
func parseXML(body []byte) (name string, params []any, err error) {
	d := xml.NewDecoder(bytes.NewReader(body))
	d.CharsetReader = func(_ string, r io.Reader) (io.Reader, error) { return r, nil }
	p := xmlParser{d: d}
	if err := p.enter("methodCall"); err != nil {
		return "", nil, err
	}
	if name, err = p.textOf("methodName"); err != nil {
		return "", nil, err
	}
	for {
		start, err := p.next()
		if err != nil {
			return "", nil, err
		}
		switch {
		case start == nil:
			return name, params, nil
		case start.Name.Local == "params":
			if params, err = p.params(); err != nil {
				return "", nil, err
			}
		default:
			return "", nil, fmt.Errorf("unexpected <%s>", start.Name.Local)
		}
	}
}

type xmlParser struct{ d *xml.Decoder }

// next returns the next start tag inside the current element, nil at its end.
func (p xmlParser) next() (*xml.StartElement, error) {
	for {
		tok, err := p.d.Token()
		if err != nil {
			return nil, noEOF(err)
		}
		switch t := tok.(type) {
		case xml.StartElement:
			return &t, nil
		case xml.EndElement:
			return nil, nil
		case xml.CharData:
			if strings.TrimSpace(string(t)) != "" {
				return nil, errors.New("text between tags")
			}
		}
	}
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (p xmlParser) enter(tag string) error {
	start, err := p.next()
	if err != nil {
		return err
	}
	if start == nil || start.Name.Local != tag {
		return fmt.Errorf("expected <%s>", tag)
	}
	return nil
}

func (p xmlParser) textOf(tag string) (string, error) {
	if err := p.enter(tag); err != nil {
		return "", err
	}
	return p.text()
}

// text reads character data up to the end of the current element.
func (p xmlParser) text() (string, error) {
	var b strings.Builder
	for {
		tok, err := p.d.Token()
		if err != nil {
			return "", noEOF(err)
		}
		switch t := tok.(type) {
		case xml.CharData:
			b.Write(t)
		case xml.EndElement:
			return b.String(), nil
		case xml.StartElement:
			return "", fmt.Errorf("unexpected <%s>", t.Name.Local)
		}
	}
}

func (p xmlParser) params() ([]any, error) {
	var out []any
	for {
		start, err := p.next()
		if err != nil || start == nil {
			return out, err
		}
		if start.Name.Local != "param" {
			return nil, fmt.Errorf("unexpected <%s>", start.Name.Local)
		}
		if err := p.enter("value"); err != nil {
			return nil, err
		}
		v, err := p.value(0)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
		if end, err := p.next(); err != nil || end != nil {
			return nil, errors.Join(err, errors.New("expected </param>"))
		}
	}
}

// value reads what is inside <value>, up to and including its end tag.
func (p xmlParser) value(depth int) (any, error) {
	if depth > maxNesting {
		return nil, errors.New("nested too deep")
	}
	var text strings.Builder
	for {
		tok, err := p.d.Token()
		if err != nil {
			return nil, noEOF(err)
		}
		switch t := tok.(type) {
		case xml.CharData:
			text.Write(t)
		case xml.EndElement:
			return text.String(), nil
		case xml.StartElement:
			v, err := p.typed(t.Name.Local, depth)
			if err != nil {
				return nil, err
			}
			if end, err := p.next(); err != nil || end != nil {
				return nil, errors.Join(err, errors.New("expected </value>"))
			}
			return v, nil
		}
	}
}

func (p xmlParser) typed(tag string, depth int) (any, error) {
	switch tag {
	case "array":
		return p.array(depth)
	case "struct":
		return p.object(depth)
	}
	text, err := p.text()
	if err != nil {
		return nil, err
	}
	switch tag {
	case "string", "dateTime.iso8601", "base64":
		return text, nil
	case "int", "i4", "i8":
		return strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	case "double":
		return strconv.ParseFloat(strings.TrimSpace(text), 64)
	case "boolean":
		return strings.TrimSpace(text) == "1", nil
	case "nil":
		return nil, nil
	}
	return nil, fmt.Errorf("unexpected <%s>", tag)
}

func (p xmlParser) array(depth int) (any, error) {
	if err := p.enter("data"); err != nil {
		return nil, err
	}
	list := []any{}
	for {
		start, err := p.next()
		if err != nil {
			return nil, err
		}
		if start == nil {
			break
		}
		if start.Name.Local != "value" {
			return nil, fmt.Errorf("unexpected <%s>", start.Name.Local)
		}
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	if end, err := p.next(); err != nil || end != nil {
		return nil, errors.Join(err, errors.New("expected </array>"))
	}
	return list, nil
}

func (p xmlParser) object(depth int) (any, error) {
	m := map[string]any{}
	for {
		start, err := p.next()
		if err != nil {
			return nil, err
		}
		if start == nil {
			return m, nil
		}
		if start.Name.Local != "member" {
			return nil, fmt.Errorf("unexpected <%s>", start.Name.Local)
		}
		name, err := p.textOf("name")
		if err != nil {
			return nil, err
		}
		if err := p.enter("value"); err != nil {
			return nil, err
		}
		if m[name], err = p.value(depth + 1); err != nil {
			return nil, err
		}
		if end, err := p.next(); err != nil || end != nil {
			return nil, errors.Join(err, errors.New("expected </member>"))
		}
	}
}

const (
	xmlHead = `<?xml version="1.0"?><methodResponse><params><param>`
	xmlTail = `</param></params></methodResponse>`
)

// appendXMLReply writes the envelope: Status and Value, or Status and ErrorDescription. system.listMethods is the exception, a bare array.
func appendXMLReply(buf []byte, name string, v any, failure *xapidb.Error) []byte {
	buf = append(buf, xmlHead...)
	switch {
	case failure != nil:
		buf = append(buf, "<value><struct><member><name>Status</name><value>Failure</value></member><member><name>ErrorDescription</name>"...)
		buf = appendXMLValue(buf, append([]string{failure.Code}, failure.Params...))
		buf = append(buf, "</member></struct></value>"...)
	case name == "system.listMethods":
		buf = appendXMLValue(buf, v)
	default:
		buf = append(buf, "<value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name>"...)
		buf = appendXMLValue(buf, v)
		buf = append(buf, "</member></struct></value>"...)
	}
	return append(buf, xmlTail...)
}
