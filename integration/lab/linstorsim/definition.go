package linstorsim

import (
	"slices"
	"strings"
)

type volumeGroup struct {
	nr    int
	uuid  string
	props Props
}

type group struct {
	name, uuid, description string
	props                   Props
	filter                  SelectFilter
	peerSlots               int
	vgs                     map[int]*volumeGroup
}

func (g *group) record() ResourceGroup {
	rec := ResourceGroup{Name: g.name, Description: g.description, Props: g.props, SelectFilter: &g.filter, UUID: g.uuid}
	if g.peerSlots > 0 {
		rec.PeerSlots = ptr(g.peerSlots)
	}
	return rec
}

const (
	rdDelete = 1 << iota
	rdCloning
	rdFailed
)

var rdFlags = []flagName{{rdDelete, "DELETE"}, {rdCloning, "CLONING"}, {rdFailed, "FAILED"}}

type definition struct {
	name, uuid, external, secret string
	group                        *group
	props                        Props
	flags                        uint64
	peerSlots, port              int
	layered                      bool // the DRBD layer data exists: LINSTOR makes it with the first resource or on request
	vds                          []*volumeDef
	rsc                          map[string]*resource
	snaps                        map[string]*snapshot
	written                      bool // somebody wrote: new replicas need a sync
	migrations                   []migration
}

type volumeDef struct {
	nr, minor int
	sizeKiB   int64
	uuid      string
	props     Props
	flags     []string
}

// places returns the resources in node order.
func (rd *definition) places() []*resource { return sorted(rd.rsc) }

func (rd *definition) volumeDef(nr int) *volumeDef {
	for _, vd := range rd.vds {
		if vd.nr == nr {
			return vd
		}
	}
	return nil
}

func (rd *definition) drbd() *DrbdDefinition {
	return &DrbdDefinition{PeerSlots: rd.peerSlots, AlStripes: 1, AlStripeSize: 32, Port: rd.port, TransportType: "IP",
		Secret: rd.secret}
}

func (rd *definition) record(withVolumes bool) ResourceDefinition {
	rec := ResourceDefinition{Name: rd.name, ExternalName: rd.external, Props: rd.props, Flags: flagNames(rdFlags, rd.flags),
		UUID: rd.uuid, ResourceGroupName: rd.group.name}
	if rd.layered {
		rec.LayerData = []DefinitionLayer{{Type: "DRBD", Data: rd.drbd()}, {Type: "STORAGE"}}
	}
	if withVolumes {
		for _, vd := range rd.vds {
			rec.VolumeDefinitions = append(rec.VolumeDefinitions, rd.volumeRecord(vd))
		}
	}
	return rec
}

func (rd *definition) volumeRecord(vd *volumeDef) VolumeDefinition {
	rec := VolumeDefinition{Number: vd.nr, SizeKiB: vd.sizeKiB, Props: vd.props, Flags: vd.flags, UUID: vd.uuid}
	if rd.layered {
		rec.LayerData = []VolDfnLayer{{Type: "DRBD", Data: &DrbdVolDfn{vd.nr, vd.minor}}, {Type: "STORAGE"}}
	}
	return rec
}

// CreateGroup creates a resource group with one volume group, placing placeCount replicas in the pool. It returns
// what LINSTOR would answer.
func (c *Cluster) CreateGroup(name, poolName string, placeCount int) Reply {
	r := c.CreateResourceGroup(ResourceGroup{Name: name, SelectFilter: &SelectFilter{PlaceCount: &placeCount,
		StoragePool: poolName, StoragePoolList: []string{poolName}, DisklessOnRemaining: ptr(false)}})
	if r.Failed() {
		return r
	}
	return append(r, c.CreateVolumeGroup(name, VolumeGroup{}, nil)...)
}

// CreateResourceGroup creates a resource group without volume groups.
func (c *Cluster) CreateResourceGroup(rec ResourceGroup) Reply {
	defer c.lock(true)()
	const op = opCreate | objRscGrp
	if !rscNameRE.MatchString(rec.Name) {
		return c.fail(237, op, "The specified resource group name '%s' is invalid.", rec.Name)
	}
	if c.groups[key(rec.Name)] != nil {
		return c.fail(CodeRscGrpExists, op, "Resource group '%s' already exists.", rec.Name)
	}
	g := &group{name: rec.Name, description: rec.Description, uuid: c.newUUID(), props: rec.Props, vgs: map[int]*volumeGroup{}}
	if rec.SelectFilter != nil {
		g.filter = normalFilter(*rec.SelectFilter)
	}
	if rec.PeerSlots != nil {
		g.peerSlots = *rec.PeerSlots
	}
	c.groups[key(rec.Name)] = g
	return Reply{c.done(opCreate, objRscGrp, map[string]string{"RscGrp": g.name}, "New resource group '%s' created.", g.name)}
}

// normalFilter keeps storage_pool and storage_pool_list in step, as LINSTOR answers both.
func normalFilter(f SelectFilter) SelectFilter {
	if f.StoragePool != "" && len(f.StoragePoolList) == 0 {
		f.StoragePoolList = []string{f.StoragePool}
	}
	if f.StoragePool == "" && len(f.StoragePoolList) > 0 {
		f.StoragePool = f.StoragePoolList[0]
	}
	return f
}

// mergeFilter lays over on base: what over does not say stays.
func mergeFilter(base, over SelectFilter) SelectFilter {
	over = normalFilter(over)
	set := func(dst, src *[]string) {
		if len(*src) > 0 {
			*dst = *src
		}
	}
	if over.PlaceCount != nil {
		base.PlaceCount = over.PlaceCount
	}
	base.AdditionalPlaceCount = over.AdditionalPlaceCount
	if over.StoragePool != "" {
		base.StoragePool, base.StoragePoolList = over.StoragePool, over.StoragePoolList
	}
	set(&base.NodeNameList, &over.NodeNameList)
	set(&base.StoragePoolDiskless, &over.StoragePoolDiskless)
	set(&base.NotPlaceWithRsc, &over.NotPlaceWithRsc)
	set(&base.ReplicasOnSame, &over.ReplicasOnSame)
	set(&base.ReplicasOnDifferent, &over.ReplicasOnDifferent)
	set(&base.LayerStack, &over.LayerStack)
	set(&base.ProviderList, &over.ProviderList)
	if over.NotPlaceWithRscRegex != "" {
		base.NotPlaceWithRscRegex = over.NotPlaceWithRscRegex
	}
	if over.XReplicasOnDifferent != nil {
		base.XReplicasOnDifferent = over.XReplicasOnDifferent
	}
	if over.DisklessOnRemaining != nil {
		base.DisklessOnRemaining = over.DisklessOnRemaining
	}
	if over.Overprovision != nil {
		base.Overprovision = over.Overprovision
	}
	return base
}

// Groups lists resource groups.
func (c *Cluster) Groups(names, props []string) []ResourceGroup {
	defer c.lock(false)()
	out := []ResourceGroup{}
	for _, g := range sorted(c.groups) {
		if nameIn(names, g.name) && propsMatch(g.props, props) {
			out = append(out, g.record())
		}
	}
	return out
}

func (c *Cluster) noGroup(name string, op int64) Reply {
	return c.fail(CodeRscGrpNotFound, op, "Resource group '%s' not found.", name)
}

// ModifyGroup changes a resource group's properties, description and filter; nil filter leaves it.
func (c *Cluster) ModifyGroup(name string, description *string, filter *SelectFilter, peerSlots *int, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objRscGrp
	g := c.groups[key(name)]
	if g == nil {
		return c.noGroup(name, op)
	}
	if r := c.checkKeys(ch, op); r != nil {
		return r
	}
	g.props = applyProps(g.props, ch)
	if description != nil {
		g.description = *description
	}
	if filter != nil {
		g.filter = mergeFilter(g.filter, *filter)
	}
	if peerSlots != nil {
		g.peerSlots = *peerSlots
	}
	return Reply{c.done(opModify, objRscGrp, nil, "Resource group '%s' modified.", g.name)}
}

// DeleteGroup removes a resource group that no definition uses. The default group stays.
func (c *Cluster) DeleteGroup(name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objRscGrp
	g := c.groups[key(name)]
	if g == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Resource group '%s' not found.", name)}
	}
	if key(name) == key(DefaultGroup) {
		return c.fail(CodeInUse, op, "The default resource group '%s' cannot be deleted.", g.name)
	}
	for _, rd := range c.rds {
		if rd.group == g {
			return c.fail(CodeInUse, op, "Resource group '%s' still has resource definitions.", g.name)
		}
	}
	delete(c.groups, key(name))
	return Reply{c.done(opDelete, objRscGrp, nil, "Resource group '%s' deleted.", g.name)}
}

// CreateVolumeGroup adds a volume group; nil nr takes the next free number.
func (c *Cluster) CreateVolumeGroup(name string, rec VolumeGroup, nr *int) Reply {
	defer c.lock(true)()
	const op = opCreate | objVlmGrp
	g := c.groups[key(name)]
	if g == nil {
		return c.noGroup(name, op)
	}
	n := 0
	if nr != nil {
		n = *nr
	} else {
		for g.vgs[n] != nil {
			n++
		}
	}
	if n < 0 || n > 65535 {
		return c.fail(CodeInvalidVolumeNr, op, "The volume number %d is out of range.", n)
	}
	if g.vgs[n] != nil {
		return c.fail(CodeVlmGrpExists, op, "Volume group %d of '%s' already exists.", n, g.name)
	}
	g.vgs[n] = &volumeGroup{nr: n, uuid: c.newUUID(), props: rec.Props}
	return Reply{c.done(opCreate, objVlmGrp, nil, "New volume group with number '%d' of resource group '%s' created.", n, g.name)}
}

// VolumeGroups lists a group's volume groups by number; ok tells whether the group exists.
func (c *Cluster) VolumeGroups(name string) (out []VolumeGroup, ok bool) {
	defer c.lock(false)()
	g := c.groups[key(name)]
	if g == nil {
		return nil, false
	}
	for _, vg := range g.vgs {
		out = append(out, VolumeGroup{Number: vg.nr, UUID: vg.uuid, Props: vg.props})
	}
	slices.SortFunc(out, func(a, b VolumeGroup) int { return a.Number - b.Number })
	return out, true
}

// ModifyVolumeGroup changes the properties of a volume group.
func (c *Cluster) ModifyVolumeGroup(name string, nr int, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objVlmGrp
	g := c.groups[key(name)]
	if g == nil {
		return c.noGroup(name, op)
	}
	if g.vgs[nr] == nil {
		return c.fail(CodeVlmGrpNotFound, op, "Volume group %d of '%s' not found.", nr, g.name)
	}
	g.vgs[nr].props = applyProps(g.vgs[nr].props, ch)
	return Reply{c.done(opModify, objVlmGrp, nil, "Volume group %d of '%s' modified.", nr, g.name)}
}

// DeleteVolumeGroup removes a volume group.
func (c *Cluster) DeleteVolumeGroup(name string, nr int) Reply {
	defer c.lock(true)()
	const op = opDelete | objVlmGrp
	g := c.groups[key(name)]
	if g == nil {
		return c.noGroup(name, op)
	}
	if g.vgs[nr] == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Volume group %d of '%s' not found.", nr, g.name)}
	}
	delete(g.vgs, nr)
	return Reply{c.done(opDelete, objVlmGrp, nil, "Volume group %d of '%s' deleted.", nr, g.name)}
}

// DefinitionRequest is what a client may say when it creates a resource definition.
type DefinitionRequest struct {
	Name, ExternalName, Group string
	Props                     Props
	PeerSlots, Port           int // 0 means LINSTOR's choice
	Secret                    string
	Layers                    []string
}

// DefaultPeerSlots is LINSTOR's number of DRBD peers that a replica's metadata has room for.
const DefaultPeerSlots = 7

// CreateDefinition creates a resource definition without volumes.
func (c *Cluster) CreateDefinition(req DefinitionRequest) Reply {
	defer c.lock(true)()
	_, r := c.createDefinition(req)
	return r
}

func (c *Cluster) createDefinition(req DefinitionRequest) (*definition, Reply) {
	const op = opCreate | objRscDfn
	name := req.Name
	if name == "" {
		name = strings.NewReplacer(" ", "_", "/", "_").Replace(req.ExternalName)
	}
	if !rscNameRE.MatchString(name) {
		return nil, c.fail(CodeInvalidRscName, op, "The specified resource name '%s' is invalid.", name)
	}
	if c.rds[key(name)] != nil {
		return nil, c.fail(CodeRscDfnExists, op, "A resource definition with the name '%s' already exists.", name)
	}
	for _, l := range req.Layers {
		if l != "DRBD" && l != "STORAGE" {
			return nil, c.fail(CodeLayerUnsupported, op, "No satellite supports layer '%s'.", l)
		}
	}
	gname := req.Group
	if gname == "" {
		gname = DefaultGroup
	}
	g := c.groups[key(gname)]
	if g == nil {
		return nil, c.noGroup(gname, op)
	}
	rd := &definition{name: name, external: req.ExternalName, uuid: c.newUUID(), group: g, props: req.Props,
		peerSlots: req.PeerSlots, secret: req.Secret, rsc: map[string]*resource{}, snaps: map[string]*snapshot{},
		layered: len(req.Layers) > 0 || req.PeerSlots > 0 || req.Port > 0, port: req.Port}
	if rd.peerSlots == 0 {
		rd.peerSlots = g.peerSlots
	}
	if rd.peerSlots == 0 {
		rd.peerSlots = DefaultPeerSlots
	}
	if rd.secret == "" {
		rd.secret = c.secret()
	}
	if rd.port == 0 {
		rd.port = c.nextPort
		c.nextPort++
	}
	c.rds[key(name)] = rd
	return rd, Reply{c.done(opCreate, objRscDfn, map[string]string{"RscDfn": name, "UUID": rd.uuid},
		"New resource definition '%s' created.", name)}
}

// Definitions lists resource definitions.
func (c *Cluster) Definitions(names, props []string, withVolumes bool) []ResourceDefinition {
	defer c.lock(false)()
	defs := c.named(names)
	out := make([]ResourceDefinition, 0, len(defs))
	for _, rd := range defs {
		if propsMatch(rd.props, props) {
			out = append(out, rd.record(withVolumes))
		}
	}
	return out
}

func (c *Cluster) noDefinition(name string, op int64) Reply {
	return c.fail(CodeRscDfnNotFound, op, "Resource definition '%s' not found.", name)
}

// ModifyDefinition changes a definition's properties; peerSlots and group when given.
func (c *Cluster) ModifyDefinition(name string, peerSlots *int, groupName string, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objRscDfn
	rd := c.rds[key(name)]
	if rd == nil {
		return c.noDefinition(name, op)
	}
	if r := c.checkKeys(ch, op); r != nil {
		return r
	}
	if groupName != "" {
		g := c.groups[key(groupName)]
		if g == nil {
			return c.noGroup(groupName, op)
		}
		rd.group = g
	}
	if peerSlots != nil {
		if len(rd.rsc) > 0 && *peerSlots != rd.peerSlots {
			return c.fail(500, op, "The peer count cannot be changed once the resource '%s' is deployed.", rd.name)
		}
		if *peerSlots < 1 || *peerSlots > 31 {
			return c.fail(CodeInvalidProp, op, "Peer slots %d out of range 1..31.", *peerSlots)
		}
		rd.peerSlots, rd.layered = *peerSlots, true
	}
	rd.props = applyProps(rd.props, ch)
	out := Reply{c.done(opModify, objRscDfn, map[string]string{"RscDfn": rd.name}, "Resource definition '%s' modified.", rd.name)}
	c.settle(rd)
	return c.withUnreached(out, rd.nodes()...)
}

func (rd *definition) nodes() []*node {
	var out []*node
	for _, r := range rd.places() {
		out = append(out, r.node)
	}
	return out
}

// DeleteDefinition removes a definition and all its resources. Replicas on satellites that are not online stay, marked
// DELETE, and the definition with them, until those come back.
func (c *Cluster) DeleteDefinition(name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objRscDfn
	rd := c.rds[key(name)]
	if rd == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Resource definition '%s' not found.", name)}
	}
	for _, r := range rd.places() {
		if use := r.usage(); use != nil && *use {
			return c.fail(CodeInUse, op, "Resource '%s' on node '%s' is still in use.", rd.name, r.node.name)
		}
	}
	if len(rd.snaps) > 0 {
		return c.fail(CodeInUse, op, "Cannot delete resource definition '%s' because it has snapshots.", rd.name)
	}
	rd.flags |= rdDelete
	var unreached []*node
	for _, r := range rd.places() {
		if r.node.online() {
			c.removePlace(r)
		} else {
			r.flags |= rscDelete
			unreached = append(unreached, r.node)
		}
	}
	out := Reply{c.done(opDelete, objRscDfn, map[string]string{"RscDfn": rd.name}, "Resource definition '%s' marked for deletion.", rd.name)}
	if len(rd.rsc) == 0 {
		c.dropDefinition(rd)
		out = append(out, c.done(opDelete, objRscDfn, map[string]string{"RscDfn": rd.name}, "Resource definition '%s' deleted.", rd.name))
	}
	return c.withUnreached(out, unreached...)
}

func (c *Cluster) dropDefinition(rd *definition) {
	delete(c.rds, key(rd.name))
	for k, conn := range c.conns {
		if strings.EqualFold(conn.rsc, rd.name) {
			delete(c.conns, k)
		}
	}
}

// CreateVolumeDefinition adds a volume of sizeKiB; nil nr takes the next free number.
func (c *Cluster) CreateVolumeDefinition(name string, nr *int, sizeKiB int64, props Props, flags []string) Reply {
	defer c.lock(true)()
	const op = opCreate | objVlmDfn
	rd := c.rds[key(name)]
	if rd == nil {
		return c.noDefinition(name, op)
	}
	return c.createVolumeDef(rd, nr, sizeKiB, props, flags)
}

// maxVolumeKiB is LINSTOR's limit of a volume: 16 TiB per DRBD peer slot arithmetic is not modelled, only the hard one.
const maxVolumeKiB = 16 << 40

func (c *Cluster) createVolumeDef(rd *definition, nr *int, sizeKiB int64, props Props, flags []string) Reply {
	const op = opCreate | objVlmDfn
	n := 0
	if nr != nil {
		n = *nr
	} else {
		for rd.volumeDef(n) != nil {
			n++
		}
	}
	switch {
	case n < 0 || n > 65535:
		return c.fail(CodeInvalidVolumeNr, op, "The volume number %d is out of range.", n)
	case sizeKiB < 4 || sizeKiB > maxVolumeKiB:
		return c.fail(CodeInvalidVolumeSize, op, "The specified volume size %d KiB is invalid.", sizeKiB)
	case rd.volumeDef(n) != nil:
		return c.fail(CodeVlmDfnExists, op, "Volume definition %d of '%s' already exists.", n, rd.name)
	}
	vd := &volumeDef{nr: n, minor: c.nextMinor, sizeKiB: sizeKiB, uuid: c.newUUID(), props: props, flags: flags}
	c.nextMinor++
	for _, r := range rd.places() {
		if r.diskful() && !r.fits(r.wantPool, rd.grossKiB(vd)) {
			return c.fail(CodeNotEnoughFreeSpace, op, "Not enough free space in storage pool '%s' on node '%s'.", r.wantPool, r.node.name)
		}
	}
	rd.vds = append(rd.vds, vd)
	slices.SortFunc(rd.vds, func(a, b *volumeDef) int { return a.nr - b.nr })
	for _, r := range rd.places() {
		c.addVolume(r, vd)
		c.deploy(r)
	}
	c.settle(rd)
	out := Reply{c.done(opCreate, objVlmDfn, map[string]string{"RscDfn": rd.name}, "New volume definition with number '%d' of resource definition '%s' created.", n, rd.name)}
	return c.withUnreached(out, rd.nodes()...)
}

// ModifyVolumeDefinition changes properties and, when sizeKiB is not 0, grows the volume on all satellites.
func (c *Cluster) ModifyVolumeDefinition(name string, nr int, sizeKiB int64, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objVlmDfn
	rd := c.rds[key(name)]
	if rd == nil {
		return c.noDefinition(name, op)
	}
	vd := rd.volumeDef(nr)
	if vd == nil {
		return c.fail(CodeVlmDfnNotFound, op, "Volume definition %d of '%s' not found.", nr, rd.name)
	}
	if sizeKiB != 0 && sizeKiB != vd.sizeKiB {
		if r := c.checkResize(rd, vd, sizeKiB); r != nil {
			return r
		}
		vd.sizeKiB = sizeKiB
		for _, r := range rd.places() {
			if v := r.volume(nr); v != nil && v.pool != nil && r.node.online() {
				c.resized(r, v, vd)
			}
		}
	}
	vd.props = applyProps(vd.props, ch)
	return c.withUnreached(Reply{c.done(opModify, objVlmDfn, nil, "Volume definition with number '%d' of resource definition '%s' modified.", nr, rd.name)}, rd.nodes()...)
}

func (c *Cluster) checkResize(rd *definition, vd *volumeDef, sizeKiB int64) Reply {
	const op = opModify | objVlmDfn
	if sizeKiB < 4 || sizeKiB > maxVolumeKiB {
		return c.fail(CodeInvalidVolumeSize, op, "The specified volume size %d KiB is invalid.", sizeKiB)
	}
	if len(rd.rsc) > 0 && sizeKiB < vd.sizeKiB {
		return c.fail(CodeInvalidVolumeSize, op, "Deployed volumes cannot shrink from %d to %d KiB.", vd.sizeKiB, sizeKiB)
	}
	for _, r := range rd.places() {
		v := r.volume(vd.nr)
		if v == nil || v.pool == nil {
			continue
		}
		if r.node.online() && v.disk != diskUpToDate {
			return c.fail(CodeUnknown, op, "Resize refused: non-UpToDate DRBD device on node '%s'.", r.node.name)
		}
		if !r.fits(v.pool.name, rd.gross(sizeKiB)-rd.grossKiB(vd)) {
			return c.fail(CodeNotEnoughFreeSpace, op, "Not enough free space in storage pool '%s' on node '%s'.", v.pool.name, r.node.name)
		}
	}
	return nil
}

// DeleteVolumeDefinition removes a volume everywhere.
func (c *Cluster) DeleteVolumeDefinition(name string, nr int) Reply {
	defer c.lock(true)()
	const op = opDelete | objVlmDfn
	rd := c.rds[key(name)]
	if rd == nil {
		return c.noDefinition(name, op)
	}
	vd := rd.volumeDef(nr)
	if vd == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Volume definition %d of '%s' not found.", nr, rd.name)}
	}
	for _, r := range rd.places() {
		if use := r.usage(); use != nil && *use {
			return c.fail(CodeInUse, op, "Resource '%s' on node '%s' is still in use.", rd.name, r.node.name)
		}
	}
	rd.vds = slices.DeleteFunc(rd.vds, func(x *volumeDef) bool { return x == vd })
	for _, r := range rd.places() {
		c.dropVolume(r, nr)
	}
	c.settle(rd)
	return c.withUnreached(Reply{c.done(opDelete, objVlmDfn, nil, "Volume definition with number '%d' of resource definition '%s' deleted.", nr, rd.name)}, rd.nodes()...)
}

// SpawnRequest is what a client may say when it spawns from a group.
type SpawnRequest struct {
	Name, ExternalName string
	SizesKiB           []int64
	Partial            bool
	DefinitionsOnly    bool
	Filter             *SelectFilter
	PeerSlots          int
	Props              Props
}

// Spawn makes a resource of one volume from a group and places it.
func (c *Cluster) Spawn(groupName, name string, sizeKiB int64) Reply {
	return c.SpawnWith(groupName, SpawnRequest{Name: name, SizesKiB: []int64{sizeKiB}})
}

// SpawnWith is Spawn with all of LINSTOR's options. When the placement fails the definition stays behind, as in
// LINSTOR.
func (c *Cluster) SpawnWith(groupName string, req SpawnRequest) Reply {
	defer c.lock(true)()
	const op = opCreate | objRscGrp
	g := c.groups[key(groupName)]
	if g == nil {
		return c.noGroup(groupName, op)
	}
	if !req.Partial && len(req.SizesKiB) != len(g.vgs) {
		return c.fail(228, op, "The resource group '%s' has %d volume groups but %d sizes were given.", g.name, len(g.vgs), len(req.SizesKiB))
	}
	rd, out := c.createDefinition(DefinitionRequest{Name: req.Name, ExternalName: req.ExternalName, Group: g.name, PeerSlots: req.PeerSlots, Props: req.Props})
	if rd == nil {
		return out
	}
	for i, size := range req.SizesKiB {
		r := c.createVolumeDef(rd, ptr(i), size, nil, nil)
		out = append(out, r...)
		if r.Failed() {
			c.dropDefinition(rd)
			return out
		}
	}
	if !req.DefinitionsOnly {
		var filter SelectFilter
		if req.Filter != nil {
			filter = *req.Filter
		}
		out = append(out, c.autoplace(rd, mergeFilter(g.filter, filter))...)
		if out.Failed() {
			return out
		}
	}
	return append(out, c.done(opCreate, objRscDfn, map[string]string{"RscDfn": rd.name}, "Resource '%s' successfully spawned from group '%s'.", rd.name, g.name))
}
