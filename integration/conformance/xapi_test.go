package conformance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

// xapiPool is a pool of two hosts on two loopback addresses and one port, with an XOSTOR SR and one halted VM with a disk.
type xapiPool struct {
	xapidb.Pool
	db        *xapidb.DB
	face      *xapiface.Face
	url, unix string // of the coordinator
	supporter string // URL of the other host
	sr, vm    string
}

func startXAPI(t *testing.T) xapiPool {
	t.Helper()
	db := xapidb.New(xapidb.Options{})
	p, err := db.SeedPool(xapidb.Seed{Hosts: 2, Address: []string{"127.0.0.1", "127.0.0.2"}})
	if err != nil {
		t.Fatal(err)
	}
	x := xapiPool{Pool: p, db: db, face: xapiface.New(xapiface.Options{DB: db, Password: "secret"})}
	t.Cleanup(func() {
		if err := x.face.Close(); err != nil {
			t.Error(err)
		}
	})
	create := func(class string, fields map[string]any) string {
		ref, err := db.Create(class, fields)
		if err != nil {
			t.Fatal(err)
		}
		return ref
	}
	x.sr = create("SR", map[string]any{"name_label": "XOSTOR", "type": "linstor", "content_type": "user", "shared": true, "physical_size": int64(1) << 40})
	for _, h := range p.Hosts {
		create("PBD", map[string]any{"host": h, "SR": x.sr, "currently_attached": true, "device_config": map[string]string{"group-name": "linstor_group/thin_device"}})
	}
	metrics := create("VM_metrics", nil)
	x.vm = create("VM", map[string]any{
		"name_label": "vm1", "memory_static_max": int64(8) << 30, "HVM_shadow_multiplier": 1.0, "metrics": metrics, "affinity": p.Hosts[1],
	})
	vdi := create("VDI", map[string]any{"name_label": "vm1 disk 0", "SR": x.sr, "virtual_size": int64(10) << 30})
	create("VBD", map[string]any{"VM": x.vm, "VDI": vdi, "userdevice": "0", "device": "xvda"})
	x.face.Handle("host.call_plugin", func(_ context.Context, c *xapiface.Call) (any, error) {
		if c.Str(1) == "echo.py" {
			return c.Map(3)["text"], nil
		}
		return nil, xapidb.Errorf("XENAPI_MISSING_PLUGIN", c.Str(1))
	})
	first, err := x.face.ServeTCP("127.0.0.1:0", p.Hosts[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(first.Addr())
	if err != nil {
		t.Fatal(err)
	}
	second, err := x.face.ServeTCP(net.JoinHostPort("127.0.0.2", port), p.Hosts[1], nil)
	if err != nil {
		t.Fatal(err)
	}
	x.url, x.supporter = "http://"+first.Addr(), "http://"+second.Addr()
	x.unix = shortPath(t)
	if _, err := x.face.ServeUnix(x.unix, p.Hosts[0]); err != nil {
		t.Fatal(err)
	}
	return x
}

// shortPath is a socket path without underscores, which the Python binding turns into slashes, and short enough for a socket.
func shortPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "xapi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "xapi")
}

// run starts a client and decodes the JSON object that it prints.
func run(t *testing.T, env []string, name string, args ...string) map[string]any {
	t.Helper()
	text := output(t, 0, env, name, args...)
	var out map[string]any
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%s printed %q: %v", filepath.Base(name), text, err)
	}
	return out
}

// output starts a client and returns what it prints; another exit code than want fails the test.
func output(t *testing.T, want int, env []string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != want {
		t.Fatalf("%s %s: %v, want exit code %d\n%s%s", filepath.Base(name), strings.Join(args, " "), err, want, stdout.String(), stderr.String())
	}
	return stdout.String()
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestXAPINodeXenAPI(t *testing.T) {
	node := need(t, "node")
	library := "file://" + need(t, "npm/node_modules/xen-api/index.mjs")
	for _, transport := range []string{"json-rpc", "xml-rpc", "auto"} {
		for _, role := range []string{"coordinator", "supporter"} {
			t.Run(transport+"/"+role, func(t *testing.T) {
				x := startXAPI(t)
				url := x.url
				if role == "supporter" {
					url = x.supporter
				}
				out := run(t, []string{"NODE_NO_WARNINGS=1"}, node, "testdata/xapi_watch.mjs", library, url, transport, x.vm, x.sr)
				checkWatched(t, x, out, transport == "xml-rpc")
			})
		}
	}
}

// checkWatched compares what the client saw. Over XML-RPC XAPI types neither ints nor strings, so the library hands out ints as strings and datetimes as dates.
func checkWatched(t *testing.T, x xapiPool, out map[string]any, untyped bool) {
	t.Helper()
	intType, dateType, size, date, vdiSize := "number", "string", any(float64(8<<30)), "19700101T00:00:00Z", any(float64(1<<30))
	if untyped {
		intType, dateType, size, date, vdiSize = "string", "object", "8589934592", "1970-01-01T00:00:00.000Z", "1073741824"
	}
	same(t, "pool", out["pool"], "xostor-pool")
	counts, _ := out["counts"].(map[string]any)
	for class, n := range map[string]float64{"host": 2, "host_metrics": 2, "VM": 3, "PIF": 4, "PIF_metrics": 4, "network": 2, "SR": 1, "PBD": 2, "VDI": 1, "VBD": 1, "pool": 1} {
		if counts[class] != n {
			t.Errorf("%v objects of class %s, want %v", counts[class], class, n)
		}
	}
	same(t, "types", out["types"], map[string]any{
		"name_label": "string", "memory_static_max": intType, "is_a_template": "boolean", "HVM_shadow_multiplier": "number", "snapshot_time": dateType,
		"other_config": "object", "VBDs": "object",
	})
	same(t, "values", out["values"], []any{size, false, 1.0, date, ""})
	same(t, "result of a void call", out["start"], "")
	same(t, "failure of a task", out["failure"], map[string]any{"code": "VM_BAD_POWER_STATE", "params": []any{x.vm, "halted", "running"}})
	same(t, "failure of a call", out["bad"], map[string]any{"code": "HANDLE_INVALID", "params": []any{"VM", "OpaqueRef:none"}})
	same(t, "size of the new VDI", out["vdiSize"], vdiSize)
	same(t, "VDI is gone", out["gone"], true)
	if s, _ := out["snapshot"].(string); !strings.HasPrefix(s, "OpaqueRef:") {
		t.Errorf("result of Async.VDI.snapshot = %q, want a ref", s)
	}
	same(t, "power state", xapidb.Value[string](x.db, "VM", x.vm, "power_state"), "Running")
	same(t, "description", xapidb.Value[string](x.db, "VM", x.vm, "name_description"), `é <seen> & "quoted"`)
	same(t, "sessions left", x.db.Len("session"), 0)
	same(t, "tasks left", x.db.Len("task"), 0)
	if n := taskRefetches(x.face); n > 1 {
		t.Errorf("task.get_all_records was called %d times: valid_ref_counts did not compare as numbers", n)
	}
}

// A restart takes the sessions and the tombstones: the client must not keep what was destroyed meanwhile.
func TestXAPINodeXenAPIAcrossRestart(t *testing.T) {
	node := need(t, "node")
	library := "file://" + need(t, "npm/node_modules/xen-api/index.mjs")
	for _, transport := range []string{"json-rpc", "xml-rpc"} {
		t.Run(transport, func(t *testing.T) {
			x := startXAPI(t)
			gone, err := x.db.Create("VM", map[string]any{"name_label": "gone"})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, node, "testdata/xapi_restart.mjs", library, x.url, transport, x.vm, gone)
			cmd.Env = append(os.Environ(), "NODE_NO_WARNINGS=1")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(stdout)
			if !lines.Scan() || lines.Text() != "synced" {
				t.Errorf("client said %q: %s", lines.Text(), stderr.String())
			}
			x.face.SetFault(x.Hosts[0], xapiface.Fault{Kind: xapiface.Refuse}) // Nobody is told of the deletion.
			if err := x.db.Destroy("VM", gone); err != nil {
				t.Error(err)
			}
			x.face.Restart()
			if err := x.db.Set("VM", x.vm, "name_description", "after"); err != nil {
				t.Error(err)
			}
			if err := x.face.ClearFaults(x.Hosts[0]); err != nil {
				t.Error(err)
			}
			if !lines.Scan() || lines.Text() != "seen" {
				t.Errorf("after the restart the client said %q: %s", lines.Text(), stderr.String())
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v: %s", err, stderr.String())
			}
		})
	}
}

func taskRefetches(f *xapiface.Face) int {
	n := 0
	for _, c := range f.Calls() {
		if c.Method == "task.get_all_records" {
			n++
		}
	}
	return n
}

func TestXAPIPythonBinding(t *testing.T) {
	python := need(t, "venv/bin/python")
	for _, way := range []string{"tcp", "unix"} {
		t.Run(way, func(t *testing.T) {
			x := startXAPI(t)
			url := x.url
			if way == "unix" {
				if strings.Contains(x.unix, "_") {
					t.Skipf("the binding cannot dial %s: it turns underscores into slashes", x.unix)
				}
				url = "http://" + strings.ReplaceAll(x.unix, "/", "_") + "/"
			}
			out := run(t, nil, python, "testdata/xapi_python.py", url, x.vm, x.sr, pythonTypes(t, x.db))
			same(t, "fields of wrong type", out["wrong"], []any{})
			if n, _ := out["checked"].(float64); n < 1000 {
				t.Errorf("%v fields checked, want at least 1000", out["checked"])
			}
			same(t, "API version", out["version"], "2.21")
			same(t, "this host", out["host"], "xcp1")
			same(t, "types", out["types"], map[string]any{
				"name_label": "str", "memory_static_max": "str", "is_a_template": "bool", "HVM_shadow_multiplier": "float", "snapshot_time": "DateTime",
				"other_config": "dict", "VBDs": "list", "name_description": "str",
			})
			same(t, "multiplier", out["multiplier"], 1.0)
			same(t, "first events", out["events"], []any{[]any{"sr", "add"}, []any{"vm", "add"}})
			same(t, "type of valid_ref_counts", out["counts"], "int")
			same(t, "second events", out["seen"], []any{[]any{"vm", "mod", "é <seen>"}})
			same(t, "idle", out["idle"], []any{})
			same(t, "duplicate key", out["duplicate"], "MAP_DUPLICATE_KEY")
			same(t, "SR size without _sm_session", out["refused"], "PERMISSION_DENIED")
			same(t, "SR size", out["size"], "3298534883328")
			same(t, "task", out["task"], "success")
			same(t, "running VMs", out["found"], 1.0)
			same(t, "sessions left", x.db.Len("session"), 0)
			if out["after"] == nil {
				t.Error("a call after logout succeeded")
			}
		})
	}
}

// pythonTypes writes, as JSON in a file, the type that each field of each class must have for a Python client, in the order of the wire.
func pythonTypes(t *testing.T, db *xapidb.DB) string {
	t.Helper()
	names := map[xapidb.Kind]string{
		xapidb.String: "str", xapidb.Ref: "str", xapidb.Int: "str", xapidb.Bool: "bool", xapidb.Float: "float", xapidb.Datetime: "DateTime", xapidb.Set: "list", xapidb.Map: "dict",
	}
	classes := map[string][][2]string{}
	for _, c := range db.Schema().Classes {
		for _, f := range c.Fields {
			classes[c.Name] = append(classes[c.Name], [2]string{f.Name, names[f.Type.Kind]})
		}
	}
	text, err := json.Marshal(classes)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "types.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestXAPIOpenStackBinding(t *testing.T) {
	const python = "/usr/bin/python3" // Debian's modules belong to Debian's interpreter.
	if err := exec.Command(python, "-c", "import os_xenapi.client.session").Run(); err != nil {
		lack(t, "python3-os-xenapi is missing: apt-get install python3-os-xenapi")
	}
	x := startXAPI(t)
	for _, url := range []string{x.url, x.supporter} {
		out := run(t, nil, python, "testdata/xapi_openstack.py", url)
		same(t, "product", out["product"], []any{[]any{8.0, 3.0, 0.0}, "XCP-ng"})
		same(t, "platform", out["platform"], []any{3.0, 4.0, 0.0})
		same(t, "host", out["host"], xapidb.Value[string](x.db, "host", x.Hosts[0], "uuid"))
		same(t, "SR type", out["sr"], "linstor")
		same(t, "plugin", out["plugin"], "é & <hello>")
		same(t, "VMs", out["vms"], 1.0)
		same(t, "networks", out["networks"], 2.0)
		same(t, "PBDs", out["pbds"], 2.0)
		same(t, "size", out["size"], "1073741824")
		gone, _ := out["gone"].([]any)
		if len(gone) != 3 || gone[0] != "HANDLE_INVALID" {
			t.Errorf("record of a destroyed VDI: %v", gone)
		}
	}
}

func TestXAPIFenceAgent(t *testing.T) {
	fence := need(t, "fence_xenapi")
	x := startXAPI(t)
	agent := func(want int, args ...string) string {
		return output(t, want, nil, fence, append([]string{"--session-url=" + x.url, "--username=root", "--password=secret", "--quiet"}, args...)...)
	}
	power := func() string { return xapidb.Value[string](x.db, "VM", x.vm, "power_state") }
	id := xapidb.Value[string](x.db, "VM", x.vm, "uuid")

	if got := strings.TrimSpace(agent(0, "--action=list")); got != id+",vm1" {
		t.Errorf("list printed %q, want %q", got, id+",vm1")
	}
	agent(2, "--action=status", "--plug=vm1")
	agent(0, "--action=on", "--plug=vm1")
	same(t, "after on", power(), "Running")
	same(t, "host", xapidb.Value[string](x.db, "VM", x.vm, "resident_on"), x.Hosts[1])
	agent(0, "--action=status", "--plug=vm1")
	agent(0, "--action=off", "--plug=vm1")
	same(t, "after off", power(), "Halted")
	agent(1, "--action=status", "--plug=nosuch")
}
