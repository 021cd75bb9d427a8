package failover_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
)

// scripted is a pool in virtual time without drawn faults: three hosts, the first diskful ones by number.
func scripted(t *testing.T, diskful int, onNoQuorum string) *world {
	t.Helper()
	w := &world{clock: drbdsim.NewVirtual(), rng: rand.New(rand.NewPCG(7, 7)), mgmtCut: map[[2]int]bool{}}
	cfg := drbdsim.Config{Resource: failover.DefaultNames().Resource, Minor: 1000, Seed: 7, OnNoQuorum: onNoQuorum, RRConflict: "disconnect", OnSuspended: "disconnect"}
	for i := range 3 {
		cfg.Nodes = append(cfg.Nodes, drbdsim.NodeConfig{Name: fmt.Sprintf("h%d", i+1), Diskful: i < diskful})
	}
	w.cl = drbdsim.New(cfg, w.clock)
	for _, node := range w.cl.Nodes() {
		w.hosts = append(w.hosts, &host{w: w, node: node, known: map[string]string{}, ctl: unit{active: "inactive"}, mountUnit: unit{active: "inactive"}, target: unit{active: "inactive"}})
	}
	t.Cleanup(func() {
		for _, h := range w.hosts {
			h.stopAgent()
		}
		if len(w.faults) > 0 {
			t.Errorf("%s\n%s", strings.Join(w.faults, "; "), strings.Join(w.log, "\n"))
		}
	})
	return w
}

func (w *world) bootAll(t *testing.T) *host {
	t.Helper()
	for _, h := range w.hosts {
		h.boot()
	}
	w.want(t, time.Minute, "a controller", func() bool { return w.owner() != nil && w.connected() })
	return w.owner()
}

func (w *world) want(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	if !w.until(limit, cond) {
		t.Fatalf("not within %s: %s%s\n%s", limit, what, w.summary(), strings.Join(w.log, "\n"))
	}
}

// crashAfter lets the agent die after its n-th action from now on.
func (h *host) crashAfter(n int) { h.crashIn = n }

// The agent dies after each of its first actions in turn, while it takes the database and while it lets go of it. The next life goes on from there.
func TestScenario_AgentKilledAtEveryStep(t *testing.T) {
	for step := 1; step <= 6; step++ {
		t.Run(fmt.Sprintf("promote, step %d", step), func(t *testing.T) {
			w := scripted(t, 3, "io-error")
			o := w.bootAll(t)
			for _, h := range w.hosts {
				h.crashAfter(step)
			}
			o.down()
			w.want(t, time.Minute, "another host runs the controller", func() bool { n := w.owner(); return n != nil && n != o })
		})
		for _, policy := range []string{"io-error", "suspend-io"} {
			t.Run(fmt.Sprintf("demote, %s, step %d", policy, step), func(t *testing.T) {
				w := scripted(t, 3, policy)
				o := w.bootAll(t)
				o.crashAfter(step)
				for _, h := range w.hosts {
					if h != o {
						w.cl.Cut(o.node, h.node, true)
					}
				}
				w.want(t, time.Minute, "the owner has let go", func() bool { return !o.mounted && !o.ctlAlive && !o.node.IsPrimary() })
				w.want(t, time.Minute, "another host runs the controller", func() bool { n := w.owner(); return n != nil && n != o })
				for _, h := range w.hosts {
					if h != o {
						w.cl.Cut(o.node, h.node, false)
					}
				}
				w.want(t, time.Minute, "all are connected again", w.connected)
			})
		}
	}
}

// The target of a move dies while it takes over: some host has the controller again within a minute.
func TestScenario_MoveTargetDies(t *testing.T) {
	for after := range 10 {
		w := scripted(t, 3, "io-error")
		o := w.bootAll(t)
		target := w.hosts[(o.node.ID+1)%3]
		o.table.Order(w.clock.Now(), failover.Move{ID: "m", From: o.node.Name, To: target.node.Name})
		o.proc.wake()
		w.clock.Run(time.Duration(after) * 300 * time.Millisecond)
		target.down()
		w.want(t, time.Minute, "a controller elsewhere", func() bool { n := w.owner(); return n != nil && n != target })
	}
}

// A move to a host that never takes it ends where it began.
func TestScenario_MoveRollsBack(t *testing.T) {
	w := scripted(t, 3, "io-error")
	o := w.bootAll(t)
	target := w.hosts[(o.node.ID+1)%3]
	target.stopAgent()
	o.table.Order(w.clock.Now(), failover.Move{ID: "m", From: o.node.Name, To: target.node.Name})
	o.proc.wake()
	w.want(t, time.Minute, "the former owner lets go", func() bool { return !o.node.IsPrimary() })
	w.want(t, time.Minute, "the former owner has it again", func() bool { return w.owner() == o })
}

// The whole pool loses power, and hosts come back one by one: nobody is promoted before there is quorum, and status names who is missing.
func TestScenario_PowerCut(t *testing.T) {
	w := scripted(t, 3, "io-error")
	w.bootAll(t)
	for _, h := range w.hosts {
		h.down()
	}
	w.hosts[0].boot()
	w.clock.Run(30 * time.Second)
	if w.owner() != nil {
		t.Error("a controller without quorum")
	}
	s, err := w.hosts[0].agent.Observe(context.Background())
	if text := failover.Describe(w.clock.Now(), s); err != nil || text != "1 of 3 voters, waiting for host h2, h3" {
		t.Errorf("status says %q, %v", text, err)
	}
	w.hosts[1].boot()
	w.want(t, time.Minute, "a controller with two of three", func() bool { return w.owner() != nil })
	w.hosts[2].boot()
	w.want(t, time.Minute, "all are connected", w.connected)
}

// Two replicas and a tie-breaker: the tie-breaker goes, then a replica. The owner loses quorum and lets go; when they return, all is well.
func TestScenario_TieBreakerThenReplica(t *testing.T) {
	w := scripted(t, 2, "io-error")
	o := w.bootAll(t)
	w.hosts[2].down()
	w.clock.Run(20 * time.Second)
	if w.owner() != o {
		t.Fatal("the loss of the tie-breaker alone disturbed the owner")
	}
	other := w.hosts[1-o.node.ID]
	other.down()
	w.want(t, time.Minute, "the owner has let go", func() bool { return !o.mounted && !o.ctlAlive && !o.node.IsPrimary() })
	other.boot()
	w.hosts[2].boot()
	w.want(t, time.Minute, "a controller", func() bool { return w.owner() != nil && w.connected() })
}

// The owner's disk fails: DRBD goes on over the network, and so does the controller.
func TestScenario_DiskDetaches(t *testing.T) {
	w := scripted(t, 3, "io-error")
	o := w.bootAll(t)
	pid := o.ctl.pid
	o.node.Detach()
	w.clock.Run(30 * time.Second)
	if w.owner() != o || o.ctl.pid != pid || o.node.Disk() != "Diskless" {
		t.Errorf("after the loss of its disk: %s", w.summary())
	}
}

// Short losses of quorum under suspend-io cost nothing; long ones cost one failover.
func TestScenario_QuorumFlap(t *testing.T) {
	for _, policy := range []string{"io-error", "suspend-io"} {
		for _, length := range []time.Duration{300 * time.Millisecond, 5 * time.Second, 24 * time.Second} {
			t.Run(fmt.Sprint(policy, " ", length), func(t *testing.T) {
				w := scripted(t, 3, policy)
				o := w.bootAll(t)
				pid := o.ctl.pid
				for _, broken := range []bool{true, false} {
					for _, h := range w.hosts {
						if h != o {
							w.cl.Cut(o.node, h.node, broken)
						}
					}
					if broken {
						w.clock.Run(length)
					}
				}
				w.want(t, time.Minute, "one controller, all connected", func() bool { return w.owner() != nil && w.connected() })
				if length < time.Second && (w.owner() != o || o.ctl.pid != pid) {
					t.Error("a flap of 0.3 s disturbed the controller")
				}
			})
		}
	}
}

// An administrator takes a connection down: no agent takes it up again, not after a restart, a reboot or a failover either, until a person does.
func TestScenario_DisconnectedByHand(t *testing.T) {
	w := scripted(t, 3, "io-error")
	o := w.bootAll(t)
	a, b := w.hosts[(o.node.ID+1)%3], w.hosts[(o.node.ID+2)%3]
	if err := a.node.Disconnect(b.node.ID); err != nil {
		t.Fatal(err)
	}
	stays := func(what string, d time.Duration) {
		t.Helper()
		if w.until(d, func() bool { return a.node.ConnState(b.node) == "Connected" }) {
			t.Fatalf("connected behind the administrator's back: %s\n%s", what, strings.Join(w.log, "\n"))
		}
	}
	stays("while all is quiet", 2*time.Minute)
	if !slices.Equal(a.held, []string{b.node.Name}) {
		t.Errorf("kept on disk: %v", a.held)
	}
	a.stopAgent()
	a.startAgent()
	stays("by an agent that was restarted", time.Minute)
	if w.owner() != o {
		t.Error("the controller moved")
	}
	w.cl.Cut(o.node, a.node, true) // another connection fails and heals meanwhile
	w.clock.Run(20 * time.Second)
	w.cl.Cut(o.node, a.node, false)
	stays("while others were mended", time.Minute)
	if err := a.node.Connect(b.node.ID); err != nil {
		t.Fatal(err)
	}
	w.want(t, time.Minute, "all are connected", func() bool { return w.owner() != nil && w.connected() })
	w.clock.Run(5 * time.Second)
	if len(a.held) > 0 {
		t.Errorf("still kept on disk: %v", a.held)
	}
}

// found returns a host's finding of a code, nil when it has none.
func (w *world) found(t *testing.T, h *host, code string) *agents.Finding {
	t.Helper()
	s, err := h.agent.Observe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range failover.Decide(w.clock.Now(), s).Findings {
		if f.Code == code {
			return &f
		}
	}
	return nil
}

func (w *world) isolate(h *host, broken bool) {
	for _, o := range w.hosts {
		if o != h {
			w.cl.Cut(h.node, o.node, broken)
		}
	}
}

// DRBD refuses to demote an owner that lost quorum. Its controller dies and its filesystem goes all the same, a finding says what DRBD said, and nothing is
// started there until the demotion is done.
func TestScenario_DemotionRefused(t *testing.T) {
	for _, policy := range []string{"io-error", "suspend-io"} {
		t.Run(policy, func(t *testing.T) {
			w := scripted(t, 3, policy)
			o := w.bootAll(t)
			o.node.RefuseDemotion = true
			w.isolate(o, true)
			w.want(t, time.Minute, "another host runs the controller", func() bool { n := w.owner(); return n != nil && n != o })
			if policy == "io-error" {
				w.want(t, 10*time.Second, "the filesystem is gone", func() bool { return !o.mounted && !o.ctlAlive })
			}
			if f := w.found(t, o, "release-stuck"); f == nil || !strings.Contains(f.Text, "refuses the demotion") {
				t.Errorf("finding: %+v", f)
			}
			w.clock.Run(time.Minute)
			if o.ctl.active == "active" || !o.node.IsPrimary() {
				t.Errorf("a controller without quorum, or the fault is over: %s", w.summary())
			}
			o.node.RefuseDemotion = false
			w.want(t, 10*time.Second, "the old owner has let go", func() bool { return !o.mounted && !o.ctlAlive && !o.node.IsPrimary() })
			w.isolate(o, false)
			w.want(t, time.Minute, "all are connected", func() bool { return w.owner() != nil && w.owner() != o && w.connected() })
			if f := w.found(t, o, "release-stuck"); f != nil {
				t.Errorf("still found: %+v", f)
			}
		})
	}
}

// A host boots while its volume is missing: the others have the controller, the host says what is missing, and comes up when it is back.
func TestScenario_VolumeMissingAtBoot(t *testing.T) {
	w := scripted(t, 3, "io-error")
	o := w.bootAll(t)
	o.down()
	o.node.NoBacking = true
	o.boot()
	w.want(t, time.Minute, "another host runs the controller", func() bool { n := w.owner(); return n != nil && n != o })
	w.clock.Run(30 * time.Second)
	if f := w.found(t, o, "resource-not-up"); f == nil || !strings.Contains(f.Text, "backing device") {
		t.Errorf("finding: %+v", f)
	}
	o.node.NoBacking = false
	w.want(t, 3*time.Minute, "all are connected", w.connected)
	if f := w.found(t, o, "resource-not-up"); f != nil {
		t.Errorf("still found: %+v", f)
	}
}

// A controller that starts nowhere stays on one host, with a finding that points to the backups, and comes up when its database opens again.
func TestScenario_StartFailsEverywhere(t *testing.T) {
	w := scripted(t, 3, "io-error")
	o := w.bootAll(t)
	for _, h := range w.hosts {
		h.startFails = 1000
	}
	o.killController()
	w.clock.Run(3 * time.Minute)
	found := 0
	for _, h := range w.hosts {
		if f := w.found(t, h, "database-does-not-open"); f != nil && strings.Contains(f.Fix, "restore --plan") {
			found++
		}
	}
	if found != 1 {
		t.Errorf("%d hosts say that the database does not open, want the one that has it\n%s", found, w.summary())
	}
	moves := strings.Count(strings.Join(w.log, "\n"), "start-controller")
	for _, h := range w.hosts {
		h.startFails = 0
	}
	w.want(t, 6*time.Minute, "a controller", func() bool { return w.owner() != nil })
	if moves > 40 {
		t.Errorf("%d starts in three minutes: no back-off", moves)
	}
}

// Only the management network is cut: nothing happens.
func TestScenario_ManagementCut(t *testing.T) {
	w := scripted(t, 3, "io-error")
	o := w.bootAll(t)
	pid := o.ctl.pid
	for _, h := range w.hosts {
		if h != o {
			w.mgmtCut[edge(h, o)] = true
		}
	}
	w.clock.Run(2 * time.Minute)
	if w.owner() != o || o.ctl.pid != pid {
		t.Errorf("the controller was disturbed: %s", w.summary())
	}
}

// The resource has no quorum: nobody is promoted, and a finding says what to set.
func TestScenario_QuorumOff(t *testing.T) {
	w := scripted(t, 3, "io-error")
	w.cl.Quorum = "off"
	for _, h := range w.hosts {
		h.boot()
	}
	w.clock.Run(2 * time.Minute)
	for _, h := range w.hosts {
		if h.node.IsPrimary() || h.mounted || h.ctlAlive {
			t.Errorf("%s took a resource without quorum", h.node.Name)
		}
		if f := w.found(t, h, "quorum-off"); f == nil || !strings.Contains(f.Fix, "majority") {
			t.Errorf("%s finding: %+v", h.node.Name, f)
		}
	}
}

// The host that promotes cannot mount: its unit's file went a moment before, which its agent has not seen, or every mount fails. Another host has the
// controller soon; when no host can mount, they try on without passing it round and round, and one has it when the cause is gone.
func TestScenario_OwnerCannotMount(t *testing.T) {
	tests := []struct {
		name string
		bend func(h *host)
	}{
		{"unit gone", func(h *host) { h.unitGone = true }},
		{"mounts fail", func(h *host) { h.mountFails = 1 << 30 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := scripted(t, 3, "io-error")
			o := w.bootAll(t)
			unfit := w.hosts[(o.node.ID+1)%3]
			tt.bend(unfit)
			o.table.Order(w.clock.Now(), failover.Move{ID: "m", From: o.node.Name, To: unfit.node.Name})
			o.proc.wake()
			w.want(t, 10*time.Second, "the unfit host promotes", unfit.node.IsPrimary)
			w.want(t, 30*time.Second, "another host runs the controller", func() bool { n := w.owner(); return n != nil && n != unfit })
		})
		t.Run(tt.name+" everywhere", func(t *testing.T) {
			w := scripted(t, 3, "io-error")
			o := w.bootAll(t)
			for _, h := range w.hosts {
				tt.bend(h)
			}
			for _, h := range w.hosts {
				w.cl.Cut(o.node, h.node, h != o)
			}
			w.clock.Run(2 * time.Minute)
			if w.owner() != nil {
				t.Error("a controller without its database")
			}
			moves := 0
			for _, line := range w.log {
				if strings.Contains(line, " yield map[hand-over:yes]") {
					moves++
				}
			}
			if moves > 3 {
				t.Errorf("%d hand-overs among three hosts in two minutes", moves)
			}
			for _, h := range w.hosts {
				w.cl.Cut(o.node, h.node, false)
				h.unitGone, h.unitGoneSeen, h.mountFails = false, false, 0
				h.changed()
			}
			w.want(t, 2*time.Minute, "a controller when the cause is gone", func() bool { return w.owner() != nil && w.connected() })
		})
	}
}
