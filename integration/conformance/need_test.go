package conformance

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// strict says that a missing program is a failure, as in CI, and no reason to skip.
func strict() bool { return os.Getenv("XOSTOR_TEST_STRICT") == "1" }

// lack skips the test with a reason, or fails it where everything must be there.
func lack(t testing.TB, reason string) {
	t.Helper()
	if strict() {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// need returns the path of a program: one of .tools (a path with a slash, such as "venv/bin/python") or one of $PATH.
func need(t testing.TB, program string) string {
	t.Helper()
	if filepath.Base(program) != program {
		path := filepath.Join(tools(t), program)
		if _, err := os.Stat(path); err != nil {
			lack(t, program+" is missing: run integration/conformance/setup.sh")
		}
		return path
	}
	path, err := exec.LookPath(program)
	if err != nil {
		lack(t, program+" is missing: install it, see integration/conformance/setup.sh")
	}
	return path
}

// tools is the module root's .tools folder, where setup.sh installs clients.
func tools(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".tools")
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the test")
		}
	}
}
