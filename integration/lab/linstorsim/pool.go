package linstorsim

import (
	"fmt"
	"math"
	"slices"
)

// extentKiB is LVM's extent: allocations are rounded up to it.
const extentKiB = 4096

// chunkKiB is the chunk of a thin pool: thin allocations are rounded up to it.
const chunkKiB = 64

// capacityKiB are the kinds' numbers as the satellite has them.
type capacityKiB struct{ free, total int64 }

type poolDfn struct {
	name  string
	props Props
}

type pool struct {
	node       *node
	name, kind string
	uuid       string
	props      Props
	total      int64 // truth, KiB
	vols       map[*volume]struct{}
	reserved   int64        // gross size of all volumes, KiB
	cached     *capacityKiB // what the controller remembers; nil before the first contact
}

func (p *pool) thin() bool {
	return p.kind == "LVM_THIN" || p.kind == "FILE_THIN" || p.kind == "ZFS_THIN"
}
func (p *pool) diskless() bool { return p.kind == "DISKLESS" }

// truth is what the satellite would answer now.
func (p *pool) truth() capacityKiB {
	if p.diskless() {
		return capacityKiB{math.MaxInt64, math.MaxInt64}
	}
	free := p.total
	for v := range p.vols {
		free -= v.allocated
	}
	return capacityKiB{max(free, 0), p.total}
}

// AddPool adds a storage pool of totalKiB to a node; kind is LVM, LVM_THIN, FILE_THIN or DISKLESS. It panics when the
// node does not exist.
func (c *Cluster) AddPool(nodeName, name, kind string, totalKiB int64) {
	defer c.lock(true)()
	n := c.nodes[key(nodeName)]
	if n == nil {
		panic(fmt.Sprintf("add pool %s: no node %s", name, nodeName))
	}
	c.addPoolLocked(n, name, kind, totalKiB, nil)
}

func (c *Cluster) addPoolLocked(n *node, name, kind string, totalKiB int64, props Props) {
	if c.poolDfn[key(name)] == nil {
		c.poolDfn[key(name)] = &poolDfn{name: name}
	}
	p := &pool{node: n, name: c.poolDfn[key(name)].name, kind: kind, uuid: c.newUUID(), total: totalKiB,
		vols: map[*volume]struct{}{}, props: props}
	if p.props == nil && !p.diskless() {
		p.props = Props{"StorDriver/StorPoolName": name}
	}
	n.pools[key(name)] = p
	c.refresh(p)
}

// CreatePool creates a storage pool as a client asks for it. The satellite finds 0 KiB in it until GrowPool.
func (c *Cluster) CreatePool(rec StoragePool) Reply {
	defer c.lock(true)()
	const op = opCreate | objPool
	n := c.nodes[key(rec.NodeName)]
	switch {
	case n == nil:
		return c.noNode(rec.NodeName, op)
	case !poolNameRE.MatchString(rec.Name):
		return c.fail(CodeInvalidPoolName, op, "The specified storage pool name '%s' is invalid.", rec.Name)
	case n.pools[key(rec.Name)] != nil:
		return c.fail(CodePoolExists, op, "Storage pool '%s' on node '%s' already exists.", rec.Name, n.name)
	case !slices.Contains([]string{"DISKLESS", "LVM", "LVM_THIN", "FILE", "FILE_THIN"}, rec.ProviderKind):
		return c.fail(989, op, "Node '%s' does not support storage provider '%s'.", n.name, rec.ProviderKind)
	}
	c.addPoolLocked(n, rec.Name, rec.ProviderKind, 0, applyProps(rec.Props, PropsChange{}))
	return c.withUnreached(Reply{c.done(opCreate, objPool, map[string]string{"StorPool": rec.Name, "Node": n.name},
		"Successfully created storage pool '%s' on node '%s'", rec.Name, n.name)}, n)
}

// GrowPool adds deltaKiB (negative shrinks) to the real size of a pool; the controller learns it with its next refresh.
func (c *Cluster) GrowPool(nodeName, name string, deltaKiB int64) {
	defer c.lock(true)()
	if p := c.pool(nodeName, name); p != nil {
		p.total = max(p.total+deltaKiB, 0)
	}
}

func (c *Cluster) pool(nodeName, name string) *pool {
	n := c.nodes[key(nodeName)]
	if n == nil {
		return nil
	}
	return n.pools[key(name)]
}

// ModifyPool changes a pool's properties.
func (c *Cluster) ModifyPool(nodeName, name string, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objPool
	p := c.pool(nodeName, name)
	if p == nil {
		return c.fail(CodePoolNotFound, op, "Storage pool '%s' on node '%s' not found.", name, nodeName)
	}
	if r := c.checkKeys(ch, op); r != nil {
		return r
	}
	if nic, ok := ch.Override["PrefNic"]; ok && p.node.netIf(nic) == nil {
		return c.fail(CodeInvalidProp, op, "The network interface '%s' of node '%s' does not exist!", nic, p.node.name)
	}
	p.props = applyProps(p.props, ch)
	return c.withUnreached(Reply{c.done(opModify, objPool, nil, "Storage pool '%s' on node '%s' updated.", p.name, p.node.name)}, p.node)
}

// DeletePool removes a pool without volumes.
func (c *Cluster) DeletePool(nodeName, name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objPool
	n := c.nodes[key(nodeName)]
	if n == nil {
		return c.noNode(nodeName, op)
	}
	p := n.pools[key(name)]
	if p == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Storage pool '%s' on node '%s' not found.", name, n.name)}
	}
	if len(p.vols) > 0 {
		return c.fail(CodeInUse, op, "Storage pool '%s' on node '%s' still holds %d volumes.", p.name, n.name, len(p.vols))
	}
	delete(n.pools, key(name))
	return c.withUnreached(Reply{c.done(opDelete, objPool, nil, "Storage pool '%s' on node '%s' deleted.", p.name, n.name)}, n)
}

// Pools lists storage pools. Not cached, it asks the satellites of thin pools (and so also refreshes the controller's
// memory); thick pools always come from memory. On a node that is not online both capacities are nil and a 1002
// report explains it, cached or not.
func (c *Cluster) Pools(nodes, names, props []string, cached bool) []StoragePool {
	defer c.lock(false)()
	out := []StoragePool{}
	for _, n := range sorted(c.nodes) {
		if !nameIn(nodes, n.name) {
			continue
		}
		for _, p := range sorted(n.pools) {
			if nameIn(names, p.name) && propsMatch(p.props, props) {
				if !cached && p.thin() {
					c.refresh(p)
				}
				out = append(out, c.poolRecord(p))
			}
		}
	}
	return out
}

func (c *Cluster) poolRecord(p *pool) StoragePool {
	rec := StoragePool{Name: p.name, NodeName: p.node.name, ProviderKind: p.kind, Props: p.props, UUID: p.uuid,
		FreeSpaceMgrName: p.node.name + ";" + p.name, SupportsSnapshots: p.thin()}
	if p.kind == "LVM" || p.kind == "LVM_THIN" {
		rec.StaticTraits = map[string]string{"Provisioning": "Fat", "SupportsSnapshots": "false"}
		if p.thin() {
			rec.StaticTraits = map[string]string{"Provisioning": "Thin", "SupportsSnapshots": "true"}
		}
	}
	switch {
	case !p.node.online():
		rec.Reports = []Entry{c.notConnected(p.node)}
	case p.cached != nil:
		rec.FreeCapacity, rec.TotalCapacity = ptr(p.cached.free), ptr(p.cached.total)
	}
	return rec
}

// refresh copies the satellite's capacity into the controller's memory when the satellite can be asked.
func (c *Cluster) refresh(p *pool) {
	if p.node.online() && !p.node.hung {
		t := p.truth()
		p.cached = &t
	}
}

func (c *Cluster) refreshAll() {
	c.sinceCache = 0
	for _, n := range c.nodes {
		for _, p := range n.pools {
			c.refresh(p)
		}
	}
}

// PoolDefinitions lists the storage pool definitions.
func (c *Cluster) PoolDefinitions(name string) []StoragePoolDefinition {
	defer c.lock(false)()
	out := []StoragePoolDefinition{}
	for _, d := range sorted(c.poolDfn) {
		if name == "" || key(name) == key(d.name) {
			out = append(out, StoragePoolDefinition{d.name, d.props})
		}
	}
	return out
}

// CreatePoolDefinition makes a storage pool definition without pools.
func (c *Cluster) CreatePoolDefinition(name string, props Props) Reply {
	defer c.lock(true)()
	const op = opCreate | objPoolDfn
	if !poolNameRE.MatchString(name) {
		return c.fail(CodeInvalidPoolName, op, "The specified storage pool name '%s' is invalid.", name)
	}
	if c.poolDfn[key(name)] != nil {
		return c.fail(CodePoolDfnExists, op, "Storage pool definition '%s' already exists.", name)
	}
	c.poolDfn[key(name)] = &poolDfn{name, props}
	return Reply{c.done(opCreate, objPoolDfn, nil, "New storage pool definition '%s' created.", name)}
}

// ModifyPoolDefinition changes the properties of a storage pool definition.
func (c *Cluster) ModifyPoolDefinition(name string, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objPoolDfn
	d := c.poolDfn[key(name)]
	if d == nil {
		return c.fail(CodePoolDfnNotFound, op, "Storage pool definition '%s' not found.", name)
	}
	if r := c.checkKeys(ch, op); r != nil {
		return r
	}
	d.props = applyProps(d.props, ch)
	return Reply{c.done(opModify, objPoolDfn, nil, "Storage pool definition '%s' updated.", d.name)}
}

// DeletePoolDefinition removes a storage pool definition that no pool uses.
func (c *Cluster) DeletePoolDefinition(name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objPoolDfn
	d := c.poolDfn[key(name)]
	if d == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Storage pool definition '%s' not found.", name)}
	}
	for _, n := range c.nodes {
		if n.pools[key(name)] != nil {
			return c.fail(CodeInUse, op, "Storage pool definition '%s' still has storage pools.", d.name)
		}
	}
	delete(c.poolDfn, key(name))
	return Reply{c.done(opDelete, objPoolDfn, nil, "Storage pool definition '%s' deleted.", d.name)}
}
