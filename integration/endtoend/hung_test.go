package endtoend

import (
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// A controller or a satellite that takes requests and never answers holds nothing up for ever: nothing is written, and when it answers again the numbers become right.
func TestHung(t *testing.T) {
	for name, row := range map[string]struct {
		begin, end func(p *lab.Pool) error
		finding    string
	}{
		"controller": {answer(lab.Hung), answer(lab.Good), "linstor-unreachable"},
		// The client waits half a minute for satellites, longer than a test should: here only that nothing stays stuck.
		"satellite": {named("satellite-hung", "xcp3"), named("satellite-answers", "xcp3"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, lab.Options{})
			s.more = "resync = \"1s\"\n"
			s.start("xcp1")
			vdi, err := s.pool.CreateDisk(20 * gib)
			s.ok(err)
			s.ok(s.pool.WriteDisk(vdi, gib))
			s.shown("before")
			s.ok(row.begin(s.pool))
			s.pool.XAPI().ForgetCalls()
			s.ok(s.pool.WriteDisk(vdi, gib))
			if row.finding != "" {
				s.finding("xcp1", row.finding)
			} else {
				s.eventually("the agent still answers", func() bool { _, answers := s.status("xcp1"); return answers })
			}
			s.nothingWritten()
			s.ok(row.end(s.pool))
			s.shown("after")
			s.onlyStart()
		})
	}
}

// A slow controller delays, and no more.
func TestSlowController(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("before")
	s.pool.ControllerSlow(300 * time.Millisecond)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("slow")
	s.onlyStart()
}
