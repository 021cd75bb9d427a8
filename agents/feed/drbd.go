package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/bus"
)

const drbdAbsent = 30 * time.Second // Between two tries where DRBD is not installed.

// DRBDSource is a stream of what `drbdsetup events2 --full --poll` prints for all resources of this host. Follow gives a new stream to read until ctx ends or
// the stream breaks; each call begins with a whole dump.
type DRBDSource interface {
	Follow(ctx context.Context, read func(io.Reader) error) error
}

// DRBDEvents is the DRBDSource that runs drbdsetup.
type DRBDEvents struct{ Program string }

// Follow implements DRBDSource.
func (s DRBDEvents) Follow(ctx context.Context, read func(io.Reader) error) error {
	return drbd.FollowEvents(ctx, s.Program, "", read)
}

// DRBDResource is a row of the table drbd.<host>: one resource as this host sees it. Pointers are absent when DRBD has not told.
type DRBDResource struct {
	Name        string           `json:"name"`
	Role        string           `json:"role"`
	Suspended   string           `json:"suspended,omitempty"` // "no" or a list of user, no-data, fencing, quorum
	MayPromote  *bool            `json:"may_promote,omitempty"`
	Quorum      *bool            `json:"quorum,omitempty"` // of all volumes
	Devices     []DRBDDevice     `json:"devices"`
	Connections []DRBDConnection `json:"connections"`
}

// DRBDDevice is one volume on this host.
type DRBDDevice struct {
	Volume int    `json:"volume"`
	Minor  int    `json:"minor"`
	Disk   string `json:"disk"`
	Open   *bool  `json:"open,omitempty"`
	Quorum *bool  `json:"quorum,omitempty"`
}

// DRBDConnection is the link to one peer.
type DRBDConnection struct {
	Peer   string     `json:"peer"`
	NodeID int        `json:"node_id"`
	State  string     `json:"state"`
	Role   string     `json:"role"`
	Disks  []DRBDPeer `json:"disks"`
}

// DRBDPeer is one volume as a peer has it. How far a resynchronisation is does not travel: it changes all the time.
type DRBDPeer struct {
	Volume      int    `json:"volume"`
	Disk        string `json:"disk"`
	Replication string `json:"replication"`
}

func drbdRow(r *drbd.Resource) DRBDResource {
	row := DRBDResource{Name: r.Name, Role: string(r.Role), Suspended: r.Suspended, MayPromote: known(r.MayPromote), Quorum: known(r.Quorum()),
		Devices: []DRBDDevice{}, Connections: []DRBDConnection{}}
	for _, d := range r.Devices {
		row.Devices = append(row.Devices, DRBDDevice{Volume: d.Volume, Minor: d.Minor, Disk: string(d.Disk), Open: known(d.Open), Quorum: known(d.Quorum)})
	}
	for _, c := range r.Connections {
		k := DRBDConnection{Peer: c.Name, NodeID: c.PeerNodeID, State: string(c.State), Role: string(c.Role), Disks: []DRBDPeer{}}
		for _, d := range c.PeerDevices {
			k.Disks = append(k.Disks, DRBDPeer{Volume: d.Volume, Disk: string(d.Disk), Replication: d.Replication})
		}
		row.Connections = append(row.Connections, k)
	}
	return row
}

func known(t drbd.Tri) *bool {
	if t == drbd.Unknown {
		return nil
	}
	b := t == drbd.Yes
	return &b
}

// DRBDOptions say what the DRBD feed does.
type DRBDOptions struct {
	Wire   bus.Wire   // Required.
	Source DRBDSource // Required.
	// Host is this host's uuid: part of the table's name, the subjects and the events' source.
	Host string
	// Log defaults to slog.Default().
	Log *slog.Logger
}

// DRBDFeed publishes the table bus.DRBDTable(host). Unlike the other feeds it runs on every host.
type DRBDFeed struct{ opts DRBDOptions }

// NewDRBD prepares the feed. It panics when a required option is missing, which is a programming error.
func NewDRBD(o DRBDOptions) *DRBDFeed {
	if o.Wire == nil || o.Source == nil {
		panic("feed.NewDRBD: Wire and Source are required")
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &DRBDFeed{opts: o}
}

// Run publishes until ctx ends. While DRBD cannot be heard the table is stale with the reason and keeps its rows.
func (f *DRBDFeed) Run(ctx context.Context) {
	table, err := bus.NewTable[DRBDResource](f.opts.Wire, bus.DRBDTable(f.opts.Host), bus.TableOptions{Source: source(f.opts.Host), Log: f.opts.Log})
	if err != nil {
		f.opts.Log.Error("publish DRBD", "err", err)
		return
	}
	defer table.Close()
	last := ""
	for failures := 0; ctx.Err() == nil; failures++ {
		began := time.Now()
		err := f.opts.Source.Follow(ctx, func(r io.Reader) error { return publishDRBD(r, table) })
		if ctx.Err() != nil {
			return
		}
		table.SetStale(fmt.Sprintf("DRBD is not heard: %v", err))
		absent := errors.Is(err, exec.ErrNotFound)
		if text := fmt.Sprint(err); text != last && !absent {
			f.opts.Log.Info("DRBD is not heard", "err", err)
			last = text
		}
		if time.Since(began) > lastRetry {
			failures, last = 0, ""
		}
		wait := retryIn(failures)
		if absent {
			wait = drbdAbsent
		}
		pause(ctx, wait)
	}
}

// publishDRBD reads one stream to its end. The table is filled when the dump is complete, then follows group by group: what the kernel changed at once is
// published at once.
func publishDRBD(r io.Reader, table *bus.Table[DRBDResource]) error {
	filled := false
	return drbd.ReadGroups(r, func(st *drbd.State, touched map[string]bool) error {
		if err := apply(table, st, touched, !filled); err != nil {
			return err
		}
		filled = true
		return nil
	})
}

// apply brings the table up to the state: all of it, or what was touched.
func apply(table *bus.Table[DRBDResource], st *drbd.State, touched map[string]bool, all bool) error {
	if all {
		rows := make(map[string]DRBDResource, len(st.Resources))
		for name, r := range st.Resources {
			rows[name] = drbdRow(r)
		}
		_, err := table.Replace(rows)
		return err
	}
	for name := range touched {
		r, ok := st.Resources[name]
		if !ok {
			table.Delete(name)
			continue
		}
		if _, err := table.Put(name, drbdRow(r)); err != nil {
			return err
		}
	}
	return nil
}
