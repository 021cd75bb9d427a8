package sm_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
)

func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"linstor_group/thin_device": "xcp-sr-linstor_group_thin_device",
		"linstor_group":             "xcp-sr-linstor_group",
		"a/b/c":                     "xcp-sr-a_b_c",
		"":                          "xcp-sr-",
	} {
		if got := sm.GroupName(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	if got := sm.HAGroupName("linstor_group/thin_device"); got != "xcp-ha-linstor_group_thin_device" {
		t.Errorf("HA group %q", got)
	}
	if sm.GroupName("a/b_c") != sm.GroupName("a_b/c") {
		t.Error("the driver's mapping collides here; ours must too")
	}
	for name, persistent := range map[string]bool{
		"xcp-persistent-database": true, sm.StatefileVolume: true, sm.RedoLogVolume: true, "xcp-volume-x": false, "": false,
	} {
		if sm.IsPersistent(name) != persistent {
			t.Errorf("%s: persistent is not %v", name, persistent)
		}
	}
	if !sm.IsVolume("xcp-volume-x") || sm.IsVolume("xcp-persistent-database") {
		t.Error("volumes are misread")
	}
	if got := sm.DevicePath("xcp-volume-x"); got != "/dev/drbd/by-res/xcp-volume-x/0" {
		t.Errorf("device path %q", got)
	}
}

func TestParseVolumes(t *testing.T) {
	yes := true
	kv := map[string]string{
		"xcp/sr/metadata":           `{"name_label":"XOSTOR"}`,
		"xcp/sr/journal/clone/u1":   "u1_None",
		"xostor/sizes":              "x",
		"xcp/volume/u1/not-exists":  "0",
		"xcp/volume/u1/volume-name": "xcp-volume-1",
		"xcp/volume/u1/metadata": `{"name_label":"disk","name_description":"d","is_a_snapshot":true,"snapshot_of":"u0","snapshot_time":"",
			"type":"user","vdi_type":"vhd","read_only":false,"metadata_of_pool":"","hidden":true,"cbtlog":"c","image-format":"vhd"}`,
		"xcp/volume/u1/readonly-timestamp": "1700000000.25",
		"xcp/volume/u1/zz-foreign":         "1",
		"xcp/volume/u1/aa/foreign":         "1",
		"/xcp/volume/u2/not-exists":        "2",
		"/xcp/volume/u2/volume-name":       "xcp-volume-2",
		"xcp/volume/u3/not-exists":         "1",
		"xcp/volume/u3/updating-uuid-src":  "u1",
		"xcp/volume/leak/volume-name":      "xcp-volume-4",
		"xcp/volume/DELETED_u5/not-exists": "0",
		"xcp/volume/OLD_u6/not-exists":     "0",
	}
	got, problems := sm.ParseVolumes(kv)
	if len(problems) != 0 {
		t.Errorf("problems: %v", problems)
	}
	want := map[string]sm.Volume{
		"u1": {
			UUID: "u1", Resource: "xcp-volume-1", Existence: sm.Exists, HasMetadata: true,
			Metadata: sm.Metadata{
				NameLabel: "disk", NameDescription: "d", IsASnapshot: true, SnapshotOf: "u0", Type: "user", VDIType: "vhd", Hidden: &yes, CBTLog: "c",
			},
			ReadonlySince: time.UnixMilli(1700000000250), ForeignKeys: []string{"aa/foreign", "zz-foreign"},
		},
		"u2":         {UUID: "u2", Resource: "xcp-volume-2", Existence: sm.Creating},
		"u3":         {UUID: "u3", Existence: sm.NotExists, UpdatingUUIDSrc: "u1"},
		"leak":       {UUID: "leak", Resource: "xcp-volume-4", Existence: sm.ExistenceUnknown},
		"DELETED_u5": {UUID: "DELETED_u5", Existence: sm.Exists},
		"OLD_u6":     {UUID: "OLD_u6", Existence: sm.Exists},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if !got["DELETED_u5"].Deleted() || !got["OLD_u6"].Old() || got["u1"].Deleted() || got["u1"].Old() {
		t.Error("DELETED_ and OLD_ are misread")
	}
}

// What cannot be read is named, and the rest of the volume is still there.
func TestParseVolumes_Problems(t *testing.T) {
	for name, tc := range map[string]struct{ key, value, want string }{
		"unknown state":       {"xcp/volume/u/not-exists", "3", `expected 0, 1 or 2, got "3"`},
		"empty state":         {"xcp/volume/u/not-exists", "", "expected 0, 1 or 2"},
		"truncated metadata":  {"xcp/volume/u/metadata", `{"name_label":"a`, "read metadata"},
		"metadata null":       {"xcp/volume/u/metadata", "null", "got null"},
		"metadata list":       {"xcp/volume/u/metadata", "[]", "read metadata"},
		"metadata wrong type": {"xcp/volume/u/metadata", `{"read_only":"yes"}`, "read metadata"},
		"timestamp text":      {"xcp/volume/u/readonly-timestamp", "now", "seconds since the epoch"},
		"timestamp negative":  {"xcp/volume/u/readonly-timestamp", "-1", "seconds since the epoch"},
		"timestamp NaN":       {"xcp/volume/u/readonly-timestamp", "NaN", "seconds since the epoch"},
		"timestamp absurd":    {"xcp/volume/u/readonly-timestamp", "1e300", "seconds since the epoch"},
		"no property":         {"xcp/volume/u", "x", "expected xcp/volume/"},
		"empty property":      {"xcp/volume/u/", "x", "expected xcp/volume/"},
		"empty uuid":          {"xcp/volume//metadata", "{}", "expected xcp/volume/"},
	} {
		t.Run(name, func(t *testing.T) {
			kv := map[string]string{tc.key: tc.value, "xcp/volume/u/volume-name": "r"}
			got, problems := sm.ParseVolumes(kv)
			if len(problems) != 1 || problems[0].Key != tc.key || !strings.Contains(problems[0].String(), tc.want) {
				t.Fatalf("problems %v, want %q", problems, tc.want)
			}
			want := sm.Volume{UUID: "u", Resource: "r", Existence: sm.ExistenceUnknown}
			if diff := cmp.Diff(map[string]sm.Volume{"u": want}, got); diff != "" {
				t.Errorf("something was guessed: %s", diff)
			}
		})
	}
}

func TestJournals(t *testing.T) {
	got, problems := sm.Journals(map[string]string{
		"xcp/sr/journal/leaf/c":      "p",
		"xcp/sr/journal/clone/u2":    "base_snap",
		"/xcp/sr/journal/clone/u1":   "base_None",
		"xcp/sr/journal/inflate/u":   "1048576",
		"xcp/sr/journal/new-type/u":  "?",
		"xcp/sr/journal/":            "",
		"xcp/sr/journal/zero":        "1",
		"xcp/sr/journal/zero/u/more": "1",
		"xcp/sr/metadata":            "{}",
		"xcp/volume/u/metadata":      "{}",
	})
	want := []sm.Journal{
		{sm.JournalClone, "u1", "base_None"}, {sm.JournalClone, "u2", "base_snap"}, {sm.JournalInflate, "u", "1048576"},
		{sm.JournalLeaf, "c", "p"}, {"new-type", "u", "?"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(problems) != 3 {
		t.Errorf("problems: %v", problems)
	}
}

func TestExistence_String(t *testing.T) {
	for e, want := range map[sm.Existence]string{
		sm.Exists: "exists", sm.NotExists: "not-exists", sm.Creating: "creating", sm.ExistenceUnknown: "unknown", 7: "unknown",
	} {
		if e.String() != want {
			t.Errorf("%d: %s", int(e), e)
		}
	}
}

func FuzzParseVolumes(f *testing.F) {
	f.Add("xcp/volume/u/not-exists", "0", "xcp/volume/u/metadata", `{"vdi_type":"vhd"}`)
	f.Add("/xcp/volume/u/volume-name", "r", "xcp/volume/u/readonly-timestamp", "1700000000.5")
	f.Add("xcp/sr/journal/clone/u", "a_b", "xcp/volume//", "")
	f.Add("xcp/volume/u/updating-uuid-src", "v", "xcp/sr/journal/a/b/c", "1")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		kv := map[string]string{k1: v1, k2: v2}
		volumes, problems := sm.ParseVolumes(kv)
		journals, more := sm.Journals(kv)
		for uuid, v := range volumes {
			if uuid == "" || v.UUID != uuid || strings.Contains(uuid, "/") {
				t.Fatalf("volume %q: %+v", uuid, v)
			}
		}
		if len(volumes)+len(journals) > len(kv) {
			t.Fatalf("%d keys gave %d volumes and %d journals", len(kv), len(volumes), len(journals))
		}
		for _, p := range append(problems, more...) {
			if _, ok := kv[p.Key]; !ok || p.Text == "" {
				t.Fatalf("problem %+v", p)
			}
		}
		again, _ := sm.ParseVolumes(kv)
		if diff := cmp.Diff(volumes, again); diff != "" {
			t.Fatal(diff)
		}
	})
}
