package failover_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// TestMain is also the programs that run on the hosts.
func TestMain(m *testing.M) {
	realpool.Main(agentMain)
	os.Exit(m.Run())
}

// agentConfig is what the harness tells an agent.
type agentConfig struct {
	Self       string
	Names      failover.Names
	Policy     failover.Policy
	Paths      failover.Paths
	Controller string
	Socket     string
	Listen     string
	Port       int
	Major      int
	Drbdsetup  string
	Drbdadm    string
	ProbeEvery time.Duration
	Jars       string
	Jobs       string // file that notes each start sent to systemd: nanoseconds since 1970, unit
}

// needPool skips the test when what a pool takes is missing, and names it. With XOSTOR_TEST_STRICT=1 that is a failure.
func needPool(tb testing.TB) {
	tb.Helper()
	why := realpool.Missing()
	switch {
	case why == "":
	case os.Getenv("XOSTOR_TEST_STRICT") == "1":
		tb.Fatal(why)
	default:
		tb.Skip(why)
	}
}

// newPool boots three hosts; the agents are this binary, with short pauses.
func newPool(tb testing.TB, onNoQuorum string) *realpool.Pool {
	tb.Helper()
	return newPoolWith(tb, onNoQuorum, agentCommand)
}

func newPoolWith(tb testing.TB, onNoQuorum string, agent func(*realpool.Host) (*exec.Cmd, error)) *realpool.Pool {
	tb.Helper()
	needPool(tb)
	o := realpool.Options{OnNoQuorum: onNoQuorum, Agent: agent}
	if _, ok := tb.(*testing.B); ok {
		// A small program starts as fast as drbd-utils does; the test binary takes milliseconds more.
		o.Face = filepath.Join(tb.TempDir(), "face")
		if err := lab.Build(o.Face, "github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdsetup"); err != nil {
			tb.Fatal(err)
		}
	}
	return realpool.New(tb, o)
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func policy() failover.Policy {
	p := failover.DefaultPolicy()
	p.QuitToTerm, p.TermToKill = 200*time.Millisecond, 500*time.Millisecond
	return p
}

func agentCommand(h *realpool.Host) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cfg, err := json.Marshal(agentConfig{Self: h.Name, Names: h.Names(), Policy: policy(), Paths: failover.Paths{ResDir: h.ResDir(), StateDir: h.StateDir(), ReactorCfg: filepath.Join(h.Dir, "reactor.toml"), ReactorDir: filepath.Join(h.Dir, "reactor.d")},
		Controller: h.URL(), Socket: h.Socket(), Listen: h.Node.Address(), Port: h.Pool().Port, Major: realpool.LoopMajor,
		Drbdsetup: h.Pool().Drbdsetup(), Drbdadm: h.Pool().Drbdadm(), ProbeEvery: 300 * time.Millisecond, Jars: filepath.Join(h.Dir, "*.jar"), Jobs: jobsFile(h)})
	if err != nil {
		return nil, err
	}
	cmd := h.In.Command(exe)
	cmd.Env = append(os.Environ(), "XOSTOR_TEST_CONFIG="+string(cfg))
	return cmd, nil
}

func jobsFile(h *realpool.Host) string { return filepath.Join(h.Dir, "jobs") }

func agentMain() error {
	var c agentConfig
	if err := json.Unmarshal([]byte(os.Getenv("XOSTOR_TEST_CONFIG")), &c); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	jobs, err := os.OpenFile(c.Jobs, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer jobs.Close()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := failover.NewService(failover.ServiceConfig{Self: c.Self, Key: failover.BeatKey([]byte("test")), Names: c.Names, Policy: c.Policy, Paths: c.Paths, Controller: c.Controller, Jars: c.Jars,
		Socket: c.Socket, Listen: c.Listen, Port: c.Port, Major: c.Major, Drbdsetup: c.Drbdsetup, Drbdadm: c.Drbdadm, ProbeEvery: c.ProbeEvery, BackupLook: 200 * time.Millisecond, Log: log,
		JobSent: func(unit string) { fmt.Fprintln(jobs, time.Now().UnixNano(), unit) }})
	if err != nil {
		return err
	}
	return s.Run(ctx, agents.Options{Log: log})
}
