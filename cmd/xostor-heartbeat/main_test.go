package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

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
