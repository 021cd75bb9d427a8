package failover_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
	"github.com/xostor-agents/xostor-agents/integration/failover/sdns"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdface"
)

// envReactor is the path of a drbd-reactor to run beside. No distribution that CI uses has it.
const envReactor = "XOSTOR_DRBD_REACTOR"

// reactorPool boots three hosts on which drbd-reactor promotes, each with its agent in guard mode, or without any agent.
func reactorPool(tb testing.TB, onNoQuorum string, agents bool) *realpool.Pool {
	tb.Helper()
	reactor := os.Getenv(envReactor)
	if reactor == "" {
		tb.Skip(envReactor + " does not name a drbd-reactor")
	}
	const shim = "/usr/lib/drbd/scripts/drbd-service-shim.sh"
	if _, err := os.Stat(shim); err != nil {
		tb.Skip(shim + ", which drbd-reactor has demote, is missing (Debian package drbd-utils)")
	}
	p := newPoolWith(tb, onNoQuorum, func(h *realpool.Host) (*exec.Cmd, error) {
		if err := os.Mkdir(filepath.Join(h.Dir, "snippets"), 0o755); err != nil {
			return nil, err
		}
		text := "snippets = \"" + h.Dir + "/snippets\"\n[[log]]\nlevel = \"info\"\n[[promoter]]\n[promoter.resources." + h.Names().Resource + "]\nstart = [\"" + realpool.MountUnit + "\", \"" + realpool.Controller + "\"]\n"
		if err := os.WriteFile(filepath.Join(h.Dir, "reactor.toml"), []byte(text), 0o600); err != nil {
			return nil, err
		}
		if !agents {
			return h.In.Command("true"), nil
		}
		return agentCommand(h)
	})
	env := fmt.Sprintf("Environment=%s=%s %s=", drbdface.EnvSocket, filepath.Join(p.Dir, "drbd"), drbdface.EnvNode)
	for _, h := range p.Hosts {
		sdns.Write(tb, h.Dir, "drbd-services@.target", "[Unit]\nDefaultDependencies=no\nBindsTo=drbd-promote@%i.service\n")
		sdns.Write(tb, h.Dir, "drbd-promote@.service", "[Unit]\nDefaultDependencies=no\nPartOf=drbd-services@%i.target\nOnFailureJobMode=replace-irreversibly\n[Service]\nType=oneshot\nRemainAfterExit=yes\n"+
			env+h.Name+"\nExecCondition="+p.Drbdsetup()+" primary "+h.Names().Resource+"\nExecStop="+p.Drbdsetup()+" secondary "+h.Names().Resource+"\n")
		for _, argv := range [][]string{{"mount", "--bind", p.Drbdsetup(), "/usr/sbin/drbdsetup"}, {"systemctl", "daemon-reload"}} {
			if out, err := h.In.Command(argv...).CombinedOutput(); err != nil {
				tb.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
			}
		}
		log, err := os.Create(filepath.Join(h.Dir, "reactor.log"))
		must(tb, err)
		argv := []string{reactor, "--config", filepath.Join(h.Dir, "reactor.toml")}
		cmd := h.In.Command(argv...)
		cmd.Env = append(os.Environ(), "PATH="+p.Dir+":"+os.Getenv("PATH"), drbdface.EnvSocket+"="+filepath.Join(p.Dir, "drbd"), drbdface.EnvNode+"="+h.Name)
		cmd.Stdout, cmd.Stderr = log, log
		must(tb, cmd.Start())
		tb.Cleanup(func() {
			for _, pid := range processes(h, argv...) {
				_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
			}
			_ = cmd.Wait()
			_ = log.Close()
			if tb.Failed() {
				text, _ := os.ReadFile(log.Name())
				tb.Logf("%s reactor:\n%s", h.Name, text[max(0, len(text)-3000):])
			}
		})
	}
	return p
}

// Beside a real drbd-reactor the agents promote nothing; they start a dead controller again, which the reactor never does, and release in seconds under
// frozen I/O, after which the reactor of another host takes over.
func TestFailover_BesideReactor(t *testing.T) {
	p := reactorPool(t, "suspend-io", true)
	o := p.Settled()
	for _, h := range p.Hosts {
		p.Until(patience, h.Name+" guards", func() bool {
			r, err := h.Client().Status(t.Context())
			return err == nil && r.Mode == failover.Guard
		})
	}
	pid := o.State(realpool.Controller).MainPID
	began := time.Now()
	o.SignalController(syscall.SIGKILL)
	restarted(t, p, o, pid)
	t.Logf("controller killed -> begun again %s", o.State(realpool.Controller).BegunAt.Sub(began).Round(time.Millisecond))

	p.Until(patience, "all hosts are connected", p.Connected)
	began = time.Now()
	p.Cut(o, true)
	p.Until(patience, "the owner has let go", func() bool {
		return !o.Since(began, "unmounted").IsZero() && !o.Since(began, "no primary").IsZero()
	})
	t.Logf("quorum lost -> unmounted %s, Secondary %s", o.Since(began, "unmounted").Sub(o.Since(began, "no quorum")).Round(time.Millisecond), o.Since(began, "no primary").Sub(o.Since(began, "no quorum")).Round(time.Millisecond))
	p.Until(patience, "another host runs the controller", func() bool { n := p.Owner(); return n != nil && n != o })
	p.Cut(o, false)
	p.Until(patience, "all hosts are connected", p.Connected)
	if n := p.Settled(); n == o {
		t.Error("the controller came back to the host that had been cut off")
	}
	for _, h := range p.Hosts {
		log, err := os.ReadFile(filepath.Join(h.Dir, "agent.log"))
		must(t, err)
		for _, verb := range []string{failover.VerbPromote, failover.VerbMount, failover.VerbCheckPeers} {
			if bytes.Contains(log, []byte("verb="+verb+" ")) {
				t.Errorf("%s: the agent did %s beside a reactor", h.Name, verb)
			}
		}
	}
}

// drbd-reactor alone: may_promote:yes printed -> `drbdsetup primary` asks DRBD (by way of systemctl and a unit), and -> systemd begins the mount unit, without
// DRBD's own time. To be compared with BenchmarkPromote.
func BenchmarkReactorPromote(b *testing.B) {
	var asked, begun []time.Duration
	p := reactorPool(b, "io-error", false)
	for range b.N {
		o := p.Settled()
		p.Until(30*time.Second, "all hosts are connected", p.Connected)
		began := time.Now()
		p.Cut(o, true)
		var next *realpool.Host
		p.Until(patience, "another host mounts it", func() bool {
			for _, h := range p.Others(o) {
				if !h.Since(began, "mounted").IsZero() {
					next = h
				}
			}
			return next != nil
		})
		may, primary, back := promotion(p, next, began)
		if !may.IsZero() && !back.IsZero() {
			asked = append(asked, primary.Sub(may))
			begun = append(begun, primary.Sub(may)+next.State(realpool.MountUnit).BegunAt.Sub(back))
		}
		p.Until(patience, "one controller", func() bool { return p.Owner() == next && !o.Mounted() })
		p.Cut(o, false)
		// It starts nothing for 20 s after the last start.
		p.Until(patience, "the next start is possible", func() bool { return time.Since(began) > 25*time.Second })
	}
	report(b, "reactor: may_promote:yes printed -> drbdsetup primary has asked DRBD", asked)
	report(b, "reactor: may_promote:yes printed -> systemd has begun the mount unit, without DRBD's time", begun)
	p.Close()
}

// drbd-reactor alone: quorum is lost with writes frozen -> Secondary and unmounted. What does not happen within the patience is counted with it.
func BenchmarkReactorQuorumLost(b *testing.B) {
	for _, policy := range []string{"suspend-io", "io-error"} {
		b.Run(policy, func(b *testing.B) {
			var all []time.Duration
			for range b.N {
				p := reactorPool(b, policy, false)
				o := p.Settled()
				p.Until(patience, "all hosts are connected", p.Connected)
				began := time.Now()
				p.Cut(o, true)
				p.Until(2*patience, "the owner has let go, or time is up", func() bool {
					return time.Since(began) > patience || !o.Since(began, "unmounted").IsZero() && !o.Since(began, "no primary").IsZero()
				})
				end := time.Now()
				if at := o.Since(began, "unmounted"); !at.IsZero() {
					end = at
				}
				all = append(all, end.Sub(o.Since(began, "no quorum")))
				p.Close()
			}
			report(b, "reactor: quorum lost ("+policy+") -> Secondary and unmounted", all)
		})
	}
}
