package linstor

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
)

// maxEventBytes bounds one event: a node with all its properties is a few KiB.
const maxEventBytes = 1 << 20

var errEventTooLarge = fmt.Errorf("%w: event above %d bytes", ErrMalformed, maxEventBytes)

// frame is one dispatched server-sent event.
type frame struct {
	name string // "message" when the server did not name it.
	data []byte
}

// frameReader reads text/event-stream as the HTML standard defines it, as far as LINSTOR can use it: event and data
// fields, comments, data over several lines, line ends LF, CRLF and CR. Ids and retry are ignored: LINSTOR sends none.
type frameReader struct {
	r       *bufio.Reader
	skipLF  bool // The last line ended in CR; a following LF belongs to it.
	started bool
	line    []byte
}

func newFrameReader(r io.Reader) *frameReader { return &frameReader{r: bufio.NewReader(r)} }

// next returns the next event. A stream cut in the middle of one gives io.ErrUnexpectedEOF, never half of it; a clean
// end gives io.EOF.
func (f *frameReader) next() (frame, error) {
	var ev frame
	hasData := false
	for {
		line, err := f.readLine()
		if err != nil {
			if errors.Is(err, io.EOF) && (ev.name != "" || hasData || len(line) > 0) {
				return frame{}, io.ErrUnexpectedEOF
			}
			return frame{}, err
		}
		if len(line) == 0 {
			if !hasData {
				ev.name = "" // The standard: an event without data is dropped, its name with it.
				continue
			}
			if ev.name == "" {
				ev.name = "message"
			}
			return ev, nil
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(name) {
		case "event":
			ev.name = string(value)
		case "data":
			if hasData {
				ev.data = append(ev.data, '\n')
			}
			hasData = true
			if ev.data = append(ev.data, value...); len(ev.data) > maxEventBytes {
				return frame{}, errEventTooLarge
			}
		}
	}
}

// readLine returns the next line without its end; the slice is valid until the next call. A last line without end comes
// with io.EOF.
func (f *frameReader) readLine() ([]byte, error) {
	f.line = f.line[:0]
	if !f.started {
		f.started = true
		f.skipByteOrderMark()
	}
	for {
		b, err := f.r.ReadByte()
		if err != nil {
			return f.line, err
		}
		if f.skipLF {
			f.skipLF = false
			if b == '\n' {
				continue
			}
		}
		switch b {
		case '\n':
			return f.line, nil
		case '\r':
			f.skipLF = true // Not peeked for: that would block until the next event.
			return f.line, nil
		}
		if f.line = append(f.line, b); len(f.line) > maxEventBytes {
			return nil, errEventTooLarge
		}
	}
}

func (f *frameReader) skipByteOrderMark() {
	const bom = "\xef\xbb\xbf"
	b, err := f.r.Peek(1)
	if err != nil || b[0] != bom[0] {
		return
	}
	if b, err := f.r.Peek(len(bom)); err == nil && string(b) == bom {
		_, _ = f.r.Discard(len(bom))
	}
}
