package feed

import (
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorface"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
	"github.com/xostor-agents/xostor-agents/xapi"
)

var quietLog = slog.New(slog.DiscardHandler)

// wires is a bus with one connection for the feed and one for an agent.
func wires(t *testing.T) (feed, agent *bus.Conn) {
	t.Helper()
	o := bus.Options{Socket: filepath.Join(t.TempDir(), "s"), ServerName: "h1", ClusterName: "p", Log: quietLog}
	b, err := bus.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	var conns []*bus.Conn
	for _, name := range []string{"feed", "agent"} {
		c, err := bus.Dial(t.Context(), o.Socket, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		conns = append(conns, c)
	}
	return conns[0], conns[1]
}

// runs runs fn until the test ends.
func runs(t *testing.T, fn func(ctx context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// until waits for notifications until ok, and says how long that took.
func until[T any](t *testing.T, what string, m *bus.Mirror[T], ok func() bool) {
	t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-m.Changed():
		case <-ctx.Done():
			t.Fatalf("%s: not seen in 20 s, mirror %+v with %d keys", what, m.Freshness(), m.Len())
		}
	}
	t.Logf("%s: seen after %s", what, time.Since(began).Round(time.Millisecond))
}

func TestLINSTOROverRealWires(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	sim := linstorsim.New(linstorsim.Config{})
	for _, n := range []string{"h1", "h2"} {
		sim.AddNode(n, "127.0.0.1")
		sim.AddPool(n, "thin", "LVM_THIN", 100<<20)
	}
	if r := sim.CreateGroup("xcp-sr-group", "thin", 2); r.Failed() {
		t.Fatalf("create group: %+v", r)
	}
	face := linstorface.New(sim)
	address, err := face.ServeTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := face.Close(); err != nil {
			t.Error(err)
		}
	}()
	client, err := linstor.New(linstor.Options{Controllers: []string{address}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	t.Run("feed", func(t *testing.T) {
		feed, agent := wires(t)
		f := NewLINSTOR(LINSTOROptions{Wire: feed, Source: client, Coordinator: Always(), Host: "h1", Log: quietLog})
		runs(t, f.Run)
		pools := mirror[Pool](t, agent, bus.LINSTORTable("pool"))
		defer pools.Close()
		resources := mirror[Resource](t, agent, bus.LINSTORTable("resource"))
		defer resources.Close()
		definitions := mirror[linstor.Definition](t, agent, bus.LINSTORTable("definition"))
		defer definitions.Close()
		until(t, "first pools", pools, func() bool { return pools.Freshness().Fresh && pools.Len() == 2 })
		until(t, "first resources", resources, func() bool { return resources.Freshness().Fresh })

		if r := sim.Spawn("xcp-sr-group", "xcp-volume-1", 1<<20); r.Failed() {
			t.Fatalf("spawn: %+v", r)
		}
		allocated := func() int64 {
			r, ok := resources.Get("xcp-volume-1/h1")
			if !ok || len(r.Volumes) == 0 || r.Volumes[0].AllocatedKiB == nil {
				return -1
			}
			return *r.Volumes[0].AllocatedKiB
		}
		until(t, "new resource", resources, func() bool { return allocated() >= 0 })
		until(t, "new definition", definitions, func() bool { return definitions.Len() == 1 })
		if err := sim.Write("xcp-volume-1", 300<<10); err != nil {
			t.Fatal(err)
		}
		until(t, "growth of a thin volume", resources, func() bool { return allocated() >= 300<<10 })
		until(t, "shrinking free space", pools, func() bool {
			p, _ := pools.Get("thin/h1")
			return p.FreeKiB != nil && *p.FreeKiB <= 100<<20-300<<10
		})
		face.Inject(linstorface.Fault{Kind: linstorface.Down})
		until(t, "controller away", pools, func() bool { return !pools.Freshness().Fresh })
		face.Clear(linstorface.Down)
		until(t, "controller back", pools, func() bool { return pools.Freshness().Fresh })
	})
}

func TestXAPIOverRealWires(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	db := xapidb.New(xapidb.Options{Rand: xapidb.SeededRand(1)})
	if _, err := db.SeedPool(xapidb.Seed{Hosts: 3}); err != nil {
		t.Fatal(err)
	}
	face := xapiface.New(xapiface.Options{DB: db})
	socket := filepath.Join(t.TempDir(), "x")
	if _, err := face.ServeUnix(socket, face.Coordinator()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := face.Close(); err != nil {
			t.Error(err)
		}
	}()
	client, err := xapi.New(xapi.Config{Socket: socket, Originator: "xostor-feed", Log: quietLog})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := client.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	t.Run("feed", func(t *testing.T) {
		feed, agent := wires(t)
		f := NewXAPI(XAPIOptions{Wire: feed, Watch: WatchXAPI(client), Coordinator: Always(), Host: "h1", Log: quietLog})
		runs(t, f.Run)
		hosts := mirror[xapi.Host](t, agent, bus.XAPITable("host"))
		defer hosts.Close()
		networks := mirror[json.RawMessage](t, agent, bus.XAPITable("network"))
		defer networks.Close()
		until(t, "first hosts", hosts, func() bool { return hosts.Freshness().Fresh && hosts.Len() == 3 })
		until(t, "first networks", networks, func() bool { return networks.Freshness().Fresh && networks.Len() > 0 })
		ref := db.Refs("host")[0]
		uuid, err := db.Field("host", ref, "uuid")
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Set("host", ref, "name_label", "renamed"); err != nil {
			t.Fatal(err)
		}
		until(t, "renamed host", hosts, func() bool {
			h, _ := hosts.Get(uuid.(string))
			return h.NameLabel == "renamed"
		})
		face.Restart()
		if err := db.Set("host", ref, "name_label", "after the restart"); err != nil {
			t.Fatal(err)
		}
		until(t, "host renamed over a restart", hosts, func() bool {
			h, _ := hosts.Get(uuid.(string))
			return h.NameLabel == "after the restart" && hosts.Freshness().Fresh
		})
	})
}
