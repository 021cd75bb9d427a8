package failover

import (
	"archive/zip"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
	"github.com/xostor-agents/xostor-agents/systemd"
)

const goodRes = `# made by LINSTOR
resource "db" {
    options { quorum majority; }
    on "h1" { volume 0 { disk "/dev/linstor_group/db_00000"; device minor 1000; } node-id 0; }
    connection { host "h1" address ipv4 10.0.0.1:7000; host "h2" address ipv4 10.0.0.2:7000; }
}
`

func TestCheckRes(t *testing.T) {
	for text, want := range map[string]string{
		goodRes:                    "",
		"":                         "empty",
		" \n\t":                    "empty",
		strings.Repeat("\x00", 99): "zero bytes",
		goodRes[:120]:              "cut off",
		strings.Replace(goodRes, `"db"`, `"other"`, 1): "does not describe",
		"resource db {\n}\n":                           "no disk",
		"# resource db {\n" + goodRes:                  "",
	} {
		if got := CheckRes([]byte(text), "db"); want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%.40q: %q, want %q", text, got, want)
		}
	}
}

func FuzzCheckRes(f *testing.F) {
	f.Add([]byte(goodRes))
	f.Add([]byte("resource db {"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if CheckRes(text, "db") == "" && !strings.Contains(string(text), "db") {
			t.Error("a file without the name is valid")
		}
	})
}

// Every cut of a good file is noticed: that is what a power loss leaves.
func TestCheckRes_AnyCut(t *testing.T) {
	for n := range len(goodRes) - 2 {
		if CheckRes([]byte(goodRes[:n]), "db") == "" {
			t.Fatalf("cut at %d is taken for valid", n)
		}
	}
}

func TestResFileIsKeptAndRestored(t *testing.T) {
	dir := t.TempDir()
	f := &hostFiles{paths: Paths{ResDir: filepath.Join(dir, "res"), StateDir: filepath.Join(dir, "state")}, resource: "db", children: &child.Runner{}}
	write := func(text string) {
		t.Helper()
		if err := writeFile(f.resPath(), []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if got := f.ResFile(); !got.Known || got.Valid || got.Why != ResMissing {
		t.Errorf("no file: %+v", got)
	}
	write(goodRes)
	if got := f.ResFile(); !got.Valid || got.Saved {
		t.Errorf("new file: %+v", got)
	}
	if err := f.SaveRes(); err != nil {
		t.Fatal(err)
	}
	if got := f.ResFile(); !got.Valid || !got.Saved || !got.Copy {
		t.Errorf("saved file: %+v", got)
	}
	write("")
	if got := f.ResFile(); got.Valid || !got.Copy || got.Why != "empty" {
		t.Errorf("emptied file: %+v", got)
	}
	if err := f.SaveRes(); err == nil {
		t.Error("an empty file replaced the good copy")
	}
	if err := f.RestoreRes(); err != nil {
		t.Fatal(err)
	}
	if got := f.ResFile(); !got.Valid || !got.Saved {
		t.Errorf("restored file: %+v", got)
	}
}

func TestParseMounts(t *testing.T) {
	const table = `20 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 20 147:1000 / /var/lib/linstor rw,relatime - ext4 /dev/drbd1000 rw
31 20 147:1000 / /mnt/a\040b rw - ext4 /dev/drbd1000 rw
`
	tests := []struct {
		table, at, device string
		want              Mount
	}{
		{table, "/var/lib/linstor", "147:1000", Mount{Known: true, Ours: true, Elsewhere: []string{"/mnt/a b"}}},
		{table, "/var/lib/linstor", "147:7", Mount{Known: true, Foreign: true}},
		{table, "/elsewhere", "147:7", Mount{Known: true}},
		{strings.Replace(table, "drbd1000 rw\n31", "drbd1000 ro,errors=remount-ro\n31", 1), "/var/lib/linstor", "147:1000", Mount{Known: true, Ours: true, ReadOnly: true, Elsewhere: []string{"/mnt/a b"}}},
		{strings.Replace(table, "drbd1000 rw\n31", "drbd1000 rw,abort,emergency_ro\n31", 1), "/var/lib/linstor", "147:1000", Mount{Known: true, Ours: true, ReadOnly: true, Elsewhere: []string{"/mnt/a b"}}},
		{table + "40 30 0:50 / /var/lib/linstor rw - tmpfs tmpfs rw\n", "/var/lib/linstor", "147:1000", Mount{Known: true, Foreign: true, Elsewhere: []string{"/mnt/a b"}}},
		{"garbage\n\n1 2\n", "/x", "147:1", Mount{Known: true}},
	}
	for _, tt := range tests {
		if got := ParseMounts([]byte(tt.table), tt.at, tt.device); cmp.Diff(tt.want, got) != "" {
			t.Errorf("%s on %s: %s", tt.device, tt.at, cmp.Diff(tt.want, got))
		}
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add([]byte("30 20 147:1 / /m rw - ext4 /dev/drbd1 rw\n"))
	f.Add([]byte("30 20 147:1 / /m\\040 rw -\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if m := ParseMounts(text, "/m", "147:1"); m.Ours && m.Foreign {
			t.Error("ours and foreign at once")
		}
	})
}

func TestReactorConfigurations(t *testing.T) {
	const promoter = "[[promoter]]\nid = \"x\"\n[promoter.resources.db]\nstart = [\"linstor-controller.service\"]\n"
	tests := []struct {
		name          string
		main, snippet string
		want          drbd.Tri
	}{
		{"none", "", "", drbd.No},
		{"another resource", "", strings.Replace(promoter, "resources.db", "resources.other", 1), drbd.No},
		{"a snippet", "", promoter, drbd.Yes},
		{"the main file", promoter, "", drbd.Yes},
		{"unreadable: it might be in there", "[[[", "", drbd.Unknown},
		{"unreadable, but found elsewhere", "[[[", promoter, drbd.Yes},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			f := &hostFiles{paths: Paths{ReactorCfg: filepath.Join(dir, "main.toml"), ReactorDir: dir + "/d"}, resource: "db"}
			for path, text := range map[string]string{f.paths.ReactorCfg: tt.main, filepath.Join(f.paths.ReactorDir, "x.toml"): tt.snippet} {
				if text != "" {
					if err := writeFile(path, []byte(text)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if got := f.Reactor(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestChooseMode(t *testing.T) {
	base := func() Snapshot {
		return Snapshot{Options: drbd.Options{Quorum: "majority"}, Reactor: drbd.No, Res: &drbd.Resource{Connections: []drbd.Connection{{Name: "h1"}}}, Peers: []Peer{{Name: "h1", Reactor: drbd.No}}}
	}
	tests := []struct {
		name   string
		forced Mode
		bend   func(*Snapshot)
		want   Mode
	}{
		{"nobody has a reactor", "", func(*Snapshot) {}, Owner},
		{"here is one", "", func(s *Snapshot) { s.Reactor = drbd.Yes }, Guard},
		{"there is one", "", func(s *Snapshot) { s.Peers[0].Reactor = drbd.Yes }, Guard},
		{"a host has not said", "", func(s *Snapshot) { s.Peers[0].Reactor = drbd.Unknown }, Observe},
		{"a host was never heard", "", func(s *Snapshot) { s.Peers = nil }, Observe},
		{"unreadable here", "", func(s *Snapshot) { s.Reactor = drbd.Unknown }, Observe},
		{"quorum off", "", func(s *Snapshot) { s.Options.Quorum = "off" }, Observe},
		{"quorum off, owner configured", Owner, func(s *Snapshot) { s.Options.Quorum = "off" }, Observe},
		{"owner configured, a host silent", Owner, func(s *Snapshot) { s.Peers = nil }, Owner},
		{"owner configured, but a reactor promotes", Owner, func(s *Snapshot) { s.Peers[0].Reactor = drbd.Yes }, Guard},
		{"guard configured", Guard, func(*Snapshot) {}, Guard},
		{"options unknown", "", func(s *Snapshot) { s.Options = drbd.Options{} }, Observe},
	}
	for _, tt := range tests {
		s := base()
		tt.bend(&s)
		if got, why := chooseMode(tt.forced, &s); got != tt.want || why == "" {
			t.Errorf("%s: %s (%s), want %s", tt.name, got, why, tt.want)
		}
	}
}

func TestBeatsAreSealed(t *testing.T) {
	key := BeatKey([]byte("secret"))
	data, err := seal(key, packet{Epoch: 1, Seq: 2, Beat: Beat{Node: "h1", Owner: true}})
	if err != nil {
		t.Fatal(err)
	}
	if p, err := unseal(key, data); err != nil || p.Beat.Node != "h1" || !p.Beat.Owner || p.Seq != 2 {
		t.Errorf("own beat: %+v, %v", p, err)
	}
	for i := range data {
		bad := append([]byte(nil), data...)
		bad[i] ^= 1
		if _, err := unseal(key, bad); err == nil {
			t.Fatalf("a beat with byte %d changed was accepted", i)
		}
	}
	if _, err := unseal(BeatKey([]byte("other")), data); !errors.Is(err, errForged) {
		t.Errorf("another pool's key: %v", err)
	}
}

func FuzzUnseal(f *testing.F) {
	key := BeatKey([]byte("secret"))
	good, _ := seal(key, packet{Beat: Beat{Node: "h1"}})
	f.Add(good)
	f.Add([]byte("x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := unseal(key, data); err == nil {
			if again, err := seal(key, p); err != nil || len(again) == 0 {
				t.Error("an accepted beat cannot be sealed")
			}
		}
	})
}

// Replayed and reordered beats change nothing.
func TestNetwork_OldBeats(t *testing.T) {
	n := &network{view: func() drbd.View { return drbd.View{} }, changed: func() {}, save: func(map[string]string) error { return nil }, table: NewTable("h2", time.Second, nil), last: map[string]packet{}}
	from := netip.MustParseAddr("10.0.0.1")
	n.take(packet{Epoch: 5, Seq: 7, Beat: Beat{Node: "h1", JVM: JVMUp}}, from)
	for _, old := range []packet{{Epoch: 5, Seq: 6, Beat: Beat{Node: "h1", JVM: JVMDown}}, {Epoch: 4, Seq: 99, Beat: Beat{Node: "h1", JVM: JVMDown}}} {
		n.take(old, from)
	}
	peers, _ := n.Hear(time.Now())
	if len(peers) != 1 || peers[0].Says.JVM != JVMUp {
		t.Errorf("got %+v, want h1 with its newest beat", peers)
	}
}

// Time in which this host could not hear counts against nobody.
func TestTable_OwnFreezeIsNoSilence(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	tb := NewTable("h2", time.Second, nil)
	tb.Receive(at, Beat{Node: "h1"}, true)
	for range 4 {
		at = at.Add(BeatInterval)
		tb.Tick(at)
	}
	at = at.Add(10 * time.Second) // frozen
	if peers, _ := tb.Hear(at); at.Sub(peers[0].Heard) > time.Second {
		t.Error("a look before the first tick after our own freeze sees silence")
	}
	if tb.Tick(at); len(tb.Beat(at).Silent) != 0 {
		t.Error("a host is taken for silent after our own freeze")
	}
	for range 5 {
		at = at.Add(BeatInterval)
		tb.Tick(at)
	}
	if got := tb.Beat(at).Silent; len(got) != 1 || got[0] != "h1" {
		t.Errorf("silent: %v, want h1 after a second of listening", got)
	}
}

func zipDB(t *testing.T, size int) string {
	t.Helper()
	db := filepath.Join(t.TempDir(), "db")
	noise := make([]byte, size)
	for i, x := 0, uint32(1); i < size; i++ { // does not compress, so that sizes tell
		x = x*1664525 + 1013904223
		noise[i] = byte(x >> 24)
	}
	if err := os.WriteFile(db, noise, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := zipFile(db+".zip", db, "linstordb.mv.db"); err != nil {
		t.Fatal(err)
	}
	return db + ".zip"
}

func TestStore(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	s := &Store{Dir: filepath.Join(t.TempDir(), "b")}
	first, err := s.Take(zipDB(t, 10000), at, whyHourly)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Check(first); err != nil {
		t.Error(err)
	}
	if _, err := s.Take(zipDB(t, 1000), at.Add(time.Hour), whyHourly); !errors.Is(err, ErrBackupBad) {
		t.Errorf("a shrunken database: %v, want ErrBackupBad", err)
	}
	garbage := filepath.Join(t.TempDir(), "g.zip")
	if err := os.WriteFile(garbage, make([]byte, 20000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Take(garbage, at, whyHourly); !errors.Is(err, ErrBackupBad) {
		t.Errorf("garbage: %v, want ErrBackupBad", err)
	}
	empty := filepath.Join(t.TempDir(), "e.zip")
	f, err := os.Create(empty)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(zip.NewWriter(f).Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if err := VerifyZip(empty); !errors.Is(err, ErrBackupBad) {
		t.Errorf("a zip without database: %v", err)
	}
	if list, err := s.List(); err != nil || len(list) != 1 {
		t.Errorf("kept %d, %v; want the one good backup", len(list), err)
	}

	// Another host fetches it; a wrong key and a wrong name get nothing.
	key := BeatKey([]byte("k"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { s.Serve(l, func() [][]byte { return [][]byte{key} }); close(served) }()
	defer func() { _ = l.Close(); <-served }()
	other := &Store{Dir: filepath.Join(t.TempDir(), "o")}
	if err := other.Fetch(t.Context(), l.Addr().String(), key, first); err != nil {
		t.Fatal(err)
	}
	if err := other.Check(first); err != nil {
		t.Error(err)
	}
	third := &Store{Dir: filepath.Join(t.TempDir(), "t")}
	if err := third.Fetch(t.Context(), l.Addr().String(), BeatKey([]byte("wrong")), first); err == nil {
		t.Error("a stranger got a backup")
	}
	evil := first
	evil.Name = "../../etc/passwd"
	if err := third.Fetch(t.Context(), l.Addr().String(), key, evil); !errors.Is(err, ErrBackupBad) {
		t.Errorf("a name that leaves the folder: %v", err)
	}
	promised := first
	promised.SHA256 = strings.Repeat("0", 64)
	if err := third.Fetch(t.Context(), l.Addr().String(), key, promised); !errors.Is(err, ErrBackupBad) {
		t.Errorf("another checksum than promised: %v", err)
	}

	// Damage on disk is noticed.
	path := filepath.Join(s.Dir, first.Name)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(first); !errors.Is(err, ErrBackupBad) {
		t.Errorf("a flipped bit: %v", err)
	}
}

func TestPlanMove(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	base := func() Snapshot {
		return Snapshot{Policy: DefaultPolicy(), Self: "h2", Mode: Owner, Peers: []Peer{
			{Name: "h1", Heard: at, Says: Beat{Mode: Owner, Owner: true, Usable: true}},
			{Name: "h3", Heard: at, Says: Beat{Mode: Owner, Usable: true}},
			{Name: "h4", Heard: at.Add(-time.Minute), Says: Beat{Mode: Owner, Usable: true}},
			{Name: "h5", Heard: at, Says: Beat{Mode: Owner}}}}
	}
	tests := []struct {
		to   string
		bend func(*Snapshot)
		want string // target, or a part of the error
	}{
		{"h3", nil, "h3"}, {"", nil, "h3"}, {"h1", nil, "already"}, {"h4", nil, "does not answer"}, {"h5", nil, "up-to-date"}, {"h9", nil, "no host h9"},
		{"h3", func(s *Snapshot) { s.Mode = Guard; s.ModeWhy = "reactor" }, "drbd-reactorctl"},
		{"h3", func(s *Snapshot) { s.Peers[0].Says.Owner = false }, "no host owns"},
		{"h3", func(s *Snapshot) { s.Move = &Move{To: "h5", Age: time.Second} }, "has been going on"},
		{"", func(s *Snapshot) { s.Peers[1].Says.Usable = false }, "no other host"},
	}
	for _, tt := range tests {
		s := base()
		if tt.bend != nil {
			tt.bend(&s)
		}
		m, err := PlanMove(at, s, tt.to)
		if err != nil && !strings.Contains(err.Error(), tt.want) || err == nil && (m.To != tt.want || m.From != "h1" || m.ID == "") {
			t.Errorf("move to %q: %+v, %v; want %s", tt.to, m, err, tt.want)
		}
	}
}

func TestHolders_FindsAnOpenFile(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := hostMounts{major: MajorDRBD}.Holders(dir, 1)
	if len(got) != 1 || !strings.Contains(got[0], "file open") {
		t.Errorf("holders %v, want this process", got)
	}
}

func TestUnmount_NotMounted(t *testing.T) {
	err := hostMounts{children: &child.Runner{}}.Unmount(context.Background(), t.TempDir())
	if err == nil {
		t.Error("unmounting a plain directory succeeded")
	}
}

// Fixed ports for a test of what passes cost.
type fixedDRBD struct{ view drbd.View }

func (d fixedDRBD) View() drbd.View                                { return d.view }
func (d fixedDRBD) Status(context.Context) (*drbd.Resource, error) { return d.view.Resource, nil }
func (d fixedDRBD) Options() drbd.Options                          { return drbd.Options{Quorum: "majority"} }
func (d fixedDRBD) Primary(context.Context) error                  { return nil }
func (d fixedDRBD) Secondary(context.Context, bool) error          { return nil }
func (d fixedDRBD) Connect(context.Context, int) error             { return nil }
func (d fixedDRBD) Adjust(context.Context) error                   { return nil }

type fixedUnits struct{ Units }

func (fixedUnits) State(context.Context, string) (systemd.Unit, error) {
	return systemd.Unit{Load: "loaded", Active: "inactive"}, nil
}

type noProber struct{}

func (noProber) Health(int) Health { return Health{} }

// testAgent is an agent over this machine's own mount table and files, with fixed DRBD and systemd.
func testAgent(tb testing.TB) *Agent {
	tb.Helper()
	dir := tb.TempDir()
	table := NewTable("h2", time.Second, nil)
	net := &network{view: func() drbd.View { return drbd.View{} }, table: table}
	res := &drbd.Resource{Name: "db", Role: drbd.Secondary, Suspended: "no", MayPromote: drbd.No, Devices: []drbd.Device{{Minor: 1, Disk: drbd.UpToDate, Quorum: drbd.Yes}}}
	return New(Config{Self: "h2", Names: Names{Resource: "db", MountPoint: dir, Controller: "c.service", MountUnit: "m.service", Target: "t.target"}, Policy: DefaultPolicy(),
		DRBD: fixedDRBD{drbd.View{Fresh: true, Resource: res}}, Units: fixedUnits{}, Mounts: hostMounts{MajorDRBD, &child.Runner{}}, Prober: noProber{}, Talk: net,
		Files: &hostFiles{paths: Paths{ResDir: dir, StateDir: dir, ReactorCfg: dir + "/r.toml", ReactorDir: dir}, resource: "db", children: &child.Runner{}}})
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// Ten thousand passes leave no goroutine and no open file behind.
func TestAgent_DoesNotGrow(t *testing.T) {
	a := testAgent(t)
	if _, err := agents.Look(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range 10000 {
		if _, err := agents.Look(t.Context(), a); err != nil {
			t.Fatal(err)
		}
	}
	if g, f := runtime.NumGoroutine(), openFiles(t); g > goroutines || f > files {
		t.Errorf("goroutines %d -> %d, open files %d -> %d", goroutines, g, files, f)
	}
}

// Between the unmount and the end of the probes the folder below must stay as it is: the next mount would hide what was left in it.
func TestProbeDisk_LeavesNothingBelowTheMount(t *testing.T) {
	dir := t.TempDir()
	p := newProber("http://127.0.0.1:1", dir, &child.Runner{}, time.Minute, func() {})
	if err := p.probeDisk(t.Context()); err == nil {
		t.Error("a folder that is no mount point counts as healthy")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".xostor-probe"), nil, 0o600); err != nil { // as on a filesystem that was probed before
		t.Fatal(err)
	}
	if err := p.probeDisk(t.Context()); err != nil {
		t.Error(err)
	}
}

// What one pass costs without I/O to systemd: mount table, files, decision.
func BenchmarkPass(b *testing.B) {
	a := testAgent(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := agents.Look(b.Context(), a); err != nil {
			b.Fatal(err)
		}
	}
}
