package failover

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
)

// A clock that jumps neither stops the backups nor multiplies them.
func TestDue(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	taken := func(ages ...time.Duration) (list []Backup) {
		for _, a := range ages {
			list = append(list, Backup{Taken: now.Add(-a)})
		}
		return list
	}
	tests := []struct {
		name string
		have []Backup
		want bool
	}{
		{"none", nil, true},
		{"half an hour old", taken(30 * time.Minute), false},
		{"an hour old", taken(time.Hour), true},
		{"set back by a day: an old one before the jump", taken(-24*time.Hour, 3*time.Hour), true},
		{"set back by a day: one taken since", taken(-24*time.Hour, time.Minute), false},
		{"set back before all of them", taken(-24*time.Hour, -23*time.Hour), true},
		{"set forward by a day", taken(24 * time.Hour), true},
	}
	for _, tt := range tests {
		if got := due(now, tt.have); got != tt.want {
			t.Errorf("%s: due %t, want %t", tt.name, got, tt.want)
		}
	}
}

// An agent that starts after the clock was set back is heard all the same.
func TestEpoch_ClockSetBack(t *testing.T) {
	f := &hostFiles{paths: Paths{StateDir: t.TempDir()}}
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	last := int64(0)
	for _, at := range []time.Time{now, now.Add(time.Second), now.Add(-time.Hour), now.Add(-time.Hour), now.Add(time.Hour)} {
		e, err := f.nextEpoch(at)
		if err != nil || e <= last {
			t.Errorf("at %s: epoch %d after %d, %v", at, e, last, err)
		}
		last = e
	}
	if err := os.WriteFile(filepath.Join(f.paths.StateDir, "epoch"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if e, err := f.nextEpoch(now); err != nil || e != now.UnixNano() {
		t.Errorf("after garbage: %d, %v", e, err)
	}
	f.paths.StateDir = "/dev/null/state" // cannot be written
	if e, err := f.nextEpoch(now); err == nil || e != now.UnixNano() {
		t.Errorf("unwritable: %d, %v; want the clock's and an error", e, err)
	}
}

// All times that are remembered are monotonic, so that no jump of the wall clock shortens or lengthens a wait.
func TestMemory_IsMonotonic(t *testing.T) {
	a := testAgent(t)
	res := a.c.DRBD.View().Resource
	res.Role, res.Devices[0].Quorum, res.MayPromote = drbd.Primary, drbd.No, drbd.Yes
	if _, err := a.Observe(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.asked("x", nil)
	for what, at := range map[string]time.Time{"NoQuorum": a.memory.NoQuorum, "MayPromote": a.memory.MayPromote, "Asked": a.memory.Asked["x"].Last} {
		if at.IsZero() || !strings.Contains(at.String(), " m=") { // the documented mark of a monotonic reading
			t.Errorf("%s is %s: not monotonic", what, at)
		}
	}
}

type testKeeper struct {
	*keeper
	changes chan struct{}
	db      string
}

func newTestKeeper(t *testing.T) testKeeper {
	t.Helper()
	dir := t.TempDir()
	k := testKeeper{changes: make(chan struct{}, 16), db: filepath.Join(dir, "mnt", "linstordb.mv.db")}
	k.keeper = &keeper{store: &Store{Dir: filepath.Join(dir, "state", "backups")}, names: Names{MountPoint: filepath.Join(dir, "mnt")}, state: filepath.Join(dir, "state"), jars: filepath.Join(dir, "*.jar"),
		children: &child.Runner{}, changed: func() { k.changes <- struct{}{} }, log: slog.New(slog.DiscardHandler)}
	for _, d := range []string{k.names.MountPoint, k.state} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k.install(t, "1")
	ctx, cancel := context.WithCancel(t.Context())
	k.begin(ctx)
	t.Cleanup(func() { cancel(); k.work.Wait() })
	return k
}

// install puts a controller of another version in place.
func (k testKeeper) install(t *testing.T, version string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(filepath.Dir(k.jars), "controller.jar"), []byte(strings.Repeat("x", len(version))), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The database is kept before another version opens it, once, and whoever asks is never kept waiting.
func TestPrepared(t *testing.T) {
	k := newTestKeeper(t)
	if !k.prepared() {
		t.Error("the first controller ever is not to wait")
	}
	k.work.Wait()
	if err := os.WriteFile(k.db, []byte("the database"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !k.prepared() {
		t.Error("the same version is to wait")
	}
	k.install(t, "22")
	if k.prepared() {
		t.Error("another version opens the database before it is copied")
	}
	<-k.changes
	if !k.prepared() {
		t.Error("not prepared although the copy is made")
	}
	k.work.Wait()
	if list, err := k.store.List(); err != nil || len(list) != 1 || list[0].Why != whyVersion || k.store.Check(list[0]) != nil {
		t.Errorf("kept %+v, %v; want one good backup of the old version", list, err)
	}
	if text, err := os.ReadFile(k.record()); err != nil || string(text) != k.installed() {
		t.Errorf("the version is not noted: %v", err)
	}
}

// A copy that hangs is ended by the unmount that a release needs, and is tried again later.
func TestPrepared_ReleaseEndsTheCopy(t *testing.T) {
	k := newTestKeeper(t)
	k.prepared()
	k.work.Wait()
	if err := syscall.Mkfifo(k.db, 0o600); err != nil { // who reads it waits for a writer
		t.Fatal(err)
	}
	k.install(t, "22")
	if first, second := k.prepared(), k.prepared(); first || second {
		t.Error("prepared while the copy runs")
	}
	for len(k.changes) == 0 { // the child may not have started yet
		err := hostMounts{children: k.children}.Unmount(t.Context(), k.names.MountPoint)
		if err == nil {
			t.Fatal("a plain directory was unmounted")
		}
	}
	k.work.Wait()
	if k.Trouble() == "" || k.tried != "" {
		t.Errorf("trouble %q, tried %q; want the next start to try again", k.Trouble(), k.tried)
	}
}

// A copy that fails is told, and stops nobody from starting.
func TestPrepared_CopyFails(t *testing.T) {
	k := newTestKeeper(t)
	k.prepared()
	k.work.Wait()
	k.install(t, "22") // and there is no database
	if k.prepared() {
		t.Error("prepared before the copy was tried")
	}
	<-k.changes
	k.work.Wait()
	if !k.prepared() || !strings.Contains(k.Trouble(), "linstordb") {
		t.Errorf("trouble %q", k.Trouble())
	}
}

// What killed agents left of backups disappears, what is being written stays.
func TestStore_PruneRemovesParts(t *testing.T) {
	s := &Store{Dir: t.TempDir()}
	now := time.Now()
	for name, age := range map[string]time.Duration{".incoming-old": 2 * time.Hour, ".incoming-new": 0} {
		path := filepath.Join(s.Dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, now.Add(-age), now.Add(-age))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Prune(now); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(s.Dir, ".incoming-*"))
	if len(left) != 1 || filepath.Base(left[0]) != ".incoming-new" {
		t.Errorf("left: %v", left)
	}
}
