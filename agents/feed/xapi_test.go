package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// script is a Watch that a test steers: each function sent is run with the handler, an error ends the call.
type script chan func(h xapi.Handler) error

func (s script) watch(ctx context.Context, _ []string, h xapi.Handler) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case step := <-s:
			if err := step(h); err != nil {
				return err
			}
		}
	}
}

func sr(uuid string, size int) json.RawMessage {
	return fmt.Appendf(nil, `{"uuid":%q,"physical_size":%d,"VDIs":["OpaqueRef:1","OpaqueRef:2"],"PBDs":["OpaqueRef:3"]}`, uuid, size)
}

// withXAPI runs fn beside an XAPI feed of the class sr, in virtual time. do runs a step and lets its messages arrive.
func withXAPI(t *testing.T, fn func(t *testing.T, do func(func(h xapi.Handler) error), m *bus.Mirror[json.RawMessage], changes *[]XAPIChange)) {
	synctest.Test(t, func(t *testing.T) {
		w, steps := bustest.NewWire(t), make(script)
		var changes []XAPIChange
		f := NewXAPI(XAPIOptions{
			Wire: w, Watch: steps.watch, Coordinator: Always(), Host: "h1", Classes: []string{"sr"}, Log: slog.New(slog.DiscardHandler),
			OnChange: func(c XAPIChange) { changes = append(changes, c) },
		})
		m := mirror[json.RawMessage](t, w, bus.XAPITable("sr"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			f.Run(ctx)
		}()
		defer func() {
			cancel()
			<-done
			m.Close()
		}()
		fn(t, func(step func(h xapi.Handler) error) {
			steps <- step
			time.Sleep(3 * time.Second)
			synctest.Wait()
		}, m, &changes)
	})
}

func TestXAPIPublishesRecordsWithoutTheirLargeFields(t *testing.T) {
	withXAPI(t, func(t *testing.T, do func(func(h xapi.Handler) error), m *bus.Mirror[json.RawMessage], changes *[]XAPIChange) {
		do(func(h xapi.Handler) error {
			h.Reset("sr", map[xapi.Ref]json.RawMessage{"OpaqueRef:a": sr("a", 1), "OpaqueRef:b": sr("b", 2)})
			h.Fresh()
			return nil
		})
		got, ok := m.Get("a")
		if want := `{"ref":"OpaqueRef:a","uuid":"a","physical_size":1,"PBDs":["OpaqueRef:3"]}`; !ok || string(got) != want || !m.Freshness().Fresh {
			t.Fatalf("row %s, %+v; want %s", got, m.Freshness(), want)
		}
		do(func(h xapi.Handler) error {
			h.Apply([]xapi.Change{
				{Class: "sr", Op: xapi.Del, Ref: "OpaqueRef:b", UUID: "b"},
				{Class: "sr", Op: xapi.Add, Ref: "OpaqueRef:c", UUID: "c", Record: sr("c", 3)},
				{Class: "sr", Op: xapi.Mod, Ref: "OpaqueRef:a", UUID: "a", Record: sr("a", 9)},
				{Class: "sr", Op: xapi.Mod, Ref: "OpaqueRef:a", UUID: "a", Record: sr("a", 9)}, // Told twice, published once.
				{Class: "task", Op: xapi.Add, UUID: "t", Record: json.RawMessage(`{}`)},
			})
			return nil
		})
		want := []XAPIChange{{Class: "sr", UUID: "b", Deleted: true}, {Class: "sr", UUID: "c", Added: true}, {Class: "sr", UUID: "a"}}
		if rows, f := m.Snapshot(); len(rows) != 2 || f.Seq != 4 || !slices.Equal(*changes, want) {
			t.Fatalf("%d rows, %+v, changes %+v", len(rows), f, *changes)
		}
	})
}

func TestXAPIAwayIsStale(t *testing.T) {
	withXAPI(t, func(t *testing.T, do func(func(h xapi.Handler) error), m *bus.Mirror[json.RawMessage], _ *[]XAPIChange) {
		reset := func(h xapi.Handler) error {
			h.Reset("sr", map[xapi.Ref]json.RawMessage{"OpaqueRef:a": sr("a", 1)})
			h.Fresh()
			return nil
		}
		do(reset)
		do(func(h xapi.Handler) error {
			h.Stale("XAPI restarts")
			return nil
		})
		if f := m.Freshness(); f.Fresh || !strings.Contains(f.Reason, "XAPI restarts") || m.Len() != 1 {
			t.Fatalf("%+v", f)
		}
		do(func(h xapi.Handler) error {
			h.Fresh()
			return nil
		})
		if f := m.Freshness(); !f.Fresh {
			t.Fatalf("%+v", f)
		}
		do(func(xapi.Handler) error { return errors.New("client is closed") })
		if f := m.Freshness(); f.Fresh || !strings.Contains(f.Reason, "client is closed") {
			t.Fatalf("%+v", f)
		}
		do(reset)
		if f := m.Freshness(); !f.Fresh {
			t.Fatalf("%+v", f)
		}
	})
}

func TestXAPIObjectThatCannotBePublishedIsStale(t *testing.T) {
	withXAPI(t, func(t *testing.T, do func(func(h xapi.Handler) error), m *bus.Mirror[json.RawMessage], _ *[]XAPIChange) {
		huge := fmt.Appendf(nil, `{"uuid":"a","name_label":%q}`, strings.Repeat("x", 100<<10))
		do(func(h xapi.Handler) error {
			h.Reset("sr", map[xapi.Ref]json.RawMessage{"OpaqueRef:a": huge, "OpaqueRef:b": sr("b", 1)})
			h.Fresh()
			return nil
		})
		if f := m.Freshness(); f.Fresh || !strings.Contains(f.Reason, "cannot publish sr a") || m.Len() != 1 {
			t.Fatalf("%+v, %d rows", f, m.Len())
		}
		do(func(h xapi.Handler) error {
			h.Apply([]xapi.Change{{Class: "sr", Op: xapi.Mod, UUID: "a", Record: sr("a", 1)}})
			return nil
		})
		if f := m.Freshness(); !f.Fresh || m.Len() != 2 {
			t.Fatalf("%+v, %d rows", f, m.Len())
		}
	})
}
