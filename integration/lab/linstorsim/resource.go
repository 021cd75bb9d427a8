package linstorsim

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	rscDelete = 1 << iota
	rscDiskless
	rscAddRequested
	rscAdding
	rscRemoveRequested
	rscRemoving
	rscDrbdDisklessBit
	rscTieBreakerBit
	rscInactive
	rscEvictedBit
	rscEvacuate

	rscDrbdDiskless = rscDrbdDisklessBit | rscDiskless
	rscTieBreaker   = rscTieBreakerBit | rscDrbdDiskless
	rscEvicted      = rscEvictedBit | rscInactive
	rscToggling     = rscAddRequested | rscAdding | rscRemoveRequested | rscRemoving
)

var rscFlags = []flagName{{rscDelete, "DELETE"}, {rscDiskless, "DISKLESS"}, {rscAddRequested, "DISK_ADD_REQUESTED"},
	{rscAdding, "DISK_ADDING"}, {rscRemoveRequested, "DISK_REMOVE_REQUESTED"}, {rscRemoving, "DISK_REMOVING"},
	{rscDrbdDiskless, "DRBD_DISKLESS"}, {rscTieBreaker, "TIE_BREAKER"}, {rscInactive, "INACTIVE"},
	{rscEvicted, "EVICTED"}, {rscEvacuate, "EVACUATE"}}

// DRBD disk states of the model.
const (
	diskUpToDate     = "UpToDate"
	diskOutdated     = "Outdated"
	diskInconsistent = "Inconsistent"
	diskDiskless     = "Diskless"
	diskFailed       = "Failed"
)

type resource struct {
	rd         *definition
	node       *node
	uuid       string
	props      Props
	flags      uint64
	created    time.Time
	nodeID     int
	wantPool   string // where its disk is or shall be
	vols       []*volume
	inUse      bool
	mayPromote *bool
}

type volume struct {
	rsc         *resource
	nr          int
	uuid        string
	pool        *pool // nil while diskless or not yet deployed
	deployedKiB int64 // size that the satellite made it with
	allocated   int64 // truth on the satellite, KiB
	reported    *int64
	remembered  int64 // what the controller stored last
	disk        string
	missedKiB   int64 // written by others while this replica was away
	syncTotal   int64
	syncLeft    int64
	syncFrom    *node
	paused      bool
}

func (r *resource) diskful() bool { return r.flags&rscDiskless == 0 }

// keeps tells whether the replica counts as diskful once pending changes are through.
func (r *resource) keeps() bool {
	return r.flags&(rscDelete|rscRemoveRequested) == 0 && (r.diskful() || r.flags&rscAddRequested != 0)
}

func (r *resource) tieBreaker() bool { return r.flags&rscTieBreaker == rscTieBreaker }

// usage is in_use as the controller knows it: nil while the satellite is not online.
func (r *resource) usage() *bool {
	if !r.node.online() {
		return nil
	}
	return ptr(r.inUse)
}

func (r *resource) volume(nr int) *volume {
	for _, v := range r.vols {
		if v.nr == nr {
			return v
		}
	}
	return nil
}

func (r *resource) upToDate() bool {
	if !r.diskful() || len(r.vols) == 0 {
		return false
	}
	for _, v := range r.vols {
		if v.disk != diskUpToDate {
			return false
		}
	}
	return true
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// metaKiB is DRBD's internal metadata: superblock and activity log, and one bit per 4 KiB and peer slot.
func (rd *definition) metaKiB(sizeKiB int64) int64 {
	return 36 + int64(rd.peerSlots)*roundUp((sizeKiB+32767)/32768, 4)
}

func (rd *definition) gross(sizeKiB int64) int64 {
	return roundUp(sizeKiB+rd.metaKiB(sizeKiB), extentKiB)
}

func (rd *definition) grossKiB(vd *volumeDef) int64 { return rd.gross(vd.sizeKiB) }

func (rd *definition) totalGross() int64 {
	var sum int64
	for _, vd := range rd.vds {
		sum += rd.grossKiB(vd)
	}
	return sum
}

// DefaultOversubscription is LINSTOR's MaxOversubscriptionRatio where no property says otherwise.
const DefaultOversubscription = 20

// room is how much of the pool LINSTOR would still hand out, from the controller's memory: free space for thick pools, for
// thin ones the smaller of free x ratio and total x ratio - reserved.
func (p *pool) room(ratio float64) int64 {
	if p.cached == nil {
		return 0
	}
	if !p.thin() {
		return p.cached.free
	}
	return min(int64(float64(p.cached.free)*ratio), int64(float64(p.cached.total)*ratio)-p.reserved)
}

func (r *resource) fits(poolName string, needKiB int64) bool {
	p := r.node.pools[key(poolName)]
	return p != nil && !p.diskless() && p.room(DefaultOversubscription) >= needKiB
}

func (c *Cluster) noResource(rd, nodeName string, op int64) Reply {
	return c.fail(CodeRscNotFound, op, "Resource '%s' on node '%s' not found.", rd, nodeName)
}

func (c *Cluster) place(resource, nodeName string) *resource {
	rd := c.rds[key(resource)]
	if rd == nil {
		return nil
	}
	return rd.rsc[key(nodeName)]
}

// addPlace puts a resource into the controller's database and deploys it when its satellite is online.
func (c *Cluster) addPlace(rd *definition, n *node, flags uint64, poolName string, props Props) *resource {
	r := &resource{rd: rd, node: n, uuid: c.newUUID(), flags: flags, created: c.now(), wantPool: poolName}
	used := map[int]bool{}
	for _, other := range rd.rsc {
		used[other.nodeID] = true
	}
	for used[r.nodeID] {
		r.nodeID++
	}
	storPool := poolName
	if flags&rscDiskless != 0 {
		storPool = DisklessPool
	}
	r.props = applyProps(props, PropsChange{Override: Props{"StorPoolName": storPool}})
	rd.rsc[key(n.name)] = r
	n.resources[key(rd.name)] = r
	rd.layered = true
	for _, vd := range rd.vds {
		c.addVolume(r, vd)
	}
	c.deploy(r)
	return r
}

func (c *Cluster) addVolume(r *resource, vd *volumeDef) {
	v := &volume{rsc: r, nr: vd.nr, uuid: c.newUUID(), disk: diskDiskless}
	r.vols = append(r.vols, v)
}

// deploy makes on the satellite what the database says: backing volumes for a diskful resource. It does nothing while
// the satellite is away.
func (c *Cluster) deploy(r *resource) {
	if !r.node.online() || !r.diskful() {
		return
	}
	p := r.node.pools[key(r.wantPool)]
	if p == nil || p.diskless() {
		return
	}
	for _, v := range r.vols {
		vd := r.rd.volumeDef(v.nr)
		if v.pool != nil {
			if v.deployedKiB != vd.sizeKiB {
				c.resized(r, v, vd)
			}
			continue
		}
		need := r.rd.grossKiB(vd)
		if p.thin() {
			need = min(need, roundUp(r.rd.metaKiB(vd.sizeKiB), chunkKiB))
		}
		if need > p.truth().free {
			continue // lvcreate fails on the satellite; the controller tries again later
		}
		v.pool, v.deployedKiB, v.allocated = p, vd.sizeKiB, need
		p.vols[v] = struct{}{}
		p.reserved += r.rd.grossKiB(vd)
		v.disk = diskUpToDate
		if r.rd.written {
			v.disk = diskInconsistent
			v.missedKiB = c.dataKiB(r.rd, v)
		}
		v.remembered = v.allocated
	}
	c.refresh(p)
	c.rejoin(r.rd)
}

// dataKiB is how much a new replica has to receive: what the fullest other replica holds.
func (c *Cluster) dataKiB(rd *definition, v *volume) int64 {
	most := int64(chunkKiB)
	for _, r := range rd.rsc {
		if o := r.volume(v.nr); o != nil && o != v && o.pool != nil {
			most = max(most, o.allocated)
		}
	}
	return most
}

// resized makes a deployed volume as large as its definition. A thick pool without room leaves it as it is: lvextend fails.
func (c *Cluster) resized(r *resource, v *volume, vd *volumeDef) {
	if !v.pool.thin() && r.rd.grossKiB(vd)-v.allocated > v.pool.truth().free {
		return
	}
	v.pool.reserved += r.rd.grossKiB(vd) - r.rd.gross(v.deployedKiB)
	v.deployedKiB = vd.sizeKiB
	if !v.pool.thin() {
		v.allocated = r.rd.grossKiB(vd)
	}
	v.remembered = v.allocated
	c.refresh(v.pool)
}

// release frees a volume's space on the satellite.
func (c *Cluster) release(v *volume) {
	if v.pool == nil {
		return
	}
	p := v.pool
	delete(p.vols, v)
	p.reserved -= v.rsc.rd.gross(v.deployedKiB)
	*v = volume{rsc: v.rsc, nr: v.nr, uuid: v.uuid, disk: diskDiskless}
	c.refresh(p)
}

func (c *Cluster) dropVolume(r *resource, nr int) {
	for _, v := range r.vols {
		if v.nr == nr {
			c.release(v)
		}
	}
	r.vols = slices.DeleteFunc(r.vols, func(v *volume) bool { return v.nr == nr })
}

// removePlace takes a resource off its satellite and out of the database.
func (c *Cluster) removePlace(r *resource) {
	for _, v := range r.vols {
		c.release(v)
	}
	delete(r.rd.rsc, key(r.node.name))
	delete(r.node.resources, key(r.rd.name))
}

// CreateRequest is what a client may say when it places one resource.
type CreateRequest struct {
	Flags []string
	Props Props
}

// CreateResource places one resource. Diskless flags make a diskless one; property StorPoolName names the pool.
func (c *Cluster) CreateResource(resource, nodeName string, req CreateRequest) Reply {
	defer c.lock(true)()
	rd, n, bad := c.target(resource, nodeName, opCreate|objRsc)
	if bad != nil {
		return bad
	}
	out := c.createResource(rd, n, req)
	c.settle(rd)
	return out
}

func (c *Cluster) target(resource, nodeName string, op int64) (*definition, *node, Reply) {
	rd, n := c.rds[key(resource)], c.nodes[key(nodeName)]
	if rd == nil {
		return nil, nil, c.noDefinition(resource, op)
	}
	if n == nil {
		return nil, nil, c.noNode(nodeName, op)
	}
	return rd, n, nil
}

func isDisklessRequest(flags []string, poolKind string) (uint64, bool) {
	for _, f := range flags {
		switch strings.ToUpper(f) {
		case "DISKLESS", "DRBD_DISKLESS":
			return rscDrbdDiskless, true
		case "TIE_BREAKER":
			return rscTieBreaker, true
		}
	}
	return rscDrbdDiskless, poolKind == "DISKLESS"
}

func (c *Cluster) createResource(rd *definition, n *node, req CreateRequest) Reply {
	const op = opCreate | objRsc
	poolName := c.poolFor(rd, n, req.Props["StorPoolName"])
	kind := ""
	if p := n.pools[key(poolName)]; p != nil {
		kind = p.kind
	}
	flags, diskless := isDisklessRequest(req.Flags, kind)
	if rd.flags&rdDelete != 0 {
		return c.fail(CodeInUse, op, "Resource definition '%s' is being deleted.", rd.name)
	}
	if r := rd.rsc[key(n.name)]; r != nil {
		switch {
		case r.tieBreaker() && diskless:
			r.flags &^= rscTieBreakerBit
			return append(Reply{c.done(opModify, objRsc, nil, "Tie breaker '%s' on '%s' is now a regular diskless resource.", rd.name, n.name)}, c.manageTieBreaker(rd)...)
		case r.tieBreaker():
			return c.toggle(r, true, poolName, "")
		}
		return c.fail(CodeRscExists, op, "A resource '%s' on node '%s' already exists.", rd.name, n.name)
	}
	if !diskless {
		p := n.pools[key(poolName)]
		if p == nil {
			return c.fail(CodePoolNotFound, op, "Storage pool '%s' for resource '%s' on node '%s' not found.", poolName, rd.name, n.name)
		}
		if n.online() && p.room(DefaultOversubscription) < rd.totalGross() {
			return c.fail(CodeNotEnoughFreeSpace, op, "Not enough free space in storage pool '%s' on node '%s'.", p.name, n.name)
		}
		poolName = p.name
	}
	if r := c.checkPeerSlots(rd); r != nil {
		return r
	}
	if !diskless {
		flags = 0
	}
	r := c.addPlace(rd, n, flags, poolName, req.Props)
	out := Reply{c.done(opCreate, objRsc, map[string]string{"RscDfn": rd.name, "Node": n.name, "UUID": r.uuid},
		"New resource '%s' on node '%s' registered.", rd.name, n.name)}
	out = c.withUnreached(out, n)
	if flags&rscTieBreakerBit == 0 {
		out = append(out, c.manageTieBreaker(rd)...)
	}
	return out
}

// checkPeerSlots refuses one more place when a diskful replica's metadata has no room for another peer.
func (c *Cluster) checkPeerSlots(rd *definition) Reply {
	if len(rd.rsc) <= rd.peerSlots {
		return nil
	}
	for _, r := range rd.places() {
		if r.tieBreaker() && r.node.online() {
			return nil // the tie-breaker gives way
		}
	}
	return c.fail(CodePeerSlots, opCreate|objRsc, "Resource '%s' has %d peer slots; insufficient for %d peers.", rd.name, rd.peerSlots, len(rd.rsc))
}

// poolFor is LINSTOR's order: what the client names, the definition's, then the group's StorPoolName, then the group's
// filter, then the only real pool of the node.
func (c *Cluster) poolFor(rd *definition, n *node, asked string) string {
	names := append([]string{asked, rd.props["StorPoolName"], rd.group.props["StorPoolName"]}, rd.group.filter.StoragePoolList...)
	for _, name := range names {
		if name != "" && n.pools[key(name)] != nil {
			return n.pools[key(name)].name
		}
		if name != "" && name == asked {
			return asked
		}
	}
	for _, p := range sorted(n.pools) {
		if !p.diskless() {
			return p.name
		}
	}
	return "DfltStorPool"
}

// MakeAvailable makes a resource usable on a node, with a disk when diskful. It repeats safely.
func (c *Cluster) MakeAvailable(resource, nodeName string, diskful bool) Reply {
	defer c.lock(true)()
	rd, n, bad := c.target(resource, nodeName, opCreate|objRsc)
	if bad != nil {
		return bad
	}
	defer c.settle(rd)
	r := rd.rsc[key(n.name)]
	if r == nil {
		req := CreateRequest{}
		if !diskful {
			req.Flags = []string{"DRBD_DISKLESS"}
		}
		return c.createResource(rd, n, req)
	}
	r.flags &^= rscDelete | rscInactive
	switch {
	case diskful && !r.diskful():
		return c.toggle(r, true, "", "")
	case !diskful && r.tieBreaker():
		r.flags &^= rscTieBreakerBit
		return Reply{c.done(opModify, objRsc, nil, "Tie breaker '%s' on '%s' is now a regular diskless resource.", rd.name, n.name)}
	}
	return Reply{c.info(CodeInfoRscExists, opCreate|objRsc, "Resource '%s' on node '%s' already exists.", rd.name, n.name)}
}

// ModifyResource changes a resource's properties.
func (c *Cluster) ModifyResource(resource, nodeName string, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objRsc
	r := c.place(resource, nodeName)
	if r == nil {
		return c.noResource(resource, nodeName, op)
	}
	if bad := c.checkKeys(ch, op); bad != nil {
		return bad
	}
	r.props = applyProps(r.props, ch)
	return c.withUnreached(Reply{c.done(opModify, objRsc, nil, "Resource '%s' on node '%s' modified.", r.rd.name, r.node.name)}, r.node)
}

// SetActive activates or deactivates a resource.
func (c *Cluster) SetActive(resource, nodeName string, active bool) Reply {
	defer c.lock(true)()
	const op = opModify | objRsc
	r := c.place(resource, nodeName)
	switch {
	case r == nil:
		return c.noResource(resource, nodeName, op)
	case !active && r.usage() != nil && r.inUse:
		return c.fail(CodeInUse, op, "Resource '%s' on node '%s' is still in use.", r.rd.name, r.node.name)
	case active:
		r.flags &^= rscInactive
	default:
		r.flags |= rscInactive
	}
	c.settle(r.rd)
	return c.withUnreached(Reply{c.done(opModify, objRsc, nil, "Resource '%s' on node '%s' modified.", r.rd.name, r.node.name)}, r.node)
}

// DeleteResource removes one place. A diskful or diskless resource whose deletion would leave an even number of at least two
// diskful replicas is kept as the tie-breaker instead (info 10006). Deleting the tie-breaker itself switches the feature
// off for the definition unless keepTieBreaker is set. in_use that is unknown because the satellite is away does not
// stop it, as in LINSTOR.
func (c *Cluster) DeleteResource(resource, nodeName string, keepTieBreaker bool) Reply {
	defer c.lock(true)()
	const op = opDelete | objRsc
	r := c.place(resource, nodeName)
	if r == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Node: %s, Resource: %s not found.", nodeName, resource)}
	}
	rd := r.rd
	if use := r.usage(); use != nil && *use {
		return c.fail(CodeInUse, op, "Resource '%s' on node '%s' is still in use.", rd.name, r.node.name)
	}
	if bad := c.checkLastDisk(r); bad != nil {
		return bad
	}
	defer c.settle(rd)
	return c.deleteResource(r, keepTieBreaker)
}

func (c *Cluster) checkLastDisk(r *resource) Reply {
	if !r.diskful() || r.flags&rscDelete != 0 {
		return nil
	}
	users := false
	for _, o := range r.rd.rsc {
		if o == r || o.flags&rscDelete != 0 {
			continue
		}
		if o.diskful() {
			return nil
		}
		users = users || !o.tieBreaker()
	}
	if !users {
		return nil
	}
	return c.fail(CodeInUse, opDelete|objRsc, "Last resource of '%s' with disk still has diskless resources attached.", r.rd.name)
}

func (c *Cluster) deleteResource(r *resource, keepTieBreaker bool) Reply {
	rd := r.rd
	refs := map[string]string{"RscDfn": rd.name, "Node": r.node.name}
	if keepTieBreaker && !c.tieBreakerEnabled(rd) {
		rd.props = applyProps(rd.props, PropsChange{Override: Props{tieBreakerProp: "True"}})
	}
	was := r.flags
	r.flags |= rscDelete
	wanted := c.wantsTieBreaker(rd)
	if r.tieBreaker() && wanted {
		if keepTieBreaker {
			r.flags = was
			return Reply{c.takeover(r)}
		}
		rd.props = applyProps(rd.props, PropsChange{Override: Props{tieBreakerProp: "False"}})
	} else if wanted && rd.tieBreaker() == nil && r.node.flags&(nodeEvictedBit|nodeEvacuate) == 0 {
		r.flags = was
		return c.convertToTieBreaker(r)
	}
	out := Reply{c.done(opDelete, objRsc, refs, "Node: %s, Resource: %s preparing for deletion.", r.node.name, rd.name)}
	if r.node.online() {
		c.removePlace(r)
		out = append(out, c.done(opDelete, objRsc, refs, "Node: %s, Resource: %s deleted.", r.node.name, rd.name))
	} else {
		out = append(out, c.notConnected(r.node))
	}
	return append(out, c.manageTieBreaker(rd)...)
}

// SetInUse promotes or demotes a resource on a node, as opening and closing its device does. A tie-breaker that becomes
// Primary turns into a plain diskless resource. It refuses what DRBD would: no resource there, no UpToDate data in
// reach, another Primary in reach.
func (c *Cluster) SetInUse(resource, nodeName string, inUse bool) error {
	defer c.lock(true)()
	r := c.place(resource, nodeName)
	if r == nil {
		return fmt.Errorf("promote %s: no resource on node %s", resource, nodeName)
	}
	if inUse {
		if err := c.canPromote(r); err != nil {
			return fmt.Errorf("promote %s on %s: %w", resource, nodeName, err)
		}
		r.rd.written = true
		if r.tieBreaker() && r.node.online() {
			r.flags &^= rscTieBreakerBit
		}
	}
	r.inUse = inUse
	c.settle(r.rd)
	return nil
}

func (c *Cluster) canPromote(r *resource) error {
	if r.node.poweredOff {
		return fmt.Errorf("host is down")
	}
	for _, o := range r.rd.places() {
		if o != r && o.inUse && c.linked(o.node, r.node) {
			return fmt.Errorf("multiple primaries not allowed: %s is Primary", o.node.name)
		}
	}
	if !c.hasData(r) {
		return fmt.Errorf("need access to UpToDate data")
	}
	return nil
}

// linked tells whether DRBD on the two nodes can talk; a node is linked with itself while its host runs.
func (c *Cluster) linked(a, b *node) bool {
	return !a.poweredOff && !b.poweredOff && (a == b || !c.cuts[pair(a.name, b.name)])
}

func (c *Cluster) hasData(r *resource) bool {
	for _, o := range r.rd.rsc {
		if o.upToDate() && o.flags&rscInactive == 0 && c.linked(r.node, o.node) {
			return true
		}
	}
	return false
}

func (c *Cluster) hasQuorum(r *resource) bool {
	if strings.EqualFold(c.prop(r.rd, "DrbdOptions/Resource/quorum"), "off") {
		return true
	}
	voters, reached, witness := 0, 0, false
	for _, o := range r.rd.rsc {
		in := c.linked(r.node, o.node)
		if o.diskful() {
			voters++
			if in {
				reached++
			}
		} else {
			witness = witness || in
		}
	}
	return 2*reached > voters || 2*reached == voters && witness
}

// prop resolves a property through definition, group and controller.
func (c *Cluster) prop(rd *definition, name string) string {
	for _, p := range []Props{rd.props, rd.group.props, c.props} {
		if v, ok := p[name]; ok {
			return v
		}
	}
	return ""
}

// Write makes a resource's first volume hold at least allocatedKiB on each replica in reach of its user (thin pools; on
// thick ones everything is allocated from the start). Replicas out of reach become Outdated and resync when they are back. A
// thin pool that runs full fails the replica there and returns a *PoolFullError.
func (c *Cluster) Write(resource string, allocatedKiB int64) error {
	defer c.lock(true)()
	rd := c.rds[key(resource)]
	if rd == nil {
		return fmt.Errorf("write %s: no such resource", resource)
	}
	anchor := c.writer(rd)
	if anchor == nil {
		return fmt.Errorf("write %s: no UpToDate replica in reach", resource)
	}
	rd.written = true
	var full error
	for _, r := range rd.places() {
		if len(r.vols) == 0 || r.vols[0].pool == nil {
			continue
		}
		v := r.vols[0]
		target := min(allocatedKiB, rd.gross(v.deployedKiB))
		switch {
		case v.disk == diskFailed:
		case !c.linked(anchor.node, r.node):
			v.missedKiB += max(target-v.allocated, chunkKiB)
			v.disk = diskOutdated
		case v.pool.thin():
			if err := v.grow(target); err != nil {
				full = err
				v.disk = diskFailed
				r.props = applyProps(r.props, PropsChange{Override: Props{"DrbdOptions/SkipDisk": "True"}})
			}
		}
	}
	c.settle(rd)
	return full
}

func (c *Cluster) writer(rd *definition) *resource {
	for _, r := range rd.places() {
		if r.inUse && c.hasData(r) {
			return r
		}
	}
	for _, r := range rd.places() {
		if !r.node.poweredOff && r.upToDate() {
			return r
		}
	}
	return nil
}

// PoolFullError says that a thin pool had no room for a write.
type PoolFullError struct {
	Node, Pool string
	MissingKiB int64
	Hint       string
}

func (e *PoolFullError) Error() string {
	return fmt.Sprintf("thin pool %s on %s is full: %d KiB missing (%s)", e.Pool, e.Node, e.MissingKiB, e.Hint)
}

func (v *volume) grow(target int64) error {
	need := target - v.allocated
	if need <= 0 {
		return nil
	}
	free := v.pool.truth().free
	if need > free {
		v.allocated += free
		return &PoolFullError{v.pool.node.name, v.pool.name, need - free, "grow the pool or free space in it"}
	}
	v.allocated = target
	return nil
}

// Trim gives space of a thin volume back on every replica in reach: what is allocated goes down to allocatedKiB.
func (c *Cluster) Trim(resource string, allocatedKiB int64) {
	defer c.lock(true)()
	rd := c.rds[key(resource)]
	if rd == nil {
		return
	}
	for _, r := range rd.places() {
		for _, v := range r.vols {
			if v.pool != nil && v.pool.thin() && !r.node.poweredOff {
				v.allocated = min(v.allocated, max(allocatedKiB, 0))
			}
		}
	}
}

// SetReported makes one replica's satellite report kib as allocated size whatever the truth is; negative values are
// what broken satellites really answer. nil ends it.
func (c *Cluster) SetReported(resource, nodeName string, kib *int64) {
	defer c.lock(true)()
	if r := c.place(resource, nodeName); r != nil {
		for _, v := range r.vols {
			v.reported = kib
		}
	}
}

// FailDisk makes DRBD detach the backing disk of one replica after an I/O error; LINSTOR sets SkipDisk by itself.
func (c *Cluster) FailDisk(resource, nodeName string) {
	defer c.lock(true)()
	r := c.place(resource, nodeName)
	if r == nil {
		return
	}
	for _, v := range r.vols {
		if v.pool != nil {
			v.disk, v.syncFrom, v.syncLeft = diskFailed, nil, 0
		}
	}
	r.props = applyProps(r.props, PropsChange{Override: Props{"DrbdOptions/SkipDisk": "True"}})
	c.settle(r.rd)
}

// settle brings what follows from the state of a definition's places up to date: syncs, migrations, pending toggles,
// may_promote and its events.
func (c *Cluster) settle(rd *definition) {
	c.rejoin(rd)
	c.resumeToggles(rd)
	c.migrate(rd)
	for _, r := range rd.places() {
		var may *bool
		if r.node.online() {
			may = ptr(c.mayPromote(r))
		}
		if (may == nil) != (r.mayPromote == nil) || may != nil && *may != *r.mayPromote {
			// LINSTOR sends the event just before it stores the value.
			c.emit(Event{"promotion", "may-promote-change", MayPromote{rd.name, r.node.name, may}})
			r.mayPromote = may
		}
	}
}

func (c *Cluster) mayPromote(r *resource) bool {
	if r.flags&(rscInactive|rscDelete) != 0 || len(r.vols) == 0 || !c.hasQuorum(r) || !c.hasData(r) {
		return false
	}
	for _, o := range r.rd.rsc {
		if o.inUse && c.linked(o.node, r.node) {
			return false
		}
	}
	return true
}

// rejoin starts, re-routes and stops syncs after links, disks or hosts changed.
func (c *Cluster) rejoin(rd *definition) {
	for _, r := range rd.places() {
		for _, v := range r.vols {
			if v.pool == nil || v.disk == diskFailed {
				continue
			}
			if v.missedKiB > 0 && v.syncFrom == nil && v.syncLeft == 0 {
				v.syncTotal, v.syncLeft, v.missedKiB = v.missedKiB, v.missedKiB, 0
				if v.disk == diskUpToDate {
					v.disk = diskOutdated
				}
			}
			if v.syncLeft == 0 {
				continue
			}
			if v.syncFrom != nil && c.isSource(rd, r, v, v.syncFrom) {
				continue
			}
			v.syncFrom = nil
			for _, o := range rd.places() {
				if c.isSource(rd, r, v, o.node) {
					v.syncFrom = o.node
					v.disk = diskInconsistent
					break
				}
			}
		}
	}
}

func (c *Cluster) isSource(rd *definition, r *resource, v *volume, n *node) bool {
	o := rd.rsc[key(n.name)]
	if o == nil || o == r || !c.linked(n, r.node) || o.flags&rscDelete != 0 {
		return false
	}
	src := o.volume(v.nr)
	return src != nil && src.pool != nil && src.disk == diskUpToDate
}

// Step moves the model to the owner's present time: resyncs go on, the controller's periodic tasks run.
func (c *Cluster) Step() {
	defer c.lock(true)()
	now := c.now()
	c.advance(now.Sub(c.last))
	c.last = now
}

// Advance moves the model by d without regard to the owner's clock, for owners whose clock stands still.
func (c *Cluster) Advance(d time.Duration) {
	defer c.lock(true)()
	c.advance(d)
	c.last = c.now()
}

func (c *Cluster) advance(d time.Duration) {
	if d <= 0 {
		return
	}
	for _, n := range sorted(c.nodes) {
		if n.poweredOff {
			continue
		}
		for _, p := range sorted(n.pools) {
			c.syncPool(p, d)
		}
	}
	if c.ctl.Phase != Up {
		return
	}
	c.sinceCache += d
	if c.sinceCache >= c.cfg.CacheInterval {
		c.sinceCache %= c.cfg.CacheInterval
		rest := c.sinceCache
		c.refreshAll()
		c.retryDeploy()
		c.sinceCache = rest
	}
}

// retryDeploy tries again what a satellite could not create or grow for lack of space. LINSTOR's own retries start at 15 s
// and go up to a day; here they go with the capacity refresh.
func (c *Cluster) retryDeploy() {
	for _, rd := range sorted(c.rds) {
		for _, r := range rd.places() {
			for _, v := range r.vols {
				if r.diskful() && (v.pool == nil || v.deployedKiB != rd.volumeDef(v.nr).sizeKiB) {
					c.deploy(r)
					c.settle(rd)
					break
				}
			}
		}
	}
}

// syncPool spends d on the resyncs into one pool, lowest minor first: LINSTOR chains them with resync-after, so that
// the others are paused meanwhile.
func (c *Cluster) syncPool(p *pool, d time.Duration) {
	budget := int64(d.Seconds() * float64(c.cfg.SyncKiBPerSecond))
	var queue []*volume
	for v := range p.vols {
		if v.syncFrom != nil {
			queue = append(queue, v)
		}
	}
	slices.SortFunc(queue, func(a, b *volume) int { return a.minor() - b.minor() })
	for _, v := range queue {
		v.paused = budget <= 0
		part := min(budget, v.syncLeft)
		budget -= part
		if part > 0 {
			v.received(part)
		}
		if v.syncLeft == 0 && v.disk != diskFailed {
			v.syncFrom, v.disk, v.paused = nil, diskUpToDate, false
			v.remembered = v.allocated
			c.refresh(p)
			c.settle(v.rsc.rd)
		}
	}
}

func (v *volume) minor() int { return v.rsc.rd.volumeDef(v.nr).minor }

// received accounts for part KiB of resync: a thin volume grows towards what its source holds.
func (v *volume) received(part int64) {
	v.syncLeft -= part
	if !v.pool.thin() {
		return
	}
	src := v.rsc.rd.rsc[key(v.syncFrom.name)]
	if src == nil {
		return
	}
	if sv := src.volume(v.nr); sv != nil {
		want := sv.allocated - v.syncLeft
		if v.syncLeft == 0 {
			want = sv.allocated
		}
		if err := v.grow(want); err != nil {
			v.disk, v.syncFrom, v.syncLeft = diskFailed, nil, 0
		}
	}
}

// lostContact is what the controller does when a satellite's connection ends.
func (c *Cluster) lostContact(n *node) {
	for _, r := range n.resources {
		r.flags &^= rscAdding // taken back; DISK_ADD_REQUESTED stays
	}
}

// deliver gives a satellite that came online what was stored while it was away.
func (c *Cluster) deliver(n *node) {
	for _, k := range slices.Sorted(maps.Keys(n.resources)) {
		r := n.resources[k]
		if r.flags&rscDelete != 0 {
			rd := r.rd
			c.removePlace(r)
			if rd.flags&rdDelete != 0 && len(rd.rsc) == 0 {
				c.dropDefinition(rd)
			} else {
				c.settle(rd)
			}
			continue
		}
		c.deploy(r)
		for _, v := range r.vols {
			v.remembered = v.allocated
		}
		if r.tieBreaker() && r.inUse {
			r.flags &^= rscTieBreakerBit
		}
	}
	for _, p := range sorted(n.pools) {
		c.refresh(p)
	}
}
