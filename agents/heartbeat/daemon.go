package heartbeat

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
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
	Xhad      Xhad // Where Timing comes from.
	// Identity secures connections between hosts; nil is for labs only.
	Identity *poolcert.Identity
	// Fallback lists further addresses, host:port, of hosts that are not known yet: the management network's. Whose they
	// are is learned from the certificate there. It may be nil, and is asked again now and then.
	Fallback func() []string
	// Open opens the device; nil makes this host never own.
	Open func() (Device, error)
	// Resource asks and steers DRBD; nil when the device is none. A process that never owns only asks.
	Resource Resource
	// Size of the export to local clients, in bytes.
	Size int64
	// Before is the longest request time-out that the kernel's device was given by the processes before, 0 if it is new.
	Before time.Duration
	// HangUp is called when Run is to end, while requests are still passed on: KernelSockets.HangUp. It may be nil.
	HangUp func(limit time.Duration)
	// CutMemo is a file that remembers to which hosts this one has cut its DRBD link: DRBD would leave the link down for ever if
	// the process that cut it ended. "" for none.
	CutMemo string
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
	openErr   error // Of the last open; nil after one that succeeded.
	drbd      *ResourceState
	policy    *Policy
	asked     map[string]*asking
	opening   bool              // The device is being opened, or the ownership being begun.
	learned   map[string]string // Fallback address to host.
	asks      sync.WaitGroup
	slots     chan struct{} // Of asks under way at once.
}

// asking is the state of asking one host.
type asking struct {
	busy   bool
	done   time.Time // When the last one ended.
	jitter float64   // Of the pause after it, from 0 to 1.
}

// Why a process does not own.
const (
	neverOwns     = "this process does not own"
	policyUnknown = "what drbd does without quorum is not known yet"
)

// New checks the configuration and makes a daemon. Nothing runs before Run.
func New(c Config) (*Daemon, error) {
	if c.Host == "" || strings.ContainsAny(c.Host, "/@~ ") || c.Boot == "" || c.Export == "" || c.Timing.Attempt == 0 {
		return nil, errors.New("heartbeat needs a host, a boot id, an export and its times")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	d := &Daemon{c: c, front: newForwarder(c.Timing, c.Size, c.Statefile, c.Before), asked: map[string]*asking{}, learned: map[string]string{},
		slots: make(chan struct{}, 16)}
	now := time.Now()
	d.view = View{Self: c.Host, LostAt: now, Cut: map[string]time.Time{}, Uncut: map[string]bool{}}
	if c.Resource != nil {
		d.view.Barred = policyUnknown
	}
	for _, p := range c.Peers {
		d.asked[p.Host] = &asking{}
		if p.Host != c.Host {
			d.view.Peers = append(d.view.Peers, Peer{Host: p.Host, At: now})
		}
	}
	if c.Open == nil {
		d.view.Barred = neverOwns
	}
	if err := d.recallCuts(now); err != nil {
		return nil, err
	}
	return d, nil
}

// recallCuts takes over what a process before has cut.
func (d *Daemon) recallCuts(now time.Time) error {
	if d.c.CutMemo == "" {
		return nil
	}
	text, err := os.ReadFile(d.c.CutMemo)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read memo of cut links: %w", err)
	}
	for _, host := range strings.Fields(string(text)) {
		if slices.ContainsFunc(d.view.Peers, func(p Peer) bool { return p.Host == host }) {
			d.view.Cut[host] = now
		}
	}
	return nil
}

// noteCut notes what became of a cut before and after it: at is zero when the link is restored.
func (d *Daemon) noteCut(host string, at time.Time, known bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.view.Uncut, host)
	if at.IsZero() {
		delete(d.view.Cut, host)
	} else {
		d.view.Cut[host] = at
		if !known {
			d.view.Uncut[host] = true
		}
	}
	if d.c.CutMemo == "" {
		return
	}
	text := strings.Join(slices.Sorted(maps.Keys(d.view.Cut)), "\n") + "\n"
	err := os.WriteFile(d.c.CutMemo+".new", []byte(text), 0o600)
	if err == nil {
		err = os.Rename(d.c.CutMemo+".new", d.c.CutMemo)
	}
	if err != nil {
		d.c.Log.Error("cut link not remembered: a restart will not restore it", "host", host, "err", err)
	}
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

// Run searches, watches and owns until ctx ends. Then it answers what the kernel has sent, for t.Suspect at most, and hands over.
func (d *Daemon) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	front, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	wg.Go(func() { d.loop(front, 25*time.Millisecond, d.search) })
	wg.Go(func() { d.pings(front) })
	wg.Go(func() { d.loop(ctx, 50*time.Millisecond, d.decide) })
	if d.c.Resource != nil {
		wg.Go(func() { d.loop(ctx, 2*time.Second, d.ask) })
	}
	if d.c.Resource != nil && d.c.Open != nil {
		wg.Go(func() { d.loop(ctx, 10*time.Second, d.learnPolicy) })
	}
	if d.c.Fallback != nil && d.c.Identity != nil {
		wg.Go(func() { d.loop(ctx, 10*time.Second, d.learnHosts) })
	}
	wg.Go(func() { d.loop(ctx, 5*time.Second, d.prefer) })
	<-ctx.Done()
	if d.c.HangUp != nil {
		d.c.HangUp(d.timing().Suspect)
	}
	d.HandOver("")
	d.front.stop()
	stop()
	wg.Wait()
	d.asks.Wait()
	return nil
}

// SetTiming follows xhad's configuration. An ownership under way keeps its own times, which do not depend on it.
func (d *Daemon) SetTiming(t Timing, x Xhad) {
	d.mu.Lock()
	d.c.Timing, d.c.Xhad = t, x
	d.mu.Unlock()
	d.front.setTiming(t)
}

func (d *Daemon) timing() Timing {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.c.Timing
}

// pings keeps the front's link under watch.
func (d *Daemon) pings(ctx context.Context) {
	buf := nbd.AlignedBuffer(512)
	for {
		d.front.ping(buf)
		select {
		case <-ctx.Done():
			return
		case <-time.After(d.timing().Ping):
		}
	}
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
	if w != nil {
		d.successor = successor
	}
	d.mu.Unlock()
	if w != nil {
		w.handOver(d.timing().Suspect)
	}
}

// ask keeps DRBD's view fresh.
func (d *Daemon) ask(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := d.c.Resource.State(ctx)
	d.mu.Lock()
	if err != nil {
		d.drbd, d.lastErr = nil, err.Error()
		d.mu.Unlock()
		return
	}
	d.drbd = &st
	d.view.See(time.Now(), st.Primary)
	d.view.Diskful = st.Diskful
	for i := range d.view.Peers {
		d.view.Peers[i].Diskful = st.Peers[d.view.Peers[i].Host] == DiskUpToDate
	}
	d.mu.Unlock()
	if st.cutOff() {
		d.front.dropFallback(time.Now())
	}
}

// learnPolicy asks DRBD what it does without quorum, and leaves a device that may lose what was acknowledged.
func (d *Daemon) learnPolicy(ctx context.Context) {
	ask, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	p, err := d.c.Resource.Policy(ask)
	d.mu.Lock()
	if err != nil {
		d.lastErr = err.Error() // What was known stays known: a program that fails says nothing about the device.
		d.mu.Unlock()
		return
	}
	d.policy = &p
	if d.c.Open != nil {
		d.view.Barred = p.Barred()
	}
	barred, owner := d.view.Barred, d.owner
	d.mu.Unlock()
	if barred != "" && owner != nil {
		d.c.Log.Error("leave device", "reason", barred)
		d.HandOver("")
	}
}

// learnHosts asks fallback addresses whose they are.
func (d *Daemon) learnHosts(ctx context.Context) {
	for _, addr := range d.c.Fallback() {
		d.mu.Lock()
		_, known := d.learned[addr]
		d.mu.Unlock()
		if known {
			continue
		}
		host, err := d.whose(ctx, addr)
		if err != nil {
			d.c.Log.Debug("host of fallback address not learned", "addr", addr, "err", err)
			continue
		}
		d.mu.Lock()
		d.learned[addr] = host
		d.mu.Unlock()
	}
}

// whose reads the host's name in the certificate that is shown at addr.
func (d *Daemon) whose(ctx context.Context, addr string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	secure, host := d.c.Identity.Client(poolcert.PoolName), ""
	secure.VerifyConnection = func(s tls.ConnectionState) error {
		host = s.PeerCertificates[0].Subject.CommonName
		return nil
	}
	_, err = nbd.Names(ctx, conn, secure)
	return host, err
}

// addresses are a host's addresses, best first. The management network carries requests only while DRBD does not say that
// this host is cut off from the device: a host without storage must lose its statefile, or its VMs hang unnoticed.
func (d *Daemon) addresses(p PeerAddress) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := slices.Clone(p.Addrs)
	for addr, host := range d.learned {
		if host == p.Host && !slices.Contains(out, addr) {
			out = append(out, addr)
		}
	}
	slices.Sort(out[len(p.Addrs):])
	if len(out) > 1 && d.drbd != nil && d.drbd.cutOff() {
		out = out[:1]
	}
	return out
}

// search looks for the owner while there is no link, and asks hosts whose DRBD link was cut. Each host is asked on its
// own, so that one that does not answer delays no other.
func (d *Daemon) search(ctx context.Context) {
	linked := d.front.linked()
	outage := d.front.outage(time.Now())
	d.mu.Lock()
	defer d.mu.Unlock()
	if linked && len(d.view.Cut) == 0 {
		return
	}
	now := time.Now()
	// The host asked longest ago comes first: silent hosts may have all slots at times, and must not have them for ever.
	order := slices.Clone(d.c.Peers)
	slices.SortStableFunc(order, func(a, b PeerAddress) int {
		return cmp.Or(first(b.Host == d.view.Owner)-first(a.Host == d.view.Owner), d.asked[a.Host].done.Compare(d.asked[b.Host].done))
	})
	for _, p := range order {
		if _, cut := d.view.Cut[p.Host]; linked && !cut {
			continue
		}
		if p.Host == d.c.Host && d.c.Open != nil && d.owner == nil {
			continue // This process knows that it does not own.
		}
		a := d.asked[p.Host]
		pause := d.c.Timing.AskAgain(len(order), outage, a.jitter)
		if linked {
			pause = d.c.Timing.Reopen // Only whether a link can be restored.
		}
		if a.busy || now.Sub(a.done) < pause {
			continue
		}
		select {
		case d.slots <- struct{}{}:
		default:
			return
		}
		a.busy = true
		d.asks.Go(func() {
			d.try(ctx, p, linked)
			d.mu.Lock()
			a.busy, a.done, a.jitter = false, time.Now(), rand.Float64()
			d.mu.Unlock()
			<-d.slots
		})
	}
}

func first(b bool) int {
	if b {
		return 1
	}
	return 0
}

// try asks one host to serve, or only whether it would.
func (d *Daemon) try(ctx context.Context, p PeerAddress, only bool) {
	name := d.sessionHost()
	if only {
		name += "~q" // A session of this host's own name would end the one that serves it.
	}
	l, err := d.dial(ctx, p, d.addresses(p), name)
	if err == nil {
		d.note(p.Host, Serves, "")
		if only {
			l.client.Close()
		} else {
			d.front.attach(l)
		}
		return
	}
	var refusal *nbd.Refusal
	switch {
	case errors.As(err, &refusal):
		answer := NotOwner
		if refusal.Message == openingMessage {
			answer = Opening
		}
		_, successor, _ := strings.Cut(refusal.Message, "successor=")
		d.note(p.Host, answer, successor)
	case errors.Is(err, errAllRefused):
		d.note(p.Host, Refused, "")
	case ctx.Err() != nil:
		// This process ends; nothing is known about the host.
	default:
		d.note(p.Host, Silent, "")
		d.mu.Lock()
		d.lastErr = err.Error()
		d.mu.Unlock()
	}
}

// errAllRefused: each address of a host refused the connection, so the host lives and no daemon listens.
var errAllRefused = errors.New("connection refused")

// Time that one address of a host gets: for the connection, and for the handshake, in which a new owner may wait for
// Settle.
const (
	connectTime   = 400 * time.Millisecond
	handshakeTime = time.Second
)

// dial connects to a host's daemon over its first address that answers. A refusal by NBD is an answer.
func (d *Daemon) dial(ctx context.Context, p PeerAddress, addrs []string, name string) (*ownerLink, error) {
	err := fmt.Errorf("host %s has no address", p.Host)
	refused := 0
	for i, addr := range addrs {
		dialer := net.Dialer{Timeout: connectTime}
		var conn net.Conn
		if conn, err = dialer.DialContext(ctx, "tcp", addr); err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) {
				refused++
			}
			continue
		}
		limit := handshakeTime
		if i < len(addrs)-1 {
			limit = connectTime + d.timing().Settle // Another address may be quicker than a network that loses packets.
		}
		var client *nbd.Client
		if client, err = d.open(ctx, conn, name, limit); err == nil {
			return &ownerLink{client: client, owner: p.Host, addr: addr, fallback: i > 0}, nil
		}
		if errors.As(err, new(*nbd.Refusal)) {
			return nil, err
		}
	}
	if refused > 0 && refused == len(addrs) {
		return nil, fmt.Errorf("%w by %s", errAllRefused, p.Host)
	}
	return nil, err
}

// sessionHost is this process in its sessions' names.
func (d *Daemon) sessionHost() string {
	if d.c.Monitor {
		return d.c.Host + "~m"
	}
	return d.c.Host
}

// open begins a session on conn.
func (d *Daemon) open(ctx context.Context, conn net.Conn, name string, limit time.Duration) (*nbd.Client, error) {
	o := nbd.Options{Name: sessionName(d.c.Export, name, Session{d.c.Boot, sinceBoot()})}
	if d.c.Identity != nil {
		o.TLS = d.c.Identity.Client(poolcert.PoolName)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return nbd.Connect(ctx, conn, o)
}

// prefer moves a link that runs over a fallback address back to the storage network once that answers again.
func (d *Daemon) prefer(ctx context.Context) {
	l := d.front.current()
	if l == nil || !l.fallback {
		return
	}
	i := slices.IndexFunc(d.c.Peers, func(p PeerAddress) bool { return p.Host == l.owner })
	if i < 0 || len(d.c.Peers[i].Addrs) == 0 {
		return
	}
	addr := d.c.Peers[i].Addrs[0]
	if !d.reachable(ctx, addr) {
		return
	}
	dialer := net.Dialer{Timeout: connectTime}
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return
	}
	if d.front.move(l, func() (*ownerLink, error) {
		client, err := d.open(ctx, conn, d.sessionHost(), handshakeTime)
		return &ownerLink{client: client, owner: l.owner, addr: addr}, err
	}) {
		d.c.Log.Info("back on the storage network", "host", l.owner, "addr", addr)
	}
}

// reachable says whether an NBD server answers at addr: a connection alone proves little, and requests wait during a move.
func (d *Daemon) reachable(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return false
	}
	var secure *tls.Config
	if d.c.Identity != nil {
		secure = d.c.Identity.Client(poolcert.PoolName)
	}
	_, err = nbd.Names(ctx, conn, secure)
	return err == nil
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
	if !out {
		// A hand-over is over when there is another owner, and must not decide the next outage.
		d.view.Successor = ""
		if d.owner == nil && owner != d.c.Host && heard.After(d.view.LeftAt) {
			d.successor = ""
		}
	}
	view := d.view
	if d.drbd == nil {
		view.Primary = "" // DRBD does not answer; whom it showed last keeps its time.
	}
	step := DecideCandidate(now, d.c.Timing, view)
	steers := d.c.Resource != nil && d.c.Open != nil
	d.lastWhy = step.Why
	d.passes++
	d.mu.Unlock()
	switch {
	case step.Join != "" && steers:
		d.c.Log.Info("restore drbd link", "host", step.Join, "reason", step.Why)
		if d.steer(ctx, d.c.Resource.Join, step.Join) {
			d.noteCut(step.Join, time.Time{}, true)
		}
	case step.Cut != "" && steers:
		d.c.Log.Warn("cut drbd link", "host", step.Cut, "reason", step.Why)
		d.noteCut(step.Cut, now, false)
		if d.steer(ctx, d.c.Resource.Cut, step.Cut) {
			d.noteCut(step.Cut, now, true)
		}
	case step.Open:
		d.own(ctx, step.Why)
	}
}

// steer cuts or joins a link. A failure is waited out a little, and decided on again.
func (d *Daemon) steer(ctx context.Context, do func(context.Context, string) error, host string) bool {
	limit, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	err := do(limit, host)
	if err == nil {
		return true
	}
	d.c.Log.Error("steering drbd failed", "host", host, "err", err)
	select {
	case <-ctx.Done():
	case <-time.After(d.timing().Reopen):
	}
	return false
}

// own asks DRBD for the device. It blocks for as long as the open does, up to about 1.5 s; decide waits with it.
func (d *Daemon) own(ctx context.Context, why string) {
	d.c.Log.Info("open device", "reason", why)
	d.setOpening(true)
	defer d.setOpening(false)
	dev, err := d.c.Open()
	now := time.Now()
	d.mu.Lock()
	d.view.Opened, d.view.Held = now, errors.Is(err, ErrHeld)
	known := d.openErr != nil && err != nil && d.openErr.Error() == err.Error()
	d.openErr = err
	if err != nil {
		d.lastErr = err.Error()
	}
	d.mu.Unlock()
	if err != nil {
		level := slog.LevelError // An operator has to act.
		if errors.Is(err, ErrHeld) {
			level = slog.LevelInfo
		}
		if known {
			level = slog.LevelDebug
		}
		d.c.Log.Log(ctx, level, "device not opened", "err", err)
		return
	}
	w, err := begin(dev, d.timing(), d.c.Host, d.c.Export, d.c.Statefile)
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

func (d *Daemon) setOpening(is bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opening = is
}

// openingMessage is the refusal of a host that has asked DRBD for the device and has no answer yet, or is beginning to own it.
// One that does not know it takes it for that of any host that is not the owner.
const openingMessage = "this host is opening the device"

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
	switch {
	case e.d.owner == nil && e.d.opening:
		return nil, &nbd.Refusal{Code: nbd.Unknown, Message: openingMessage}
	case e.d.owner == nil:
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
