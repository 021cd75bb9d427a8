package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// VHD facts of the driver (linstorvhdutil.py 443-454, vhdutil.py 65-89): metadata for the largest disk, and one bitmap per block.
const (
	vhdMetadata = 4_329_472
	vhdBlock    = 2 * mib
	vhdBitmap   = 4096
	peerSlots   = 3 // LVMgr:2634
)

// disk is one VDI and its chain position.
type disk struct {
	uuid, ref, resource string
	virtual             int64 // bytes
	hidden              bool
	parent              string // uuid, "" for the root of a chain
	holders             map[string]int
}

// VolumeBytes is the size of the LINSTOR volume that SM makes for a VHD of this virtual size, both in bytes.
func VolumeBytes(virtual int64) int64 {
	n := virtual + vhdMetadata + (virtual+vhdBlock-1)/vhdBlock*vhdBitmap
	return (n + 511) &^ 511
}

// backend is the error that XAPI passes on from the driver.
func backend(format string, args ...any) error {
	return xapidb.Errorf("SR_BACKEND_FAILURE_46", "", fmt.Sprintf(format, args...), "")
}

// ready tells why the driver cannot work now: each SM command looks for the controller first.
func (p *Pool) ready() error {
	if c := p.linstor.Controller(); c.Phase != linstorsim.Up {
		return backend("Unable to reach LINSTOR controller")
	}
	if p.down[p.Coordinator().Name] {
		return fmt.Errorf("coordinator %s is down", p.Coordinator().Name)
	}
	return nil
}

// CreateDisk makes a VDI of this virtual size in bytes, with SM's sequence of effects, and returns its uuid.
func (p *Pool) CreateDisk(size int64) (string, error) {
	ids, err := p.CreateDisks(1, size)
	if err != nil {
		return "", err
	}
	return ids[0], nil
}

// CreateDisks makes n VDIs as CreateDisk does, in bulk: the KV entries and the SR's statistics are written once, and replicas go to the hosts in turn instead of asking the auto-placer. What was made
// before an error stays.
func (p *Pool) CreateDisks(n int, size int64) (ids []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(); err != nil {
		return nil, err
	}
	if n > 1 {
		p.bulk = &bulk{kv: linstorsim.Props{}}
		defer func() {
			batch := p.bulk.kv
			p.bulk = nil
			err = errors.Join(err, p.linstor.KVModify(p.group, linstorsim.PropsChange{Override: batch}).Err())
		}()
	}
	for range n {
		d, err := p.createDisk(fmt.Sprintf("disk %d", len(p.disks)+1), size)
		if err != nil {
			return ids, err
		}
		ids = append(ids, d.uuid)
	}
	return ids, p.pushStats(int64(n) * size)
}

// bulk is the state of a CreateDisks that makes many.
type bulk struct {
	kv   linstorsim.Props
	next int // host of the next replica
}

func (p *Pool) createDisk(label string, size int64) (*disk, error) {
	if size <= 0 {
		return nil, xapidb.Errorf("SR_BACKEND_FAILURE_79", "", "VDI Invalid size", "")
	}
	d := &disk{uuid: p.db.NewUUID(), virtual: size, holders: map[string]int{}}
	if err := p.createVolume(d); err != nil {
		return nil, err
	}
	if err := p.persist(d, metadata{Name: label, Type: "user", VDIType: "vhd"}); err != nil {
		return nil, err
	}
	return d, p.introduce(d, label, map[string]any{})
}

// createVolume makes the LINSTOR side of a disk up to its formatted VHD: the KV entry says "creating" (LVMgr:619-681, 2206-2360).
func (p *Pool) createVolume(d *disk) error {
	d.resource = "xcp-volume-" + p.db.NewUUID()
	if err := p.setVolume(d.uuid, linstorsim.Props{"not-exists": "2", "volume-name": d.resource}); err != nil {
		return err
	}
	err := p.spawn(d.resource, VolumeBytes(d.virtual))
	if err != nil {
		p.cleanVolume(d)
		return backend("Unable to create volume: %v", err)
	}
	p.format(d.resource)
	return nil
}

func (p *Pool) spawn(resource string, bytes int64) error {
	r := p.linstor.SpawnWith(p.group, linstorsim.SpawnRequest{
		Name: resource, SizesKiB: []int64{(bytes + kib - 1) / kib}, DefinitionsOnly: true, PeerSlots: peerSlots,
	})
	if err := r.Err(); err != nil {
		return err
	}
	redundancy, err := p.placeCount()
	if err != nil {
		return err
	}
	if err := p.place(resource, redundancy); err != nil {
		return err
	}
	return p.makeAvailable(resource, p.Coordinator().Name)
}

// cleanVolume is what the driver does about a volume that it could not make.
func (p *Pool) cleanVolume(d *disk) {
	_ = p.setVolume(d.uuid, linstorsim.Props{"not-exists": "1"})
	_ = p.linstor.DeleteDefinition(d.resource)
	_ = p.clearVolume(d.uuid)
}

type metadata struct {
	Name         string `json:"name_label"`
	Description  string `json:"name_description"`
	IsASnapshot  bool   `json:"is_a_snapshot"`
	SnapshotOf   string `json:"snapshot_of"`
	SnapshotTime string `json:"snapshot_time"`
	Type         string `json:"type"`
	VDIType      string `json:"vdi_type"`
	ReadOnly     bool   `json:"read_only"`
	Pool         string `json:"metadata_of_pool"`
}

// persist writes the metadata and marks the volume as existing, the end of a creation (LSR:1673-1714).
func (p *Pool) persist(d *disk, m metadata) error {
	if err := p.setMetadata(d, m); err != nil {
		return err
	}
	return p.setVolume(d.uuid, linstorsim.Props{"not-exists": "0"})
}

func (p *Pool) setMetadata(d *disk, m metadata) error {
	text, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode metadata of %s: %w", d.uuid, err)
	}
	return p.setVolume(d.uuid, linstorsim.Props{"metadata": string(text)})
}

func (p *Pool) metadataOf(uuid string) (m metadata) {
	kv, _ := p.linstor.KVGet(p.group)
	_ = json.Unmarshal([]byte(kv.Props["xcp/volume/"+uuid+"/metadata"]), &m) // Empty when there is none.
	return m
}

// setVolume writes keys of one volume's namespace, one request each as linstor-api-py does, in the order of their names.
func (p *Pool) setVolume(uuid string, props linstorsim.Props) error {
	for _, k := range slices.Sorted(maps.Keys(props)) {
		if p.bulk != nil {
			p.bulk.kv["xcp/volume/"+uuid+"/"+k] = props[k]
			continue
		}
		if err := p.linstor.KVSet(p.group, "/xcp/volume/"+uuid+"/"+k, props[k]).Err(); err != nil {
			return backend("Unable to write KV of %s: %v", uuid, err)
		}
	}
	return nil
}

func (p *Pool) clearVolume(uuid string) error {
	return p.linstor.KVModify(p.group, linstorsim.PropsChange{DeleteNamespaces: []string{"/xcp/volume/" + uuid}}).Err()
}

// introduce adds the VDI to XAPI, with the utilisation that the driver reads from LINSTOR after it has formatted the VHD.
func (p *Pool) introduce(d *disk, label string, extra map[string]any) error {
	fields := map[string]any{
		"uuid": d.uuid, "name_label": label, "SR": p.sr, "location": d.uuid, "virtual_size": d.virtual, "physical_utilisation": p.allocated(d.resource),
		"type": "user", "managed": !d.hidden, "sm_config": map[string]string{"vdi_type": "vhd"},
		"allowed_operations": []string{"snapshot", "clone", "destroy", "resize", "update", "forget"},
	}
	maps.Copy(fields, extra)
	ref, err := p.db.Create("VDI", fields)
	if err != nil {
		return fmt.Errorf("introduce VDI: %w", err)
	}
	d.ref = ref
	p.disks[d.uuid] = d
	return nil
}

// DeleteDisk destroys a VDI: VDI_IN_USE while something holds it.
func (p *Pool) DeleteDisk(uuid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, err := p.disk(uuid)
	if err != nil {
		return err
	}
	if err := p.ready(); err != nil {
		return err
	}
	if len(d.holders) > 0 {
		return xapidb.Errorf("VDI_IN_USE", d.ref, "destroy")
	}
	if slices.ContainsFunc(slices.Collect(maps.Values(p.disks)), func(c *disk) bool { return c.parent == uuid }) {
		return backend("VDI %s has children", uuid)
	}
	if err := p.destroyVolume(d); err != nil {
		return err
	}
	if err := p.db.Destroy("VDI", d.ref); err != nil {
		return err
	}
	delete(p.disks, uuid)
	return p.pushStats(-d.visible())
}

func (d *disk) visible() int64 {
	if d.hidden {
		return 0
	}
	return d.virtual
}

func (p *Pool) destroyVolume(d *disk) error {
	if err := p.setVolume(d.uuid, linstorsim.Props{"not-exists": "1"}); err != nil {
		return err
	}
	if err := p.linstor.DeleteDefinition(d.resource).Err(); err != nil {
		return backend("Unable to delete volume: %v", err)
	}
	return p.clearVolume(d.uuid)
}

// disk finds a VDI by uuid: UUID_INVALID.
func (p *Pool) disk(uuid string) (*disk, error) {
	d, ok := p.disks[uuid]
	if !ok {
		return nil, xapidb.Errorf("UUID_INVALID", "VDI", uuid)
	}
	return d, nil
}

// ResizeDisk grows a VDI's virtual size. A thick volume grows at once, a thin one at its next attach (LSR:1940-1965). Shrinking, a disk in use and a
// hidden one are refused, as by the driver.
func (p *Pool) ResizeDisk(uuid string, size int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, err := p.disk(uuid)
	if err != nil {
		return err
	}
	switch {
	case len(d.holders) > 0:
		return xapidb.Errorf("VDI_IN_USE", d.ref, "resize")
	case d.hidden:
		return backend("hidden VDI")
	case size < d.virtual:
		return xapidb.Errorf("SR_BACKEND_FAILURE_79", "", "shrinking not allowed", "")
	}
	if err := p.ready(); err != nil {
		return err
	}
	if p.o.Thick {
		if err := p.inflate(d, size); err != nil {
			return err
		}
	}
	delta := size - d.virtual
	d.virtual = size
	if err := p.db.Set("VDI", d.ref, "virtual_size", size); err != nil {
		return err
	}
	if err := p.db.Set("VDI", d.ref, "physical_utilisation", p.allocated(d.resource)); err != nil {
		return err
	}
	return p.pushStats(delta)
}

// inflate grows the LINSTOR volume to what a VHD of this virtual size needs, under a journal (LVU:346-373).
func (p *Pool) inflate(d *disk, virtual int64) error {
	old, want := p.volumeKiB(d.resource), (VolumeBytes(virtual)+kib-1)/kib
	if want <= old {
		return nil
	}
	journal := "xcp/sr/journal/inflate/" + d.uuid
	if err := p.linstor.KVSet(p.group, journal, strconv.FormatInt(old*kib, 10)).Err(); err != nil {
		return err
	}
	grown := p.linstor.ModifyVolumeDefinition(d.resource, 0, want, linstorsim.PropsChange{}).Err()
	if err := p.linstor.KVModify(p.group, linstorsim.PropsChange{Delete: []string{journal}}).Err(); err != nil {
		return err
	}
	if grown != nil {
		return backend("Unable to resize volume: %v", grown)
	}
	return nil
}

// SnapshotDisk takes a snapshot and returns its uuid. The data stays where it is and becomes a hidden base with a uuid of its own; the disk and the snapshot are
// two new, empty children of full size (LSR:2331-2533).
func (p *Pool) SnapshotDisk(uuid string) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, err := p.disk(uuid)
	if err != nil {
		return "", err
	}
	if err := p.ready(); err != nil {
		return "", err
	}
	if p.depth(d) >= 30 {
		return "", backend("Snapshot chain too long")
	}
	base := &disk{uuid: p.db.NewUUID(), resource: d.resource, virtual: d.virtual, hidden: true, parent: d.parent, holders: map[string]int{}}
	snap := &disk{uuid: p.db.NewUUID(), virtual: d.virtual, parent: base.uuid, holders: map[string]int{}}
	journal := "xcp/sr/journal/clone/" + uuid
	if err := p.linstor.KVSet(p.group, journal, base.uuid+"_"+snap.uuid).Err(); err != nil {
		return "", err
	}
	err = p.split(d, base, snap)
	if err != nil {
		p.unsplit(d, base, snap)
	}
	if kvErr := p.linstor.KVModify(p.group, linstorsim.PropsChange{Delete: []string{journal}}).Err(); err == nil {
		err = kvErr
	}
	if err != nil {
		return "", err
	}
	return snap.uuid, p.pushStats(d.virtual)
}

// unsplit reverts an interrupted snapshot, as the driver always does (LSR:1346-1468): the children go, the base gets its old uuid back.
func (p *Pool) unsplit(d, base, snap *disk) {
	for _, child := range []*disk{d, snap} {
		if child.resource != "" && child.resource != base.resource {
			p.cleanVolume(child)
		}
	}
	_ = p.rename(base.uuid, d.uuid) // Fails only without a controller, which ready has seen.
	d.parent, d.resource = base.parent, base.resource
	for host := range d.holders {
		p.setInUse(d.resource, host, true)
	}
}

func (p *Pool) depth(d *disk) int {
	n := 0
	for d != nil {
		d = p.disks[d.parent]
		n++
	}
	return n
}

func (p *Pool) split(d, base, snap *disk) error {
	m := p.metadataOf(d.uuid)
	if err := p.rename(d.uuid, base.uuid); err != nil {
		return err
	}
	d.parent = base.uuid
	for _, child := range []*disk{d, snap} {
		if err := p.createVolume(child); err != nil {
			return err
		}
		cm := m
		cm.IsASnapshot = child == snap
		if child == snap {
			cm.SnapshotOf = d.uuid
		}
		if err := p.persist(child, cm); err != nil {
			return err
		}
	}
	m.ReadOnly = true
	if err := p.setMetadata(base, m); err != nil {
		return err
	}
	for host := range d.holders {
		p.setInUse(base.resource, host, false)
		if err := p.makeAvailable(d.resource, host); err != nil {
			return backend("Unable to attach new leaf: %v", err)
		}
		p.setInUse(d.resource, host, true)
	}
	return p.introduceChain(d, base, snap, m.Name)
}

func (p *Pool) introduceChain(d, base, snap *disk, label string) error {
	parent := map[string]string{"vdi_type": "vhd", "vhd-parent": base.uuid}
	if err := p.introduce(snap, label, map[string]any{
		"sm_config": parent, "is_a_snapshot": true, "snapshot_of": d.ref, "snapshot_time": p.clock.Now(),
	}); err != nil {
		return err
	}
	if err := p.introduce(base, "base copy", map[string]any{"read_only": true}); err != nil {
		return err
	}
	if err := p.db.Set("VDI", d.ref, "physical_utilisation", p.allocated(d.resource)); err != nil {
		return err
	}
	return p.db.PutInMap("VDI", d.ref, "sm_config", "vhd-parent", base.uuid)
}

// rename moves a volume's KV entry to another uuid, write by write as the driver does; the resource keeps its name (LVMgr:993-1107).
func (p *Pool) rename(src, dst string) error {
	kv, _ := p.linstor.KVGet(p.group)
	get := func(k string) string { return kv.Props["xcp/volume/"+src+"/"+k] }
	for _, step := range []linstorsim.Props{
		{"not-exists": "1"}, {"updating-uuid-src": src}, {"metadata": get("metadata")}, {"volume-name": get("volume-name")}, {"not-exists": "0"},
	} {
		if err := p.setVolume(dst, step); err != nil {
			return err
		}
	}
	if err := p.clearVolume(src); err != nil {
		return err
	}
	return p.linstor.KVModify(p.group, linstorsim.PropsChange{Delete: []string{"xcp/volume/" + dst + "/updating-uuid-src"}}).Err()
}

// SRScan is SR.scan: all three sizes and every VDI's utilisation from what the controller tells, right or wrong. It fails, and writes nothing, when a replica tells a
// negative size (LVMgr:499-536).
func (p *Pool) SRScan() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(); err != nil {
		return err
	}
	view, err := p.controllerView()
	if err != nil {
		return err
	}
	var virtual int64
	for _, uuid := range slices.Sorted(maps.Keys(p.disks)) {
		d := p.disks[uuid]
		virtual += d.visible()
		if bytes, ok := view.allocated[d.resource]; ok {
			if err := p.db.Set("VDI", d.ref, "physical_utilisation", bytes); err != nil {
				return err
			}
		}
	}
	return p.writeStats(view, virtual)
}

// SRUpdate is SR.update: the three sizes; the virtual allocation stays what XAPI has.
func (p *Pool) SRUpdate() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(); err != nil {
		return err
	}
	return p.pushStats(0)
}

// pushStats is the driver's _update_stats: sizes from LINSTOR, virtual allocation as XAPI has it plus a delta.
func (p *Pool) pushStats(delta int64) error {
	view, err := p.controllerView()
	if err != nil {
		return err
	}
	return p.writeStats(view, xapidb.Value[int64](p.db, "SR", p.sr, "virtual_allocation")+delta)
}

// writeStats writes in the order of SR._db_update (drivers/SR.py:379).
func (p *Pool) writeStats(v controllerView, virtual int64) error {
	for _, f := range []struct {
		name  string
		value int64
	}{{"virtual_allocation", virtual}, {"physical_size", v.size}, {"physical_utilisation", v.used}} {
		if err := p.db.Set("SR", p.sr, f.name, f.value); err != nil {
			return err
		}
	}
	return nil
}

// controllerView is what the driver computes from the controller's answers, in bytes.
type controllerView struct {
	size, used int64
	allocated  map[string]int64 // by resource
}

// controllerView applies the driver's formulas with its defect: a pool that tells no free space drops out of the minimum and of the count (LVMgr:499-559).
func (p *Pool) controllerView() (controllerView, error) {
	v := controllerView{allocated: map[string]int64{}}
	var smallest, count int64
	for _, sp := range p.linstor.Pools(nil, []string{p.group}, nil, false) {
		if sp.FreeCapacity == nil || sp.TotalCapacity == nil {
			continue
		}
		if count == 0 || *sp.TotalCapacity < smallest {
			smallest = *sp.TotalCapacity
		}
		count++
	}
	if count == 0 {
		return v, backend("Failed to get physical size: no storage pool")
	}
	redundancy, err := p.placeCount()
	if err != nil {
		return v, err
	}
	v.size = smallest * kib * count / redundancy
	for _, r := range p.view() {
		for _, vol := range r.Volumes {
			if !strings.EqualFold(vol.PoolName, p.group) || vol.AllocatedKiB == nil {
				continue
			}
			if *vol.AllocatedKiB < 0 {
				return v, backend("Failed to get allocated size of `%s`: value is negative on `%s`", r.Name, r.NodeName)
			}
			v.allocated[r.Name] = max(v.allocated[r.Name], *vol.AllocatedKiB*kib)
		}
	}
	for _, bytes := range v.allocated {
		v.used += bytes
	}
	return v, nil
}

// placeCount is the redundancy that the driver uses: the group's, not the PBD's (LVMgr:388-431).
func (p *Pool) placeCount() (int64, error) {
	groups := p.linstor.Groups([]string{p.group}, nil)
	if len(groups) == 0 {
		return 0, backend("Unable to find resource group `%s`", p.group)
	}
	if f := groups[0].SelectFilter; f != nil && f.PlaceCount != nil && *f.PlaceCount > 0 {
		return int64(*f.PlaceCount), nil
	}
	return 0, backend("integer division or modulo by zero")
}
