package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/agents/feed"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/systemd"
)

func runBus(ctx context.Context, c *call) (err error) {
	d, err := dom0.Open(c.config, busAgent, c.log)
	if err != nil {
		return err
	}
	defer d.Close()
	o := c.config.Bus.Options(d.Facts.HostUUID)
	o.Log = c.log
	b, err := bus.Start(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	if why := b.HistoryOff(); why != "" && o.StoreDir != "" {
		c.log.Warn("the bus runs without history", agents.KeyWhy, why)
	}
	conn, err := b.Connect("xostor-feed")
	if err != nil {
		return err
	}
	defer conn.Close()
	self := &busStatus{bus: b, host: d.Facts.HostUUID, started: time.Now(), since: map[string]time.Time{}}
	service, err := bus.Serve(conn, bus.ServiceInfo{Agent: busAgent, Host: d.Facts.HostUUID, HostName: d.Name, Version: semver(version), Description: "XOSTOR event bus"}, self.status)
	if err != nil {
		return err
	}
	defer func() { _ = service.Stop() }() // The connection ends with it.

	fact := feed.Fact{Holds: func() bool { ok, _ := d.RoleFile(); return ok }}
	linstor := feed.NewLINSTOR(feed.LINSTOROptions{Wire: conn, Source: d.LINSTOR, Coordinator: fact, Host: d.Facts.HostUUID, Log: c.log})
	xapi := feed.NewXAPI(feed.XAPIOptions{Wire: conn, Watch: feed.WatchXAPI(d.XAPI), Coordinator: fact, Host: d.Facts.HostUUID, OnChange: linstor.HintXAPI, Log: c.log})
	var feeds sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer feeds.Wait()
	defer cancel()
	feeds.Go(func() { linstor.Run(ctx) })
	feeds.Go(func() { xapi.Run(ctx) })
	drbd := feed.NewDRBD(feed.DRBDOptions{Wire: conn, Source: feed.DRBDEvents{Program: "drbdsetup"}, Host: d.Facts.HostUUID, Log: c.log})
	feeds.Go(func() { drbd.Run(ctx) })
	feeds.Go(func() { self.tell(ctx, d.Options(busAgent, "act", 0).Report) })
	if c.config.Bus.Cluster {
		feeds.Go(func() {
			if err := dom0.FollowPool(ctx, conn, d.Facts.HostUUID, d, b.SetPool, c.log.Debug); err != nil {
				c.log.Error("hosts of the pool not followed", agents.KeyErr, err)
			}
		})
	}

	c.log.Info("bus started", "socket", c.config.Bus.Socket, agents.KeyHost, d.Facts.HostUUID)
	if err := systemd.Ready("door " + c.config.Bus.Socket); err != nil {
		c.log.Warn("tell systemd", agents.KeyErr, err)
	}
	feeds.Go(func() { stayLean(ctx, c.log.Debug) })
	feeds.Go(func() { followLoad(ctx) })
	feedWatchdog(ctx, c, conn)
	_ = systemd.Stopping() // systemd sees the exit anyway
	c.log.Info("bus stopped")
	return nil
}

// busAgent is the name under which the bus itself answers for its status.
const busAgent = "bus"

// busReport is what the bus answers: an agent's status, and what it knows of the pool.
type busReport struct {
	agents.Status
	Bus busFacts `json:"bus"`
}

// busFacts tell `xostor status` which hosts should answer.
type busFacts struct {
	Cluster   string     `json:"cluster,omitempty"` // the pool's uuid; empty: the bus is alone
	Hosts     []bus.Host `json:"hosts,omitempty"`   // of the pool
	Connected []string   `json:"connected,omitempty"`
	History   string     `json:"history,omitempty"` // "one copy", "3 copies"; empty: nothing is kept at present
}

// busStatus makes reports.
type busStatus struct {
	bus     *bus.Bus
	host    string
	started time.Time

	mu    sync.Mutex
	since map[string]time.Time // of problems, by code
}

// findings are the bus's present problems, each with the moment it was first seen.
func (s *busStatus) findings(problems []bus.Problem, now time.Time) []agents.Finding {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []agents.Finding
	known := s.since
	s.since = map[string]time.Time{}
	for _, p := range problems {
		at, ok := known[p.Code]
		if !ok {
			at = now
		}
		s.since[p.Code] = at
		all = append(all, agents.Finding{Code: p.Code, Subject: "host/" + s.host, Text: p.Text, Fix: p.Fix, Severity: agents.Warning, Since: at})
	}
	return all
}

func (s *busStatus) status() any {
	now := time.Now()
	cond := s.bus.Condition()
	pool, _ := s.bus.Pool()
	return busReport{
		Status: agents.Status{Agent: busAgent, Host: s.host, State: agents.Healthy, Started: s.started, LastPass: now, Findings: s.findings(cond.Problems, now)},
		Bus:    busFacts{Cluster: cond.Cluster, Hosts: pool.Hosts, Connected: cond.Connected, History: cond.History},
	}
}

const tellEvery = 2 * time.Second // a look costs nobody but this process

// tell publishes findings when they come and go, until ctx ends.
func (s *busStatus) tell(ctx context.Context, report agents.Reporter) {
	told := map[string]agents.Finding{}
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		now := map[string]agents.Finding{}
		for _, f := range s.findings(s.bus.Condition().Problems, time.Now()) {
			if f.Code == bus.ProblemAlone {
				continue // Nobody but this host would hear it; its log and `xostor status` here say so.
			}
			now[f.Code] = f
			if _, ok := told[f.Code]; !ok {
				report.Finding(f, true)
			}
		}
		for code, f := range told {
			if _, ok := now[code]; !ok {
				report.Finding(f, false)
			}
		}
		told = now
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// feedWatchdog tells systemd that the server answers, as long as it does, and returns when ctx ends.
func feedWatchdog(ctx context.Context, c *call, conn *bus.Conn) {
	interval := systemd.WatchdogInterval() / 3
	if interval <= 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		round, cancel := context.WithTimeout(ctx, interval)
		err := conn.Flush(round) // a round trip through the server
		cancel()
		if err == nil {
			err = systemd.Alive()
		}
		if err != nil && ctx.Err() == nil {
			c.log.Warn("watchdog not fed", agents.KeyErr, err)
		}
	}
}
