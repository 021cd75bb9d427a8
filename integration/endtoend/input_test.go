package endtoend

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// Whatever the outside answers, the daemons run on, say in one line what is wrong and what to do, and write nothing; when it is over the numbers become right.
func TestBadAnswers(t *testing.T) {
	rows := []struct {
		name       string
		begin, end func(p *lab.Pool) error
		finding    string // of the agent; "": its passes fail with an error instead
	}{
		{"linstor html", answer(lab.HTMLError), answer(lab.Good), "linstor-unreachable"},
		{"linstor truncated json", answer(lab.Truncated), answer(lab.Good), "linstor-unreachable"},
		{"linstor invalid utf-8", answer(lab.Garbage), answer(lab.Good), "linstor-unreachable"},
		{"linstor down", func(p *lab.Pool) error { p.ControllerDown(); return nil }, (*lab.Pool).ControllerUp, "linstor-unreachable"},
		{"xapi html", func(p *lab.Pool) error { p.XAPIHTML(); return nil }, (*lab.Pool).XAPIUp, ""},
		{"xapi truncated", func(p *lab.Pool) error { p.XAPITruncated(); return nil }, (*lab.Pool).XAPIUp, ""},
		{"xapi socket missing", func(p *lab.Pool) error { p.XAPIDown(); return nil }, (*lab.Pool).XAPIUp, ""},
		{"no group", named("no-group"), named("groups-right"), "sr-without-group"},
		{"two groups", named("two-groups"), named("groups-right"), "sr-with-two-groups"},
		{"group missing", named("group-missing"), named("groups-right"), "group-missing"},
		{"redundancy 0", named("redundancy", "0"), named("redundancy", "2"), "redundancy-zero"},
		{"negative size", func(p *lab.Pool) error { return p.NegativeSize(p.Disks()[0]) }, func(p *lab.Pool) error { return p.RightSize(p.Disks()[0]) }, "partial-view"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			s := newSite(t, lab.Options{})
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
				s.failing("xcp1")
			}
			s.nothingWritten()
			s.onlyStart()
			s.ok(row.end(s.pool))
			s.shown("after")
			s.onlyStart()
		})
	}
}

func named(fault string, args ...string) func(*lab.Pool) error {
	return func(p *lab.Pool) error { return p.Fault(fault, args...) }
}

func answer(a lab.ControllerAnswer) func(*lab.Pool) error {
	return func(p *lab.Pool) error { p.SetControllerAnswer(a); return nil }
}

// failing waits until a host's agent fails, with one line that says why.
func (s *site) failing(host string) {
	s.t.Helper()
	s.eventually("the agent fails", func() bool {
		st, _ := s.status(host)
		if st.State != "failing" {
			return false
		}
		if st.LastError == "" || strings.Contains(st.LastError, "\n") {
			s.t.Errorf("the error is not one line: %q", st.LastError)
		}
		return true
	})
}

// A daemon that is started while XAPI, LINSTOR and the bus are all away waits for them.
func TestStartsBeforeEverything(t *testing.T) {
	s := newSite(t, lab.Options{})
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.pool.XAPIDown()
	s.pool.ControllerDown()
	s.start("xcp1")
	s.failing("xcp1")
	s.ok(s.pool.XAPIUp())
	s.ok(s.pool.ControllerUp())
	s.shown("everything came")
	s.onlyStart()
}

// A configuration that cannot be meant ends the program at once: code 2, one line that names the file, the key and what is allowed.
func TestBadConfiguration(t *testing.T) {
	s := newSite(t, lab.Options{})
	dir := t.TempDir()
	for name, row := range map[string]struct{ text, want string }{
		"unknown key":     {"[agents.sr-size]\ninterval = \"5s\"\n", "agents.sr-size.interval"},
		"unknown section": {"[agent]\nmode = \"act\"\n", "agent"},
		"wrong type":      {"[linstor]\ncontrollers = \"localhost\"\n", "controllers"},
		"wrong value":     {"[agents.sr-size]\nmode = \"acting\"\n", "acting"},
		"no duration":     {"[agents.sr-size]\ngrace = \"soon\"\n", "soon"},
		"no TOML":         {"mode: act\n", "line 1"},
		"invalid utf-8":   {"[host]\nname = \"\xff\"\n", "line 2"},
	} {
		path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".toml")
		s.ok(os.WriteFile(path, []byte(row.text), 0o600))
		for _, args := range [][]string{{"bus"}, {"agent", "sr-size"}, {"status"}} {
			r := s.run(append(args, "--config", path)...)
			if r.code != 2 || strings.Count(r.errOut, "\n") != 1 || !strings.Contains(r.errOut, row.want) || !strings.Contains(r.errOut, path) {
				t.Errorf("%s, xostor %v: code %d, %q; want code 2 and one line with %q and the file", name, args, r.code, r.errOut, row.want)
			}
		}
	}
	if r := s.run("status", "--config", filepath.Join(dir, "none.toml")); r.code != 2 || strings.Count(r.errOut, "\n") != 1 {
		t.Errorf("missing file: %+v", r)
	}
}

// Tools without a bus say what to do.
func TestToolsWithoutBus(t *testing.T) {
	s := newSite(t, lab.Options{})
	for _, args := range [][]string{{"status"}, {"events"}} {
		r := s.run(append(args, "--config", s.config("xcp1"))...)
		if r.code != 1 || strings.Count(r.errOut, "\n") != 1 || !strings.Contains(r.errOut, "systemctl") {
			t.Errorf("xostor %v with no bus: %+v, want code 1 and one line that names the next command", args, r)
		}
	}
}

// Objects of classes that nobody here knows, names that are no UTF-8, and nonsense on the bus change nothing.
func TestUnknownEvents(t *testing.T) {
	s := newSite(t, lab.Options{})
	s.start("xcp1")
	vdi, err := s.pool.CreateDisk(20 * gib)
	s.ok(err)
	s.shown("before")
	for _, class := range []string{"VMPP", "blob", "console", "secret"} {
		_, err := s.pool.DB().Create(class, nil)
		s.ok(err)
	}
	ref, err := s.pool.DB().ByUUID("VDI", vdi)
	s.ok(err)
	s.ok(s.pool.DB().Set("VDI", ref, "name_label", "\xff\xfe disk"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := bus.Dial(ctx, filepath.Join(filepath.Dir(s.config("xcp1")), "bus.sock"), "test")
	s.ok(err)
	defer conn.Close()
	for _, subject := range []string{"xostor.v1.xapi.warp_drive.1", "xostor.v1.linstor.flux.a", "xostor.v1.xapi.vdi.1", "xostor.v1.xapi.sr.1"} {
		for _, body := range []string{"", "{", "\xff\xfe", strings.Repeat("[", 10000)} {
			s.ok(conn.Publish(&bus.Message{Subject: subject, Data: []byte(body)}))
		}
	}
	s.ok(conn.Flush(ctx))
	s.ok(s.pool.WriteDisk(vdi, gib))
	s.shown("after nonsense")
	s.onlyStart()
}
