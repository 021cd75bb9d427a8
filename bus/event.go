package bus

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Header names of CloudEvents 1.0 in binary mode over NATS (CloudEvents' nats-protocol-binding.md), and the extension
// attributes that tables add. The binding treats datacontenttype as any attribute and reads content-type only to tell structured
// mode; programs that know no CloudEvents look at content-type, so a body has both.
const (
	HeaderID          = "ce-id"
	HeaderSource      = "ce-source"
	HeaderSpecVersion = "ce-specversion"
	HeaderType        = "ce-type"
	HeaderTime        = "ce-time"
	HeaderSubject     = "ce-subject"
	HeaderDataType    = "ce-datacontenttype"
	HeaderContentType = "content-type"
	HeaderTable       = "ce-table"    // Name of the table.
	HeaderEpoch       = "ce-epoch"    // Run of the publisher, 16 hex digits.
	HeaderSequence    = "ce-sequence" // Number of the change in the table and epoch, 20 digits.
	HeaderStale       = "ce-stale"    // Why the publisher doubts its own rows.
	HeaderList        = "ce-list"
	HeaderPage        = "ce-page"
	HeaderPages       = "ce-pages"
)

// ErrNotEvent says that a message is no CloudEvent that we can read.
var ErrNotEvent = errors.New("not a CloudEvent")

// Event is a CloudEvent 1.0.
type Event struct {
	// ID is unique per Source. Publish sets a random one when it is empty.
	ID string
	// Source is a URI reference, for example "/xostor/<host uuid>/sr-size".
	Source string
	// Type is what happened, for example "io.xostor.xapi.vdi.put".
	Type string
	// Time is when it happened. Publish sets the present time when it is zero.
	Time time.Time
	// Subject is the subject of the bus on which the event travels. It is not CloudEvents' own attribute "subject": that is Key.
	Subject Subject
	// Key is CloudEvents' attribute "subject": what the event is about, in its true spelling. May be empty.
	Key string
	// Extensions are further attributes; names are lower case letters and digits.
	Extensions map[string]string
	// DataContentType is "application/json" unless set.
	DataContentType string
	// Data is the body; empty for events that need none.
	Data json.RawMessage
}

// Message puts the event in binary mode: attributes in the headers, the body as it is. Missing ID, Time and
// DataContentType are filled in. It fails when an attribute that CloudEvents requires is missing.
func (e Event) Message() (*Message, error) {
	if e.Source == "" || e.Type == "" || e.Subject == "" {
		return nil, fmt.Errorf("encode event: source, type and subject are required: %w", ErrNotEvent)
	}
	if e.ID == "" {
		e.ID = uuid.NewString()
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	h := make(Header, 8+len(e.Extensions))
	for name, value := range e.Extensions {
		if !validExtension(name) {
			return nil, fmt.Errorf("encode event: extension %q: %w", name, ErrNotEvent)
		}
		h["ce-"+name] = escapeHeader(value)
	}
	h[HeaderSpecVersion] = "1.0"
	h[HeaderID] = escapeHeader(e.ID)
	h[HeaderSource] = escapeHeader(e.Source)
	h[HeaderType] = escapeHeader(e.Type)
	h[HeaderTime] = e.Time.UTC().Format(time.RFC3339Nano)
	if e.Key != "" {
		h[HeaderSubject] = escapeHeader(e.Key)
	}
	if len(e.Data) > 0 {
		h[HeaderDataType] = "application/json"
		if e.DataContentType != "" {
			h[HeaderDataType] = escapeHeader(e.DataContentType)
		}
		h[HeaderContentType] = h[HeaderDataType]
	}
	return &Message{Subject: string(e.Subject), Header: h, Data: e.Data}, nil
}

// EventOf reads a message in binary mode. ErrNotEvent when a required attribute is missing or unreadable.
func EventOf(m *Message) (Event, error) {
	e := Event{Subject: Subject(m.Subject), Data: m.Data, DataContentType: unescapeHeader(m.Header[HeaderContentType])}
	if v := m.Header[HeaderSpecVersion]; v != "1.0" {
		return Event{}, fmt.Errorf("read event: specversion %q: %w", v, ErrNotEvent)
	}
	for name, value := range m.Header {
		attribute, ok := strings.CutPrefix(name, "ce-")
		if !ok || attribute == "specversion" {
			continue
		}
		value = unescapeHeader(value)
		switch attribute {
		case "id":
			e.ID = value
		case "source":
			e.Source = value
		case "type":
			e.Type = value
		case "subject":
			e.Key = value
		case "datacontenttype":
			e.DataContentType = value
		case "time":
			t, err := time.Parse(time.RFC3339, value)
			if err != nil {
				return Event{}, fmt.Errorf("read event: time %q: %w", value, ErrNotEvent)
			}
			e.Time = t
		default:
			if e.Extensions == nil {
				e.Extensions = map[string]string{}
			}
			e.Extensions[attribute] = value
		}
	}
	if e.ID == "" || e.Source == "" || e.Type == "" {
		return Event{}, fmt.Errorf("read event: id, source and type are required: %w", ErrNotEvent)
	}
	return e, nil
}

func validExtension(name string) bool {
	if name == "" || len(name) > 20 {
		return false
	}
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') {
			return false
		}
	}
	switch name {
	case "id", "source", "specversion", "type", "time", "subject", "data", "datacontenttype", "dataschema":
		return false
	}
	return true
}

// escapeHeader encodes a value as the bindings for HTTP and NATS say: printable ASCII but blank, quote and percent stays.
func escapeHeader(s string) string {
	plain := true
	for i := 0; i < len(s) && plain; i++ {
		plain = plainByte(s[i])
	}
	if plain {
		return s
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD")
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if plainByte(s[i]) {
			b.WriteByte(s[i])
			continue
		}
		fmt.Fprintf(&b, "%%%02X", s[i])
	}
	return b.String()
}

func plainByte(c byte) bool { return c > ' ' && c < 0x7f && c != '"' && c != '%' }

// unescapeHeader undoes escapeHeader. What is no valid escape stays as it is; senders exist that do not escape.
func unescapeHeader(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b.WriteByte(byte(n))
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return strings.ToValidUTF8(b.String(), "\uFFFD")
}

// kind is what a message of a table means.
type kind string

const (
	kindPut     kind = "put"     // A key has a new value.
	kindDelete  kind = "delete"  // A key is gone.
	kindReset   kind = "reset"   // Everything may have changed: list again.
	kindState   kind = "state"   // The publisher's own freshness changed.
	kindAlive   kind = "alive"   // Sign of life; takes no sequence number.
	kindPage    kind = "page"    // One page of a list.
	kindRefused kind = "refused" // A list request that cannot be answered.
)

const typePrefix = "io.xostor."

// tableHeader is what the headers of a table's message say.
type tableHeader struct {
	kind        kind
	epoch, seq  uint64
	key, stale  string
	list        string
	page, pages int
}

func (h tableHeader) encode(table, source string, now time.Time) Header {
	out := make(Header, 12)
	seq := fmt.Sprintf("%020d", h.seq)
	epoch := formatEpoch(h.epoch)
	out[HeaderSpecVersion] = "1.0"
	out[HeaderID] = table + "/" + epoch + "/" + seq + "/" + string(h.kind)
	out[HeaderSource] = source
	out[HeaderType] = typePrefix + table + "." + string(h.kind)
	out[HeaderTime] = now.UTC().Format(time.RFC3339Nano)
	out[HeaderTable] = table
	out[HeaderEpoch] = epoch
	out[HeaderSequence] = seq
	if h.key != "" {
		out[HeaderSubject] = escapeHeader(h.key)
	}
	if h.stale != "" {
		out[HeaderStale] = escapeHeader(h.stale)
	}
	switch h.kind {
	case kindPut:
		out[HeaderDataType], out[HeaderContentType] = "application/json", "application/json"
	case kindAlive:
		// Many signs of life share a sequence, and an id must be unique per source.
		out[HeaderID] += "/" + strconv.FormatInt(now.UnixNano(), 36)
	case kindPage:
		out[HeaderDataType], out[HeaderContentType] = "application/json", "application/json"
		out[HeaderList] = h.list
		out[HeaderPage] = strconv.Itoa(h.page)
		out[HeaderPages] = strconv.Itoa(h.pages)
		out[HeaderID] += "/" + out[HeaderPage]
	}
	return out
}

func decodeTableHeader(table string, in Header) (tableHeader, error) {
	var h tableHeader
	if in[HeaderTable] != table {
		return h, fmt.Errorf("read table message: it is of table %q: %w", in[HeaderTable], ErrNotEvent)
	}
	k, ok := strings.CutPrefix(in[HeaderType], typePrefix+table+".")
	if !ok {
		return h, fmt.Errorf("read table message: type %q: %w", in[HeaderType], ErrNotEvent)
	}
	h.kind = kind(k)
	var err error
	if h.epoch, err = strconv.ParseUint(in[HeaderEpoch], 16, 64); err != nil {
		return h, fmt.Errorf("read table message: epoch: %w", ErrNotEvent)
	}
	if h.seq, err = strconv.ParseUint(in[HeaderSequence], 10, 64); err != nil {
		return h, fmt.Errorf("read table message: sequence: %w", ErrNotEvent)
	}
	h.key, h.stale = unescapeHeader(in[HeaderSubject]), unescapeHeader(in[HeaderStale])
	if h.kind != kindPage {
		return h, nil
	}
	h.list = in[HeaderList]
	if h.page, err = strconv.Atoi(in[HeaderPage]); err != nil {
		return h, fmt.Errorf("read table message: page: %w", ErrNotEvent)
	}
	if h.pages, err = strconv.Atoi(in[HeaderPages]); err != nil {
		return h, fmt.Errorf("read table message: pages: %w", ErrNotEvent)
	}
	return h, nil
}
