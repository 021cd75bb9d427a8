package failover_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
)

// restarted waits for another controller process on the same host.
func restarted(t *testing.T, p *realpool.Pool, o *realpool.Host, pid int) {
	t.Helper()
	// A stopped process accepts connections and never answers: three probes of five seconds come before anything is done.
	p.Until(lasting, "another controller process on the same host", func() bool {
		u := o.State(realpool.Controller)
		return u.Active == "active" && u.MainPID != pid && u.MainPID != 0 // state and process are read one after the other
	})
}

// A controller that dies or hangs is started again on the same host, though its unit has no Restart=.
func TestFailover_ControllerSick(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	mode := o.ModeFile()
	t.Run("killed", func(t *testing.T) {
		pid := o.State(realpool.Controller).MainPID
		o.SignalController(syscall.SIGKILL)
		restarted(t, p, o, pid)
	})
	t.Run("stopped by a signal", func(t *testing.T) {
		pid := o.State(realpool.Controller).MainPID
		o.SignalController(syscall.SIGSTOP)
		restarted(t, p, o, pid)
	})
	t.Run("answers 500", func(t *testing.T) {
		pid := o.State(realpool.Controller).MainPID
		must(t, os.WriteFile(mode, []byte("500"), 0o600))
		p.Until(lasting, "the sick process ends", func() bool { return o.State(realpool.Controller).MainPID != pid })
		must(t, os.Remove(mode))
		p.Until(lasting, "one controller", func() bool { return p.Owner() != nil })
	})
}

// An agent that is killed and started again changes nothing; while it is away, nothing depends on it.
func TestFailover_AgentRestarted(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	before := o.State(realpool.Controller)
	for _, h := range p.Hosts {
		h.EndAgent()
		h.StartAgent()
		p.Until(lasting, "the agent on "+h.Name+" knows its mode", func() bool {
			r, err := h.Client().Status(t.Context())
			return err == nil && r.Mode == failover.Owner
		})
	}
	if after := o.State(realpool.Controller); after.MainPID != before.MainPID || after.Active != "active" || p.Owner() != o {
		t.Errorf("the controller was %+v, is %+v", before, after)
	}
}

// The owner is cut off with a writer stuck in state D: it lets go, another takes over, and after the heal all are connected.
func TestFailover_OwnerCutOff(t *testing.T) {
	for _, policy := range []string{"suspend-io", "io-error"} {
		t.Run(policy, func(t *testing.T) {
			p := newPool(t, policy)
			o := p.Settled()
			began := time.Now()
			p.Cut(o, true)
			p.Until(lasting, "the cut-off owner has let go", func() bool {
				gone := false
				p.Wall.Do(func() { gone = !o.Node.IsPrimary() && !o.Node.Held() })
				return gone && !o.Mounted() && o.State(realpool.Controller).Down()
			})
			lost, free := o.Since(began, "no quorum"), o.Since(began, "unmounted")
			t.Logf("%s: quorum lost -> unmounted %s", policy, free.Sub(lost).Round(time.Millisecond))
			next := p.Settled()
			if next == o {
				t.Fatalf("%s is cut off and runs the controller", o.Name)
			}
			p.Cut(o, false)
			p.Until(lasting, "all hosts are connected and up to date", p.Connected)
			if got := p.Settled(); got != next {
				t.Errorf("the controller moved again, from %s to %s", next.Name, got.Name)
			}
		})
	}
}

// The events stream of the owner is dead when it loses quorum. It lets go all the same.
func TestFailover_EventsDie(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	p.Cut(o, true)
	for range 3 { // and it dies again
		for _, pid := range eventStreams(o) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have died with the one before
		}
	}
	p.Until(lasting, "the owner has let go", func() bool { return !o.Mounted() && o.State(realpool.Controller).Down() })
}

// eventStreams finds the processes that run events2 for this pool's host.
func eventStreams(h *realpool.Host) (out []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		cmd, _ := os.ReadFile(d + "/cmdline")
		if bytes.HasPrefix(cmd, []byte(h.Pool().Drbdsetup()+"\x00events2")) {
			env, _ := os.ReadFile(d + "/environ")
			if bytes.Contains(env, []byte("DRBDSIM_NODE="+h.Name+"\x00")) {
				out = append(out, atoi(filepath.Base(d)))
			}
		}
	}
	return out
}

// A host dies. Its agent's silence leads another host to ask DRBD, long before DRBD would notice by itself.
func TestFailover_HostDies(t *testing.T) {
	p := newPool(t, "io-error")
	p.Wall.Do(func() { p.Cluster.PingInt = 10 * time.Second })
	o := p.Settled()
	p.Until(lasting, "all hosts are connected", p.Connected)
	began := time.Now()
	p.Die(o)
	var next *realpool.Host
	p.Until(lasting, "another host runs the controller", func() bool {
		next = p.Owner()
		return next != nil && next != o
	})
	t.Logf("dead host -> mounted %s", next.Since(began, "mounted").Sub(began).Round(time.Millisecond))
	if next.Since(began, "mounted").Sub(began) > 9*time.Second {
		t.Log("DRBD's own detection was first") // possible: its clock may run out at any time
	}
}

// A move goes where it is told, and back to any host that can take it; what cannot be is refused with the reason.
func TestFailover_Move(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	target := p.Others(o)[1]
	p.Until(lasting, "all hosts can take it", func() bool {
		r, err := o.Client().Status(t.Context())
		ready := 0
		for _, h := range r.Hosts {
			if h.Usable && h.Mode == failover.Owner {
				ready++
			}
		}
		return err == nil && ready == 3
	})
	var out bytes.Buffer
	cmd := failover.Command{Client: p.Others(target)[0].Client(), Out: &out, Store: filepath.Join(o.StateDir(), "backups")}
	for _, bad := range []string{"nowhere", o.Name} {
		if err := cmd.Run(t.Context(), []string{"move", bad}); err == nil {
			t.Errorf("a move to %s was accepted", bad)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), lasting)
	defer cancel()
	p.Until(lasting, "it is moved", func() bool {
		err := cmd.Run(ctx, []string{"move", target.Name})
		if err != nil {
			t.Log(err) // an agent that has no processor for a second counts as away: the order is refused, or rolled back, and may be given again
		}
		return err == nil
	})
	if got := p.Settled(); got != target {
		t.Errorf("the controller is on %s, want %s\n%s", got.Name, target.Name, out.String())
	}
	out.Reset()
	if err := cmd.Run(t.Context(), []string{"status"}); err != nil || !strings.Contains(out.String(), target.Name+" owns the database") {
		t.Errorf("status: %v\n%s", err, out.String())
	}
}

// A controller that fails to start here is handed to a host where it starts.
func TestFailover_StartFailsHere(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	must(t, os.WriteFile(o.ModeFile(), []byte("fail"), 0o600))
	o.SignalController(syscall.SIGKILL)
	p.Until(lasting, "another host runs the controller", func() bool {
		n := p.Owner()
		return n != nil && n != o
	})
}

// Something keeps a file open below the mount point: the holder is named, nothing is forced, and the release ends when it lets go.
func TestFailover_HeldMountIsNamed(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	holder := o.In.Command("sh", "-c", "cd "+o.MountPoint+" && exec sleep 600")
	must(t, holder.Start())
	ended := make(chan struct{})
	go func() { _ = holder.Wait(); close(ended) }()
	p.Cut(o, true)
	p.Until(lasting, "a finding names the holder", func() bool {
		r, _ := o.Client().Status(t.Context())
		for _, f := range r.Findings {
			if f.Code == "release-stuck" && strings.Contains(f.Text, "sleep (pid") {
				return true
			}
		}
		return false
	})
	if !o.Mounted() {
		t.Error("the held filesystem was unmounted by force")
	}
	for _, d := range sleepers(o) {
		must(t, syscall.Kill(d, syscall.SIGKILL))
	}
	<-ended
	p.Until(lasting, "the release ends", func() bool { return !o.Mounted() })
}

// sleepers finds the host's sleep processes that this test started below the mount point.
func sleepers(h *realpool.Host) (out []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if cwd, err := os.Readlink(d + "/cwd"); err == nil && strings.HasSuffix(cwd, "/"+h.Name+"/linstor") && strings.HasPrefix(cwd, h.Pool().Dir) {
			out = append(out, atoi(filepath.Base(d)))
		}
	}
	return out
}

// A backup is taken on the active host, leaves nothing on its filesystem, and two other hosts get it.
func TestFailover_Backup(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	for _, h := range p.Hosts {
		store := &failover.Store{Dir: filepath.Join(h.StateDir(), "backups")}
		p.Until(lasting, h.Name+" keeps a backup", func() bool {
			list, err := store.List()
			return err == nil && len(list) > 0 && store.Check(list[0]) == nil
		})
	}
	left, err := o.In.Command("find", o.MountPoint, "-name", "*.zip").Output()
	if err != nil || len(left) > 0 {
		t.Errorf("left on the database's filesystem: %q, %v", left, err)
	}
	var out bytes.Buffer
	cmd := failover.Command{Client: o.Client(), Out: &out, Store: filepath.Join(o.StateDir(), "backups")}
	if err := cmd.Run(t.Context(), []string{"backups"}); err != nil || !strings.Contains(out.String(), "good") {
		t.Errorf("backups: %v\n%s", err, out.String())
	}
	out.Reset()
	if err := cmd.Run(t.Context(), []string{"restore", "--plan"}); err != nil || !strings.Contains(out.String(), "sha256sum -c") || !strings.Contains(out.String(), o.Name) {
		t.Errorf("restore --plan: %v\n%s", err, out.String())
	}
	cmd.JSON = true
	out.Reset()
	var plan struct{ Steps []string }
	if err := cmd.Run(t.Context(), []string{"restore", "--plan"}); err != nil || json.Unmarshal(out.Bytes(), &plan) != nil || len(plan.Steps) == 0 {
		t.Errorf("restore --plan as JSON: %v\n%s", err, out.String())
	}
	out.Reset()
	var listed []struct{ Name, Check string }
	if err := cmd.Run(t.Context(), []string{"backups"}); err != nil || json.Unmarshal(out.Bytes(), &listed) != nil || len(listed) == 0 || listed[0].Check != "good" {
		t.Errorf("backups as JSON: %v\n%s", err, out.String())
	}
}

// A reactor promoter anywhere in the pool makes every agent a guard: nothing of ours is promoted.
func TestFailover_ReactorAppears(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	h := p.Others(o)[0]
	must(t, os.WriteFile(filepath.Join(h.Dir, "reactor.toml"), []byte("[[promoter]]\n[promoter.resources.xcp-persistent-database]\nstart = [\"linstor-controller.service\"]\n"), 0o600))
	pid := o.State(realpool.Controller).MainPID
	for _, x := range p.Hosts {
		p.Until(lasting, x.Name+" guards", func() bool {
			r, err := x.Client().Status(t.Context())
			return err == nil && r.Mode == failover.Guard
		})
	}
	if u := o.State(realpool.Controller); u.MainPID != pid {
		t.Error("the change of mode disturbed the controller")
	}
	if err := (failover.Command{Client: o.Client(), Out: &bytes.Buffer{}}).Run(t.Context(), []string{"move"}); err == nil || !strings.Contains(err.Error(), "drbd-reactorctl") {
		t.Errorf("move in guard mode: %v, want a hint to drbd-reactorctl", err)
	}
}
