package bus_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/poolcert"
)

func TestCablePulled_StopsNobodyElse(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	s.startAll()
	a, b, c := s.watch(s.nodes[0]), s.watch(s.nodes[1]), s.watch(s.nodes[2])
	s.set("before")
	for _, w := range []*watcher{a, b, c} {
		s.sees(w, "before")
	}
	s.link(s.nodes[2], "down")
	s.set("without the third")
	s.sees(a, "without the third")
	s.sees(b, "without the third")
	s.stale(c)
	if got, _ := c.Get(s.nodes[0].UUID); got != "before" {
		t.Errorf("the cut host's mirror has %q, want its last contents", got)
	}
	s.eventually("status shows that the third does not answer", func() bool {
		for _, x := range s.status(s.nodes[1]) {
			if x.HostName == s.nodes[2].Name && x.Missing {
				return true
			}
		}
		return false
	})
	out, _, err := s.tool(s.nodes[1], "status")
	if exitCode(err) != 1 || !strings.Contains(out, "no answer") {
		t.Errorf("status with a host away: code %d\n%s", exitCode(err), out)
	}
	t.Logf("status with a cable pulled:\n%s", out)
	s.link(s.nodes[2], "up")
	s.set("whole again")
	for _, w := range []*watcher{a, b, c} {
		s.sees(w, "whole again")
	}
	s.meshed(s.nodes...)
	s.neverRestarted()
}

func TestCablePulledFromTheCoordinator_OthersSayStaleAndComeBack(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	s.startAll()
	a, b := s.watch(s.nodes[0]), s.watch(s.nodes[1])
	s.set("before")
	s.sees(a, "before")
	s.sees(b, "before")
	s.link(s.nodes[0], "down")
	s.set("only the coordinator knows")
	s.sees(a, "only the coordinator knows") // Its own door does not need the cable.
	s.stale(b)
	s.link(s.nodes[0], "up")
	s.sees(b, "only the coordinator knows")
	s.neverRestarted()
}

func TestOnePairCut_ByNftables(t *testing.T) {
	t.Parallel()
	need(t, "nft")
	s := newSite(t, 3)
	s.startAll()
	b, c := s.watch(s.nodes[1]), s.watch(s.nodes[2])
	s.set("before")
	s.sees(b, "before")
	s.sees(c, "before")
	sh(t, "ip", "netns", "exec", s.nodes[2].ns, "nft", fmt.Sprintf("add table inet cut; add chain inet cut in { type filter hook input priority 0; }; add rule inet cut in ip saddr %s drop", s.nodes[0].Addr))
	s.set("the third does not hear the coordinator")
	s.sees(b, "the third does not hear the coordinator")
	s.stale(c)
	sh(t, "ip", "netns", "exec", s.nodes[2].ns, "nft", "delete table inet cut")
	s.sees(c, "the third does not hear the coordinator")
	s.neverRestarted()
}

func TestBusKilled_ClientsComeBackAndNobodyElseNotices(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	s.startAll()
	a, b, c := s.watch(s.nodes[0]), s.watch(s.nodes[1]), s.watch(s.nodes[2])
	for i := range 3 {
		if err := s.nodes[1].daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprint("killed ", i)
		s.set(text)
		s.sees(a, text)
		s.sees(c, text)
		s.sees(b, text)
	}
	s.meshed(s.nodes...)
	s.neverRestarted(s.nodes[1])
}

func TestCoordinatorMoves_MirrorsAreNeverFreshAndWrong(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	s.startAll()
	w := []*watcher{s.watch(s.nodes[0]), s.watch(s.nodes[1]), s.watch(s.nodes[2])}
	s.set("by the first")
	for _, x := range w {
		s.sees(x, "by the first")
	}
	for i, to := range []*node{s.nodes[1], s.nodes[2], s.nodes[0]} {
		before := w[0].Freshness().Epoch
		if err := s.pool.MoveCoordinator(to.Name); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprint("move ", i)
		s.set(text)
		for _, x := range w {
			s.eventually(x.n.Name+" follows the new feed", func() bool { f := x.Freshness(); return f.Fresh && f.Epoch > before })
			s.sees(x, text)
		}
	}
	s.neverRestarted()
}

// TestChangesWhileHostsDie runs changes without a pause while buses are killed and links flap, and looks at the end that everybody has the truth. While a mirror
// says Fresh it must not be further behind than the signs of life allow.
func TestChangesWhileHostsDie(t *testing.T) {
	t.Parallel()
	s := newSite(t, 5)
	s.startAll()
	var w []*watcher
	for _, n := range s.nodes {
		w = append(w, s.watch(n))
	}
	var last atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for i := int64(1); ; i++ {
			select {
			case <-stop:
				return
			case <-tick.C:
				_ = s.pool.DB().Set("host", s.nodes[0].Ref, "name_description", fmt.Sprint(i)) // It is read at the end.
				last.Store(i)
			}
		}
	}()
	for round := range 4 {
		victim := s.nodes[1+round]
		if round%2 == 0 {
			s.link(victim, "down")
		} else if err := victim.daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		was := last.Load()
		for i, x := range w {
			if s.nodes[i] == victim {
				continue
			}
			s.eventually(x.n.Name+" hears changes while "+victim.Name+" is away", func() bool {
				var got int64
				text, _ := x.Get(s.nodes[0].UUID)
				_, _ = fmt.Sscan(text, &got)
				return got > was && x.Freshness().Fresh
			})
		}
		if round%2 == 0 {
			s.link(victim, "up")
		}
	}
	close(stop)
	<-done
	for _, x := range w {
		s.sees(x, s.description())
	}
	s.neverRestarted(s.nodes[2], s.nodes[4])
}

func TestStrangersAreRefused(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	s := newSite(t, 2)
	s.startAll()
	member, err := poolcert.NewIdentity(s.nodes[1].UUID, poolSecret)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := poolcert.NewIdentity(s.nodes[1].UUID, strings.ToUpper(poolSecret))
	if err != nil {
		t.Fatal(err)
	}
	shake := func(i *poolcert.Identity) string {
		args := []string{"netns", "exec", s.nodes[1].ns, "timeout", "10", "openssl", "s_client", "-connect", s.nodes[0].Addr + ":" + routePort, "-tls1_3", "-ign_eof", "-verify_return_error"}
		if i != nil {
			dir := t.TempDir()
			if err := i.WritePEM(dir); err != nil {
				t.Fatal(err)
			}
			args = append(args, "-cert", filepath.Join(dir, "client-cert.pem"), "-key", filepath.Join(dir, "client-key.pem"), "-CAfile", filepath.Join(dir, "ca-cert.pem"))
		} else {
			args[len(args)-1] = "-quiet"
		}
		cmd := exec.Command("ip", args...)
		cmd.Stdin = strings.NewReader("PING\r\n")
		out, _ := cmd.CombinedOutput() // Its code differs between versions; what matters is whether NATS spoke.
		return string(out)
	}
	if out := shake(member); !strings.Contains(out, "INFO {") || !strings.Contains(out, "Verify return code: 0") {
		t.Errorf("a member was refused:\n%s", out)
	}
	for name, i := range map[string]*poolcert.Identity{"nobody": nil, "another pool": stranger} {
		if out := shake(i); strings.Contains(out, "INFO {") {
			t.Errorf("%s was let in:\n%s", name, out)
		}
	}
	s.neverRestarted()
}

func TestRoguePeerIsRefused(t *testing.T) {
	t.Parallel()
	need(t, "nats-server", "openssl")
	s := newSite(t, 2)
	s.startAll()
	dir := t.TempDir()
	stranger, err := poolcert.NewIdentity(s.nodes[1].UUID, strings.ToUpper(poolSecret))
	if err != nil {
		t.Fatal(err)
	}
	if err := stranger.WritePEM(dir); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "rogue.conf")
	uuid, _, _ := poolOf(t, s)
	s.write(conf, fmt.Sprintf("port: 4333\nserver_name: rogue\ncluster { name: %q, listen: \"0.0.0.0:6333\", routes: [\"nats-route://%s:%s\"]\n tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true, insecure: true } }\n",
		uuid, s.nodes[0].Addr, routePort, filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"), filepath.Join(dir, "ca-cert.pem")))
	cmd := exec.Command("ip", "netns", "exec", s.nodes[1].ns, "nats-server", "-c", conf, "-D", "-l", filepath.Join(dir, "log"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	s.eventually("the rogue peer was refused", func() bool {
		log, _ := os.ReadFile(filepath.Join(dir, "log"))
		return strings.Contains(string(log), "Route connection created") && strings.Contains(string(log), "Router connection closed")
	})
	for _, a := range s.status(s.nodes[0]) {
		for _, c := range a.Status.Bus.Connected {
			if c == "rogue" {
				t.Error("the rogue peer is connected")
			}
		}
	}
	s.neverRestarted()
}

func poolOf(t *testing.T, s *site) (uuid string, hosts int, ok bool) {
	t.Helper()
	c, err := bus.Dial(t.Context(), s.nodes[0].door(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m, err := bus.NewMirror(c, bus.XAPITable("pool"), bus.MirrorOptions[struct{}]{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.WaitFresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	rows, _ := m.Snapshot()
	for uuid := range rows {
		return uuid, len(rows), true
	}
	return "", 0, false
}

func TestHistory_IsReadOnAnyHostAndPausedWithoutAMajority(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	s.startAll()
	history := func(n *node) string {
		for _, a := range s.status(n) {
			if a.Agent == "bus" && a.HostName == n.Name {
				return a.Status.Bus.History
			}
		}
		return ""
	}
	for _, n := range s.nodes {
		s.eventually(n.Name+" says that there are three copies", func() bool { return history(n) == "3 copies" })
	}
	s.set("kept")
	events := func(n *node) (string, int) {
		out, errOut, err := s.tool(n, "events", "--since", "1h", "--json")
		return out + errOut, exitCode(err)
	}
	for _, n := range s.nodes {
		s.eventually("the history is read on "+n.Name, func() bool {
			out, code := events(n)
			return code == 0 && strings.Contains(out, `"name_description":"kept"`)
		})
	}
	for _, n := range s.nodes[1:] {
		s.link(n, "down")
	}
	w := s.watch(s.nodes[0])
	s.eventually("reading the history says that it is paused", func() bool {
		out, code := events(s.nodes[0])
		return code == 1 && strings.Contains(out, "history is paused")
	})
	s.set("live") // On the coordinator's own door the live path goes on.
	s.sees(w, "live")
	for _, n := range s.nodes[1:] {
		s.link(n, "up")
	}
	s.eventually("the history goes on", func() bool {
		s.set(fmt.Sprint("after ", time.Now().UnixNano()))
		out, code := events(s.nodes[2])
		return code == 0 && strings.Contains(out, `"name_description":"after`)
	})
	s.neverRestarted()
}
