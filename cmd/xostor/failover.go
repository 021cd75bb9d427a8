package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/unit"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/agents/gate"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/systemd"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// failoverConfig is the service's configuration, without the key. It needs neither XAPI nor the bus.
func failoverConfig(c *call) (failover.ServiceConfig, error) {
	f := c.config.Agents.Failover
	cfg := failover.ServiceConfig{
		Force: map[string]failover.Mode{"guard": failover.Guard, "owner": failover.Owner, "observe": failover.Observe}[f.Mode],
		Names: failoverNames(f), Paths: failover.Paths{ResDir: f.ResDir, StateDir: f.StateDir, BackupDir: f.BackupDir, ReactorCfg: f.ReactorConfig, ReactorDir: f.ReactorDir},
		Controller: f.ControllerURL, Socket: f.Socket, Listen: f.Listen, Port: f.Port, ProbeEvery: time.Duration(f.ProbeEvery), NoBackups: !f.Backups || f.Mode == "observe",
		Drbdsetup: f.Drbdsetup, Drbdadm: f.Drbdadm, Major: f.DeviceMajor, Log: c.log,
	}
	if cfg.Self = f.Name; cfg.Self != "" {
		return cfg, nil
	}
	kernel, err := os.Hostname()
	if err != nil {
		return cfg, fmt.Errorf("read host name: %w", err)
	}
	res, err := os.ReadFile(filepath.Join(f.ResDir, f.Resource+".res"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("LINSTOR's name of this host not looked up", agents.KeyErr, err)
	}
	var named bool
	if cfg.Self, named = failover.NodeName(res, kernel); !named && len(res) > 0 {
		c.log.Warn("the .res file does not name this host; set agents.failover.name if LINSTOR calls it otherwise", "name", cfg.Self)
	}
	return cfg, nil
}

func failoverNames(f dom0.FailoverConfig) failover.Names {
	return failover.Names{Resource: f.Resource, Controller: f.ControllerUnit, MountUnit: f.MountUnit, MountPoint: f.MountPoint,
		Target: "drbd-services@" + unit.UnitNameEscape(f.Resource) + ".target"}
}

const shortestSecret = 16 // characters; XAPI's has over 100

// poolKey makes the key of the beats from the pool secret.
func poolKey(path string) ([]byte, error) {
	secret, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read pool secret: %w; XAPI makes it at its first start and when the host joins a pool: look whether it is there, or name another file with bus.ptoken", err)
	}
	text := strings.TrimSpace(string(secret))
	if len(text) < shortestSecret {
		return nil, fmt.Errorf("read pool secret %s: it has %d characters, and XAPI's has over 100: bring back the file, as from another host of the pool", path, len(text))
	}
	return failover.BeatKey([]byte(text)), nil
}

// runFailover needs this host's own files only. XAPI, LINSTOR and the bus may come later or never.
func runFailover(ctx context.Context, c *call) error {
	conf := c.config.Agents.Failover
	cfg, err := failoverConfig(c)
	if err != nil {
		return err
	}
	if cfg.Key, err = poolKey(c.config.Bus.Ptoken); err != nil {
		return err
	}
	s, err := failover.NewService(cfg)
	if err != nil {
		return err
	}
	o := agents.Options{Board: &agents.Board{}, Log: c.log, MaxQuiet: systemd.WatchdogInterval() / 3, Alive: func() {
		if err := systemd.Alive(); err != nil {
			c.log.Warn("feed the watchdog", agents.KeyErr, err)
		}
	}}
	if conf.Mode == "observe" {
		o.Gate = gate.ObserveOnly()
	}
	defer reportOnBus(c, &o)()
	var tasks tasks
	defer tasks.end()
	processors(2) // a thread in a slow system call must not hold up a release
	tasks.run(ctx, func(ctx context.Context) { giveBackPages(ctx, leanSeldom, c.log.Debug) })
	tasks.run(ctx, func(ctx context.Context) { followSecret(ctx, c, s.UseKey) })
	tasks.run(ctx, func(ctx context.Context) { followAddresses(ctx, c, o.Host, s.SetAddresses) })
	c.log.Info("agent started", agents.KeyAgent, failover.Name, agents.KeyHost, cfg.Self, "mode", conf.Mode)
	if err := systemd.Ready("mode " + conf.Mode + ", host " + cfg.Self); err != nil {
		c.log.Warn("tell systemd", agents.KeyErr, err)
	}
	err = s.Run(ctx, o)
	_ = systemd.Stopping() // systemd sees the exit anyway
	c.log.Info("agent stopped", agents.KeyAgent, failover.Name)
	return err
}

// reportOnBus lets the agent report and answer on the bus as soon and as long as there is one, and returns the function that ends it.
func reportOnBus(c *call, o *agents.Options) (stop func()) {
	d, err := dom0.OpenBus(c.config, failover.Name, c.log)
	if err != nil {
		c.log.Warn("nothing is reported on the bus", agents.KeyErr, err)
		return func() {}
	}
	o.Host, o.Report = d.Facts.HostUUID, quietReporter{d.Options(failover.Name, "act", 0).Report, d.Bus}
	end, err := d.Serve(failover.Name, semver(version), o.Board)
	if err != nil {
		c.log.Warn("status is not answered on the bus", agents.KeyErr, err)
		end = func() {}
	}
	return func() { end(); d.Close() }
}

// quietReporter reports states only while somebody can hear: a bus that never comes must not fill the connection's buffer. Actions and findings are few.
type quietReporter struct {
	agents.Reporter
	bus *bus.Conn
}

// Status implements agents.Reporter.
func (r quietReporter) Status(s agents.Status) {
	if r.bus.Connected() {
		r.Reporter.Status(s)
	}
}

const secretEvery = time.Second // XAPI brings a new secret to one host after the other; the old key is good for minutes

// followSecret takes a new pool secret into use until ctx ends. A secret that cannot be read changes nothing.
func followSecret(ctx context.Context, c *call, use func(key []byte) (other bool)) {
	path := c.config.Bus.Ptoken
	var last fs.FileInfo
	every(ctx, secretEvery, func() {
		now, err := os.Stat(path)
		if err != nil || last != nil && os.SameFile(now, last) && now.ModTime().Equal(last.ModTime()) && now.Size() == last.Size() {
			return
		}
		key, err := poolKey(path)
		if err != nil {
			c.log.Debug("pool secret not read", agents.KeyErr, err)
			return // perhaps half written: it is looked at again
		}
		last = now
		if use(key) {
			c.log.Info("pool secret changed")
		}
	})
}

const (
	addressesEvery = 10 * time.Second
	askXAPIEvery   = 5 * time.Minute
)

// followAddresses tells where the agents of other hosts may be besides DRBD's own paths, until ctx ends: as configured; else as the bus of this host keeps it
// on disk; where no bus has run, as XAPI says. Nobody waits for it.
func followAddresses(ctx context.Context, c *call, self string, tell func([]netip.Addr)) {
	if list := c.config.Agents.Failover.Addresses; len(list) > 0 {
		tell(parseAddresses(list))
		return
	}
	var told []netip.Addr
	var asked time.Time
	every(ctx, addressesEvery, func() {
		pool, err := bus.KeptPool(c.config.Bus.KeptIn())
		if err != nil {
			c.log.Debug("hosts that the bus knows not read", agents.KeyErr, err)
		}
		if !pool.Has(self) && (asked.IsZero() || time.Since(asked) >= askXAPIEvery) {
			if pool, err = askPool(ctx, c); err != nil {
				c.log.Debug("hosts of the pool not known", agents.KeyErr, err) // XAPI starts later than this agent
			} else {
				asked = time.Now()
			}
		}
		var list []string
		for _, h := range pool.Hosts {
			if h.UUID != self {
				list = append(list, h.Address)
			}
		}
		if now := parseAddresses(list); pool.Has(self) && !slices.Equal(now, told) {
			told = now
			tell(now)
			c.log.Info("management addresses of the other hosts", "addresses", now)
		}
	})
}

// askPool asks XAPI once, over a connection that is not kept.
func askPool(ctx context.Context, c *call) (bus.Pool, error) {
	name := "xostor-" + failover.Name
	client, err := xapi.New(xapi.Config{Socket: c.config.XAPI.Socket, Originator: name, UserAgent: name, Log: c.log})
	if err != nil {
		return bus.Pool{}, err
	}
	d := &dom0.Dom0{Config: c.config, XAPI: client, Log: c.log}
	defer d.Close()
	return d.ReadPool(ctx)
}

// parseAddresses sorts addresses and leaves out what is none: a host without one has "".
func parseAddresses(list []string) (out []netip.Addr) {
	for _, text := range list {
		if a, err := netip.ParseAddr(text); err == nil {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// every calls f at once and then after each pause, until ctx ends.
func every(ctx context.Context, pause time.Duration, f func()) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for ctx.Err() == nil {
		f()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// planFailover asks the running agent. Where none runs, it looks by itself; then it cannot hear the other hosts.
func planFailover(ctx context.Context, c *call) error {
	cfg, err := failoverConfig(c)
	if err != nil {
		return err
	}
	plan, text := agents.Plan{}, ""
	r, err := failover.Client{Socket: cfg.Socket}.Status(ctx)
	switch {
	case err == nil:
		plan.Actions, plan.Findings = r.Actions, r.Findings
		text = fmt.Sprintf("%s\nThe agent runs in mode %s: %s.", r.Text, r.Mode, r.ModeWhy)
	case errors.Is(err, failover.ErrNotRunning):
		var s failover.Snapshot
		if s, plan, err = failover.Look(ctx, cfg); err != nil {
			return err
		}
		text = fmt.Sprintf("%s\nNo agent runs here, so the other hosts are not heard. Mode %s: %s.", failover.Describe(time.Now(), s), cmp.Or(s.Mode, failover.Observe), s.ModeWhy)
	default:
		return err
	}
	return showPlan(c, plan, text, "Nothing to do.")
}

const moveTimeout = 5 * time.Minute // a controller may take 240 s to start

// runController is `xostor controller ...`.
func runController(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	f := c.config.Agents.Failover
	args := c.args
	switch restore := len(args) > 0 && args[0] == "restore"; {
	case c.plan && !restore:
		return &usageError{"controller: --plan belongs to restore; `xostor help controller` tells more"}
	case c.plan:
		args = slices.Insert(slices.Clone(args), 1, "--plan")
	}
	err := failover.Command{Client: failover.Client{Socket: f.Socket}, Store: f.BackupDir, Names: failoverNames(f), JSON: c.json, Out: c.out}.Run(ctx, args)
	if errors.Is(err, failover.ErrUsage) {
		return &usageError{"controller: want " + strings.TrimPrefix(err.Error(), "usage: ") + "; `xostor help controller` tells more"}
	}
	return err
}
