package main

import (
	"bytes"
	"encoding/json"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// A host without HA, a daemon that died, one that answers, and one with a finding that needs somebody.
func TestHeartbeat(t *testing.T) {
	dir := t.TempDir()
	defer func(old string) { heartbeatRunDir = old }(heartbeatRunDir)
	heartbeatRunDir = filepath.Join(dir, "none")
	ask := func(args ...string) (string, int) {
		var out, errOut bytes.Buffer
		code := run(t.Context(), append([]string{"heartbeat"}, args...), &out, &errOut)
		return out.String() + errOut.String(), code
	}
	for _, verb := range []string{"status", "dump"} {
		if out, code := ask(verb); code != exitError || !strings.Contains(out, "no heartbeat daemon runs on this host") || !strings.Contains(out, "xe pool-ha-enable") {
			t.Errorf("%s without a daemon: %d %s", verb, code, out)
		}
	}
	for _, args := range [][]string{{"fly"}, {}, {"status", "dump"}} {
		if out, code := ask(args...); code != exitUsage {
			t.Errorf("%v: %d %s", args, code, out)
		}
	}
	heartbeatRunDir = dir
	timing, findings := heartbeat.DeriveTiming(statefile.Derive(10 * time.Second))
	d, err := heartbeat.New(heartbeat.Config{Host: "n1", Boot: "b", Export: "sf", Timing: timing, Xhad: heartbeat.Xhad{Timeouts: statefile.Derive(10 * time.Second), Source: "xhad.conf", Findings: findings}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "sf.sock"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 64)
			n, _ := conn.Read(buf)
			_ = d.Control(string(buf[:n]), conn)
			conn.Close()
		}
	})
	out, code := ask("status") // Nobody has ever answered this front: that is an outage.
	if code != exitError || !strings.Contains(out, "owner     unknown") || !strings.Contains(out, "warning: HA time-out 10s") || !strings.Contains(out, "OUTAGE") {
		t.Errorf("status: %d %s", code, out)
	}
	out, code = ask("status", "--json")
	var r []heartbeat.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitError || len(r) != 1 || r[0].Host != "n1" {
		t.Errorf("status --json: %d %v %s", code, err, out)
	}
	if out, code := ask("dump"); code != exitError || !strings.Contains(out, "read statefile through the owner") {
		t.Errorf("dump without an owner: %d %s", code, out)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	wg.Wait()
	if out, code := ask("status"); code != exitError || !strings.Contains(out, "the heartbeat daemon of sf has died") {
		t.Errorf("status of a dead daemon: %d %s", code, out)
	}
}
