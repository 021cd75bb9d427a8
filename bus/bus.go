package bus

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/xostor-agents/xostor-agents/bus/poolcert"
)

const (
	readyTimeout = 10 * time.Second
	closeTimeout = 4 * time.Second // With the door, Close stays below 5 s.
)

// Options say how one host's bus runs. The zero value of each optional field is a good choice.
type Options struct {
	// Socket is the path of the local door, a unix socket with mode 0600. Required.
	Socket string
	// ServerName is the host's uuid. Required.
	ServerName string
	// ClusterName is the pool's uuid until SetPool or the kept pool says otherwise. It names a bus that is alone; may be empty.
	ClusterName string
	// StoreDir is the folder of the history and of what was last known of the pool. Empty: no history, nothing kept.
	StoreDir string
	// RouteListen is the address "host:port" on which other hosts' buses connect; an empty host means all addresses, and the port is the
	// one on which all hosts of the pool listen. Empty: this bus stays alone.
	RouteListen string
	// Secret is the file with the pool secret, from which the certificates of the routes are derived. Without one the bus is alone until it is there.
	Secret string
	// Subscribe opens a TLS port for programs outside, which may read and not write.
	Subscribe SubscribeOptions
	// History bounds the history.
	History HistoryLimits
	// MaxPayload is the greatest size of one message in bytes. Default 1 MiB.
	MaxPayload int32
	// MaxPending is how many bytes wait for one slow client before it is cut off. Default 32 MiB.
	MaxPending int64
	// Log gets the server's own messages too. Default: slog.Default().
	Log *slog.Logger
}

func (o Options) withDefaults() (Options, error) {
	switch {
	case o.Socket == "":
		return o, errors.New("start bus: no socket path is configured")
	case o.ServerName == "":
		return o, errors.New("start bus: no server name (the host's uuid) is configured")
	}
	for key, listen := range map[string]string{"route address": o.RouteListen, "subscribe address": o.Subscribe.Listen} {
		if listen == "" {
			continue
		}
		if _, _, err := splitListen(key, listen); err != nil {
			return o, err
		}
	}
	if o.ClusterName == "" {
		o.ClusterName = "xostor"
	}
	if o.MaxPayload <= 0 {
		o.MaxPayload = 1 << 20
	}
	if o.MaxPending <= 0 {
		o.MaxPending = 32 << 20
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	o.History = o.History.withDefaults()
	return o, nil
}

// Bus is one host's embedded NATS server with its local door and, in a pool of several hosts, its routes to the others.
type Bus struct {
	opts        Options
	door        *door
	sysPassword string // Of the system account, for connections inside this process.

	kick  chan struct{} // Something changed: tend now.
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu       sync.Mutex
	server   *server.Server // nil while it is restarted.
	shape    shape          // Of the server that runs.
	failed   string         // Why the wanted shape could not be started.
	retry    time.Time      // When to try it again.
	pool     Pool
	live     bool // The pool was told by SetPool, not read from the disk.
	identity *poolcert.Identity
	noSecret string    // Why the secret cannot be read now.
	inUse    string    // The authorities that the server uses.
	rotated  time.Time // When the secret changed last; zero when the old one is forgotten.
	twin     twin

	historyOff    string
	historyPaused string
	pausedAt      time.Time
	replicas      int // Of the stream, as this bus last made sure of; 0 before.
	looked        time.Time

	closeOnce sync.Once
	closeErr  error
}

// Start starts the server and opens the local door. It returns when clients can connect, or an error when the door is
// taken by another live bus (ErrDoorTaken) or cannot be made. A history that cannot be opened is moved aside; if even that
// does not help the bus runs without one: HistoryOff says why. Hosts of the pool are connected in the background, from the list that was kept on disk
// until SetPool tells a newer one; a bus that cannot listen for them runs alone and tries again. Ctx bounds the start only.
func Start(ctx context.Context, o Options) (*Bus, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	b := &Bus{opts: o, sysPassword: rand.Text(), kick: make(chan struct{}, 1)}
	// The door comes first: two servers on one store folder would destroy it.
	listener, err := claimDoor(o.Socket)
	if err != nil {
		return nil, err
	}
	if b.pool, err = readPool(o.StoreDir); err != nil {
		o.Log.Warn("kept list of the pool's hosts not used", "err", err)
	}
	b.followSecret(time.Now())
	if err := b.startShape(ctx, b.want()); err != nil {
		return nil, errors.Join(err, listener.release())
	}
	b.door = openDoor(listener, b.InProcessConn, o.Log)
	tendCtx, cancel := context.WithCancel(context.Background())
	b.stop = cancel
	b.tasks.Go(func() { b.tend(tendCtx) })
	if o.StoreDir != "" && o.RouteListen != "" {
		b.tasks.Go(func() {
			if err := b.completeHistory(tendCtx); err != nil {
				o.Log.Error("gaps of the history are not filled", "err", err)
			}
		})
	}
	return b, nil
}

// SetPool tells who belongs to the pool, as XAPI says now. It is kept on disk. Hosts that are new are connected, hosts that left are let go of, all other
// connections stay. A pool uuid that changed restarts the server inside the process; clients come back by themselves.
func (b *Bus) SetPool(p Pool) {
	p = p.sorted()
	b.mu.Lock()
	same := b.live && b.pool.equal(p)
	kept := b.pool.equal(p)
	b.pool, b.live = p, true
	if !same {
		b.looked = time.Time{} // Who keeps the history may have changed too.
	}
	b.mu.Unlock()
	if same {
		return
	}
	if !kept {
		if err := keepPool(b.opts.StoreDir, p); err != nil {
			b.opts.Log.Warn("list of the pool's hosts not kept", "err", err)
		}
	}
	b.poke()
}

// Pool is who belongs to the pool as far as is known, and whether that was told by SetPool rather than read from the disk.
func (b *Bus) Pool() (p Pool, live bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pool, b.live
}

func (b *Bus) poke() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// current is the server that runs; nil while it is restarted.
func (b *Bus) current() *server.Server {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.server
}

// errRestarting lasts for well under a second; clients come back.
var errRestarting = errors.New("the bus is being restarted")

// InProcessConn implements nats.InProcessConnProvider: a connection to the server that runs now.
func (b *Bus) InProcessConn() (net.Conn, error) {
	s := b.current()
	if s == nil {
		return nil, errRestarting
	}
	return s.InProcessConn()
}

// Connect is a connection from inside the bus's own process. It survives restarts of the server.
func (b *Bus) Connect(name string) (*Conn, error) {
	nc, err := nats.Connect("", nats.InProcessServer(b), nats.Name(name), nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true),
		nats.CustomReconnectDelay(reconnectDelay), nats.ReconnectBufSize(reconnectBuffer))
	if err != nil {
		return nil, fmt.Errorf("connect to the own bus: %w", err)
	}
	return newConn(nc, name), nil
}

// Close shuts the door, cuts off all clients and stops the server, within 5 seconds. It may be called more than once.
func (b *Bus) Close() error {
	b.closeOnce.Do(func() {
		b.stop()
		b.closeErr = b.door.close()
		b.tasks.Wait()
		if s := b.current(); s != nil {
			b.closeErr = errors.Join(b.closeErr, stopServer(s))
		}
	})
	return b.closeErr
}
