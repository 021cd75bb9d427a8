package linstor_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"testing"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorface"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// The lab's LINSTOR was written from the same facts by somebody else: a call that the two understand differently shows here.
func TestLab_AnOfflineSatellite(t *testing.T) {
	const gib = 1 << 20
	sim := linstorsim.New(linstorsim.Config{})
	face := linstorface.New(sim)
	defer func() { _ = face.Close() }()
	for i, host := range []string{"h1", "h2", "h3"} {
		sim.AddNode(host, "10.0.0."+string(rune('1'+i)))
		sim.AddPool(host, "xcp-sr-thin", "LVM_THIN", 100*gib)
	}
	sim.CreateGroup("xcp-sr-thin", "xcp-sr-thin", 2)
	if err := sim.Spawn("xcp-sr-thin", "xcp-volume-1", gib).Err(); err != nil {
		t.Fatal(err)
	}
	sim.KVSet("xcp-sr-thin", "xcp/volume/u/volume-name", "xcp-volume-1")
	h := httptest.NewServer(face.Handler())
	defer h.Close()
	c := newClient(t, linstor.Options{Controllers: []string{closedPort(t), h.URL}})
	ctx := t.Context()

	diskful := diskfulOn(t, c)
	if len(diskful) != 2 {
		t.Fatalf("diskful on %v, want two", diskful)
	}
	gone := diskful[0]
	sim.SetNode(gone, linstor.StatusOffline)

	nodes, err := c.Nodes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Online() == (n.Name == gone) {
			t.Errorf("%s is %s", n.Name, n.ConnectionStatus)
		}
	}
	pools, err := c.StoragePools(ctx, linstor.PoolQuery{Pools: []string{"xcp-sr-thin"}})
	if err != nil || len(pools) != 3 {
		t.Fatalf("pools %+v, %v", pools, err)
	}
	for _, p := range pools {
		if lost := p.FreeKiB == nil && p.TotalKiB == nil && len(p.Reports) == 1; lost != (p.Node == gone) {
			t.Errorf("pool %+v", p)
		}
	}
	view, err := c.ResourceView(ctx, linstor.ViewQuery{Resources: []string{"xcp-volume-1"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range view {
		if (r.InUse == nil) != (r.Node == gone) {
			t.Errorf("in use of %+v", r)
		}
	}
	reply, err := c.ModifyResource(ctx, "xcp-volume-1", gone, linstor.PropChange{Set: map[string]string{"Aux/xostor": "1"}})
	if err != nil || !reply.Undelivered() {
		t.Errorf("a change for an offline satellite: %+v, %v; want a warning", reply, err)
	}
	if kv, err := c.KV(ctx, "xcp-sr-thin"); err != nil || kv["xcp/volume/u/volume-name"] != "xcp-volume-1" {
		t.Errorf("key-value store: %v, %v", kv, err)
	}
	if _, err := c.KV(ctx, "none"); !errors.Is(err, linstor.ErrNotFound) {
		t.Errorf("missing instance: %v", err)
	}
	if g, err := c.Group(ctx, "xcp-sr-thin"); err != nil || g.SelectFilter.PlaceCount == nil || *g.SelectFilter.PlaceCount != 2 {
		t.Errorf("group: %+v, %v", g, err)
	}
	if _, err := c.Resources(ctx, "none"); !errors.Is(err, linstor.ErrNotFound) {
		t.Errorf("missing definition: %v", err)
	}
}

func diskfulOn(t *testing.T, c *linstor.Client) []string {
	t.Helper()
	list, err := c.Resources(t.Context(), "xcp-volume-1")
	if err != nil {
		t.Fatal(err)
	}
	var nodes []string
	for _, r := range list {
		if !r.Diskless() {
			nodes = append(nodes, r.Node)
		}
	}
	return nodes
}

func TestLab_FaultsOnTheWire(t *testing.T) {
	sim := linstorsim.New(linstorsim.Config{})
	face := linstorface.New(sim)
	defer func() { _ = face.Close() }()
	sim.AddNode("h1", "10.0.0.1")
	h := httptest.NewServer(face.Handler())
	defer h.Close()
	c := newClient(t, linstor.Options{Controllers: []string{h.URL}})
	set := linstor.PropChange{Set: map[string]string{"Aux/x": "1"}}

	face.Inject(linstorface.Fault{Kind: linstorface.DieMidBody, Path: "/v1/nodes", Times: 1})
	if nodes, err := c.Nodes(t.Context()); err != nil || len(nodes) != 1 {
		t.Errorf("one death in mid-body: %v, %v; want the second attempt's answer", nodes, err)
	}
	face.Inject(linstorface.Fault{Kind: linstorface.TruncatedJSON, Path: "/v1/nodes"})
	if nodes, err := c.Nodes(t.Context()); nodes != nil || !errors.Is(err, linstor.ErrMalformed) {
		t.Errorf("truncated: %v, %v", nodes, err)
	}
	face.Clear()
	face.Inject(linstorface.Fault{Kind: linstorface.BodyLost, Path: "/v1/nodes/h1"})
	if _, err := c.ModifyNode(t.Context(), "h1", set); !errors.Is(err, linstor.ErrUncertain) {
		t.Errorf("answer lost: %v", err)
	}
	face.Clear()
	if nodes, err := c.Nodes(t.Context()); err != nil || nodes[0].Props["Aux/x"] != "1" {
		t.Errorf("the lost answer's change was carried out, and reading back must show it: %+v, %v", nodes, err)
	}
	face.Inject(linstorface.Fault{Kind: linstorface.HTML500, Path: "/v1/nodes"})
	var api *linstor.APIError
	if _, err := c.Nodes(t.Context()); !errors.As(err, &api) || api.Text == "" {
		t.Errorf("HTML: %v", err)
	}
}

func TestLab_EventStreamIsCut(t *testing.T) {
	sim := linstorsim.New(linstorsim.Config{})
	face := linstorface.New(sim)
	defer func() { _ = face.Close() }()
	h := httptest.NewServer(face.Handler())
	defer h.Close()
	c := newClient(t, linstor.Options{Controllers: []string{h.URL}})
	ctx, cancel := context.WithCancel(t.Context())
	heard := make(chan string, 16)
	ended := make(chan error)
	go func() {
		ended <- c.Events(ctx, linstor.StreamNodes, linstor.Handler{
			Connected: func(string) { heard <- "connected" },
			Lost:      func(error) { heard <- "lost" },
			Event:     func(e linstor.Event) { heard <- e.Name + " " + e.Node.Name },
		})
	}()
	expect := func(want string) {
		t.Helper()
		if got := <-heard; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
	expect("connected")
	sim.AddNode("h1", "10.0.0.1")
	expect("node-create h1")
	face.CutStreams()
	expect("lost")
	expect("connected")
	sim.AddNode("h2", "10.0.0.2")
	expect("node-create h2")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
