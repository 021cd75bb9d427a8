package lab_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

func servedPool(t *testing.T) *lab.Pool {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab") // t.TempDir's names are too long for sockets.
	ok(t, err)
	t.Cleanup(func() { ok(t, os.RemoveAll(dir)) })
	p := newPool(t, lab.Options{Dir: dir, Clock: lab.WallClock{}})
	faces := must[[]lab.HostFaces](t)(p.Serve())
	if len(faces) != 3 {
		t.Fatalf("faces of %d hosts", len(faces))
	}
	return p
}

func role(t *testing.T, p *lab.Pool, host string) string {
	t.Helper()
	return string(must[[]byte](t)(os.ReadFile(p.FacesOf(host).PoolConf)))
}

// Each host's folder makes a program believe that it runs there, and follows the coordinator.
func TestHostFolders(t *testing.T) {
	p := servedPool(t)
	if role(t, p, "xcp1") != "master" || role(t, p, "xcp2") != "slave:10.0.0.11" {
		t.Errorf("roles %q and %q", role(t, p, "xcp1"), role(t, p, "xcp2"))
	}
	ok(t, p.MoveCoordinator("xcp2"))
	if role(t, p, "xcp1") != "slave:10.0.0.12" || role(t, p, "xcp2") != "master" || p.Coordinator().Name != "xcp2" {
		t.Errorf("after the move: roles %q and %q, coordinator %s", role(t, p, "xcp1"), role(t, p, "xcp2"), p.Coordinator().Name)
	}
	inventory := string(must[[]byte](t)(os.ReadFile(p.FacesOf("xcp3").Inventory)))
	if !strings.Contains(inventory, "INSTALLATION_UUID='"+p.Host("xcp3").UUID+"'") {
		t.Errorf("inventory %q", inventory)
	}
	again := must[[]lab.HostFaces](t)(p.Serve())
	if len(again) != 3 {
		t.Error("a second Serve is not the same")
	}
}

func get(ctx context.Context, url string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	// One connection per call: the tests look at ports that open and close.
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// One host's controller port answers, the others refuse; it moves, goes down with its host, and misbehaves on demand.
func TestControllerPort(t *testing.T) {
	p := servedPool(t)
	const path = "/v1/controller/version"
	answers := func() (list []int) {
		for i, addr := range p.Controllers() {
			status, _, err := get(t.Context(), "http://"+addr+path)
			switch {
			case err == nil && status == http.StatusOK:
				list = append(list, i)
			case !errors.Is(err, syscall.ECONNREFUSED):
				t.Errorf("controller port of host %d: status %d, %v", i, status, err)
			}
		}
		return list
	}
	check := func(when string, want ...int) {
		t.Helper()
		got := answers()
		if len(got) != len(want) || len(got) == 1 && got[0] != want[0] {
			t.Errorf("%s: hosts %v answer, want %v", when, got, want)
		}
	}
	check("at start", 0)
	ok(t, p.MoveController("xcp2"))
	check("moved", 1)
	p.HostDown("xcp2")
	check("its host is down")
	ok(t, p.HostUp("xcp2"))
	check("its host is back", 1)
	p.ControllerDown()
	check("down")
	ok(t, p.ControllerUp())
	check("up", 1)
	p.HostDown("xcp3")
	if err := p.MoveController("xcp3"); err == nil {
		t.Error("moved to a host that is down")
	}

	must[string](t)(p.CreateDisk(gib))
	base := "http://" + p.Controllers()[1]
	p.SetControllerAnswer(lab.HTMLError)
	if status, body, err := get(t.Context(), base+path); err != nil || status != 500 || !strings.Contains(body, "<html>") {
		t.Errorf("html: %d %q %v", status, body, err)
	}
	p.SetControllerAnswer(lab.Truncated)
	if _, body, err := get(t.Context(), base+"/v1/nodes"); err != nil || json.Valid([]byte(body)) {
		t.Errorf("truncated: %q %v", body, err)
	}
	p.SetControllerAnswer(lab.Garbage)
	if _, body, err := get(t.Context(), base+"/v1/view/resources"); err != nil || !strings.Contains(body, "\xff") {
		t.Errorf("garbage: %q %v", body, err)
	}
	p.SetControllerAnswer(lab.Hung)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := get(ctx, base+path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hung: %v, want no answer", err)
	}
	p.SetControllerAnswer(lab.Good)
	check("good again", 1)
}

func TestXAPISocketFaults(t *testing.T) {
	p := servedPool(t)
	dial := func(host string) error {
		c, err := net.Dial("unix", p.FacesOf(host).Socket)
		if err == nil {
			err = c.Close()
		}
		return err
	}
	ok(t, dial("xcp1"))
	p.HostDown("xcp2")
	if dial("xcp1") != nil || dial("xcp2") == nil {
		t.Error("only the dead host's socket must be gone")
	}
	p.XAPIDown()
	if dial("xcp1") == nil {
		t.Error("XAPI is down and answers")
	}
	ok(t, p.XAPIUp())
	if dial("xcp1") != nil || dial("xcp2") == nil {
		t.Error("XAPIUp must not raise the dead")
	}
}

// A client's calls are the pool's verbs.
func TestClientCallsAreVerbs(t *testing.T) {
	p := newPool(t, lab.Options{Clock: lab.WallClock{}})
	ctx := t.Context()
	session := must[string](t)(p.XAPI().Login("test"))
	call := func(method string, params ...any) any {
		t.Helper()
		return must[any](t)(p.XAPI().Do(ctx, "", method, append([]any{session}, params...)...))
	}
	sr := must[string](t)(p.DB().ByUUID("SR", p.SR()))
	vdi := call("VDI.create", map[string]any{"name_label": "by a client", "SR": sr, "virtual_size": "10737418240", "type": "user", "sharable": false, "read_only": false,
		"other_config": map[string]any{}}).(string)
	uuid := xapidb.Value[string](p.DB(), "VDI", vdi, "uuid")
	if p.Resource(uuid) == "" || xapidb.Value[string](p.DB(), "VDI", vdi, "name_label") != "by a client" {
		t.Error("VDI.create made no disk")
	}
	snap := call("VDI.snapshot", vdi, map[string]any{}).(string)
	call("VDI.destroy", snap)
	call("VDI.resize", vdi, "21474836480")
	vm := must[string](t)(p.DB().ByUUID("VM", must[string](t)(p.CreateVM("guest", uuid))))
	call("VM.start", vm, false, false)
	call("VM.pool_migrate", vm, p.Host("xcp3").Ref, map[string]any{})
	if usedOn(p, p.Resource(uuid)) != "xcp3" {
		t.Errorf("after pool_migrate the disk is used on %q", usedOn(p, p.Resource(uuid)))
	}
	ok(t, p.WriteDisk(uuid, gib))
	if p.True() {
		t.Error("XAPI heard of a write")
	}
	call("SR.scan", sr)
	if !p.True() {
		t.Error("SR.scan did not scan")
	}
	call("VM.hard_shutdown", vm)
	call("VDI.destroy", vdi)
	call("SR.update", sr)
	if !p.True() || len(p.Disks()) != 0 {
		t.Errorf("disks %v, shown %v, true %v", p.Disks(), p.Shown(p.SR()), p.Truth(p.SR()))
	}
	call("PBD.unplug", p.Coordinator().PBD)
	var xe *xapidb.Error
	if _, err := p.XAPI().Do(ctx, "", "SR.scan", session, sr); !errors.As(err, &xe) || xe.Code != "SR_HAS_NO_PBDS" {
		t.Errorf("scan of an unplugged SR = %v", err)
	}
	call("pool.designate_new_master", p.Host("xcp2").Ref)
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	ok(t, p.Await(wait, func() bool { return p.Coordinator().Name == "xcp2" }))
}

// A daemon that is killed comes back; one that is stopped does not; sd_notify is waited for.
func TestDaemon(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir, err := os.MkdirTemp("", "lab")
	ok(t, err)
	defer os.RemoveAll(dir)
	const script = `trap 'echo stopping; exit 0' TERM; echo running; while :; do sleep 0.05; done`
	d := must[*lab.Daemon](t)(lab.StartDaemon(lab.DaemonOptions{Bin: "/bin/sh", Args: []string{"-c", script}, Restart: time.Millisecond}))
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	said := func(n int, word string) { // its trap is set when it says that it runs
		t.Helper()
		deadline := time.After(10 * time.Second)
		for strings.Count(d.Output(), word) < n {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("it did not say %q %d times: %q", word, n, d.Output())
			}
		}
	}
	said(1, "running")
	starts, again := d.Starts()
	if starts != 1 || d.Pid() == 0 {
		t.Errorf("%d starts, pid %d", starts, d.Pid())
	}
	ok(t, d.Kill())
	<-again
	if n, _ := d.Starts(); n != 2 {
		t.Errorf("%d starts after a kill", n)
	}
	said(2, "running")
	ok(t, d.Stop())
	<-d.Over()
	if !strings.Contains(d.Output(), "stopping") || d.Pid() != 0 {
		t.Errorf("output %q, pid %d", d.Output(), d.Pid())
	}
	if _, err := lab.StartDaemon(lab.DaemonOptions{Bin: filepath.Join(dir, "none")}); err == nil {
		t.Error("started a program that does not exist")
	}
	_, err = lab.StartDaemon(lab.DaemonOptions{Bin: "/bin/sh", Args: []string{"-c", "echo no luck; exit 3"}, Notify: filepath.Join(dir, "n")})
	if err == nil || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("start of a program that ends at once = %v", err)
	}
}
