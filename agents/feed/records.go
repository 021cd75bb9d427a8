package feed

import (
	"maps"
	"strings"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

// Pool is a row of the table linstor.pool, key "<pool>/<node>": one storage pool on one node.
type Pool struct {
	Name     string `json:"name"`
	Node     string `json:"node"`
	Provider string `json:"provider"` // LVM, LVM_THIN, ZFS, ... ; DISKLESS pools are not published.
	// FreeKiB and TotalKiB are absent when nobody knows them: the node is not online.
	FreeKiB  *int64            `json:"free_kib,omitempty"`
	TotalKiB *int64            `json:"total_kib,omitempty"`
	Props    map[string]string `json:"props,omitempty"`
	UUID     string            `json:"uuid,omitempty"`
}

// Resource is a row of the table linstor.resource, key "<resource>/<node>": one replica, diskless attachment or tie-breaker.
type Resource struct {
	Name      string            `json:"name"`
	Node      string            `json:"node"`
	UUID      string            `json:"uuid,omitempty"`
	Flags     []string          `json:"flags,omitempty"`
	InUse     *bool             `json:"in_use,omitempty"` // Absent when unknown: the satellite is not connected.
	Props     map[string]string `json:"props,omitempty"`
	CreatedMs int64             `json:"created_ms,omitempty"`
	DRBD      *DRBD             `json:"drbd,omitempty"`
	Volumes   []Volume          `json:"volumes"`
}

// DRBD is the DRBD layer of a resource.
type DRBD struct {
	NodeID         *int32                        `json:"node_id,omitempty"`
	PeerSlots      *int32                        `json:"peer_slots,omitempty"`
	Flags          []string                      `json:"flags,omitempty"`
	PromotionScore *int32                        `json:"promotion_score,omitempty"`
	MayPromote     *bool                         `json:"may_promote,omitempty"`
	Connections    map[string]linstor.Connection `json:"connections,omitempty"` // By peer node.
}

// Volume is one volume of a resource.
type Volume struct {
	Number       int32                          `json:"number"`
	Pool         string                         `json:"pool,omitempty"`
	Provider     string                         `json:"provider,omitempty"`
	AllocatedKiB *int64                         `json:"allocated_kib,omitempty"` // Absent when unknown; a satellite's negative value is kept.
	UsableKiB    *int64                         `json:"usable_kib,omitempty"`
	DevicePath   string                         `json:"device_path,omitempty"`
	Flags        []string                       `json:"flags,omitempty"`
	DiskState    string                         `json:"disk_state,omitempty"`
	Replication  map[string]linstor.Replication `json:"replication,omitempty"` // By peer node.
}

func poolRow(p linstor.StoragePool) Pool {
	return Pool{
		Name: p.Name, Node: p.Node, Provider: p.Provider, FreeKiB: p.FreeKiB, TotalKiB: p.TotalKiB, Props: public(p.Props), UUID: p.UUID,
	}
}

func resourceRow(r linstor.Resource) Resource {
	row := Resource{
		Name: r.Name, Node: r.Node, UUID: r.UUID, Flags: r.Flags, InUse: r.InUse, Props: public(r.Props), CreatedMs: r.CreatedMs,
		Volumes: make([]Volume, 0, len(r.Volumes)),
	}
	if d := r.DRBD; d != nil {
		row.DRBD = &DRBD{
			NodeID: d.NodeID, PeerSlots: d.PeerSlots, Flags: d.Flags, PromotionScore: d.PromotionScore, MayPromote: d.MayPromote,
			Connections: d.Connections,
		}
	}
	for _, v := range r.Volumes {
		row.Volumes = append(row.Volumes, Volume{
			Number: v.Number, Pool: v.Pool, Provider: v.Provider, AllocatedKiB: v.AllocatedKiB, UsableKiB: v.UsableKiB,
			DevicePath: v.DevicePath, Flags: v.Flags, DiskState: v.DiskState, Replication: v.Replication,
		})
	}
	return row
}

func nodeRow(n linstor.Node) linstor.Node {
	n.Props = public(n.Props)
	return n
}

func definitionRow(d linstor.Definition) linstor.Definition {
	d.Props = public(d.Props)
	return d
}

func poolKey(p linstor.StoragePool) string { return p.Name + "/" + p.Node }

func resourceKey(r linstor.Resource) string { return r.Name + "/" + r.Node }

// thin tells whether a pool's free space shrinks by guests writing, without LINSTOR knowing.
func thin(provider string) bool { return strings.HasSuffix(provider, "_THIN") }

// public leaves out what programs outside must not read.
func public(props map[string]string) map[string]string {
	clean := true
	for k := range props {
		clean = clean && !confidential(k)
	}
	if clean {
		return props
	}
	props = maps.Clone(props)
	maps.DeleteFunc(props, func(k, _ string) bool { return confidential(k) })
	return props
}

// confidential tells by the name whether a property holds a secret.
func confidential(key string) bool {
	key = strings.ToLower(key)
	for _, word := range []string{"secret", "password", "passphrase", "passwd"} {
		if strings.Contains(key, word) {
			return true
		}
	}
	return false
}
