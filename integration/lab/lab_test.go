package lab_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

const gib = int64(1) << 30

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newPool(t testing.TB, o lab.Options) *lab.Pool {
	t.Helper()
	if o.Clock == nil {
		o.Clock = lab.NewManual(start)
	}
	p, err := lab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close pool: %v", err)
		}
	})
	return p
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The worked examples of reference/xostor-sm.md 3.5.
func TestVolumeBytes(t *testing.T) {
	for virtual, want := range map[int64]int64{
		4 << 20: 8_531_968, gib: 1_080_168_448, 10 * gib: 10_762_719_232, 100 * gib: 107_588_227_072, 1 << 40: 1_101_663_440_896, 2040 * gib: 2_194_715_840_512,
	} {
		if got := lab.VolumeBytes(virtual); got != want {
			t.Errorf("VolumeBytes(%d) = %d, want %d", virtual, got, want)
		}
	}
}

func TestOptionsThatMakeNoSense(t *testing.T) {
	for _, o := range []lab.Options{{Hosts: 2, Redundancy: 3}, {Hosts: 1, Redundancy: -1}} {
		if _, err := lab.New(o); err == nil {
			t.Errorf("New(%+v) succeeded", o)
		}
	}
}

// CreateDisk leaves what SM leaves: the KV entry of an existing volume, a resource of the right size with three peer slots and enough replicas, and a VDI row.
func TestCreateDiskEffects(t *testing.T) {
	p := newPool(t, lab.Options{})
	vdi := must[string](t)(p.CreateDisk(10 * gib))
	kv, _ := p.LINSTOR().KVGet(p.Group())
	resource := kv.Props["xcp/volume/"+vdi+"/volume-name"]
	if got := kv.Props["xcp/volume/"+vdi+"/not-exists"]; got != "0" {
		t.Errorf("not-exists = %q, want 0", got)
	}
	var meta map[string]any
	ok(t, json.Unmarshal([]byte(kv.Props["xcp/volume/"+vdi+"/metadata"]), &meta))
	if meta["vdi_type"] != "vhd" || meta["type"] != "user" {
		t.Errorf("metadata = %v", meta)
	}
	if !strings.HasPrefix(resource, "xcp-volume-") || resource != p.Resource(vdi) {
		t.Errorf("volume-name = %q, Resource = %q", resource, p.Resource(vdi))
	}
	rds := p.LINSTOR().Definitions([]string{resource}, nil, true)
	if len(rds) != 1 || rds[0].VolumeDefinitions[0].SizeKiB != 10_762_719_232/1024 || rds[0].ResourceGroupName != p.Group() {
		t.Fatalf("definition = %+v", rds)
	}
	if got := rds[0].LayerData[0].Data.PeerSlots; got != 3 {
		t.Errorf("peer slots = %d, want 3", got)
	}
	diskful := 0
	for _, r := range p.LINSTOR().Resources(linstorsim.ResourceFilter{Names: []string{resource}}) {
		if len(r.Flags) == 0 {
			diskful++
		}
	}
	if diskful != 2 {
		t.Errorf("%d diskful replicas, want 2", diskful)
	}
	ref := must[string](t)(p.DB().ByUUID("VDI", vdi))
	row := must[xapidb.Record](t)(p.DB().Record("VDI", ref))
	if row.Get("location") != vdi || row.Get("managed") != true || row.Get("virtual_size") != 10*gib || row.Get("physical_utilisation").(int64) < 4<<20 {
		t.Errorf("VDI row = %v", row.Map())
	}
	if p.Shown(p.SR()) != p.Truth(p.SR()) {
		t.Errorf("XAPI shows %v, the truth is %v", p.Shown(p.SR()), p.Truth(p.SR()))
	}
}

func TestThickDiskTakesItsSizeAtOnce(t *testing.T) {
	p := newPool(t, lab.Options{Thick: true})
	before := p.Truth(p.SR()).Utilisation
	vdi := must[string](t)(p.CreateDisk(10 * gib))
	if got := p.Truth(p.SR()).Utilisation - before; got < 10*gib {
		t.Errorf("a thick disk of 10 GiB took %d bytes", got)
	}
	ok(t, p.ResizeDisk(vdi, 20*gib))
	if got := p.Truth(p.SR()).Utilisation - before; got < 20*gib {
		t.Errorf("a thick disk of 20 GiB took %d bytes", got)
	}
	if !p.True() {
		t.Errorf("XAPI shows %v, the truth is %v", p.Shown(p.SR()), p.Truth(p.SR()))
	}
}

// A guest's write is known to the satellites only; a scan brings it to XAPI.
func TestWriteShowsAfterScanOnly(t *testing.T) {
	p := newPool(t, lab.Options{})
	vdi := must[string](t)(p.CreateDisk(10 * gib))
	shown := p.Shown(p.SR())
	ok(t, p.WriteDisk(vdi, gib))
	if p.Shown(p.SR()) != shown {
		t.Error("XAPI heard of a write by itself")
	}
	if grew := p.Truth(p.SR()).Utilisation - shown.Utilisation; grew < gib || grew > gib+gib/100 {
		t.Errorf("the truth grew by %d, want 1 GiB and its bitmaps", grew)
	}
	if wrong := p.WrongVDIs(); len(wrong) != 1 || wrong[0] != vdi {
		t.Errorf("wrong VDIs = %v", wrong)
	}
	ok(t, p.SRScan())
	if !p.True() {
		t.Errorf("after a scan XAPI shows %v, the truth is %v", p.Shown(p.SR()), p.Truth(p.SR()))
	}
}

// SM's defect: with a node away its pool drops out of minimum and count, so the SR seems to shrink.
func TestScanShrinksWhileANodeIsAway(t *testing.T) {
	p := newPool(t, lab.Options{Hosts: 3, Redundancy: 2})
	must[string](t)(p.CreateDisk(10 * gib))
	truth := p.Truth(p.SR())
	p.HostDown("xcp3")
	ok(t, p.SRScan())
	if got, want := p.Shown(p.SR()).Physical, truth.Physical*2/3; got != want {
		t.Errorf("physical size while a node is away = %d, want the defect's %d", got, want)
	}
	if p.Truth(p.SR()) != truth {
		t.Errorf("the truth changed to %v with a host that is off", p.Truth(p.SR()))
	}
	ok(t, p.HostUp("xcp3"))
	ok(t, p.SRScan())
	if !p.True() {
		t.Errorf("after its return XAPI shows %v, the truth is %v", p.Shown(p.SR()), p.Truth(p.SR()))
	}
}

func TestNegativeSizeFailsTheScan(t *testing.T) {
	p := newPool(t, lab.Options{})
	vdi := must[string](t)(p.CreateDisk(gib))
	shown := p.Shown(p.SR())
	ok(t, p.NegativeSize(vdi))
	if err := p.SRScan(); err == nil || !strings.Contains(err.Error(), "negative") {
		t.Errorf("scan = %v, want a failure about the negative size", err)
	}
	if p.Shown(p.SR()) != shown || p.Truth(p.SR()) != shown {
		t.Error("numbers changed")
	}
	ok(t, p.RightSize(vdi))
	ok(t, p.SRScan())
}

func TestSnapshot(t *testing.T) {
	p := newPool(t, lab.Options{})
	vdi := must[string](t)(p.CreateDisk(10 * gib))
	ok(t, p.WriteDisk(vdi, gib))
	vm := must[string](t)(p.CreateVM("guest", vdi))
	ok(t, p.StartVM(vm, "xcp2"))
	data := p.Resource(vdi)
	snap := must[string](t)(p.SnapshotDisk(vdi))

	var base xapidb.Record
	for _, r := range p.DB().Records("VDI") {
		if r.Get("managed") == false {
			base = r
		}
	}
	baseUUID := base.Get("uuid").(string)
	if p.Resource(baseUUID) != data || p.Resource(vdi) == data || p.Resource(snap) == data {
		t.Error("the data must stay in the base's resource")
	}
	if base.Get("physical_utilisation").(int64) < gib || base.Get("read_only") != true {
		t.Errorf("base = %v", base.Map())
	}
	ref := must[string](t)(p.DB().ByUUID("VDI", snap))
	if !xapidb.Value[bool](p.DB(), "VDI", ref, "is_a_snapshot") {
		t.Error("the snapshot is not marked as one")
	}
	if got := xapidb.Value[map[string]string](p.DB(), "VDI", ref, "sm_config")["vhd-parent"]; got != baseUUID {
		t.Errorf("vhd-parent = %q, want the base", got)
	}
	if use := usedOn(p, p.Resource(vdi)); use != "xcp2" {
		t.Errorf("the new leaf is in use on %q, want xcp2", use)
	}
	ok(t, p.SRScan())
	if got := p.Truth(p.SR()).Virtual; got != 20*gib || !p.True() {
		t.Errorf("virtual allocation = %d, want disk and snapshot; shown %v, true %v", got, p.Shown(p.SR()), p.Truth(p.SR()))
	}
	if err := p.DeleteDisk(baseUUID); err == nil {
		t.Error("deleted a base that has children")
	}
}

func usedOn(p *lab.Pool, resource string) string {
	for _, r := range p.LINSTOR().Resources(linstorsim.ResourceFilter{Names: []string{resource}}) {
		if r.State != nil && r.State.InUse != nil && *r.State.InUse {
			return r.NodeName
		}
	}
	return ""
}

// A thin disk's volume grows at the attach after a resize, and the sizes are pushed then.
func TestResizeThinGrowsAtAttach(t *testing.T) {
	p := newPool(t, lab.Options{})
	vdi := must[string](t)(p.CreateDisk(10 * gib))
	ok(t, p.ResizeDisk(vdi, 20*gib))
	size := func() int64 {
		return p.LINSTOR().Definitions([]string{p.Resource(vdi)}, nil, true)[0].VolumeDefinitions[0].SizeKiB << 10
	}
	if got := size(); got != lab.VolumeBytes(10*gib) {
		t.Errorf("volume after resize = %d, want unchanged", got)
	}
	vm := must[string](t)(p.CreateVM("guest", vdi))
	ok(t, p.StartVM(vm, "xcp1"))
	if got := size(); got != lab.VolumeBytes(20*gib) {
		t.Errorf("volume after attach = %d, want %d", got, lab.VolumeBytes(20*gib))
	}
	kv, _ := p.LINSTOR().KVGet(p.Group())
	for k := range kv.Props {
		if strings.Contains(k, "/journal/") {
			t.Errorf("journal %s was left", k)
		}
	}
	var xe *xapidb.Error
	if err := p.ResizeDisk(vdi, 30*gib); !errors.As(err, &xe) || xe.Code != "VDI_IN_USE" {
		t.Errorf("resize in use = %v, want VDI_IN_USE", err)
	}
}

func TestVMLife(t *testing.T) {
	p := newPool(t, lab.Options{Hosts: 3})
	vdi := must[string](t)(p.CreateDisk(gib))
	vm := must[string](t)(p.CreateVM("guest", vdi))
	ok(t, p.StartVM(vm, "xcp2"))
	ref := must[string](t)(p.DB().ByUUID("VM", vm))
	where := func() string { return xapidb.Value[string](p.DB(), "VM", ref, "resident_on") }
	if where() != p.Host("xcp2").Ref || usedOn(p, p.Resource(vdi)) != "xcp2" {
		t.Errorf("VM runs on %s, its disk on %s", where(), usedOn(p, p.Resource(vdi)))
	}
	ok(t, p.MigrateVM(vm, "xcp3"))
	vref := must[string](t)(p.DB().ByUUID("VDI", vdi))
	marks := xapidb.Value[map[string]string](p.DB(), "VDI", vref, "sm_config")
	if where() != p.Host("xcp3").Ref || usedOn(p, p.Resource(vdi)) != "xcp3" || marks["host_"+p.Host("xcp3").Ref] != "RW" || marks["host_"+p.Host("xcp2").Ref] != "" {
		t.Errorf("after the move: VM on %s, disk on %s, sm_config %v", where(), usedOn(p, p.Resource(vdi)), marks)
	}
	if xapidb.Value[string](p.DB(), "VM", ref, "scheduled_to_be_resident_on") != xapidb.NullRef {
		t.Error("the reservation was left")
	}
	if err := p.DeleteDisk(vdi); err == nil {
		t.Error("deleted a disk in use")
	}
	p.HostDown("xcp3")
	ok(t, p.HostUp("xcp3"))
	if got := xapidb.Value[string](p.DB(), "VM", ref, "power_state"); got != "Halted" {
		t.Errorf("after its host's crash the VM is %s", got)
	}
	ok(t, p.DeleteDisk(vdi))
}

func TestHostIsDeclaredDeadLater(t *testing.T) {
	clock := lab.NewManual(start)
	p := newPool(t, lab.Options{Clock: clock})
	metrics := xapidb.Value[string](p.DB(), "host", p.Host("xcp2").Ref, "metrics")
	live := func() bool { return xapidb.Value[bool](p.DB(), "host_metrics", metrics, "live") }
	p.HostDown("xcp2")
	clock.Advance(9 * time.Minute)
	if !live() {
		t.Error("declared dead too early")
	}
	clock.Advance(2 * time.Minute)
	if live() {
		t.Error("still live after 11 minutes")
	}
	ok(t, p.HostUp("xcp2"))
	if !live() {
		t.Error("not live after its return")
	}
}

func TestVerbsFailWithoutController(t *testing.T) {
	p := newPool(t, lab.Options{})
	vdi := must[string](t)(p.CreateDisk(gib))
	p.ControllerDown()
	for name, err := range map[string]error{
		"create": second(p.CreateDisk(gib)), "delete": p.DeleteDisk(vdi), "scan": p.SRScan(), "update": p.SRUpdate(), "resize": p.ResizeDisk(vdi, 2*gib),
		"snapshot": second(p.SnapshotDisk(vdi)),
	} {
		if err == nil {
			t.Errorf("%s succeeded with no controller", name)
		}
	}
	ok(t, p.WriteDisk(vdi, 1<<20))
	ok(t, p.ControllerUp())
	ok(t, p.SRScan())
	if !p.True() {
		t.Error("the write during the outage is missing")
	}
}

func second[T any](_ T, err error) error { return err }

func TestFaultsByName(t *testing.T) {
	p := newPool(t, lab.Options{})
	for name, args := range map[string][]string{"nonsense": nil, "host-down": nil, "controller-slow": {"soon"}, "redundancy": {"two"}, "host-up": {"xcp9"}} {
		if err := p.Fault(name, args...); err == nil {
			t.Errorf("Fault(%s, %v) succeeded", name, args)
		}
	}
	ok(t, p.Fault("redundancy", "0"))
	if err := p.SRScan(); err == nil {
		t.Error("scan succeeded with redundancy 0")
	}
	ok(t, p.Fault("redundancy", "2"))
	ok(t, p.Fault("two-groups"))
	groups := map[string]bool{}
	for _, r := range p.DB().Records("PBD") {
		groups[r.Get("device_config").(map[string]string)["group-name"]] = true
	}
	if len(groups) != 2 {
		t.Errorf("groups = %v, want two", groups)
	}
	ok(t, p.Fault("groups-right"))
	if len(lab.Faults()) < 15 {
		t.Errorf("only %d faults", len(lab.Faults()))
	}
}

// dump renders all that both halves hold.
func dump(p *lab.Pool) string {
	var b strings.Builder
	for _, class := range []string{"pool", "host", "SR", "PBD", "VDI", "VM", "VBD"} {
		for _, r := range p.DB().Records(class) {
			fmt.Fprintf(&b, "%s %s %v\n", class, r.Ref(), r.Map())
		}
	}
	kv, _ := p.LINSTOR().KVGet(p.Group())
	view, err := json.Marshal(p.LINSTOR().Resources(linstorsim.ResourceFilter{Volumes: true}))
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(&b, "%v\n%s\n", kv.Props, view)
	return b.String()
}

func TestOneSeedOnePool(t *testing.T) {
	build := func(seed uint64) string {
		p := newPool(t, lab.Options{Seed: seed, Hosts: 4})
		disks := must[[]string](t)(p.CreateDisks(5, gib))
		vm := must[string](t)(p.CreateVM("guest", disks[:2]...))
		ok(t, p.StartVM(vm, "xcp3"))
		must[string](t)(p.SnapshotDisk(disks[0]))
		return dump(p)
	}
	if diff := cmp.Diff(build(7), build(7)); diff != "" {
		t.Errorf("the same seed gave another pool:\n%s", diff)
	}
	if build(7) == build(8) {
		t.Error("two seeds gave the same pool")
	}
}

// Whatever the verbs and faults, afterwards: with all hosts back a scan shows the truth; every volume of the KV store exists in LINSTOR and every VDI in the KV store; what is in use is
// what running VMs hold.
func TestRandomVerbsKeepThePoolConsistent(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		clock := lab.NewManual(start)
		p, err := lab.New(lab.Options{
			Hosts: rapid.IntRange(2, 5).Draw(r, "hosts"), Redundancy: rapid.IntRange(1, 2).Draw(r, "redundancy"), Thick: rapid.Bool().Draw(r, "thick"),
			Seed: rapid.Uint64().Draw(r, "seed"), Clock: clock,
		})
		if err != nil {
			r.Fatal(err)
		}
		host := func() string { return p.Hosts()[rapid.IntRange(0, len(p.Hosts())-1).Draw(r, "host")].Name }
		disk := func() string {
			if len(p.Disks()) == 0 {
				return "none"
			}
			return rapid.SampledFrom(p.Disks()).Draw(r, "disk")
		}
		guest := func() string {
			if len(p.VMs()) == 0 {
				return "none"
			}
			return rapid.SampledFrom(p.VMs()).Draw(r, "vm")
		}
		size := func() int64 { return rapid.Int64Range(1, 64).Draw(r, "GiB") * gib }
		// Refusals are part of the game: what counts is the state after them.
		r.Repeat(map[string]func(*rapid.T){
			"create":   func(*rapid.T) { _, _ = p.CreateDisk(size()) },
			"delete":   func(*rapid.T) { _ = p.DeleteDisk(disk()) },
			"resize":   func(*rapid.T) { _ = p.ResizeDisk(disk(), size()) },
			"snapshot": func(*rapid.T) { _, _ = p.SnapshotDisk(disk()) },
			"write":    func(*rapid.T) { _ = p.WriteDisk(disk(), size()/16) },
			"vm":       func(*rapid.T) { _, _ = p.CreateVM("guest", disk()) },
			"start":    func(*rapid.T) { _ = p.StartVM(guest(), host()) },
			"stop":     func(*rapid.T) { _ = p.StopVM(guest()) },
			"migrate":  func(*rapid.T) { _ = p.MigrateVM(guest(), host()) },
			"scan":     func(*rapid.T) { _ = p.SRScan() },
			"down":     func(*rapid.T) { p.HostDown(host()) },
			"up":       func(*rapid.T) { _ = p.HostUp(host()) },
			"grow":     func(*rapid.T) { p.AddCapacity(host(), 1<<20) },
			"": func(r *rapid.T) {
				clock.Advance(time.Second)
				p.LINSTOR().Step()
			},
		})
		for _, h := range p.Hosts() {
			if err := p.HostUp(h.Name); err != nil {
				r.Fatal(err)
			}
		}
		clock.Advance(24 * time.Hour) // resyncs end, the controller reads capacities
		p.LINSTOR().Step()
		if err := p.SRScan(); err != nil {
			r.Fatalf("scan: %v", err)
		}
		if !p.True() {
			r.Fatalf("XAPI shows %v, the truth is %v, wrong VDIs %v", p.Shown(p.SR()), p.Truth(p.SR()), p.WrongVDIs())
		}
		checkRelations(r, p)
	})
}

func checkRelations(r *rapid.T, p *lab.Pool) {
	kv, _ := p.LINSTOR().KVGet(p.Group())
	named := map[string]bool{}
	for k, v := range kv.Props {
		if strings.HasSuffix(k, "/volume-name") {
			named[v] = true
			if definition, _ := p.LINSTOR().ResourceExists(v, ""); !definition {
				r.Fatalf("KV names %s, which LINSTOR does not have", v)
			}
		}
		if strings.HasSuffix(k, "/not-exists") && v != "0" {
			r.Fatalf("%s = %s", k, v)
		}
		if strings.Contains(k, "/journal/") {
			r.Fatalf("journal %s was left", k)
		}
	}
	held := map[string]bool{}
	for _, vbd := range p.DB().Records("VBD") {
		if vbd.Get("currently_attached") == true {
			held[xapidb.Value[string](p.DB(), "VDI", vbd.Get("VDI").(string), "uuid")] = true
		}
	}
	for _, vdi := range p.DB().Records("VDI") {
		id := vdi.Get("uuid").(string)
		if kv.Props["xcp/volume/"+id+"/volume-name"] != p.Resource(id) || !named[p.Resource(id)] {
			r.Fatalf("VDI %s is not in the KV store as XAPI has it", id)
		}
		if used := usedOn(p, p.Resource(id)) != ""; used != held[id] {
			r.Fatalf("VDI %s: in use %v, attached in XAPI %v", id, used, held[id])
		}
	}
	if got, want := len(p.DB().Records("VDI")), len(named); got != want {
		r.Fatalf("%d VDIs in XAPI, %d volumes in the KV store", got, want)
	}
}

func TestAwaitSeesChangesOfBothHalves(t *testing.T) {
	p := newPool(t, lab.Options{Clock: lab.WallClock{}})
	vdi := must[string](t)(p.CreateDisk(gib))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	go func() { _ = p.WriteDisk(vdi, 64<<20) }()
	ok(t, p.Await(ctx, func() bool { return !p.True() }))
	go func() { _ = p.SRScan() }()
	ok(t, p.AwaitShown(ctx))
	expired, stop := context.WithTimeout(t.Context(), time.Millisecond)
	defer stop()
	ok(t, p.WriteDisk(vdi, 64<<20))
	if err := p.AwaitShown(expired); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("AwaitShown = %v, want the deadline", err)
	}
}

func TestLarge(t *testing.T) {
	p := must[*lab.Pool](t)(lab.Large(lab.Options{}, 8, 50, 150))
	if len(p.VMs()) != 50 || len(p.Disks()) != 150 {
		t.Errorf("%d VMs and %d disks", len(p.VMs()), len(p.Disks()))
	}
	ok(t, p.SRScan())
	if !p.True() {
		t.Error("not true after a scan")
	}
}

func BenchmarkLarge(b *testing.B) {
	for b.Loop() {
		if _, err := lab.Large(lab.Options{}, 64, 2000, 6000); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkThousandVolumes(b *testing.B) {
	for b.Loop() {
		p, err := lab.New(lab.Options{Hosts: 6})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.CreateDisks(1000, 40*gib); err != nil {
			b.Fatal(err)
		}
	}
}
