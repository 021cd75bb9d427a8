package linstor_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"strconv"
	"testing"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

// bigView is what /v1/view/resources of 1000 volumes with two replicas and a diskless attachment each looks like, at
// the size of real elements (about 1.7 KB).
func bigView(resources int) []byte {
	var b bytes.Buffer
	b.WriteByte('[')
	for i := range resources {
		if i > 0 {
			b.WriteByte(',')
		}
		volume, node := i/3, i%3
		name, host := fmt.Sprintf("xcp-volume-%08x-aaaa-bbbb-cccc-%012x", volume, volume), fmt.Sprintf("xcp-host-%d", (volume+node)%6)
		flags, provider, pool, state, allocated := `[]`, "LVM_THIN", "xcp-sr-linstor_group_thin_device", "UpToDate", 1048576+volume
		if node == 2 {
			flags, provider, pool, state, allocated = `["DISKLESS","DRBD_DISKLESS"]`, "DISKLESS", "DfltDisklessStorPool", "Diskless", 0
		}
		fmt.Fprintf(&b, `{"name":%q,"node_name":%q,"props":{"StorPoolName":%q},"flags":%s,
"layer_object":{"children":[{"type":"STORAGE","storage":{"storage_volumes":[{"volume_number":0,"device_path":"/dev/linstor_group/%s_00000","allocated_size_kib":%d,"usable_size_kib":1052672,"disk_state":"[]"}]}}],
"type":"DRBD","drbd":{"drbd_resource_definition":{"peer_slots":3,"al_stripes":1,"al_stripe_size_kib":32,"port":%d,"transport_type":"IP","secret":"aBcDeFgHiJkLmNoPqRsT","down":false},
"node_id":%d,"peer_slots":3,"al_stripes":1,"al_size":32,"drbd_volumes":[{"drbd_volume_definition":{"volume_number":0,"minor_number":%d},"device_path":"/dev/drbd%d","backing_device":"/dev/linstor_group/%s_00000","allocated_size_kib":%d,"usable_size_kib":1048576}],
"connections":{"xcp-host-a":{"connected":true,"message":"Connected"},"xcp-host-b":{"connected":true,"message":"Connected"}},"promotion_score":10103,"may_promote":false}},
"state":{"in_use":%v},"uuid":"%08x-1111-2222-3333-444444444444","create_timestamp":1700000000000,
"volumes":[{"volume_number":0,"storage_pool_name":%q,"provider_kind":%q,"device_path":"/dev/drbd%d","allocated_size_kib":%d,
"state":{"disk_state":%q,"replication_states":{"xcp-host-a":{"replication_state":"Established","done_percentage":100.0}}},
"layer_data_list":[{"type":"DRBD","data":{"drbd_volume_definition":{"volume_number":0,"minor_number":%d},"device_path":"/dev/drbd%d","allocated_size_kib":%d,"usable_size_kib":1048576}}],
"uuid":"%08x-5555-6666-7777-888888888888"}],"shared_name":"%s"}`,
			name, host, pool, flags, name, allocated, 7000+volume, node, 1000+volume, 1000+volume, name, allocated, node == 0, i,
			pool, provider, 1000+volume, allocated, state, 1000+volume, 1000+volume, allocated, i, strconv.Itoa(i))
	}
	b.WriteByte(']')
	return b.Bytes()
}

// BenchmarkResourceView is the full view over loopback: the controller's bytes to our values. "kept" is what stays on
// the heap afterwards.
func BenchmarkResourceView(b *testing.B) {
	body := bigView(3000)
	if !json.Valid(body) {
		b.Fatal("the view is no JSON")
	}
	s := newServer(map[string]http.HandlerFunc{"GET /v1/view/resources": func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(body)
	}})
	h := s.listen(b).URL
	c, err := linstor.New(linstor.Options{Controllers: []string{h}})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var list []linstor.Resource
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	before := heap()
	for b.Loop() {
		if list, err = c.ResourceView(b.Context(), linstor.ViewQuery{}); err != nil || len(list) != 3000 {
			b.Fatal(len(list), err)
		}
	}
	b.ReportMetric(float64(heap()-before)/1e6, "kept-MB")
	b.ReportMetric(float64(len(body))/1e6, "json-MB")
	runtime.KeepAlive(list)
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
