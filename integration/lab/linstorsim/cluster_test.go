package linstorsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const gib = 1 << 20 // KiB

func newCluster(t testing.TB, hosts int, version string) *Cluster {
	t.Helper()
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	c := New(Config{Version: version, Now: func() time.Time { return now }, Rand: rand.New(rand.NewPCG(3, 4))})
	for i := range hosts {
		name := fmt.Sprintf("host%c", 'A'+i)
		c.AddNode(name, fmt.Sprintf("10.0.0.%d", i+1))
		c.AddPool(name, "thin", "LVM_THIN", 100*gib)
		c.AddPool(name, "thick", "LVM", 100*gib)
	}
	if err := c.CreateGroup("thin-grp", "thin", 2).Err(); err != nil {
		t.Fatal(err)
	}
	if err := c.CreateGroup("thick-grp", "thick", 2).Err(); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *Cluster) flagsOf(resource, node string) []string {
	for _, r := range c.Resources(ResourceFilter{Names: []string{resource}, Nodes: []string{node}}) {
		return r.Flags
	}
	return []string{"ABSENT"}
}

func diskStates(c *Cluster, resource string) map[string]string {
	out := map[string]string{}
	for _, r := range c.Resources(ResourceFilter{Names: []string{resource}, Volumes: true}) {
		out[r.NodeName] = "?"
		if r.Volumes[0].State != nil {
			out[r.NodeName] = r.Volumes[0].State.DiskState
		}
	}
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSpawnPlacesByFreeSpace(t *testing.T) {
	c := newCluster(t, 4, "")
	c.GrowPool("hostC", "thick", 10*gib)
	c.GrowPool("hostD", "thick", 20*gib)
	c.Advance(3 * time.Minute)
	must(t, c.Spawn("thick-grp", "vol", 30*gib).Err())
	states := diskStates(c, "vol")
	if states["hostC"] != "UpToDate" || states["hostD"] != "UpToDate" || len(states) != 3 {
		t.Errorf("placed on %v", states)
	}
	// 30 GiB and DRBD's metadata in extents of 4 MiB: 7 slots x 32 KiB a GiB is under 8 MiB.
	for _, p := range c.Pools([]string{"hostD"}, []string{"thick"}, nil, false) {
		if used := *p.TotalCapacity - *p.FreeCapacity; used != 30*gib+8192 {
			t.Errorf("thick volume takes %d KiB", used)
		}
	}
}

// TestDatabaseVolumeSize holds the documented sample of an XOSTOR database volume: 1 GiB usable, 1 GiB + 4 MiB allocated.
func TestDatabaseVolumeSize(t *testing.T) {
	rd := definition{peerSlots: 3}
	if got := rd.gross(gib); got<<10 != 1077936128 {
		t.Errorf("allocated %d bytes", got<<10)
	}
}

func TestTieBreakerRules(t *testing.T) {
	c := newCluster(t, 4, "")
	must(t, c.Spawn("thin-grp", "vol", gib).Err())
	if f := c.flagsOf("vol", "hostC"); !slices.Equal(f, []string{"DISKLESS", "DRBD_DISKLESS", "TIE_BREAKER"}) {
		t.Fatalf("tie-breaker flags %v", f)
	}
	// A third replica elsewhere makes it superfluous.
	r := c.CreateResource("vol", "hostD", CreateRequest{})
	if !r.Has(CodeInfoTieBreakerDeleting) || c.flagsOf("vol", "hostC")[0] != "ABSENT" {
		t.Errorf("%v", r)
	}
	// Deleting one of three keeps it as the tie-breaker.
	r = c.DeleteResource("vol", "hostD", false)
	if !r.Has(CodeInfoTieBreakerTakeover) || !slices.Contains(c.flagsOf("vol", "hostD"), "TIE_BREAKER") {
		t.Errorf("%v", r)
	}
	// Opening the device there makes it a plain diskless resource.
	must(t, c.SetInUse("vol", "hostD", true))
	if f := c.flagsOf("vol", "hostD"); !slices.Equal(f, []string{"DISKLESS", "DRBD_DISKLESS"}) {
		t.Errorf("after promotion %v", f)
	}
	must(t, c.SetInUse("vol", "hostD", false))
	// Deleting that plain diskless one takes it over again; deleting the tie-breaker by hand switches the feature off.
	if r = c.DeleteResource("vol", "hostD", false); !r.Has(CodeInfoTieBreakerTakeover) {
		t.Errorf("%v", r)
	}
	if r = c.DeleteResource("vol", "hostD", false); r.Has(CodeInfoTieBreakerTakeover) || c.flagsOf("vol", "hostD")[0] != "ABSENT" {
		t.Errorf("%v", r)
	}
	if v := c.Definitions([]string{"vol"}, nil, false)[0].Props[tieBreakerProp]; v != "False" {
		t.Errorf("property %q", v)
	}
	if r = c.DeleteResource("vol", "hostB", true); !r.Has(CodeInfoTieBreakerTakeover) && !slices.Contains(c.flagsOf("vol", "hostB"), "ABSENT") {
		t.Errorf("%v", r)
	}
}

func TestToggleThroughOutage(t *testing.T) {
	for _, version := range []string{Version133, Version134} {
		t.Run(version, func(t *testing.T) {
			c := newCluster(t, 4, version)
			must(t, c.Spawn("thin-grp", "vol", 10*gib).Err())
			must(t, c.Write("vol", 5*gib))
			c.HoldToggles(true)
			must(t, c.ToggleDiskful("vol", "hostC", "", "").Err())
			if f := c.flagsOf("vol", "hostC"); !slices.Equal(f, []string{"DISKLESS", "DISK_ADD_REQUESTED", "DISK_ADDING", "DRBD_DISKLESS"}) {
				t.Fatalf("while adding %v", f)
			}
			c.SetNode("hostC", StatusOffline)
			if f := c.flagsOf("vol", "hostC"); slices.Contains(f, "DISK_ADDING") || !slices.Contains(f, "DISK_ADD_REQUESTED") {
				t.Fatalf("after the loss %v", f)
			}
			again := c.ToggleDiskful("vol", "hostC", "", "")
			if busy := again.Has(CodeBusy); busy != (version == Version133) {
				t.Errorf("again: %v", again)
			}
			c.HoldToggles(false)
			// One dead peer of the definition blocks the resume.
			c.SetNode("hostB", StatusOffline)
			c.SetNode("hostC", StatusOnline)
			if f := c.flagsOf("vol", "hostC"); !slices.Contains(f, "DISK_ADD_REQUESTED") {
				t.Errorf("resumed without hostB: %v", f)
			}
			c.SetNode("hostB", StatusOnline)
			if f := c.flagsOf("vol", "hostC"); len(f) != 0 {
				t.Errorf("not resumed: %v", f)
			}
			if s := diskStates(c, "vol")["hostC"]; s != "SyncTarget(0.00%)" {
				t.Errorf("disk state %s", s)
			}
			c.Advance(10 * time.Second) // 1000 MiB of 5 GiB
			if s := diskStates(c, "vol")["hostC"]; s != "SyncTarget(19.53%)" {
				t.Errorf("disk state %s", s)
			}
			if synced, _ := c.SyncedOnAll("vol"); synced {
				t.Error("synced too early")
			}
			c.Advance(time.Minute)
			if synced, _ := c.SyncedOnAll("vol"); !synced {
				t.Errorf("not synced: %v", diskStates(c, "vol"))
			}
		})
	}
}

// TestControllerRestartMidToggle: flags and syncs are the cluster's, not the controller process's; its events are gone.
func TestControllerRestartMidToggle(t *testing.T) {
	c := newCluster(t, 3, "")
	must(t, c.Spawn("thin-grp", "vol", 10*gib).Err())
	must(t, c.Write("vol", gib))
	c.HoldToggles(true)
	must(t, c.ToggleDiskful("vol", "hostC", "", "").Err())
	seq := c.EventSeq()
	c.SetController(Controller{Phase: Down})
	must(t, c.SetInUse("vol", "hostA", true)) // DRBD does not need the controller
	if events, _, _ := c.Events(seq); len(events) != 0 {
		t.Errorf("events while down: %v", events)
	}
	c.SetController(Controller{Phase: Up})
	if f := c.flagsOf("vol", "hostC"); !slices.Contains(f, "DISK_ADDING") {
		t.Errorf("after restart %v", f)
	}
	c.HoldToggles(false)
	c.Advance(time.Minute)
	if s := diskStates(c, "vol")["hostC"]; s != "UpToDate" {
		t.Errorf("in the end %s", s)
	}
}

// TestOtherController: a satellite taken over by a second controller is not online and comes back by reconnect.
func TestOtherController(t *testing.T) {
	c := newCluster(t, 3, "")
	c.SetNode("hostA", StatusOtherController)
	if p := c.Pools([]string{"hostA"}, []string{"thin"}, nil, true)[0]; p.FreeCapacity != nil || len(p.Reports) != 1 || p.Reports[0].Number() != CodeWarnNotConnected {
		t.Errorf("%+v", p)
	}
	must(t, c.Reconnect("hostA").Err())
	if n := c.Nodes([]string{"hostA"}, nil)[0]; n.ConnectionStatus != StatusOnline {
		t.Errorf("status %s", n.ConnectionStatus)
	}
}

func TestSyncsOfAPoolRunOneByOne(t *testing.T) {
	c := newCluster(t, 3, "")
	for _, v := range []string{"vol1", "vol2"} {
		must(t, c.Spawn("thin-grp", v, 10*gib).Err())
		must(t, c.Write(v, gib))
		must(t, c.ToggleDiskful(v, "hostC", "", "").Err())
	}
	c.Advance(5 * time.Second)
	view := c.Resources(ResourceFilter{Names: []string{"vol2"}, Nodes: []string{"hostC"}, Volumes: true})[0].Volumes[0].State
	paused := 0
	for _, st := range view.ReplicationStates {
		if st.State == "PausedSyncT" {
			paused++
		}
	}
	if view.DiskState != "Inconsistent" || paused != 1 {
		t.Errorf("waiting sync shows %+v", view)
	}
	c.Advance(30 * time.Second)
	if s := diskStates(c, "vol2")["hostC"]; s != "UpToDate" {
		t.Errorf("second sync: %s", s)
	}
}

func TestHostLossAndReturn(t *testing.T) {
	c := newCluster(t, 3, "")
	must(t, c.Spawn("thin-grp", "vol", 10*gib).Err())
	must(t, c.SetInUse("vol", "hostA", true))
	c.SetHost("hostB", false)
	must(t, c.Write("vol", 2*gib))
	if s := diskStates(c, "vol"); s["hostB"] != "?" || s["hostA"] != "UpToDate" {
		t.Errorf("while down: %v", s)
	}
	c.SetHost("hostB", true)
	if s := diskStates(c, "vol")["hostB"]; s != "SyncTarget(0.00%)" {
		t.Errorf("on return: %s", s)
	}
	c.Advance(time.Minute)
	if s := diskStates(c, "vol")["hostB"]; s != "UpToDate" {
		t.Errorf("after sync: %s", s)
	}
	// The user's own host dies: nobody uses it, and it may be promoted elsewhere.
	c.SetHost("hostA", false)
	for _, r := range c.Resources(ResourceFilter{Names: []string{"vol"}}) {
		may := r.LayerObject.Drbd.MayPromote
		if r.NodeName == "hostA" && (r.State != nil || may != nil) {
			t.Errorf("dead host is known: %+v", r.State)
		}
		if r.NodeName == "hostB" && (may == nil || !*may) {
			t.Error("hostB must be promotable: two of three with the tie-breaker")
		}
	}
	must(t, c.SetInUse("vol", "hostB", true))
	if err := c.SetInUse("vol", "hostC", true); err == nil {
		t.Error("two primaries")
	}
}

func TestMigrateDiskLatchesUnused(t *testing.T) {
	c := newCluster(t, 4, "")
	must(t, c.Spawn("thin-grp", "vol", 10*gib).Err())
	must(t, c.Write("vol", gib))
	must(t, c.CreateResource("vol", "hostD", CreateRequest{Flags: []string{"DRBD_DISKLESS"}}).Err())
	must(t, c.ToggleDiskful("vol", "hostD", "", "hostA").Err())
	must(t, c.SetInUse("vol", "hostA", true)) // in use again after it was seen unused: LINSTOR deletes it anyway
	c.Advance(time.Minute)
	if s := diskStates(c, "vol"); s["hostD"] != "UpToDate" || s["hostA"] == "UpToDate" {
		t.Errorf("after migration %v", s)
	}
}

func TestThinPoolFull(t *testing.T) {
	c := newCluster(t, 3, "")
	must(t, c.Spawn("thin-grp", "vol", 200*gib).Err())
	err := c.Write("vol", 150*gib)
	var full *PoolFullError
	if !errors.As(err, &full) || full.Hint == "" || full.MissingKiB != 50*gib {
		t.Fatalf("%v", err)
	}
	if s := diskStates(c, "vol"); s["hostA"] != "Failed" {
		t.Errorf("%v", s)
	}
}

func TestDeleteWithSatelliteAway(t *testing.T) {
	c := newCluster(t, 3, "")
	must(t, c.Spawn("thin-grp", "vol", gib).Err())
	c.SetNode("hostA", StatusOffline)
	if r := c.DeleteDefinition("vol"); r.Failed() || !r.Has(CodeWarnNotConnected) {
		t.Fatalf("%v", r)
	}
	defs := c.Definitions([]string{"vol"}, nil, false)
	if len(defs) != 1 || !slices.Equal(defs[0].Flags, []string{"DELETE"}) {
		t.Errorf("while away %+v", defs)
	}
	c.SetNode("hostA", StatusOnline)
	if defs := c.Definitions([]string{"vol"}, nil, false); len(defs) != 0 {
		t.Errorf("after return %+v", defs)
	}
	for _, p := range c.Pools(nil, []string{"thin"}, nil, false) {
		if *p.FreeCapacity != *p.TotalCapacity {
			t.Errorf("space left behind on %s", p.NodeName)
		}
	}
}

func TestNegativeAllocation(t *testing.T) {
	c := newCluster(t, 3, "")
	must(t, c.Spawn("thin-grp", "vol", gib).Err())
	c.SetReported("vol", "hostA", ptr(int64(-1)))
	v := c.Resources(ResourceFilter{Names: []string{"vol"}, Nodes: []string{"hostA"}, Volumes: true})[0].Volumes[0]
	if *v.AllocatedKiB != -1 {
		t.Errorf("reported %d", *v.AllocatedKiB)
	}
}

func TestFill(t *testing.T) {
	for _, tc := range []struct {
		sizes []int64
		count int
		want  int64
	}{{[]int64{10, 10, 10}, 2, 15}, {[]int64{100, 10, 10}, 2, 20}, {[]int64{10}, 2, 0}, {nil, 1, 0}, {[]int64{7, 9}, 1, 16}, {[]int64{5, 6, 7}, 3, 5}} {
		if got := fill(tc.sizes, tc.count); got != tc.want {
			t.Errorf("fill(%v, %d) = %d, want %d", tc.sizes, tc.count, got, tc.want)
		}
	}
}

// TestSameScheduleSameState: the model draws nothing from the outside, so equal seeds give equal bytes.
func TestSameScheduleSameState(t *testing.T) {
	run := func() string {
		c := newCluster(t, 4, "")
		for i := range 20 {
			c.Spawn("thin-grp", fmt.Sprintf("vol%d", i), gib)
		}
		c.SetHost("hostB", false)
		_ = c.Write("vol3", gib/2)
		c.SetHost("hostB", true)
		c.Advance(time.Second)
		return string(AppendResources(nil, c.Resources(ResourceFilter{Volumes: true})))
	}
	if first, second := run(), run(); first != second {
		t.Error("two runs differ")
	}
}

// world drives random operations and holds the invariants after each.
type world struct {
	*Cluster
}

func (w *world) step(t *rapid.T) {
	node := fmt.Sprintf("host%c", 'A'+rapid.IntRange(0, 4).Draw(t, "node"))
	vol := fmt.Sprintf("vol%d", rapid.IntRange(0, 3).Draw(t, "vol"))
	group := rapid.SampledFrom([]string{"thin-grp", "thick-grp"}).Draw(t, "group")
	switch rapid.IntRange(0, 17).Draw(t, "op") {
	case 0, 1, 2:
		w.Spawn(group, vol, int64(rapid.IntRange(1, 20).Draw(t, "gib"))*gib)
	case 3:
		w.SetNode(node, StatusOffline)
	case 4, 5:
		w.SetNode(node, StatusOnline)
	case 6:
		w.SetHost(node, false)
	case 7, 8:
		w.SetHost(node, true)
	case 9:
		_ = w.SetInUse(vol, node, rapid.Bool().Draw(t, "use"))
	case 10:
		_ = w.Write(vol, int64(rapid.IntRange(1, 20).Draw(t, "written"))*gib)
	case 11:
		w.ToggleDiskful(vol, node, "", "")
	case 12:
		w.ToggleDiskless(vol, node)
	case 13:
		before := w.upToDate(vol)
		w.DeleteResource(vol, node, rapid.Bool().Draw(t, "keep"))
		if after := w.upToDate(vol); after < before-1 {
			t.Fatalf("deleting one place of %s cost %d UpToDate replicas", vol, before-after)
		}
	case 14:
		w.MakeAvailable(vol, node, rapid.Bool().Draw(t, "diskful"))
	case 15:
		w.DeleteDefinition(vol)
	case 16:
		w.Advance(time.Duration(rapid.IntRange(1, 300).Draw(t, "seconds")) * time.Second)
	case 17:
		w.ModifyVolumeDefinition(vol, 0, int64(rapid.IntRange(1, 30).Draw(t, "size"))*gib, PropsChange{})
	}
}

func (w *world) upToDate(vol string) int {
	rd := w.rds[key(vol)]
	n := 0
	if rd != nil {
		for _, r := range rd.rsc {
			if r.upToDate() {
				n++
			}
		}
	}
	return n
}

func (w *world) check(t *rapid.T) {
	for _, n := range w.nodes {
		for _, p := range n.pools {
			if p.diskless() {
				continue
			}
			var sum, reserved int64
			for v := range p.vols {
				if v.rsc.rd.rsc[key(n.name)] != v.rsc || w.rds[key(v.rsc.rd.name)] != v.rsc.rd {
					t.Fatalf("pool %s/%s holds a volume of a resource that is gone", n.name, p.name)
				}
				sum += v.allocated
				reserved += v.rsc.rd.gross(v.deployedKiB)
			}
			if reserved != p.reserved {
				t.Fatalf("pool %s/%s: reserved %d, its volumes need %d", n.name, p.name, p.reserved, reserved)
			}
			if got := p.truth(); got.free+sum != got.total {
				t.Fatalf("pool %s/%s: free %d + allocated %d != total %d", n.name, p.name, got.free, sum, got.total)
			}
		}
	}
	for _, rd := range w.rds {
		w.checkDefinition(t, rd)
	}
	for _, r := range w.Resources(ResourceFilter{Volumes: true}) {
		checkRecord(t, r)
	}
}

func (w *world) checkDefinition(t *rapid.T, rd *definition) {
	ids, ties, primaries := map[int]bool{}, 0, 0
	for _, r := range rd.rsc {
		if ids[r.nodeID] {
			t.Fatalf("%s: two places with node id %d", rd.name, r.nodeID)
		}
		ids[r.nodeID] = true
		if r.tieBreaker() {
			ties++
		}
		if r.inUse {
			primaries++
		}
		if r.node.resources[key(rd.name)] != r {
			t.Fatalf("%s: node %s does not know its resource", rd.name, r.node.name)
		}
		if len(r.vols) != len(rd.vds) {
			t.Fatalf("%s on %s: %d volumes, %d definitions", rd.name, r.node.name, len(r.vols), len(rd.vds))
		}
	}
	if ties > 1 {
		t.Fatalf("%s has %d tie-breakers", rd.name, ties)
	}
	if primaries > 1 {
		t.Fatalf("%s has %d primaries", rd.name, primaries)
	}
}

func checkRecord(t *rapid.T, r Resource) {
	has := func(f string) bool { return slices.Contains(r.Flags, f) }
	if has("TIE_BREAKER") && !has("DRBD_DISKLESS") || has("DRBD_DISKLESS") && !has("DISKLESS") || has("EVICTED") && !has("INACTIVE") ||
		has("DISK_ADDING") && !has("DISK_ADD_REQUESTED") || has("DISK_REMOVING") && !has("DISK_REMOVE_REQUESTED") {
		t.Fatalf("%s on %s: flags %v are no super-set", r.Name, r.NodeName, r.Flags)
	}
	for _, v := range r.Volumes {
		if (v.State == nil) != (r.State == nil) {
			t.Fatalf("%s on %s: state of resource and volume differ in presence", r.Name, r.NodeName)
		}
		if has("DISKLESS") && v.State != nil && v.State.DiskState != "Diskless" {
			t.Fatalf("%s on %s is diskless and %s", r.Name, r.NodeName, v.State.DiskState)
		}
		if v.State != nil && strings.HasPrefix(v.State.DiskState, "SyncTarget") {
			running := 0
			for _, st := range v.State.ReplicationStates {
				if st.State == "SyncTarget" {
					running++
				}
			}
			if running != 1 {
				t.Fatalf("%s on %s syncs from %d peers", r.Name, r.NodeName, running)
			}
		}
	}
}

func TestModelInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		version := rapid.SampledFrom([]string{Version133, Version134}).Draw(t, "version")
		now := time.Unix(0, 0)
		c := New(Config{Version: version, Now: func() time.Time { return now }})
		for i := range 5 {
			name := fmt.Sprintf("host%c", 'A'+i)
			c.AddNode(name, "10.0.0.1")
			c.AddPool(name, "thin", "LVM_THIN", 60*gib)
			c.AddPool(name, "thick", "LVM", 60*gib)
		}
		c.CreateGroup("thin-grp", "thin", rapid.IntRange(1, 3).Draw(t, "replicas"))
		c.CreateGroup("thick-grp", "thick", 2)
		w := &world{Cluster: c}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			w.step(t)
			w.check(t)
		}
		// When everything is back, nothing stays pending and every replica becomes UpToDate unless its disk failed or no
		// good copy is left.
		for _, n := range c.Nodes(nil, nil) {
			c.SetHost(n.Name, true)
			c.SetNode(n.Name, StatusOnline)
		}
		for range 5 { // a replica may have to wait for its source's own sync
			c.Advance(time.Hour)
		}
		for _, rd := range c.rds {
			for _, r := range rd.rsc {
				if r.flags&(rscToggling|rscDelete) != 0 {
					t.Fatalf("%s on %s stays %v", rd.name, r.node.name, flagNames(rscFlags, r.flags))
				}
				for _, v := range r.vols {
					if r.diskful() && v.pool == nil && r.node.pools[key(r.wantPool)].truth().free > rd.totalGross() {
						t.Fatalf("%s on %s was never deployed although there is room", rd.name, r.node.name)
					}
					if r.diskful() && v.disk != diskUpToDate && v.disk != diskFailed && v.pool != nil && w.upToDate(rd.name) > 0 {
						t.Fatalf("%s on %s stays %s", rd.name, r.node.name, v.disk)
					}
				}
			}
		}
		w.check(t)
	})
}

// TestHandWrittenJSON holds the fast encoder of resources equal to encoding/json.
func TestHandWrittenJSON(t *testing.T) {
	c := newCluster(t, 4, "")
	for i := range 5 {
		must(t, c.Spawn("thin-grp", fmt.Sprintf("vol%d", i), gib).Err())
	}
	must(t, c.ModifyResource("vol0", "hostA", PropsChange{Override: Props{"Aux/<\"é\n": "v\x01&"}}).Err())
	must(t, c.Write("vol2", gib/2))
	for _, n := range []string{"hostA", "hostB", "hostC", "hostD"} {
		must(t, c.MakeAvailable("vol2", n, true).Err()) // whichever is new syncs
	}
	c.Advance(time.Second)
	must(t, c.SetInUse("vol0", "hostA", true))
	c.SetNode("hostB", StatusOffline)
	for _, f := range []ResourceFilter{{}, {Volumes: true}, {Names: []string{"none"}}} {
		rs := c.Resources(f)
		want, err := json.Marshal(rs)
		must(t, err)
		if got := string(AppendResources(nil, rs)); got != string(want) {
			for i := range got {
				if i >= len(want) || got[i] != want[i] {
					t.Fatalf("at %d:\n got %.200s\nwant %.200s", i, got[max(0, i-80):], want[max(0, i-80):])
				}
			}
			t.Fatal("ours is shorter")
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	c := newCluster(b, 3, "")
	for i := range 1000 {
		must(b, c.Spawn("thin-grp", fmt.Sprintf("vol%d", i), gib).Err())
	}
	size := int64(0)
	for b.Loop() {
		size++
		_ = c.Write("vol500", size)
	}
}
