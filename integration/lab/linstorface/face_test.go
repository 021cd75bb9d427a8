package linstorface

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// TestAnswers is the table of section 6 and of the HTTP mapping: what a controller answers to each conflict. Every answer is
// checked against the OpenAPI document as well.
func TestAnswers(t *testing.T) {
	const vol = "/v1/resource-definitions/vol"
	cases := []struct {
		name, version      string
		prepare            func(*linstorsim.Cluster)
		method, path, body string
		status             int
		has                []int // codes that must be among the entries
	}{
		{name: "create existing definition", method: "POST", path: "/v1/resource-definitions", body: `{"resource_definition":{"name":"VOL"}}`, status: 500, has: []int{501}},
		{name: "create existing resource", method: "POST", path: vol + "/resources/hostA", body: `{}`, status: 500, has: []int{502}},
		{name: "make available again", method: "POST", path: vol + "/resources/hostA/make-available", body: `{"diskful":true}`, status: 200, has: []int{10008}},
		{name: "delete missing resource", method: "DELETE", path: vol + "/resources/nohost", status: 200, has: []int{3000}},
		{name: "delete resource of a missing definition", method: "DELETE", path: "/v1/resource-definitions/none/resources/hostA", status: 200, has: []int{3000}},
		{name: "delete missing definition", method: "DELETE", path: "/v1/resource-definitions/none", status: 200, has: []int{3000}},
		{name: "missing node", method: "GET", path: "/v1/nodes/none", status: 404, has: []int{300}},
		{name: "missing definition", method: "GET", path: "/v1/resource-definitions/none", status: 404, has: []int{301}},
		{name: "missing resource", method: "GET", path: vol + "/resources/none", status: 404, has: []int{302}},
		{name: "missing store", method: "GET", path: "/v1/key-value-store/none", status: 404, has: []int{316}},
		{name: "bad JSON", method: "PUT", path: "/v1/key-value-store/x", body: `{"override_props":`, status: 400},
		{name: "unknown field", method: "PUT", path: "/v1/key-value-store/x", body: `{"overide_props":{}}`, status: 400},
		{name: "number as string", method: "PUT", path: "/v1/resource-groups/xcp-sr-thin", body: ` {"select_filter":{"place_count":"3","diskless_on_remaining":"false"}}`, status: 200, has: []int{3}},
		{name: "word as number", method: "PUT", path: "/v1/resource-groups/xcp-sr-thin", body: `{"select_filter":{"place_count":"three"}}`, status: 400},
		{name: "unknown path", method: "GET", path: "/v1/nope", status: 404, has: []int{998}},
		{name: "wrong method", method: "PATCH", path: "/v1/nodes", status: 405, has: []int{998}},
		{name: "real endpoint, not built", method: "GET", path: "/v1/sos-report", status: 501, has: []int{998}},
		{name: "delete in use", prepare: func(c *linstorsim.Cluster) { _ = c.SetInUse("vol", "hostA", true) }, method: "DELETE", path: vol + "/resources/hostA", status: 500, has: []int{997}},
		{name: "delete in use, satellite away", prepare: func(c *linstorsim.Cluster) {
			_ = c.SetInUse("vol", "hostA", true)
			c.SetNode("hostA", linstorsim.StatusOffline)
		}, method: "DELETE", path: vol + "/resources/hostA", status: 200, has: []int{1002}},
		{name: "property with satellite away", prepare: func(c *linstorsim.Cluster) { c.SetNode("hostA", linstorsim.StatusOffline) },
			method: "PUT", path: vol, body: `{"override_props":{"Aux/a":"b"}}`, status: 200, has: []int{3, 1002}},
		{name: "disk of the only online replica", prepare: func(c *linstorsim.Cluster) { c.SetNode("hostB", linstorsim.StatusOffline) },
			method: "PUT", path: vol + "/resources/hostA/toggle-disk/diskless", status: 500, has: []int{991}},
		{name: "peer slots", prepare: func(c *linstorsim.Cluster) {
			c.CreateDefinition(linstorsim.DefinitionRequest{Name: "narrow", PeerSlots: 1, Group: "xcp-sr-thin"})
			c.CreateResource("narrow", "hostA", linstorsim.CreateRequest{})
			c.ModifyDefinition("narrow", nil, "", linstorsim.PropsChange{Override: linstorsim.Props{"DrbdOptions/auto-add-quorum-tiebreaker": "False"}})
			c.CreateResource("narrow", "hostB", linstorsim.CreateRequest{})
		}, method: "POST", path: "/v1/resource-definitions/narrow/resources/hostC", body: `{}`, status: 500, has: []int{993}},
		{name: "snapshot with satellite away", prepare: func(c *linstorsim.Cluster) { c.SetNode("hostA", linstorsim.StatusOffline) },
			method: "POST", path: vol + "/snapshots", body: `{"name":"s1"}`, status: 500, has: []int{995}},
		{name: "more replicas than nodes", method: "POST", path: vol + "/autoplace", body: `{"select_filter":{"place_count":5}}`, status: 500, has: []int{996}},
		{name: "fewer replicas than there are", method: "POST", path: vol + "/autoplace", body: `{"select_filter":{"place_count":1}}`, status: 500, has: []int{219}},
		{name: "no space", method: "POST", path: "/v1/resource-groups/xcp-sr-thin/spawn", body: `{"resource_definition_name":"huge","volume_sizes":[9999999999]}`, status: 500, has: []int{996}},
		{name: "toggle without room, 1.33", prepare: func(c *linstorsim.Cluster) { c.GrowPool("hostC", "thick", -50*gib); c.Advance(3 * time.Minute) },
			method: "PUT", path: vol + "/resources/hostC/toggle-disk/diskful/thick", status: 500, has: []int{206}},
		{name: "toggle again, 1.33", prepare: func(c *linstorsim.Cluster) {
			c.SetNode("hostC", linstorsim.StatusOffline)
			c.ToggleDiskful("vol", "hostC", "thin", "")
		}, method: "PUT", path: vol + "/resources/hostC/toggle-disk/diskful/thin", status: 500, has: []int{992}},
		{name: "toggle again, 1.34", version: linstorsim.Version134, prepare: func(c *linstorsim.Cluster) {
			c.SetNode("hostC", linstorsim.StatusOffline)
			c.ToggleDiskful("vol", "hostC", "thin", "")
		}, method: "PUT", path: vol + "/resources/hostC/toggle-disk/diskful/thin", status: 200, has: []int{10007, 1002}},
		{name: "turn a toggle round, 1.34", version: linstorsim.Version134, prepare: func(c *linstorsim.Cluster) {
			c.SetNode("hostC", linstorsim.StatusOffline)
			c.ToggleDiskful("vol", "hostC", "thin", "")
		}, method: "PUT", path: vol + "/resources/hostC/toggle-disk/diskless", status: 200, has: []int{3, 1002}},
		{name: "has disk already, 1.33", method: "PUT", path: vol + "/resources/hostA/toggle-disk/diskful", status: 200, has: []int{1007}},
		{name: "has disk already, 1.34", version: linstorsim.Version134, method: "PUT", path: vol + "/resources/hostA/toggle-disk/diskful", status: 200, has: []int{10007}},
		{name: "unified toggle is not in 1.33", method: "PUT", path: vol + "/resources/hostC/toggle-disk", body: `{"operation":"INTO_DRBD_DISKFUL"}`, status: 404},
		{name: "unified toggle, 1.34", version: linstorsim.Version134, method: "PUT", path: vol + "/resources/hostC/toggle-disk", body: `{"operation":"INTO_DRBD_DISKFUL","storage_pool":"thin"}`, status: 200, has: []int{3}},
		{name: "tie-breaker takeover", prepare: func(c *linstorsim.Cluster) { c.ToggleDiskful("vol", "hostC", "thin", "") },
			method: "DELETE", path: vol + "/resources/hostC", status: 200, has: []int{10006}},
		{name: "tie-breaker by hand", method: "DELETE", path: vol + "/resources/hostC", status: 200, has: []int{2}},
		{name: "lost while online", method: "DELETE", path: "/v1/nodes/hostA/lost", status: 500, has: []int{997}},
		{name: "evict while online", method: "PUT", path: "/v1/nodes/hostA/evict", status: 500, has: []int{997}},
		{name: "PrefNic of an unknown interface", method: "PUT", path: "/v1/nodes/hostA", body: `{"override_props":{"PrefNic":"none"}}`, status: 500, has: []int{213}},
		{name: "controller property", method: "POST", path: "/v1/controller/properties", body: `{"override_props":{"a":"b"}}`, status: 201, has: []int{3}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, tc.version)
			if err := l.sim.Spawn("xcp-sr-thin", "vol", gib).Err(); err != nil {
				t.Fatal(err)
			}
			// Replicas on A and B, tie-breaker on C: the lab's pools are equal, so names decide.
			if tc.prepare != nil {
				tc.prepare(l.sim)
			}
			status, rc := l.rc(tc.method, tc.path, tc.body)
			if status != tc.status {
				t.Errorf("status %d, want %d: %v", status, tc.status, rc)
			}
			for _, code := range tc.has {
				if !rc.Has(code) {
					t.Errorf("no code %d in %v", code, rc)
				}
			}
			for _, e := range rc {
				if e.Message == "" {
					t.Errorf("entry without message: %+v", e)
				}
			}
		})
	}
}

// TestReads validates every read against the OpenAPI document, in a cluster with all kinds of objects and states.
func TestReads(t *testing.T) {
	l := newLab(t, "")
	for _, v := range []string{"vol1", "vol2", "vol3"} {
		if err := l.sim.Spawn("xcp-sr-thin", v, gib).Err(); err != nil {
			t.Fatal(err)
		}
	}
	_ = l.sim.SetInUse("vol1", "hostA", true)
	l.sim.ToggleDiskful("vol1", "hostC", "thin", "")
	l.sim.CreateSnapshot("vol1", "snap", nil)
	l.sim.KVSet("xcp-sr-thin", "xcp/sr/metadata", "{}")
	l.sim.ModifyConnection("", "hostA", "hostB", linstorsim.PropsChange{Override: linstorsim.Props{"Paths/p/hostA": "default"}})
	l.sim.ModifyConnection("vol1", "hostA", "hostB", linstorsim.PropsChange{Override: linstorsim.Props{"Aux/x": "y"}})
	reads := []string{
		"/v1/controller/version", "/v1/controller/properties", "/v1/controller/config", "/v1/nodes", "/v1/nodes/hostA",
		"/v1/nodes?nodes=hosta&nodes=hostB", "/v1/nodes/hostA/net-interfaces", "/v1/nodes/hostA/net-interfaces/default",
		"/v1/view/storage-pools", "/v1/view/storage-pools?cached=true", "/v1/nodes/hostA/storage-pools", "/v1/nodes/hostA/storage-pools/thin",
		"/v1/storage-pool-definitions", "/v1/storage-pool-definitions/thin", "/v1/resource-groups", "/v1/resource-groups/xcp-sr-thin",
		"/v1/resource-groups/xcp-sr-thin/volume-groups", "/v1/resource-groups/xcp-sr-thin/volume-groups/0", "/v1/resource-groups/xcp-sr-thin/query-max-volume-size",
		"/v1/resource-definitions", "/v1/resource-definitions?with_volume_definitions=true&limit=2&offset=1", "/v1/resource-definitions/vol1",
		"/v1/resource-definitions/vol1/sync-status", "/v1/resource-definitions/vol1/volume-definitions", "/v1/resource-definitions/vol1/volume-definitions/0",
		"/v1/resource-definitions/vol1/resources", "/v1/resource-definitions/vol1/resources/hostA", "/v1/resource-definitions/vol1/resources/hostC/volumes",
		"/v1/resource-definitions/vol1/resources/hostC/volumes/0", "/v1/resource-definitions/vol1/resource-connections",
		"/v1/resource-definitions/vol1/resource-connections/hostA/hostB", "/v1/resource-definitions/vol1/snapshots", "/v1/resource-definitions/vol1/snapshots/snap",
		"/v1/view/resources", "/v1/view/resources?resources=vol1&nodes=hostC", "/v1/view/snapshots", "/v1/node-connections", "/v1/key-value-store",
		"/v1/key-value-store/XCP-SR-THIN", "/v1/error-reports", "/v1/physical-storage", "/v1/remotes", "/v1/stats/nodes", "/v1/stats/resources",
		"/v1/stats/storage-pools", "/v1/stats/resource-definitions", "/v1/stats/resource-groups", "/v1/stats/error-reports",
	}
	look := func() {
		for _, path := range reads {
			if status, body := l.call("GET", path, ""); status != 200 {
				t.Errorf("GET %s: %d %.200s", path, status, body)
			}
		}
		for path, body := range map[string]string{"/v1/resource-groups/xcp-sr-thin/query-size-info": `{}`,
			"/v1/queries/resource-groups/query-all-size-info": `{"select_filter":{"place_count":3}}`} {
			if status, out := l.call("POST", path, body); status != 200 {
				t.Errorf("POST %s: %d %s", path, status, out)
			}
		}
	}
	look()
	if status, out := l.call("OPTIONS", "/v1/query-max-volume-size", `{"place_count":2}`); status != 200 || !strings.Contains(out, "max_volume_size_kib") {
		t.Errorf("OPTIONS query-max-volume-size: %d %s", status, out)
	}
	l.sim.SetNode("hostB", linstorsim.StatusOffline)
	look()
	l.sim.SetHost("hostC", false)
	l.sim.Advance(time.Second)
	look()
	if status, body := l.call("GET", "/health", ""); status != 200 || body != "" {
		t.Errorf("health %d %q", status, body)
	}
	status, body := l.call("GET", "/metrics?error_reports=false", "")
	for _, want := range []string{`linstor_resource_state{node="hostA",name="vol1"} 1`, `linstor_resource_state{node="hostB",name="vol1"} -1`, `linstor_node_state{node="hostB",nodetype="COMBINED"} 0`} {
		if status != 200 || !strings.Contains(body, want) {
			t.Errorf("metrics %d lack %s", status, want)
		}
	}
}

// TestOfflineIsUnknown: with a satellite away its capacities, states and in_use are absent, not zero, and a report says why.
func TestOfflineIsUnknown(t *testing.T) {
	l := newLab(t, "")
	if err := l.sim.Spawn("xcp-sr-thin", "vol", gib).Err(); err != nil {
		t.Fatal(err)
	}
	l.sim.SetNode("hostA", linstorsim.StatusOffline)
	for _, query := range []string{"", "&cached=true"} {
		_, body := l.call("GET", "/v1/view/storage-pools?nodes=hostA&storage_pools=thin"+query, "")
		var pools []map[string]any
		if err := json.Unmarshal([]byte(body), &pools); err != nil || len(pools) != 1 {
			t.Fatalf("%v: %s", err, body)
		}
		if _, has := pools[0]["free_capacity"]; has || pools[0]["total_capacity"] != nil || pools[0]["reports"] == nil {
			t.Errorf("offline pool%s: %s", query, body)
		}
	}
	_, body := l.call("GET", "/v1/view/resources?nodes=hostA", "")
	var rs []map[string]any
	if err := json.Unmarshal([]byte(body), &rs); err != nil || len(rs) != 1 {
		t.Fatalf("%v: %s", err, body)
	}
	vol := rs[0]["volumes"].([]any)[0].(map[string]any)
	if rs[0]["state"] != nil || vol["state"] != nil || vol["allocated_size_kib"] == nil {
		t.Errorf("offline resource: %s", body)
	}
}

// TestTwoLevelsOfTruth: satellites know a thin pool's growth at once, the controller's cache only after its refresh.
func TestTwoLevelsOfTruth(t *testing.T) {
	l := newLab(t, "")
	if err := l.sim.Spawn("xcp-sr-thin", "vol", 10*gib).Err(); err != nil {
		t.Fatal(err)
	}
	free := func(query string) int64 {
		_, body := l.call("GET", "/v1/nodes/hostA/storage-pools/thin"+query, "")
		var p linstorsim.StoragePool
		if err := json.Unmarshal([]byte(body), &p); err != nil || p.FreeCapacity == nil {
			t.Fatalf("%v: %s", err, body)
		}
		return *p.FreeCapacity
	}
	before := free("?cached=true")
	if err := l.sim.Write("vol", 5*gib); err != nil {
		t.Fatal(err)
	}
	if got := free("?cached=true"); got != before {
		t.Errorf("the cache followed the write at once: %d -> %d", before, got)
	}
	l.sim.Advance(179 * time.Second)
	if got := free("?cached=true"); got != before {
		t.Errorf("the cache was refreshed before its time")
	}
	l.sim.Advance(time.Second)
	if got := free("?cached=true"); got != 95*gib {
		t.Errorf("after the refresh %d, want %d", got, 95*gib)
	}
	if err := l.sim.Write("vol", 6*gib); err != nil {
		t.Fatal(err)
	}
	if got := free(""); got != 94*gib {
		t.Errorf("uncached %d, want %d", got, 94*gib)
	}
	if got := free("?cached=true"); got != 94*gib {
		t.Errorf("an uncached read refreshes the cache too: %d", got)
	}
}

// answer is a response without its open body.
type answer struct {
	status   int
	location string
	body     []byte
}

func get(ctx context.Context, url string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	res, err := tr.RoundTrip(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header.Get("Location"), body}, err
}

// tcpLab serves a lab's face on a socket of the face's own.
func tcpLab(t *testing.T) (*lab, string) {
	l := newLab(t, "")
	addr, err := l.face.ServeTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.face.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, addr
}

func TestFaults(t *testing.T) {
	l, addr := tcpLab(t)
	ctx, url := t.Context(), "http://"+addr
	t.Run("html", func(t *testing.T) {
		defer l.face.Clear()
		l.face.Inject(Fault{Kind: HTML500, Times: 1})
		res, err := get(ctx, url+"/v1/nodes")
		if err != nil || res.status != http.StatusInternalServerError || !strings.HasPrefix(string(res.body), "<html>") {
			t.Errorf("%v %s", err, res.body)
		}
		if res, err := get(ctx, url+"/v1/nodes"); err != nil || res.status != http.StatusOK {
			t.Errorf("after once: %v", err)
		}
	})
	t.Run("redirect", func(t *testing.T) {
		defer l.face.Clear()
		l.face.Inject(Fault{Kind: Redirect, Location: "https://ctl:3371"})
		res, err := get(ctx, url+"/v1/nodes?nodes=a")
		if err != nil || res.status != http.StatusFound || res.location != "https://ctl:3371/v1/nodes?nodes=a" {
			t.Errorf("%v %v", err, res)
		}
	})
	t.Run("truncated", func(t *testing.T) {
		defer l.face.Clear()
		l.face.Inject(Fault{Kind: TruncatedJSON, Path: "/v1/nodes"})
		res, err := get(ctx, url+"/v1/nodes")
		if err != nil || json.Valid(res.body) || len(res.body) == 0 {
			t.Errorf("%v %s", err, res.body)
		}
	})
	t.Run("dies mid-body", func(t *testing.T) {
		defer l.face.Clear()
		l.face.Inject(Fault{Kind: DieMidBody})
		if res, err := get(ctx, url+"/v1/nodes"); err == nil {
			t.Errorf("got %d bytes without an error", len(res.body))
		}
	})
	t.Run("body lost but carried out", func(t *testing.T) {
		defer l.face.Clear()
		l.face.Inject(Fault{Kind: BodyLost, Times: 1})
		req, _ := http.NewRequestWithContext(ctx, http.MethodPut, url+"/v1/key-value-store/x", strings.NewReader(`{"override_props":{"k":"v"}}`))
		if res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req); err == nil {
			res.Body.Close()
			t.Error("got an answer")
		}
		if kv, ok := l.sim.KVGet("x"); !ok || kv.Props["k"] != "v" {
			t.Error("the change was not carried out")
		}
	})
	t.Run("slow", func(t *testing.T) {
		defer l.face.Clear()
		l.face.Inject(Fault{Kind: Slow, Delay: time.Hour})
		short, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := get(short, url+"/v1/nodes"); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
}

// refused waits until the port is closed, or open when want is false, and then dials it.
func (l *lab) refused(addr string, want bool) {
	l.Helper()
	if err := l.face.AwaitPort(l.Context(), addr, !want); err != nil {
		l.Fatal(err)
	}
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		conn.Close()
	}
	if (err != nil) != want {
		l.Fatalf("connection to %s: %v, want refused=%v", addr, err, want)
	}
}

func TestControllerDownUpMoved(t *testing.T) {
	l, addr := tcpLab(t)
	l.sim.SetController(linstorsim.Controller{Phase: linstorsim.Down})
	l.refused(addr, true)
	l.sim.SetController(linstorsim.Controller{Phase: linstorsim.Starting, Version: linstorsim.Version134})
	l.refused(addr, true)
	l.sim.SetController(linstorsim.Controller{})
	l.refused(addr, false)
	res, err := get(t.Context(), "http://"+addr+"/v1/controller/version")
	if err != nil || res.status != http.StatusOK || !strings.Contains(string(res.body), "1.34.0") {
		t.Fatalf("%v %s", err, res.body)
	}
	l.face.Inject(Fault{Kind: Down})
	l.refused(addr, true)
	l.face.Clear(Down)
	l.refused(addr, false)

	moved, err := l.face.Move(addr, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.refused(addr, true)
	if res, err := get(t.Context(), "http://"+moved+"/health"); err != nil || res.status != http.StatusOK {
		t.Errorf("moved: %v", err)
	}
}

// TestCloseLeavesNothing: no goroutine outlives Close, with a stream and an idle connection open.
func TestCloseLeavesNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	sim := linstorsim.New(linstorsim.Config{})
	sim.AddNode("hostA", "10.0.0.1")
	face := New(sim)
	addr, err := face.ServeTCP("[::1]:0")
	if err != nil {
		addr, err = face.ServeTCP("127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	for _, path := range []string{"/v1/nodes", "/v1/events/nodes"} {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+path, nil)
		res, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
	}
	if err := face.Close(); err != nil {
		t.Error(err)
	}
	if err := face.StopTCP(addr); err == nil {
		t.Error("stopped an address twice")
	}
}

// TestHungSatellite: a satellite that is connected but does not answer blocks what asks it, and nothing else.
func TestHungSatellite(t *testing.T) {
	l, addr := tcpLab(t)
	l.sim.SetHung("hostB", true)
	base := "http://" + addr
	for _, path := range []string{"/v1/nodes", "/v1/view/storage-pools?cached=true", "/v1/resource-definitions", "/v1/view/resources?nodes=hostA"} {
		if res, err := get(t.Context(), base+path); err != nil || res.status != http.StatusOK {
			t.Errorf("%s needs no answer of hostB: %v", path, err)
		}
	}
	for _, path := range []string{"/v1/view/resources", "/v1/view/storage-pools", "/v1/nodes/hostB/storage-pools/thin"} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := get(ctx, base+path); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s answered although hostB hangs: %v", path, err)
		}
		cancel()
	}
	done := make(chan error, 1)
	go func() {
		_, err := get(t.Context(), base+"/v1/view/resources")
		done <- err
	}()
	l.sim.SetHung("hostB", false)
	if err := <-done; err != nil {
		t.Errorf("after it woke up: %v", err)
	}
}

// stream opens an event stream and returns a reader of "event data" lines.
func (l *lab) stream(path, lastID string) func() string {
	l.Helper()
	req, err := http.NewRequestWithContext(l.Context(), http.MethodGet, l.url+path, nil)
	if err != nil {
		l.Fatal(err)
	}
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		l.Fatal(err)
	}
	if ct := res.Header.Get("Content-Type"); ct != "text/event-stream" {
		l.Fatalf("content type %s", ct)
	}
	l.Cleanup(func() { res.Body.Close() })
	lines := bufio.NewScanner(res.Body)
	return func() string {
		var name string
		for lines.Scan() {
			switch text := lines.Text(); {
			case strings.HasPrefix(text, "event: "):
				name = strings.TrimPrefix(text, "event: ")
			case strings.HasPrefix(text, "data: "):
				return name + " " + strings.TrimPrefix(text, "data: ")
			}
		}
		return "EOF"
	}
}

func TestEventStreams(t *testing.T) {
	l := newLab(t, "")
	if err := l.sim.Spawn("xcp-sr-thin", "vol", gib).Err(); err != nil {
		t.Fatal(err)
	}
	first := l.stream("/v1/events/drbd/promotion", "")
	if err := l.sim.SetInUse("vol", "hostA", true); err != nil {
		t.Fatal(err)
	}
	var got []string
	for range 3 {
		got = append(got, first())
	}
	slices.Sort(got)
	want := []string{
		`may-promote-change {"resource_name":"vol","node_name":"hostA","may_promote":false}`,
		`may-promote-change {"resource_name":"vol","node_name":"hostB","may_promote":false}`,
		`may-promote-change {"resource_name":"vol","node_name":"hostC","may_promote":false}`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	// A second subscriber asks for the present state: the first one hears it as well.
	second := l.stream("/v1/events/drbd/promotion", "current")
	for range 3 {
		if a, b := first(), second(); a != b || !strings.Contains(a, "may_promote\":false") {
			t.Errorf("broadcast: %s, %s", a, b)
		}
	}
	// A lost satellite's resources become unknown.
	l.sim.SetNode("hostB", linstorsim.StatusOffline)
	if e := first(); e != `may-promote-change {"resource_name":"vol","node_name":"hostB"}` {
		t.Errorf("lost satellite: %s", e)
	}

	nodes := l.stream("/v1/events/nodes", "current")
	l.sim.ModifyNode("hostA", "", linstorsim.PropsChange{Override: linstorsim.Props{"Aux/x": "y"}})
	l.sim.Evict("hostB")
	l.sim.Restore("hostB")
	for _, prefix := range []string{`node-modified {"old_node":{"name":"hostA"`, `node-evicted {"node":{"name":"hostB"`, `node-restored {"node":{"name":"hostB"`} {
		if e := nodes(); !strings.HasPrefix(e, prefix) {
			t.Errorf("got %.80s, want %s", e, prefix)
		}
	}
	l.face.CutStreams()
	if e := nodes(); e != "EOF" {
		t.Errorf("after the cut: %s", e)
	}
}

func TestEventFaults(t *testing.T) {
	l := newLab(t, "")
	l.face.Inject(Fault{Kind: SSEDuplicate})
	nodes := l.stream("/v1/events/nodes", "")
	l.sim.ModifyNode("hostA", "", linstorsim.PropsChange{})
	if a, b := nodes(), nodes(); a != b || a == "EOF" {
		t.Errorf("not doubled: %s %s", a, b)
	}
	l.face.Clear()
	l.face.Inject(Fault{Kind: SSECut, Times: 1})
	cut := l.stream("/v1/events/nodes", "")
	l.sim.ModifyNode("hostA", "", linstorsim.PropsChange{})
	if e := cut(); e == "EOF" {
		t.Error("cut before the first event")
	}
	if e := cut(); e != "EOF" {
		t.Errorf("not cut: %s", e)
	}
	down := l.stream("/v1/events/nodes", "")
	l.sim.SetController(linstorsim.Controller{Phase: linstorsim.Down})
	if e := down(); e != "EOF" {
		t.Errorf("stream outlived the controller: %s", e)
	}
}

func TestGzipAndRecord(t *testing.T) {
	l := newLab(t, "")
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, l.url+"/v1/nodes", nil)
	req.Header.Set("Accept-Encoding", "gzip")
	req.Header.Set("User-Agent", "xostor-test")
	l.face.ResetCalls()
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	z, err := gzip.NewReader(res.Body)
	if res.Header.Get("Content-Encoding") != "gzip" || err != nil {
		t.Fatalf("not compressed: %v %v", res.Header, err)
	}
	if body, err := io.ReadAll(z); err != nil || !json.Valid(body) {
		t.Error("bad content")
	}
	l.call("GET", "/v1/view/resources", "")
	l.call("GET", "/v1/view/storage-pools", "")
	l.call("GET", "/v1/view/storage-pools?cached=true", "")
	calls := l.face.Calls()
	if len(calls) != 4 || calls[0].UserAgent != "xostor-test" || calls[0].Status != 200 || l.face.Total(Sat) != 2 || l.face.Total(Mem) != 2 {
		t.Errorf("record %+v", calls)
	}
}

func TestParseFault(t *testing.T) {
	for in, want := range map[string]Fault{"slow=200ms": {Kind: Slow, Delay: 200 * time.Millisecond}, "down": {Kind: Down},
		"sse-cut=3": {Kind: SSECut, Times: 3}, "redirect=https://x:3371": {Kind: Redirect, Location: "https://x:3371"}} {
		if got, err := ParseFault(in); err != nil || got != want {
			t.Errorf("%s: %+v %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "nope", "slow=x", "down=1", "sse-cut=x"} {
		if _, err := ParseFault(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// FuzzBody sends arbitrary bodies to every kind of mutation: the answer is always JSON, never a crash.
func FuzzBody(f *testing.F) {
	paths := []string{"POST /v1/nodes", "PUT /v1/nodes/hostA", "POST /v1/nodes/hostA/net-interfaces", "POST /v1/nodes/hostA/storage-pools",
		"POST /v1/resource-groups", "PUT /v1/resource-groups/g1", "POST /v1/resource-groups/g1/spawn", "POST /v1/resource-groups/g1/volume-groups",
		"POST /v1/resource-definitions", "PUT /v1/resource-definitions/vol", "POST /v1/resource-definitions/vol/volume-definitions",
		"PUT /v1/resource-definitions/vol/volume-definitions/0", "POST /v1/resource-definitions/vol/resources",
		"POST /v1/resource-definitions/vol/resources/hostB", "POST /v1/resource-definitions/vol/autoplace",
		"POST /v1/resource-definitions/vol/resources/hostB/make-available", "PUT /v1/key-value-store/kv",
		"POST /v1/resource-groups/g1/query-size-info", "OPTIONS /v1/query-max-volume-size", "POST /v1/resource-definitions/vol/snapshots"}
	for i, body := range []string{`{}`, `[]`, `{"override_props":{"a":"b"}}`, `{"name":"hostX","type":"SATELLITE","net_interfaces":[{"name":"default","address":"10.0.0.1","satellite_port":3366}]}`,
		`{"resource_definition":{"name":"x1"}}`, `{"volume_definition":{"size_kib":-5,"volume_number":99999}}`, `[{"resource":{"node_name":"hostB"}}]`,
		`{"select_filter":{"place_count":-1,"not_place_with_rsc_regex":"("}}`, "{\"name\":\"\xff\"}", `{"size_kib":9223372036854775807}`, `{"volume_sizes":[1,2,3],"partial":true,"resource_definition_name":"ab"}`} {
		for j := range paths {
			f.Add(uint8(i+j), body)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, body string) {
		sim := linstorsim.New(linstorsim.Config{})
		for _, n := range []string{"hostA", "hostB"} {
			sim.AddNode(n, "10.0.0.1")
			sim.AddPool(n, "p1", "LVM_THIN", gib)
		}
		sim.CreateGroup("g1", "p1", 1)
		sim.Spawn("g1", "vol", 8192)
		h := New(sim).Handler()
		method, path, _ := strings.Cut(paths[int(which)%len(paths)], " ")
		for _, call := range [][3]string{{method, path, body}, {"GET", "/v1/view/resources", ""}} {
			req, err := http.NewRequestWithContext(t.Context(), call[0], call[1], strings.NewReader(call[2]))
			if err != nil {
				t.Fatal(err)
			}
			rec := &recorder{header: http.Header{}}
			h.ServeHTTP(rec, req)
			if !json.Valid(rec.body.Bytes()) {
				t.Errorf("%s %s: answer is not JSON: %q", call[0], call[1], rec.body.Bytes())
			}
		}
	})
}

type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
func (r *recorder) WriteHeader(int)             {}

// big is the largest pool that the project speaks of: 64 nodes with 6,000 resources of three places.
func big(tb testing.TB) *linstorsim.Cluster {
	tb.Helper()
	sim := linstorsim.New(linstorsim.Config{})
	for i := range 64 {
		name := "host" + string([]byte{byte('a' + i/26), byte('a' + i%26)})
		sim.AddNode(name, "10.0.0.1")
		sim.AddPool(name, "thin", "LVM_THIN", 2000*gib)
	}
	sim.CreateGroup("xcp-sr-thin", "thin", 2)
	for i := range 6000 {
		name := "xcp-volume-" + strings.Repeat("0", 32) + string([]byte{byte('a' + i/676), byte('a' + i/26%26), byte('a' + i%26)})
		if err := sim.Spawn("xcp-sr-thin", name, gib).Err(); err != nil {
			tb.Fatal(err)
		}
	}
	return sim
}

func BenchmarkView(b *testing.B) {
	sim := big(b)
	h := New(sim).Handler()
	run := func(path string, gz bool) func(*testing.B) {
		return func(b *testing.B) {
			req, _ := http.NewRequestWithContext(b.Context(), http.MethodGet, path, nil)
			if gz {
				req.Header.Set("Accept-Encoding", "gzip")
			}
			for b.Loop() {
				rec := &recorder{header: http.Header{}}
				h.ServeHTTP(rec, req)
				b.SetBytes(int64(rec.body.Len()))
			}
		}
	}
	// What one SR of a thousand volumes is asked for: 3,000 places.
	var first1000 strings.Builder
	for i, rd := range sim.Definitions(nil, nil, false)[:1000] {
		first1000.WriteString(map[bool]string{true: "?", false: "&"}[i == 0] + "resources=" + rd.Name)
	}
	b.Run("all-18000", run("/v1/view/resources", false))
	b.Run("first-3000", run("/v1/view/resources"+first1000.String(), false))
	b.Run("first-3000-gzip", run("/v1/view/resources"+first1000.String(), true))
	b.Run("one", run("/v1/view/resources?resources=xcp-volume-00000000000000000000000000000000aaa", false))
	b.Run("definitions", run("/v1/resource-definitions?with_volume_definitions=true", false))
	b.Run("pools-cached", run("/v1/view/storage-pools?cached=true", false))
}
