package failover_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// lasting is generous: it is only used up when something is wrong.
const lasting = 3 * time.Minute

const testProbe = 300 * time.Millisecond // thirty times as often as shipped

// newShippedPool boots three hosts on which the real program runs as a unit. Between two probes of the controller pass probeEvery; 0: the shipped interval.
func newShippedPool(t testing.TB, probeEvery time.Duration) *realpool.Pool {
	t.Helper()
	needPool(t)
	dir := t.TempDir()
	if err := lab.Build(filepath.Join(dir, "xostor"), "../../cmd/xostor"); err != nil {
		t.Fatal(err)
	}
	return realpool.New(t, realpool.Options{Xostor: filepath.Join(dir, "xostor"), ProbeEvery: probeEvery})
}

// cli is one call of the real program on a host.
type cli struct {
	code        int
	out, errOut string
}

func onHost(t *testing.T, h *realpool.Host, args ...string) cli {
	t.Helper()
	cmd := h.Xostor(args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cli{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// The real program, started by systemd, with nothing but this host's own files: no XAPI, no bus, no LINSTOR.
func TestShipped(t *testing.T) {
	p := newShippedPool(t, testProbe)
	o := p.Settled()
	for _, h := range p.Hosts {
		p.Until(lasting, h.Name+" has told systemd that it is ready", func() bool { return h.State(realpool.AgentUnit).Active == "active" })
		for _, away := range []string{h.BusSocket(), filepath.Join(h.Dir, "xapi")} {
			if _, err := os.Stat(away); err == nil {
				t.Fatalf("%s is there", away)
			}
		}
	}
	other := p.Others(o)[0]
	t.Run("controller status on every host", func(t *testing.T) {
		for _, h := range p.Hosts {
			p.Until(lasting, "the agent on "+h.Name+" names the owner", func() bool {
				r := onHost(t, h, "controller", "status")
				return r.code == 0 && strings.Contains(r.out, o.Name+" owns the database") && strings.Contains(r.out, "CAN TAKE IT")
			})
		}
		var report failover.Report
		if r := onHost(t, other, "controller", "status", "--json"); r.code != 0 || json.Unmarshal([]byte(r.out), &report) != nil || report.Owner != o.Name || len(report.Hosts) != 3 {
			t.Errorf("code %d, %s%s", r.code, r.out, r.errOut)
		}
	})
	t.Run("plan asks the agent", func(t *testing.T) {
		if r := onHost(t, o, "plan", "failover"); r.code != 0 || !strings.Contains(r.out, o.Name+" owns the database") || !strings.Contains(r.out, "Nothing to do") {
			t.Errorf("code %d, %s%s", r.code, r.out, r.errOut)
		}
	})
	t.Run("a second agent is refused", func(t *testing.T) {
		if r := onHost(t, o, "agent", "failover"); r.code != 1 || !strings.Contains(r.errOut, "address already in use") {
			t.Errorf("code %d, %s", r.code, r.errOut)
		}
		if r := onHost(t, o, "controller", "status"); r.code != 0 {
			t.Errorf("the first one is out of reach: %s", r.errOut)
		}
	})
	t.Run("killed, it adopts the controller", func(t *testing.T) {
		before, agent := o.State(realpool.Controller), o.State(realpool.AgentUnit).MainPID
		o.SignalAgent(syscall.SIGKILL)
		p.Until(lasting, "systemd has started it again and it knows the owner", func() bool {
			u := o.State(realpool.AgentUnit)
			return u.Active == "active" && u.MainPID != agent && strings.Contains(onHost(t, o, "controller", "status").out, o.Name+" owns the database")
		})
		if after := o.State(realpool.Controller); after.MainPID != before.MainPID || p.Owner() != o {
			t.Errorf("the controller was %+v, is %+v", before, after)
		}
	})
	t.Run("stopped, it leaves the controller alone", func(t *testing.T) {
		before := o.State(realpool.Controller)
		must(t, o.Units().Stop(t.Context(), realpool.AgentUnit, systemd.Replace))
		p.Until(lasting, "it has ended", func() bool { return o.State(realpool.AgentUnit).Down() })
		if u := o.State(realpool.AgentUnit); u.Active != "inactive" {
			t.Errorf("the agent ended as %+v", u)
		}
		if r := onHost(t, o, "controller", "status"); r.code != 1 || !strings.Contains(r.errOut, "systemctl start xostor-failover") {
			t.Errorf("without an agent: code %d, %s", r.code, r.errOut)
		}
		if r := onHost(t, o, "plan", "failover"); r.code != 0 || !strings.Contains(r.out, "No agent runs here") {
			t.Errorf("plan without an agent: code %d, %s%s", r.code, r.out, r.errOut)
		}
		o.StartAgent()
		p.Until(lasting, "it is back", func() bool { return o.State(realpool.AgentUnit).Active == "active" })
		if after := o.State(realpool.Controller); after.MainPID != before.MainPID || p.Owner() != o {
			t.Errorf("the controller was %+v, is %+v", before, after)
		}
	})
	t.Run("the bus comes later", func(t *testing.T) {
		bus := o.Xostor("bus")
		must(t, bus.Start())
		ended := make(chan struct{})
		go func() { _ = bus.Wait(); close(ended) }()
		defer func() {
			for _, pid := range o.PIDs("bus") {
				_ = syscall.Kill(pid, syscall.SIGTERM) // it may have ended
			}
			<-ended
		}()
		p.Until(lasting, "xostor status shows the agent", func() bool {
			var list []struct {
				Agent  string
				Status agents.Status
			}
			r := onHost(t, o, "status", "--json")
			return json.Unmarshal([]byte(r.out), &list) == nil && len(list) == 1 && list[0].Agent == failover.Name && list[0].Status.State == agents.Healthy && r.code == 0
		})
	})
	t.Run("backups", func(t *testing.T) { // the first one may be a minute away
		if r := onHost(t, o, "controller", "backups"); r.code != 0 || r.errOut != "" {
			t.Errorf("code %d, %s", r.code, r.errOut)
		}
	})
	// ready tells whether a host hears that all hosts can take the controller.
	ready := func(h *realpool.Host) bool {
		var report failover.Report
		r := onHost(t, h, "controller", "status", "--json")
		if json.Unmarshal([]byte(r.out), &report) != nil || len(report.Hosts) != 3 {
			return false
		}
		return !slices.ContainsFunc(report.Hosts, func(h failover.HostReport) bool { return !h.Usable || h.Mode != failover.Owner })
	}
	t.Run("the pool secret changes on one host after the other", func(t *testing.T) {
		before := o.State(realpool.Controller)
		for _, h := range p.Hosts {
			next := h.SecretFile() + ".new"
			must(t, os.WriteFile(next, []byte("another secret of the same pool\n"), 0o600))
			must(t, os.Rename(next, h.SecretFile()))
			p.Until(lasting, "the agent on "+h.Name+" takes it into use", func() bool {
				log, err := os.ReadFile(h.AgentLog())
				return err == nil && bytes.Contains(log, []byte("pool secret changed"))
			})
			for _, each := range p.Hosts {
				p.Until(lasting, each.Name+" hears all hosts", func() bool { return ready(each) })
			}
		}
		if after := o.State(realpool.Controller); after.MainPID != before.MainPID || p.Owner() != o {
			t.Errorf("the controller was %+v, is %+v", before, after)
		}
	})
	t.Run("move", func(t *testing.T) {
		p.Until(lasting, "all hosts can take it", func() bool { return ready(o) })
		if r := onHost(t, other, "controller", "move", "nowhere"); r.code != 1 || !strings.Contains(r.errOut, "there is no host nowhere") {
			t.Errorf("to nowhere: code %d, %s", r.code, r.errOut)
		}
		p.Until(lasting, "it is moved", func() bool {
			r := onHost(t, o, "controller", "move", other.Name)
			if r.code != 0 {
				t.Log(r.errOut) // an agent that has no processor for a second counts as away: the order is refused, or rolled back, and may be given again
			}
			return r.code == 0
		})
		if got := p.Settled(); got != other {
			t.Errorf("the controller is on %s, want %s", got.Name, other.Name)
		}
	})
}
