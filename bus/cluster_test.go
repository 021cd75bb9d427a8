package bus

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	testSecret  = "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"
	otherSecret = "11111111-dddd/22222222-eeee/33333333-ffff"

	patience = 2 * time.Minute // For what takes seconds: a loaded machine is no failure.
)

// testPool is a pool of buses on loopback addresses 127.9.x.y, all with one route port.
type testPool struct {
	t      testing.TB
	dir    string
	secret string // File.
	pool   Pool
	port   string
	nodes  map[string]*Bus
}

// freePort is a port that nobody uses on any loopback address just now.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func newTestPool(t testing.TB, hosts int) *testPool {
	t.Helper()
	dir, err := os.MkdirTemp("", "bus-") // t.TempDir is too long for a socket.
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &testPool{t: t, dir: dir, secret: filepath.Join(dir, "ptoken"), port: freePort(t), nodes: map[string]*Bus{}, pool: Pool{UUID: "pool-1"}}
	p.writeSecret(testSecret)
	for i := range hosts {
		p.pool.Hosts = append(p.pool.Hosts, testHost(i))
	}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, b := range p.nodes {
			wg.Go(func() {
				if err := b.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	return p
}

func testHost(i int) Host {
	return Host{UUID: fmt.Sprintf("host-%02d", i), Name: fmt.Sprintf("xcp%d", i), Address: fmt.Sprintf("127.9.%d.%d", 1+i/200, 1+i%200)}
}

func (p *testPool) writeSecret(secret string) {
	p.t.Helper()
	if err := os.WriteFile(p.secret, []byte(secret), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *testPool) options(h Host) Options {
	return Options{
		Socket: filepath.Join(p.dir, h.UUID+".s"), ServerName: h.UUID, StoreDir: filepath.Join(p.dir, h.UUID), RouteListen: net.JoinHostPort(h.Address, p.port),
		Secret: p.secret, Log: testLog(p.t),
	}
}

// testLog shows warnings of the buses when BUS_LOG is set.
func testLog(testing.TB) *slog.Logger {
	if os.Getenv("BUS_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	level := slog.LevelInfo
	_ = level.UnmarshalText([]byte(os.Getenv("BUS_LOG")))
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

func (p *testPool) start(h Host, change func(*Options)) *Bus {
	p.t.Helper()
	o := p.options(h)
	if change != nil {
		change(&o)
	}
	b, err := Start(p.t.Context(), o)
	if err != nil {
		p.t.Fatal(err)
	}
	p.nodes[h.UUID] = b
	return b
}

func (p *testPool) startAll(change func(*Options)) {
	p.t.Helper()
	for _, h := range p.pool.Hosts {
		p.start(h, change).SetPool(p.pool)
	}
}

// eventually looks each time that some time has passed until ok; the buses offer nothing to wait on, as in real life.
func eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}

func (p *testPool) meshed(hosts ...Host) {
	p.t.Helper()
	for _, h := range hosts {
		eventually(p.t, patience, h.UUID+" is connected to all", func() bool { return len(p.nodes[h.UUID].Condition().Connected) == len(hosts)-1 })
	}
}

// ear is a subscriber on one bus that knows what it heard.
type ear struct {
	conn *Conn
	got  chan string
}

func (p *testPool) listen(h Host, subject string) *ear {
	p.t.Helper()
	c, err := p.nodes[h.UUID].Connect("test")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.Close)
	e := &ear{conn: c, got: make(chan string, 1000)}
	if _, err := c.Subscribe(func(m *Message) {
		select {
		case e.got <- string(m.Data):
		default:
		}
	}, subject); err != nil {
		p.t.Fatal(err)
	}
	if err := c.Flush(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	return e
}

// hears publishes on from until it is heard: interest travels between servers in its own time.
func (e *ear) hears(t testing.TB, from *Conn, subject, text string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(patience)
	publish := true
	for {
		if publish {
			if err := from.Publish(&Message{Subject: subject, Data: []byte(text)}); err != nil {
				t.Fatal(err)
			}
		}
		publish = false
		select {
		case got := <-e.got:
			if got == text {
				return
			}
		case <-tick.C:
			publish = true
		case <-timeout:
			t.Fatalf("%q was not heard within %s", text, patience)
		}
	}
}

func (p *testPool) conn(h Host) *Conn {
	p.t.Helper()
	c, err := p.nodes[h.UUID].Connect("test")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.Close)
	return c
}

func TestPlan(t *testing.T) {
	h := []Host{{UUID: "a", Address: "10.0.0.1"}, {UUID: "b", Address: "10.0.0.2"}, {UUID: "c", Address: "fd00::3"}}
	o := Options{ServerName: "a", RouteListen: ":6222", ClusterName: "x"}
	for _, tt := range []struct {
		name     string
		o        Options
		p        Pool
		noSecret string
		want     shape
	}{
		{"three hosts", o, Pool{UUID: "p", Hosts: h}, "", shape{cluster: "p", routes: []string{"10.0.0.2:6222", "[fd00::3]:6222"}, self: "10.0.0.1:6222"}},
		{"not in the list itself", Options{ServerName: "z", RouteListen: ":1"}, Pool{UUID: "p", Hosts: h[:1]}, "", shape{cluster: "p", routes: []string{"10.0.0.1:1"}}},
		{"one host", o, Pool{UUID: "p", Hosts: h[:1]}, "", shape{}},
		{"nobody known", o, Pool{}, "", shape{}},
		{"no route address", Options{ServerName: "a"}, Pool{UUID: "p", Hosts: h}, "", shape{}},
		{"no secret", o, Pool{UUID: "p", Hosts: h}, "no such file", shape{why: "no such file"}},
		{"no pool uuid", o, Pool{Hosts: h}, "", shape{why: "the pool's uuid is not known yet"}},
		{"addresses that are none", o, Pool{UUID: "p", Hosts: []Host{h[0], {UUID: "b"}, {UUID: "c", Address: "xcp3"}, {UUID: "d", Address: "10.0.0.2"}, {UUID: "e", Address: "10.0.0.2"}}}, "",
			shape{cluster: "p", routes: []string{"10.0.0.2:6222"}, self: "10.0.0.1:6222"}},
	} {
		got := plan(tt.o, tt.p, tt.noSecret)
		if got.cluster != tt.want.cluster || !slices.Equal(got.routes, tt.want.routes) || got.self != tt.want.self || got.why != tt.want.why {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestCluster_CarriesEventsAndFollowsTheListOfHosts(t *testing.T) {
	p := newTestPool(t, 3)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	ear := p.listen(h[2], "a.b")
	from := p.conn(h[0])
	ear.hears(t, from, "a.b", "one")

	joined := testHost(3)
	p.pool.Hosts = append(p.pool.Hosts, joined)
	before := p.nodes[h[0].UUID].current()
	p.join(joined)
	p.meshed(p.pool.Hosts...)
	late := p.listen(joined, "a.b")
	late.hears(t, from, "a.b", "two")
	if p.nodes[h[0].UUID].current() != before {
		t.Error("a host that joined restarted the servers of the others")
	}

	// A host leaves: the others drop it and keep each other.
	if err := p.nodes[joined.UUID].Close(); err != nil {
		t.Error(err)
	}
	delete(p.nodes, joined.UUID)
	p.pool.Hosts = h[:3]
	for _, b := range p.nodes {
		b.SetPool(p.pool)
	}
	p.meshed(h[:3]...)
	for _, b := range p.nodes {
		if c := b.Condition(); len(c.Missing) > 0 {
			t.Errorf("still expected: %v", c.Missing)
		}
	}
	ear.hears(t, from, "a.b", "three")
}

// join starts one more host and tells all of the pool.
func (p *testPool) join(h Host) {
	p.t.Helper()
	p.start(h, nil)
	for _, b := range p.nodes {
		b.SetPool(p.pool)
	}
}

func TestCluster_StartsFromTheKeptListWithoutAnybodyTelling(t *testing.T) {
	p := newTestPool(t, 2)
	p.startAll(nil)
	p.meshed(p.pool.Hosts...)
	for id, b := range p.nodes {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		delete(p.nodes, id)
	}
	for _, h := range p.pool.Hosts {
		p.start(h, nil) // No SetPool: XAPI is away.
	}
	p.meshed(p.pool.Hosts...)
	if _, live := p.nodes[p.pool.Hosts[0].UUID].Pool(); live {
		t.Error("a list from the disk counts as told")
	}
}

func TestCluster_SecretComesLateAndIsRotated(t *testing.T) {
	p := newTestPool(t, 2)
	if err := os.Remove(p.secret); err != nil {
		t.Fatal(err)
	}
	p.startAll(nil)
	h := p.pool.Hosts
	a := p.nodes[h[0].UUID]
	eventually(t, patience, "the bus says that it is alone", func() bool {
		return slices.ContainsFunc(a.Condition().Problems, func(x Problem) bool { return x.Code == "bus-alone" && strings.Contains(x.Text, "ptoken") })
	})
	door, err := Dial(t.Context(), a.opts.Socket, "client") // The local door works without a secret.
	if err != nil {
		t.Fatal(err)
	}
	defer door.Close()
	ear := p.listen(h[1], "x")

	p.writeSecret(testSecret)
	a.poke()
	p.nodes[h[1].UUID].poke()
	p.meshed(h...)
	ear.hears(t, door, "x", "after the secret came") // The same client, the same subscription.

	server := a.current()
	p.writeSecret(otherSecret)
	a.poke()
	p.nodes[h[1].UUID].poke()
	eventually(t, patience, "the rotation is seen", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return !a.rotated.IsZero() && a.inUse == a.authorities()
	})
	ear.hears(t, door, "x", "after the rotation")
	if a.current() != server {
		t.Error("a rotation restarted the server")
	}
	// A host that only knows the new secret gets in.
	joined := testHost(2)
	p.pool.Hosts = append(p.pool.Hosts, joined)
	p.join(joined)
	p.meshed(p.pool.Hosts...)

	for _, bad := range []string{"", "short"} {
		p.writeSecret(bad)
		a.poke()
		eventually(t, patience, "an unusable secret is a problem", func() bool {
			return slices.ContainsFunc(a.Condition().Problems, func(x Problem) bool { return x.Code == "pool-secret" })
		})
	}
	ear.hears(t, door, "x", "with the last good secret")
}

func TestCluster_PoolUUIDChangesWhileRunning(t *testing.T) {
	p := newTestPool(t, 2)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	ear := p.listen(h[1], "x")
	from := p.conn(h[0])
	p.pool.UUID = "pool-2"
	for _, b := range p.nodes {
		b.SetPool(p.pool)
	}
	eventually(t, patience, "both are in the new cluster", func() bool {
		a, b := p.nodes[h[0].UUID].Condition(), p.nodes[h[1].UUID].Condition()
		return a.Cluster == "pool-2" && b.Cluster == "pool-2" && len(a.Connected) == 1 && len(b.Connected) == 1
	})
	ear.hears(t, from, "x", "in the new pool")
}

func TestCluster_AnotherPoolsHostIsRefused(t *testing.T) {
	p := newTestPool(t, 2)
	stranger := filepath.Join(p.dir, "other-ptoken")
	if err := os.WriteFile(stranger, []byte(otherSecret), 0o600); err != nil {
		t.Fatal(err)
	}
	h := p.pool.Hosts
	var log lockedBuffer
	p.start(h[0], func(o *Options) { o.Log = slog.New(slog.NewTextHandler(&log, nil)) }).SetPool(p.pool)
	p.start(h[1], func(o *Options) { o.Secret = stranger }).SetPool(p.pool)
	eventually(t, patience, "the refusal is in the log", func() bool { return strings.Contains(log.String(), "TLS route handshake error") })
	if c := p.nodes[h[0].UUID].Condition(); len(c.Connected) != 0 || len(c.Missing) != 1 {
		t.Errorf("condition %+v", c)
	}
	for _, secret := range []string{testSecret, otherSecret} {
		if strings.Contains(log.String(), secret) {
			t.Error("the log has the pool secret")
		}
	}
}

func TestCluster_TwoHostsWithOneUUIDAreNoticed(t *testing.T) {
	p := newTestPool(t, 2)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	clone := Host{UUID: h[0].UUID, Name: "clone", Address: "127.9.5.5"}
	o := p.options(clone)
	o.Socket, o.StoreDir = filepath.Join(p.dir, "clone.s"), filepath.Join(p.dir, "clone")
	b, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	b.SetPool(Pool{UUID: p.pool.UUID, Hosts: []Host{clone, h[1], {UUID: "x", Address: h[0].Address}}})
	eventually(t, patience, "the host whose uuid it is says so", func() bool {
		return slices.ContainsFunc(p.nodes[h[0].UUID].Condition().Problems, func(x Problem) bool { return x.Code == "host-uuid-twice" })
	})
}

func TestCluster_PortTakenMeansAlone(t *testing.T) {
	p := newTestPool(t, 2)
	l, err := net.Listen("tcp", net.JoinHostPort(p.pool.Hosts[0].Address, p.port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b := p.start(p.pool.Hosts[0], nil)
	b.SetPool(p.pool)
	eventually(t, patience, "the bus says that it is alone", func() bool {
		return slices.ContainsFunc(b.Condition().Problems, func(x Problem) bool {
			return x.Code == "bus-alone" && strings.Contains(x.Text, "address already in use")
		})
	})
	ear := p.listen(p.pool.Hosts[0], "x")
	ear.hears(t, p.conn(p.pool.Hosts[0]), "x", "alone")
}

func TestNodeID_IsTheServersOwn(t *testing.T) {
	p := newTestPool(t, 1)
	b := p.start(p.pool.Hosts[0], nil)
	if got, want := nodeID(p.pool.Hosts[0].UUID), b.current().NodeName(); got != want {
		t.Errorf("node id %s, want %s: nats-server changed its hash", got, want)
	}
}

func TestReadPool_BadFiles(t *testing.T) {
	dir := t.TempDir()
	for _, text := range []string{"", "{", "[]", "\x00\x01", `{"hosts":5}`} {
		if err := os.WriteFile(filepath.Join(dir, poolFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if p, err := readPool(dir); err == nil || len(p.Hosts) > 0 {
			t.Errorf("%q: %+v, %v", text, p, err)
		}
	}
	want := Pool{UUID: "p", Hosts: []Host{{UUID: "a", Address: "10.0.0.1"}}}
	if err := keepPool(dir, want); err != nil {
		t.Fatal(err)
	}
	if got, err := readPool(dir); err != nil || !got.equal(want) {
		t.Errorf("%+v, %v", got, err)
	}
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

var _ io.Writer = (*lockedBuffer)(nil)

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestCluster_FloodAndASubscriberThatNeverReads: one agent publishes as fast as it can and a client on another host subscribes to everything and reads nothing. A
// mirror on that host still ends fresh and equal.
func TestCluster_FloodAndASubscriberThatNeverReads(t *testing.T) {
	p := newTestPool(t, 2)
	p.startAll(func(o *Options) { o.StoreDir, o.MaxPending = "", 1<<20 })
	h := p.pool.Hosts
	p.meshed(h...)
	deaf, err := net.Dial("unix", p.nodes[h[1].UUID].opts.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	if _, err := io.WriteString(deaf, "CONNECT {}\r\nSUB > 1\r\n"); err != nil {
		t.Fatal(err)
	}
	table, err := NewTable[int](p.conn(h[0]), XAPITable("vdi"), TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if _, err := table.Replace(map[string]int{"a": 0}); err != nil {
		t.Fatal(err)
	}
	m, err := NewMirror(p.conn(h[1]), XAPITable("vdi"), MirrorOptions[int]{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.WaitFresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	flood := p.conn(h[0])
	pad := bytes.Repeat([]byte("x"), 1000)
	for i := range 50000 {
		if err := flood.Publish(&Message{Subject: "xostor.v1.agent.mad.h.action", Data: pad}); err != nil {
			t.Fatal(err)
		}
		if i%500 == 0 {
			if _, err := table.Put("a", i); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := table.Put("a", -1); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience, "the mirror is fresh and equal", func() bool { v, _ := m.Get("a"); return v == -1 && m.Freshness().Fresh })
	if c := p.nodes[h[1].UUID].Condition(); len(c.Connected) != 1 {
		t.Errorf("the route did not survive: %+v", c)
	}
}
