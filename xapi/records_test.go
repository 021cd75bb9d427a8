package xapi

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"testing"
)

// referenceFile reads a reference document, which lives beside the module or where XOSTOR_REFERENCE says.
func referenceFile(t *testing.T, name string) []byte {
	t.Helper()
	dirs := []string{os.Getenv("XOSTOR_REFERENCE")}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir := wd; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		dirs = append(dirs, filepath.Join(dir, "shared", "reference"))
	}
	for _, dir := range dirs {
		if b, err := os.ReadFile(filepath.Join(dir, name)); dir != "" && err == nil {
			return b
		}
	}
	t.Skipf("reference document %s is not here; set XOSTOR_REFERENCE to its folder", name)
	return nil
}

// TestRecordsMatchTheDataModel holds the field names and types of the records to the example records that were made from XAPI's own data model.
func TestRecordsMatchTheDataModel(t *testing.T) {
	text := referenceFile(t, "xapi.md")
	examples := map[string]json.RawMessage{}
	for _, m := range regexp.MustCompile("(?s)\\*\\*(\\w+)\\*\\* \\(\\d+ fields[^\n]*\n+```json\n(.*?)\n```").FindAllSubmatch(text, -1) {
		examples[string(m[1])] = m[2]
	}
	for class, record := range map[string]any{
		"pool": &Pool{}, "host": &Host{}, "host_metrics": &HostMetrics{}, "SR": &SR{}, "PBD": &PBD{}, "VDI": &VDI{}, "VBD": &VBD{}, "VM": &VM{},
		"PIF": &PIF{}, "PIF_metrics": &PIFMetrics{}, "network": &Network{}, "task": &Task{}, "message": &Message{},
	} {
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(examples[class], &fields); err != nil {
			t.Errorf("%s: no example record: %v", class, err)
			continue
		}
		typ := reflect.TypeOf(record).Elem()
		for i := range typ.NumField() {
			if tag := typ.Field(i).Tag.Get("json"); fields[tag] == nil {
				t.Errorf("%s: XAPI has no field %q", class, tag)
			}
		}
		if err := json.Unmarshal(examples[class], record); err != nil {
			t.Errorf("%s: %v", class, err)
		}
		if className(class) != class {
			t.Errorf("class %s is called %s", class, className(class))
		}
	}
}
