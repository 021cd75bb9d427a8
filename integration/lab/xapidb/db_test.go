package xapidb_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// newDB is an empty repeatable database.
func newDB(t testing.TB, o xapidb.Options) *xapidb.DB {
	t.Helper()
	if o.Rand == nil {
		o.Rand = xapidb.SeededRand(1)
	}
	return xapidb.New(o)
}

func mustCreate(t testing.TB, db *xapidb.DB, class string, fields map[string]any) string {
	t.Helper()
	ref, err := db.Create(class, fields)
	if err != nil {
		t.Fatalf("create %s: %v", class, err)
	}
	return ref
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code string, params ...string) {
	t.Helper()
	var e *xapidb.Error
	if !errors.As(err, &e) || e.Code != code || len(params) > 0 && !cmp.Equal(e.Params, params) {
		t.Errorf("error %v, want %s%v", err, code, params)
	}
}

func TestSeedPool(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	p, err := db.SeedPool(xapidb.Seed{Hosts: 3})
	must(t, err)
	if got := xapidb.Value[[]string](db, "host", p.Hosts[1], "PIFs"); len(got) != 2 {
		t.Errorf("host.PIFs = %v, want two", got)
	}
	if got := xapidb.Value[[]string](db, "host", p.Hosts[1], "resident_VMs"); !cmp.Equal(got, []string{p.Dom0[1]}) {
		t.Errorf("host.resident_VMs = %v, want dom0", got)
	}
	if got := xapidb.Value[[]string](db, "network", p.Networks[0], "PIFs"); len(got) != 3 {
		t.Errorf("network.PIFs = %v, want three", got)
	}
}

func TestOldSchemaLeavesFieldsOut(t *testing.T) {
	db := newDB(t, xapidb.Options{Schema: xapidb.Schema82()})
	p, err := db.SeedPool(xapidb.Seed{Hosts: 2})
	must(t, err)
	r, err := db.Record("host", p.Hosts[0])
	must(t, err)
	if r.Get("API_version_minor") != int64(15) || r.Get("https_only") == nil || r.Get("tls_verification_enabled") != nil {
		t.Errorf("host record of 8.2: %v", r.Map())
	}
}

func TestSeedsGiveTheSameBytes(t *testing.T) {
	dump := func() string {
		db := newDB(t, xapidb.Options{Clock: func() time.Time { return time.Unix(1, 0) }})
		_, err := db.SeedPool(xapidb.Seed{Hosts: 2})
		must(t, err)
		text := ""
		for _, c := range db.Schema().Classes {
			for _, r := range db.Records(c.Name) {
				text += fmt.Sprint(r.Ref(), r.Map(), "\n")
			}
		}
		return text
	}
	if a, b := dump(), dump(); a != b {
		t.Error("two databases with one seed differ")
	}
}

func TestValuesAreChecked(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	vm := mustCreate(t, db, "VM", nil)
	for _, c := range []struct {
		field string
		in    any
		want  any
		code  string
	}{
		{"memory_static_max", 5, int64(5), ""},
		{"memory_static_max", " 17 ", int64(17), ""},
		{"memory_static_max", "x", nil, "FIELD_TYPE_ERROR"},
		{"memory_static_max", 1.5, nil, "FIELD_TYPE_ERROR"},
		{"HVM_shadow_multiplier", int64(2), 2.0, ""},
		{"HVM_shadow_multiplier", "2.5", 2.5, ""},
		{"is_a_template", true, true, ""},
		{"is_a_template", "true", nil, "FIELD_TYPE_ERROR"},
		{"name_label", "n", "n", ""},
		{"name_label", 7, nil, "FIELD_TYPE_ERROR"},
		{"tags", []any{"a", "b"}, []string{"a", "b"}, ""},
		{"tags", "a", nil, "FIELD_TYPE_ERROR"},
		{"other_config", map[string]any{"k": "v"}, map[string]string{"k": "v"}, ""},
		{"other_config", map[string]any{"k": 1}, nil, "FIELD_TYPE_ERROR"},
		{"snapshot_time", "20250319T04:16:24Z", time.Date(2025, 3, 19, 4, 16, 24, 0, time.UTC), ""},
		{"snapshot_time", "yesterday", nil, "FIELD_TYPE_ERROR"},
		{"power_state", "Running", "Running", ""},
		{"power_state", "Flying", nil, "INVALID_VALUE"},
		{"affinity", "", xapidb.NullRef, ""},
		{"VBDs", []string{"x"}, nil, "INTERNAL_ERROR"},
		{"nosuch", 1, nil, "INTERNAL_ERROR"},
	} {
		t.Run(fmt.Sprint(c.field, "=", c.in), func(t *testing.T) {
			err := db.Set("VM", vm, c.field, c.in)
			if c.code != "" {
				wantCode(t, err, c.code)
				return
			}
			must(t, err)
			if got, _ := db.Field("VM", vm, c.field); !cmp.Equal(got, c.want) {
				t.Errorf("got %#v, want %#v", got, c.want)
			}
		})
	}
}

func TestMapsAndSets(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	vm := mustCreate(t, db, "VM", nil)
	must(t, db.AddToMap("VM", vm, "other_config", "k", "v"))
	wantCode(t, db.AddToMap("VM", vm, "other_config", "k", "v"), "MAP_DUPLICATE_KEY", "VM", "other_config", vm, "k")
	before := db.Generation()
	must(t, db.RemoveFromMap("VM", vm, "other_config", "absent"))
	must(t, db.PutInMap("VM", vm, "other_config", "k", "v"))
	must(t, db.RemoveFromSet("VM", vm, "tags", "absent"))
	if db.Generation() != before {
		t.Error("writes that change nothing moved the generation")
	}
	must(t, db.RemoveFromMap("VM", vm, "other_config", "k"))
	must(t, db.AddToSet("VM", vm, "tags", "a"))
	must(t, db.AddToSet("VM", vm, "tags", "a"))
	if got := xapidb.Value[[]string](db, "VM", vm, "tags"); !cmp.Equal(got, []string{"a"}) {
		t.Errorf("tags = %v", got)
	}
	if got := xapidb.Value[map[string]string](db, "VM", vm, "other_config"); len(got) != 0 {
		t.Errorf("other_config = %v", got)
	}
	wantCode(t, db.AddToMap("VM", "OpaqueRef:none", "other_config", "k", "v"), "HANDLE_INVALID", "VM", "OpaqueRef:none")
	_, err := db.ByUUID("VM", "none")
	wantCode(t, err, "UUID_INVALID", "VM", "none")
}

func TestRecordsDoNotChange(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	sr := mustCreate(t, db, "SR", nil)
	vdi := mustCreate(t, db, "VDI", map[string]any{"SR": sr})
	before, err := db.Record("SR", sr)
	must(t, err)
	mustCreate(t, db, "VDI", map[string]any{"SR": sr})
	must(t, db.Destroy("VDI", vdi))
	must(t, db.AddToMap("SR", sr, "other_config", "k", "v"))
	if got := before.Get("VDIs"); !cmp.Equal(got, []string{vdi}) {
		t.Errorf("the record taken before has VDIs %v", got)
	}
	if got := before.Get("other_config"); len(got.(map[string]string)) != 0 {
		t.Errorf("the record taken before has other_config %v", got)
	}
}

func TestRelations(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	p, err := db.SeedPool(xapidb.Seed{Hosts: 2})
	must(t, err)
	vm := mustCreate(t, db, "VM", map[string]any{"resident_on": p.Hosts[0]})
	must(t, db.Set("VM", vm, "resident_on", p.Hosts[1]))
	residents := func(h int) []string { return xapidb.Value[[]string](db, "host", p.Hosts[h], "resident_VMs") }
	if diff := cmp.Diff([][]string{{p.Dom0[0]}, {p.Dom0[1], vm}}, [][]string{residents(0), residents(1)}); diff != "" {
		t.Errorf("resident_VMs after a move (-want +got):\n%s", diff)
	}
	must(t, db.Destroy("VM", vm))
	if got := residents(1); len(got) != 1 {
		t.Errorf("resident_VMs after destroy: %v", got)
	}
	bond := mustCreate(t, db, "Bond", map[string]any{"master": p.PIFs[0][0]})
	must(t, db.Set("PIF", p.PIFs[0][1], "bond_slave_of", bond))
	if got := xapidb.Value[[]string](db, "Bond", bond, "slaves"); !cmp.Equal(got, []string{p.PIFs[0][1]}) {
		t.Errorf("Bond.slaves = %v", got)
	}
}

func TestWhere(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	for _, v := range []struct {
		name, state string
		memory      int
		template    bool
	}{{"a", "Running", 1, false}, {"b", "Halted", 1, true}, {"c", "Halted", 2, false}} {
		mustCreate(t, db, "VM", map[string]any{"name_label": v.name, "power_state": v.state, "memory_static_max": v.memory, "is_a_template": v.template})
	}
	all := newDB(t, xapidb.Options{})
	mustCreate(t, all, "host", map[string]any{
		"capabilities": []string{"a", "b"}, "virtual_hardware_platform_versions": []any{"0", 2}, "other_config": map[string]string{"b": "", "a": "1"},
	})
	mustCreate(t, all, "SM", map[string]any{"features": map[string]any{"VDI_CREATE": 2}})
	mustCreate(t, all, "VM_metrics", map[string]any{"VCPUs_utilisation": map[string]any{"0": 0.5}, "VCPUs_flags": map[string]any{"0": []any{"x"}}})
	for _, c := range []struct{ expr, want string }{
		{`true`, "abc"},
		{`false`, ""},
		{`field "name__label" = "a"`, "a"},
		{`"a"=field "name__label"`, "a"},
		{`field "power_state"="Halted" and field "is_a_template"="false"`, "c"},
		{`field "memory__static_max"="1"`, "ab"},
		{`field "tags"="()"`, "abc"},
		{`field "affinity"="OpaqueRef:NULL"`, "abc"},
		{`(field "name__label"="a") or field "name__label"="b"`, "ab"},
		{`true or false and false`, ""},          // equal precedence, to the left
		{`not false and false`, "abc"},           // not (false and false)
		{`(not false) and false`, ""},            // the brackets that make it conventional
		{`not not field "name__label"="a"`, "a"}, //
		{`"x" = "x"`, "abc"},
	} {
		t.Run(c.expr, func(t *testing.T) {
			found, err := db.Where("VM", c.expr)
			must(t, err)
			got := ""
			for _, r := range found {
				got += r.Get("name_label").(string)
			}
			if got != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
		})
	}
	for expr, class := range map[string]string{
		`field "capabilities"="('a' 'b')" and field "virtual_hardware_platform_versions"="('0' '2')"`:       "host",
		`field "other_config"="(('a' '1') ('b' ''))" and field "last_software_update"="19700101T00:00:00Z"`: "host",
		`field "features"="(('VDI_CREATE' '2'))"`:                                                           "SM",
		`field "VCPUs__utilisation"="(('0' '0.5'))" and field "VCPUs__flags"="(('0' ('x')))"`:               "VM_metrics",
	} {
		found, err := all.Where(class, expr)
		must(t, err)
		if len(found) != 1 {
			t.Errorf("%s found %d of 1", expr, len(found))
		}
	}
	for _, bad := range []string{``, `field`, `field "a"`, `field "a" =`, `"a" = `, `(true`, `true)`, `true true`, `and`, `field "a" = b`, `"a`, `TRUE`} {
		_, err := db.Where("VM", bad)
		wantCode(t, err, "INVALID_VALUE")
	}
	_, err := db.Where("VM", `field "name_label" = "a"`)
	wantCode(t, err, "INTERNAL_ERROR")
}

func FuzzWhere(f *testing.F) {
	for _, seed := range []string{`field "a"="b" and not (true or "x"=field "y")`, `not not not`, `((((`, `field"a"="b"or"c"="d"`, "\"\x00\"=\"\""} {
		f.Add(seed)
	}
	db := newDB(f, xapidb.Options{})
	mustCreate(f, db, "VM", nil)
	f.Fuzz(func(t *testing.T, text string) {
		found, err := db.Where("VM", text)
		if err == nil && len(found) > 1 {
			t.Errorf("%d rows of one", len(found))
		}
		var e *xapidb.Error
		if err != nil && !errors.As(err, &e) {
			t.Errorf("error without a code: %v", err)
		}
	})
}
