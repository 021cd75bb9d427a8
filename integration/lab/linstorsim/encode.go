package linstorsim

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ErrorEntry is an ApiCallRc error made by the face itself.
func ErrorEntry(number int, message string) Entry {
	return Entry{Code: maskError | int64(number), Message: message}
}

// SameName compares LINSTOR names, which have no case.
func SameName(a, b string) bool { return strings.EqualFold(a, b) }

// Has134 tells whether a version has the toggle-disk of 1.34.
func Has134(version string) bool { return atLeast(version, 1, 34) }

// RESTVersion is the rest_api_version that a LINSTOR version serves: 1.29 has 1.23.0, each minor version one more.
func RESTVersion(version string) string {
	for minor := 40; minor > 25; minor-- {
		if atLeast(version, 1, minor) {
			return "1." + strconv.Itoa(minor-6) + ".0"
		}
	}
	return "1.20.0"
}

// AppendResources appends the JSON list of resources to b. The resource view is the one answer that gets large (tens of
// megabytes at 64 nodes), and encoding/json spends most of a second on it; this writes the same JSON by hand. A test holds
// it equal to encoding/json.
func AppendResources(b []byte, rs []Resource) []byte {
	const usual = 2048 // bytes of one resource with one volume and two peers
	b = append(slices.Grow(b, 2+usual*len(rs)), '[')
	for i := range rs {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendResource(b, &rs[i])
	}
	return append(b, ']')
}

func appendResource(b []byte, r *Resource) []byte {
	b = appendString(append(b, `{"name":`...), r.Name)
	b = appendString(append(b, `,"node_name":`...), r.NodeName)
	b = appendProps(b, `,"props":`, r.Props)
	b = appendStrings(b, `,"flags":`, r.Flags)
	b = appendLayer(append(b, `,"layer_object":`...), &r.LayerObject)
	if r.State != nil {
		b = append(b, `,"state":{`...)
		if r.State.InUse != nil {
			b = strconv.AppendBool(append(b, `"in_use":`...), *r.State.InUse)
		}
		b = append(b, '}')
	}
	b = appendText(b, `,"uuid":`, r.UUID)
	if r.CreateTimestamp != nil {
		b = strconv.AppendInt(append(b, `,"create_timestamp":`...), *r.CreateTimestamp, 10)
	}
	if len(r.Volumes) > 0 {
		b = append(b, `,"volumes":[`...)
		for i := range r.Volumes {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendVolume(b, &r.Volumes[i])
		}
		b = append(b, ']')
	}
	return append(b, '}')
}

func appendLayer(b []byte, l *ResourceLayer) []byte {
	b = append(b, '{')
	if len(l.Children) > 0 {
		b = append(b, `"children":[`...)
		for i := range l.Children {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendLayer(b, &l.Children[i])
		}
		b = append(b, `],`...)
	}
	b = appendString(append(b, `"type":`...), l.Type)
	if l.Drbd != nil {
		b = appendDrbd(append(b, `,"drbd":`...), l.Drbd)
	}
	if l.Storage != nil {
		b = append(b, `,"storage":{`...)
		if len(l.Storage.Volumes) > 0 {
			b = append(b, `"storage_volumes":[`...)
			for i := range l.Storage.Volumes {
				if i > 0 {
					b = append(b, ',')
				}
				b = appendStorageVolume(b, &l.Storage.Volumes[i])
			}
			b = append(b, ']')
		}
		b = append(b, '}')
	}
	return append(b, '}')
}

func appendDrbd(b []byte, d *DrbdResource) []byte {
	b = append(b, '{')
	if def := d.Definition; def != nil {
		b = appendNumber(b, `"drbd_resource_definition":{"peer_slots":`, def.PeerSlots)
		b = appendNumber(b, `,"al_stripes":`, def.AlStripes)
		b = strconv.AppendInt(append(b, `,"al_stripe_size_kib":`...), def.AlStripeSize, 10)
		b = appendNumber(b, `,"port":`, def.Port)
		b = appendText(b, `,"transport_type":`, def.TransportType)
		b = appendText(b, `,"secret":`, def.Secret)
		b = append(strconv.AppendBool(append(b, `,"down":`...), def.Down), `},`...)
	}
	b = appendNumber(b, `"node_id":`, d.NodeID)
	if len(d.TCPPorts) > 0 {
		b = append(b, `,"tcp_ports":[`...)
		for i, p := range d.TCPPorts {
			if i > 0 {
				b = append(b, ',')
			}
			b = strconv.AppendInt(b, int64(p), 10)
		}
		b = append(b, ']')
	}
	b = appendNumber(b, `,"peer_slots":`, d.PeerSlots)
	b = appendNumber(b, `,"al_stripes":`, d.AlStripes)
	b = strconv.AppendInt(append(b, `,"al_size":`...), d.AlSize, 10)
	b = appendStrings(b, `,"flags":`, d.Flags)
	if len(d.Volumes) > 0 {
		b = append(b, `,"drbd_volumes":[`...)
		for i := range d.Volumes {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendDrbdVolume(b, &d.Volumes[i])
		}
		b = append(b, ']')
	}
	if len(d.Connections) > 0 {
		b = append(b, `,"connections":`...)
		b = appendMap(b, d.Connections, func(b []byte, c DrbdConnection) []byte {
			b = strconv.AppendBool(append(b, `{"connected":`...), c.Connected)
			return append(appendText(b, `,"message":`, c.Message), '}')
		})
	}
	if d.PromotionScore != nil {
		b = appendNumber(b, `,"promotion_score":`, *d.PromotionScore)
	}
	if d.MayPromote != nil {
		b = strconv.AppendBool(append(b, `,"may_promote":`...), *d.MayPromote)
	}
	return append(b, '}')
}

func appendDrbdVolume(b []byte, v *DrbdVolume) []byte {
	b = append(b, '{')
	if v.Definition != nil {
		b = appendNumber(b, `"drbd_volume_definition":{"volume_number":`, v.Definition.VolumeNumber)
		b = append(appendNumber(b, `,"minor_number":`, v.Definition.MinorNumber), `},`...)
	}
	if v.DevicePath != "" {
		b = append(appendString(append(b, `"device_path":`...), v.DevicePath), ',')
	}
	if v.BackingDevice != "" {
		b = append(appendString(append(b, `"backing_device":`...), v.BackingDevice), ',')
	}
	b = strconv.AppendInt(append(b, `"allocated_size_kib":`...), v.AllocatedKiB, 10)
	b = strconv.AppendInt(append(b, `,"usable_size_kib":`...), v.UsableKiB, 10)
	return append(b, '}')
}

func appendStorageVolume(b []byte, v *StorageVolume) []byte {
	b = appendNumber(b, `{"volume_number":`, v.Number)
	b = appendText(b, `,"device_path":`, v.DevicePath)
	b = strconv.AppendInt(append(b, `,"allocated_size_kib":`...), v.AllocatedKiB, 10)
	b = strconv.AppendInt(append(b, `,"usable_size_kib":`...), v.UsableKiB, 10)
	return append(appendText(b, `,"disk_state":`, v.DiskState), '}')
}

func appendVolume(b []byte, v *Volume) []byte {
	b = appendNumber(b, `{"volume_number":`, v.Number)
	b = appendText(b, `,"storage_pool_name":`, v.PoolName)
	b = appendText(b, `,"provider_kind":`, v.ProviderKind)
	b = appendText(b, `,"device_path":`, v.DevicePath)
	if v.AllocatedKiB != nil {
		b = strconv.AppendInt(append(b, `,"allocated_size_kib":`...), *v.AllocatedKiB, 10)
	}
	if v.UsableKiB != nil {
		b = strconv.AppendInt(append(b, `,"usable_size_kib":`...), *v.UsableKiB, 10)
	}
	b = appendProps(b, `,"props":`, v.Props)
	b = appendStrings(b, `,"flags":`, v.Flags)
	if v.State != nil {
		b = append(b, `,"state":{`...)
		b = appendString(append(b, `"disk_state":`...), v.State.DiskState)
		if len(v.State.ReplicationStates) > 0 {
			b = append(b, `,"replication_states":`...)
			b = appendMap(b, v.State.ReplicationStates, appendReplication)
		}
		b = append(b, '}')
	}
	for i, l := range v.LayerData {
		b = appendSeparator(b, i, `,"layer_data_list":[`)
		b = appendString(append(b, `{"type":`...), l.Type)
		switch d := l.Data.(type) {
		case *DrbdVolume:
			b = appendDrbdVolume(append(b, `,"data":`...), d)
		case *StorageVolume:
			b = appendStorageVolume(append(b, `,"data":`...), d)
		}
		b = append(b, '}')
		if i == len(v.LayerData)-1 {
			b = append(b, ']')
		}
	}
	b = appendText(b, `,"uuid":`, v.UUID)
	if len(v.Reports) > 0 {
		b = appendAny(append(b, `,"reports":`...), v.Reports) // only on offline nodes
	}
	return append(b, '}')
}

func appendReplication(b []byte, s ReplicationState) []byte {
	b = appendString(append(b, `{"replication_state":`...), s.State)
	if s.Done != nil {
		b = appendAny(append(b, `,"done_percentage":`...), *s.Done)
	}
	return append(b, '}')
}

func appendSeparator(b []byte, i int, first string) []byte {
	if i == 0 {
		return append(b, first...)
	}
	return append(b, ',')
}

func appendNumber(b []byte, field string, n int) []byte {
	return strconv.AppendInt(append(b, field...), int64(n), 10)
}

func appendText(b []byte, field, s string) []byte {
	if s == "" {
		return b
	}
	return appendString(append(b, field...), s)
}

func appendStrings(b []byte, field string, list []string) []byte {
	for i, s := range list {
		b = appendString(appendSeparator(b, i, field+"["), s)
	}
	if len(list) > 0 {
		b = append(b, ']')
	}
	return b
}

func appendProps(b []byte, field string, p Props) []byte {
	if len(p) == 0 {
		return b
	}
	return appendMap(append(b, field...), p, appendString)
}

// appendMap writes keys in order, so that equal states give equal bytes.
func appendMap[V any](b []byte, m map[string]V, value func([]byte, V) []byte) []byte {
	var few [8]string
	keys := few[:0]
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	b = append(b, '{')
	for i, k := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = value(append(appendString(b, k), ':'), m[k])
	}
	return append(b, '}')
}

func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' || c >= utf8.RuneSelf {
			return appendAny(b, s)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

func appendAny(b []byte, v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings, numbers and entries always encode
	}
	return append(b, raw...)
}
