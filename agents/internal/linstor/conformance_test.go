package linstor_test

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	golinstor "github.com/LINBIT/golinstor/client"
	"github.com/LINBIT/golinstor/fakelinstor"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

// LINBIT's own client writes into LINBIT's own fake, and we must read out of it what was put in: neither end is ours.
func TestConformance_ReadsWhatGolinstorWrote(t *testing.T) {
	fake := fakelinstor.New()
	defer fake.Server.Close()
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" { // The fake has none.
			return
		}
		fake.Server.Config.Handler.ServeHTTP(w, r)
	}))
	defer h.Close()
	ctx := t.Context()
	theirs, err := golinstor.NewClient(golinstor.Controllers([]string{h.URL}), golinstor.HTTPClient(h.Client()), golinstor.Log(nil))
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, node := range []string{"n1", "n2"} {
		must(theirs.Nodes.Create(ctx, golinstor.Node{
			Name: node, Type: "SATELLITE", NetInterfaces: []golinstor.NetInterface{{Name: "default", Address: []byte{10, 0, 0, 1}}},
		}))
	}
	must(theirs.ResourceGroups.Create(ctx, golinstor.ResourceGroup{Name: "g", SelectFilter: golinstor.AutoSelectFilter{PlaceCount: 2}}))
	must(theirs.ResourceDefinitions.Create(ctx, golinstor.ResourceDefinitionCreate{
		ResourceDefinition: golinstor.ResourceDefinition{Name: "vol", ResourceGroupName: "g", Props: map[string]string{"Aux/a": "b"}},
	}))
	must(theirs.Resources.Create(ctx, golinstor.ResourceCreate{Resource: golinstor.Resource{Name: "vol", NodeName: "n1"}}))
	must(theirs.Resources.Create(ctx, golinstor.ResourceCreate{Resource: golinstor.Resource{Name: "vol", NodeName: "n2", Flags: []string{"DISKLESS"}}}))

	ours := newClient(t, linstor.Options{Controllers: []string{h.URL}})
	theirNodes, err := theirs.Nodes.GetAll(ctx)
	must(err)
	nodes, err := ours.Nodes(ctx)
	must(err)
	if len(nodes) != len(theirNodes) {
		t.Fatalf("%d nodes, golinstor reads %d", len(nodes), len(theirNodes))
	}
	for i, n := range nodes {
		want := theirNodes[i]
		if n.Name != want.Name || n.Type != want.Type || n.ConnectionStatus != want.ConnectionStatus || !slices.Equal(n.Flags, want.Flags) ||
			len(n.NetInterfaces) != len(want.NetInterfaces) {
			t.Errorf("node %+v, golinstor reads %+v", n, want)
		}
	}
	if _, err := ours.StoragePools(ctx, linstor.PoolQuery{}); err == nil || errors.Is(err, linstor.ErrNotFound) {
		t.Errorf("an endpoint that the fake lacks gives %v", err)
	}
	resources, err := ours.Resources(ctx, "vol")
	must(err)
	if len(resources) != 2 || resources[0].Diskless() == resources[1].Diskless() {
		t.Errorf("resources %+v", resources)
	}
	view, err := ours.ResourceView(ctx, linstor.ViewQuery{})
	must(err)
	theirView, err := theirs.Resources.GetResourceView(ctx)
	must(err)
	for i, r := range view {
		if want := theirView[i]; r.Name != want.Name || r.Node != want.NodeName || !slices.Equal(r.Flags, want.Flags) || len(r.Volumes) != len(want.Volumes) {
			t.Errorf("resource %+v, golinstor reads %+v", r, want)
		}
	}
	if len(view) != len(theirView) {
		t.Errorf("%d resources in the view, golinstor reads %d", len(view), len(theirView))
	}
	defs, err := ours.Definitions(ctx, true)
	must(err)
	if len(defs) != 1 || defs[0].Group != "g" || defs[0].Props["Aux/a"] != "b" {
		t.Errorf("definitions %+v", defs)
	}
	groups, err := ours.Groups(ctx)
	must(err)
	i := slices.IndexFunc(groups, func(g linstor.Group) bool { return g.Name == "g" })
	if i < 0 || groups[i].SelectFilter.PlaceCount == nil || *groups[i].SelectFilter.PlaceCount != 2 {
		t.Errorf("groups %+v", groups)
	}
}

// The recorded answers of a live controller must be readable. They are normalised, so only the shapes count.
func TestConformance_ReadsTheRecordedAnswers(t *testing.T) {
	dir, ok := referenceFile("linstor-data/traces")
	if !ok {
		t.Skip("the recorded LINSTOR traces are not at hand")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no traces in %s: %v", dir, err)
	}
	reads := map[string]func(c *linstor.Client) error{
		"/v1/nodes":                 func(c *linstor.Client) error { _, err := c.Nodes(t.Context()); return err },
		"/v1/controller/properties": func(c *linstor.Client) error { _, err := c.ControllerProperties(t.Context()); return err },
		"/v1/resource-groups":       func(c *linstor.Client) error { _, err := c.Groups(t.Context()); return err },
		"/v1/resource-definitions":  func(c *linstor.Client) error { _, err := c.Definitions(t.Context(), true); return err },
	}
	count := map[string]int{}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var trace struct {
			Method         string          `json:"method"`
			Path           string          `json:"path"`
			ExpectedStatus int             `json:"expectedStatus"`
			ExpectedBody   json.RawMessage `json:"expectedBody"`
		}
		if err := json.Unmarshal(raw, &trace); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		p, _, _ := strings.Cut(trace.Path, "?")
		read, ok := reads[p]
		if !ok || trace.Method != http.MethodGet || trace.ExpectedStatus != http.StatusOK {
			continue
		}
		count[p]++
		c, _ := single(t, map[string]http.HandlerFunc{"GET " + p: answer(http.StatusOK, string(trace.ExpectedBody))})
		if err := read(c); err != nil {
			t.Errorf("%s: %v", filepath.Base(file), err)
		}
	}
	for _, p := range slices.Sorted(maps.Keys(reads)) {
		t.Logf("%s: %d recorded answers read", p, count[p])
	}
	if len(count) == 0 {
		t.Error("no trace was of use")
	}
}
