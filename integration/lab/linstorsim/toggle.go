package linstorsim

import "strings"

const tieBreakerProp = "DrbdOptions/auto-add-quorum-tiebreaker"

// ToggleDiskful gives a diskless resource a disk, in poolName or where LINSTOR would put it. With migrateFrom the replica there
// is deleted once the new one is UpToDate and the old one was seen unused. The disk still has to sync when it returns.
func (c *Cluster) ToggleDiskful(resource, nodeName, poolName, migrateFrom string) Reply {
	defer c.lock(true)()
	r := c.place(resource, nodeName)
	if r == nil {
		return c.noPlace(resource, nodeName)
	}
	if migrateFrom != "" {
		if src := c.place(resource, migrateFrom); src == nil || !src.diskful() {
			return c.fail(CodeRscNotFound, opModify|objRsc, "Resource '%s' on node '%s' has no disk to migrate.", resource, migrateFrom)
		}
	}
	defer c.settle(r.rd)
	return c.toggle(r, true, poolName, migrateFrom)
}

// ToggleDiskless takes the disk of a resource away. LINSTOR refuses it with 991 for the only online diskful replica.
func (c *Cluster) ToggleDiskless(resource, nodeName string) Reply {
	defer c.lock(true)()
	r := c.place(resource, nodeName)
	if r == nil {
		return c.noPlace(resource, nodeName)
	}
	defer c.settle(r.rd)
	return c.toggle(r, false, "", "")
}

// HoldToggles makes satellites stop half-way through toggle-disk (flags DISK_ADDING, DISK_REMOVING) until it is called with
// false; the state in which a controller restart or a lost satellite hurts.
func (c *Cluster) HoldToggles(hold bool) {
	defer c.lock(true)()
	c.held = hold
	if !hold {
		for _, rd := range sorted(c.rds) {
			c.settle(rd)
		}
	}
}

func (c *Cluster) noPlace(resource, nodeName string) Reply {
	if c.rds[key(resource)] == nil {
		return c.noDefinition(resource, opModify|objRsc)
	}
	return c.noResource(resource, nodeName, opModify|objRsc)
}

func (c *Cluster) toggle(r *resource, diskful bool, poolName, migrateFrom string) Reply {
	const op = opModify | objRsc
	if r.flags&rscToggling != 0 {
		return c.toggleAgain(r, diskful)
	}
	if r.diskful() == diskful {
		if c.is134() {
			return Reply{c.info(CodeInfoNoop, op, "Resource '%s' on node '%s' is already as requested.", r.rd.name, r.node.name)}
		}
		if diskful {
			return Reply{c.warn(CodeWarnAlreadyDiskful, op, "Resource '%s' on node '%s' already has disk.", r.rd.name, r.node.name)}
		}
		return Reply{c.warn(CodeWarnAlreadyDiskless, op, "Resource '%s' on node '%s' already diskless.", r.rd.name, r.node.name)}
	}
	if diskful {
		return c.requestAdd(r, poolName, migrateFrom)
	}
	return c.requestRemove(r)
}

// toggleAgain is a call while an earlier toggle is pending: refused up to 1.33; from 1.34 the same direction retries and the
// other one turns round.
func (c *Cluster) toggleAgain(r *resource, diskful bool) Reply {
	const op = opModify | objRsc
	if !c.is134() {
		return c.fail(CodeBusy, op, "Resource '%s' on node '%s' is already being toggled.", r.rd.name, r.node.name)
	}
	adding := r.flags&(rscAddRequested|rscAdding) != 0
	if adding == diskful {
		c.resumeToggles(r.rd)
		return c.withUnreached(Reply{c.info(CodeInfoNoop, op, "Retrying toggle of resource '%s' on node '%s'.", r.rd.name, r.node.name)}, r.node)
	}
	gone := r.flags&rscRemoving != 0 // its volumes may be gone: it has to be added again
	r.flags &^= rscToggling
	if diskful && gone {
		r.flags |= rscDrbdDiskless
		return c.requestAdd(r, r.wantPool, "")
	}
	return c.withUnreached(Reply{c.done(opModify, objRsc, nil, "Toggle of resource '%s' on node '%s' aborted.", r.rd.name, r.node.name)}, r.node)
}

func (c *Cluster) requestAdd(r *resource, poolName, migrateFrom string) Reply {
	const op = opModify | objRsc
	name := c.poolFor(r.rd, r.node, poolName)
	p := r.node.pools[key(name)]
	if p == nil || p.diskless() {
		return c.fail(CodePoolNotFound, op, "Storage pool '%s' for resource '%s' on node '%s' not found.", name, r.rd.name, r.node.name)
	}
	if r.node.online() && p.room(DefaultOversubscription) < r.rd.totalGross() {
		code := int64(CodeNotEnoughFreeSpace)
		if atLeast(c.ctl.Version, 1, 33) {
			code = CodeInvalidVolumeSize
		}
		return c.fail(code, op, "Not enough free space available for volume(s) of resource '%s' in storage pool '%s' on node '%s'.", r.rd.name, p.name, r.node.name)
	}
	r.flags &^= rscTieBreakerBit
	r.flags |= rscAddRequested
	r.wantPool = p.name
	if migrateFrom != "" {
		r.props = applyProps(r.props, PropsChange{Override: Props{"MigrateFrom": migrateFrom}})
	}
	out := c.progress(r)
	return append(out, c.manageTieBreaker(r.rd)...)
}

func (c *Cluster) requestRemove(r *resource) Reply {
	const op = opModify | objRsc
	others := 0
	for _, o := range r.rd.rsc {
		if o != r && o.keeps() && o.diskful() && o.node.online() {
			others++
		}
	}
	if others == 0 {
		return c.fail(CodeReplicaCount, op, "Cannot remove the disk of the last online diskful replica of '%s'.", r.rd.name)
	}
	r.flags |= rscRemoveRequested
	out := c.progress(r)
	return append(out, c.manageTieBreaker(r.rd)...)
}

// progress takes a requested toggle as far as its satellite allows and answers for it.
func (c *Cluster) progress(r *resource) Reply {
	out := Reply{c.done(opModify, objRsc, map[string]string{"RscDfn": r.rd.name, "Node": r.node.name},
		"Toggle disk on resource '%s' on node '%s' registered.", r.rd.name, r.node.name)}
	if !r.node.online() {
		return append(out, c.notConnected(r.node))
	}
	c.carryOut(r)
	return out
}

func (c *Cluster) carryOut(r *resource) {
	switch {
	case r.flags&rscAddRequested != 0 && c.held:
		r.flags |= rscAdding
	case r.flags&rscAddRequested != 0:
		r.flags &^= rscToggling | rscDrbdDiskless
		r.props = applyProps(r.props, PropsChange{Override: Props{"StorPoolName": r.wantPool}})
		if from := r.props["MigrateFrom"]; from != "" {
			r.rd.migrations = append(r.rd.migrations, migration{from: from, to: r.node.name})
			r.props = applyProps(r.props, PropsChange{Delete: []string{"MigrateFrom"}})
		}
		c.deploy(r)
	case r.flags&rscRemoveRequested != 0 && c.held:
		r.flags |= rscRemoving | rscDrbdDiskless
		c.releaseAll(r)
	case r.flags&rscRemoveRequested != 0:
		r.flags &^= rscToggling
		r.flags |= rscDrbdDiskless
		r.props = applyProps(r.props, PropsChange{Override: Props{"StorPoolName": DisklessPool}, Delete: []string{"DrbdOptions/SkipDisk"}})
		c.releaseAll(r)
	}
}

func (c *Cluster) releaseAll(r *resource) {
	for _, v := range r.vols {
		c.release(v)
	}
}

// resumeToggles goes on with pending toggles once every node of the definition is online.
func (c *Cluster) resumeToggles(rd *definition) {
	pending := false
	for _, r := range rd.rsc {
		if !r.node.online() {
			return
		}
		pending = pending || r.flags&rscToggling != 0
	}
	if !pending || c.held {
		return
	}
	for _, r := range rd.places() {
		c.carryOut(r)
	}
	c.rejoin(rd)
}

// migration waits to delete the source of a migrate-disk. Like LINSTOR's it latches "source unused" once and does not
// look again before it deletes.
type migration struct {
	from, to   string
	seenUnused bool
}

func (c *Cluster) migrate(rd *definition) {
	waiting := rd.migrations
	rd.migrations = nil
	for _, m := range waiting {
		src, dst := rd.rsc[key(m.from)], rd.rsc[key(m.to)]
		if src == nil || dst == nil {
			continue
		}
		if use := src.usage(); use != nil && !*use {
			m.seenUnused = true
		}
		if !m.seenUnused || !dst.upToDate() || !src.node.online() {
			rd.migrations = append(rd.migrations, m)
			continue
		}
		c.deleteResource(src, false)
	}
}

func (rd *definition) tieBreaker() *resource {
	for _, r := range rd.places() {
		if r.tieBreaker() && r.flags&rscDelete == 0 {
			return r
		}
	}
	return nil
}

func (c *Cluster) tieBreakerEnabled(rd *definition) bool {
	return strings.EqualFold(c.prop(rd, tieBreakerProp), "true")
}

// wantsTieBreaker is LINSTOR's rule: the feature and quorum are on, the number of diskful replicas is even and at least two,
// and no plain diskless resource already breaks ties.
func (c *Cluster) wantsTieBreaker(rd *definition) bool {
	if rd.flags&rdDelete != 0 || !c.tieBreakerEnabled(rd) ||
		strings.EqualFold(c.prop(rd, "DrbdOptions/Resource/quorum"), "off") {
		return false
	}
	diskful := 0
	for _, r := range rd.rsc {
		switch {
		case r.keeps():
			diskful++
		case r.flags&rscDelete == 0 && !r.tieBreaker():
			return false
		}
	}
	return diskful >= 2 && diskful%2 == 0
}

// manageTieBreaker creates or removes the tie-breaker after a change of a definition's places.
func (c *Cluster) manageTieBreaker(rd *definition) Reply {
	tb := rd.tieBreaker()
	switch wanted := c.wantsTieBreaker(rd); {
	case wanted && tb == nil:
		n := c.tieBreakerNode(rd)
		if n == nil {
			return Reply{c.warn(CodeWarnNoTieBreaker, 0, "Could not find suitable node to automatically create a tie breaking resource for '%s'.", rd.name)}
		}
		c.addPlace(rd, n, rscTieBreaker, "", nil)
		return Reply{c.info(CodeInfoTieBreakerCreated, 0, "Tie breaker resource '%s' created on %s", rd.name, n.name)}
	case !wanted && tb != nil && tb.node.online():
		c.removePlace(tb)
		return Reply{c.info(CodeInfoTieBreakerDeleting, 0, "Tie breaker marked for deletion")}
	}
	return nil
}

// tieBreakerNode is the eligible node with the fewest resources, by name among equals.
func (c *Cluster) tieBreakerNode(rd *definition) *node {
	var best *node
	for _, n := range sorted(c.nodes) {
		if rd.rsc[key(n.name)] == nil && c.placeable(n) && (best == nil || len(n.resources) < len(best.resources)) {
			best = n
		}
	}
	return best
}

func (c *Cluster) placeable(n *node) bool {
	return n.online() && n.flags == 0 && (n.typ == "COMBINED" || n.typ == "SATELLITE") &&
		!strings.EqualFold(n.props["AutoplaceTarget"], "false")
}

func (c *Cluster) takeover(r *resource) Entry {
	return c.info(CodeInfoTieBreakerTakeover, 0,
		"The given resource will not be deleted but will be taken over as a linstor managed tiebreaker resource.")
}

// convertToTieBreaker keeps a resource that was asked to be deleted as the tie-breaker.
func (c *Cluster) convertToTieBreaker(r *resource) Reply {
	out := Reply{c.takeover(r)}
	if !r.node.online() {
		// The disk goes when the satellite is back; until then the flags say what is wanted.
		if r.diskful() {
			r.flags |= rscRemoveRequested
		} else {
			r.flags |= rscTieBreaker
		}
		return append(out, c.notConnected(r.node))
	}
	c.releaseAll(r)
	r.flags |= rscTieBreaker
	r.props = applyProps(r.props, PropsChange{Override: Props{"StorPoolName": DisklessPool}})
	return out
}
