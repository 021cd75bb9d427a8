// Package dom0 opens what a pool-wide agent stands on: XAPI, LINSTOR, the bus, and the answer to who is coordinator. See DESIGN.md.
package dom0

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/xapi"
)

const (
	closeTimeout = 3 * time.Second
	// LINSTOR waits for a hung satellite without limit. Half of a pass is left to say so.
	satelliteTimeout = 15 * time.Second
	roleInterval     = time.Second // how often the role file is read while an action runs
)

// Dom0 is one daemon's access to its host and pool. Close it.
type Dom0 struct {
	Config  Config
	Facts   xapi.HostFacts // as they were when it was opened; HostUUID does not change
	XAPI    *xapi.Client
	LINSTOR *linstor.Client
	Bus     *bus.Conn
	Log     *slog.Logger
	Name    string // of the host, for people

	files xapi.HostFiles
}

// Open prepares the connections of the daemon with that name; the name becomes XAPI's originator, LINSTOR's User-Agent and the name on the bus. It waits for nobody: what is
// away is connected when it comes.
func Open(c Config, name string, log *slog.Logger) (*Dom0, error) {
	d, err := OpenBus(c, name, log)
	if err != nil {
		return nil, err
	}
	agent := "xostor-" + name
	if d.XAPI, err = xapi.New(xapi.Config{Socket: c.XAPI.Socket, Originator: agent, UserAgent: agent, Log: log}); err != nil {
		d.Close()
		return nil, err
	}
	if d.LINSTOR, err = linstor.New(linstor.Options{Controllers: c.LINSTOR.Controllers, Resolve: d.controllers, UserAgent: agent, SatelliteTimeout: satelliteTimeout, Log: log}); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// OpenBus prepares the connection to the bus alone, for an agent that does its duty without XAPI and LINSTOR. Those two are nil.
func OpenBus(c Config, name string, log *slog.Logger) (*Dom0, error) {
	d := &Dom0{Config: c, Log: log, files: xapi.HostFiles{PoolConf: c.Host.PoolConf, Inventory: c.Host.Inventory}}
	var err error
	if d.Facts, err = d.files.Read(); err != nil {
		return nil, err
	}
	if d.Name = c.Host.Name; d.Name == "" {
		if d.Name, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("read host name: %w", err)
		}
	}
	if d.Bus, err = bus.DialLazy(c.Bus.Socket, "xostor-"+name); err != nil {
		return nil, err
	}
	return d, nil
}

// Close logs out of XAPI and closes all connections.
func (d *Dom0) Close() {
	if d.Bus != nil {
		d.Bus.Close()
	}
	if d.LINSTOR != nil {
		d.LINSTOR.Close()
	}
	if d.XAPI == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := d.XAPI.Close(ctx); err != nil {
		d.Log.Debug("log out of XAPI", agents.KeyErr, err)
	}
}

// controllers lists where a controller may run when nothing is configured: here, and on every host of the pool.
func (d *Dom0) controllers(ctx context.Context) ([]string, error) {
	type host struct {
		Address string `json:"address"`
	}
	hosts, err := xapi.GetAllRecords[host](ctx, d.XAPI, "host")
	list := []string{"localhost"}
	for _, h := range hosts {
		if h.Address != "" {
			list = append(list, h.Address)
		}
	}
	slices.Sort(list[1:])
	if err != nil {
		d.Log.Debug("hosts of the pool not known, looking for a controller on this host only", agents.KeyErr, err)
	}
	return list, nil
}

// RoleFile tells whether this host's own file says that it is the coordinator, and if not, why not. It is cheap.
func (d *Dom0) RoleFile() (ok bool, why string) {
	facts, err := d.files.Read()
	switch {
	case err != nil:
		return false, err.Error()
	case facts.Role != xapi.Coordinator:
		return false, fmt.Sprintf("%s says that this host is %s", d.Config.Host.PoolConf, facts.Role)
	}
	return true, ""
}

// Coordinator tells whether this host is the pool's coordinator by its own file and by XAPI, and if not, why not. An error means that XAPI could not be asked.
func (d *Dom0) Coordinator(ctx context.Context) (ok bool, why string, err error) {
	if ok, why := d.RoleFile(); !ok {
		return false, why, nil
	}
	master, err := d.XAPI.PoolMaster(ctx)
	if err != nil {
		return false, "", fmt.Errorf("ask XAPI who is coordinator: %w", err)
	}
	host, err := d.XAPI.GetByUUID(ctx, "host", d.Facts.HostUUID)
	if xapi.IsCode(err, "UUID_INVALID") {
		return false, "XAPI does not know this host", nil
	}
	if err != nil {
		return false, "", fmt.Errorf("find this host in XAPI: %w", err)
	}
	if master != host {
		return false, "XAPI's pool.master is another host", nil
	}
	return true, "", nil
}

// CoordinatorGate permits actions on the coordinator only, and takes the permission back when the role file no longer says so.
func (d *Dom0) CoordinatorGate() agents.Gate { return coordinatorGate{d} }

type coordinatorGate struct{ d *Dom0 }

// Enter implements agents.Gate.
func (g coordinatorGate) Enter(ctx context.Context, _ agents.Action) (context.Context, func(error), error) {
	ok, why, err := g.d.Coordinator(ctx)
	if err != nil {
		return nil, nil, err
	}
	if !ok {
		return nil, nil, &agents.Refusal{Gate: "coordinator", Why: why}
	}
	held, cancel := context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(roleInterval)
		defer tick.Stop()
		for {
			select {
			case <-held.Done():
				return
			case <-tick.C:
				if ok, why := g.d.RoleFile(); !ok {
					cancel(&agents.Refusal{Gate: "coordinator", Why: why})
					return
				}
			}
		}
	}()
	return held, func(error) { cancel(nil) }, nil
}
