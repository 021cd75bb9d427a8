package linstorsim

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// Connection states of a satellite, as LINSTOR names them. Only Online is usable.
const (
	StatusOnline          = "ONLINE"
	StatusOffline         = "OFFLINE"
	StatusConnected       = "CONNECTED"
	StatusFullSyncFailed  = "FULL_SYNC_FAILED"
	StatusOtherController = "OTHER_CONTROLLER"
	StatusVersionMismatch = "VERSION_MISMATCH"
	StatusUnknown         = "UNKNOWN"
)

const (
	nodeDelete = 1 << iota
	nodeEvictedBit
	nodeEvacuate
	nodeEvicted = nodeEvictedBit | nodeDelete
)

var nodeFlags = []flagName{{nodeDelete, "DELETE"}, {nodeEvicted, "EVICTED"}, {nodeEvacuate, "EVACUATE"}}

// flagName ties a name to its bits. LINSTOR lists every name whose bits are all set, so super-sets show their parts.
type flagName struct {
	bits uint64
	name string
}

func flagNames(table []flagName, bits uint64) []string {
	var out []string
	for _, f := range table {
		if bits&f.bits == f.bits {
			out = append(out, f.name)
		}
	}
	return out
}

type netIf struct {
	name, address, uuid, encryption string
	port                            *int
}

type node struct {
	name, typ, uuid string
	props           Props
	flags           uint64
	status          string
	poweredOff      bool // the host is down: DRBD links are gone too
	hung            bool // connected, but does not answer
	nets            []*netIf
	pools           map[string]*pool
	resources       map[string]*resource
	evictedAt       *int64
}

func (n *node) online() bool { return n.status == StatusOnline }

func (n *node) activeIf() string {
	if a := n.props["CurStltConnName"]; a != "" {
		return a
	}
	return "default"
}

func (n *node) record() Node {
	rec := Node{Name: n.name, Type: n.typ, Flags: flagNames(nodeFlags, n.flags), Props: n.props,
		ConnectionStatus: n.status, UUID: n.uuid, EvictionTimestamp: n.evictedAt}
	if n.typ != "CONTROLLER" && n.typ != "AUXILIARY" {
		rec.StorageProviders = []string{"DISKLESS", "LVM", "LVM_THIN", "FILE", "FILE_THIN"}
		rec.ResourceLayers = []string{"DRBD", "STORAGE"}
		rec.UnsupportedProviders = map[string][]string{"ZFS": {"'zfs' is not available"}}
		rec.UnsupportedLayers = map[string][]string{"LUKS": {"'cryptsetup' is not available"}}
	}
	for _, i := range n.nets {
		rec.NetInterfaces = append(rec.NetInterfaces, n.ifRecord(i))
	}
	return rec
}

func (n *node) ifRecord(i *netIf) NetInterface {
	return NetInterface{Name: i.name, Address: i.address, SatellitePort: i.port, EncryptionType: i.encryption,
		IsActive: strings.EqualFold(i.name, n.activeIf()), UUID: i.uuid}
}

func (n *node) netIf(name string) *netIf {
	for _, i := range n.nets {
		if strings.EqualFold(i.name, name) {
			return i
		}
	}
	return nil
}

var (
	nodeNameRE = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*$`)
	rscNameRE  = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_-]{1,47}$`)
	poolNameRE = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_-]{1,47}$`)
	netNameRE  = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{1,31}$`)
)

// AddNode adds a COMBINED node with a default interface at address, already online. It panics on a bad name: the lab
// is wrong then, not LINSTOR's user.
func (c *Cluster) AddNode(name, address string) {
	c.ExpectSatellite(name)
	r := c.CreateNode(Node{Name: name, Type: "COMBINED", NetInterfaces: []NetInterface{
		{Name: "default", Address: address, SatellitePort: ptr(3366), EncryptionType: "PLAIN"}}})
	if err := r.Err(); err != nil {
		panic(fmt.Sprintf("add node %s: %v", name, err))
	}
}

// ExpectSatellite declares that a satellite runs under this host name, so that a node created for it comes online.
func (c *Cluster) ExpectSatellite(name string) {
	defer c.lock(true)()
	c.expect[key(name)] = true
}

// CreateNode creates a node as a client asks for it. It comes online when ExpectSatellite named it.
func (c *Cluster) CreateNode(rec Node) Reply {
	defer c.lock(true)()
	const op = opCreate | objNode
	typ := strings.ToUpper(rec.Type)
	if typ == "" {
		typ = "SATELLITE"
	}
	switch {
	case !nodeNameRE.MatchString(rec.Name):
		return c.fail(CodeInvalidNodeName, op, "The specified node name '%s' is invalid.", rec.Name)
	case !slices.Contains([]string{"SATELLITE", "COMBINED", "CONTROLLER", "AUXILIARY"}, typ):
		return c.fail(201, op, "The specified node type '%s' is invalid.", rec.Type)
	case c.nodes[key(rec.Name)] != nil:
		return c.fail(CodeNodeExists, op, "Node '%s' already exists.", rec.Name)
	case len(rec.NetInterfaces) == 0:
		return c.fail(604, op, "No network interfaces have been given for node '%s'.", rec.Name)
	}
	n := &node{name: rec.Name, typ: typ, uuid: c.newUUID(), props: Props{}, status: StatusOffline,
		pools: map[string]*pool{}, resources: map[string]*resource{}}
	for k, v := range rec.Props {
		n.props[k] = v
	}
	for _, i := range rec.NetInterfaces {
		if r := c.addNetIf(n, i, op); r != nil {
			return r
		}
		if i.IsActive || n.props["CurStltConnName"] == "" && i.SatellitePort != nil {
			n.props["CurStltConnName"] = i.Name
		}
	}
	c.nodes[key(n.name)] = n
	c.addPoolLocked(n, DisklessPool, "DISKLESS", 0, nil)
	out := Reply{c.done(opCreate, objNode, map[string]string{"Node": n.name}, "New node '%s' registered.", n.name)}
	if c.expect[key(n.name)] {
		n.status = StatusOnline
		out = append(out, c.done(opModify, objNode, map[string]string{"Node": n.name}, "Node '%s' authenticated", n.name))
	}
	c.emit(Event{"nodes", "node-create", NodeEvent{n.record()}})
	return out
}

func (c *Cluster) addNetIf(n *node, rec NetInterface, op int64) Reply {
	if !netNameRE.MatchString(rec.Name) {
		return c.fail(CodeInvalidNetName, op, "The specified net interface name '%s' is invalid.", rec.Name)
	}
	if _, err := netip.ParseAddr(rec.Address); err != nil {
		return c.fail(CodeInvalidNetAddr, op, "The specified ip address '%s' is invalid.", rec.Address)
	}
	if n.netIf(rec.Name) != nil {
		return c.fail(CodeNetIfExists, op, "Net interface '%s' already exists on node '%s'.", rec.Name, n.name)
	}
	i := &netIf{name: rec.Name, address: rec.Address, uuid: c.newUUID(), port: rec.SatellitePort, encryption: rec.EncryptionType}
	if i.port != nil && i.encryption == "" {
		i.encryption = "PLAIN"
	}
	n.nets = append(n.nets, i)
	return nil
}

// Nodes returns the nodes in name order; names filters them (none means all), props by "key" or "key=value".
func (c *Cluster) Nodes(names, props []string) []Node {
	defer c.lock(false)()
	out := []Node{}
	for _, n := range sorted(c.nodes) {
		if nameIn(names, n.name) && propsMatch(n.props, props) {
			out = append(out, n.record())
		}
	}
	return out
}

func nameIn(filter []string, name string) bool {
	return len(filter) == 0 || slices.ContainsFunc(filter, func(f string) bool { return strings.EqualFold(f, name) })
}

func propsMatch(props Props, filter []string) bool {
	for _, f := range filter {
		k, v, exact := strings.Cut(f, "=")
		if have, ok := props[k]; !ok || exact && have != v {
			return false
		}
	}
	return true
}

func (c *Cluster) noNode(name string, op int64) Reply {
	return c.fail(CodeNodeNotFound, op, "Node '%s' not found.", name)
}

// ModifyNode changes a node's properties and, when typ is not empty, its type.
func (c *Cluster) ModifyNode(name, typ string, ch PropsChange) Reply {
	defer c.lock(true)()
	const op = opModify | objNode
	n := c.nodes[key(name)]
	if n == nil {
		return c.noNode(name, op)
	}
	if r := c.checkKeys(ch, op); r != nil {
		return r
	}
	if nic, ok := ch.Override["PrefNic"]; ok && n.netIf(nic) == nil {
		return c.fail(CodeInvalidProp, op, "The network interface '%s' of node '%s' does not exist!", nic, n.name)
	}
	if nic, ok := ch.Override["CurStltConnName"]; ok && (n.netIf(nic) == nil || n.netIf(nic).port == nil) {
		return c.fail(CodeInvalidProp, op, "The network interface '%s' cannot carry the satellite connection", nic)
	}
	n.props = applyProps(n.props, ch)
	if typ != "" {
		n.typ = strings.ToUpper(typ)
	}
	c.emit(Event{"nodes", "node-modified", NodeModified{n.record(), n.record()}})
	return Reply{c.done(opModify, objNode, map[string]string{"Node": n.name}, "Node '%s' updated.", n.name)}
}

// withUnreached appends the 1002 warning for each node that is not online, as LINSTOR does after storing a change of
// resources, volumes and pools. Changes of nodes and interfaces come without it (recorded traces 019, 029, 031, 032).
func (c *Cluster) withUnreached(r Reply, nodes ...*node) Reply {
	for _, n := range nodes {
		if n != nil && !n.online() && n.flags&nodeDelete == 0 {
			r = append(r, c.notConnected(n))
		}
	}
	return r
}

// DeleteNode removes a node that holds no resources. A missing node is a warning, not an error.
func (c *Cluster) DeleteNode(name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objNode
	n := c.nodes[key(name)]
	if n == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Node '%s' not found.", name)}
	}
	for _, r := range sorted(n.resources) {
		if r.inUse {
			return c.fail(CodeNodeInUse, op, "Node '%s' cannot be deleted: resource '%s' is in use.", n.name, r.rd.name)
		}
	}
	if len(n.resources) > 0 {
		return c.fail(CodeNodeInUse, op, "Node '%s' cannot be deleted: it still has %d resources.", n.name, len(n.resources))
	}
	return c.dropNode(n)
}

// LoseNode removes a node for ever, with all its resources. LINSTOR refuses it while the node is online.
func (c *Cluster) LoseNode(name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objNode
	n := c.nodes[key(name)]
	if n == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "Node '%s' not found.", name)}
	}
	if n.online() {
		return c.fail(CodeInUse, op, "Node '%s' is still online; use node delete.", n.name)
	}
	for _, r := range sorted(n.resources) {
		c.removePlace(r)
		c.settle(r.rd)
	}
	return c.dropNode(n)
}

func (c *Cluster) dropNode(n *node) Reply {
	delete(c.nodes, key(n.name))
	c.emit(Event{"nodes", "node-delete", NodeEvent{n.record()}})
	return Reply{c.done(opDelete, objNode, map[string]string{"Node": n.name}, "Node '%s' deleted.", n.name)}
}

// Reconnect makes the controller connect again: a satellite left by FULL_SYNC_FAILED or OTHER_CONTROLLER comes back.
func (c *Cluster) Reconnect(name string) Reply {
	defer c.lock(true)()
	n := c.nodes[key(name)]
	if n == nil {
		return c.noNode(name, opModify|objNode)
	}
	if c.expect[key(n.name)] && !n.poweredOff && n.status != StatusOffline {
		c.setStatus(n, StatusOnline)
	}
	return Reply{c.done(opModify, objNode, map[string]string{"Node": n.name}, "Node '%s' will be reconnected.", n.name)}
}

// Evict marks an offline node as evicted; LINSTOR refuses it with 997 while the node is online.
func (c *Cluster) Evict(name string) Reply {
	defer c.lock(true)()
	const op = opModify | objNode
	n := c.nodes[key(name)]
	if n == nil {
		return c.noNode(name, op)
	}
	if n.online() {
		return c.fail(CodeInUse, op, "Node '%s' is still online.", n.name)
	}
	n.flags |= nodeEvicted
	n.evictedAt = ptr(c.now().UnixMilli())
	for _, r := range sorted(n.resources) {
		r.flags |= rscEvicted
		c.settle(r.rd)
	}
	c.emit(Event{"nodes", "node-evicted", NodeEvent{n.record()}})
	return Reply{c.done(opModify, objNode, nil, "Node '%s' evicted.", n.name)}
}

// Evacuate flags a node and its resources so that nothing new is placed there. The model only sets the flags: who
// moves the replicas away is the owner's business.
func (c *Cluster) Evacuate(name string) Reply {
	defer c.lock(true)()
	const op = opModify | objNode
	n := c.nodes[key(name)]
	if n == nil {
		return c.noNode(name, op)
	}
	n.flags |= nodeEvacuate
	for _, r := range sorted(n.resources) {
		r.flags |= rscEvacuate
	}
	c.emit(Event{"nodes", "node-evacuate", NodeEvent{n.record()}})
	return c.withUnreached(Reply{c.done(opModify, objNode, nil, "Node '%s' set to evacuate.", n.name)}, n)
}

// Restore takes EVICTED and EVACUATE back.
func (c *Cluster) Restore(name string) Reply {
	defer c.lock(true)()
	const op = opModify | objNode
	n := c.nodes[key(name)]
	if n == nil {
		return c.noNode(name, op)
	}
	if n.flags&(nodeEvictedBit|nodeEvacuate) == 0 {
		return Reply{c.warn(CodeWarnNotEvacuating, op, "Node '%s' is neither evicted nor evacuating.", n.name)}
	}
	n.flags &^= nodeEvicted | nodeEvacuate
	n.evictedAt = nil
	for _, r := range sorted(n.resources) {
		r.flags &^= rscEvicted | rscEvacuate
		c.settle(r.rd)
	}
	c.emit(Event{"nodes", "node-restored", NodeEvent{n.record()}})
	return c.withUnreached(Reply{c.done(opModify, objNode, nil, "Node '%s' restored.", n.name)}, n)
}

// CreateNetInterface adds an interface to a node.
func (c *Cluster) CreateNetInterface(nodeName string, rec NetInterface) Reply {
	defer c.lock(true)()
	const op = opCreate | objNetIf
	n := c.nodes[key(nodeName)]
	if n == nil {
		return c.noNode(nodeName, op)
	}
	if r := c.addNetIf(n, rec, op); r != nil {
		return r
	}
	if rec.IsActive && rec.SatellitePort != nil {
		c.activate(n, rec.Name)
	}
	return Reply{c.done(opCreate, objNetIf, nil, "New netInterface '%s' on node '%s' registered.", rec.Name, n.name)}
}

// ModifyNetInterface changes an interface. Changing the active one, its address or its port makes the controller
// connect anew, with a full sync.
func (c *Cluster) ModifyNetInterface(nodeName, name string, rec NetInterface) Reply {
	defer c.lock(true)()
	const op = opModify | objNetIf
	n := c.nodes[key(nodeName)]
	if n == nil {
		return c.noNode(nodeName, op)
	}
	i := n.netIf(name)
	if i == nil {
		return c.fail(CodeNetIfNotFound, op, "Node '%s' has no network interface named '%s'.", n.name, name)
	}
	if rec.Address != "" {
		if _, err := netip.ParseAddr(rec.Address); err != nil {
			return c.fail(CodeInvalidNetAddr, op, "The specified ip address '%s' is invalid.", rec.Address)
		}
		i.address = rec.Address
	}
	if rec.SatellitePort != nil {
		i.port = rec.SatellitePort
	}
	if rec.EncryptionType != "" {
		i.encryption = rec.EncryptionType
	}
	if rec.IsActive {
		c.activate(n, i.name)
	}
	return Reply{c.done(opModify, objNetIf, nil, "NetInterface '%s' on node '%s' updated.", i.name, n.name)}
}

func (c *Cluster) activate(n *node, name string) {
	n.props = applyProps(n.props, PropsChange{Override: Props{"CurStltConnName": name}})
}

// DeleteNetInterface removes an interface; LINSTOR does not check whether PrefNic or Paths still name it, but keeps
// the one that carries the satellite connection.
func (c *Cluster) DeleteNetInterface(nodeName, name string) Reply {
	defer c.lock(true)()
	const op = opDelete | objNetIf
	n := c.nodes[key(nodeName)]
	if n == nil {
		return c.noNode(nodeName, op)
	}
	i := n.netIf(name)
	if i == nil {
		return Reply{c.warn(CodeWarnNotFound, op, "NetInterface '%s' on node '%s' not found.", name, n.name)}
	}
	if strings.EqualFold(n.activeIf(), name) && n.online() {
		return c.fail(CodeInUse, op, "NetInterface '%s' carries the satellite connection of node '%s'.", name, n.name)
	}
	n.nets = slices.DeleteFunc(n.nets, func(x *netIf) bool { return x == i })
	return Reply{c.done(opDelete, objNetIf, nil, "NetInterface '%s' on node '%s' deleted.", i.name, n.name)}
}

// SetNode sets the state of the controller's connection to a satellite: one of the Status constants. Coming online
// delivers what was stored meanwhile. The host and its DRBD links are not touched; see SetHost for that.
func (c *Cluster) SetNode(name, status string) {
	defer c.lock(true)()
	if n := c.nodes[key(name)]; n != nil {
		c.setStatus(n, status)
	}
}

// SetHost powers a node's host off or on. Off: satellite offline, DRBD links down, nothing in use there. On: satellite
// online, replicas that missed writes resync.
func (c *Cluster) SetHost(name string, up bool) {
	defer c.lock(true)()
	n := c.nodes[key(name)]
	if n == nil || n.poweredOff == !up {
		return
	}
	n.poweredOff = !up
	if up {
		c.setStatus(n, StatusOnline)
	} else {
		for _, r := range n.resources {
			r.inUse = false
		}
		c.setStatus(n, StatusOffline)
	}
	for _, r := range sorted(n.resources) {
		c.rejoin(r.rd)
		c.settle(r.rd)
	}
}

// SetHung makes a connected satellite stop answering: calls that ask it block.
func (c *Cluster) SetHung(name string, hung bool) {
	defer c.lock(true)()
	if n := c.nodes[key(name)]; n != nil {
		n.hung = hung
	}
}

// CutLink breaks or mends the DRBD links between two nodes; the satellites stay connected to the controller.
func (c *Cluster) CutLink(a, b string, cut bool) {
	defer c.lock(true)()
	k := pair(a, b)
	if cut {
		c.cuts[k] = true
	} else {
		delete(c.cuts, k)
	}
	for _, rd := range sorted(c.rds) {
		if rd.rsc[key(a)] != nil && rd.rsc[key(b)] != nil {
			c.rejoin(rd)
			c.settle(rd)
		}
	}
}

func pair(a, b string) [2]string {
	a, b = key(a), key(b)
	if a > b {
		a, b = b, a
	}
	return [2]string{a, b}
}

// WaitSatellites blocks while one of the named nodes (none means all) is connected but hung, as LINSTOR's REST calls
// do: they have no time limit of their own.
func (c *Cluster) WaitSatellites(ctx context.Context, names ...string) error {
	return c.Await(ctx, func() bool {
		defer c.lock(false)()
		for _, n := range c.nodes {
			if n.hung && n.online() && nameIn(names, n.name) {
				return false
			}
		}
		return true
	})
}

func (c *Cluster) setStatus(n *node, status string) {
	if n.status == status {
		return
	}
	was := n.online()
	n.status = status
	if was != n.online() {
		if n.online() {
			c.deliver(n)
		} else {
			c.lostContact(n)
		}
	}
	for _, r := range sorted(n.resources) {
		c.settle(r.rd)
	}
}

type connection struct {
	rsc, a, b string
	props     Props
}

// Connections returns the node connections (resource "") or a resource's connections that carry properties. a and b
// filter when not empty.
func (c *Cluster) Connections(resource, a, b string) []Connection {
	defer c.lock(false)()
	out := []Connection{}
	for _, k := range sorted(c.conns) {
		match := func(x string) bool { return x == "" || strings.EqualFold(x, k.a) || strings.EqualFold(x, k.b) }
		if strings.EqualFold(k.rsc, resource) && match(a) && match(b) {
			out = append(out, Connection{Resource: k.rsc, NodeA: k.a, NodeB: k.b, Props: k.props})
		}
	}
	return out
}

// ModifyConnection changes the properties of a node pair, for one resource when resource is not empty.
func (c *Cluster) ModifyConnection(resource, a, b string, ch PropsChange) Reply {
	defer c.lock(true)()
	obj := int64(objNodeConn)
	if resource != "" {
		obj = objRscConn
		if rd := c.rds[key(resource)]; rd == nil {
			return c.fail(CodeRscDfnNotFound, opModify|obj, "Resource definition '%s' not found.", resource)
		}
	}
	na, nb := c.nodes[key(a)], c.nodes[key(b)]
	if na == nil {
		return c.noNode(a, opModify|obj)
	}
	if nb == nil {
		return c.noNode(b, opModify|obj)
	}
	if r := c.checkKeys(ch, opModify|obj); r != nil {
		return r
	}
	if na.name > nb.name {
		na, nb = nb, na
	}
	k := key(resource + "\x00" + na.name + "\x00" + nb.name)
	if c.conns[k] == nil {
		c.conns[k] = &connection{rsc: resource, a: na.name, b: nb.name}
	}
	c.conns[k].props = applyProps(c.conns[k].props, ch)
	if len(c.conns[k].props) == 0 {
		delete(c.conns, k)
	}
	return c.withUnreached(Reply{c.done(opModify, obj, nil, "Connection between '%s' and '%s' updated.", na.name, nb.name)}, na, nb)
}
