package bus_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
)

func publish(t testing.TB, c *bus.Conn, s bus.Subject, id string, body []byte) {
	t.Helper()
	if err := bus.PublishEvent(c, bus.Event{ID: id, Source: "/test", Type: "t", Subject: s, Data: body}); err != nil {
		t.Fatal(err)
	}
}

// replayed reads the ids in the history until want of them are there: the server stores after it answered.
func replayed(t testing.TB, c *bus.Conn, since time.Time, pattern bus.Subject, want int) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		var ids []string
		if err := bus.Replay(ctx, c, since, pattern, func(e bus.Event) error {
			ids = append(ids, e.ID)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if len(ids) >= want {
			return ids
		}
	}
}

func TestHistoryIsReplayedAndSurvivesARestart(t *testing.T) {
	dir := t.TempDir()
	withStore := func(o *bus.Options) { o.StoreDir = dir }
	began := time.Now().Add(-time.Minute)
	b, o := startBus(t, withStore)
	c := dial(t, o, "a")
	for i := range 3 {
		publish(t, c, subject.XAPI("vdi", "u"), fmt.Sprint("x", i), []byte(`{}`))
	}
	publish(t, c, subject.Agent("gc", "h", "finding"), "f", []byte(`{}`))
	if got := fmt.Sprint(replayed(t, c, began, "", 4)); got != "[x0 x1 x2 f]" {
		t.Errorf("history: %s", got)
	}
	if got := fmt.Sprint(replayed(t, c, began, subject.Agent("*", "*", "finding"), 1)); got != "[f]" {
		t.Errorf("findings in the history: %s", got)
	}
	if got := replayed(t, c, time.Now().Add(time.Minute), "", 0); len(got) != 0 {
		t.Errorf("history of the future: %v", got)
	}
	enough := errors.New("enough")
	if err := bus.Replay(t.Context(), c, began, "", func(bus.Event) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("replay that was stopped: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, o = startBus(t, withStore)
	if got := fmt.Sprint(replayed(t, dial(t, o, "b"), began, "", 4)); got != "[x0 x1 x2 f]" {
		t.Errorf("history after a restart: %s", got)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	_, o := startBus(t, func(o *bus.Options) {
		o.StoreDir = t.TempDir()
		o.History = bus.HistoryLimits{MaxBytes: 1 << 20}
	})
	c := dial(t, o, "a")
	body := []byte(`"` + strings.Repeat("x", 10<<10) + `"`)
	const messages = 300
	for i := range messages {
		publish(t, c, subject.XAPI("vdi", "u"), fmt.Sprint(i), body)
	}
	ids := replayed(t, c, time.Now().Add(-time.Hour), "", 1)
	for ids[len(ids)-1] != fmt.Sprint(messages-1) {
		ids = replayed(t, c, time.Now().Add(-time.Hour), "", 1)
	}
	if len(ids) > 105 {
		t.Errorf("%d messages of 10 KiB are kept in 1 MiB", len(ids))
	}
}

func TestNoHistory(t *testing.T) {
	b, o := startBus(t, nil)
	if b.HistoryOff() == "" {
		t.Error("a bus without store folder does not say that it has no history")
	}
	if err := bus.Replay(t.Context(), dial(t, o, "a"), time.Now(), "", nil); !errors.Is(err, bus.ErrNoHistory) {
		t.Errorf("replay: %v", err)
	}
}

// fill makes a store with history in it and returns its folder.
func fill(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	b, o := startBus(t, func(o *bus.Options) { o.StoreDir = dir })
	c := dial(t, o, "a")
	for i := range 20 {
		publish(t, c, subject.XAPI("vdi", "u"), fmt.Sprint(i), []byte(`{}`))
	}
	replayed(t, c, time.Now().Add(-time.Hour), "", 20)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestBrokenHistoryNeverStopsTheBus: whatever is in the store folder, the bus starts and keeps new history.
func TestBrokenHistoryNeverStopsTheBus(t *testing.T) {
	overwrite := func(match string, with []byte) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			n := 0
			err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() || !strings.Contains(path, match) {
					return err
				}
				n++
				return os.WriteFile(path, with, 0o600)
			})
			if err != nil || n == 0 {
				t.Fatalf("%d files changed: %v", n, err)
			}
		}
	}
	for name, damage := range map[string]func(t *testing.T, dir string){
		"meta files are garbage":  overwrite("meta.", []byte("garbage")),
		"meta files are empty":    overwrite("meta.", nil),
		"message blocks garbage":  overwrite(".blk", []byte(strings.Repeat("\xff\x00garbage", 1000))),
		"everything is garbage":   overwrite("", []byte("\x00\x01\x02")),
		"the folder is a file":    func(t *testing.T, dir string) { fileInstead(t, filepath.Join(dir, "jetstream")) },
		"the server died at this": func(t *testing.T, dir string) { marker(t, dir, "2") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := fill(t)
			damage(t, dir)
			b, o := startBus(t, func(o *bus.Options) { o.StoreDir = dir })
			if why := b.HistoryOff(); why != "" {
				t.Fatalf("no history: %s", why)
			}
			c := dial(t, o, "a")
			publish(t, c, subject.XAPI("vdi", "u"), "new", []byte(`{}`))
			ids := replayed(t, c, time.Now().Add(-time.Hour), "", 1)
			for ids[len(ids)-1] != "new" {
				ids = replayed(t, c, time.Now().Add(-time.Hour), "", 1)
			}
		})
	}
}

func fileInstead(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func marker(t *testing.T, dir, tries string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "opening"), []byte(tries), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestHistoryThatKilledTheServerIsMovedAside(t *testing.T) {
	dir := fill(t)
	marker(t, dir, "2")
	startBus(t, func(o *bus.Options) { o.StoreDir = dir })
	aside, err := filepath.Glob(filepath.Join(dir, "jetstream.broken-*"))
	if err != nil || len(aside) != 1 {
		t.Fatalf("moved aside: %v, %v", aside, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "opening")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the mark of an opening that ended well is still there: %v", err)
	}
}

func TestStoreFolderThatCannotBeMadeLeavesTheLivePath(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b, o := startBus(t, func(o *bus.Options) { o.StoreDir = filepath.Join(file, "store") })
	if b.HistoryOff() == "" {
		t.Error("history in a folder that cannot be")
	}
	dial(t, o, "a")
}

// TestFullDiskUnderTheHistoryLeavesTheLivePath fills a small file system of its own, which needs root.
func TestFullDiskUnderTheHistoryLeavesTheLivePath(t *testing.T) {
	dir := t.TempDir()
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
	b, o := startBus(t, func(o *bus.Options) { o.StoreDir = dir })
	a, c := dial(t, o, "a"), dial(t, o, "c")
	heard := make(chan bus.Event, 1)
	stop, err := bus.SubscribeEvents(c, "xostor.v1.>", func(e bus.Event) { heard <- e }, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	body := []byte(`"` + strings.Repeat("x", 50<<10) + `"`)
	for i := range 200 { // Five times what the disk holds.
		publish(t, a, subject.XAPI("vdi", "u"), fmt.Sprint(i), body)
		if e := <-heard; e.ID != fmt.Sprint(i) {
			t.Fatalf("heard %s, not %d", e.ID, i)
		}
	}
	for i := 0; !strings.Contains(b.HistoryOff(), "MiB free in "+dir); i++ { // The server stores after it delivered, and gives its reason after that.
		publish(t, a, subject.XAPI("vdi", "u"), fmt.Sprint(i), body)
		<-heard
	}
}
