package failover_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/failover"
)

// signalController sends a signal to the controller's process, from outside.
func (h *host) signalController(sig syscall.Signal) {
	for _, pid := range h.pids("controller") {
		must(h.p.tb, syscall.Kill(pid, sig))
	}
}

// restarted waits for another controller process on the same host.
func (p *pool) restarted(o *host, pid int) {
	p.tb.Helper()
	// A stopped process accepts connections and never answers: three probes of five seconds come before anything is done.
	p.until(45*time.Second, "another controller process on the same host", func() bool {
		u := o.state(testNames.Controller)
		return u.Active == "active" && u.MainPID != pid
	})
}

// A controller that dies or hangs is started again on the same host, though its unit has no Restart=.
func TestFailover_ControllerSick(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	mode := filepath.Join(o.dir, "mode")
	t.Run("killed", func(t *testing.T) {
		pid := o.state(testNames.Controller).MainPID
		o.signalController(syscall.SIGKILL)
		p.restarted(o, pid)
	})
	t.Run("stopped by a signal", func(t *testing.T) {
		pid := o.state(testNames.Controller).MainPID
		o.signalController(syscall.SIGSTOP)
		p.restarted(o, pid)
	})
	t.Run("answers 500", func(t *testing.T) {
		pid := o.state(testNames.Controller).MainPID
		must(t, os.WriteFile(mode, []byte("500"), 0o600))
		p.until(20*time.Second, "the sick process ends", func() bool { return o.state(testNames.Controller).MainPID != pid })
		must(t, os.Remove(mode))
		p.until(20*time.Second, "one controller", func() bool { return p.owner() != nil })
	})
}

// An agent that is killed and started again changes nothing; while it is away, nothing depends on it.
func TestFailover_AgentRestarted(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	before := o.state(testNames.Controller)
	for _, h := range p.hosts {
		h.endAgent()
		h.startAgent()
		p.until(10*time.Second, "the agent on "+h.name+" knows its mode", func() bool {
			r, err := h.client().Status(t.Context())
			return err == nil && r.Mode == failover.Owner
		})
	}
	if after := o.state(testNames.Controller); after.MainPID != before.MainPID || after.Active != "active" || p.owner() != o {
		t.Errorf("the controller was %+v, is %+v", before, after)
	}
}

// The owner is cut off with a writer stuck in state D: it lets go, another takes over, and after the heal all are connected.
func TestFailover_OwnerCutOff(t *testing.T) {
	for _, policy := range []string{"suspend-io", "io-error"} {
		t.Run(policy, func(t *testing.T) {
			p := newPool(t, policy)
			o := p.settled()
			began := time.Now()
			p.cut(o, true)
			p.until(20*time.Second, "the cut-off owner has let go", func() bool {
				gone := false
				p.wall.Do(func() { gone = !o.node.IsPrimary() && !o.node.Held() })
				return gone && !o.isMounted() && o.state(testNames.Controller).Down()
			})
			lost, free := o.since(began, "no quorum"), o.since(began, "unmounted")
			t.Logf("%s: quorum lost -> unmounted %s", policy, free.Sub(lost).Round(time.Millisecond))
			next := p.settled()
			if next == o {
				t.Fatalf("%s is cut off and runs the controller", o.name)
			}
			p.cut(o, false)
			p.until(30*time.Second, "all hosts are connected and up to date", p.connected)
			if got := p.settled(); got != next {
				t.Errorf("the controller moved again, from %s to %s", next.name, got.name)
			}
		})
	}
}

// The events stream of the owner is dead when it loses quorum. It lets go all the same.
func TestFailover_EventsDie(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	p.cut(o, true)
	for range 3 { // and it dies again
		for _, pid := range o.eventStreams() {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have died with the one before
		}
	}
	p.until(20*time.Second, "the owner has let go", func() bool { return !o.isMounted() && o.state(testNames.Controller).Down() })
}

// eventStreams finds the processes that run events2 for this pool's host.
func (h *host) eventStreams() (out []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		cmd, _ := os.ReadFile(d + "/cmdline")
		if bytes.HasPrefix(cmd, []byte(filepath.Join(h.p.dir, "drbdsetup")+"\x00events2")) {
			env, _ := os.ReadFile(d + "/environ")
			if bytes.Contains(env, []byte("DRBDSIM_NODE="+h.name+"\x00")) {
				out = append(out, atoi(filepath.Base(d)))
			}
		}
	}
	return out
}

// A host dies. Its agent's silence leads another host to ask DRBD, long before DRBD would notice by itself.
func TestFailover_HostDies(t *testing.T) {
	p := newPool(t, "io-error")
	p.cl.PingInt = 10 * time.Second
	o := p.settled()
	p.until(10*time.Second, "all hosts are connected", p.connected)
	began := time.Now()
	p.die(o)
	var next *host
	p.until(30*time.Second, "another host runs the controller", func() bool {
		next = p.owner()
		return next != nil && next != o
	})
	t.Logf("dead host -> mounted %s", next.since(began, "mounted").Sub(began).Round(time.Millisecond))
	if next.since(began, "mounted").Sub(began) > 9*time.Second {
		t.Log("DRBD's own detection was first") // possible: its clock may run out at any time
	}
}

// A move goes where it is told, and back to any host that can take it; what cannot be is refused with the reason.
func TestFailover_Move(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	target := p.others(o)[1]
	p.until(10*time.Second, "all hosts can take it", func() bool {
		r, err := o.client().Status(t.Context())
		ready := 0
		for _, h := range r.Hosts {
			if h.Usable && h.Mode == failover.Owner {
				ready++
			}
		}
		return err == nil && ready == 3
	})
	var out bytes.Buffer
	cmd := failover.Command{Client: p.others(target)[0].client(), Out: &out, Store: filepath.Join(o.dir, "state", "backups")}
	for _, bad := range []string{"nowhere", o.name} {
		if err := cmd.Run(t.Context(), []string{"move", bad}); err == nil {
			t.Errorf("a move to %s was accepted", bad)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := cmd.Run(ctx, []string{"move", target.name}); err != nil {
		p.dump()
		t.Fatalf("move: %v\n%s", err, out.String())
	}
	if got := p.settled(); got != target {
		t.Errorf("the controller is on %s, want %s\n%s", got.name, target.name, out.String())
	}
	out.Reset()
	if err := cmd.Run(t.Context(), []string{"status"}); err != nil || !strings.Contains(out.String(), target.name+" owns the database") {
		t.Errorf("status: %v\n%s", err, out.String())
	}
}

// A controller that fails to start here is handed to a host where it starts.
func TestFailover_StartFailsHere(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	must(t, os.WriteFile(filepath.Join(o.dir, "mode"), []byte("fail"), 0o600))
	o.signalController(syscall.SIGKILL)
	p.until(40*time.Second, "another host runs the controller", func() bool {
		n := p.owner()
		return n != nil && n != o
	})
}

// Something keeps a file open below the mount point: the holder is named, nothing is forced, and the release ends when it lets go.
func TestFailover_HeldMountIsNamed(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	holder := o.in.Command("sh", "-c", "cd "+o.mp+" && exec sleep 600")
	must(t, holder.Start())
	ended := make(chan struct{})
	go func() { _ = holder.Wait(); close(ended) }()
	p.cut(o, true)
	p.until(20*time.Second, "a finding names the holder", func() bool {
		r, _ := o.client().Status(t.Context())
		for _, f := range r.Findings {
			if f.Code == "release-stuck" && strings.Contains(f.Text, "sleep (pid") {
				return true
			}
		}
		return false
	})
	if !o.isMounted() {
		t.Error("the held filesystem was unmounted by force")
	}
	for _, d := range o.sleepers() {
		must(t, syscall.Kill(d, syscall.SIGKILL))
	}
	<-ended
	p.until(10*time.Second, "the release ends", func() bool { return !o.isMounted() })
}

// sleepers finds the host's sleep processes that this test started below the mount point.
func (h *host) sleepers() (out []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if cwd, err := os.Readlink(d + "/cwd"); err == nil && strings.HasSuffix(cwd, "/"+h.name+"/linstor") && strings.HasPrefix(cwd, h.p.dir) {
			out = append(out, atoi(filepath.Base(d)))
		}
	}
	return out
}

// A backup is taken on the active host, leaves nothing on its filesystem, and two other hosts get it.
func TestFailover_Backup(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	for _, h := range p.hosts {
		store := &failover.Store{Dir: filepath.Join(h.dir, "state", "backups")}
		p.until(20*time.Second, h.name+" keeps a backup", func() bool {
			list, err := store.List()
			return err == nil && len(list) > 0 && store.Check(list[0]) == nil
		})
	}
	left, err := o.in.Command("find", o.mp, "-name", "*.zip").Output()
	if err != nil || len(left) > 0 {
		t.Errorf("left on the database's filesystem: %q, %v", left, err)
	}
	var out bytes.Buffer
	cmd := failover.Command{Client: o.client(), Out: &out, Store: filepath.Join(o.dir, "state", "backups")}
	if err := cmd.Run(t.Context(), []string{"backups"}); err != nil || !strings.Contains(out.String(), "good") {
		t.Errorf("backups: %v\n%s", err, out.String())
	}
	out.Reset()
	if err := cmd.Run(t.Context(), []string{"restore", "--plan"}); err != nil || !strings.Contains(out.String(), "sha256sum -c") || !strings.Contains(out.String(), o.name) {
		t.Errorf("restore --plan: %v\n%s", err, out.String())
	}
}

// A reactor promoter anywhere in the pool makes every agent a guard: nothing of ours is promoted.
func TestFailover_ReactorAppears(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.settled()
	h := p.others(o)[0]
	must(t, os.WriteFile(filepath.Join(h.dir, "reactor.toml"), []byte("[[promoter]]\n[promoter.resources.xcp-persistent-database]\nstart = [\"linstor-controller.service\"]\n"), 0o600))
	pid := o.state(testNames.Controller).MainPID
	for _, x := range p.hosts {
		p.until(20*time.Second, x.name+" guards", func() bool {
			r, err := x.client().Status(t.Context())
			return err == nil && r.Mode == failover.Guard
		})
	}
	if u := o.state(testNames.Controller); u.MainPID != pid {
		t.Error("the change of mode disturbed the controller")
	}
	if err := (failover.Command{Client: o.client(), Out: &bytes.Buffer{}}).Run(t.Context(), []string{"move"}); err == nil || !strings.Contains(err.Error(), "drbd-reactorctl") {
		t.Errorf("move in guard mode: %v, want a hint to drbd-reactorctl", err)
	}
}
