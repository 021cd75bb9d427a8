package linstorsim

import (
	"fmt"
	"math"
	"slices"
)

// ResourceFilter narrows Resources; empty lists mean all.
type ResourceFilter struct {
	Names, Nodes, Pools, Props []string
	// Volumes asks for volumes with their live state, as /v1/view/resources does: satellites with thin pools are
	// asked, and resources without volumes are left out.
	Volumes bool
}

// Resources lists resources by definition and node.
func (c *Cluster) Resources(f ResourceFilter) []Resource {
	defer c.lock(false)()
	out := []Resource{}
	for _, rd := range c.named(f.Names) {
		out = c.appendResources(out, rd, f)
	}
	return out
}

// named returns the definitions of the names that exist, or all, in name order.
func (c *Cluster) named(names []string) []*definition {
	if len(names) == 0 {
		return sorted(c.rds)
	}
	some := make(map[string]*definition, len(names))
	for _, name := range names {
		if rd := c.rds[key(name)]; rd != nil {
			some[key(name)] = rd
		}
	}
	return sorted(some)
}

func (c *Cluster) appendResources(out []Resource, rd *definition, f ResourceFilter) []Resource {
	places := rd.places()
	for _, r := range places {
		if !nameIn(f.Nodes, r.node.name) || !propsMatch(r.props, f.Props) {
			continue
		}
		rec := c.resourceRecord(r, places)
		if f.Volumes {
			for _, v := range r.vols {
				if nameIn(f.Pools, v.poolName()) {
					rec.Volumes = append(rec.Volumes, c.volumeRecord(v, places, &rec))
				}
			}
			if len(rec.Volumes) == 0 {
				continue
			}
		}
		out = append(out, rec)
	}
	return out
}

// ResourceExists tells whether the definition and the place exist.
func (c *Cluster) ResourceExists(resource, nodeName string) (definition, place bool) {
	defer c.lock(false)()
	rd := c.rds[key(resource)]
	return rd != nil, rd != nil && rd.rsc[key(nodeName)] != nil
}

func (v *volume) poolName() string {
	switch {
	case v.pool != nil:
		return v.pool.name
	case v.rsc.diskful():
		return v.rsc.wantPool
	}
	return DisklessPool
}

func (v *volume) kind() string {
	if v.pool != nil {
		return v.pool.kind
	}
	if p := v.rsc.node.pools[key(v.poolName())]; p != nil {
		return p.kind
	}
	return "DISKLESS"
}

func (c *Cluster) resourceRecord(r *resource, places []*resource) Resource {
	rd := r.rd
	drbd := &DrbdResource{Definition: rd.drbd(), NodeID: r.nodeID, TCPPorts: []int{rd.port}, PeerSlots: rd.peerSlots,
		AlStripes: 1, AlSize: 32, MayPromote: r.mayPromote}
	storage := &StorageResource{}
	for _, v := range r.vols {
		drbd.Volumes = append(drbd.Volumes, v.drbdRecord())
		storage.Volumes = append(storage.Volumes, v.storageRecord())
	}
	rec := Resource{Name: rd.name, NodeName: r.node.name, Props: r.props, Flags: flagNames(rscFlags, r.flags), UUID: r.uuid,
		CreateTimestamp: ptr(r.created.UnixMilli()),
		LayerObject:     ResourceLayer{Type: "DRBD", Drbd: drbd, Children: []ResourceLayer{{Type: "STORAGE", Storage: storage}}}}
	if r.node.online() && r.flags&rscInactive == 0 {
		rec.State = &ResourceState{InUse: r.usage()}
		drbd.PromotionScore = ptr(r.score(places, c))
		drbd.Connections = make(map[string]DrbdConnection, len(places)-1)
		for _, o := range places {
			if o != r {
				drbd.Connections[o.node.name] = c.connectionRecord(r, o)
			}
		}
	}
	return rec
}

func (c *Cluster) connectionRecord(r, o *resource) DrbdConnection {
	if c.linked(r.node, o.node) && o.flags&rscInactive == 0 {
		return DrbdConnection{Connected: true, Message: "Connected"}
	}
	return DrbdConnection{Message: "Connecting"}
}

// score is DRBD's promotion score in its order: own UpToDate disk, access to data, then links.
func (r *resource) score(places []*resource, c *Cluster) int {
	s := 1
	if r.upToDate() {
		s += 10000
	}
	for _, o := range places {
		if o != r && o.upToDate() && c.linked(r.node, o.node) {
			s += 100
		}
	}
	return s
}

func (v *volume) devicePath() string {
	return fmt.Sprintf("/dev/drbd%d", v.minor())
}

func (v *volume) backing() string {
	if v.pool == nil {
		return ""
	}
	return fmt.Sprintf("/dev/%s/%s_%05d", v.pool.name, v.rsc.rd.name, v.nr)
}

// allocatedKiB is what a client reads: from the satellite where it can be asked for a thin volume, else what the
// controller stored last.
func (v *volume) allocatedKiB() int64 {
	switch {
	case v.reported != nil:
		return *v.reported
	case v.pool != nil && v.pool.thin() && v.rsc.node.online():
		return v.allocated
	}
	return v.remembered
}

func (v *volume) drbdRecord() DrbdVolume {
	return DrbdVolume{Definition: &DrbdVolDfn{v.nr, v.minor()}, DevicePath: v.devicePath(), BackingDevice: v.backing(),
		AllocatedKiB: v.remembered, UsableKiB: v.usable()}
}

func (v *volume) usable() int64 {
	if v.pool == nil {
		return v.rsc.rd.volumeDef(v.nr).sizeKiB
	}
	return v.deployedKiB
}

func (v *volume) storageRecord() StorageVolume {
	usable := int64(0)
	if v.pool != nil {
		usable = v.rsc.rd.gross(v.deployedKiB)
	}
	return StorageVolume{Number: v.nr, DevicePath: v.backing(), AllocatedKiB: v.remembered, UsableKiB: usable, DiskState: "[]"}
}

func (c *Cluster) volumeRecord(v *volume, places []*resource, r *Resource) Volume {
	rec := Volume{Number: v.nr, PoolName: v.poolName(), ProviderKind: v.kind(), DevicePath: v.devicePath(),
		AllocatedKiB: ptr(v.allocatedKiB()), UUID: v.uuid}
	for i := range r.LayerObject.Drbd.Volumes {
		if r.LayerObject.Drbd.Volumes[i].Definition.VolumeNumber == v.nr {
			rec.LayerData = []VolumeLayer{{Type: "DRBD", Data: &r.LayerObject.Drbd.Volumes[i]},
				{Type: "STORAGE", Data: &r.LayerObject.Children[0].Storage.Volumes[i]}}
		}
	}
	n := v.rsc.node
	if !n.online() {
		rec.Reports = []Entry{c.notConnected(n)}
		return rec
	}
	rec.State = &VolumeState{DiskState: v.diskState(), ReplicationStates: c.replication(v, places)}
	return rec
}

// diskState is the state as LINSTOR shows it: a running sync is written into it.
func (v *volume) diskState() string {
	if v.syncFrom != nil && !v.paused {
		return fmt.Sprintf("SyncTarget(%.2f%%)", v.donePercent())
	}
	return v.disk
}

func (v *volume) donePercent() float64 {
	if v.syncTotal == 0 {
		return 100
	}
	return math.Floor(float64(v.syncTotal-v.syncLeft)/float64(v.syncTotal)*10000) / 100
}

// replication lists the replication state towards each connected peer; LINSTOR leaves Off out.
func (c *Cluster) replication(v *volume, places []*resource) map[string]ReplicationState {
	out := map[string]ReplicationState{}
	for _, o := range places {
		if o == v.rsc || !c.linked(v.rsc.node, o.node) {
			continue
		}
		peer := o.volume(v.nr)
		if peer == nil {
			continue
		}
		st := ReplicationState{State: "Established"}
		switch {
		case v.syncFrom == o.node:
			st = v.syncState("SyncTarget", "PausedSyncT", v)
		case peer.syncFrom == v.rsc.node:
			st = v.syncState("SyncSource", "PausedSyncS", peer)
		}
		out[o.node.name] = st
	}
	return out
}

func (v *volume) syncState(running, paused string, target *volume) ReplicationState {
	st := ReplicationState{State: running, Done: ptr(target.donePercent())}
	if target.paused {
		st.State = paused
	}
	return st
}

// SyncedOnAll tells whether all volumes of all diskful replicas are UpToDate; ok is false for an unknown definition.
func (c *Cluster) SyncedOnAll(resource string) (synced, ok bool) {
	defer c.lock(false)()
	rd := c.rds[key(resource)]
	if rd == nil {
		return false, false
	}
	for _, r := range rd.rsc {
		if r.diskful() && (!r.node.online() || !r.upToDate()) {
			return false, true
		}
	}
	return true, true
}

// Counts of objects, for /v1/stats.
type Counts struct{ Nodes, Groups, Definitions, Resources, Pools int }

// Counts returns how many objects the controller has.
func (c *Cluster) Counts() Counts {
	defer c.lock(false)()
	out := Counts{Nodes: len(c.nodes), Groups: len(c.groups), Definitions: len(c.rds)}
	for _, rd := range c.rds {
		out.Resources += len(rd.rsc)
	}
	for _, n := range c.nodes {
		out.Pools += len(n.pools)
	}
	return out
}

type snapshot struct {
	name, uuid string
	nodes      []string
	created    int64
	vds        []SnapshotVolDfn
	flags      []string
}

// CreateSnapshot snapshots a resource on the named nodes, or on all diskful ones. Every one must be online and thin.
func (c *Cluster) CreateSnapshot(resource, name string, nodes []string) Reply {
	defer c.lock(true)()
	const op = opCreate | objSnapshot
	rd := c.rds[key(resource)]
	switch {
	case rd == nil:
		return c.noDefinition(resource, op)
	case !rscNameRE.MatchString(name):
		return c.fail(CodeInvalidSnapName, op, "The specified snapshot name '%s' is invalid.", name)
	case rd.snaps[key(name)] != nil:
		return c.fail(CodeSnapshotExists, op, "Snapshot '%s' of '%s' already exists.", name, rd.name)
	}
	s := &snapshot{name: name, uuid: c.newUUID(), created: c.now().UnixMilli(), flags: []string{"SUCCESSFUL"}}
	for _, r := range rd.places() {
		if !r.diskful() || !nameIn(nodes, r.node.name) {
			continue
		}
		if !r.node.online() {
			return c.fail(CodeNotConnected, op, "Node '%s' is not connected: cannot snapshot '%s'.", r.node.name, rd.name)
		}
		if p := r.node.pools[key(r.wantPool)]; p == nil || !p.thin() {
			return c.fail(CodeSnapshotUnsupported, op, "Storage pool '%s' on node '%s' does not support snapshots.", r.wantPool, r.node.name)
		}
		s.nodes = append(s.nodes, r.node.name)
	}
	if len(s.nodes) == 0 {
		return c.fail(CodeRscNotFound, op, "Resource '%s' has no diskful replica to snapshot.", rd.name)
	}
	for _, vd := range rd.vds {
		s.vds = append(s.vds, SnapshotVolDfn{vd.nr, vd.sizeKiB})
	}
	rd.snaps[key(name)] = s
	return Reply{c.done(opCreate, objSnapshot, nil, "New snapshot '%s' of resource '%s' registered.", name, rd.name)}
}

// DeleteSnapshot removes a snapshot.
func (c *Cluster) DeleteSnapshot(resource, name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objSnapshot
	rd := c.rds[key(resource)]
	if rd == nil {
		return c.noDefinition(resource, op)
	}
	if rd.snaps[key(name)] == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Snapshot '%s' of '%s' not found.", name, rd.name)}
	}
	delete(rd.snaps, key(name))
	return Reply{c.done(opDelete, objSnapshot, nil, "Snapshot '%s' of '%s' deleted.", name, rd.name)}
}

// Snapshots lists snapshots of the named resources on the named nodes; empty means all.
func (c *Cluster) Snapshots(resources, nodes []string) []Snapshot {
	defer c.lock(false)()
	out := []Snapshot{}
	for _, rd := range c.named(resources) {
		for _, s := range sorted(rd.snaps) {
			if len(nodes) == 0 || slices.ContainsFunc(s.nodes, func(n string) bool { return nameIn(nodes, n) }) {
				out = append(out, s.record(rd))
			}
		}
	}
	return out
}

func (s *snapshot) record(rd *definition) Snapshot {
	rec := Snapshot{Name: s.name, ResourceName: rd.name, Nodes: s.nodes, Flags: s.flags, VolumeDefinitions: s.vds, UUID: s.uuid}
	for _, n := range s.nodes {
		sn := SnapshotNode{SnapshotName: s.name, NodeName: n, CreateTimestamp: ptr(s.created)}
		for _, vd := range s.vds {
			sn.Volumes = append(sn.Volumes, SnapshotVol{Number: vd.Number})
		}
		rec.Snapshots = append(rec.Snapshots, sn)
	}
	return rec
}
