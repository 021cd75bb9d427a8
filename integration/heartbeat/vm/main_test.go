package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestMain is process 1 of the machines, too: the test's program is their init.
func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		fmt.Fprintln(os.Stderr, "init:", BeGuest())
		os.Exit(1)
	}
	if len(os.Args) > 3 && os.Args[1] == inHost {
		fmt.Fprintln(os.Stderr, "enter host:", enterHost(os.Args[2], os.Args[3:]))
		os.Exit(1)
	}
	if len(os.Args) > 3 && os.Args[1] == beatProgram {
		index, err := strconv.Atoi(os.Args[3])
		if err == nil {
			err = runBeat(os.Args[2], index)
		}
		fmt.Fprintln(os.Stdout, "beat:", err)
		os.Exit(1)
	}
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// lack skips the test with a reason, or fails it where everything must be there.
func lack(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// moduleRoot is the folder with go.mod.
func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the test")
		}
	}
}

// alone skips the test unless it is said to have the machine for itself. An emulated machine is a tenth as fast as this one;
// beside a dozen other tests it may not boot in minutes (measured: load 28 on 2 processors). CI runs these tests last.
func alone(t testing.TB) {
	t.Helper()
	if os.Getenv("XOSTOR_TEST_VM") != "1" {
		t.Skip("XOSTOR_TEST_VM is not 1: make vm runs this test by itself")
	}
}

// kernel is the one that XOSTOR_VM_KERNEL names (a folder with boot and lib/modules), or the one that setup.sh unpacked.
func kernel(t testing.TB) *Kernel {
	t.Helper()
	if _, err := exec.LookPath(Emulator); err != nil {
		lack(t, Emulator+" is missing: apt-get install --no-install-recommends qemu-system-x86")
	}
	root := os.Getenv("XOSTOR_VM_KERNEL")
	if root == "" {
		root = filepath.Join(moduleRoot(t), ".tools", "vm")
	}
	k, err := OpenKernel(root)
	if err != nil {
		lack(t, err.Error())
	}
	return k
}

var built struct {
	once sync.Once
	dir  string
	err  error
}

// programs builds the guest's static programs once: this test as "init" and the shim.
func programs(t testing.TB) (init, shim string) {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "vmbin"); built.err != nil {
			return
		}
		for _, args := range [][]string{{"test", "-ldflags=-s", "-c", "-o", filepath.Join(built.dir, "init"), "."},
			{"build", "-ldflags=-s", "-o", filepath.Join(built.dir, "xostor-heartbeat"), "../../../cmd/xostor-heartbeat"}} {
			cmd := exec.Command("go", args...)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				built.err = fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, out)
				return
			}
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, "init"), filepath.Join(built.dir, "xostor-heartbeat")
}

// boot starts a machine that ends with the test.
func boot(t testing.TB, c Config) *Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	start := time.Now()
	m, err := Boot(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Kill)
	t.Logf("kernel %s booted in %v", c.Kernel.Release, time.Since(start).Round(time.Millisecond))
	return m
}

// inGuest runs the calling test once more, in a machine, where it finds InGuest true.
func inGuest(t *testing.T, m *Machine, flags ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 19*time.Minute)
	defer cancel()
	p, err := m.Start(append([]string{"/init", "-test.run", "^" + t.Name() + "$", "-test.v", "-test.timeout", "18m", "-test.parallel", "64"}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	p.Lines(func(line string) {
		if !strings.HasPrefix(line, "=== ") {
			t.Log(line)
		}
	})
	code, err := p.Wait(ctx)
	if err != nil || code != 0 {
		t.Fatalf("in the machine: code %d, %v\nconsole:\n%s", code, err, tail(m.Console(), 40))
	}
}

// tail is the last n lines.
func tail(s string, n int) string {
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
