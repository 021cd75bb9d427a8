package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

const (
	// routePing finds a route whose cable was pulled: three pings without an answer, 15 s.
	routePing    = 5 * time.Second
	routePingMax = 2
)

// serverOptions is everything that the embedded server is told for a shape, without the history. It reads no file and no environment.
func (b *Bus) serverOptions(w shape) *server.Options {
	o := b.opts
	so := &server.Options{
		ServerName:             o.ServerName,
		DontListen:             true,
		NoSigs:                 true,
		NoSystemAccount:        true,
		MaxPayload:             o.MaxPayload,
		MaxPending:             o.MaxPending,
		WriteDeadline:          5 * time.Second,
		DisableShortFirstPing:  true,
		DisableJetStreamBanner: true,
	}
	so.Cluster.Name = o.ClusterName
	if w.subscribe {
		b.subscribeOptions(so)
	}
	if w.cluster == "" {
		return so
	}
	so.NoSystemAccount = false // The servers of a cluster learn of each other through it.
	so.Cluster = server.ClusterOpts{
		Name: w.cluster, TLSTimeout: 5, NoAdvertise: true, PingInterval: routePing, MaxPingsOut: routePingMax,
		PoolSize:    -1, // One connection between two hosts is enough for hints.
		Compression: server.CompressionOpts{Mode: server.CompressionOff},
	}
	so.Cluster.Advertise = w.self                                                     // Hosts tell each other of hosts.
	so.Cluster.Host, so.Cluster.Port, _ = splitListen("route address", o.RouteListen) // Start checked it.
	b.mu.Lock()
	so.Cluster.TLSConfig = b.identity.Peer(b.seen)
	b.mu.Unlock()
	so.Routes = routeURLs(w.routes...)
	return so
}

// runServer starts one server and waits until it takes connections.
func (b *Bus) runServer(ctx context.Context, so *server.Options) (*server.Server, error) {
	gate := &gatekeeper{users: b.opts.Subscribe.Users, sysPassword: b.sysPassword, log: b.opts.Log}
	so.CustomClientAuthentication = gate
	s, err := server.NewServer(so)
	if err != nil {
		return nil, fmt.Errorf("configure bus: %w", err)
	}
	gate.server = s
	log := newNATSLogger(b.opts.Log, b.setHistory)
	s.SetLoggerV2(log, false, false, false)
	s.Start()
	if so.Cluster.Port != 0 && so.DontListen && len(log.fatal) == 0 { // After a fatal word Start has returned early.
		// Start's own StartRouting waits for a client port, which never comes with DontListen. The call that is made instead does the accounting of the one that
		// waits (both end the same wait group), so a shutdown is complete; what stays is one parked goroutine per start of a server.
		ready := make(chan struct{})
		close(ready)
		s.StartRouting(ready)
	}
	if err := awaitReady(ctx, s, log.fatal); err != nil {
		return nil, errors.Join(err, stopServer(s))
	}
	return s, nil
}

// awaitReady returns when the server takes connections, or has said that it never will.
func awaitReady(ctx context.Context, s *server.Server, fatal <-chan string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for !s.ReadyForConnections(100 * time.Millisecond) {
		select {
		case text := <-fatal:
			return fmt.Errorf("start bus: %s", text)
		case <-ctx.Done():
			return fmt.Errorf("start bus: the server is not ready: %w", ctx.Err())
		default:
		}
	}
	return nil
}

// stopServer stops the server and waits for its end, but not for ever.
func stopServer(s *server.Server) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Shutdown()
		s.WaitForShutdown()
	}()
	select {
	case <-done:
		return nil
	case <-time.After(closeTimeout):
		return fmt.Errorf("stop bus: the server did not end within %s", closeTimeout)
	}
}
