package linstor

import (
	"encoding/json"
	"io"
)

// The wire types name only what the agents use; encoding/json skips the rest without keeping it.
type wireResource struct {
	Name      string            `json:"name"`
	Node      string            `json:"node_name"`
	UUID      string            `json:"uuid"`
	Flags     []string          `json:"flags"`
	Props     map[string]string `json:"props"`
	CreatedMs int64             `json:"create_timestamp"`
	State     struct {
		InUse *bool `json:"in_use"`
	} `json:"state"`
	Layer   wireLayer    `json:"layer_object"`
	Volumes []wireVolume `json:"volumes"`
}

type wireLayer struct {
	DRBD     *wireDRBD   `json:"drbd"`
	Children []wireLayer `json:"children"`
}

type wireDRBD struct {
	NodeID         *int32                `json:"node_id"`
	PeerSlots      *int32                `json:"peer_slots"`
	Ports          []int32               `json:"tcp_ports"`
	Flags          []string              `json:"flags"`
	PromotionScore *int32                `json:"promotion_score"`
	MayPromote     *bool                 `json:"may_promote"`
	Connections    map[string]Connection `json:"connections"`
	Volumes        []struct {
		Definition struct {
			Number int32 `json:"volume_number"`
		} `json:"drbd_volume_definition"`
		UsableKiB *int64 `json:"usable_size_kib"`
	} `json:"drbd_volumes"`
}

type wireVolume struct {
	Number       int32    `json:"volume_number"`
	Pool         string   `json:"storage_pool_name"`
	Provider     string   `json:"provider_kind"`
	DevicePath   string   `json:"device_path"`
	AllocatedKiB *int64   `json:"allocated_size_kib"`
	UsableKiB    *int64   `json:"usable_size_kib"`
	Flags        []string `json:"flags"`
	Reports      []Entry  `json:"reports"`
	State        struct {
		DiskState   string                 `json:"disk_state"`
		Replication map[string]Replication `json:"replication_states"`
	} `json:"state"`
}

// decodeEach decodes a list of resources element by element into compact values.
func decodeEach(body io.Reader, each func(Resource)) error {
	in := interner{}
	var w wireResource
	return eachElement(body, func(dec *json.Decoder) error {
		w = wireResource{Volumes: w.Volumes[:0], Props: w.Props}
		clear(w.Props) // encoding/json merges into what a reused value still holds.
		clear(w.Volumes[:cap(w.Volumes)])
		if err := dec.Decode(&w); err != nil {
			return err
		}
		each(w.resource(in))
		return nil
	})
}

// interner keeps one copy of strings that repeat in every element: node, pool and flag names, states. What is unique
// (uuids, device paths) does not go through it.
type interner map[string]string

func (in interner) of(s string) string {
	if known, ok := in[s]; ok {
		return known
	}
	in[s] = s
	return s
}

func (in interner) all(list []string) []string {
	for i, s := range list {
		list[i] = in.of(s)
	}
	return list
}

func (w *wireResource) resource(in interner) Resource {
	r := Resource{
		Name: in.of(w.Name), Node: in.of(w.Node), UUID: w.UUID, Flags: in.all(w.Flags),
		InUse: w.State.InUse, Props: internMap(in, w.Props), CreatedMs: w.CreatedMs,
	}
	layer := w.Layer.drbd()
	if layer != nil {
		r.DRBD = layer.compact(in)
	}
	if len(w.Volumes) > 0 {
		r.Volumes = make([]Volume, len(w.Volumes))
		for i := range w.Volumes {
			r.Volumes[i] = w.Volumes[i].volume(in, layer)
		}
	}
	return r
}

// drbd finds the DRBD layer, which may lie under other layers.
func (l *wireLayer) drbd() *wireDRBD {
	if l.DRBD != nil {
		return l.DRBD
	}
	for i := range l.Children {
		if d := l.Children[i].drbd(); d != nil {
			return d
		}
	}
	return nil
}

func (d *wireDRBD) compact(in interner) *DRBD {
	c := &DRBD{
		NodeID: d.NodeID, PeerSlots: d.PeerSlots, Ports: d.Ports, Flags: in.all(d.Flags),
		PromotionScore: d.PromotionScore, MayPromote: d.MayPromote,
	}
	if len(d.Connections) > 0 {
		c.Connections = make(map[string]Connection, len(d.Connections))
		for peer, conn := range d.Connections {
			conn.Message = in.of(conn.Message)
			c.Connections[in.of(peer)] = conn
		}
	}
	return c
}

func (w *wireVolume) volume(in interner, layer *wireDRBD) Volume {
	v := Volume{
		Number: w.Number, Pool: in.of(w.Pool), Provider: in.of(w.Provider), DevicePath: w.DevicePath,
		AllocatedKiB: w.AllocatedKiB, UsableKiB: w.UsableKiB, Flags: in.all(w.Flags), Reports: w.Reports,
		DiskState: in.of(w.State.DiskState),
	}
	if v.UsableKiB == nil && layer != nil {
		for _, dv := range layer.Volumes {
			if dv.Definition.Number == w.Number {
				v.UsableKiB = dv.UsableKiB
			}
		}
	}
	if len(w.State.Replication) > 0 {
		v.Replication = make(map[string]Replication, len(w.State.Replication))
		for peer, rep := range w.State.Replication {
			rep.State = in.of(rep.State)
			v.Replication[in.of(peer)] = rep
		}
	}
	return v
}

// internMap copies the map and shares its strings: property names and most values repeat.
func internMap(in interner, m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	shared := make(map[string]string, len(m))
	for k, v := range m {
		shared[in.of(k)] = in.of(v)
	}
	return shared
}
