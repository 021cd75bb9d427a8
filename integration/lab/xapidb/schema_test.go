package xapidb_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// reference reads a file of the shared reference folder: in $XOSTOR_REFERENCE, else beside the module.
func reference(t *testing.T, name string) string {
	t.Helper()
	dirs := []string{os.Getenv("XOSTOR_REFERENCE")}
	for up := "."; len(up) < 30; up = filepath.Join("..", up) {
		dirs = append(dirs, filepath.Join(up, "..", "shared", "reference"))
	}
	for _, dir := range dirs {
		if text, err := os.ReadFile(filepath.Join(dir, name)); dir != "" && err == nil {
			return string(text)
		}
	}
	t.Skipf("%s is not here: set XOSTOR_REFERENCE to the reference folder", name)
	return ""
}

var recordText = regexp.MustCompile("(?m)^\\*\\*(\\w+)\\*\\* \\(\\d+ fields in 8.3; absent in 8.2: ([^)]*)\\)\n\n```json\n(.*)\n```")

// The order, the names and the shapes of the fields equal the example records of XAPI 25.33, class by class.
func TestSchemaEqualsReferenceRecords(t *testing.T) {
	found := recordText.FindAllStringSubmatch(reference(t, "xapi.md"), -1)
	if len(found) < 17 {
		t.Fatalf("%d records in the reference, want at least 17", len(found))
	}
	schema := xapidb.DefaultSchema()
	for _, m := range found {
		t.Run(m[1], func(t *testing.T) {
			class, ok := schema.Class(m[1])
			if !ok {
				t.Fatal("no such class")
			}
			names, values := members(t, m[3])
			var got []string
			for _, f := range class.Fields {
				got = append(got, f.Name)
				if f.Absent82 != strings.Contains(", "+m[2]+",", ", "+f.Name+",") {
					t.Errorf("%s: Absent82 = %v", f.Name, f.Absent82)
				}
			}
			if diff := cmp.Diff(names, got); diff != "" {
				t.Fatalf("fields (-reference +schema):\n%s", diff)
			}
			for i, f := range class.Fields {
				if !fits(f.Type, values[i]) {
					t.Errorf("%s is a %s in the schema, %T in the reference", f.Name, f.Type, values[i])
				}
			}
		})
	}
}

// members decodes a JSON object in the order of its text.
func members(t *testing.T, text string) (names []string, values []any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	if _, err := d.Token(); err != nil {
		t.Fatal(err)
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := d.Decode(&v); err != nil {
			t.Fatal(err)
		}
		names, values = append(names, name.(string)), append(values, v)
	}
	return names, values
}

func fits(t xapidb.Type, v any) bool {
	switch x := v.(type) {
	case string:
		return t.Kind == xapidb.String || t.Kind == xapidb.Ref || t.Kind == xapidb.Datetime
	case bool:
		return t.Kind == xapidb.Bool
	case float64:
		return t.Kind == xapidb.Int || t.Kind == xapidb.Float
	case []any:
		return t.Kind == xapidb.Set && (len(x) == 0 || fits(*t.Elem, x[0]))
	case map[string]any:
		for _, e := range x {
			if !fits(*t.Elem, e) {
				return false
			}
		}
		return t.Kind == xapidb.Map
	}
	return false
}

func TestDatabaseNamesOfFields(t *testing.T) {
	for path, want := range map[string]string{
		"VM.name_label": "name__label", "VM.name_description": "name__description", "VM.memory_static_max": "memory__static_max", "VM.VCPUs_max": "VCPUs__max",
		"VM.actions_after_shutdown": "actions__after_shutdown", "VM.PV_args": "PV__args", "VM.HVM_boot_policy": "HVM__boot_policy",
		"host.API_version_major": "API_version__major", "VBD.qos_algorithm_type": "qos__algorithm_type", "PIF_metrics.io_read_kbs": "io__read_kbs",
		"host_metrics.memory_total": "memory__total", "VM.power_state": "power_state", "VM.PCI_bus": "PCI_bus",
	} {
		class, field, _ := strings.Cut(path, ".")
		c, _ := xapidb.DefaultSchema().Class(class)
		f, ok := c.Field(field)
		if !ok || f.DBName != want {
			t.Errorf("%s: %q, want %q", path, f.DBName, want)
		}
	}
}
