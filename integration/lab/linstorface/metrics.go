package linstorface

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// metrics answers /metrics from the controller's memory, in the Prometheus text format, with the names of LINSTOR's
// docs/prometheus.md.
func (f *Face) metrics(w http.ResponseWriter, r *http.Request) {
	want := func(name string) bool { return !strings.EqualFold(r.URL.Query().Get(name), "false") }
	var b bytes.Buffer
	fmt.Fprintf(&b, "# TYPE linstor_info gauge\nlinstor_info{version=%q} 1\n", f.sim.Controller().Version)
	fmt.Fprintln(&b, "# TYPE linstor_node_state gauge")
	for _, n := range f.sim.Nodes(nil, nil) {
		fmt.Fprintf(&b, "linstor_node_state{node=%q,nodetype=%q} %d\n", n.Name, n.Type, nodeState[n.ConnectionStatus])
	}
	fmt.Fprintf(&b, "# TYPE linstor_resource_definition_count gauge\nlinstor_resource_definition_count %d\n", f.sim.Counts().Definitions)
	if want("resource") {
		f.resourceMetrics(&b)
	}
	if want("storage_pools") {
		f.poolMetrics(&b)
	}
	if want("error_reports") {
		fmt.Fprintln(&b, "# TYPE linstor_error_reports_count gauge")
	}
	f.sendBytes(w, r, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", b.Bytes())
}

var nodeState = map[string]int{linstorsim.StatusOffline: 0, linstorsim.StatusConnected: 1, linstorsim.StatusOnline: 2,
	linstorsim.StatusVersionMismatch: 3, linstorsim.StatusFullSyncFailed: 4, linstorsim.StatusUnknown: 6, linstorsim.StatusOtherController: 8}

var diskState = map[string]int{"Diskless": 1, "Inconsistent": 4, "Failed": 5, "Outdated": 6, "UpToDate": 9}

func (f *Face) resourceMetrics(b *bytes.Buffer) {
	var vols bytes.Buffer
	fmt.Fprintln(b, "# TYPE linstor_resource_state gauge")
	for _, res := range f.sim.Resources(linstorsim.ResourceFilter{Volumes: true}) {
		state := -1
		if res.State != nil && res.State.InUse != nil {
			state = 0
			if *res.State.InUse {
				state = 1
			}
		}
		fmt.Fprintf(b, "linstor_resource_state{node=%q,name=%q} %d\n", res.NodeName, res.Name, state)
		for _, v := range res.Volumes {
			value := 0
			if v.State != nil {
				value = diskState[v.State.DiskState]
			}
			fmt.Fprintf(&vols, "linstor_volume_state{node=%q,resource=%q,volume=\"%d\"} %d\n", res.NodeName, res.Name, v.Number, value)
		}
	}
	fmt.Fprintln(b, "# TYPE linstor_volume_state gauge")
	b.Write(vols.Bytes())
}

func (f *Face) poolMetrics(b *bytes.Buffer) {
	var total bytes.Buffer
	fmt.Fprintln(b, "# TYPE linstor_storage_pool_capacity_free_bytes gauge")
	for _, p := range f.sim.Pools(nil, nil, nil, true) {
		if p.FreeCapacity == nil || p.ProviderKind == "DISKLESS" {
			continue
		}
		fmt.Fprintf(b, "linstor_storage_pool_capacity_free_bytes{node=%q,storage_pool=%q,driver=%q} %d\n", p.NodeName, p.Name, p.ProviderKind, *p.FreeCapacity<<10)
		fmt.Fprintf(&total, "linstor_storage_pool_capacity_total_bytes{node=%q,storage_pool=%q,driver=%q} %d\n", p.NodeName, p.Name, p.ProviderKind, *p.TotalCapacity<<10)
	}
	fmt.Fprintln(b, "# TYPE linstor_storage_pool_capacity_total_bytes gauge")
	b.Write(total.Bytes())
}
