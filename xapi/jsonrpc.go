package xapi

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// jsonWire is JSON-RPC 2.0 on /jsonrpc (jsoncallback, ocaml/xapi/api_server.ml; present in 8.2 and 8.3).
type jsonWire struct{}

func (jsonWire) path() string        { return "/jsonrpc" }
func (jsonWire) contentType() string { return "application/json" }

func (jsonWire) encode(method string, args []any) ([]byte, error) {
	params := make([]any, len(args))
	for i, a := range args {
		v, err := plainArg(a, jsonArgs)
		if err != nil {
			return nil, fmt.Errorf("argument %d: %w", i, err)
		}
		params[i] = v
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(struct {
		Version string `json:"jsonrpc"`
		Method  string `json:"method"`
		Params  []any  `json:"params"`
		ID      int    `json:"id"`
	}{"2.0", method, params, 1})
	return b.Bytes(), err
}

// jsonError is XAPI's form of a failure: the code is in message, its parameters are in data, and the numeric code is always 1
// (json_of_error_object, ocaml/xapi/api_server_common.ml).
type jsonError struct {
	Message string   `json:"message"`
	Data    []string `json:"data"`
}

func (jsonWire) decode(method string, body *bufio.Reader, out sink) error {
	b, err := firstByte(body)
	if err != nil {
		return fmt.Errorf("read reply: %w", err)
	}
	if b != '{' {
		return notXAPI(fmt.Errorf("answer is not JSON-RPC: %s", firstLine(body)))
	}
	dec := json.NewDecoder(&mendReader{r: body})
	got, err := readEnvelope(method, dec, out)
	var refusal *Error
	switch {
	case errors.As(err, &refusal):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("reply was cut off after %d bytes: %w", dec.InputOffset(), io.ErrUnexpectedEOF)
	case err != nil:
		return fmt.Errorf("decode reply: %w", err)
	case !got:
		return notXAPI(errors.New("answer has neither result nor error"))
	}
	return nil
}

// readEnvelope walks the members of the reply so that a large result is decoded record by record as it arrives.
func readEnvelope(method string, dec *json.Decoder, out sink) (got bool, err error) {
	if _, err := dec.Token(); err != nil {
		return false, err
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return false, err
		}
		switch key {
		case "result":
			if err := readResult(dec, out); err != nil {
				return false, err
			}
			got = true
		case "error":
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				return false, err
			}
			if string(raw) == "null" {
				continue
			}
			var e jsonError
			if err := json.Unmarshal(raw, &e); err != nil || e.Message == "" {
				return false, notXAPI(fmt.Errorf("error object %.80q has no code", raw))
			}
			return false, &Error{Code: e.Message, Params: e.Data, Method: method}
		default:
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return false, err
			}
		}
	}
	_, err = dec.Token()
	return got, err
}

func readResult(dec *json.Decoder, out sink) error {
	if out.records == nil {
		if out.into == nil {
			out.into = new(json.RawMessage)
		}
		return dec.Decode(out.into)
	}
	open, err := dec.Token()
	if err != nil {
		return err
	}
	if open != json.Delim('{') {
		return fmt.Errorf("result is %v where a map of records was expected", open)
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		if err := out.records(Ref(key.(string)), dec.Decode); err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

// mendReader turns the bare words NaN, Infinity and -Infinity, which XAPI's printer emits for floats and JSON does not know, into
// text ("NaN") as they stream by. It never touches what is inside a string, and leaves every other byte alone.
type mendReader struct {
	r     io.Reader
	state mendState
	word  []byte // word is the run of word bytes seen so far outside of a string.
	in    [16 << 10]byte
	buf   []byte // buf holds what was mended; out is the part not read yet.
	out   []byte
	err   error
}

type mendState int

const (
	mendPlain  mendState = iota
	mendLong             // mendLong is inside a word too long to be one of ours.
	mendString           // mendString is between quotes.
	mendEscape           // mendEscape is behind a backslash between quotes.
)

// mendLongest is the length of the longest word that is mended.
const mendLongest = len("-Infinity")

func (m *mendReader) Read(p []byte) (int, error) {
	for len(m.out) == 0 {
		if m.err != nil {
			return 0, m.err
		}
		n, err := m.r.Read(m.in[:])
		m.buf = m.buf[:0]
		m.feed(m.in[:n])
		if err != nil {
			m.endWord()
			m.err = err
		}
		m.out = m.buf
	}
	n := copy(p, m.out)
	m.out = m.out[n:]
	return n, nil
}

func (m *mendReader) feed(b []byte) {
	for len(b) > 0 {
		switch m.state {
		case mendEscape:
			m.buf = append(m.buf, b[0])
			m.state = mendString
			b = b[1:]
		case mendString:
			b = m.inString(b)
		default:
			m.outside(b[0])
			b = b[1:]
		}
	}
}

// inString copies up to the end of the string or an escape and gives back the rest.
func (m *mendReader) inString(b []byte) []byte {
	n := 0
	for n < len(b) && b[n] != '"' && b[n] != '\\' {
		n++
	}
	if n == len(b) {
		m.buf = append(m.buf, b...)
		return nil
	}
	m.state = mendPlain
	if b[n] == '\\' {
		m.state = mendEscape
	}
	m.buf = append(m.buf, b[:n+1]...)
	return b[n+1:]
}

// outside takes one byte outside of a string.
func (m *mendReader) outside(c byte) {
	if isWord(c) {
		if m.state == mendLong {
			m.buf = append(m.buf, c)
			return
		}
		if m.word = append(m.word, c); len(m.word) > mendLongest {
			m.endWord()
			m.state = mendLong
		}
		return
	}
	m.endWord()
	m.state = mendPlain
	if c == '"' {
		m.state = mendString
	}
	m.buf = append(m.buf, c)
}

// isWord tells whether c can be part of a number or of a bare word.
func isWord(c byte) bool {
	return 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '+' || c == '.' || c == '_'
}

func (m *mendReader) endWord() {
	switch string(m.word) {
	case "NaN", "Infinity", "-Infinity":
		m.buf = append(m.buf, '"')
		m.buf = append(m.buf, m.word...)
		m.buf = append(m.buf, '"')
	default:
		m.buf = append(m.buf, m.word...)
	}
	m.word = m.word[:0]
}
