package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
)

// controller is a LINSTOR controller with two nodes, a thin pool on each and replicated volumes.
type controller struct {
	mu        sync.Mutex
	away      error
	hung      bool // Satellites do not answer.
	took      map[call]time.Duration
	online    map[string]bool
	free      map[string]int64 // By node; what the satellite would say.
	cached    map[string]int64 // By node; what the controller remembers.
	allocated map[string]int64 // By resource.
	calls     map[call]int
	viewed    []string // Nodes of each resource view, "" for all.
	handlers  map[linstor.Stream]linstor.Handler
}

func newController() *controller {
	return &controller{
		took: map[call]time.Duration{}, online: map[string]bool{"n1": true, "n2": true}, free: map[string]int64{"n1": 1000, "n2": 1000},
		cached: map[string]int64{"n1": 1000, "n2": 1000}, allocated: map[string]int64{"r1": 10, "r2": 20}, calls: map[call]int{},
		handlers: map[linstor.Stream]linstor.Handler{},
	}
}

// answer counts the call and waits as long as it takes.
func (c *controller) answer(ctx context.Context, k call) error {
	c.mu.Lock()
	c.calls[k]++
	took, away, hung := c.took[k], c.away, c.hung && k.lane() == laneCostly
	c.mu.Unlock()
	if hung {
		<-ctx.Done()
		return ctx.Err()
	}
	pause(ctx, took)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return away
}

func (c *controller) Nodes(ctx context.Context) ([]linstor.Node, error) {
	err := c.answer(ctx, callNodes)
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []linstor.Node
	for _, name := range []string{"n1", "n2"} {
		status := linstor.StatusOffline
		if c.online[name] {
			status = linstor.StatusOnline
		}
		out = append(out, linstor.Node{Name: name, ConnectionStatus: status, Props: map[string]string{"PrefNic": "storage", "Aux/password": "x"}})
	}
	return out, err
}

func (c *controller) StoragePools(ctx context.Context, q linstor.PoolQuery) ([]linstor.StoragePool, error) {
	k, from := callProbe, c.free
	if q.Cached {
		k, from = callPools, c.cached
	}
	err := c.answer(ctx, k)
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []linstor.StoragePool{{Name: "DfltDisklessStorPool", Node: "n1", Provider: linstor.ProviderDiskless, Diskless: true}}
	for _, node := range []string{"n1", "n2"} {
		p := linstor.StoragePool{Name: "thin", Node: node, Provider: "LVM_THIN"}
		if c.online[node] {
			free, total := from[node], int64(2000)
			p.FreeKiB, p.TotalKiB = &free, &total
		}
		out = append(out, p)
	}
	return out, err
}

func (c *controller) Definitions(ctx context.Context, _ bool) ([]linstor.Definition, error) {
	err := c.answer(ctx, callDefinitions)
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []linstor.Definition
	for name := range c.allocated {
		out = append(out, linstor.Definition{Name: name, Volumes: []linstor.VolumeDefinition{{SizeKiB: 100}}})
	}
	return out, err
}

func (c *controller) EachResource(ctx context.Context, q linstor.ViewQuery, begin func(), each func(linstor.Resource)) error {
	begin()
	k := callView
	if len(q.Resources) > 0 {
		k = callResources
	}
	err := c.answer(ctx, k)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.viewed = append(c.viewed, strings.Join(q.Nodes, "+"))
	for name, kib := range c.allocated {
		if len(q.Resources) > 0 && !slices.Contains(q.Resources, name) {
			continue
		}
		for _, node := range []string{"n1", "n2"} {
			if len(q.Nodes) > 0 && !slices.Contains(q.Nodes, node) {
				continue
			}
			each(linstor.Resource{Name: name, Node: node, Volumes: []linstor.Volume{{Pool: "thin", AllocatedKiB: &kib}}})
		}
	}
	return err
}

func (c *controller) Events(ctx context.Context, stream linstor.Stream, h linstor.Handler) error {
	c.mu.Lock()
	c.handlers[stream] = h
	c.mu.Unlock()
	h.Connected("test")
	<-ctx.Done()
	return ctx.Err()
}

// set changes the controller under its lock.
func (c *controller) set(fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn()
}

// counted returns the calls since it was asked last.
func (c *controller) counted() map[call]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.calls
	c.calls = map[call]int{}
	return was
}

// bench is a feed with mirrors of all its tables, in a bubble.
type bench struct {
	*controller
	feed      *LINSTOR
	nodes     *bus.Mirror[linstor.Node]
	pools     *bus.Mirror[Pool]
	defs      *bus.Mirror[linstor.Definition]
	resources *bus.Mirror[Resource]
}

func mirror[T any](t *testing.T, w bus.Wire, spec bus.Spec) *bus.Mirror[T] {
	t.Helper()
	m, err := bus.NewMirror(w, spec, bus.MirrorOptions[T]{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// withFeed runs fn beside a LINSTOR feed, in virtual time.
func withFeed(t *testing.T, fact Fact, fn func(t *testing.T, b *bench)) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		b := &bench{controller: newController()}
		b.feed = NewLINSTOR(LINSTOROptions{Wire: w, Source: b.controller, Coordinator: fact, Host: "h1", Log: slog.New(slog.DiscardHandler)})
		b.nodes, b.pools = mirror[linstor.Node](t, w, bus.LINSTORTable("node")), mirror[Pool](t, w, bus.LINSTORTable("pool"))
		b.defs, b.resources = mirror[linstor.Definition](t, w, bus.LINSTORTable("definition")), mirror[Resource](t, w, bus.LINSTORTable("resource"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.feed.Run(ctx)
		}()
		defer func() {
			cancel()
			<-done
			b.nodes.Close()
			b.pools.Close()
			b.defs.Close()
			b.resources.Close()
		}()
		fn(t, b)
	})
}

// later lets virtual time pass.
func (b *bench) later(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// stale names the tables that are stale.
func (b *bench) stale() string {
	var out []string
	for _, t := range []struct {
		name string
		f    bus.Freshness
	}{{"node", b.nodes.Freshness()}, {"pool", b.pools.Freshness()}, {"definition", b.defs.Freshness()}, {"resource", b.resources.Freshness()}} {
		if !t.f.Fresh {
			out = append(out, t.name+": "+t.f.Reason)
		}
	}
	return strings.Join(out, "; ")
}

func (b *bench) poolFree(t *testing.T, key string) string {
	t.Helper()
	p, ok := b.pools.Get(key)
	switch {
	case !ok:
		return "no row"
	case p.FreeKiB == nil:
		return "unknown"
	}
	return fmt.Sprint(*p.FreeKiB)
}

func (b *bench) allocatedKiB(key string) int64 {
	r, ok := b.resources.Get(key)
	if !ok || len(r.Volumes) == 0 || r.Volumes[0].AllocatedKiB == nil {
		return -1
	}
	return *r.Volumes[0].AllocatedKiB
}

func TestLINSTORFillsItsTables(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(2 * time.Second)
		if s := b.stale(); s != "" {
			t.Fatal(s)
		}
		if b.nodes.Len() != 2 || b.pools.Len() != 2 || b.defs.Len() != 2 || b.resources.Len() != 4 {
			t.Fatalf("%d nodes, %d pools, %d definitions, %d resources", b.nodes.Len(), b.pools.Len(), b.defs.Len(), b.resources.Len())
		}
		n, _ := b.nodes.Get("n1")
		if n.Props["PrefNic"] != "storage" || len(n.Props) != 1 {
			t.Fatalf("properties of a node: %v", n.Props)
		}
	})
}

func TestLINSTORAsksLittleWhenNothingChanges(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(5 * time.Minute)
		b.counted()
		b.later(10 * time.Minute)
		n := b.counted()
		total := 0
		for _, k := range n {
			total += k
		}
		if total > 2*600 || n[callProbe] > 121 || n[callView] > 11 || n[callPools] < 595 || n[callNodes] < 295 {
			t.Fatalf("calls in ten quiet minutes: %v", n)
		}
	})
}

func TestLINSTORSeesThinVolumesGrow(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(5 * time.Minute)
		// The controller's cache does not move: only a probe sees it.
		b.set(func() { b.free["n1"], b.allocated["r1"] = 900, 110 })
		b.feed.HintXAPI(XAPIChange{Class: "vbd", UUID: "u"}) // The VM was started.
		b.later(1100 * time.Millisecond)
		if free, kib := b.poolFree(t, "thin/n1"), b.allocatedKiB("r1/n1"); free != "900" || kib != 110 {
			t.Fatalf("a second after the growth: free %s, allocated %d", free, kib)
		}
		// As long as it grows the feed looks twice a second, without further hints.
		for i := range int64(5) {
			b.later(10 * time.Second)
			b.set(func() { b.free["n1"] = 800 - i })
			b.later(600 * time.Millisecond)
			if free := b.poolFree(t, "thin/n1"); free != fmt.Sprint(800-i) {
				t.Fatalf("free %s, want %d", free, 800-i)
			}
		}
	})
}

func TestLINSTORGrowthReadsOnlyTheNodesThatGrew(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(10 * time.Second)
		b.set(func() { b.viewed, b.free["n1"], b.allocated["r1"] = nil, 900, 110 })
		b.later(time.Second)
		if one, other := b.allocatedKiB("r1/n1"), b.allocatedKiB("r1/n2"); one != 110 || other != 10 {
			t.Fatalf("allocated %d where the pool shrank and %d where it did not, want 110 and 10", one, other)
		}
		b.set(func() {
			if got := strings.Join(b.viewed, " "); got != "n1" {
				t.Fatalf("views of %q, want one of n1", got)
			}
			delete(b.allocated, "r2")
			b.free["n2"] = 990
		})
		b.later(time.Second)
		_, here := b.resources.Get("r2/n1")
		if _, there := b.resources.Get("r2/n2"); !here || there {
			t.Fatalf("deleted resource: on n1 %v, on n2 %v; want it gone from the node that was read", here, there)
		}
		b.later(2 * time.Minute) // The view of all comes anyway.
		if _, here := b.resources.Get("r2/n1"); here {
			t.Fatal("two minutes later the deleted resource is still there")
		}
	})
}

func TestLINSTORDoesNotBelieveTheCacheOverTheSatellites(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(2 * time.Second)
		b.set(func() { b.free["n1"] = 700 })
		b.later(30 * time.Second) // The cache says 1000 thirty times meanwhile.
		if free := b.poolFree(t, "thin/n1"); free != "700" {
			t.Fatalf("free %s, want the satellite's 700", free)
		}
		b.set(func() { b.cached["n1"], b.free["n1"] = 600, 600 })
		b.later(1500 * time.Millisecond)
		if free := b.poolFree(t, "thin/n1"); free != "600" {
			t.Fatalf("free %s after the controller learned of 600", free)
		}
	})
}

func TestLINSTORPromotionReadsOneResource(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(90 * time.Second) // quiet, and not yet time to read all again
		b.counted()
		b.set(func() { b.allocated["r2"] = 55 })
		yes := true
		h := b.handlers[linstor.StreamPromotion]
		e := linstor.Event{Name: linstor.EventMayPromote, MayPromote: &linstor.MayPromote{Resource: "r2", Node: "n1", MayPromote: &yes}}
		h.Event(e)
		b.later(300 * time.Millisecond)
		if n := b.counted(); n[callResources] != 1 || n[callView] != 0 || b.allocatedKiB("r2/n2") != 55 {
			t.Fatalf("after a promotion: calls %v, allocated %d", n, b.allocatedKiB("r2/n2"))
		}
		for range 100 { // Somebody else subscribed: everything is told again.
			h.Event(e)
		}
		b.later(300 * time.Millisecond)
		if n := b.counted(); n[callResources] != 0 {
			t.Fatalf("repeated events led to calls: %v", n)
		}
	})
}

func TestLINSTORAwayIsStaleAndComesBack(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(2 * time.Second)
		b.set(func() { b.away = errors.New("connection refused") })
		b.later(1500 * time.Millisecond)
		for _, f := range []bus.Freshness{b.nodes.Freshness(), b.pools.Freshness(), b.defs.Freshness(), b.resources.Freshness()} {
			if f.Fresh || !strings.Contains(f.Reason, "connection refused") {
				t.Fatalf("while the controller is away: %+v", f)
			}
		}
		if b.resources.Len() != 4 {
			t.Fatal("the last contents were forgotten")
		}
		b.counted()
		b.later(10 * time.Minute)
		n := b.counted()
		if n[callPools] > 400 || n[callNodes]+n[callProbe]+n[callView] > 2 {
			t.Fatalf("calls in ten minutes to a controller that is away: %v", n)
		}
		b.set(func() {
			b.away = nil
			b.allocated = map[string]int64{"r1": 11}
		})
		b.later(13 * time.Second)
		if s := b.stale(); s != "" || b.resources.Len() != 2 || b.allocatedKiB("r1/n1") != 11 {
			t.Fatalf("after the controller's return: stale %q, %d resources", s, b.resources.Len())
		}
	})
}

func TestLINSTORHungSatelliteHoldsUpNothingCheap(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(2 * time.Minute)
		b.set(func() { b.hung = true })
		b.later(3 * time.Minute)
		f := b.nodes.Freshness()
		if s := b.stale(); !f.Fresh || !strings.Contains(s, "pool:") || !strings.Contains(s, "resource:") {
			t.Fatalf("with a hung satellite: %q", s)
		}
		b.counted()
		b.later(time.Minute)
		if n := b.counted(); n[callPools] < 59 || n[callNodes] < 29 {
			t.Fatalf("cheap calls in a minute: %v", n)
		}
		b.set(func() { b.hung = false })
		b.later(10 * time.Minute)
		if s := b.stale(); s != "" {
			t.Fatalf("after the satellite woke up: %q", s)
		}
	})
}

func TestLINSTORNodeLossIsUnknownCapacity(t *testing.T) {
	withFeed(t, Always(), func(t *testing.T, b *bench) {
		b.later(2 * time.Minute)
		b.set(func() { b.online["n2"] = false })
		b.later(3 * time.Second)
		n, _ := b.nodes.Get("n2")
		if free := b.poolFree(t, "thin/n2"); n.Online() || free != "unknown" {
			t.Fatalf("node %s, free %s", n.ConnectionStatus, free)
		}
	})
}

func TestLINSTORHandOver(t *testing.T) {
	var mu sync.Mutex
	holds := true
	fact := Fact{Holds: func() bool {
		mu.Lock()
		defer mu.Unlock()
		return holds
	}}
	withFeed(t, fact, func(t *testing.T, b *bench) {
		set := func(v bool) {
			mu.Lock()
			defer mu.Unlock()
			holds = v
		}
		b.later(2 * time.Second)
		first := b.nodes.Freshness()
		if !first.Fresh {
			t.Fatal(b.stale())
		}
		set(false)
		b.later(8 * time.Second)
		b.counted()
		b.later(time.Minute)
		if f := b.nodes.Freshness(); f.Fresh || len(b.counted()) != 0 {
			t.Fatalf("a host that is no coordinator publishes: %+v", f)
		}
		set(true)
		b.later(15 * time.Second)
		if f := b.nodes.Freshness(); b.stale() != "" || f.Epoch <= first.Epoch {
			t.Fatalf("after the return: %q, epoch %x then %x", b.stale(), first.Epoch, f.Epoch)
		}
	})
}
