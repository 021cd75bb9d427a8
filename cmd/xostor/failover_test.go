package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// The defaults of the configuration are those of the package.
func TestFailoverConfig_Defaults(t *testing.T) {
	c := &call{config: dom0.DefaultConfig(), log: slog.New(slog.DiscardHandler)}
	cfg, err := failoverConfig(c)
	if err != nil || cfg.Self == "" {
		t.Fatalf("name %q, %v", cfg.Self, err)
	}
	want := failover.DefaultPaths()
	want.BackupDir = want.StateDir + "/backups"
	if cfg.Names != failover.DefaultNames() || cfg.Paths != want || cfg.Port != failover.DefaultPort || cfg.Socket != failover.DefaultSocket || cfg.Major != failover.MajorDRBD || cfg.Force != "" || cfg.NoBackups {
		t.Errorf("got %+v", cfg)
	}
}

func TestFailoverConfig_NameAndMode(t *testing.T) {
	kernel, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	c := &call{config: dom0.DefaultConfig(), log: slog.New(slog.DiscardHandler)}
	f := &c.config.Agents.Failover
	f.ResDir, f.Resource = t.TempDir(), "db"
	text := "resource \"db\" {\n    on \"" + strings.ToUpper(kernel) + "\" {\n    }\n}\n"
	if err := os.WriteFile(filepath.Join(f.ResDir, "db.res"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[string]failover.Mode{"auto": "", "guard": failover.Guard, "owner": failover.Owner, "observe": failover.Observe} {
		f.Mode = mode
		if cfg, err := failoverConfig(c); err != nil || cfg.Force != want || cfg.Self != strings.ToUpper(kernel) || cfg.NoBackups != (mode == "observe") || cfg.Names.Target != "drbd-services@db.target" {
			t.Errorf("%s: %+v, %v", mode, cfg, err)
		}
	}
	f.Name = "other"
	if cfg, err := failoverConfig(c); err != nil || cfg.Self != "other" {
		t.Errorf("configured name: %q, %v", cfg.Self, err)
	}
}

func TestPoolKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ptoken")
	if _, err := poolKey(file); err == nil || !strings.Contains(err.Error(), "bus.ptoken") {
		t.Errorf("missing: %v, want the next step", err)
	}
	for text, good := range map[string]bool{"": false, "  \n": false, "short": false, strings.Repeat("s", 40) + "\n": true} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := poolKey(file); (err == nil) != good {
			t.Errorf("secret %q: %v", text, err)
		}
	}
}

// What waiting cannot cure ends the agent at once, with the next step. Nothing of it needs XAPI or the bus.
func TestRun_FailoverThatCannotStart(t *testing.T) {
	dir := t.TempDir()
	config := func(extra string) string {
		file := filepath.Join(dir, "agents.toml")
		text := "[bus]\nptoken = \"" + dir + "/ptoken\"\nsocket = \"" + dir + "/bus.sock\"\n[xapi]\nsocket = \"" + dir + "/xapi\"\n[agents.failover]\nsocket = \"" + dir + "/s\"\nstate_dir = \"" + dir + "/state\"\nbackup_dir = \"" + dir + "/backups\"\n" +
			"res_dir = \"" + dir + "\"\ndrbdsetup = \"" + dir + "/none\"\n" + extra
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for _, tt := range []struct {
		name, extra string
		args        []string
		code        int
		want        string
	}{
		{"no pool secret", "", []string{"agent", "failover"}, exitError, "bus.ptoken"},
		{"unknown key", "prot = 5\n", []string{"agent", "failover"}, exitUsage, "unknown key agents.failover.prot"},
		{"no agent: status", "", []string{"controller", "status"}, exitError, "systemctl start xostor-failover"},
		{"no agent: move", "", []string{"controller", "move", "xcp2"}, exitError, "systemctl start xostor-failover"},
		{"no backup to plan with", "", []string{"controller", "restore", "--plan"}, exitError, "there is no good backup on this host"},
		{"controller alone", "", []string{"controller"}, exitUsage, "xostor help controller"},
		{"restore without --plan", "", []string{"controller", "restore"}, exitUsage, "restore --plan"},
		{"move with --plan", "", []string{"controller", "move", "--plan"}, exitUsage, "--plan belongs to restore"},
		{"too many hosts", "", []string{"controller", "move", "a", "b"}, exitUsage, "xostor help controller"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out, errOut strings.Builder
			code := run(t.Context(), append(tt.args, "--config", config(tt.extra)), &out, &errOut)
			if text := strings.TrimSpace(errOut.String()); code != tt.code || !strings.Contains(text, tt.want) || strings.Contains(text, "\n") {
				t.Errorf("code %d, %q; want %d and one line with %q", code, text, tt.code, tt.want)
			}
		})
	}
	t.Run("no backups are no error", func(t *testing.T) {
		var out, errOut strings.Builder
		if code := run(t.Context(), []string{"controller", "backups", "--config", config("")}, &out, &errOut); code != exitOK || !strings.Contains(out.String(), "No backup on this host") {
			t.Errorf("code %d, %q, %q", code, out.String(), errOut.String())
		}
		out.Reset()
		if code := run(t.Context(), []string{"controller", "backups", "--json", "--config", config("")}, &out, &errOut); code != exitOK || strings.TrimSpace(out.String()) != "[]" {
			t.Errorf("code %d, %q, %q", code, out.String(), errOut.String())
		}
	})
}

// A host without DRBD and without an agent: plan says what it sees, and why nothing would be done.
func TestRun_PlanFailoverWithoutAnAgent(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "agents.toml")
	text := "[agents.failover]\nsocket = \"" + dir + "/s\"\nstate_dir = \"" + dir + "/state\"\nbackup_dir = \"" + dir + "/backups\"\nres_dir = \"" + dir + "\"\nreactor_dir = \"" + dir + "\"\nreactor_config = \"" + dir + "/r.toml\"\n" +
		"mount_point = \"" + dir + "/m\"\ndrbdsetup = \"" + dir + "/none\"\ndrbdadm = \"" + dir + "/none\"\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errOut strings.Builder
	if code := run(t.Context(), []string{"plan", "failover", "--config", file}, &out, &errOut); code != exitOK || !strings.Contains(out.String(), "Mode observe") || !strings.Contains(out.String(), "Nothing to do") {
		t.Errorf("code %d, %q, %q", code, out.String(), errOut.String())
	}
	out.Reset()
	var plan struct{ Findings []struct{ Code string } }
	if code := run(t.Context(), []string{"plan", "failover", "--json", "--config", file}, &out, &errOut); code != exitOK || json.Unmarshal([]byte(out.String()), &plan) != nil || len(plan.Findings) == 0 {
		t.Errorf("code %d, %q, %q", code, out.String(), errOut.String())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("plan left %v, %v", left, err)
	}
}

// The management addresses come from what the bus kept on disk. Nobody asks XAPI then, and a list without this host is not believed.
func TestFollowAddresses_FromTheBusesFile(t *testing.T) {
	dir := t.TempDir()
	c := &call{config: dom0.DefaultConfig(), log: slog.New(slog.DiscardHandler)}
	c.config.Bus.Store, c.config.XAPI.Socket = dir, filepath.Join(dir, "no-xapi")
	keep := func(p bus.Pool) {
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "pool.json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keep(bus.Pool{UUID: "p", Hosts: []bus.Host{{UUID: "me", Address: "192.0.2.1"}, {UUID: "b", Address: "192.0.2.2"}, {UUID: "c", Address: "fd00::3"}, {UUID: "d"}}})
	ask := func(self string) (got []netip.Addr) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan struct{})
		told := make(chan []netip.Addr, 1)
		go func() {
			followAddresses(ctx, c, self, func(list []netip.Addr) { told <- list; cancel() })
			close(done)
		}()
		if self == "me" || len(c.config.Agents.Failover.Addresses) > 0 {
			select {
			case got = <-told:
			case <-time.After(time.Minute):
				t.Fatal("nothing was told")
			}
		} else {
			cancel()
		}
		<-done
		return got
	}
	if got := ask("me"); !slices.Equal(got, []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("fd00::3")}) {
		t.Errorf("told %v", got)
	}
	if got := ask("stranger"); got != nil {
		t.Errorf("told %v from a pool without this host", got)
	}
	c.config.Agents.Failover.Addresses = []string{"198.51.100.7"}
	if got := ask("stranger"); !slices.Equal(got, []netip.Addr{netip.MustParseAddr("198.51.100.7")}) {
		t.Errorf("configured: told %v", got)
	}
}

// On a host where no bus has run, XAPI says where the others are, also on a host that is not the coordinator.
func TestFollowAddresses_FromXAPI(t *testing.T) {
	pool, err := lab.New(lab.Options{Hosts: 3, Seed: 1, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = pool.Close() }()
	faces, err := pool.Serve()
	if err != nil {
		t.Fatal(err)
	}
	var want []netip.Addr
	for i, f := range faces {
		addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
		if err := pool.DB().Set("host", f.Host.Ref, "address", addr.String()); err != nil {
			t.Fatal(err)
		}
		if i != 1 {
			want = append(want, addr)
		}
	}
	me := faces[1]
	c := &call{config: dom0.DefaultConfig(), log: slog.New(slog.DiscardHandler)}
	c.config.Bus.Store, c.config.XAPI.Socket, c.config.Host.PoolConf, c.config.Host.Inventory = t.TempDir(), me.Socket, me.PoolConf, me.Inventory
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var told []netip.Addr
	followAddresses(ctx, c, me.Host.UUID, func(list []netip.Addr) { told = list; cancel() })
	slices.SortFunc(told, netip.Addr.Compare)
	if !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}

// A new pool secret is taken into use; one that is half written or gone changes nothing.
func TestFollowSecret(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ptoken")
	write := func(text string) {
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	first, second := strings.Repeat("1", 40), strings.Repeat("2", 40)
	write(first)
	c := &call{config: dom0.DefaultConfig(), log: slog.New(slog.DiscardHandler)}
	c.config.Bus.Ptoken = file
	used := make(chan string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		followSecret(ctx, c, func(key []byte) bool { used <- string(key); return true })
	}()
	want := func(secret string) {
		t.Helper()
		select {
		case got := <-used:
			if got != string(failover.BeatKey([]byte(secret))) {
				t.Error("another key is used")
			}
		case <-time.After(time.Minute):
			t.Fatal("the key is not used")
		}
	}
	want(first) // it may have changed since the agent read it
	write("short")
	write(second + "\n")
	want(second)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	cancel()
	<-done
	select {
	case <-used:
		t.Error("a key was used although no secret came")
	default:
	}
}
