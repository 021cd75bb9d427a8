package linstorface

import (
	"fmt"
	"net/http"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

type (
	props        = linstorsim.PropsChange
	resFilter    = linstorsim.ResourceFilter
	handler      = http.HandlerFunc
	writer       = http.ResponseWriter
	selectFilter = linstorsim.SelectFilter
)

const (
	ok      = http.StatusOK
	created = http.StatusCreated
)

// endpoints adds every endpoint that the face plays. The model compares names without case.
func (f *Face) endpoints(add func(string, handler)) {
	f.controllerRoutes(add)
	f.nodeRoutes(add)
	f.poolRoutes(add)
	f.groupRoutes(add)
	f.definitionRoutes(add)
	f.resourceRoutes(add)
	f.snapshotRoutes(add)
}

func (f *Face) constant(v any) handler {
	return func(w writer, r *http.Request) { f.send(w, r, ok, v) }
}

func (f *Face) controllerRoutes(add func(string, handler)) {
	add("GET /health", func(w writer, r *http.Request) { w.WriteHeader(ok) })
	add("GET /metrics", f.metrics)
	add("GET /v1/controller/version", f.version)
	add("GET /v1/controller/properties", func(w writer, r *http.Request) { f.send(w, r, ok, f.sim.ControllerProps()) })
	add("POST /v1/controller/properties", func(w writer, r *http.Request) {
		var ch props
		if f.body(w, r, &ch) {
			f.mutate(w, r, created, f.sim.ModifyControllerProps(ch))
		}
	})
	add("DELETE /v1/controller/properties/{key...}", func(w writer, r *http.Request) {
		f.mutate(w, r, ok, f.sim.ModifyControllerProps(props{Delete: []string{r.PathValue("key")}}))
	})
	add("GET /v1/controller/config", f.constant(map[string]any{
		"config": map[string]any{"dir": "/etc/linstor"}, "debug": map[string]any{"console_enabled": false},
		"log":  map[string]any{"print_stack_trace": false, "directory": "/var/log/linstor-controller", "level": "INFO"},
		"db":   map[string]any{"connection_url": "jdbc:h2:/var/lib/linstor/linstordb"},
		"http": map[string]any{"enabled": true, "listen_address": "::", "port": 3370},
	}))
	add("GET /v1/error-reports", f.constant([]any{}))
	add("GET /v1/error-reports/{$}", f.constant([]any{}))
	add("PATCH /v1/error-reports", func(w writer, r *http.Request) { f.reply(w, r, ok, linstorsim.Reply{}) })
	add("GET /v1/error-reports/{id}", func(w writer, r *http.Request) { one(f, w, r, []any{}, 998, "Error report") })
	add("GET /v1/remotes", f.constant(map[string]any{}))
	for _, kind := range []string{"s3", "linstor", "ebs"} {
		add("GET /v1/remotes/"+kind, f.constant([]any{}))
	}
	add("GET /v1/key-value-store", func(w writer, r *http.Request) { f.send(w, r, ok, f.sim.KVList()) })
	add("GET /v1/key-value-store/{instance}", func(w writer, r *http.Request) {
		kv, found := f.sim.KVGet(r.PathValue("instance"))
		if !found {
			one(f, w, r, []any{}, linstorsim.CodeKVSNotFound, "Key value store instance '"+r.PathValue("instance")+"'")
			return
		}
		f.send(w, r, ok, []linstorsim.KeyValueStore{kv})
	})
	add("PUT /v1/key-value-store/{instance}", func(w writer, r *http.Request) {
		var ch props
		if f.body(w, r, &ch) {
			f.mutate(w, r, ok, f.sim.KVModify(r.PathValue("instance"), ch))
		}
	})
	add("DELETE /v1/key-value-store/{instance}", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.KVDelete(r.PathValue("instance"))) })
	add("GET /v1/events/drbd/promotion", f.events("promotion"))
	add("GET /v1/events/nodes", f.events("nodes"))
	stat := func(name string, n func(linstorsim.Counts) int) {
		add("GET /v1/stats/"+name, func(w writer, r *http.Request) {
			f.send(w, r, ok, map[string]int{"count": n(f.sim.Counts())})
		})
	}
	stat("nodes", func(c linstorsim.Counts) int { return c.Nodes })
	stat("resource-groups", func(c linstorsim.Counts) int { return c.Groups })
	stat("resource-definitions", func(c linstorsim.Counts) int { return c.Definitions })
	stat("resources", func(c linstorsim.Counts) int { return c.Resources })
	stat("storage-pools", func(c linstorsim.Counts) int { return c.Pools })
	stat("error-reports", func(linstorsim.Counts) int { return 0 })
}

func (f *Face) version(w writer, r *http.Request) {
	v := f.sim.Controller().Version
	f.send(w, r, ok, map[string]string{"version": v, "git_hash": "3e9306a9d8215606544c64c50ced150625ee4926",
		"build_time": "2026-06-02T10:00:00+00:00", "rest_api_version": linstorsim.RESTVersion(v)})
}

func (f *Face) nodeRoutes(add func(string, handler)) {
	node := func(r *http.Request) string { return r.PathValue("node") }
	add("GET /v1/nodes", func(w writer, r *http.Request) {
		q := r.URL.Query()
		f.send(w, r, ok, page(r, f.sim.Nodes(q["nodes"], q["props"])))
	})
	add("GET /v1/nodes/{node}", func(w writer, r *http.Request) {
		one(f, w, r, f.sim.Nodes([]string{node(r)}, nil), linstorsim.CodeNodeNotFound, "Node '"+node(r)+"'")
	})
	add("POST /v1/nodes", func(w writer, r *http.Request) {
		var rec linstorsim.Node
		if f.body(w, r, &rec) {
			f.mutate(w, r, created, f.sim.CreateNode(rec))
		}
	})
	add("PUT /v1/nodes/{node}", func(w writer, r *http.Request) {
		var in struct {
			props
			Type string `json:"node_type"`
		}
		if f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.ModifyNode(node(r), in.Type, in.props), node(r))
		}
	})
	add("DELETE /v1/nodes/{node}", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.DeleteNode(node(r)), node(r)) })
	add("DELETE /v1/nodes/{node}/lost", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.LoseNode(node(r)), node(r)) })
	add("PUT /v1/nodes/{node}/reconnect", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.Reconnect(node(r)), node(r)) })
	add("PUT /v1/nodes/{node}/evict", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.Evict(node(r)), node(r)) })
	add("PUT /v1/nodes/{node}/evacuate", func(w writer, r *http.Request) {
		var in struct {
			Target      []string `json:"target"`
			DoNotTarget []string `json:"do_not_target"`
		}
		if f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.Evacuate(node(r)), node(r))
		}
	})
	add("PUT /v1/nodes/{node}/restore", func(w writer, r *http.Request) {
		var in struct {
			DeleteResources *bool `json:"delete_resources"`
			DeleteSnapshots *bool `json:"delete_snapshots"`
		}
		if f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.Restore(node(r)), node(r))
		}
	})
	add("GET /v1/nodes/{node}/net-interfaces", func(w writer, r *http.Request) {
		f.netIfs(w, r, "")
	})
	add("GET /v1/nodes/{node}/net-interfaces/{netif}", func(w writer, r *http.Request) { f.netIfs(w, r, r.PathValue("netif")) })
	add("POST /v1/nodes/{node}/net-interfaces", func(w writer, r *http.Request) {
		var rec linstorsim.NetInterface
		if f.body(w, r, &rec) {
			f.mutate(w, r, created, f.sim.CreateNetInterface(node(r), rec), node(r))
		}
	})
	add("PUT /v1/nodes/{node}/net-interfaces/{netif}", func(w writer, r *http.Request) {
		var rec linstorsim.NetInterface
		if f.body(w, r, &rec) {
			f.mutate(w, r, ok, f.sim.ModifyNetInterface(node(r), r.PathValue("netif"), rec), node(r))
		}
	})
	add("DELETE /v1/nodes/{node}/net-interfaces/{netif}", func(w writer, r *http.Request) {
		f.mutate(w, r, ok, f.sim.DeleteNetInterface(node(r), r.PathValue("netif")), node(r))
	})
	f.connectionRoutes(add)
}

func (f *Face) netIfs(w writer, r *http.Request, name string) {
	nodes := f.sim.Nodes([]string{r.PathValue("node")}, nil)
	if len(nodes) == 0 {
		one(f, w, r, nodes, linstorsim.CodeNodeNotFound, "Node '"+r.PathValue("node")+"'")
		return
	}
	if name == "" {
		f.send(w, r, ok, page(r, append([]linstorsim.NetInterface{}, nodes[0].NetInterfaces...)))
		return
	}
	var found []linstorsim.NetInterface
	for _, i := range nodes[0].NetInterfaces {
		if linstorsim.SameName(i.Name, name) {
			found = append(found, i)
		}
	}
	one(f, w, r, found, linstorsim.CodeNetIfNotFound, "Net interface '"+name+"'")
}

func (f *Face) connectionRoutes(add func(string, handler)) {
	add("GET /v1/node-connections", func(w writer, r *http.Request) {
		q := r.URL.Query()
		f.send(w, r, ok, f.sim.Connections("", q.Get("node_a"), q.Get("node_b")))
	})
	put := func(w writer, r *http.Request) {
		var ch props
		if f.body(w, r, &ch) {
			a, b := r.PathValue("a"), r.PathValue("b")
			f.mutate(w, r, ok, f.sim.ModifyConnection(r.PathValue("rd"), a, b, ch), a, b)
		}
	}
	add("PUT /v1/node-connections/{a}/{b}", put)
	add("GET /v1/resource-definitions/{rd}/resource-connections", func(w writer, r *http.Request) {
		f.send(w, r, ok, f.sim.Connections(r.PathValue("rd"), "", ""))
	})
	add("GET /v1/resource-definitions/{rd}/resource-connections/{a}/{b}", func(w writer, r *http.Request) {
		one(f, w, r, f.sim.Connections(r.PathValue("rd"), r.PathValue("a"), r.PathValue("b")), 307, "Resource connection")
	})
	add("PUT /v1/resource-definitions/{rd}/resource-connections/{a}/{b}", put)
}

func (f *Face) poolRoutes(add func(string, handler)) {
	list := func(r *http.Request, nodes, pools []string) []linstorsim.StoragePool {
		cached := queryBool(r, "cached")
		if !cached && !f.reached(r, nodes...) {
			panic(http.ErrAbortHandler)
		}
		return f.sim.Pools(nodes, pools, r.URL.Query()["props"], cached)
	}
	add("GET /v1/view/storage-pools", func(w writer, r *http.Request) {
		q := r.URL.Query()
		f.send(w, r, ok, page(r, list(r, q["nodes"], q["storage_pools"])))
	})
	add("GET /v1/nodes/{node}/storage-pools", func(w writer, r *http.Request) {
		if len(f.sim.Nodes([]string{r.PathValue("node")}, nil)) == 0 {
			one(f, w, r, []any{}, linstorsim.CodeNodeNotFound, "Node '"+r.PathValue("node")+"'")
			return
		}
		f.send(w, r, ok, page(r, list(r, []string{r.PathValue("node")}, nil)))
	})
	add("GET /v1/nodes/{node}/storage-pools/{pool}", func(w writer, r *http.Request) {
		pools := list(r, []string{r.PathValue("node")}, []string{r.PathValue("pool")})
		one(f, w, r, pools, linstorsim.CodePoolNotFound, "Storage pool '"+r.PathValue("pool")+"'")
	})
	add("POST /v1/nodes/{node}/storage-pools", func(w writer, r *http.Request) {
		var rec linstorsim.StoragePool
		if f.body(w, r, &rec) {
			rec.NodeName = r.PathValue("node")
			f.mutate(w, r, created, f.sim.CreatePool(rec), rec.NodeName)
		}
	})
	add("PUT /v1/nodes/{node}/storage-pools/{pool}", func(w writer, r *http.Request) {
		var ch props
		if f.body(w, r, &ch) {
			f.mutate(w, r, ok, f.sim.ModifyPool(r.PathValue("node"), r.PathValue("pool"), ch), r.PathValue("node"))
		}
	})
	add("DELETE /v1/nodes/{node}/storage-pools/{pool}", func(w writer, r *http.Request) {
		f.mutate(w, r, ok, f.sim.DeletePool(r.PathValue("node"), r.PathValue("pool")), r.PathValue("node"))
	})
	add("GET /v1/storage-pool-definitions", func(w writer, r *http.Request) { f.send(w, r, ok, page(r, f.sim.PoolDefinitions(""))) })
	add("GET /v1/storage-pool-definitions/{pool}", func(w writer, r *http.Request) {
		one(f, w, r, f.sim.PoolDefinitions(r.PathValue("pool")), linstorsim.CodePoolDfnNotFound, "Storage pool definition '"+r.PathValue("pool")+"'")
	})
	add("POST /v1/storage-pool-definitions", func(w writer, r *http.Request) {
		var rec linstorsim.StoragePoolDefinition
		if f.body(w, r, &rec) {
			f.mutate(w, r, created, f.sim.CreatePoolDefinition(rec.Name, rec.Props))
		}
	})
	add("PUT /v1/storage-pool-definitions/{pool}", func(w writer, r *http.Request) {
		var ch props
		if f.body(w, r, &ch) {
			f.mutate(w, r, ok, f.sim.ModifyPoolDefinition(r.PathValue("pool"), ch))
		}
	})
	add("DELETE /v1/storage-pool-definitions/{pool}", func(w writer, r *http.Request) {
		f.mutate(w, r, ok, f.sim.DeletePoolDefinition(r.PathValue("pool")))
	})
	add("GET /v1/physical-storage", f.constant([]any{}))
	add("GET /v1/physical-storage/{$}", f.constant([]any{}))
}

func (f *Face) groupRoutes(add func(string, handler)) {
	group := func(r *http.Request) string { return r.PathValue("group") }
	add("GET /v1/resource-groups", func(w writer, r *http.Request) {
		q := r.URL.Query()
		f.send(w, r, ok, page(r, f.sim.Groups(q["resource_groups"], q["props"])))
	})
	add("GET /v1/resource-groups/{group}", func(w writer, r *http.Request) {
		one(f, w, r, f.sim.Groups([]string{group(r)}, nil), linstorsim.CodeRscGrpNotFound, "Resource group '"+group(r)+"'")
	})
	add("POST /v1/resource-groups", func(w writer, r *http.Request) {
		var rec linstorsim.ResourceGroup
		if f.body(w, r, &rec) {
			f.mutate(w, r, created, f.sim.CreateResourceGroup(rec))
		}
	})
	add("PUT /v1/resource-groups/{group}", func(w writer, r *http.Request) {
		var in struct {
			props
			Description *string       `json:"description"`
			Filter      *selectFilter `json:"select_filter"`
			PeerSlots   *int          `json:"peer_slots"`
			SnapNames   []string      `json:"snap_names"`
			CopySnaps   *bool         `json:"copy_all_snaps"`
		}
		if f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.ModifyGroup(group(r), in.Description, in.Filter, in.PeerSlots, in.props))
		}
	})
	add("DELETE /v1/resource-groups/{group}", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.DeleteGroup(group(r))) })
	add("POST /v1/resource-groups/{group}/spawn", f.spawn)
	add("GET /v1/resource-groups/{group}/volume-groups", func(w writer, r *http.Request) {
		vgs, found := f.sim.VolumeGroups(group(r))
		if !found {
			one(f, w, r, []any{}, linstorsim.CodeRscGrpNotFound, "Resource group '"+group(r)+"'")
			return
		}
		f.send(w, r, ok, page(r, append([]linstorsim.VolumeGroup{}, vgs...)))
	})
	add("GET /v1/resource-groups/{group}/volume-groups/{nr}", func(w writer, r *http.Request) {
		nr, valid := f.number(w, r, "nr")
		if !valid {
			return
		}
		vgs, _ := f.sim.VolumeGroups(group(r))
		var found []linstorsim.VolumeGroup
		for _, vg := range vgs {
			if vg.Number == nr {
				found = append(found, vg)
			}
		}
		one(f, w, r, found, linstorsim.CodeVlmGrpNotFound, "Volume group")
	})
	add("POST /v1/resource-groups/{group}/volume-groups", func(w writer, r *http.Request) {
		var in struct {
			linstorsim.VolumeGroup
			Number *int `json:"volume_number"`
		}
		if f.body(w, r, &in) {
			f.mutate(w, r, created, f.sim.CreateVolumeGroup(group(r), in.VolumeGroup, in.Number))
		}
	})
	add("PUT /v1/resource-groups/{group}/volume-groups/{nr}", func(w writer, r *http.Request) {
		var in struct {
			props
			Flags []string `json:"flags"`
		}
		if nr, valid := f.number(w, r, "nr"); valid && f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.ModifyVolumeGroup(group(r), nr, in.props))
		}
	})
	add("DELETE /v1/resource-groups/{group}/volume-groups/{nr}", func(w writer, r *http.Request) {
		if nr, valid := f.number(w, r, "nr"); valid {
			f.mutate(w, r, ok, f.sim.DeleteVolumeGroup(group(r), nr))
		}
	})
	f.sizeRoutes(add)
}

func (f *Face) spawn(w writer, r *http.Request) {
	var in struct {
		Name           string           `json:"resource_definition_name"`
		External       string           `json:"resource_definition_external_name"`
		Sizes          []int64          `json:"volume_sizes"`
		Filter         *selectFilter    `json:"select_filter"`
		Partial        bool             `json:"partial"`
		DefinitionOnly bool             `json:"definitions_only"`
		PeerSlots      int              `json:"peer_slots"`
		Passphrases    []string         `json:"volume_passphrases"`
		Props          linstorsim.Props `json:"resource_definition_props"`
	}
	if f.body(w, r, &in) {
		f.mutate(w, r, created, f.sim.SpawnWith(r.PathValue("group"), linstorsim.SpawnRequest{Name: in.Name, ExternalName: in.External,
			SizesKiB: in.Sizes, Partial: in.Partial, DefinitionsOnly: in.DefinitionOnly, Filter: in.Filter, PeerSlots: in.PeerSlots, Props: in.Props}))
	}
}

// sizeInfo is the body of query-size-info: always with status 200.
type sizeInfo struct {
	SpaceInfo *linstorsim.SpaceInfo `json:"space_info,omitempty"`
	Reports   linstorsim.Reply      `json:"reports,omitempty"`
}

func (f *Face) sizeRoutes(add func(string, handler)) {
	type query struct {
		Filter selectFilter `json:"select_filter"`
		Older  int          `json:"ignore_cache_older_than_sec"`
	}
	add("POST /v1/resource-groups/{group}/query-size-info", func(w writer, r *http.Request) {
		var in query
		if f.body(w, r, &in) && f.reached(r) {
			info, rc := f.sim.QuerySizeInfo(r.PathValue("group"), in.Filter)
			f.send(w, r, ok, sizeInfo{info, rc})
		}
	})
	add("POST /v1/queries/resource-groups/query-all-size-info", func(w writer, r *http.Request) {
		var in query
		if !f.body(w, r, &in) || !f.reached(r) {
			return
		}
		result := map[string]sizeInfo{}
		for _, g := range f.sim.Groups(nil, nil) {
			info, rc := f.sim.QuerySizeInfo(g.Name, in.Filter)
			result[g.Name] = sizeInfo{info, rc}
		}
		f.send(w, r, ok, map[string]any{"result": result})
	})
	add("GET /v1/resource-groups/{group}/query-max-volume-size", func(w writer, r *http.Request) {
		f.maxVolume(w, r, r.PathValue("group"), selectFilter{})
	})
	add("OPTIONS /v1/query-max-volume-size", func(w writer, r *http.Request) {
		var filter selectFilter
		if f.body(w, r, &filter) {
			f.maxVolume(w, r, "", filter)
		}
	})
}

func (f *Face) maxVolume(w writer, r *http.Request, group string, filter selectFilter) {
	if !f.reached(r) {
		return
	}
	cands, rc := f.sim.QueryMaxVolumeSize(group, filter)
	if rc.Failed() {
		f.reply(w, r, ok, rc)
		return
	}
	answer := map[string]any{"default_max_oversubscription_ratio": float64(linstorsim.DefaultOversubscription)}
	if len(cands) > 0 {
		answer["candidates"] = cands
	}
	f.send(w, r, ok, answer)
}

func (f *Face) definitionRoutes(add func(string, handler)) {
	rd := func(r *http.Request) string { return r.PathValue("rd") }
	notFound := func(w writer, r *http.Request) {
		one(f, w, r, []any{}, linstorsim.CodeRscDfnNotFound, "Resource definition '"+rd(r)+"'")
	}
	add("GET /v1/resource-definitions", func(w writer, r *http.Request) {
		q := r.URL.Query()
		f.send(w, r, ok, page(r, f.sim.Definitions(q["resource_definitions"], q["props"], queryBool(r, "with_volume_definitions"))))
	})
	add("GET /v1/resource-definitions/{rd}", func(w writer, r *http.Request) {
		one(f, w, r, f.sim.Definitions([]string{rd(r)}, nil, queryBool(r, "with_volume_definitions")), linstorsim.CodeRscDfnNotFound, "Resource definition '"+rd(r)+"'")
	})
	add("POST /v1/resource-definitions", f.createDefinition)
	add("PUT /v1/resource-definitions/{rd}", func(w writer, r *http.Request) {
		var in struct {
			props
			Port      int      `json:"drbd_port"`
			PeerSlots *int     `json:"drbd_peer_slots"`
			Layers    []string `json:"layer_stack"`
			Group     string   `json:"resource_group"`
		}
		if f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.ModifyDefinition(rd(r), in.PeerSlots, in.Group, in.props))
		}
	})
	add("DELETE /v1/resource-definitions/{rd}", func(w writer, r *http.Request) { f.mutate(w, r, ok, f.sim.DeleteDefinition(rd(r))) })
	add("GET /v1/resource-definitions/{rd}/sync-status", func(w writer, r *http.Request) {
		synced, found := f.sim.SyncedOnAll(rd(r))
		if !found {
			notFound(w, r)
			return
		}
		f.send(w, r, ok, map[string]bool{"synced_on_all": synced})
	})
	add("GET /v1/resource-definitions/{rd}/volume-definitions", func(w writer, r *http.Request) { f.volumeDefinitions(w, r, nil) })
	add("GET /v1/resource-definitions/{rd}/volume-definitions/{nr}", func(w writer, r *http.Request) {
		if nr, valid := f.number(w, r, "nr"); valid {
			f.volumeDefinitions(w, r, &nr)
		}
	})
	add("POST /v1/resource-definitions/{rd}/volume-definitions", f.createVolumeDefinition)
	add("PUT /v1/resource-definitions/{rd}/volume-definitions/{nr}", func(w writer, r *http.Request) {
		var in struct {
			props
			SizeKiB int64    `json:"size_kib"`
			Flags   []string `json:"flags"`
		}
		if nr, valid := f.number(w, r, "nr"); valid && f.body(w, r, &in) {
			f.mutate(w, r, ok, f.sim.ModifyVolumeDefinition(rd(r), nr, in.SizeKiB, in.props))
		}
	})
	add("DELETE /v1/resource-definitions/{rd}/volume-definitions/{nr}", func(w writer, r *http.Request) {
		if nr, valid := f.number(w, r, "nr"); valid {
			f.mutate(w, r, ok, f.sim.DeleteVolumeDefinition(rd(r), nr))
		}
	})
}

func (f *Face) createDefinition(w writer, r *http.Request) {
	var in struct {
		Port      int                           `json:"drbd_port"`
		Secret    string                        `json:"drbd_secret"`
		PeerSlots int                           `json:"drbd_peer_slots"`
		Transport string                        `json:"drbd_transport_type"`
		Def       linstorsim.ResourceDefinition `json:"resource_definition"`
	}
	if !f.body(w, r, &in) {
		return
	}
	req := linstorsim.DefinitionRequest{Name: in.Def.Name, ExternalName: in.Def.ExternalName, Group: in.Def.ResourceGroupName,
		Props: in.Def.Props, PeerSlots: in.PeerSlots, Port: in.Port, Secret: in.Secret}
	for _, l := range in.Def.LayerData {
		req.Layers = append(req.Layers, l.Type)
	}
	f.mutate(w, r, created, f.sim.CreateDefinition(req))
}

func (f *Face) createVolumeDefinition(w writer, r *http.Request) {
	var in struct {
		Def struct {
			linstorsim.VolumeDefinition
			Number *int `json:"volume_number"`
		} `json:"volume_definition"`
		Minor      *int   `json:"drbd_minor_number"`
		Passphrase string `json:"passphrase"`
	}
	if f.body(w, r, &in) {
		f.mutate(w, r, ok, f.sim.CreateVolumeDefinition(r.PathValue("rd"), in.Def.Number, in.Def.SizeKiB, in.Def.Props, in.Def.Flags))
	}
}

func (f *Face) volumeDefinitions(w writer, r *http.Request, nr *int) {
	defs := f.sim.Definitions([]string{r.PathValue("rd")}, nil, true)
	if len(defs) == 0 {
		one(f, w, r, defs, linstorsim.CodeRscDfnNotFound, "Resource definition '"+r.PathValue("rd")+"'")
		return
	}
	if nr == nil {
		f.send(w, r, ok, page(r, append([]linstorsim.VolumeDefinition{}, defs[0].VolumeDefinitions...)))
		return
	}
	var found []linstorsim.VolumeDefinition
	for _, vd := range defs[0].VolumeDefinitions {
		if vd.Number == *nr {
			found = append(found, vd)
		}
	}
	one(f, w, r, found, linstorsim.CodeVlmDfnNotFound, fmt.Sprintf("Volume definition %d", *nr))
}

type resourceCreate struct {
	Resource  linstorsim.Resource `json:"resource"`
	Layers    []string            `json:"layer_list"`
	NodeID    *int                `json:"drbd_node_id"`
	PortCount *int                `json:"drbd_tcp_port_count"`
	Ports     []int               `json:"drbd_tcp_ports"`
	SnapNames []string            `json:"snap_names"`
	CopySnaps *bool               `json:"copy_all_snaps"`
	Client    *bool               `json:"drbd_client"`
}

func (f *Face) resourceRoutes(add func(string, handler)) {
	const base = "/v1/resource-definitions/{rd}/resources"
	add("GET /v1/view/resources", func(w writer, r *http.Request) {
		q := r.URL.Query()
		if !f.reached(r, q["nodes"]...) {
			panic(http.ErrAbortHandler)
		}
		f.send(w, r, ok, page(r, f.sim.Resources(resFilter{Names: q["resources"], Nodes: q["nodes"], Pools: q["storage_pools"], Props: q["props"], Volumes: true})))
	})
	add("GET "+base, func(w writer, r *http.Request) { f.resources(w, r, "") })
	add("GET "+base+"/{node}", func(w writer, r *http.Request) { f.resources(w, r, r.PathValue("node")) })
	add("GET "+base+"/{node}/volumes", func(w writer, r *http.Request) { f.volumes(w, r, nil) })
	add("GET "+base+"/{node}/volumes/{nr}", func(w writer, r *http.Request) {
		if nr, valid := f.number(w, r, "nr"); valid {
			f.volumes(w, r, &nr)
		}
	})
	add("POST "+base, func(w writer, r *http.Request) {
		var in []resourceCreate
		if !f.body(w, r, &in) {
			return
		}
		var rc linstorsim.Reply
		for _, one := range in {
			rc = append(rc, f.create(r, one.Resource.NodeName, one)...)
		}
		f.mutate(w, r, created, rc)
	})
	add("POST "+base+"/{node}", func(w writer, r *http.Request) {
		var in resourceCreate
		if f.body(w, r, &in) {
			f.mutate(w, r, created, f.create(r, r.PathValue("node"), in), r.PathValue("node"))
		}
	})
	add("PUT "+base+"/{node}", func(w writer, r *http.Request) {
		var ch props
		if f.body(w, r, &ch) {
			f.change(w, r, ok, f.sim.ModifyResource(r.PathValue("rd"), r.PathValue("node"), ch))
		}
	})
	add("DELETE "+base+"/{node}", func(w writer, r *http.Request) {
		f.change(w, r, ok, f.sim.DeleteResource(r.PathValue("rd"), r.PathValue("node"), queryBool(r, "keep_tiebreaker")))
	})
	f.diskRoutes(add, base+"/{node}")
	add("POST /v1/resource-definitions/{rd}/autoplace", func(w writer, r *http.Request) {
		var in struct {
			Diskless  *bool        `json:"diskless_on_remaining"`
			Filter    selectFilter `json:"select_filter"`
			Layers    []string     `json:"layer_list"`
			SnapNames []string     `json:"snap_names"`
			CopySnaps *bool        `json:"copy_all_snaps"`
		}
		if f.body(w, r, &in) {
			if in.Diskless != nil {
				in.Filter.DisklessOnRemaining = in.Diskless
			}
			f.mutate(w, r, created, f.sim.Autoplace(r.PathValue("rd"), in.Filter))
		}
	})
}

func (f *Face) change(w writer, r *http.Request, success int, rc linstorsim.Reply) {
	f.mutate(w, r, success, rc, r.PathValue("node"))
}

func (f *Face) create(r *http.Request, node string, in resourceCreate) linstorsim.Reply {
	return f.sim.CreateResource(r.PathValue("rd"), node, linstorsim.CreateRequest{Flags: in.Resource.Flags, Props: in.Resource.Props})
}

// diskRoutes are the calls that give disks and take them: the old paths in all versions, the unified one from 1.34.
func (f *Face) diskRoutes(add func(string, handler), place string) {
	diskful := func(w writer, r *http.Request) {
		f.change(w, r, ok, f.sim.ToggleDiskful(r.PathValue("rd"), r.PathValue("node"), r.PathValue("pool"), r.PathValue("from")))
	}
	diskless := func(w writer, r *http.Request) {
		f.change(w, r, ok, f.sim.ToggleDiskless(r.PathValue("rd"), r.PathValue("node")))
	}
	for _, p := range []string{"/toggle-disk/diskful", "/toggle-disk/diskful/{pool}", "/migrate-disk/{from}", "/migrate-disk/{from}/{pool}"} {
		add("PUT "+place+p, diskful)
	}
	add("PUT "+place+"/toggle-disk/diskless", diskless)
	add("PUT "+place+"/toggle-disk/diskless/{pool}", diskless)
	add("PUT "+place+"/toggle-disk", f.toggleUnified)
	add("POST "+place+"/make-available", func(w writer, r *http.Request) {
		var in struct {
			Layers    []string `json:"layer_list"`
			Diskful   bool     `json:"diskful"`
			Ports     []int    `json:"drbd_tcp_ports"`
			SnapNames []string `json:"snap_names"`
			CopySnaps *bool    `json:"copy_all_snaps"`
		}
		if f.body(w, r, &in) {
			f.change(w, r, ok, f.sim.MakeAvailable(r.PathValue("rd"), r.PathValue("node"), in.Diskful))
		}
	})
	add("POST "+place+"/activate", func(w writer, r *http.Request) {
		f.change(w, r, ok, f.sim.SetActive(r.PathValue("rd"), r.PathValue("node"), true))
	})
	add("POST "+place+"/deactivate", func(w writer, r *http.Request) {
		f.change(w, r, ok, f.sim.SetActive(r.PathValue("rd"), r.PathValue("node"), false))
	})
}

// toggleUnified exists from 1.34 (REST 1.28) on; before, the path is unknown.
func (f *Face) toggleUnified(w writer, r *http.Request) {
	if !linstorsim.Has134(f.sim.Controller().Version) {
		f.send(w, r, http.StatusNotFound, linstorsim.Reply{linstorsim.ErrorEntry(linstorsim.CodeUnknown, "Path '/"+r.URL.Path[len("/v1/"):]+"' not found on server.")})
		return
	}
	var in struct {
		Operation   string   `json:"operation"`
		StoragePool string   `json:"storage_pool"`
		MigrateFrom string   `json:"migrate_from"`
		Layers      []string `json:"layer_list"`
	}
	if !f.body(w, r, &in) {
		return
	}
	rd, node := r.PathValue("rd"), r.PathValue("node")
	switch in.Operation {
	case "INTO_DRBD_DISKFUL":
		f.change(w, r, ok, f.sim.ToggleDiskful(rd, node, in.StoragePool, in.MigrateFrom))
	case "INTO_DRBD_DISKLESS":
		f.change(w, r, ok, f.sim.ToggleDiskless(rd, node))
	case "INTO_DRBD_CLIENT":
		f.notImplemented(w, r)
	default:
		f.reply(w, r, ok, linstorsim.Reply{linstorsim.ErrorEntry(234, "Unknown toggle operation '"+in.Operation+"'")})
	}
}

func (f *Face) resources(w writer, r *http.Request, node string) {
	rd := r.PathValue("rd")
	hasDef, hasPlace := f.sim.ResourceExists(rd, node)
	switch {
	case !hasDef:
		one(f, w, r, []any{}, linstorsim.CodeRscDfnNotFound, "Resource definition '"+rd+"'")
	case node != "" && !hasPlace:
		one(f, w, r, []any{}, linstorsim.CodeRscNotFound, "Resource '"+rd+"' on node '"+node+"'")
	case node != "":
		f.send(w, r, ok, f.sim.Resources(resFilter{Names: []string{rd}, Nodes: []string{node}})[0])
	default:
		f.send(w, r, ok, page(r, f.sim.Resources(resFilter{Names: []string{rd}})))
	}
}

func (f *Face) volumes(w writer, r *http.Request, nr *int) {
	rd, node := r.PathValue("rd"), r.PathValue("node")
	if !f.reached(r, node) {
		panic(http.ErrAbortHandler)
	}
	if _, place := f.sim.ResourceExists(rd, node); !place {
		one(f, w, r, []any{}, linstorsim.CodeRscNotFound, "Resource '"+rd+"' on node '"+node+"'")
		return
	}
	found := []linstorsim.Volume{}
	for _, res := range f.sim.Resources(resFilter{Names: []string{rd}, Nodes: []string{node}, Volumes: true}) {
		for _, v := range res.Volumes {
			if nr == nil || v.Number == *nr {
				found = append(found, v)
			}
		}
	}
	if nr == nil {
		f.send(w, r, ok, page(r, found))
		return
	}
	one(f, w, r, found, linstorsim.CodeVlmNotFound, fmt.Sprintf("Volume %d", *nr))
}

func (f *Face) snapshotRoutes(add func(string, handler)) {
	const base = "/v1/resource-definitions/{rd}/snapshots"
	add("GET /v1/view/snapshots", func(w writer, r *http.Request) {
		q := r.URL.Query()
		f.send(w, r, ok, page(r, f.sim.Snapshots(q["resources"], q["nodes"])))
	})
	add("GET "+base, func(w writer, r *http.Request) {
		f.send(w, r, ok, page(r, f.sim.Snapshots([]string{r.PathValue("rd")}, nil)))
	})
	add("GET "+base+"/{snapshot}", func(w writer, r *http.Request) {
		var found []linstorsim.Snapshot
		for _, s := range f.sim.Snapshots([]string{r.PathValue("rd")}, nil) {
			if linstorsim.SameName(s.Name, r.PathValue("snapshot")) {
				found = append(found, s)
			}
		}
		one(f, w, r, found, linstorsim.CodeSnapshotNotFound, "Snapshot '"+r.PathValue("snapshot")+"'")
	})
	add("POST "+base, func(w writer, r *http.Request) {
		var in linstorsim.Snapshot
		if f.body(w, r, &in) {
			f.mutate(w, r, created, f.sim.CreateSnapshot(r.PathValue("rd"), in.Name, in.Nodes), in.Nodes...)
		}
	})
	add("DELETE "+base+"/{snapshot}", func(w writer, r *http.Request) {
		f.mutate(w, r, ok, f.sim.DeleteSnapshot(r.PathValue("rd"), r.PathValue("snapshot")))
	})
}
