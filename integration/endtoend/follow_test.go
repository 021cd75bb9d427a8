package endtoend

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

// What happens to disks shows in XAPI with nobody scanning.
func TestSizesFollow(t *testing.T) {
	for name, thick := range map[string]bool{"thin": false, "thick": true} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, lab.Options{Thick: thick})
			s.start("xcp1")
			vdi, err := s.pool.CreateDisk(20 * gib)
			s.ok(err)
			s.shown("disk created")
			s.ok(s.pool.WriteDisk(vdi, 3*gib))
			s.shown("guest wrote")
			snap, err := s.pool.SnapshotDisk(vdi)
			s.ok(err)
			s.shown("snapshot taken")
			s.ok(s.pool.ResizeDisk(vdi, 40*gib))
			s.shown("disk resized")
			vm, err := s.pool.CreateVM("guest", vdi)
			s.ok(err)
			s.ok(s.pool.StartVM(vm, "xcp2"))
			s.ok(s.pool.WriteDisk(vdi, gib))
			s.shown("running guest wrote")
			s.ok(s.pool.StopVM(vm))
			s.ok(s.pool.DeleteDisk(snap))
			s.shown("snapshot deleted")
			s.onlyStart()
			if thick {
				return // LINSTOR's controller itself learns the size of a thick pool every 180 s only
			}
			for _, h := range s.pool.Hosts() {
				s.pool.AddCapacity(h.Name, 1<<28)
			}
			s.shown("capacity added")
		})
	}
}

// SM writes right numbers when it makes a disk. An agent that decided on an older copy of LINSTOR would put the old ones back for a moment; it must never.
func TestNothingOldIsPutBack(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("before")
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	watching.Go(func() {
		high := s.pool.Truth(s.pool.SR()).Utilisation
		_ = s.pool.Await(ctx, func() bool { // Ends with ctx.
			used := s.pool.Shown(s.pool.SR()).Utilisation
			if used < high {
				t.Errorf("XAPI showed %d after %d was true", used, high)
			}
			high = max(high, used)
			return false
		})
	})
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	for range 12 { // each disk adds to what is used: a value below the one before was old
		<-tick.C
		_, err := s.pool.CreateDisk(gib)
		s.ok(err)
	}
	s.shown("after")
	cancel()
	watching.Wait()
}

// Without the bus the agent is slower, not wrong.
func TestAgentWithoutBus(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.more = "resync = \"500ms\"\n"
	s.daemon("xcp1/sr-size", "agent", "sr-size", "--config", s.config("xcp1"))
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("guest wrote")
	s.onlyStart()
}

// On a supporter the agent looks on, and plan says so.
func TestSupporterWritesNothing(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.more = "resync = \"200ms\"\n"
	s.start("xcp2")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.pool.XAPI().ForgetCalls()
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.eventually("five passes", func() bool { st, _ := s.status("xcp2"); return st.Passes >= 5 })
	s.nothingWritten()
	if s.pool.True() {
		t.Error("somebody corrected XAPI")
	}
	plan := s.run("plan", "sr-size", "--config", s.config("xcp2"))
	if plan.code != 0 || !strings.Contains(plan.out, "coordinator") {
		t.Errorf("plan on a supporter: %+v", plan)
	}
}

// plan prints what would be written, and writes nothing.
func TestPlanWritesNothing(t *testing.T) {
	s := newSite(t, lab.Options{})
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.pool.XAPI().ForgetCalls()
	s.ok(s.pool.WriteDisk(vdi, gib))
	plan := s.run("plan", "sr-size", "--config", s.config("xcp1"))
	if plan.code != 0 || !strings.Contains(plan.out, "would set-sr-size "+s.pool.SR()) {
		t.Errorf("plan: %+v", plan)
	}
	s.nothingWritten()
}

// When XAPI refuses the setters, SR.update does it, and a finding says so.
func TestSettersRefused(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.pool.XAPI().SetFault(s.pool.Coordinator().Ref, xapiface.Fault{Kind: xapiface.Fail, Code: "RBAC_PERMISSION_DENIED", Params: []string{"sr.set_physical_utilisation", "no"},
		Methods: []string{"SR.set_physical_utilisation", "SR.set_physical_size", "SR.set_virtual_allocation", "VDI.set_physical_utilisation"}})
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.start("xcp1")
	s.eventually("SR.update brings the sizes", func() bool { return s.pool.Shown(s.pool.SR()) == s.pool.Truth(s.pool.SR()) })
	s.finding("xcp1", "no-sm-session")
}
