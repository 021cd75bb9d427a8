package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/xostor-agents/xostor-agents/bus/poolcert"
)

const (
	tendInterval = 5 * time.Second  // Between two looks at the secret and the cluster.
	retryShape   = 30 * time.Second // After a server that could not be started as wanted.
	forgetAfter  = time.Hour        // How long the secret before a rotation stays good: XAPI tells all hosts within minutes.
	twinMemory   = 5 * time.Minute
)

// twin is another host that has shown this host's uuid.
type twin struct {
	from string
	at   time.Time
}

// followSecret reads the pool secret; it changes rarely, but then without a restart of anybody.
func (b *Bus) followSecret(now time.Time) {
	if b.opts.RouteListen == "" && b.opts.Subscribe.Listen == "" {
		return
	}
	b.mu.Lock()
	identity, before := b.identity, b.noSecret
	b.mu.Unlock()
	var err error
	switch {
	case b.opts.Secret == "":
		err = errors.New("no file with the pool secret is configured")
	case identity == nil:
		identity, err = poolcert.Load(b.opts.ServerName, b.opts.Secret)
	default:
		err = identity.Reload(b.opts.Secret)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.noSecret = ""
	if err != nil {
		b.noSecret = err.Error()
		if before != b.noSecret {
			b.opts.Log.Warn("pool secret not usable", "err", err, "path", b.opts.Secret)
		}
		return
	}
	b.identity = identity
	known := identity.Authorities()
	switch {
	case len(known) == 1:
		b.rotated = time.Time{}
	case b.rotated.IsZero():
		b.rotated = now
		b.opts.Log.Info("pool secret changed", "authority", known[0])
	case now.Sub(b.rotated) > forgetAfter:
		identity.Forget()
		b.rotated = time.Time{}
	}
}

// want is how the server should run now.
func (b *Bus) want() shape {
	b.mu.Lock()
	defer b.mu.Unlock()
	noSecret := ""
	if b.identity == nil {
		noSecret = b.noSecret
	}
	w := plan(b.opts, b.pool, noSecret)
	w.subscribe = b.opts.Subscribe.Listen != "" && b.subscribeOff() == ""
	return w
}

// startShape starts the server as wanted, or alone when that does not work.
func (b *Bus) startShape(ctx context.Context, w shape) error {
	b.mu.Lock()
	b.inUse = b.authorities()
	b.failed = ""
	b.mu.Unlock()
	s, err := b.startServer(ctx, w)
	if err != nil && (w.cluster != "" || w.subscribe) {
		b.opts.Log.Error("bus cannot listen, it runs alone", "err", err, "retry", retryShape)
		b.mu.Lock()
		b.failed, b.retry = err.Error(), time.Now().Add(retryShape)
		b.mu.Unlock()
		w = shape{why: err.Error()}
		s, err = b.startServer(ctx, w)
	}
	if err != nil {
		return err
	}
	if w.cluster != "" {
		b.opts.Log.Info("bus is part of a cluster", "pool", w.cluster, "hosts", len(w.routes)+1)
	}
	b.mu.Lock()
	b.server, b.shape = s, w
	b.mu.Unlock()
	b.writeAuthority()
	return nil
}

// AuthorityFile is the pool's authority in the store folder, for programs outside that verify this host. It is no secret.
const AuthorityFile = "pool-ca.pem"

func (b *Bus) writeAuthority() {
	b.mu.Lock()
	identity := b.identity
	b.mu.Unlock()
	if identity == nil || b.opts.StoreDir == "" {
		return
	}
	err := os.MkdirAll(b.opts.StoreDir, 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(b.opts.StoreDir, AuthorityFile), identity.AuthorityPEM(), 0o644) //nolint:gosec // Meant to be read.
	}
	if err != nil {
		b.opts.Log.Warn("pool authority not written", "err", err)
	}
}

// authorities names the authorities in use; the caller holds the lock.
func (b *Bus) authorities() string {
	if b.identity == nil {
		return ""
	}
	return strings.Join(b.identity.Authorities(), " ")
}

// tend keeps the server in the shape that the pool wants, and the history with it.
func (b *Bus) tend(ctx context.Context) {
	tick := time.NewTicker(tendInterval)
	defer tick.Stop()
	for {
		b.tendOnce(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-b.kick:
		}
	}
}

func (b *Bus) tendOnce(ctx context.Context, now time.Time) {
	b.followSecret(now)
	w := b.want()
	b.mu.Lock()
	is, s, waiting := b.shape, b.server, b.failed != "" && now.Before(b.retry)
	rotated := b.inUse != b.authorities()
	b.mu.Unlock()
	switch {
	case s == nil, w.restart(is) && !waiting:
		b.restart(ctx, w)
	case !w.restart(is) && (!slices.Equal(w.routes, is.routes) || w.self != is.self || rotated):
		b.reload(s, w)
	case !w.restart(is):
		b.mu.Lock()
		b.shape.why = w.why
		b.mu.Unlock()
	}
	if ctx.Err() == nil {
		b.tendHistory(ctx, now)
	}
}

// restart replaces the server. Clients of the door see the end of their connection and come back; the door itself stays.
func (b *Bus) restart(ctx context.Context, w shape) {
	b.mu.Lock()
	old := b.server
	b.server, b.replicas, b.historyPaused = nil, 0, ""
	b.mu.Unlock()
	if old != nil {
		b.opts.Log.Info("restarting the bus's server", "pool", w.cluster, "hosts", len(w.routes)+1)
		if err := stopServer(old); err != nil {
			b.opts.Log.Warn("old server", "err", err)
		}
	}
	if err := b.startShape(ctx, w); err != nil && ctx.Err() == nil {
		b.opts.Log.Error("bus not restarted", "err", err, "retry", tendInterval)
	}
}

// reload gives the running server other routes or certificates. Connections that are still wanted stay.
func (b *Bus) reload(s *server.Server, w shape) {
	so := b.serverOptions(w)
	b.historyOptions(so, w)
	if err := s.ReloadOptions(so); err != nil {
		b.opts.Log.Error("routes not changed", "err", err)
		return
	}
	b.opts.Log.Info("routes changed", "hosts", len(w.routes)+1)
	b.mu.Lock()
	b.shape, b.inUse = w, b.authorities()
	b.mu.Unlock()
	b.writeAuthority()
}

// seen hears of each route whose certificate is good. A host that shows our own uuid with another key is a second host with it: hosts that were cloned
// with their disks. Its connection is refused.
func (b *Bus) seen(name string, from net.Addr, own bool) error {
	if name != b.opts.ServerName || own {
		return nil
	}
	where := "an address in the pool's list"
	if from != nil {
		where = from.String()
		if host, _, err := net.SplitHostPort(where); err == nil {
			where = host
		}
	}
	b.mu.Lock()
	again := b.twin.from == where && time.Since(b.twin.at) < twinMemory
	b.twin = twin{from: where, at: time.Now()}
	b.mu.Unlock()
	if !again {
		b.opts.Log.Error("another host has this host's uuid", "host", name, "from", where)
	}
	if from == nil {
		return nil // The other side must see our certificate too; it refuses.
	}
	return fmt.Errorf("two hosts have the uuid %s", name)
}

// Problem is something about the bus that an operator should know. Code is stable.
type Problem struct{ Code, Text, Fix string }

// ProblemAlone is the code of a bus that should have routes and has none.
const ProblemAlone = "bus-alone"

// Condition is how the bus of this host is.
type Condition struct {
	// Cluster is the pool's uuid when this bus has routes; "" when it is alone.
	Cluster string
	// Connected are the uuids of the other hosts whose buses are connected now, sorted.
	Connected []string
	// Missing are the hosts of the pool, other than this one, that are not.
	Missing []Host
	// History says how events are kept: "one copy", "3 copies", "starting" while the hosts find each other, or "" for not at all or not now; then Problems say why.
	History string
	// Problems are in no order.
	Problems []Problem
}

// Condition tells how the bus is. It asks nobody.
func (b *Bus) Condition() Condition {
	off := b.HistoryOff()
	b.mu.Lock()
	defer b.mu.Unlock()
	c := Condition{Cluster: b.shape.cluster}
	if b.server != nil && c.Cluster != "" {
		c.Connected = connected(b.server)
	}
	for _, h := range b.pool.Hosts {
		if h.UUID != b.opts.ServerName && c.Cluster != "" && !slices.Contains(c.Connected, h.UUID) {
			c.Missing = append(c.Missing, h)
		}
	}
	switch {
	case off != "":
		if b.opts.StoreDir != "" {
			c.problem("history-off", "no events are kept: "+off, "look at the free space in "+b.opts.StoreDir+", then: systemctl restart xostor-bus")
		}
	case b.historyPaused != "":
		c.problem("history-paused", "events are not kept at present: "+b.historyPaused+"; live events are not affected", "bring back enough hosts: xostor status shows which are missing")
	case c.Cluster == "":
		c.History = "one copy"
	case b.replicas == 0:
		c.History = "starting"
	case b.replicas > 1:
		c.History = fmt.Sprintf("%d copies", b.replicas)
	default:
		c.History = "one copy"
	}
	several := len(b.pool.Hosts) > 1 && b.opts.RouteListen != ""
	switch {
	case several && c.Cluster == "" && b.failed != "":
		c.problem(ProblemAlone, "this host hears nothing of the others: "+b.failed, "see who uses the port: ss -ltnp")
	case several && c.Cluster == "" && b.shape.why != "":
		c.problem(ProblemAlone, "this host hears nothing of the others: "+b.shape.why, "check that "+b.opts.Secret+" is there and readable by root")
	case several && b.noSecret != "":
		c.problem("pool-secret", "the pool secret cannot be read, the last good one stays in use: "+b.noSecret, "check "+b.opts.Secret)
	}
	if b.twin.from != "" && time.Since(b.twin.at) < twinMemory {
		c.problem("host-uuid-twice", "another host uses this host's uuid, from "+b.twin.from+"; its connections are refused",
			"give one of them a uuid of its own: it was cloned with its disk; compare INSTALLATION_UUID in /etc/xensource-inventory")
	}
	if b.opts.Subscribe.Listen != "" && !b.shape.subscribe {
		c.problem("subscribers-off", "the port for subscribers is closed: "+cmp.Or(b.failed, b.subscribeOff()), "see bus.subscribe_listen in /etc/xostor/agents.toml")
	}
	return c
}

func (c *Condition) problem(code, text, fix string) {
	c.Problems = append(c.Problems, Problem{Code: code, Text: text, Fix: fix})
}

// connected are the names of the servers with a route.
func connected(s *server.Server) []string {
	z, err := s.Routez(nil)
	if err != nil {
		return nil
	}
	var names []string
	for _, r := range z.Routes {
		names = append(names, r.RemoteName)
	}
	slices.Sort(names)
	return slices.Compact(names)
}
