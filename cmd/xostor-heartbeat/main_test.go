package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// The options are those that SM passes (LinstorSR.py, _start_persistent_http_server and _start_persistent_nbd_server).
func TestOptionsOfSM(t *testing.T) {
	urls, port, err := fromURLs("http://10.0.0.1:8076,http://[fd00::2]:8076")
	if err != nil || !slices.Equal(urls, []string{"10.0.0.1:8076", "[fd00::2]:8076"}) || port != 8076 {
		t.Errorf("%q %d %v", urls, port, err)
	}
	if _, _, err := fromURLs("10.0.0.1"); !errors.Is(err, errUsage) {
		t.Errorf("no URL: %v", err)
	}
	s := settings{disk: "/dev/drbd/by-res/xcp-persistent-ha-statefile/0", peers: "a=1.2.3.4", port: 8076}
	if _, err := s.complete(); err != nil || s.resource != "xcp-persistent-ha-statefile" {
		t.Errorf("resource %q, %v", s.resource, err)
	}
	got, err := s.addresses(heartbeat.Res{})
	if err != nil || len(got) != 1 || got[0].Host != "a" || got[0].Addrs[0] != "1.2.3.4:8076" {
		t.Errorf("%+v %v", got, err)
	}
}

// Without a controller the resource file says who the hosts are.
func TestHostsFromTheResourceFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.res")
	text := "resource r {\n on x1 {\n }\n on x2 {\n }\n connection {\n host x1 address ipv4 10.9.0.1:7000;\n host x2 address ipv4 10.9.0.2:7000;\n }\n}\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := settings{resource: "r", res: path, port: 8076}
	res, err := s.complete()
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.addresses(res)
	if err != nil || len(got) != 2 || got[1].Host != "x2" || got[1].Addrs[0] != "10.9.0.2:8076" {
		t.Errorf("%+v %v", got, err)
	}
	s.res = path + ".none"
	if _, err := s.complete(); err == nil || !strings.Contains(err.Error(), "--peers") {
		t.Errorf("missing file: %v", err)
	}
}

func TestBadXhadConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xhad.conf")
	if err := os.WriteFile(path, []byte("<xhad-config"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := settings{conf: path}
	want, _ := heartbeat.DeriveTiming(statefile.Derive(60 * time.Second))
	got, x := s.times()
	if got != want || len(x.Findings) != 1 || x.Findings[0].Code != "heartbeat-conf-broken" || !strings.Contains(x.Findings[0].Text, "parse xhad.conf") {
		t.Errorf("broken file: %+v %+v", got, x)
	}
	s.conf += ".none"
	if got, x := s.times(); got != want || len(x.Findings) != 0 || !strings.Contains(x.Source, "HA is not enabled") {
		t.Errorf("no file: %+v %+v", got, x)
	}
	text := "<xhad-config version=\"1.0\"><common-config><host><HostID>" + strings.Repeat("a", 32) + "</HostID><IPaddress>10.1.1.1</IPaddress></host><parameters>" +
		"<StateFileTimeout>10</StateFileTimeout><StateFileInterval>2</StateFileInterval></parameters></common-config><local-config><localhost><HostID>" +
		strings.Repeat("a", 32) + "</HostID></localhost></local-config></xhad-config>"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s.conf, s.port, s.urls, s.host = path, 8076, []string{"10.1.1.2:8076"}, "x1"
	if _, x := s.times(); len(x.Findings) != 1 || x.Findings[0].Code != "heartbeat-timeout-short" || !strings.Contains(x.Findings[0].Text, "4s") {
		t.Errorf("T=10: %+v", x)
	}
	if got := s.fallback(); !slices.Equal(got, []string{"10.1.1.2:8076", "10.1.1.1:8076"}) {
		t.Errorf("fallback addresses %q", got)
	}
	peers := []heartbeat.PeerAddress{{Host: "x1", Addrs: []string{"10.9.0.1:8076"}}}
	if got := s.listenAddrs(heartbeat.Config{Peers: peers}); !slices.Equal(got, []string{"10.9.0.1:8076", "10.1.1.1:8076"}) {
		t.Errorf("listens on %q, want storage and management network", got)
	}
}

func TestDumpAndUsage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sf")
	if err := os.WriteFile(path, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := dump([]string{path}, &out); err != nil || !strings.Contains(out.String(), "never initialised") {
		t.Errorf("%v %s", err, &out)
	}
	for _, argv := range [][]string{{"xostor-heartbeat"}, {"xostor-heartbeat", "fly"}, {"xostor-heartbeat", "run", "--no-such"}} {
		if err := dispatch(t.Context(), argv); !errors.Is(err, errUsage) {
			t.Errorf("%v: %v", argv, err)
		}
	}
	if err := dispatch(t.Context(), []string{"xostor-heartbeat", "status", "--run-dir", t.TempDir()}); err == nil || !errors.Is(err, heartbeat.ErrNoDaemon) {
		t.Errorf("status without a daemon: %v", err)
	}
}

// A memo says which connection of the kernel's device is ours, and how late the kernel may repeat what was sent.
func TestMemo(t *testing.T) {
	for _, c := range []struct {
		text string
		ok   bool
		want remembrance
	}{
		{"3 77 b-1 19\n", true, remembrance{3, 77, "b-1", 19 * time.Second}},
		{"3 77 b-1\n", true, remembrance{3, 77, "b-1", heartbeat.LongestKernelTimeout}}, // Written before it had the time-out.
		{"3 77 b-1 0\n", false, remembrance{}},
		{"3 77 b-1 x\n", false, remembrance{}},
		{"3 77\n", false, remembrance{}},
		{"", false, remembrance{}},
	} {
		m, ok := parseMemo(c.text)
		if ok != c.ok || ok && m != c.want {
			t.Errorf("%q: %+v %v", c.text, m, ok)
		}
		if again, ok := parseMemo(m.String()); c.ok && (!ok || again != m) {
			t.Errorf("%q is written as %q", c.text, m)
		}
	}
}

// A process that has a file open is found by it, whatever its name.
func TestHolders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		t.Fatal(err)
	}
	same := func(st unix.Stat_t) bool { return st.Dev == want.Dev && st.Ino == want.Ino }
	const program = "echo up; read wait"
	look := func() []holder {
		found, err := holders(func(command string) bool { return strings.Contains(command, program) }, same)
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	if found := look(); len(found) != 0 {
		t.Errorf("found %+v, which is this process", found)
	}
	cmd := exec.Command("sh", "-c", program)
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	if _, err := out.Read(make([]byte, 1)); err != nil { // It runs: between exec and that, its command line is empty.
		t.Fatal(err)
	}
	if found := look(); len(found) != 1 || found[0].pid != cmd.Process.Pid || found[0].command != "sh -c "+program {
		t.Errorf("found %+v, want process %d", found, cmd.Process.Pid)
	}
}

// Without a device, or beside a running daemon, detach says so.
func TestDetachRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := detach([]string{"--run-dir", dir}, io.Discard); err == nil || !strings.Contains(err.Error(), "left a kernel device") {
		t.Errorf("no device: %v", err)
	}
	memo := filepath.Join(dir, "sf.front.nbd")
	if err := os.WriteFile(memo, []byte("0 1 another-boot 19\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := settings{runDir: dir, resource: "sf", front: true}
	unlock, err := s.lock()
	if err != nil {
		t.Fatal(err)
	}
	if err := detach([]string{"--run-dir", dir}, io.Discard); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("a daemon runs: %v", err)
	}
	unlock()
	if err := detach([]string{"--run-dir", dir, "other"}, io.Discard); err == nil {
		t.Error("detached what was not named")
	}
	var out bytes.Buffer
	if err := detach([]string{"--run-dir", dir, "sf"}, &out); err != nil || out.String() != "the device of sf is gone already\n" {
		t.Errorf("device of an earlier boot: %v %q", err, out.String())
	}
	if _, err := os.Stat(memo); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the memo is still there: %v", err)
	}
}
