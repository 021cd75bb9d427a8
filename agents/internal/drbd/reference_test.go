package drbd_test

import (
	"os"
	"path/filepath"
	"testing"
)

// traces finds the recorded traces, or skips the test.
func traces(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("XOSTOR_REFERENCE")
	if dir == "" {
		wd, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		for ; wd != filepath.Dir(wd); wd = filepath.Dir(wd) {
			if _, err := os.Stat(filepath.Join(wd, "go.mod")); err == nil {
				dir = filepath.Join(wd, "..", "shared", "reference")
				break
			}
		}
	}
	dir = filepath.Join(dir, "traces")
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no recorded traces: set XOSTOR_REFERENCE to the folder that holds traces/ (%v)", err)
	}
	return dir
}
