package drbd

import (
	"encoding/json"
	"fmt"
)

// The shapes below are what `drbdsetup status --json` prints (drbd-utils 9.22 to 9.34). Pointers: a key that a version lacks stays unknown.
type statusResource struct {
	Name           string             `json:"name"`
	Role           Role               `json:"role"`
	Suspended      *bool              `json:"suspended"`
	SuspUser       bool               `json:"suspended-user"`
	SuspNoData     bool               `json:"suspended-no-data"`
	SuspFencing    bool               `json:"suspended-fencing"`
	SuspQuorum     bool               `json:"suspended-quorum"`
	ForceIOFailure *bool              `json:"force-io-failures"`
	Devices        []statusDevice     `json:"devices"`
	Connections    []statusConnection `json:"connections"`
}

type statusDevice struct {
	Volume int    `json:"volume"`
	Minor  *int   `json:"minor"`
	Disk   Disk   `json:"disk-state"`
	Client *bool  `json:"client"`
	Open   *bool  `json:"open"`
	Quorum *bool  `json:"quorum"`
	Size   *int64 `json:"size"` // KiB
}

type statusConnection struct {
	PeerNodeID  int                `json:"peer-node-id"`
	Name        string             `json:"name"`
	State       ConnState          `json:"connection-state"`
	Role        Role               `json:"peer-role"`
	Paths       []statusPath       `json:"paths"`
	PeerDevices []statusPeerDevice `json:"peer_devices"`
}

type statusPath struct {
	This        statusAddress `json:"this_host"`
	Remote      statusAddress `json:"remote_host"`
	Established *bool         `json:"established"`
}

type statusAddress struct {
	Address string `json:"address"`
	Port    int    `json:"port"`
	Family  string `json:"family"`
}

type statusPeerDevice struct {
	Volume          int    `json:"volume"`
	Replication     string `json:"replication-state"`
	Disk            Disk   `json:"peer-disk-state"`
	Client          *bool  `json:"peer-client"`
	ResyncSuspended string `json:"resync-suspended"`
	OutOfSync       *int64 `json:"out-of-sync"` // KiB
}

// ParseStatus reads the output of `drbdsetup status --json`. MayPromote, Score and Backing stay unknown: it does not print them.
func ParseStatus(text []byte) ([]Resource, error) {
	var in []statusResource
	if err := json.Unmarshal(text, &in); err != nil {
		return nil, fmt.Errorf("read drbdsetup status: %w", err)
	}
	out := make([]Resource, 0, len(in))
	for _, r := range in {
		if r.Name == "" {
			return nil, fmt.Errorf("read drbdsetup status: a resource without name: %w", ErrSyntax)
		}
		out = append(out, r.resource())
	}
	return out, nil
}

func (r *statusResource) resource() Resource {
	out := Resource{Name: r.Name, Role: r.Role, Suspended: r.suspended(), ForceIOFailure: triPtr(r.ForceIOFailure)}
	for _, d := range r.Devices {
		dev := find(&out.Devices, func(d *Device) int { return d.Volume }, d.Volume, Device{})
		*dev = Device{Volume: d.Volume, Minor: -1, Disk: d.Disk, Client: triPtr(d.Client), Open: triPtr(d.Open), Quorum: triPtr(d.Quorum)}
		if d.Minor != nil {
			dev.Minor = *d.Minor
		}
		if d.Size != nil {
			dev.SizeKiB = *d.Size
		}
	}
	for _, c := range r.Connections {
		conn := find(&out.Connections, func(c *Connection) int { return c.PeerNodeID }, c.PeerNodeID, Connection{})
		*conn = Connection{PeerNodeID: c.PeerNodeID, Name: c.Name, State: c.State, Role: c.Role}
		for _, d := range c.PeerDevices {
			pd := find(&conn.PeerDevices, func(d *PeerDevice) int { return d.Volume }, d.Volume, PeerDevice{})
			*pd = PeerDevice{Volume: d.Volume, Replication: d.Replication, Disk: d.Disk, Client: triPtr(d.Client), ResyncSuspended: d.ResyncSuspended}
			if d.OutOfSync != nil {
				pd.OutOfSyncKiB = *d.OutOfSync
			}
		}
		for _, p := range c.Paths {
			conn.Paths = append(conn.Paths, Path{Local: p.This.String(), Peer: p.Remote.String(), Established: triPtr(p.Established)})
		}
	}
	return out
}

// String is the address as events2 prints it.
func (a statusAddress) String() string {
	host := a.Address
	if a.Family == "ipv6" {
		host = "[" + host + "]"
	}
	return fmt.Sprintf("%s:%s:%d", a.Family, host, a.Port)
}

func (r *statusResource) suspended() string {
	if r.Suspended == nil {
		return ""
	}
	if !*r.Suspended {
		return "no"
	}
	list := ""
	for _, s := range []struct {
		on   bool
		name string
	}{{r.SuspUser, "user"}, {r.SuspNoData, "no-data"}, {r.SuspFencing, "fencing"}, {r.SuspQuorum, "quorum"}} {
		if s.on {
			list += "," + s.name
		}
	}
	if list == "" {
		return ""
	}
	return list[1:]
}

func triPtr(b *bool) Tri {
	if b == nil {
		return Unknown
	}
	return TriOf(*b)
}
