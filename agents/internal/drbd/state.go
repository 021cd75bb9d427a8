// Package drbd is this host's view of a DRBD 9 resource and the commands to change it.
//
// It promises: a fact that was never reported is unknown, never false; a view is never taken from the middle of one kernel transition's lines; a
// command never outlives its context, even when the child is stuck in the kernel. It does not promise that a view is current: Fresh says whether the
// stream behind it is alive. See DESIGN.md.
package drbd

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// Tri is a boolean that may be unknown.
type Tri uint8

// The values of a Tri. The zero value is Unknown.
const (
	Unknown Tri = iota
	No
	Yes
)

// String returns "yes", "no" or "unknown".
func (t Tri) String() string { return [...]string{"unknown", "no", "yes"}[t%3] }

// TriOf turns what is known into a Tri.
func TriOf(b bool) Tri {
	if b {
		return Yes
	}
	return No
}

func parseTri(s string) Tri {
	switch s {
	case "yes":
		return Yes
	case "no":
		return No
	}
	return Unknown
}

// Role is a node's role for a resource; "" and RoleUnknown: not known.
type Role string

// The roles.
const (
	RoleUnknown Role = "Unknown"
	Primary     Role = "Primary"
	Secondary   Role = "Secondary"
)

// Disk is the state of a replica; "" is not known.
type Disk string

// The disk states (drbd-headers linux/drbd.h).
const (
	Diskless     Disk = "Diskless"
	Attaching    Disk = "Attaching"
	Detaching    Disk = "Detaching"
	Failed       Disk = "Failed"
	Negotiating  Disk = "Negotiating"
	Inconsistent Disk = "Inconsistent"
	Outdated     Disk = "Outdated"
	DUnknown     Disk = "DUnknown"
	Consistent   Disk = "Consistent"
	UpToDate     Disk = "UpToDate"
)

// ConnState is the state of a connection to a peer; "" is not known.
type ConnState string

// The connection states that decisions name.
const (
	StandAlone     ConnState = "StandAlone"
	Disconnecting  ConnState = "Disconnecting"
	Unconnected    ConnState = "Unconnected"
	NetworkFailure ConnState = "NetworkFailure"
	Connecting     ConnState = "Connecting"
	Connected      ConnState = "Connected"
)

// Resource is one resource as this host sees it. Devices are ordered by volume, connections by peer node id.
type Resource struct {
	Name           string       `json:"name"`
	Role           Role         `json:"role"`
	Suspended      string       `json:"suspended"` // "no" or a list of user, no-data, fencing, quorum; "" unknown
	ForceIOFailure Tri          `json:"force_io_failures"`
	MayPromote     Tri          `json:"may_promote"`
	Score          int          `json:"promotion_score"` // 0 also when not reported
	Devices        []Device     `json:"devices"`
	Connections    []Connection `json:"connections"`
}

// Device is one volume of the resource on this host.
type Device struct {
	Volume  int    `json:"volume"`
	Minor   int    `json:"minor"`       // -1 unknown
	Backing string `json:"backing_dev"` // path, "none", or "" unknown
	Disk    Disk   `json:"disk"`
	Client  Tri    `json:"client"` // diskless on purpose
	Open    Tri    `json:"open"`   // drbd-utils 9.29 and later
	Quorum  Tri    `json:"quorum"`
	SizeKiB int64  `json:"size_kib"` // 0 unknown
}

// Connection is the link to one peer.
type Connection struct {
	PeerNodeID int       `json:"peer_node_id"`
	Name       string    `json:"name"`
	State      ConnState `json:"connection"`
	Role       Role      `json:"role"` // the peer's
	// ByHand tells whether a connection that is Disconnecting or StandAlone was taken down by a command on this host, as opposed to refused by DRBD. Unknown: that
	// was not seen, or the connection is in another state.
	ByHand      Tri          `json:"by_hand"`
	PeerDevices []PeerDevice `json:"peer_devices"`
	Reached     bool         `json:"-"` // a path has come up since the connection waits for its peer
	Paths       []Path       `json:"paths"`
}

// PeerDevice is one volume as a peer has it.
type PeerDevice struct {
	Volume          int    `json:"volume"`
	Replication     string `json:"replication"`
	Disk            Disk   `json:"peer_disk"`
	Client          Tri    `json:"peer_client"`
	ResyncSuspended string `json:"resync_suspended"`
	Done            string `json:"done,omitempty"` // percent, while a sync or verify runs
	OutOfSyncKiB    int64  `json:"out_of_sync_kib"`
}

// Path is one network path of a connection, such as "ipv4:10.0.0.1:7000".
type Path struct {
	Local       string `json:"local"`
	Peer        string `json:"peer"`
	Established Tri    `json:"established"`
}

// Connection returns the link to a peer by its name, or nil.
func (r *Resource) Connection(name string) *Connection {
	for i := range r.Connections {
		if r.Connections[i].Name == name {
			return &r.Connections[i]
		}
	}
	return nil
}

// Quorum is Yes when every volume has quorum, No when one has not, else Unknown.
func (r *Resource) Quorum() Tri { return all(r.Devices, func(d Device) Tri { return d.Quorum }) }

// Owner tells whether this host is (Primary, quorum:yes): the only pair that means owner. Two hosts may show Primary at once.
func (r *Resource) Owner() Tri {
	switch {
	case r.Role == Secondary || r.Quorum() == No || r.ForceIOFailure == Yes:
		return No
	case r.Role == Primary && r.Quorum() == Yes:
		return Yes
	}
	return Unknown
}

// SuspendedQuorum tells whether I/O is frozen for want of quorum.
func (r *Resource) SuspendedQuorum() Tri {
	if r.Suspended == "" {
		return Unknown
	}
	return TriOf(slices.Contains(strings.Split(r.Suspended, ","), "quorum"))
}

// LocalUpToDate tells whether every local disk is UpToDate. No device known: Unknown.
func (r *Resource) LocalUpToDate() Tri {
	return all(r.Devices, func(d Device) Tri {
		if d.Disk == "" {
			return Unknown
		}
		return TriOf(d.Disk == UpToDate)
	})
}

// UpToDatePeer tells whether a connected peer holds UpToDate data of every volume.
func (r *Resource) UpToDatePeer() bool {
	return slices.ContainsFunc(r.Connections, func(c Connection) bool {
		return c.State == Connected && len(c.PeerDevices) > 0 &&
			!slices.ContainsFunc(c.PeerDevices, func(d PeerDevice) bool { return d.Disk != UpToDate })
	})
}

// PrimaryPeer returns the peer that this host sees as Primary, or "".
func (r *Resource) PrimaryPeer() string {
	for _, c := range r.Connections {
		if c.State == Connected && c.Role == Primary {
			return c.Name
		}
	}
	return ""
}

func all[T any](list []T, f func(T) Tri) Tri {
	if len(list) == 0 {
		return Unknown
	}
	sum := Yes
	for _, x := range list {
		switch f(x) {
		case No:
			return No
		case Unknown:
			sum = Unknown
		}
	}
	return sum
}

// Clone returns a deep copy.
func (r *Resource) Clone() *Resource {
	c := *r
	c.Devices = slices.Clone(r.Devices)
	c.Connections = slices.Clone(r.Connections)
	for i := range c.Connections {
		k := &c.Connections[i]
		k.PeerDevices, k.Paths = slices.Clone(k.PeerDevices), slices.Clone(k.Paths)
	}
	return &c
}

// State is what one stream of events adds up to. Its zero value is ready and empty.
type State struct {
	Resources map[string]*Resource
	Complete  bool // the initial dump has ended
	Skipped   int  // jumps in the kernel's sequence that drbdsetup reported: the state may be wrong
	Unknown   int  // lines with an object or verb that this package does not know
}

// Apply merges one event. Keys that the event lacks keep their values; objects never announced appear with what is known of them.
// Error: matches ErrSyntax when the keys that identify the object are missing or unreadable; nothing changes then.
func (s *State) Apply(e *Event) error {
	if e.EndOfDump() {
		s.Complete = true
		return nil
	}
	if e.Skipped() != 0 {
		s.Skipped++
		return nil
	}
	switch e.Verb {
	case Exists, Create, Change, Destroy:
	case Rename:
		return s.rename(e)
	case Call, Response:
		return nil // helpers change nothing by themselves
	default:
		s.Unknown++
		return nil
	}
	name, ok := e.Get("name")
	if !ok || name == "" {
		return syntax("no name", string(e.Verb)+" "+e.Object)
	}
	switch e.Object {
	case "resource":
		s.resource(name, e)
		return nil
	case "device":
		return s.device(name, e)
	case "connection", "peer-device", "path":
		return s.connection(name, e)
	}
	s.Unknown++
	return nil
}

func (s *State) rename(e *Event) error {
	name, ok1 := e.Get("name")
	to, ok2 := e.Get("new_name")
	if e.Object != "resource" || !ok1 || !ok2 || to == "" {
		return syntax("no name or new_name", string(e.Verb)+" "+e.Object)
	}
	if r := s.Resources[name]; r != nil {
		delete(s.Resources, name)
		r.Name = to
		s.Resources[to] = r
	}
	return nil
}

func (s *State) resource(name string, e *Event) {
	if e.Verb == Destroy {
		delete(s.Resources, name)
		return
	}
	r := s.need(name)
	if e.Verb != Change { // announced whole: nothing of an earlier life stays, but for objects announced before their resource
		*r = Resource{Name: name, Devices: r.Devices, Connections: r.Connections}
	}
	for _, f := range e.Fields {
		switch f.Key {
		case "role":
			r.Role = Role(f.Value)
		case "suspended":
			r.Suspended = f.Value
		case "force-io-failures":
			r.ForceIOFailure = parseTri(f.Value)
		case "may_promote":
			r.MayPromote = parseTri(f.Value)
		case "promotion_score":
			r.Score, _ = strconv.Atoi(f.Value) // a score is for people; decisions do not use it
		}
	}
}

func (s *State) need(name string) *Resource {
	if s.Resources == nil {
		s.Resources = map[string]*Resource{}
	}
	if s.Resources[name] == nil {
		s.Resources[name] = &Resource{Name: name}
	}
	return s.Resources[name]
}

func (s *State) device(name string, e *Event) error {
	volume, err := number(e, "volume")
	if err != nil {
		return err
	}
	if e.Verb == Destroy {
		if r := s.Resources[name]; r != nil {
			r.Devices = slices.DeleteFunc(r.Devices, func(d Device) bool { return d.Volume == volume })
		}
		return nil
	}
	d := find(&s.need(name).Devices, func(d *Device) int { return d.Volume }, volume, Device{Volume: volume, Minor: -1})
	if e.Verb != Change {
		*d = Device{Volume: volume, Minor: -1}
	}
	for _, f := range e.Fields {
		switch f.Key {
		case "minor":
			if n, err := strconv.Atoi(f.Value); err == nil && n >= 0 {
				d.Minor = n
			}
		case "backing_dev":
			d.Backing = f.Value
		case "disk":
			d.Disk = Disk(f.Value)
		case "client":
			d.Client = parseTri(f.Value)
		case "open":
			d.Open = parseTri(f.Value)
		case "quorum":
			d.Quorum = parseTri(f.Value)
		case "size":
			d.SizeKiB, _ = strconv.ParseInt(f.Value, 10, 64)
		}
	}
	return nil
}

// connection handles the three kinds of object that belong to a peer.
func (s *State) connection(name string, e *Event) error {
	peer, err := number(e, "peer-node-id")
	if err != nil {
		return err
	}
	if e.Verb == Destroy && e.Object == "connection" {
		if r := s.Resources[name]; r != nil {
			r.Connections = slices.DeleteFunc(r.Connections, func(c Connection) bool { return c.PeerNodeID == peer })
		}
		return nil
	}
	volume := 0
	if e.Object == "peer-device" {
		if volume, err = number(e, "volume"); err != nil {
			return err
		}
	}
	if r := s.Resources[name]; e.Verb == Destroy && (r == nil || !slices.ContainsFunc(r.Connections, func(c Connection) bool { return c.PeerNodeID == peer })) {
		return nil
	}
	c := find(&s.need(name).Connections, func(c *Connection) int { return c.PeerNodeID }, peer, Connection{PeerNodeID: peer})
	if conn, ok := e.Get("conn-name"); ok {
		c.Name = conn
	}
	switch e.Object {
	case "connection":
		c.apply(e)
	case "peer-device":
		c.applyPeerDevice(volume, e)
	case "path":
		c.applyPath(e)
	}
	return nil
}

func (c *Connection) apply(e *Event) {
	if e.Verb != Change {
		c.State, c.Role, c.ByHand = "", "", Unknown
	}
	for _, f := range e.Fields {
		switch f.Key {
		case "connection":
			c.move(ConnState(f.Value))
		case "role":
			c.Role = Role(f.Value)
		}
	}
}

// move changes the state and notes who ended the connection. DRBD refuses a peer in the middle of connecting, when a path has come up (it may be down again
// when the refusal is told); a command ends what is connected, or what waits for the peer. So in recordings heal-1, heal-2 and evict.
func (c *Connection) move(to ConnState) {
	from := c.State
	c.State = to
	switch {
	case to == from:
	case to == StandAlone && from == Disconnecting:
	case to == Disconnecting && from == Connected:
		c.ByHand = Yes
	case to == Disconnecting && len(c.Paths) > 0:
		c.ByHand = TriOf(!c.Reached)
	default:
		c.ByHand = Unknown
	}
	if to != from && (to == Unconnected || to == Connecting) {
		c.Reached = false
	}
}

func (c *Connection) applyPeerDevice(volume int, e *Event) {
	if e.Verb == Destroy {
		c.PeerDevices = slices.DeleteFunc(c.PeerDevices, func(d PeerDevice) bool { return d.Volume == volume })
		return
	}
	d := find(&c.PeerDevices, func(d *PeerDevice) int { return d.Volume }, volume, PeerDevice{Volume: volume})
	if e.Verb != Change {
		*d = PeerDevice{Volume: volume}
	}
	for _, f := range e.Fields {
		switch f.Key {
		case "replication":
			if d.Replication = f.Value; f.Value == "Established" || f.Value == "Off" {
				d.Done = "" // no sync runs, so no progress is printed any more
			}
		case "peer-disk":
			d.Disk = Disk(f.Value)
		case "peer-client":
			d.Client = parseTri(f.Value)
		case "resync-suspended":
			d.ResyncSuspended = f.Value
		case "done":
			d.Done = f.Value
		case "out-of-sync":
			d.OutOfSyncKiB, _ = strconv.ParseInt(f.Value, 10, 64)
		}
	}
}

func (c *Connection) applyPath(e *Event) {
	local, _ := e.Get("local")
	peer, _ := e.Get("peer")
	same := func(p Path) bool { return p.Local == local && p.Peer == peer }
	if e.Verb == Destroy {
		c.Paths = slices.DeleteFunc(c.Paths, same)
		return
	}
	i := slices.IndexFunc(c.Paths, same)
	if i < 0 {
		c.Paths = append(c.Paths, Path{Local: local, Peer: peer})
		i = len(c.Paths) - 1
	}
	if v, ok := e.Get("established"); ok {
		c.Paths[i].Established = parseTri(v)
		c.Reached = c.Reached || v == "yes"
	}
}

func number(e *Event, key string) (int, error) {
	v, ok := e.Get(key)
	n, err := strconv.Atoi(v)
	if !ok || err != nil || n < 0 {
		return 0, syntax("no number "+key, string(e.Verb)+" "+e.Object+" "+v)
	}
	return n, nil
}

// find returns the element with the key, inserted in order when it is new.
func find[T any](list *[]T, key func(*T) int, want int, fresh T) *T {
	i, ok := slices.BinarySearchFunc(*list, want, func(x T, k int) int { return cmp.Compare(key(&x), k) })
	if !ok {
		*list = slices.Insert(*list, i, fresh)
	}
	return &(*list)[i]
}
