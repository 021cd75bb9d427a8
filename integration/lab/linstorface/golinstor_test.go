package linstorface

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"time"

	linstor "github.com/LINBIT/golinstor"
	"github.com/LINBIT/golinstor/client"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

func (l *lab) golinstor() *client.Client {
	l.Helper()
	base, err := url.Parse(l.url)
	if err != nil {
		l.Fatal(err)
	}
	c, err := client.NewClient(client.BaseURL(base), client.HTTPClient(&http.Client{}), client.Log(nil))
	if err != nil {
		l.Fatal(err)
	}
	return c
}

// TestGolinstor drives the face with LINBIT's Go client, which we did not write.
func TestGolinstor(t *testing.T) {
	l := newLab(t, "")
	c, ctx := l.golinstor(), l.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	version, err := c.Controller.GetVersion(ctx)
	must(err)
	if version.Version != "1.33.1" || version.RestApiVersion != "1.27.0" {
		t.Errorf("version %+v", version)
	}
	nodes, err := c.Nodes.GetAll(ctx)
	must(err)
	if len(nodes) != 3 || nodes[0].Name != "hostA" || nodes[0].ConnectionStatus != "ONLINE" || nodes[0].Type != linstor.ValNodeTypeCmbd && nodes[0].Type != "COMBINED" {
		t.Errorf("nodes %+v", nodes)
	}
	if n, err := c.Nodes.Get(ctx, "HOSTb"); err != nil || n.Name != "hostB" {
		t.Errorf("names have no case: %v %v", n.Name, err)
	}

	// Spawn, look, grow, toggle, delete.
	must(c.ResourceGroups.Spawn(ctx, "xcp-sr-thin", client.ResourceGroupSpawn{ResourceDefinitionName: "xcp-volume-1", VolumeSizes: []int64{10 * gib}}))
	view, err := c.Resources.GetResourceView(ctx, &client.ListOpts{Resource: []string{"xcp-volume-1"}})
	must(err)
	if len(view) != 3 {
		t.Fatalf("%d resources, want two replicas and a tie-breaker", len(view))
	}
	var replicas []string
	for _, r := range view {
		if slices.Contains(r.Flags, linstor.FlagTieBreaker) {
			if !slices.Contains(r.Flags, linstor.FlagDiskless) || !slices.Contains(r.Flags, linstor.FlagDrbdDiskless) {
				t.Errorf("tie-breaker flags %v are no super-set", r.Flags)
			}
			continue
		}
		replicas = append(replicas, r.NodeName)
		v := r.Volumes[0]
		if v.State.DiskState != "UpToDate" || v.ProviderKind != client.LVM_THIN || v.StoragePoolName != "thin" || r.State.InUse == nil || *r.State.InUse {
			t.Errorf("replica %+v", r)
		}
	}
	if len(replicas) != 2 {
		t.Fatalf("replicas on %v", replicas)
	}
	must(l.sim.Write("xcp-volume-1", gib))
	must(c.ResourceDefinitions.ModifyVolumeDefinition(ctx, "xcp-volume-1", 0, client.VolumeDefinitionModify{SizeKib: 12 * gib}))
	vd, err := c.ResourceDefinitions.GetVolumeDefinition(ctx, "xcp-volume-1", 0)
	must(err)
	if vd.SizeKib != 12*gib {
		t.Errorf("size %d", vd.SizeKib)
	}
	witness := "hostA"
	for slices.Contains(replicas, witness) {
		witness = string([]byte{'h', 'o', 's', 't', witness[4] + 1})
	}
	must(c.Resources.Diskful(ctx, "xcp-volume-1", witness, "thin", nil))
	l.sim.Advance(time.Minute)
	vols, err := c.Resources.GetVolumes(ctx, "xcp-volume-1", witness)
	must(err)
	if len(vols) != 1 || vols[0].State.DiskState != "UpToDate" || vols[0].AllocatedSizeKib < gib {
		t.Errorf("new replica %+v", vols)
	}
	must(c.Resources.Diskless(ctx, "xcp-volume-1", witness, ""))

	pools, err := c.Nodes.GetStoragePoolView(ctx)
	must(err)
	if len(pools) != 9 {
		t.Errorf("%d pools, want 9", len(pools))
	}
	must(c.KeyValueStore.CreateOrModify(ctx, "xcp-sr-thin", client.GenericPropsModify{OverrideProps: client.OverrideProps{"xcp/sr/metadata": "{}"}}))
	kv, err := c.KeyValueStore.Get(ctx, "xcp-sr-thin")
	must(err)
	if kv.Props["xcp/sr/metadata"] != "{}" {
		t.Errorf("kv %+v", kv)
	}
	must(c.KeyValueStore.Delete(ctx, "xcp-sr-thin"))
	if _, err := c.KeyValueStore.Get(ctx, "xcp-sr-thin"); !errors.Is(err, client.NotFoundError) {
		t.Errorf("deleted instance: %v", err)
	}
	must(c.Resources.CreateSnapshot(ctx, client.Snapshot{Name: "snap1", ResourceName: "xcp-volume-1"}))
	snaps, err := c.Resources.GetSnapshots(ctx, "xcp-volume-1")
	must(err)
	if len(snaps) != 1 || len(snaps[0].Nodes) != 2 {
		t.Errorf("snapshots %+v", snaps)
	}
	must(c.Resources.DeleteSnapshot(ctx, "xcp-volume-1", "snap1"))
	size, err := c.ResourceGroups.QuerySizeInfo(ctx, "xcp-sr-thin", client.QuerySizeInfoRequest{})
	must(err)
	if size.SpaceInfo == nil || size.SpaceInfo.MaxVlmSizeInKib < 10*gib || len(size.SpaceInfo.NextSpawnResult) != 2 {
		t.Errorf("size info %+v", size.SpaceInfo)
	}
	must(c.ResourceDefinitions.Delete(ctx, "xcp-volume-1"))
	if left, err := c.ResourceDefinitions.GetAll(ctx, client.RDGetAllRequest{}); err != nil || len(left) != 0 {
		t.Errorf("definitions after delete: %v %v", left, err)
	}
	golinstorObjects(t, ctx, c)
}

// golinstorObjects creates and removes one of each kind that an administrator makes by hand.
func golinstorObjects(t *testing.T, ctx context.Context, c *client.Client) {
	steps := []struct {
		name string
		do   func() error
	}{
		{"node", func() error {
			return c.Nodes.Create(ctx, client.Node{Name: "hostD", Type: "Satellite", NetInterfaces: []client.NetInterface{
				{Name: "default", Address: []byte{10, 0, 0, 9}, SatellitePort: 3366, SatelliteEncryptionType: "PLAIN"}}})
		}},
		{"interface", func() error {
			return c.Nodes.CreateNetInterface(ctx, "hostA", client.NetInterface{Name: "storage", Address: []byte{10, 1, 0, 1}})
		}},
		{"prefer it", func() error {
			return c.Nodes.Modify(ctx, "hostA", client.NodeModify{GenericPropsModify: client.GenericPropsModify{OverrideProps: client.OverrideProps{"PrefNic": "storage"}}})
		}},
		{"definition", func() error {
			return c.ResourceDefinitions.Create(ctx, client.ResourceDefinitionCreate{ResourceDefinition: client.ResourceDefinition{Name: "byhand"}})
		}},
		{"volume", func() error {
			return c.ResourceDefinitions.CreateVolumeDefinition(ctx, "byhand", client.VolumeDefinitionCreate{VolumeDefinition: client.VolumeDefinition{SizeKib: gib}})
		}},
		{"replica", func() error {
			return c.Resources.Create(ctx, client.ResourceCreate{Resource: client.Resource{Name: "byhand", NodeName: "hostA", Props: map[string]string{"StorPoolName": "thick"}}})
		}},
		{"place", func() error {
			n := int32(2)
			return c.Resources.Autoplace(ctx, "byhand", client.AutoPlaceRequest{SelectFilter: client.AutoSelectFilter{PlaceCount: n, StoragePool: "thick"}})
		}},
		{"available", func() error {
			return c.Resources.MakeAvailable(ctx, "byhand", "hostC", client.ResourceMakeAvailable{})
		}},
		{"remove", func() error { return c.Resources.Delete(ctx, "byhand", "hostC") }},
		{"drop", func() error { return c.ResourceDefinitions.Delete(ctx, "byhand") }},
		{"group", func() error {
			return c.ResourceGroups.Create(ctx, client.ResourceGroup{Name: "grp", SelectFilter: client.AutoSelectFilter{PlaceCount: 1}})
		}},
		{"volume group", func() error { return c.ResourceGroups.CreateVolumeGroup(ctx, "grp", client.VolumeGroup{}) }},
		{"drop group", func() error { return c.ResourceGroups.Delete(ctx, "grp") }},
		{"drop interface", func() error { return c.Nodes.DeleteNetinterface(ctx, "hostA", "storage") }},
		{"drop node", func() error { return c.Nodes.Delete(ctx, "hostD") }},
		{"controller property", func() error {
			return c.Controller.Modify(ctx, client.GenericPropsModify{OverrideProps: client.OverrideProps{"Aux/x": "y"}})
		}},
		{"drop it", func() error { return c.Controller.DeleteProp(ctx, "Aux/x") }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
	}
}

// TestGolinstorReadsErrors shows that golinstor's own classification fits our return codes.
func TestGolinstorReadsErrors(t *testing.T) {
	l := newLab(t, "")
	c, ctx := l.golinstor(), l.Context()
	if err := l.sim.Spawn("xcp-sr-thin", "vol", gib).Err(); err != nil {
		t.Fatal(err)
	}
	if err := l.sim.SetInUse("vol", "hostA", true); err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name string
		err  error
		code uint64
	}{
		{"delete in use", c.Resources.Delete(ctx, "vol", "hostA"), linstor.FailInUse},
		{"exists", c.ResourceDefinitions.Create(ctx, client.ResourceDefinitionCreate{ResourceDefinition: client.ResourceDefinition{Name: "VOL"}}), linstor.FailExistsRscDfn},
		{"too many", c.ResourceGroups.Spawn(ctx, "xcp-sr-thin", client.ResourceGroupSpawn{ResourceDefinitionName: "v4", VolumeSizes: []int64{gib}, SelectFilter: client.AutoSelectFilter{PlaceCount: 4}}), linstor.FailNotEnoughNodes},
		{"no room", c.Resources.Create(ctx, client.ResourceCreate{Resource: client.Resource{Name: "v4", NodeName: "hostA", Props: map[string]string{"StorPoolName": "tiny"}}}), linstor.FailNotFoundStorPool},
		{"name", c.ResourceDefinitions.Create(ctx, client.ResourceDefinitionCreate{ResourceDefinition: client.ResourceDefinition{Name: "1digit"}}), linstor.FailInvldRscName},
	}
	for _, tc := range cases {
		if tc.code == linstor.FailNotFoundStorPool {
			if !errors.Is(tc.err, client.NotFoundError) {
				t.Errorf("%s: %v, want golinstor's not found", tc.name, tc.err)
			}
			continue
		}
		if !client.IsApiCallError(tc.err, tc.code) {
			t.Errorf("%s: %v, want code %x", tc.name, tc.err, tc.code)
		}
	}
	codes := map[int]uint64{
		linstorsim.CodeInvalidRscName: linstor.FailInvldRscName, linstorsim.CodeInvalidVolumeSize: linstor.FailInvldVlmSize,
		linstorsim.CodeInvalidPlaceCount: linstor.FailInvldPlaceCount, linstorsim.CodeNodeInUse: linstor.FailNodeHasUsedRsc,
		linstorsim.CodeInvalidPoolName: linstor.FailInvldStorPoolName, linstorsim.CodeInvalidSnapName: linstor.FailInvldSnapshotName,
		linstorsim.CodeNodeNotFound: linstor.FailNotFoundNode, linstorsim.CodePoolNotFound: linstor.FailNotFoundStorPool,
		linstorsim.CodeKVSNotFound: linstor.FailNotFoundKvs, linstorsim.CodeRscGrpExists: linstor.FailExistsRscGrp,
		linstorsim.CodeNotEnoughFreeSpace: linstor.FailNotEnoughFreeSpace, linstorsim.CodeReplicaCount: linstor.FailInsufficientReplicaCount,
		linstorsim.CodeBusy: linstor.FailRscBusy, linstorsim.CodePeerSlots: linstor.FailInsufficientPeerSlots,
		linstorsim.CodeSnapshotUnsupported: linstor.FailSnapshotsNotSupported, linstorsim.CodeNotConnected: linstor.FailNotConnected,
		linstorsim.CodeInUse: linstor.FailInUse, linstorsim.CodeWarnNotConnected: linstor.WarnNotConnected,
		linstorsim.CodeWarnAlreadyDiskful: linstor.WarnRscAlreadyHasDisk, linstorsim.CodeWarnNotFound: linstor.WarnNotFound,
		linstorsim.CodeInfoTieBreakerTakeover: linstor.InfoTieBreakerTakeover, linstorsim.CodeInfoNoop: linstor.InfoNoop,
		linstorsim.CodeInfoRscExists: linstor.InfoRscAlreadyExists, linstorsim.CodeInfoPropSet: linstor.InfoPropSet,
		linstorsim.CodeSnapshotExists: linstor.FailExistsSnapshotDfn, linstorsim.CodeVlmGrpNotFound: linstor.FailNotFoundVlmGrp,
	}
	for ours, theirs := range codes {
		if uint64(ours) != theirs&0x7FFF {
			t.Errorf("code %d, LINBIT's constant has %d", ours, theirs&0x7FFF)
		}
	}
}
