package conformance

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorface"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

const gibKiB = 1 << 20

// startLINSTOR serves a cluster of three hosts with a thin pool each and returns it with its address.
func startLINSTOR(t *testing.T, version string) (*linstorsim.Cluster, string) {
	t.Helper()
	sim := linstorsim.New(linstorsim.Config{Version: version})
	for i, name := range []string{"hostA", "hostB", "hostC"} {
		sim.AddNode(name, []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}[i])
		sim.AddPool(name, "thin", "LVM_THIN", 100*gibKiB)
	}
	face := linstorface.New(sim)
	addr, err := face.ServeTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := face.Close(); err != nil {
			t.Error(err)
		}
	})
	return sim, addr
}

// TestLINSTORPythonLibrary runs what XOSTOR's storage driver does through LINBIT's python-linstor, against the toggle-disk of both
// generations.
func TestLINSTORPythonLibrary(t *testing.T) {
	python := need(t, "venv/bin/python")
	for _, version := range []string{linstorsim.Version133, linstorsim.Version134} {
		t.Run(version, func(t *testing.T) {
			_, addr := startLINSTOR(t, version)
			var stderr bytes.Buffer
			cmd := exec.CommandContext(t.Context(), python, filepath.Join("testdata", "linstor_python.py"), "linstor://"+addr)
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				if strings.Contains(stderr.String(), "No module named 'linstor'") {
					lack(t, "python-linstor is missing: run integration/conformance/setup.sh")
				}
				t.Fatalf("%v\n%s", err, stderr.String())
			}
			var got map[string]any
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			node := func(name, address string) any { return []any{name, "COMBINED", "ONLINE", address} }
			place := func(name, pool, state string, allocated bool, flags ...any) any {
				return []any{name, append([]any{}, flags...), state, []any{false}, pool, allocated}
			}
			pool := func(name string, free float64) any { return []any{name, "LVM_THIN", free, float64(100 * gibKiB)} }
			// A thin replica starts with DRBD's metadata: 36 KiB and 3 slots x 32 KiB a GiB, in chunks of 64 KiB.
			const meta = 192
			want := map[string]any{
				"version": version,
				"nodes":   []any{node("hostA", "10.0.0.1"), node("hostB", "10.0.0.2"), node("hostC", "10.0.0.3")},
				"groups":  []any{"DfltRscGrp", "xcp-sr-py"}, "definition": []any{"xcp-volume-py", "xcp-sr-py", 3.0, float64(gibKiB)},
				"placed": []any{place("hostA", "thin", "UpToDate", true), place("hostB", "thin", "UpToDate", true),
					place("hostC", "DfltDisklessStorPool", "Diskless", false, "DISKLESS", "DRBD_DISKLESS", "TIE_BREAKER")},
				"three":     []any{place("hostA", "thin", "UpToDate", true), place("hostB", "thin", "UpToDate", true), place("hostC", "thin", "UpToDate", true)},
				"resources": []any{"hostA", "hostB", "hostC"},
				"pools":     []any{pool("hostA", 100*gibKiB-meta), pool("hostB", 100*gibKiB-meta), pool("hostC", 100*gibKiB)},
				"kv":        []any{[]any{"not-exists", "0"}, []any{"volume-name", "xcp-volume-py"}}, "kv cleared": []any{},
				"snapshots": []any{[]any{"snap1", []any{"hostA", "hostB"}}}, "delete missing": []any{false},
				"max volume": true, "size info": true, "left": []any{},
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// TestLINSTORCommand runs LINBIT's `linstor` command itself. It is not to be had as a package: XOSTOR_LINSTOR_CLIENT names the
// script of a checkout (linstor_client_main.py), which the venv's python runs.
func TestLINSTORCommand(t *testing.T) {
	script := os.Getenv("XOSTOR_LINSTOR_CLIENT")
	if script == "" {
		t.Skip("XOSTOR_LINSTOR_CLIENT does not name a checkout's linstor_client_main.py")
	}
	python := need(t, "venv/bin/python")
	sim, addr := startLINSTOR(t, linstorsim.Version133)
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), python, slices.Concat([]string{script, "--no-color", "--no-utf8", "--controllers", addr}, args)...)
		cmd.Env = append(os.Environ(), "PYTHONPATH="+filepath.Dir(script), "LANG=C.UTF-8")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("linstor %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	shows := func(out string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("no %q in\n%s", w, out)
			}
		}
	}
	shows(run("node", "list"), "hostA", "COMBINED", "10.0.0.2:3366", "Online")
	run("resource-group", "create", "xcp-sr-cli", "--place-count", "2", "--storage-pool", "thin")
	run("volume-group", "create", "xcp-sr-cli")
	run("resource-group", "spawn-resources", "xcp-sr-cli", "vol-cli", "1GiB")
	shows(run("resource-group", "list"), "xcp-sr-cli", "PlaceCount: 2")
	shows(run("resource-definition", "list"), "vol-cli", "xcp-sr-cli", "ok")
	shows(run("volume-definition", "list"), "vol-cli", "1 GiB")
	shows(run("resource", "list", "--all"), "vol-cli", "UpToDate", "TieBreaker", "Unused")
	shows(run("volume", "list"), "vol-cli", "thin", "/dev/drbd1000", "UpToDate")
	shows(run("storage-pool", "list"), "LVM_THIN", "100 GiB", "DfltDisklessStorPool")
	run("resource", "toggle-disk", "hostC", "vol-cli", "--storage-pool", "thin")
	run("resource", "toggle-disk", "hostC", "vol-cli", "--diskless")
	run("resource", "make-available", "hostC", "vol-cli")
	if err := sim.SetInUse("vol-cli", "hostC", true); err != nil {
		t.Error(err)
	}
	shows(run("resource", "list"), "InUse")
	if err := sim.SetInUse("vol-cli", "hostC", false); err != nil {
		t.Error(err)
	}
	sim.SetNode("hostB", linstorsim.StatusOffline)
	shows(run("node", "list"), "OFFLINE")
	shows(run("resource", "list"), "Unknown")
	shows(run("storage-pool", "list"), "No active connection to satellite 'hostB'")
	sim.SetNode("hostB", linstorsim.StatusOnline)
	run("resource", "delete", "hostC", "vol-cli")
	run("resource-definition", "delete", "vol-cli")
	run("resource-group", "delete", "xcp-sr-cli")
	run("controller", "version")
	run("key-value-store", "modify", "kv-cli", "a", "b")
	shows(run("key-value-store", "show", "kv-cli"), "a", "b")
}
