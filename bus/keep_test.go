package bus

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// keeps waits until every bus given says that the history has the copies that are wanted.
func (p *testPool) keeps(want string, hosts ...Host) {
	p.t.Helper()
	for _, h := range hosts {
		eventually(p.t, patience, h.UUID+" says that the history has "+want, func() bool {
			b := p.nodes[h.UUID]
			b.poke()
			return b.Condition().History == want && b.HistoryPaused() == ""
		})
	}
}

func publishEvent(t testing.TB, c *Conn, id string) {
	t.Helper()
	if err := PublishEvent(c, Event{ID: id, Source: "/test", Type: "t", Subject: subject.XAPI("vdi", "u"), Data: []byte(`{}`)}); err != nil {
		t.Fatal(err)
	}
}

// has reports whether the history on c can be read and has the ids, in any order.
func has(t testing.TB, c *Conn, want ...string) bool {
	var got []string
	err := Replay(t.Context(), c, time.Now().Add(-time.Hour), "", func(e Event) error {
		got = append(got, e.ID)
		return nil
	})
	return err == nil && !slices.ContainsFunc(want, func(id string) bool { return !slices.Contains(got, id) })
}

func told(t testing.TB, c *Conn, want ...string) {
	t.Helper()
	eventually(t, patience, fmt.Sprint("the history has ", want), func() bool { return has(t, c, want...) })
}

// keepsNew waits until an event published on from is told on to. What is published while the history's hosts elect a leader is heard live and not kept, and
// they elect one whenever hosts come and go, so it is published until it is kept.
func keepsNew(t testing.TB, from, to *Conn, id string) {
	t.Helper()
	eventually(t, patience, "the history keeps "+id, func() bool {
		publishEvent(t, from, id)
		return has(t, to, id)
	})
}

// copied waits until each of the hosts has an event in its own copy. A host that goes before that comes back with an empty copy, whose vote the server does
// not count: a majority that is to survive a loss must hold the events.
func (p *testPool) copied(hosts ...Host) {
	p.t.Helper()
	for _, h := range hosts {
		eventually(p.t, patience, h.UUID+" has the history in its own copy", func() bool {
			info, err := p.nodes[h.UUID].current().Jsz(nil)
			return err == nil && info.Messages > 0
		})
	}
}

func TestClusterHistory_ThreeCopiesAndAHostThatLeavesIsTakenOut(t *testing.T) {
	p := newTestPool(t, 4)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	p.keeps("3 copies", h...)
	keepsNew(t, p.conn(h[0]), p.conn(h[1]), "one")
	for _, host := range h {
		told(t, p.conn(host), "one")
	}

	gone := h[3]
	if err := p.nodes[gone.UUID].Close(); err != nil {
		t.Error(err)
	}
	delete(p.nodes, gone.UUID)
	p.pool.Hosts = h[:3]
	for _, b := range p.nodes {
		b.SetPool(p.pool)
	}
	eventually(t, patience, "the group has three hosts", func() bool {
		b := p.nodes[h[0].UUID]
		for _, n := range p.nodes {
			n.poke()
		}
		info, err := b.current().Jsz(nil)
		return err == nil && info.Meta != nil && info.Meta.Size == 3
	})
	p.keeps("3 copies", h[:3]...)
	keepsNew(t, p.conn(h[1]), p.conn(h[2]), "two")
	told(t, p.conn(h[2]), "one", "two")
}

func TestClusterHistory_IsPausedWithoutAMajorityAndLiveGoesOn(t *testing.T) {
	p := newTestPool(t, 3)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	p.keeps("3 copies", h...)
	keepsNew(t, p.conn(h[0]), p.conn(h[0]), "before")
	p.copied(h...)

	for _, dead := range h[1:] {
		if err := p.nodes[dead.UUID].Close(); err != nil {
			t.Error(err)
		}
		delete(p.nodes, dead.UUID)
	}
	b := p.nodes[h[0].UUID]
	eventually(t, patience, "the history is said to be paused", func() bool {
		b.mu.Lock()
		b.pausedAt = time.Now().Add(-pausedAfter) // As if half a minute had passed since the first doubt; a look that still sees the old leader forgets it.
		b.mu.Unlock()
		b.poke()
		return slices.ContainsFunc(b.Condition().Problems, func(x Problem) bool { return x.Code == "history-paused" })
	})
	ear := p.listen(h[0], string(subject.XAPI("vdi", "u")))
	c := p.conn(h[0])
	ear.hears(t, c, string(subject.XAPI("vdi", "u")), "live")
	if err := Replay(t.Context(), c, time.Now().Add(-time.Hour), "", func(Event) error { return nil }); !errors.Is(err, ErrHistoryPaused) {
		t.Errorf("replay: %v, want %v", err, ErrHistoryPaused)
	}

	p.start(h[1], nil)
	p.keeps("3 copies", h[:2]...)
	told(t, p.conn(h[1]), "before")
}

func TestClusterHistory_TwoHostsHaveOneCopyAndAThirdMakesItThree(t *testing.T) {
	p := newTestPool(t, 2)
	p.startAll(nil)
	p.meshed(p.pool.Hosts...)
	p.keeps("one copy", p.pool.Hosts...)
	eventually(t, patience, "the stream is there", func() bool {
		b := p.nodes[p.pool.Hosts[0].UUID]
		b.poke()
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.replicas == 1
	})
	keepsNew(t, p.conn(p.pool.Hosts[0]), p.conn(p.pool.Hosts[1]), "of two")
	third := testHost(2)
	p.pool.Hosts = append(p.pool.Hosts, third)
	p.join(third)
	p.meshed(p.pool.Hosts...)
	p.keeps("3 copies", p.pool.Hosts...)
	told(t, p.conn(third), "of two")
}

func TestClusterHistory_CloseEndsInTimeAndACorruptStoreIsMovedAside(t *testing.T) {
	p := newTestPool(t, 3)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	p.keeps("3 copies", h...)
	keepsNew(t, p.conn(h[0]), p.conn(h[1]), "one")
	p.copied(h...)

	victim := p.nodes[h[2].UUID]
	began := time.Now()
	if err := victim.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("closed after %s", time.Since(began).Round(time.Millisecond))
	store := filepath.Join(p.dir, h[2].UUID, poolPrefix+p.pool.UUID, storeFolder)
	damage(t, store)
	b := p.start(h[2], nil)
	p.meshed(h...)
	p.keeps("3 copies", h...)
	keepsNew(t, p.conn(h[2]), p.conn(h[2]), "two")
	told(t, p.conn(h[2]), "one", "two")
	if c := b.Condition(); len(c.Problems) > 0 {
		t.Errorf("problems %+v", c.Problems)
	}
}

// damage overwrites the middle of each file of a store.
func damage(t *testing.T, dir string) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i := len(raw) / 3; i < len(raw)*2/3; i++ {
			raw[i] ^= 0x5a
		}
		n++
		return os.WriteFile(path, raw, 0o600)
	})
	if err != nil || n == 0 {
		t.Fatalf("%d files damaged, %v", n, err)
	}
}

// TestClusterHistory_FullDiskOfOneHost fills a small file system of its own under one host's copy, which needs root.
func TestClusterHistory_FullDiskOfOneHost(t *testing.T) {
	p := newTestPool(t, 3)
	h := p.pool.Hosts
	small := filepath.Join(p.dir, h[2].UUID)
	smallDisk(t, small)
	p.startAll(nil)
	p.meshed(h...)
	p.keeps("3 copies", h...)
	keepsNew(t, p.conn(h[0]), p.conn(h[1]), "one")
	p.copied(h[:2]...)

	body := []byte(`"` + strings.Repeat("x", 50<<10) + `"`)
	c := p.conn(h[0])
	ear := p.listen(h[2], "live")
	eventually(t, patience, "the host whose disk is full says so", func() bool {
		for range 10 {
			if err := PublishEvent(c, Event{ID: "filler", Source: "/test", Type: "t", Subject: subject.XAPI("vdi", "u"), Data: body}); err != nil {
				t.Fatal(err)
			}
		}
		return slices.ContainsFunc(p.nodes[h[2].UUID].Condition().Problems, func(x Problem) bool { return x.Code == "history-off" })
	})
	eventually(t, patience, "the reason shows the free space", func() bool { // The server's word comes a moment after the deed.
		return strings.Contains(p.nodes[h[2].UUID].HistoryOff(), "MiB free in "+small)
	})
	ear.hears(t, c, "live", "heard on the host with the full disk")
	p.keeps("3 copies", h[:2]...)
	keepsNew(t, p.conn(h[1]), p.conn(h[0]), "two")
	told(t, p.conn(h[0]), "one", "two")
}

// smallDisk mounts a file system of 2 MiB on dir.
func smallDisk(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
			t.Fatalf("mount a small file system: %v", err)
		}
		t.Skipf("mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}
