package endtoend

import (
	"testing"

	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// A host is lost: the last good sizes stay, also when a scan has written wrong ones they come back once the view is whole.
func TestHostLost(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("guest wrote")
	good := s.pool.Shown(s.pool.SR())
	s.pool.XAPI().ForgetCalls()

	s.pool.HostDown("xcp3")
	s.finding("xcp1", "partial-view")
	s.nothingWritten()
	if got := s.pool.Shown(s.pool.SR()); got != good {
		t.Errorf("XAPI shows %v, want the last good %v", got, good)
	}
	s.ok(s.pool.SRScan())
	if s.pool.Shown(s.pool.SR()) == good {
		t.Fatal("the scan did not show SM's defect")
	}
	s.finding("xcp1", "wrong-numbers")
	s.nothingWritten()

	s.ok(s.pool.HostUp("xcp3"))
	s.shown("host is back")
	s.eventually("partial-view is cleared", func() bool {
		st, answers := s.status("xcp1")
		for _, f := range st.Findings {
			if f.Code == "partial-view" {
				return false
			}
		}
		return answers
	})
	s.onlyStart()
}

// A scan writes wrong numbers while a satellite is away and gone again at once: they are corrected with no event from LINSTOR's disks.
func TestWrongNumbersAreCorrected(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("disk created")
	s.pool.SatelliteOffline("xcp2")
	s.ok(s.pool.SRScan())
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.pool.SatelliteOnline("xcp2")
	s.shown("satellite is back")
	s.onlyStart()
}

func TestControllerMoves(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("disk created")
	for _, host := range []string{"xcp2", "xcp3", "xcp1"} {
		s.ok(s.pool.MoveController(host))
		s.ok(s.pool.WriteDisk(vdi, gib))
		s.shown("controller on " + host)
	}
	s.onlyStart()
}

func TestXAPIRestart(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("disk created")
	s.pool.RestartXAPI()
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("XAPI restarted")
	s.pool.XAPIDown()
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.eventually("the agent notices", func() bool { st, _ := s.status("xcp1"); return st.State == "failing" })
	s.ok(s.pool.XAPIUp())
	s.shown("XAPI was away")
	s.onlyStart()
}

// The coordinator moves: the agent there takes over, the one here stops writing.
func TestCoordinatorMoves(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	s.start("xcp2")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("before")
	s.ok(s.pool.MoveCoordinator("xcp2"))
	s.pool.XAPI().ForgetCalls()
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("coordinator moved")
	writers := map[string]bool{}
	for _, c := range s.setters() {
		writers[c.Host] = true
	}
	if len(writers) != 1 || !writers[s.pool.Host("xcp2").Ref] {
		t.Errorf("written from %v, want only the new coordinator", writers)
	}
	s.onlyStart()
}

// The coordinator's host dies with its daemons, another becomes coordinator, the dead one comes back as a supporter.
func TestCoordinatorDies(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	s.start("xcp2")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("before")
	s.pool.HostDown("xcp1")
	for _, name := range []string{"xcp1/bus", "xcp1/sr-size"} {
		s.ok(s.daemons[name].Kill())
	}
	s.ok(s.pool.MoveController("xcp2"))
	s.ok(s.pool.MoveCoordinator("xcp2"))
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.finding("xcp2", "partial-view")
	s.ok(s.pool.HostUp("xcp1"))
	s.shown("host is back")
}

// kill -9 of each daemon; systemd starts it again; the numbers are right.
func TestKilledDaemons(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("before")
	for _, name := range []string{"xcp1/bus", "xcp1/sr-size"} {
		_, again := s.daemons[name].Starts()
		s.ok(s.daemons[name].Kill())
		s.ok(s.pool.WriteDisk(vdi, gib))
		select {
		case <-again:
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
		s.shown("killed " + name)
	}
	for _, d := range s.daemons {
		s.ok(d.Kill())
	}
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("killed both at once")
}
