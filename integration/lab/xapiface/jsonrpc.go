package xapiface

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// jsonCall is a decoded JSON-RPC request.
type jsonCall struct {
	two    bool   // "jsonrpc":"2.0"
	id     []byte // as received: an int or a string
	method string
	params []any
}

// parseJSON reads a JSON-RPC 1.0 or 2.0 request: method, params (an array; 2.0 may leave it out) and an id that is not null.
func parseJSON(body []byte) (jsonCall, error) {
	var in struct {
		Version *string         `json:"jsonrpc"`
		ID      json.RawMessage `json:"id"`
		Method  *string         `json:"method"`
		Params  json.RawMessage `json:"params"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return jsonCall{}, err
	}
	c := jsonCall{two: in.Version != nil && *in.Version == "2.0", id: bytes.TrimSpace(in.ID)}
	switch {
	case in.Version != nil && !c.two:
		return c, fmt.Errorf("unknown version %q", *in.Version)
	case in.Method == nil:
		return c, errors.New("no method")
	case len(c.id) == 0 || !bytes.ContainsRune([]byte(`"-0123456789`), rune(c.id[0])):
		c.id = nil
		return c, errors.New("no id")
	case len(in.Params) == 0 && !c.two:
		return c, errors.New("no params")
	}
	c.method = *in.Method
	if len(in.Params) == 0 {
		return c, nil
	}
	d := json.NewDecoder(bytes.NewReader(in.Params))
	d.UseNumber()
	if err := d.Decode(&c.params); err != nil && !errors.Is(err, io.EOF) {
		return c, fmt.Errorf("params: %w", err)
	}
	for i, v := range c.params {
		c.params[i] = plain(v)
	}
	return c, nil
}

// plain replaces json.Number by int64 where it is one, else float64.
func plain(v any) any {
	switch x := v.(type) {
	case json.Number:
		if i, err := x.Int64(); err == nil {
			return i
		}
		f, err := x.Float64()
		if err != nil {
			return x.String()
		}
		return f
	case []any:
		for i := range x {
			x[i] = plain(x[i])
		}
	case map[string]any:
		for k := range x {
			x[k] = plain(x[k])
		}
	}
	return v
}

// appendJSONReply writes the envelope of the caller's version. In 2.0 the code is always 1 and XAPI's own code is the message.
func appendJSONReply(buf []byte, c jsonCall, v any, failure *xapidb.Error) []byte {
	id := c.id
	if id == nil {
		id = []byte("null")
	}
	switch {
	case c.two && failure == nil:
		buf = append(buf, `{"jsonrpc":"2.0","result":`...)
		buf = appendJSONValue(buf, v)
	case c.two:
		buf = append(buf, `{"jsonrpc":"2.0","error":{"code":1,"message":`...)
		buf = appendJSONValue(buf, failure.Code)
		buf = append(buf, `,"data":`...)
		buf = appendJSONValue(buf, append([]string{}, failure.Params...))
		buf = append(buf, '}')
	case failure == nil:
		buf = append(buf, `{"result":`...)
		buf = appendJSONValue(buf, v)
		buf = append(buf, `,"error":null`...)
	default:
		buf = append(buf, `{"result":null,"error":`...)
		buf = appendJSONValue(buf, append([]string{failure.Code}, failure.Params...))
	}
	buf = append(buf, `,"id":`...)
	buf = append(buf, id...)
	return append(buf, '}')
}
