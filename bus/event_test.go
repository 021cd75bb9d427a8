package bus_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	cloudevents "github.com/cloudevents/sdk-go/v2/event"

	"github.com/xostor-agents/xostor-agents/bus"
)

// official builds the event of the CloudEvents project's own SDK from a message's headers and validates it.
func official(t *testing.T, m *bus.Message) cloudevents.Event {
	t.Helper()
	e := cloudevents.New(m.Header[bus.HeaderSpecVersion])
	e.SetID(m.Header[bus.HeaderID])
	e.SetSource(m.Header[bus.HeaderSource])
	e.SetType(m.Header[bus.HeaderType])
	at, err := time.Parse(time.RFC3339Nano, m.Header[bus.HeaderTime])
	if err != nil {
		t.Fatal(err)
	}
	e.SetTime(at)
	if s := m.Header[bus.HeaderSubject]; s != "" {
		e.SetSubject(s)
	}
	for name, value := range m.Header {
		switch name {
		case bus.HeaderSpecVersion, bus.HeaderID, bus.HeaderSource, bus.HeaderType, bus.HeaderTime, bus.HeaderSubject, bus.HeaderContentType, bus.HeaderDataType:
		default:
			attribute, ok := strings.CutPrefix(name, "ce-")
			if !ok {
				t.Errorf("header %s is no attribute of a CloudEvent", name)
			}
			e.SetExtension(attribute, value)
		}
	}
	if len(m.Data) > 0 {
		if err := e.SetData(m.Header[bus.HeaderDataType], json.RawMessage(m.Data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Validate(); err != nil {
		t.Errorf("the official SDK refuses %v: %v", m.Header, err)
	}
	return e
}

// TestEveryMessageIsACloudEvent listens to everything that a table, a mirror and a publisher send.
func TestEveryMessageIsACloudEvent(t *testing.T) {
	_, o := startBus(t, nil)
	listener, feed := dial(t, o, "listener"), dial(t, o, "feed")
	seen := make(chan *bus.Message, 100)
	stop, err := listener.Subscribe(func(m *bus.Message) { seen <- m }, "xostor.v1.>", "_INBOX.>")
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if err := listener.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	spec := bus.LINSTORTable("resource")
	table, err := bus.NewTable[vdi](feed, spec, bus.TableOptions{Alive: 50 * time.Millisecond, Source: "/xostor/h1/feed"})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if _, err := table.Replace(map[string]vdi{"rö/n1": {1}}); err != nil {
		t.Fatal(err)
	}
	m, err := bus.NewMirror(feed, spec, bus.MirrorOptions[vdi]{Alive: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.WaitFresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := table.Put("rö/n2", vdi{2}); err != nil {
		t.Fatal(err)
	}
	table.Delete("rö/n1")
	table.SetStale("controller is away: größe")
	if err := bus.PublishEvent(feed, bus.Event{
		Source: "/xostor/h1/sr-size", Type: "io.xostor.agent.action", Subject: "xostor.v1.agent.sr-size.h1.action",
		Extensions: map[string]string{"agent": "sr-size"}, Data: json.RawMessage(`{}`),
	}); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{
		"io.xostor.linstor.resource.put": true, "io.xostor.linstor.resource.delete": true, "io.xostor.linstor.resource.reset": true,
		"io.xostor.linstor.resource.state": true, "io.xostor.linstor.resource.alive": true, "io.xostor.linstor.resource.page": true,
		"io.xostor.agent.action": true,
	}
	ids := map[string]bool{}
	for len(want) > 0 {
		msg := <-seen
		if strings.HasPrefix(msg.Subject, "xostor.v1.table.linstor.resource.list") {
			continue // A request, not an event.
		}
		e := official(t, msg)
		if ids[e.Source()+e.ID()] {
			t.Errorf("two events with the id %s", e.ID())
		}
		ids[e.Source()+e.ID()] = true
		delete(want, e.Type())
	}
}

func TestEventWithoutWhatIsRequired(t *testing.T) {
	good := bus.Event{Source: "/x", Type: "t", Subject: "xostor.v1.a"}
	for name, change := range map[string]func(*bus.Event){
		"source": func(e *bus.Event) { e.Source = "" }, "type": func(e *bus.Event) { e.Type = "" }, "subject": func(e *bus.Event) { e.Subject = "" },
		"extension with a dash":   func(e *bus.Event) { e.Extensions = map[string]string{"a-b": "x"} },
		"extension called source": func(e *bus.Event) { e.Extensions = map[string]string{"source": "x"} },
	} {
		e := good
		change(&e)
		if _, err := e.Message(); !errors.Is(err, bus.ErrNotEvent) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m, err := good.Message()
	if err != nil {
		t.Fatal(err)
	}
	for _, header := range []string{bus.HeaderID, bus.HeaderSource, bus.HeaderType, bus.HeaderSpecVersion} {
		h := bus.Header{}
		for k, v := range m.Header {
			if k != header {
				h[k] = v
			}
		}
		if _, err := bus.EventOf(&bus.Message{Subject: m.Subject, Header: h}); !errors.Is(err, bus.ErrNotEvent) {
			t.Errorf("without %s: %v", header, err)
		}
	}
}

// FuzzEvent: what is written can be read again, and no header makes reading panic.
func FuzzEvent(f *testing.F) {
	f.Add("id", "/source", "type", "key", "ext")
	f.Add("%41", "a b", "\"", "größe\r\n", "%zz")
	f.Add("\xff", "\x00", "%", "", "x")
	f.Fuzz(func(t *testing.T, id, source, typ, key, ext string) {
		raw := bus.Header{bus.HeaderSpecVersion: "1.0", bus.HeaderID: id, bus.HeaderSource: source, bus.HeaderType: typ, bus.HeaderTime: key, "ce-x": ext}
		if e, err := bus.EventOf(&bus.Message{Subject: "s", Header: raw}); err == nil && (!utf8.ValidString(e.ID) && utf8.ValidString(id)) {
			t.Fatalf("id %q became %q", id, e.ID)
		}
		in := bus.Event{ID: id, Source: source, Type: typ, Key: key, Subject: "s", Extensions: map[string]string{"x": ext}}
		m, err := in.Message()
		if err != nil || id == "" {
			return
		}
		for name, value := range m.Header {
			if strings.ContainsAny(value, "\r\n \"") || !utf8.ValidString(value) {
				t.Fatalf("header %s is %q", name, value)
			}
		}
		out, err := bus.EventOf(m)
		if err != nil {
			t.Fatalf("read %v: %v", m.Header, err)
		}
		for _, pair := range [][2]string{{id, out.ID}, {source, out.Source}, {typ, out.Type}, {key, out.Key}, {ext, out.Extensions["x"]}} {
			if utf8.ValidString(pair[0]) && pair[0] != pair[1] {
				t.Fatalf("%q became %q", pair[0], pair[1])
			}
		}
	})
}
