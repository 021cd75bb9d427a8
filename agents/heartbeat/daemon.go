package heartbeat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/bus/poolcert"
)

// PeerAddress is a host of the pool and where its daemon listens: storage network first, management as fallback.
type PeerAddress struct {
	Host  string
	Addrs []string // host:port.
}

// Config is one export on one host.
type Config struct {
	Host   string // This host's DRBD node name.
	Boot   string // The kernel's boot id.
	Export string // Name of the export, "statefile" or "redo-log".
	// Statefile says that the device holds xhad's statefile: slots may be written again, and the record lies behind it.
	Statefile bool
	Peers     []PeerAddress // All hosts, this one included.
	Timing    Timing
	// Identity secures connections between hosts; nil is for labs only.
	Identity *poolcert.Identity
	// Open opens the device; nil makes this host never own.
	Open func() (Device, error)
	// Resource asks and steers DRBD; nil when the device is none.
	Resource Resource
	// Barred is why this host must not own, from the resource's configuration.
	Barred string
	// Size of the export to local clients, in bytes.
	Size int64
	// Takeover: the kernel's device was there before this process.
	Takeover bool
	// Monitor marks a process that only watches and owns; its sessions do not replace those of the host's front.
	Monitor bool
	Log     *slog.Logger
}

// Daemon runs one export on one host: front, candidate and, if DRBD lets it, owner.
type Daemon struct {
	c     Config
	front *forwarder

	mu        sync.Mutex
	view      View
	owner     *ownership
	since     time.Time // When this host became the owner.
	successor string
	lastErr   string
	lastWhy   string
	passes    uint64
}

// New checks the configuration and makes a daemon. Nothing runs before Run.
func New(c Config) (*Daemon, error) {
	if c.Host == "" || strings.ContainsAny(c.Host, "/@~ ") || c.Boot == "" || c.Export == "" || c.Timing.Attempt == 0 {
		return nil, errors.New("heartbeat needs a host, a boot id, an export and its times")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	d := &Daemon{c: c, front: newForwarder(c.Timing, c.Size, c.Statefile, c.Takeover)}
	now := time.Now()
	d.view = View{Self: c.Host, LostAt: now, Cut: map[string]time.Time{}, Barred: c.Barred}
	for _, p := range c.Peers {
		if p.Host != c.Host {
			d.view.Peers = append(d.view.Peers, Peer{Host: p.Host, At: now})
		}
	}
	if c.Open == nil {
		d.view.Barred = "this process does not own"
	}
	return d, nil
}

// Local is the server for local clients: the kernel's sockets, or tools on a unix socket.
func (d *Daemon) Local() *nbd.Server {
	return &nbd.Server{Exports: localExports{d.c.Export, d.front}, TransferTimeout: d.c.Timing.KernelTimeout()}
}

// LocalSession is the session for a socket that is handed to the kernel.
func (d *Daemon) LocalSession(conn net.Conn) nbd.Session { return d.front.session(conn) }

// Remote is the server for other hosts.
func (d *Daemon) Remote() *nbd.Server {
	s := &nbd.Server{Exports: remoteExports{d}, IdleTimeout: 10 * d.c.Timing.Suspect, MaxConns: 512}
	if d.c.Identity != nil {
		s.TLS = d.c.Identity.Server()
	}
	return s
}

// Run searches, watches and owns until ctx ends, and then hands over.
func (d *Daemon) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { d.loop(ctx, 25*time.Millisecond, d.search) })
	wg.Go(func() {
		buf := nbd.AlignedBuffer(512)
		d.loop(ctx, d.c.Timing.Ping, func(context.Context) { d.front.ping(buf) })
	})
	wg.Go(func() { d.loop(ctx, 50*time.Millisecond, d.decide) })
	if d.c.Resource != nil {
		wg.Go(func() { d.loop(ctx, 2*time.Second, d.ask) })
	}
	<-ctx.Done()
	d.HandOver("")
	d.front.stop()
	wg.Wait()
	return nil
}

func (d *Daemon) loop(ctx context.Context, every time.Duration, do func(context.Context)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		do(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// HandOver gives the ownership up for a host ("" for anyone) and returns when the device is closed.
func (d *Daemon) HandOver(successor string) {
	d.mu.Lock()
	w := d.owner
	d.successor = successor
	d.mu.Unlock()
	if w != nil {
		w.handOver(d.c.Timing.Suspect)
	}
}

// ask keeps DRBD's view fresh.
func (d *Daemon) ask(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := d.c.Resource.State(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.view.Primary, d.lastErr = "", err.Error()
		return
	}
	d.view.Primary, d.view.Diskful = st.Primary, st.Diskful
	for i := range d.view.Peers {
		d.view.Peers[i].Diskful = st.Peers[d.view.Peers[i].Host]
	}
}

// search looks for the owner while there is no link, and asks hosts whose DRBD link was cut.
func (d *Daemon) search(ctx context.Context) {
	d.front.mu.Lock()
	linked := d.front.link != nil
	if l := d.front.link; l != nil {
		select {
		case <-l.client.Ended():
			linked = false
			d.front.mu.Unlock()
			d.front.detach(l, time.Now())
			d.front.mu.Lock()
		default:
		}
	}
	d.front.mu.Unlock()
	d.mu.Lock()
	last, cut := d.view.Owner, len(d.view.Cut) > 0
	d.mu.Unlock()
	if linked && !cut {
		return
	}
	round, cancel := context.WithTimeout(ctx, time.Second+d.c.Timing.Settle)
	defer cancel()
	order := slices.Clone(d.c.Peers)
	slices.SortStableFunc(order, func(a, b PeerAddress) int { return first(b.Host == last) - first(a.Host == last) })
	few := make(chan struct{}, 8)
	var wg sync.WaitGroup
	for _, p := range order {
		if linked && !d.isCut(p.Host) {
			continue
		}
		few <- struct{}{}
		wg.Go(func() {
			defer func() { <-few }()
			d.try(round, p, cancel)
		})
	}
	wg.Wait()
}

func first(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (d *Daemon) isCut(host string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, cut := d.view.Cut[host]
	return cut
}

// try asks one host to serve.
func (d *Daemon) try(ctx context.Context, p PeerAddress, found func()) {
	client, err := d.dial(ctx, p)
	if err == nil {
		d.note(p.Host, Serves, "")
		d.front.mu.Lock()
		taken := d.front.link != nil
		d.front.mu.Unlock()
		if taken {
			client.Close()
			return
		}
		d.front.attach(&ownerLink{client: client, owner: p.Host})
		found()
		return
	}
	var refusal *nbd.Refusal
	switch {
	case errors.As(err, &refusal):
		_, successor, _ := strings.Cut(refusal.Message, "successor=")
		d.note(p.Host, NotOwner, successor)
	case errors.Is(err, syscall.ECONNREFUSED):
		d.note(p.Host, Refused, "")
	case ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled):
		// Another host was found meanwhile; nothing is known about this one.
	default:
		d.note(p.Host, Silent, "")
		d.mu.Lock()
		d.lastErr = err.Error()
		d.mu.Unlock()
	}
}

// dial connects to a host's daemon, over its first address that answers.
func (d *Daemon) dial(ctx context.Context, p PeerAddress) (*nbd.Client, error) {
	name := d.c.Host
	if d.c.Monitor {
		name += "~m"
	}
	err := fmt.Errorf("host %s has no address", p.Host)
	for _, addr := range p.Addrs {
		dialer := net.Dialer{Timeout: 400 * time.Millisecond}
		var conn net.Conn
		if conn, err = dialer.DialContext(ctx, "tcp", addr); err != nil {
			continue
		}
		o := nbd.Options{Name: sessionName(d.c.Export, name, Session{d.c.Boot, sinceBoot()})}
		if d.c.Identity != nil {
			o.TLS = d.c.Identity.Client(poolcert.PoolName)
		}
		handshake, cancel := context.WithTimeout(ctx, time.Second)
		client, err := nbd.Connect(handshake, conn, o)
		cancel()
		return client, err
	}
	return nil, err
}

func (d *Daemon) note(host string, a Answer, successor string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if successor != "" {
		d.view.Successor = successor
	}
	d.view.Note(time.Now(), host, a)
}

// decide does what DecideCandidate says.
func (d *Daemon) decide(ctx context.Context) {
	now := time.Now()
	d.front.mu.Lock()
	outage, out := d.front.f.Outage()
	heard, owner := d.front.heard, d.front.owner
	d.front.mu.Unlock()
	d.mu.Lock()
	d.view.Served = !out || d.owner != nil
	if out {
		d.view.LostAt = outage
	}
	d.view.Owner, d.view.Heard = owner, heard
	step := DecideCandidate(now, d.c.Timing, d.view)
	d.lastWhy = step.Why
	d.passes++
	d.mu.Unlock()
	switch {
	case step.Join != "" && d.c.Resource != nil:
		d.c.Log.Info("restore drbd link", "host", step.Join, "reason", step.Why)
		d.steer(ctx, d.c.Resource.Join, step.Join)
		d.mu.Lock()
		delete(d.view.Cut, step.Join)
		d.mu.Unlock()
	case step.Cut != "" && d.c.Resource != nil:
		d.c.Log.Warn("cut drbd link", "host", step.Cut, "reason", step.Why)
		d.mu.Lock()
		d.view.Cut[step.Cut] = now
		d.mu.Unlock()
		d.steer(ctx, d.c.Resource.Cut, step.Cut)
	case step.Open:
		d.open(ctx, step.Why)
	}
}

func (d *Daemon) steer(ctx context.Context, do func(context.Context, string) error, host string) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := do(ctx, host); err != nil {
		d.c.Log.Error("steering drbd failed", "host", host, "err", err)
	}
}

// open asks DRBD for the device. It blocks for as long as the open does, up to about 1.5 s; decide waits with it.
func (d *Daemon) open(ctx context.Context, why string) {
	d.c.Log.Info("open device", "reason", why)
	dev, err := d.c.Open()
	now := time.Now()
	d.mu.Lock()
	d.view.Opened, d.view.Held = now, errors.Is(err, ErrHeld)
	if err != nil {
		d.lastErr = err.Error()
	}
	d.mu.Unlock()
	if err != nil {
		d.c.Log.Info("device not opened", "err", err)
		return
	}
	w, err := begin(dev, d.c.Timing, d.c.Host, d.c.Export, d.c.Statefile)
	if err != nil {
		dev.Close()
		d.c.Log.Error("ownership not begun", "err", err)
		return
	}
	d.mu.Lock()
	d.owner, d.since, d.successor, d.view.Successor = w, now, "", ""
	d.mu.Unlock()
	d.c.Log.Info("own device", "epoch", w.record.Epoch)
	go w.keep(ctx)
	go d.afterwards(w)
}

// afterwards waits for the end of an ownership.
func (d *Daemon) afterwards(w *ownership) {
	<-w.ended
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.owner == w {
		d.owner = nil
	}
	d.view.LeftAt = time.Now()
	d.c.Log.Warn("left device", "err", w.why)
}

// remoteExports serves other hosts.
type remoteExports struct{ d *Daemon }

func (e remoteExports) List(nbd.Peer) []string { return []string{e.d.c.Export} }

func (e remoteExports) owner() (*ownership, error) {
	e.d.mu.Lock()
	defer e.d.mu.Unlock()
	if e.d.owner == nil {
		msg := "this host is not the owner"
		if e.d.successor != "" {
			msg += " successor=" + e.d.successor
		}
		return nil, &nbd.Refusal{Code: nbd.Unknown, Message: msg}
	}
	return e.d.owner, nil
}

func (e remoteExports) Stat(name string, p nbd.Peer) (nbd.Info, error) {
	w, err := e.owner()
	if err != nil {
		return nbd.Info{}, err
	}
	return (&ownerSession{w: w, read: !strings.Contains(name, "@")}).Info(), nil
}

// Open checks that the host in the session's name is the one in the certificate.
func (e remoteExports) Open(ctx context.Context, name string, p nbd.Peer) (nbd.Session, error) {
	export, host, session, err := parseSessionName(name)
	if err != nil || export != e.d.c.Export {
		return nil, &nbd.Refusal{Code: nbd.Unknown, Message: "no such export"}
	}
	if bare, _, _ := strings.Cut(host, "~"); e.d.c.Identity != nil && host != "" && bare != p.Name {
		return nil, &nbd.Refusal{Code: nbd.Policy, Message: "the certificate is another host's"}
	}
	w, err := e.owner()
	if err != nil {
		return nil, err
	}
	return w.accept(ctx, host, session, p.Conn)
}
