package heartbeat

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
)

// finding waits until a host reports a finding, or no longer does.
func (p *pool) finding(h *realpool.Host, code string, want bool) heartbeat.Report {
	p.t.Helper()
	var r heartbeat.Report
	p.until("finding "+code, func() (err error) {
		if r, err = p.Report(h); err == nil && hasFinding(r, code) != want {
			err = fmt.Errorf("findings %+v, last error %q", r.Findings, r.LastError)
		}
		return err
	})
	return r
}

// DRBD that suspends I/O without quorum can report a suspended write as done and then lose it: such a device is not
// served, also not when it becomes one, and whoever asks is told what to do.
func TestSuspendIOIsRefused(t *testing.T) {
	t.Parallel()
	p := files(t, realpool.Options{DRBD: true, Hosts: 3})
	if err := p.SetPolicy("majority", "suspend-io"); err != nil {
		t.Fatal(err)
	}
	if err := p.StartAll(); err != nil {
		t.Fatal(err)
	}
	for _, h := range p.Hosts {
		if r := p.finding(h, "heartbeat-suspend-io", true); r.Owns || r.Epoch > 0 {
			t.Errorf("%s owns a device with suspend-io", h.Name)
		}
	}
	out, code := p.tool(p.Hosts[0], "status", "--run-dir", p.Hosts[0].RunDir)
	if code != 1 || !strings.Contains(out, "critical: the device is not served: on-no-quorum is suspend-io") ||
		!strings.Contains(out, "next: linstor resource-definition drbd-options --on-no-quorum io-error") {
		t.Errorf("status: %d\n%s", code, out)
	}
	if err := p.SetPolicy("majority", "io-error"); err != nil {
		t.Fatal(err)
	}
	p.served(nil)
	owner := p.owner(nil)
	if err := p.SetPolicy("majority", "suspend-io"); err != nil {
		t.Fatal(err)
	}
	if r := p.finding(owner, "heartbeat-suspend-io", true); !strings.Contains(r.Barred, "suspend-io") {
		t.Errorf("barred: %q", r.Barred)
	}
	p.until("the owner does not leave", func() error {
		if r, err := p.Report(owner); err != nil || r.Owns {
			return fmt.Errorf("owns %v: %w", r.Owns, err)
		}
		return nil
	})
	if err := p.SetPolicy("off", "suspend-io"); err != nil { // Nothing is ever suspended then.
		t.Fatal(err)
	}
	p.finding(owner, "heartbeat-quorum-off", true)
	p.served(nil)
}

// http-disk-server is XCP-ng's: with the device open on this host DRBD would let both in.
func TestHTTPDiskServerIsNamed(t *testing.T) {
	t.Parallel()
	p := files(t, realpool.Options{Hosts: 1})
	// The name is an argument, as with an interpreter.
	other := exec.Command("sh", "-c", `exec 3<>"$1"; echo; read -r line`, "http-disk-server", p.Disk)
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() { in.Close(); _ = other.Wait() }
	defer stop()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	h := p.Hosts[0]
	p.start(h)
	p.finding(h, "heartbeat-device-taken", true)
	text, code := p.tool(h, "status", "--run-dir", h.RunDir)
	if code != 1 || !strings.Contains(text, fmt.Sprintf("process %d (", other.Process.Pid)) || !strings.Contains(text, "http-disk-server") || !strings.Contains(text, p.Disk) {
		t.Errorf("status: %d\n%s", code, text)
	}
	stop()
	p.served(nil)
	p.finding(h, "heartbeat-device-taken", false)
}

func TestSmallDevice(t *testing.T) {
	t.Parallel()
	p := newPool(t, realpool.Options{Hosts: 1, Size: statefile.Size - 512})
	h := p.Hosts[0]
	p.finding(h, "heartbeat-device-small", true)
	if text, code := p.tool(h, "status", "--run-dir", h.RunDir); code != 1 || !strings.Contains(text, "265728 bytes") || !strings.Contains(text, "next: ") {
		t.Errorf("status: %d\n%s", code, text)
	}
	if err := os.Truncate(p.Disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	c := p.client(h)
	p.until("not served", func() error { return c.Read(make([]byte, 512), 0, time.Minute) })
	p.finding(h, "heartbeat-device-short", true) // The local device has 4 MiB, as SM has it.
	if err := c.Read(make([]byte, 512), 2<<20, time.Minute); !errors.Is(err, nbd.EINVAL) {
		t.Errorf("a read behind the owner's device: %v", err)
	}
	if err := c.Read(make([]byte, 512), 4<<20, time.Minute); !errors.Is(err, nbd.EINVAL) {
		t.Errorf("a read behind the local device: %v", err)
	}
}

// xhad writes 512 and 1024 bytes at a time, whatever the disk's blocks are.
func TestDeviceWith4KBlocks(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, "root is needed to make a loop device")
	}
	t.Parallel()
	p := files(t, realpool.Options{Hosts: 1})
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", "4096", "--direct-io=on", p.Disk).CombinedOutput()
	if err != nil {
		// Some file systems take no direct I/O of 4 KiB below a loop device.
		if out, err = exec.Command("losetup", "--find", "--show", "--sector-size", "4096", p.Disk).CombinedOutput(); err != nil {
			skip(t, fmt.Sprintf("no loop device: %v: %s", err, out))
		}
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		for _, h := range p.Hosts {
			h.Kill()
		}
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	if size, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "queue/logical_block_size")); err != nil || strings.TrimSpace(string(size)) != "4096" {
		t.Fatalf("blocks of %s %v", size, err)
	}
	p.Disk = dev
	p.start(p.Hosts[0])
	c := p.client(p.Hosts[0])
	mirror := make([]byte, 64<<10)
	for i := range 200 {
		n := 512 * (1 + i%5)
		off := 512 * (i * 37 % ((len(mirror) - n) / 512))
		for k := range n {
			mirror[off+k] = byte(i + k)
		}
		p.until("write", func() error { return c.Write(mirror[off:off+n], int64(off)+8192, true, time.Minute) })
	}
	got := make([]byte, len(mirror))
	if err := c.Read(got, 8192, time.Minute); err != nil {
		t.Fatal(err)
	}
	for i := range got[:60<<10] {
		if mirror[i] != 0 && got[i] != mirror[i] {
			t.Fatalf("byte %d is %d, want %d", i, got[i], mirror[i])
		}
	}
}

// skip skips for a missing program or privilege, which is a failure where all of them are promised.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// xhad.conf may be missing (HA is not enabled), broken, or come later: XAPI may write it after the statefile is attached.
func TestConfOfXhad(t *testing.T) {
	t.Parallel()
	p := files(t, realpool.Options{Hosts: 1, Timeout: 10 * time.Second})
	path := filepath.Join(p.Dir, "xhad.conf")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	h := p.Hosts[0]
	p.start(h)
	p.served(nil)
	if out, code := p.tool(h, "status", "--run-dir", h.RunDir); code != 0 || !strings.Contains(out, "T2 1m0s") || !strings.Contains(out, "HA is not enabled") {
		t.Errorf("no file: %d\n%s", code, out)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(good, []byte("HostID"), []byte("Host")), 0o600); err != nil {
		t.Fatal(err)
	}
	p.finding(h, "heartbeat-conf-broken", true)
	if out, code := p.tool(h, "status", "--run-dir", h.RunDir); code != 0 || !strings.Contains(out, "parse xhad.conf: HostID") || !strings.Contains(out, "times of T=60 are used") {
		t.Errorf("broken file: %d\n%s", code, out)
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	r := p.finding(h, "heartbeat-timeout-short", true)
	if r.Xhad.StateFileTimeout != 10*time.Second || r.Timing.Suspect != time.Second || hasFinding(r, "heartbeat-conf-broken") {
		t.Errorf("%+v", r)
	}
	out, code := p.tool(h, "status", "--run-dir", h.RunDir)
	if code != 0 || !strings.Contains(out, "warning: HA time-out 10s tolerates an outage of the statefile of 4s; a crash of its owner takes up to 2.5s and the kernel's request time-out is 5s") {
		t.Errorf("T=10: %d\n%s", code, out)
	}
	if err := p.client(h).Write(make([]byte, 1024), statefile.Offset(0), true, time.Minute); err != nil {
		t.Fatal(err)
	}
	out, code = p.tool(h, "status", "--json", "--run-dir", h.RunDir)
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != 0 || !r.Owns || r.Hosts[h.Name].Writes != 1 {
		t.Errorf("JSON: %d, %v\n%s", code, err, out)
	}
	var x struct {
		Pool   struct{ State string }
		Record struct{ Owner string }
	}
	out, code = p.tool(h, "dump", "--json", "--run-dir", h.RunDir)
	if err := json.Unmarshal([]byte(out), &x); err != nil || code != 0 || x.Pool.State != "active" || x.Record.Owner != h.Name {
		t.Errorf("dump as JSON: %d, %v, %+v\n%s", code, err, x, out)
	}
	p.served(nil)
}

// What a dump is given may be anything.
func TestDumpOfBadFiles(t *testing.T) {
	t.Parallel()
	p := files(t, realpool.Options{Hosts: 1})
	for name, c := range map[string]struct {
		data []byte
		code int
		want string
	}{
		"short": {make([]byte, 1000), 1, "shorter than 266240 bytes"},
		"empty": {nil, 1, "shorter than 266240 bytes"},
		"zeros": {make([]byte, statefile.Size), 0, "never initialised"},
		"noise": {bytes.Repeat([]byte{0xa5}, statefile.Size), 0, "pool: unreadable: wrong signature"},
	} {
		path := filepath.Join(p.Dir, name)
		if err := os.WriteFile(path, c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, code := p.tool(p.Hosts[0], "dump", path); code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("%s: %d %s", name, code, out)
		}
	}
	if out, code := p.tool(p.Hosts[0], "dump", filepath.Join(p.Dir, "none")); code != 1 || !strings.Contains(out, syscall.ENOENT.Error()) {
		t.Errorf("no file: %d %s", code, out)
	}
}
