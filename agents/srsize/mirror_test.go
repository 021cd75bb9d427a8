package srsize

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/agents/feed"
	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// TestMirrors_ShowWhatDirectReadsShow runs the real feed and bus on a lab pool and compares two agents' snapshots.
func TestMirrors_ShowWhatDirectReadsShow(t *testing.T) {
	dir, err := os.MkdirTemp("", "mr-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	pool, err := lab.New(lab.Options{Seed: 7, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pool.Close() })
	if _, err := pool.Serve(); err != nil {
		t.Fatal(err)
	}
	disks, err := pool.CreateDisks(5, 10*gib)
	if err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	here := pool.Coordinator()
	client, err := xapi.New(xapi.Config{Socket: pool.FacesOf(here.Name).Socket, Originator: "test", Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	controller, err := linstor.New(linstor.Options{Controllers: pool.Controllers()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(controller.Close)
	b, err := bus.Start(t.Context(), bus.Options{Socket: filepath.Join(dir, "b"), ServerName: here.UUID, ClusterName: "p", Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	conn, err := b.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)

	counted := &counting{Storage: controller}
	mirrors, err := NewMirrors(conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(mirrors.Close)
	cfg := Config{HostUUID: here.UUID, Coordinator: func(context.Context) (bool, string, error) { return true, "", nil },
		Records: XAPIRecords{client}, Writer: XAPIWriter{client}, Storage: controller}
	direct := New(cfg)
	cfg.Records, cfg.Storage = mirrors.Records(cfg.Records), mirrors.Storage(counted)
	mirrored := New(cfg)
	look := func(a *Agent) Snapshot {
		t.Helper()
		s, err := a.Observe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i := range s.SRs {
			s.SRs[i].Past = Past{} // times differ
		}
		return s
	}
	if d := cmp.Diff(look(direct), look(mirrored)); d != "" || counted.reads() == 0 {
		t.Errorf("without a feed the sources must be read directly (%d reads; -direct +mirrored):\n%s", counted.reads(), d)
	}

	var feeds sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); feeds.Wait() })
	fl := feed.NewLINSTOR(feed.LINSTOROptions{Wire: conn, Source: controller, Coordinator: feed.Always(), Host: here.UUID, Log: quiet})
	fx := feed.NewXAPI(feed.XAPIOptions{Wire: conn, Watch: feed.WatchXAPI(client), Coordinator: feed.Always(), Host: here.UUID, OnChange: fl.HintXAPI, Log: quiet})
	feeds.Go(func() { fl.Run(ctx) })
	feeds.Go(func() { fx.Run(ctx) })

	// same waits until both agents see the same; changes take a moment to travel.
	same := func(what string) {
		t.Helper()
		deadline := time.After(20 * time.Second)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			d := cmp.Diff(look(direct), look(mirrored))
			if d == "" {
				return
			}
			select {
			case <-deadline:
				t.Fatalf("%s (-direct +mirrored):\n%s", what, d)
			case <-tick.C:
			}
		}
	}
	for _, f := range []func(context.Context) error{mirrors.srs.WaitFresh, mirrors.pbds.WaitFresh, mirrors.vdis.WaitFresh, mirrors.hosts.WaitFresh,
		mirrors.nodes.WaitFresh, mirrors.pools.WaitFresh, mirrors.resources.WaitFresh} {
		if err := f(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	before := counted.reads()
	same("fresh mirrors")
	if n := counted.reads() - before; n != 0 {
		t.Errorf("%d reads of nodes, pools or resources with fresh mirrors, want none", n)
	}
	if err := pool.WriteDisk(disks[0], 3*gib); err != nil {
		t.Fatal(err)
	}
	fl.Hint("")
	same("after a thin disk grew")
	if err := pool.DeleteDisk(disks[1]); err != nil {
		t.Fatal(err)
	}
	same("after a disk was deleted")
	pool.SatelliteOffline(pool.Hosts()[1].Name)
	same("with a satellite offline")
}

// counting counts the reads that mirrors save.
type counting struct {
	Storage
	mu sync.Mutex
	n  int
}

func (c *counting) reads() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *counting) add() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
}

func (c *counting) Nodes(ctx context.Context) ([]linstor.Node, error) {
	c.add()
	return c.Storage.Nodes(ctx)
}

func (c *counting) StoragePools(ctx context.Context, q linstor.PoolQuery) ([]linstor.StoragePool, error) {
	c.add()
	return c.Storage.StoragePools(ctx, q)
}

func (c *counting) ResourceView(ctx context.Context, q linstor.ViewQuery) ([]linstor.Resource, error) {
	c.add()
	return c.Storage.ResourceView(ctx, q)
}
