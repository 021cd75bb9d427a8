package srsize

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// Mirrors are this agent's copies of the feed's tables, with the few fields it uses. While they are fresh a pass costs XAPI nothing and LINSTOR two reads from
// its memory; while they are not, the sources are asked directly, so the agent is right without the bus. Close them.
type Mirrors struct {
	srs       *bus.Mirror[srRow]
	pbds      *bus.Mirror[pbdRow]
	vdis      *bus.Mirror[vdiRow]
	hosts     *bus.Mirror[hostRow]
	nodes     *bus.Mirror[nodeRow]
	pools     *bus.Mirror[poolRow]
	resources *bus.Mirror[resourceRow]
	close     []func()
}

type srRow struct {
	Ref         string   `json:"ref"`
	UUID        string   `json:"uuid"`
	Type        string   `json:"type"`
	Name        string   `json:"name_label"`
	Virtual     xapi.Int `json:"virtual_allocation"`
	Utilisation xapi.Int `json:"physical_utilisation"`
	Physical    xapi.Int `json:"physical_size"`
}

type pbdRow struct {
	UUID         string            `json:"uuid"`
	SR           string            `json:"SR"`
	Host         string            `json:"host"`
	DeviceConfig map[string]string `json:"device_config"`
	Attached     bool              `json:"currently_attached"`
}

type vdiRow struct {
	Ref         string   `json:"ref"`
	SR          string   `json:"SR"`
	Virtual     xapi.Int `json:"virtual_size"`
	Utilisation xapi.Int `json:"physical_utilisation"`
	Managed     bool     `json:"managed"`
}

type hostRow struct {
	Ref string `json:"ref"`
}

type nodeRow struct {
	Name   string `json:"name"`
	Status string `json:"connection_status"`
}

type poolRow struct {
	Name     string `json:"name"`
	Node     string `json:"node"`
	Provider string `json:"provider"`
	FreeKiB  *int64 `json:"free_kib"`
	TotalKiB *int64 `json:"total_kib"`
}

type resourceRow struct {
	Name    string      `json:"name"`
	Node    string      `json:"node"`
	Volumes []volumeRow `json:"volumes"`
}

type volumeRow struct {
	Number       int32  `json:"number"`
	Pool         string `json:"pool"`
	AllocatedKiB *int64 `json:"allocated_kib"`
}

// NewMirrors subscribes to the feed's tables. It does not wait for them.
func NewMirrors(w bus.Wire) (*Mirrors, error) {
	m := &Mirrors{}
	var err error
	open := func(name string, f func() (func(), error)) {
		if err != nil {
			return
		}
		var stop func()
		if stop, err = f(); err != nil {
			err = fmt.Errorf("mirror %s: %w", name, err)
			return
		}
		m.close = append(m.close, stop)
	}
	onlyLinstor := func(r srRow) bool { return r.Type == sm.SRType }
	open("SRs", func() (func(), error) { return mirror(w, bus.XAPITable("sr"), &m.srs, onlyLinstor) })
	open("PBDs", func() (func(), error) { return mirror(w, bus.XAPITable("pbd"), &m.pbds, nil) })
	open("VDIs", func() (func(), error) { return mirror(w, bus.XAPITable("vdi"), &m.vdis, nil) })
	open("hosts", func() (func(), error) { return mirror(w, bus.XAPITable("host"), &m.hosts, nil) })
	open("nodes", func() (func(), error) { return mirror(w, bus.LINSTORTable("node"), &m.nodes, nil) })
	open("storage pools", func() (func(), error) { return mirror(w, bus.LINSTORTable("pool"), &m.pools, nil) })
	open("resources", func() (func(), error) { return mirror(w, bus.LINSTORTable("resource"), &m.resources, nil) })
	if err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// mirror opens one mirror that keeps the rows for which keep is true; nil keeps all.
func mirror[T any](w bus.Wire, spec bus.Spec, at **bus.Mirror[T], keep func(T) bool) (func(), error) {
	m, err := bus.NewMirror(w, spec, bus.MirrorOptions[T]{Project: func(_ string, raw json.RawMessage) (v T, _ bool, err error) {
		err = json.Unmarshal(raw, &v)
		return v, err != nil || keep == nil || keep(v), err
	}})
	if err != nil {
		return nil, err
	}
	*at = m
	return m.Close, nil
}

// Close ends the mirrors.
func (m *Mirrors) Close() {
	for _, stop := range m.close {
		stop()
	}
}

// Records gives the mirrored records while they are fresh, and those of direct while not.
func (m *Mirrors) Records(direct Records) Records { return mirroredRecords{m, direct} }

type mirroredRecords struct {
	m      *Mirrors
	direct Records
}

// LinstorSRs implements Records.
func (r mirroredRecords) LinstorSRs(ctx context.Context) ([]SRRecord, error) {
	srs, fresh1 := r.m.srs.Snapshot()
	pbds, fresh2 := r.m.pbds.Snapshot()
	hosts, fresh3 := r.m.hosts.Snapshot()
	if !fresh1.Fresh || !fresh2.Fresh || !fresh3.Fresh || !r.m.vdis.Freshness().Fresh {
		return r.direct.LinstorSRs(ctx)
	}
	hostOf := make(map[string]string, len(hosts)) // ref -> uuid
	for uuid, h := range hosts {
		hostOf[h.Ref] = uuid
	}
	byRef := make(map[string]*SRRecord, len(srs))
	for _, sr := range srs {
		byRef[sr.Ref] = &SRRecord{UUID: sr.UUID, Name: sr.Name,
			Sizes: Sizes{Physical: int64(sr.Physical), Utilisation: int64(sr.Utilisation), Virtual: int64(sr.Virtual)}}
	}
	for _, p := range pbds {
		if sr := byRef[p.SR]; sr != nil {
			sr.PBDs = append(sr.PBDs, PBDRecord{UUID: p.UUID, HostUUID: hostOf[p.Host], Group: p.DeviceConfig["group-name"], Attached: p.Attached})
		}
	}
	r.m.vdis.Each(func(uuid string, v vdiRow) bool {
		if sr := byRef[v.SR]; sr != nil {
			sr.VDIs = append(sr.VDIs, VDI{UUID: uuid, Ref: v.Ref, Virtual: int64(v.Virtual), Utilisation: int64(v.Utilisation), Managed: v.Managed})
		}
		return true
	})
	out := make([]SRRecord, 0, len(byRef))
	for _, sr := range byRef {
		out = append(out, *sr)
	}
	return out, nil
}

// Storage gives the mirrored nodes, pools and resources while they are fresh, and those of direct while not. Groups and the key-value store are always
// read directly: the controller answers them from memory.
func (m *Mirrors) Storage(direct Storage) Storage { return mirroredStorage{direct, m} }

type mirroredStorage struct {
	Storage
	m *Mirrors
}

// fresh tells whether all of LINSTOR's tables are: mixing a mirrored table with one read now could show a replica without its pool.
func (s mirroredStorage) fresh() bool {
	return s.m.nodes.Freshness().Fresh && s.m.pools.Freshness().Fresh && s.m.resources.Freshness().Fresh
}

// Nodes implements Storage.
func (s mirroredStorage) Nodes(ctx context.Context) ([]linstor.Node, error) {
	if !s.fresh() {
		return s.Storage.Nodes(ctx)
	}
	var out []linstor.Node
	s.m.nodes.Each(func(_ string, n nodeRow) bool {
		out = append(out, linstor.Node{Name: n.Name, ConnectionStatus: n.Status})
		return true
	})
	return out, nil
}

// StoragePools implements Storage.
func (s mirroredStorage) StoragePools(ctx context.Context, q linstor.PoolQuery) ([]linstor.StoragePool, error) {
	if !s.fresh() {
		return s.Storage.StoragePools(ctx, q)
	}
	var out []linstor.StoragePool
	s.m.pools.Each(func(_ string, p poolRow) bool {
		out = append(out, linstor.StoragePool{Name: p.Name, Node: p.Node, Provider: p.Provider, FreeKiB: p.FreeKiB, TotalKiB: p.TotalKiB})
		return true
	})
	return out, nil
}

// ResourceView implements Storage.
func (s mirroredStorage) ResourceView(ctx context.Context, q linstor.ViewQuery) ([]linstor.Resource, error) {
	if !s.fresh() {
		return s.Storage.ResourceView(ctx, q)
	}
	var out []linstor.Resource
	s.m.resources.Each(func(_ string, r resourceRow) bool {
		res := linstor.Resource{Name: r.Name, Node: r.Node}
		for _, v := range r.Volumes {
			res.Volumes = append(res.Volumes, linstor.Volume{Number: v.Number, Pool: v.Pool, AllocatedKiB: v.AllocatedKiB})
		}
		out = append(out, res)
		return true
	})
	return out, nil
}
