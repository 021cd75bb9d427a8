package xapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// These tests run the client against the lab's XAPI, which was written from the same sources by other hands.

type labPool struct {
	xapidb.Pool
	db   *xapidb.DB
	face *xapiface.Face
	dir  string
}

func newLabPool(t *testing.T, hosts int) labPool {
	t.Helper()
	p := labPool{db: xapidb.New(xapidb.Options{Rand: xapidb.SeededRand(1), TombstoneLimit: 8})}
	var err error
	if p.Pool, err = p.db.SeedPool(xapidb.Seed{Hosts: hosts}); err != nil {
		t.Fatal(err)
	}
	p.face = xapiface.New(xapiface.Options{DB: p.db, Password: "secret"})
	t.Cleanup(func() {
		if err := p.face.Close(); err != nil {
			t.Error(err)
		}
	})
	if p.dir, err = os.MkdirTemp("", "xapi"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(p.dir) })
	return p
}

// socket gives a client on the local socket of a host.
func (p labPool) socket(t *testing.T, host string) *xapi.Client {
	t.Helper()
	path := filepath.Join(p.dir, host[len(host)-6:])
	if _, err := p.face.ServeUnix(path, host); err != nil {
		t.Fatal(err)
	}
	return p.client(t, xapi.Config{Socket: path})
}

func (p labPool) client(t *testing.T, cfg xapi.Config) *xapi.Client {
	t.Helper()
	cfg.Originator, cfg.Log = "xostor-lab-test", slog.New(slog.DiscardHandler)
	c, err := xapi.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestLabRecordsAreTheSameOnBothWires(t *testing.T) {
	p := newLabPool(t, 3)
	c := p.socket(t, p.Hosts[0])
	sr := must[string](t)(p.db.Create("SR", map[string]any{"name_label": "XOSTOR", "type": "linstor", "physical_size": 1 << 50}))
	for i := range 3 {
		must[string](t)(p.db.Create("VDI", map[string]any{"SR": sr, "name_label": " a <&> b\n", "virtual_size": i}))
	}
	same[xapi.Pool](t, c, "pool", 1)
	same[xapi.Host](t, c, "host", 3)
	same[xapi.HostMetrics](t, c, "host_metrics", 3)
	same[xapi.SR](t, c, "SR", 1)
	same[xapi.VDI](t, c, "VDI", 3)
	same[xapi.VM](t, c, "VM", 3)
	same[xapi.PIF](t, c, "PIF", 6)
	same[xapi.PIFMetrics](t, c, "PIF_metrics", 6)
	same[xapi.Network](t, c, "network", 2)
	expr := must[string](t)(xapi.Field("SR", sr))
	if vdis := must[map[xapi.Ref]xapi.VDI](t)(xapi.GetAllRecordsWhere[xapi.VDI](t.Context(), c, "VDI", expr)); len(vdis) != 3 {
		t.Errorf("%d VDIs of the SR", len(vdis))
	}
}

func same[T any](t *testing.T, c *xapi.Client, class string, want int) {
	t.Helper()
	overJSON := must[map[xapi.Ref]T](t)(xapi.GetAllRecords[T](t.Context(), c, class))
	var overXML map[xapi.Ref]T
	if err := c.Call(t.Context(), &overXML, class+".get_all_records"); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(overJSON, overXML); d != "" || len(overJSON) != want {
		t.Errorf("%s: %d records, want %d:\n%s", class, len(overJSON), want, d)
	}
}

func TestLabControlCalls(t *testing.T) {
	p := newLabPool(t, 2)
	supporter := p.socket(t, p.Hosts[1])
	if host := must[xapi.Ref](t)(supporter.ThisHost(t.Context())); host != xapi.Ref(p.Hosts[1]) {
		t.Errorf("this host is %s, want the supporter %s", host, p.Hosts[1])
	}
	if host := must[xapi.Ref](t)(supporter.PoolMaster(t.Context())); host != xapi.Ref(p.Hosts[0]) {
		t.Errorf("coordinator is %s, want %s", host, p.Hosts[0])
	}
	sr := must[string](t)(p.db.Create("SR", map[string]any{"name_label": "XOSTOR", "type": "linstor"}))
	vdi := must[string](t)(p.db.Create("VDI", map[string]any{"SR": sr}))
	c := p.socket(t, p.Hosts[0])
	size, used := int64(1)<<50, int64(1)<<40
	if err := c.SRSetSizes(t.Context(), xapi.Ref(sr), xapi.SRSizes{PhysicalSize: &size, PhysicalUtilisation: &used, VirtualAllocation: &used}); err != nil {
		t.Fatal(err)
	}
	if err := c.VDISetPhysicalUtilisation(t.Context(), xapi.Ref(sr), xapi.Ref(vdi), used); err != nil {
		t.Fatal(err)
	}
	got := must[xapi.SR](t)(xapi.GetRecord[xapi.SR](t.Context(), c, "SR", xapi.Ref(sr)))
	if got.PhysicalSize != 1<<50 || got.PhysicalUtilisation != 1<<40 || got.VirtualAllocation != 1<<40 {
		t.Errorf("SR: %+v", got)
	}
	if err := c.Call(t.Context(), nil, "SR.set_physical_size", sr, size); !xapi.IsCode(err, "PERMISSION_DENIED") {
		t.Errorf("an ordinary session may write sizes: %v", err)
	}
	message := must[xapi.Ref](t)(c.MessageCreate(t.Context(), "XOSTOR", 3, "SR", got.UUID, "body <&>\n"))
	if list := must[map[xapi.Ref]xapi.Message](t)(c.MessagesOf(t.Context(), got.UUID)); list[message].Body != "body <&>\n" {
		t.Errorf("messages: %+v", list)
	}
	if err := c.MessageDestroy(t.Context(), message); err != nil {
		t.Error(err)
	}
	task := must[xapi.Ref](t)(c.TaskCreate(t.Context(), "label", "text"))
	for _, err := range []error{c.TaskSetProgress(t.Context(), task, 0.5), c.TaskSetStatus(t.Context(), task, "success"), c.TaskDestroy(t.Context(), task)} {
		if err != nil {
			t.Error(err)
		}
	}
	if err := c.Call(t.Context(), nil, "VM.get_record", "OpaqueRef:none"); !xapi.IsCode(err, "HANDLE_INVALID") {
		t.Errorf("unknown ref: %v", err)
	}
}

// labMirror keeps the last record of each object and tells whoever waits for a state of it.
type labMirror struct {
	mu    sync.Mutex
	all   map[string]map[xapi.Ref]json.RawMessage
	fresh bool
	news  chan struct{}
}

func (m *labMirror) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	close(m.news)
	m.news = make(chan struct{})
}

func (m *labMirror) Reset(class string, all map[xapi.Ref]json.RawMessage) {
	m.change(func() { m.all[class] = all })
}
func (m *labMirror) Apply(batch []xapi.Change) {
	m.change(func() {
		for _, c := range batch {
			if c.Op == xapi.Del {
				delete(m.all[c.Class], c.Ref)
			} else {
				m.all[c.Class][c.Ref] = c.Record
			}
		}
	})
}
func (m *labMirror) Stale(string) { m.change(func() { m.fresh = false }) }
func (m *labMirror) Fresh()       { m.change(func() { m.fresh = true }) }

func (m *labMirror) await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.NewTimer(30 * time.Second)
	defer late.Stop()
	for {
		m.mu.Lock()
		news, done := m.news, m.fresh && ok()
		m.mu.Unlock()
		if done {
			return
		}
		select {
		case <-news:
		case <-late.C:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func TestLabWatch(t *testing.T) {
	p := newLabPool(t, 2)
	c := p.socket(t, p.Hosts[0])
	m := &labMirror{all: map[string]map[xapi.Ref]json.RawMessage{}, news: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	classes := []string{"pool", "host", "host_metrics", "SR", "PBD", "VDI", "VBD", "VM", "PIF", "PIF_metrics", "network", "task"}
	go func() { ended <- xapi.Watch(ctx, c, xapi.WatchConfig{Classes: classes, Handler: m}) }()
	defer func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	have := func(class string, n int) func() bool { return func() bool { return len(m.all[class]) == n } }
	m.await(t, "first copy", have("vm", 2))

	sr := must[string](t)(p.db.Create("SR", map[string]any{"name_label": "XOSTOR", "type": "linstor"}))
	var vdis []string
	for range 60 {
		vdis = append(vdis, must[string](t)(p.db.Create("VDI", map[string]any{"SR": sr})))
	}
	m.await(t, "60 VDIs", have("vdi", 60))

	// More deletions at once than the database remembers.
	p.face.SetFault(p.Hosts[0], xapiface.Fault{Kind: xapiface.Refuse})
	for _, vdi := range vdis[:50] {
		if err := p.db.Destroy("VDI", vdi); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.face.ClearFaults(p.Hosts[0]); err != nil {
		t.Fatal(err)
	}
	m.await(t, "10 VDIs after lost deletions", have("vdi", 10))

	for _, fault := range []xapiface.FaultKind{xapiface.Reset, xapiface.HTML, xapiface.Truncate, xapiface.Fail} {
		p.face.SetFault(p.Hosts[0], xapiface.Fault{Kind: fault, Methods: []string{"event.from"}, Count: 1})
	}
	p.face.Restart()
	must[string](t)(p.db.Create("VDI", map[string]any{"SR": sr}))
	m.await(t, "11 VDIs after a restart and four faults", have("vdi", 11))
	m.await(t, "the SR with all its VDIs", func() bool {
		var r xapi.SR
		return json.Unmarshal(m.all["sr"][xapi.Ref(sr)], &r) == nil && len(r.VDIs) == 11
	})
}

func TestLabTCP(t *testing.T) {
	p := newLabPool(t, 1)
	e, err := p.face.ServeTCP("127.0.0.1:0", p.Hosts[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	c := p.client(t, xapi.Config{URL: "http://" + e.Addr(), Username: "root", Password: "secret"})
	if host := must[xapi.Ref](t)(c.ThisHost(t.Context())); host != xapi.Ref(p.Hosts[0]) {
		t.Errorf("this host is %s", host)
	}
}
