package bus_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// startBus runs a bus of one host in a folder of the test and ends it with the test.
func startBus(t testing.TB, change func(*bus.Options)) (*bus.Bus, bus.Options) {
	t.Helper()
	o := bus.Options{
		Socket: filepath.Join(t.TempDir(), "bus.sock"), ServerName: "host-1", ClusterName: "pool-1",
		Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	b, err := bus.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b, o
}

func dial(t testing.TB, o bus.Options, name string) *bus.Conn {
	t.Helper()
	c, err := bus.Dial(t.Context(), o.Socket, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

type vdi struct {
	Size int64 `json:"size"`
}

// waitUntil waits for notifications of the mirror until ok says that it has what it should.
func waitUntil[T any](t testing.TB, m *bus.Mirror[T], ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-m.Changed():
		case <-ctx.Done():
			t.Fatalf("the mirror did not get there: %+v, %d keys", m.Freshness(), m.Len())
		}
	}
}

func TestMirrorFollowsTableOverTheDoor(t *testing.T) {
	_, o := startBus(t, nil)
	feed, agent := dial(t, o, "feed"), dial(t, o, "agent")
	spec := bus.XAPITable("vdi")
	table, err := bus.NewTable[vdi](feed, spec, bus.TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if _, err := table.Replace(map[string]vdi{"a": {1}, "b": {2}}); err != nil {
		t.Fatal(err)
	}
	m, err := bus.NewMirror(agent, spec, bus.MirrorOptions[vdi]{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	waitUntil(t, m, func() bool { return m.Freshness().Fresh && m.Len() == 2 })
	if _, err := table.Put("c", vdi{3}); err != nil {
		t.Fatal(err)
	}
	table.Delete("a")
	waitUntil(t, m, func() bool { return m.Freshness().Seq == 3 })
	got, _ := m.Snapshot()
	if len(got) != 2 || got["b"].Size != 2 || got["c"].Size != 3 {
		t.Fatalf("mirror holds %v", got)
	}
}

func TestEventReachesSubscriber(t *testing.T) {
	_, o := startBus(t, nil)
	a, b := dial(t, o, "a"), dial(t, o, "b")
	got := make(chan bus.Event, 1)
	if _, err := bus.SubscribeEvents(b, subject.Agent("*", "*", "finding"), func(e bus.Event) { got <- e }, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	sent := bus.Event{Source: "/xostor/h/sr-size", Type: "io.xostor.finding", Key: "Pool größe %", Subject: subject.Agent("sr-size", "h", "finding"), Data: json.RawMessage(`{"x":1}`)}
	if err := bus.PublishEvent(a, sent); err != nil {
		t.Fatal(err)
	}
	e := <-got
	if e.Key != sent.Key || e.Type != sent.Type || e.Subject != sent.Subject || string(e.Data) != `{"x":1}` || e.ID == "" || e.Time.IsZero() {
		t.Fatalf("got %+v", e)
	}
}
