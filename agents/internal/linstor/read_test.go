package linstor_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

func TestStoragePools_UnknownIsNotZero(t *testing.T) {
	c, s := single(t, map[string]http.HandlerFunc{"GET /v1/view/storage-pools": answer(200, `[
		{"storage_pool_name":"p","node_name":"full","provider_kind":"LVM_THIN","free_capacity":0,"total_capacity":1048576,
		 "free_space_mgr_name":"full;p","uuid":"u","supports_snapshots":true,"props":{"StorDriver/LvmVg":"vg"},"unknown_field":{"a":[1]}},
		{"storage_pool_name":"p","node_name":"offline","provider_kind":"LVM_THIN",
		 "reports":[{"ret_code":-9223372036854774806,"message":"No active connection to satellite 'offline'"}]},
		{"storage_pool_name":"p","node_name":"null","provider_kind":"LVM","free_capacity":null,"total_capacity":null},
		{"storage_pool_name":"DfltDisklessStorPool","node_name":"full","provider_kind":"DISKLESS",
		 "free_capacity":9223372036854775807,"total_capacity":9223372036854775807},
		{"storage_pool_name":"odd","node_name":"full","provider_kind":"EBS_TARGET",
		 "free_capacity":9223372036854775807,"total_capacity":5}
	]`)})
	pools, err := c.StoragePools(t.Context(), linstor.PoolQuery{Cached: true, Nodes: []string{"a", "b"}, Pools: []string{"p"}})
	if err != nil || len(pools) != 5 {
		t.Fatalf("got %v, %v", pools, err)
	}
	zero, mib, five := int64(0), int64(1048576), int64(5)
	for i, want := range []struct {
		free, total *int64
		diskless    bool
	}{{&zero, &mib, false}, {}, {}, {diskless: true}, {nil, &five, false}} {
		p := pools[i]
		if !cmp.Equal(p.FreeKiB, want.free) || !cmp.Equal(p.TotalKiB, want.total) || p.Diskless != want.diskless {
			t.Errorf("pool %d: %+v", i, p)
		}
	}
	if r := pools[1].Reports; len(r) != 1 || !r[0].IsWarning() || r[0].Code().Number() != 1002 {
		t.Errorf("reports are lost: %+v", r)
	}
	if got := s.seen()[0].URI; got != "/v1/view/storage-pools?cached=true&nodes=a&nodes=b&storage_pools=p" {
		t.Errorf("asked %s", got)
	}
}

const view = `[
 {"name":"vol","node_name":"n1","uuid":"u1","flags":["STLT"],"props":{"StorPoolName":"p"},"create_timestamp":1700000000000,
  "layer_object":{"type":"LUKS","children":[{"type":"DRBD","children":[{"type":"STORAGE"}],"drbd":{
    "node_id":0,"peer_slots":3,"tcp_ports":[7000],"promotion_score":10101,"may_promote":false,
    "connections":{"n2":{"connected":true,"message":"Connected"},"n3":{"connected":false,"message":"StandAlone"},"n4":{}},
    "drbd_volumes":[{"drbd_volume_definition":{"volume_number":1},"usable_size_kib":4},
                    {"drbd_volume_definition":{"volume_number":0},"usable_size_kib":1024}]}}]},
  "state":{"in_use":true},
  "volumes":[{"volume_number":0,"storage_pool_name":"p","provider_kind":"LVM_THIN","device_path":"/dev/drbd1000",
    "allocated_size_kib":512,"flags":["RESIZE"],"reports":[{"ret_code":1,"message":"x"}],
    "state":{"disk_state":"SyncTarget(12,50%)","replication_states":{"n2":{"replication_state":"SyncTarget","done_percentage":12.5}}}}]},
 {"name":"vol","node_name":"n2","flags":["DISKLESS","DRBD_DISKLESS","TIE_BREAKER"],
  "layer_object":{"type":"DRBD","drbd":{}},"state":{"in_use":false},
  "volumes":[{"volume_number":0,"storage_pool_name":"DfltDisklessStorPool","provider_kind":"DISKLESS","allocated_size_kib":0,
    "usable_size_kib":2048,"state":{"disk_state":"Diskless"}}]},
 {"name":"vol","node_name":"n3","state":null,"volumes":[{"volume_number":0,"storage_pool_name":"p","allocated_size_kib":-1},
    {"volume_number":1,"storage_pool_name":"p","allocated_size_kib":null,"state":null}]},
 {"name":"bare","node_name":"n3","state":{},"volumes":null,"flags":null,"something_new":[{"deep":{"er":1}}]}
]`

func TestResourceView_KeepsWhatIsKnownAndNoMore(t *testing.T) {
	c, s := single(t, map[string]http.HandlerFunc{"GET /v1/view/resources": answer(200, view)})
	got, err := c.ResourceView(t.Context(), linstor.ViewQuery{Resources: []string{"vol", "bare"}, Pools: []string{"p"}})
	if err != nil {
		t.Fatal(err)
	}
	want := []linstor.Resource{
		{
			Name: "vol", Node: "n1", UUID: "u1", Flags: []string{"STLT"}, InUse: ptr(true),
			Props: map[string]string{"StorPoolName": "p"}, CreatedMs: 1700000000000,
			DRBD: &linstor.DRBD{
				NodeID: ptr(int32(0)), PeerSlots: ptr(int32(3)), Ports: []int32{7000}, PromotionScore: ptr(int32(10101)), MayPromote: ptr(false),
				Connections: map[string]linstor.Connection{
					"n2": {Connected: ptr(true), Message: "Connected"}, "n3": {Connected: ptr(false), Message: "StandAlone"}, "n4": {},
				},
			},
			Volumes: []linstor.Volume{{
				Pool: "p", Provider: "LVM_THIN", AllocatedKiB: ptr(int64(512)), UsableKiB: ptr(int64(1024)), DevicePath: "/dev/drbd1000",
				Flags: []string{"RESIZE"}, DiskState: "SyncTarget(12,50%)", Reports: []linstor.Entry{{RetCode: 1, Message: "x"}},
				Replication: map[string]linstor.Replication{"n2": {State: "SyncTarget", DonePercent: ptr(12.5)}},
			}},
		},
		{
			Name: "vol", Node: "n2", Flags: []string{"DISKLESS", "DRBD_DISKLESS", "TIE_BREAKER"}, InUse: ptr(false), DRBD: &linstor.DRBD{},
			Volumes: []linstor.Volume{{
				Pool: "DfltDisklessStorPool", Provider: "DISKLESS", AllocatedKiB: ptr(int64(0)), UsableKiB: ptr(int64(2048)), DiskState: "Diskless",
			}},
		},
		{
			Name: "vol", Node: "n3", // Satellite not connected: nothing is known, and -1 stays -1.
			Volumes: []linstor.Volume{{Pool: "p", AllocatedKiB: ptr(int64(-1))}, {Number: 1, Pool: "p"}},
		},
		{Name: "bare", Node: "n3"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if !got[1].Diskless() || !got[1].HasFlag(linstor.FlagTieBreaker) || got[0].Diskless() || got[0].Toggling() {
		t.Error("flags are misread")
	}
	if uri := s.seen()[0].URI; uri != "/v1/view/resources?resources=vol&resources=bare&storage_pools=p" {
		t.Errorf("asked %s", uri)
	}
}

func ptr[T any](v T) *T { return &v }

func TestResources_OfADefinition(t *testing.T) {
	c, s := single(t, map[string]http.HandlerFunc{
		"GET /v1/resource-definitions/{rd}/resources": answer(200, `[{"name":"a b","node_name":"n","flags":["DISK_ADDING","DRBD_DISKLESS"],"state":{"in_use":false}}]`),
	})
	got, err := c.Resources(t.Context(), "a b/ü")
	if err != nil || len(got) != 1 || got[0].Volumes != nil || !got[0].Toggling() || *got[0].InUse {
		t.Fatalf("got %+v, %v", got, err)
	}
	if uri := s.seen()[0].URI; uri != "/v1/resource-definitions/a%20b%2F%C3%BC/resources" {
		t.Errorf("asked %s", uri)
	}
}

func TestReads_Shapes(t *testing.T) {
	c, _ := single(t, map[string]http.HandlerFunc{
		"GET /v1/nodes": answer(200, `[
			{"name":"n1","type":"COMBINED","connection_status":"ONLINE","net_interfaces":[{"name":"default","address":"10.0.0.1",
			 "satellite_port":3366,"satellite_encryption_type":"PLAIN","is_active":true,"uuid":"x"},{"name":"storage","address":"10.1.0.1"}]},
			{"name":"n2","type":"SATELLITE","connection_status":"MISSING_EXT_TOOLS","flags":["EVICTED","DELETE"],"eviction_timestamp":5},
			{"name":"n3"}]`),
		"GET /v1/resource-definitions": answer(200, `[{"name":"r","resource_group_name":"g","flags":["DELETE"],"props":{"a":"b"},
			"volume_definitions":[{"volume_number":0,"size_kib":1048576,"flags":["GROSS_SIZE"]}]}]`),
		"GET /v1/resource-groups":                            answer(200, `[{"name":"g","select_filter":{"place_count":2,"storage_pool_list":["p"]}},{"name":"h"}]`),
		"GET /v1/resource-groups/g":                          answer(200, `{"name":"g","select_filter":{"place_count":2}}`),
		"GET /v1/stats/resources":                            answer(200, `{"count":7}`),
		"GET /v1/stats/nodes":                                answer(200, `{}`),
		"GET /v1/resource-definitions/r/sync-status":         answer(200, `{"synced_on_all":true}`),
		"GET /v1/resource-definitions/old/sync-status":       answer(200, `{}`),
		"GET /v1/controller/properties":                      answer(200, `{"DrbdOptions/auto-diskful":"5"}`),
		"GET /v1/resource-groups/g/query-max-volume-size":    answer(200, `{"candidates":[{"storage_pool":"p","max_volume_size_kib":9,"node_names":["a","b"],"all_thin":true}],"default_max_oversubscription_ratio":20.0}`),
		"GET /v1/resource-groups/none/query-max-volume-size": answer(200, `{}`),
	})
	ctx := t.Context()
	nodes, err := c.Nodes(ctx)
	if err != nil || len(nodes) != 3 || !nodes[0].Online() || nodes[1].Online() || nodes[2].Online() || !nodes[1].HasFlag("EVICTED") ||
		*nodes[1].EvictionMs != 5 || nodes[0].NetInterfaces[1].Active != nil || *nodes[0].NetInterfaces[0].SatellitePort != 3366 {
		t.Errorf("nodes: %+v, %v", nodes, err)
	}
	defs, err := c.Definitions(ctx, true)
	if err != nil || len(defs) != 1 || defs[0].Volumes[0].SizeKiB != 1048576 || !defs[0].HasFlag("DELETE") || defs[0].Group != "g" {
		t.Errorf("definitions: %+v, %v", defs, err)
	}
	groups, err := c.Groups(ctx)
	if err != nil || *groups[0].SelectFilter.PlaceCount != 2 || groups[1].SelectFilter.PlaceCount != nil {
		t.Errorf("groups: %+v, %v", groups, err)
	}
	if g, err := c.Group(ctx, "g"); err != nil || *g.SelectFilter.PlaceCount != 2 {
		t.Errorf("group: %+v, %v", g, err)
	}
	if n, err := c.Stats(ctx, linstor.StatResources); n != 7 || err != nil {
		t.Errorf("stats: %d, %v", n, err)
	}
	if _, err := c.Stats(ctx, linstor.StatNodes); !errors.Is(err, linstor.ErrMalformed) {
		t.Errorf("stats without count: %v", err)
	}
	if ok, err := c.SyncStatus(ctx, "r"); !ok || err != nil {
		t.Errorf("sync status: %v, %v", ok, err)
	}
	if _, err := c.SyncStatus(ctx, "old"); !errors.Is(err, linstor.ErrMalformed) {
		t.Errorf("sync status that says nothing: %v", err)
	}
	if p, err := c.ControllerProperties(ctx); p["DrbdOptions/auto-diskful"] != "5" || err != nil {
		t.Errorf("properties: %v, %v", p, err)
	}
	if cs, err := c.QueryMaxVolumeSize(ctx, "g"); len(cs) != 1 || cs[0].MaxVolumeSizeKiB != 9 || !cs[0].AllThin || err != nil {
		t.Errorf("max volume size: %+v, %v", cs, err)
	}
	if cs, err := c.QueryMaxVolumeSize(ctx, "none"); len(cs) != 0 || err != nil {
		t.Errorf("max volume size without candidates: %+v, %v", cs, err)
	}
}

func TestQuerySizeInfo_ErrorsComeWith200(t *testing.T) {
	c, s := single(t, map[string]http.HandlerFunc{
		"POST /v1/resource-groups/g/query-size-info": answer(200, `{"space_info":{"max_vlm_size_in_kib":10,"available_size_in_kib":0},
			"reports":[{"ret_code":-9223372036854774806,"message":"n3 offline"}]}`),
		"POST /v1/resource-groups/bad/query-size-info": answer(200, `{"reports":[{"ret_code":-4611686018427386907,"message":"no such group"}]}`),
	})
	info, err := c.QuerySizeInfo(t.Context(), "g")
	if err != nil || *info.MaxVolumeSizeKiB != 10 || *info.AvailableKiB != 0 || info.CapacityKiB != nil || len(info.Reports) != 1 {
		t.Errorf("got %+v, %v", info, err)
	}
	_, err = c.QuerySizeInfo(t.Context(), "bad")
	var api *linstor.APIError
	if !errors.As(err, &api) || !strings.Contains(err.Error(), "no such group") {
		t.Errorf("got %v", err)
	}
	if s.seen()[0].Body != "{}" {
		t.Errorf("sent %q", s.seen()[0].Body)
	}
}

func TestKV(t *testing.T) {
	notFound := answer(404, `[{"ret_code":-4611686018427387588,"message":"KeyValueStore 'none' not found"}]`)
	c, _ := single(t, map[string]http.HandlerFunc{
		"GET /v1/key-value-store/sr":    answer(200, `[{"name":"sr","props":{"xcp/sr/metadata":"{}"}}]`),
		"GET /v1/key-value-store/empty": answer(200, `[{"name":"empty"}]`),
		"GET /v1/key-value-store/none":  notFound,
		"GET /v1/key-value-store/list":  answer(200, `[]`),
		"GET /v1/key-value-store/two":   answer(200, `[{"name":"a"},{"name":"b"}]`),
		"GET /v1/key-value-store/proxy": func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) },
		"GET /v1/key-value-store/path":  answer(404, `[{"ret_code":-4611686018427386905,"message":"Path not found"}]`),
	})
	ctx := t.Context()
	if kv, err := c.KV(ctx, "sr"); err != nil || kv["xcp/sr/metadata"] != "{}" {
		t.Errorf("sr: %v, %v", kv, err)
	}
	if kv, err := c.KV(ctx, "empty"); err != nil || kv == nil || len(kv) != 0 {
		t.Errorf("empty: %v, %v", kv, err)
	}
	for instance, want := range map[string]error{"none": linstor.ErrNotFound, "list": linstor.ErrNotFound, "two": linstor.ErrMalformed} {
		if kv, err := c.KV(ctx, instance); kv != nil || !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", instance, kv, err)
		}
	}
	// A 404 that LINSTOR did not give for the object says nothing about the object.
	for _, instance := range []string{"proxy", "path"} {
		if _, err := c.KV(ctx, instance); err == nil || errors.Is(err, linstor.ErrNotFound) {
			t.Errorf("%s: %v", instance, err)
		}
	}
	if _, err := c.KV(ctx, "none"); !errors.Is(err, linstor.FailNotFoundKV) {
		t.Errorf("none: %v", err)
	}
}

func TestReads_BrokenAnswers(t *testing.T) {
	for name, tc := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"truncated JSON":   {answer(200, `[{"name":"n1"},{"na`), "unexpected EOF"},
		"nothing":          {answer(200, ``), "EOF"},
		"object, no list":  {answer(200, `{"name":"n1"}`), "cannot unmarshal object"},
		"text after it":    {answer(200, `[] x`), "text after the JSON value"},
		"two values":       {answer(200, `[]`+strings.Repeat(" ", 5000)+`[]`), "text after the JSON value"},
		"wrong type":       {answer(200, `[{"name":5}]`), "cannot unmarshal number"},
		"HTML":             {answer(200, `<html>`), "invalid character"},
		"HTML 500":         {answer(500, "<html>\n<head><title>Grizzly</title></head>\n"+strings.Repeat("<p>trace</p>\n", 5000)), "answered 500, not a linstor answer"},
		"plain 502":        {answer(502, "Bad Gateway"), `"Bad Gateway"`},
		"500 without body": {answer(500, ""), "answered 500"},
		"500 JSON":         {answer(500, `[{"ret_code":-4611686018427386905,"message":"An\nerror","correction":"Do this"}]`), "An error (error 999); Do this"},
		"500 one object":   {answer(500, `{"ret_code":-4611686018427386905,"message":"boom"}`), "boom"},
		"invalid UTF-8":    {answer(500, "\xff\xfe\xfd"), "answered 500"},
	} {
		t.Run(name, func(t *testing.T) {
			c, s := single(t, map[string]http.HandlerFunc{"GET /v1/nodes": tc.answer})
			nodes, err := c.Nodes(t.Context())
			if nodes != nil || err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, %v; want %q", nodes, err, tc.want)
			}
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 400 {
				t.Errorf("not one clear line: %v", err)
			}
			if len(s.seen()) != 1 {
				t.Errorf("asked %d times: a bad answer is no reason to ask again", len(s.seen()))
			}
		})
	}
}

func TestResourceView_BrokenAnswers(t *testing.T) {
	for name, body := range map[string]string{
		"truncated in an element": `[{"name":"a"},{"na`, "truncated after one": `[{"name":"a"}`, "object": `{"a":1}`, "nothing": ``,
		"text after": `[{"name":"a"}]]`, "null": `null`,
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := single(t, map[string]http.HandlerFunc{"GET /v1/view/resources": answer(200, body)})
			if rs, err := c.ResourceView(t.Context(), linstor.ViewQuery{}); rs != nil || !errors.Is(err, linstor.ErrMalformed) {
				t.Errorf("got %v, %v", rs, err)
			}
		})
	}
}

func TestReads_SizeLimit(t *testing.T) {
	body := `[{"name":"` + strings.Repeat("n", 1000) + `"}]`
	for name, tc := range map[string]struct {
		limit  int
		tooBig bool
	}{
		"exact":                {limit: len(body)},
		"one short":            {limit: len(body) - 1, tooBig: true},
		"far too big":          {limit: 1, tooBig: true},
		"space past the limit": {limit: len(body) + 10},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(map[string]http.HandlerFunc{"GET /v1/nodes": func(w http.ResponseWriter, r *http.Request) {
				if e := r.Header.Get("Accept-Encoding"); e != "" {
					t.Errorf("asked for encoding %q: compressing costs the controller more than the pool's network does", e)
				}
				_, _ = io.WriteString(w, body)
			}})
			c := newClient(t, linstor.Options{Controllers: []string{s.listen(t).URL}, MaxResponseBytes: int64(tc.limit)})
			nodes, err := c.Nodes(t.Context())
			if tc.tooBig != errors.Is(err, linstor.ErrTooLarge) || tc.tooBig != (nodes == nil) {
				t.Errorf("got %d nodes, %v", len(nodes), err)
			}
		})
	}
}

func TestVolume_SyncPercent(t *testing.T) {
	for state, want := range map[string]struct {
		percent float64
		ok      bool
	}{
		"SyncTarget(12.34%)": {12.34, true}, "SyncTarget(12,34%)": {12.34, true}, "SyncTarget(0.00%)": {0, true},
		"SyncTarget(100.00%)": {100, true}, "UpToDate": {}, "Inconsistent": {}, "": {}, "SyncTarget(": {}, "SyncTarget()": {},
		"SyncTarget(%)": {}, "SyncTarget(NaN%)": {}, "SyncTarget(-1%)": {}, "SyncTarget(101%)": {}, "SyncTarget(1.234,5%)": {},
		"PausedSyncT(5%)": {},
	} {
		v := linstor.Volume{DiskState: state}
		if p, ok := v.SyncPercent(); p != want.percent || ok != want.ok {
			t.Errorf("%q: got %v, %v", state, p, ok)
		}
	}
}
