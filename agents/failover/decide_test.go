package failover_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/systemd"
	"pgregory.net/rapid"
)

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) time.Time { return now.Add(-d) }

// resource is the database as h2 (node id 1) sees it: h1 and h3 are connected and UpToDate, nobody is Primary.
func resource() *drbd.Resource {
	peer := func(id int, name string) drbd.Connection {
		return drbd.Connection{PeerNodeID: id, Name: name, State: drbd.Connected, Role: drbd.Secondary, PeerDevices: []drbd.PeerDevice{{Disk: drbd.UpToDate, Client: drbd.No, Replication: "Established"}}}
	}
	return &drbd.Resource{Name: "xcp-persistent-database", Role: drbd.Secondary, Suspended: "no", ForceIOFailure: drbd.No, MayPromote: drbd.Yes,
		Devices:     []drbd.Device{{Minor: 1000, Disk: drbd.UpToDate, Client: drbd.No, Quorum: drbd.Yes, Open: drbd.No, Backing: "/dev/x"}},
		Connections: []drbd.Connection{peer(0, "h1"), peer(2, "h3")}}
}

// idle is a Secondary on which all is well; the tests bend it.
func idle() failover.Snapshot {
	unit := systemd.Unit{Load: "loaded", Active: "inactive"}
	peer := func(name string, id int) failover.Peer {
		return failover.Peer{Name: name, Heard: ago(100 * time.Millisecond), Storage: ago(100 * time.Millisecond), Reactor: drbd.No,
			Says: failover.Beat{Node: name, NodeID: id, Mode: failover.Owner, Role: "Secondary", Usable: true, JVM: failover.JVMDown}}
	}
	return failover.Snapshot{Policy: failover.DefaultPolicy(), Self: "h2", NodeID: 1, Mode: failover.Owner, Names: failover.DefaultNames(), Fresh: true, Known: true, Res: resource(),
		Options: drbd.Options{Quorum: "majority", OnNoQuorum: "io-error", RRConflict: "retry-connect", NodeID: 1}, UnitsKnown: true, Controller: unit, MountUnit: unit, Target: unit,
		Mount: failover.Mount{Known: true}, Peers: []failover.Peer{peer("h1", 0), peer("h3", 2)}, File: failover.ResFile{Known: true, Valid: true, Copy: true, Saved: true}, Reactor: drbd.No,
		Memory: failover.Memory{Attached: true}}
}

// owning is the owner with a healthy controller.
func owning() failover.Snapshot {
	s := idle()
	s.Res.Role, s.Res.MayPromote = drbd.Primary, drbd.No
	s.Mount.Ours = true
	s.MountUnit.Active = "active"
	s.Controller.Active, s.Controller.MainPID = "active", 42
	s.Memory.Up = ago(time.Minute)
	return s
}

// plan writes a plan's actions as "verb key=value", and its finding codes.
func plan(s failover.Snapshot) (string, []string) {
	p := failover.Decide(now, s)
	var verbs, codes []string
	for _, a := range p.Actions {
		v := a.Verb
		for _, k := range []string{"probe", "signal", "peer", "hand-over"} {
			if a.Args[k] != "" {
				v += " " + k + "=" + a.Args[k]
			}
		}
		verbs = append(verbs, v)
	}
	for _, f := range p.Findings {
		codes = append(codes, f.Code)
	}
	return strings.Join(verbs, ", "), codes
}

// A start is no trouble: what needs a moment then is no finding until it lasts.
func TestDecide_StartIsNoTrouble(t *testing.T) {
	for _, c := range []struct {
		began time.Time
		found bool
	}{{ago(2 * time.Second), false}, {ago(3 * time.Second), true}, {time.Time{}, true}} {
		s := idle()
		s.Fresh, s.Mode, s.Memory.Began = false, failover.Observe, c.began
		p := failover.Decide(now, s)
		for _, code := range []string{"drbd-events-lost", "mode-unknown"} {
			if got := slices.ContainsFunc(p.Findings, func(f agents.Finding) bool { return f.Code == code }); got != c.found {
				t.Errorf("began %v: finding %s: %v, want %v", c.began, code, got, c.found)
			}
		}
		if !c.found && (p.Recheck <= 0 || p.Recheck > time.Second) {
			t.Errorf("looks again in %v, want when the grace ends", p.Recheck)
		}
	}
}

func TestDecide(t *testing.T) {
	type S = failover.Snapshot
	primaryPeer := func(s *S, silent time.Duration) {
		s.Res.MayPromote = drbd.No
		s.Res.Connections[0].Role = drbd.Primary
		s.Peers[0].Heard, s.Peers[0].Storage = ago(silent), ago(silent)
		s.Peers[0].Says.Owner, s.Peers[0].Says.Role = true, "Primary"
		s.Peers[1].Says.Silent = []string{"h1"}
	}
	unmounted := func(s *S) {
		s.Mount.Ours, s.MountUnit.Active, s.Controller.Active, s.Controller.MainPID = false, "inactive", "inactive", 0
	}
	mayPromote := func(s *S, since time.Duration) { s.Memory.MayPromote = ago(since) }
	tests := []struct {
		name    string
		from    func() S
		bend    func(s *S)
		want    string
		finding string
	}{
		{"healthy owner: nothing", owning, func(*S) {}, "", ""},
		{"healthy secondary behind a healthy owner: nothing", idle, func(s *S) { primaryPeer(s, 100*time.Millisecond) }, "", ""},

		{"io-error, quorum lost: at once", owning, func(s *S) { s.Res.Devices[0].Quorum = drbd.No; s.Memory.NoQuorum = now }, "release", "no-quorum"},
		{"suspend-io, quorum lost: not at once", owning, func(s *S) {
			s.Res.Devices[0].Quorum, s.Res.Suspended, s.Memory.NoQuorum = drbd.No, "quorum", ago(300*time.Millisecond)
		}, "", ""},
		{"suspend-io, quorum lost for longer", owning, func(s *S) {
			s.Res.Devices[0].Quorum, s.Res.Suspended, s.Memory.NoQuorum = drbd.No, "quorum", ago(600*time.Millisecond)
		}, "release", ""},
		{"guard releases too", owning, func(s *S) {
			s.Mode, s.Res.Devices[0].Quorum, s.Memory.NoQuorum = failover.Guard, drbd.No, now
		}, "release", ""},
		{"release goes on by status when events are lost", owning, func(s *S) {
			s.Fresh, s.Res.Devices[0].Quorum, s.Memory.NoQuorum = false, drbd.No, now
		}, "release", "drbd-events-lost"},
		{"release without systemd", owning, func(s *S) { s.UnitsKnown, s.Res.Devices[0].Quorum, s.Memory.NoQuorum = false, drbd.No, now }, "release", ""},
		{"forced to secondary, still held", owning, func(s *S) { s.Res.Role, s.Res.ForceIOFailure = drbd.Secondary, drbd.Yes }, "release", ""},
		{"secondary with the mount left", owning, func(s *S) { s.Res.Role = drbd.Secondary }, "release", ""},
		{"held for seconds: the holder is named", owning, func(s *S) {
			s.Res.Role, s.Res.ForceIOFailure, s.Memory.Releasing, s.Holders = drbd.Secondary, drbd.Yes, ago(3*time.Second), []string{"bash (pid 7)"}
		}, "release", "release-stuck"},
		{"DRBD unknown: nothing", owning, func(s *S) { s.Known, s.Fresh, s.Res = false, false, nil }, "", "drbd-unknown"},

		{"may promote, best rank: at once", idle, func(s *S) { mayPromote(s, 0); s.NodeID = 0; s.Peers[0].Says.NodeID = 1 }, "promote", ""},
		{"may promote, a better one is alive: waits", idle, func(s *S) { mayPromote(s, 0) }, "", ""},
		{"may promote, the better one does not act", idle, func(s *S) { mayPromote(s, 301*time.Millisecond) }, "promote", ""},
		{"may promote, the better one is dead", idle, func(s *S) { mayPromote(s, 0); s.Peers[0].Heard = ago(time.Minute) }, "promote", ""},
		{"diskless waits longer", idle, func(s *S) { mayPromote(s, time.Second); s.Res.Devices[0].Disk = drbd.Diskless }, "", ""},
		{"diskless at last", idle, func(s *S) { mayPromote(s, 3*time.Second); s.Res.Devices[0].Disk = drbd.Diskless }, "promote", ""},
		{"observe promotes nothing", idle, func(s *S) { mayPromote(s, time.Hour); s.Mode = failover.Observe }, "", "mode-unknown"},
		{"guard promotes nothing", idle, func(s *S) { mayPromote(s, time.Hour); s.Mode = failover.Guard }, "", ""},
		{"quorum off: refused", idle, func(s *S) { mayPromote(s, time.Hour); s.Options.Quorum = "off" }, "", "quorum-off"},
		{"stale view promotes nothing", idle, func(s *S) { mayPromote(s, time.Hour); s.Fresh = false }, "", "drbd-events-lost"},
		{"mount point taken", idle, func(s *S) { mayPromote(s, time.Hour); s.Mount.Foreign = true }, "", "mount-point-taken"},
		{"mount point is no directory", idle, func(s *S) { mayPromote(s, time.Hour); s.Mount.NotDir = true }, "", "mount-point-missing"},
		{"unit missing", idle, func(s *S) { mayPromote(s, time.Hour); s.Controller.Load = "not-found" }, "", "controller-unit-missing"},
		{"held for the target of a move", idle, func(s *S) {
			mayPromote(s, time.Hour)
			s.Move = &failover.Move{From: "h1", To: "h3", Age: time.Second}
		}, "", ""},
		{"the hold ends", idle, func(s *S) { mayPromote(s, time.Hour); s.Move = &failover.Move{From: "h1", To: "h3", Age: time.Minute} }, "promote", ""},
		{"target of a move: at once", idle, func(s *S) { mayPromote(s, 0); s.Move = &failover.Move{From: "h1", To: "h2", Age: time.Second} }, "promote", ""},

		{"owner silent, all agree: probe", idle, func(s *S) { primaryPeer(s, 2*time.Second) }, "promote probe=h1", ""},
		{"owner silent for too short", idle, func(s *S) { primaryPeer(s, 900*time.Millisecond) }, "", ""},
		{"owner silent, its kernel answers", idle, func(s *S) { primaryPeer(s, 2*time.Second); s.Peers[0].Kernel = ago(200 * time.Millisecond) }, "", ""},
		{"owner silent, a witness disagrees", idle, func(s *S) { primaryPeer(s, 2*time.Second); s.Peers[1].Says.Silent = nil }, "", ""},
		{"owner silent, no witness: perhaps we are cut off", idle, func(s *S) { primaryPeer(s, 2*time.Second); s.Peers[1].Heard = ago(time.Minute) }, "", ""},
		{"owner's agent never spoke", idle, func(s *S) { primaryPeer(s, 2*time.Second); s.Peers[0].Heard = time.Time{} }, "", ""},
		{"owner silent, no data here without it", idle, func(s *S) { primaryPeer(s, 2*time.Second); s.Res.Devices[0].Disk = drbd.Inconsistent }, "", ""},
		{"probed and refused a second ago", idle, func(s *S) {
			primaryPeer(s, 2*time.Second)
			s.Memory.Asked = map[string]failover.Attempt{"probe": {Last: ago(time.Second), N: 1}}
		}, "", ""},

		{"owner not mounted: mount", owning, func(s *S) { s.Mount.Ours = false; s.MountUnit.Active = "inactive"; s.Controller.Active = "inactive" }, "start-mount", ""},
		{"controller without the mount: killed", owning, func(s *S) { s.Mount.Ours = false }, "signal-controller signal=KILL", ""},
		{"something else is mounted there: another host", owning, func(s *S) { unmounted(s); s.Mount.Foreign = true }, "yield hand-over=yes", "mount-point-taken"},
		{"mount unit gone just before the promotion: another host", owning, func(s *S) { unmounted(s); s.MountUnit.Load = "not-found" }, "yield hand-over=yes", "mount-unit-missing"},
		{"mount unit gone, and nobody else is fit: stay", owning, func(s *S) {
			unmounted(s)
			s.MountUnit.Load, s.Peers[0].Says.Usable, s.Peers[1].Says.Usable = "masked", false, false
		}, "", "mount-unit-missing"},
		{"mount unit gone, handed over a minute ago: stay", owning, func(s *S) {
			unmounted(s)
			s.MountUnit.Load, s.Memory.HandOver = "not-found", ago(time.Minute)
		}, "", "mount-unit-missing"},
		{"mount unit gone while the database is mounted: no harm yet", owning, func(s *S) { s.MountUnit.Load = "not-found" }, "", ""},
		{"controller's unit gone: another host", owning, func(s *S) { s.Controller = systemd.Unit{Load: "masked", Active: "inactive"} }, "yield hand-over=yes", "controller-unit-missing"},
		{"controller's unit gone while it runs: watched on", owning, func(s *S) {
			s.Controller.Load = "not-found"
			s.Health.Internal.Fails = 3
		}, "signal-controller signal=QUIT", "controller-unit-missing"},
		{"mounted elsewhere: nobody can have it", owning, func(s *S) { unmounted(s); s.Mount.Elsewhere = []string{"/mnt"} }, "", "device-mounted-elsewhere"},
		{"mounted there and elsewhere: start", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID, s.Mount.Elsewhere = "inactive", 0, []string{"/mnt"}
		}, "start-controller", ""},
		{"guard leaves a missing unit to the reactor", owning, func(s *S) { unmounted(s); s.Mode, s.MountUnit.Load = failover.Guard, "not-found" }, "", ""},
		{"mount unit's file is broken: another host", owning, func(s *S) { unmounted(s); s.MountUnit.Load = "bad-setting" }, "yield hand-over=yes", "mount-unit-missing"},
		{"mount unit's file is broken on a secondary: not promoted", idle, func(s *S) { mayPromote(s, time.Hour); s.MountUnit.Load = "error" }, "", "mount-unit-missing"},
		{"guard: the controller's unit is masked under an active target", owning, func(s *S) {
			s.Mode, s.Target.Active = failover.Guard, "active"
			s.Controller = systemd.Unit{Load: "masked", Active: "inactive"}
		}, "", "controller-unit-missing"},
		{"mounted at last: the controller starts at once", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "inactive", 0
			s.Memory.MountFailures = slices.Repeat([]time.Time{ago(time.Second)}, 10)
			s.Memory.HandOver = ago(time.Minute)
		}, "start-controller", ""},
		{"mounting failed three times: another host", owning, func(s *S) {
			unmounted(s)
			s.MountUnit.Active, s.Memory.MountFailures = "failed", []time.Time{ago(10 * time.Second), ago(6 * time.Second), now}
		}, "yield hand-over=yes", ""},
		{"mounting fails everywhere: stay and try", owning, func(s *S) {
			unmounted(s)
			s.MountUnit.Active, s.Memory.MountFailures = "failed", []time.Time{ago(10 * time.Second), ago(6 * time.Second), now}
			s.Memory.Asked = map[string]failover.Attempt{"mount": {Last: ago(time.Minute), N: 3}}
			s.Peers[0].Says.Failures, s.Peers[1].Says.Failures = 3, 3
		}, "start-mount", "mount-fails"},
		{"mounted read-only: let go", owning, func(s *S) { s.Mount.ReadOnly = true }, "yield hand-over=yes", "database-read-only"},
		{"mounted, controller down: start", owning, func(s *S) { s.Controller.Active, s.Controller.MainPID = "inactive", 0 }, "start-controller", ""},
		{"first failure: restart at once", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID, s.Controller.Result = "failed", 0, "signal"
			s.Memory.Failures = []time.Time{now}
			s.Memory.Asked = map[string]failover.Attempt{"start": {Last: ago(time.Second), N: 1}}
		}, "start-controller", ""},
		{"second failure: after a pause", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "failed", 0
			s.Memory.Failures = []time.Time{ago(time.Minute), ago(time.Second)}
		}, "", ""},
		{"third failure: another host", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "failed", 0
			s.Memory.Failures = []time.Time{ago(time.Minute), ago(time.Second), now}
		}, "yield hand-over=yes", ""},
		{"third failure everywhere: stay", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "failed", 0
			s.Memory.Failures = []time.Time{ago(time.Minute), ago(time.Minute), ago(time.Minute)}
			s.Peers[0].Says.Failures, s.Peers[1].Says.Failures = 3, 3
		}, "start-controller", "database-does-not-open"},
		{"starting: only watched", owning, func(s *S) { s.Controller.Active = "activating"; s.Health.REST.Fails = 9 }, "", ""},
		{"the former owner lives and has not said that its controller is gone", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "inactive", 0
			s.Memory.PrimaryWas, s.Memory.PrimaryEnd = "h1", ago(3*time.Second)
			s.Peers[0].Says.JVM = failover.JVMUp
		}, "", "waiting-for-former-owner"},
		{"it has said so", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "inactive", 0
			s.Memory.PrimaryWas, s.Memory.PrimaryEnd = "h1", ago(3*time.Second)
		}, "start-controller", ""},
		{"it never will", owning, func(s *S) {
			s.Controller.Active, s.Controller.MainPID = "inactive", 0
			s.Memory.PrimaryWas, s.Memory.PrimaryEnd = "h1", ago(13*time.Second)
			s.Peers[0].Says.JVM = failover.JVMUp
		}, "start-controller", ""},

		{"REST and list fail: thread dump", owning, func(s *S) { s.Health.REST.Fails, s.Health.List.Fails = 3, 1 }, "signal-controller signal=QUIT", "controller-hung"},
		{"REST alone fails: a long collection", owning, func(s *S) { s.Health.REST.Fails = 5 }, "", ""},
		{"500 three times", owning, func(s *S) { s.Health.Internal.Fails = 3 }, "signal-controller signal=QUIT", ""},
		{"disk writes fail", owning, func(s *S) { s.Health.Disk.Fails = 3 }, "signal-controller signal=QUIT", ""},
		{"disk full is no illness", owning, func(s *S) { s.Health.Disk.Fails, s.Health.DiskFull = 3, true }, "", "database-filesystem-full"},
		{"hung, a second later", owning, func(s *S) {
			s.Health.Internal.Fails = 3
			s.Memory.Hung = ago(time.Second)
		}, "signal-controller signal=TERM", ""},
		{"hung and ignores SIGTERM", owning, func(s *S) {
			s.Health.Internal.Fails = 3
			s.Memory.Hung = ago(7 * time.Second)
			s.Memory.Asked = map[string]failover.Attempt{"TERM": {Last: ago(6 * time.Second), N: 1}}
		}, "signal-controller signal=KILL", ""},
		{"hung while quorum is in doubt: released instead", owning, func(s *S) {
			s.Health.Internal.Fails = 3
			s.Res.Devices[0].Quorum, s.Memory.NoQuorum = drbd.No, now
		}, "release", ""},

		{"guard: controller down under an active target", owning, func(s *S) {
			s.Mode, s.Target.Active = failover.Guard, "active"
			s.Controller.Active, s.Controller.MainPID = "failed", 0
		}, "start-controller", ""},
		{"guard: an administrator stopped the chain", owning, func(s *S) {
			s.Mode, s.Target.Active = failover.Guard, "inactive"
			s.Controller.Active, s.Controller.MainPID = "inactive", 0
		}, "", ""},
		{"guard never mounts", owning, func(s *S) {
			s.Mode, s.Target.Active, s.Mount.Ours = failover.Guard, "active", false
			s.Controller.Active = "inactive"
		}, "", ""},

		{"nobody is heard on the storage network: ask the peers", owning, func(s *S) { s.Peers[0].Storage, s.Peers[1].Storage = ago(2*time.Second), ago(2*time.Second) }, "check-peers", ""},
		{"somebody else says to own: ask the peers", owning, func(s *S) { s.Peers[0].Says.Owner = true }, "check-peers", ""},
		{"told to move", owning, func(s *S) { s.Move = &failover.Move{From: "h2", To: "h1", Age: time.Second} }, "yield", ""},

		{"StandAlone, clean: connect", idle, func(s *S) { s.Res.MayPromote = drbd.No; s.Res.Connections[0].State = drbd.StandAlone }, "connect peer=h1", ""},
		{"StandAlone, the other end clings to it: wait", owning, func(s *S) {
			s.Res.Connections[0].State, s.Peers[0].Says.Role = drbd.StandAlone, "Primary"
		}, "", ""},
		{"StandAlone, the owner reconnects", owning, func(s *S) { s.Res.Connections[0].State = drbd.StandAlone }, "connect peer=h1", ""},
		{"StandAlone by hand: left alone", idle, func(s *S) {
			s.Res.MayPromote, s.Res.Connections[0].State, s.Memory.Held, s.Kept, s.Memory.HeldRead = drbd.No, drbd.StandAlone, []string{"h1"}, []string{"h1"}, true
		}, "", "held-by-hand"},
		{"StandAlone by hand: kept on disk", idle, func(s *S) {
			s.Res.MayPromote, s.Res.Connections[0].State, s.Memory.Held, s.Memory.HeldRead = drbd.No, drbd.StandAlone, []string{"h1"}, true
		}, "keep-held", "held-by-hand"},
		{"StandAlone for good", owning, func(s *S) {
			s.Res.Connections[0].State = drbd.StandAlone
			s.Memory.Asked = map[string]failover.Attempt{"connect/h1": {Last: ago(10 * time.Second), N: 7}}
		}, "", "stand-alone"},

		{"boot: bring up", idle, func(s *S) { s.Res = nil }, "bring-up", ""},
		{"boot: empty .res, a copy is kept", idle, func(s *S) {
			s.Res = nil
			s.File = failover.ResFile{Known: true, Why: "empty", Copy: true}
		}, "restore-res", ""},
		{"boot: empty .res, no copy", idle, func(s *S) { s.Res = nil; s.File = failover.ResFile{Known: true, Why: "empty"} }, "", "res-file-invalid"},
		{"boot: disk not attached yet", idle, func(s *S) {
			s.Memory.Attached, s.Res.MayPromote = false, drbd.No
			s.Res.Devices[0].Disk, s.Res.Devices[0].Backing = drbd.Diskless, "none"
		}, "bring-up", ""},
		{"a disk that failed is not attached again", idle, func(s *S) {
			s.Res.MayPromote = drbd.No
			s.Res.Devices[0].Disk, s.Res.Devices[0].Backing = drbd.Diskless, "none"
		}, "", ""},
		{".res changed: save", idle, func(s *S) { s.Res.MayPromote, s.File.Saved = drbd.No, false }, "save-res", ""},
		{"backups fail", owning, func(s *S) { s.BackupTrouble = "no space left" }, "", "backup-failed"},
		{"one of two voters", idle, func(s *S) {
			s.Res.MayPromote, s.Res.Devices[0].Quorum = drbd.No, drbd.No
			s.Res.Connections[0].State, s.Res.Connections[1].State = drbd.Connecting, drbd.Connecting
		}, "", "no-quorum"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.from()
			tt.bend(&s)
			got, codes := plan(s)
			if got != tt.want {
				t.Errorf("plan %q, want %q (findings %v)", got, tt.want, codes)
			}
			if tt.finding != "" && !slices.Contains(codes, tt.finding) {
				t.Errorf("findings %v, want %s among them", codes, tt.finding)
			}
		})
	}
}

// drawSnapshot makes any snapshot at all.
func drawSnapshot(t *rapid.T) failover.Snapshot {
	s := idle()
	tri := rapid.SampledFrom([]drbd.Tri{drbd.Unknown, drbd.No, drbd.Yes})
	since := rapid.Custom(func(t *rapid.T) time.Time {
		if rapid.Bool().Draw(t, "never") {
			return time.Time{}
		}
		return ago(time.Duration(rapid.Int64Range(0, int64(30*time.Second)).Draw(t, "ago")))
	})
	active := rapid.SampledFrom([]string{"active", "inactive", "failed", "activating", "deactivating", ""})
	s.Mode = rapid.SampledFrom([]failover.Mode{failover.Observe, failover.Guard, failover.Owner}).Draw(t, "mode")
	s.Fresh, s.Known, s.UnitsKnown = rapid.Bool().Draw(t, "fresh"), rapid.Bool().Draw(t, "known"), rapid.Bool().Draw(t, "units")
	s.Options.Quorum = rapid.SampledFrom([]string{"", "off", "majority"}).Draw(t, "quorum option")
	s.Res.Role = rapid.SampledFrom([]drbd.Role{"", drbd.RoleUnknown, drbd.Primary, drbd.Secondary}).Draw(t, "role")
	s.Res.MayPromote, s.Res.ForceIOFailure = tri.Draw(t, "may"), tri.Draw(t, "failio")
	s.Res.Suspended = rapid.SampledFrom([]string{"", "no", "quorum", "user,quorum"}).Draw(t, "suspended")
	s.Res.Devices[0].Quorum = tri.Draw(t, "quorum")
	s.Res.Devices[0].Disk = rapid.SampledFrom([]drbd.Disk{"", drbd.Diskless, drbd.Consistent, drbd.UpToDate, drbd.Outdated}).Draw(t, "disk")
	for i := range s.Res.Connections {
		c := &s.Res.Connections[i]
		c.State = rapid.SampledFrom([]drbd.ConnState{"", drbd.StandAlone, drbd.Connecting, drbd.Connected}).Draw(t, "conn")
		c.Role = rapid.SampledFrom([]drbd.Role{drbd.RoleUnknown, drbd.Primary, drbd.Secondary}).Draw(t, "peer role")
	}
	if rapid.IntRange(0, 9).Draw(t, "absent") == 0 {
		s.Res = nil
	}
	s.Mount = failover.Mount{Known: rapid.Bool().Draw(t, "mount known"), Ours: rapid.Bool().Draw(t, "ours"), ReadOnly: rapid.Bool().Draw(t, "ro")}
	load := rapid.SampledFrom([]string{"loaded", "loaded", "loaded", "not-found", "masked", "error", "bad-setting"})
	s.Controller.Load, s.MountUnit.Load = load.Draw(t, "ctl load"), load.Draw(t, "mu load")
	s.Controller.Active, s.MountUnit.Active, s.Target.Active = active.Draw(t, "ctl"), active.Draw(t, "mu"), active.Draw(t, "target")
	for i := range s.Peers {
		p := &s.Peers[i]
		p.Heard, p.Storage, p.Kernel = since.Draw(t, "heard"), since.Draw(t, "storage"), since.Draw(t, "kernel")
		p.Says.Owner, p.Says.Usable, p.Says.Failures = rapid.Bool().Draw(t, "owner"), rapid.Bool().Draw(t, "usable"), rapid.IntRange(0, 4).Draw(t, "failures")
		p.Says.Silent = rapid.SampledFrom([][]string{nil, {"h1"}, {"h3"}}).Draw(t, "silent")
	}
	m := &s.Memory
	m.MayPromote, m.NoQuorum, m.Hung, m.Yielding, m.Releasing = since.Draw(t, "may since"), since.Draw(t, "no quorum"), since.Draw(t, "hung"), since.Draw(t, "yield"), since.Draw(t, "rel")
	s.Health.REST.Fails, s.Health.List.Fails, s.Health.Internal.Fails = rapid.IntRange(0, 4).Draw(t, "rest"), rapid.IntRange(0, 2).Draw(t, "list"), rapid.IntRange(0, 4).Draw(t, "500")
	if rapid.Bool().Draw(t, "move") {
		s.Move = &failover.Move{ID: "m", From: "h2", To: rapid.SampledFrom([]string{"h1", "h2", "h3"}).Draw(t, "to"), Age: time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "age"))}
	}
	return s
}

// What must hold for every plan, whatever is seen.
func TestDecide_Properties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSnapshot(t)
		p := failover.Decide(now, s)
		if again := failover.Decide(now, s); cmp.Diff(p, again) != "" {
			t.Fatal("two plans from one snapshot")
		}
		has := func(verbs ...string) bool {
			return slices.ContainsFunc(p.Actions, func(a agents.Action) bool { return slices.Contains(verbs, a.Verb) })
		}
		owns := s.Res != nil && s.Res.Role == drbd.Primary && s.Res.Quorum() == drbd.Yes && s.Res.ForceIOFailure != drbd.Yes
		switch {
		case !s.Known && has(failover.VerbRelease, failover.VerbYield, failover.VerbPromote, failover.VerbMount, failover.VerbStart):
			t.Fatalf("acts on an unknown DRBD: %+v", p.Actions)
		case has(failover.VerbPromote) && (s.Mode != failover.Owner || !s.Fresh || s.Options.Quorum != "majority" || s.Res.Role != drbd.Secondary || !s.UnitsKnown || !s.Mount.Known):
			t.Fatalf("promotes without mode, view, quorum or role: %+v", s)
		case has(failover.VerbStart) && (!owns || !s.Mount.Ours || s.Mount.ReadOnly && s.Mode == failover.Owner || !s.UnitsKnown):
			t.Fatalf("starts a controller without ownership, mount or units: %+v", s)
		case has(failover.VerbStart) && s.Controller.Load != "loaded", has(failover.VerbMount) && s.MountUnit.Load != "loaded":
			t.Fatal("starts a unit that is not there")
		case has(failover.VerbPromote) && (s.Controller.Load != "loaded" || s.MountUnit.Load != "loaded"):
			t.Fatal("promotes where the controller cannot run")
		case has(failover.VerbYield) && s.Move == nil && s.Memory.Yielding.IsZero() && s.Controller.Active == "active" && !s.Mount.ReadOnly:
			t.Fatal("takes a running controller from its host")
		case has(failover.VerbMount) && (!owns || s.Mode != failover.Owner):
			t.Fatal("mounts without ownership, or in another mode")
		case has(failover.VerbRelease) && owns && s.Memory.NoQuorum.IsZero():
			t.Fatal("takes the database by force from an owner with quorum")
		case has(failover.VerbRelease, failover.VerbYield) && len(p.Actions) > 1:
			t.Fatal("does something besides letting go")
		case s.Mode != failover.Owner && has(failover.VerbPromote, failover.VerbCheckPeers, failover.VerbMount, failover.VerbYield):
			t.Fatal("promotes, mounts or moves outside owner mode")
		}
		slices.Reverse(s.Peers)
		if q := failover.Decide(now, s); fmt.Sprint(verbsOf(q)) != fmt.Sprint(verbsOf(p)) {
			t.Fatalf("the order of peers matters: %v, %v", verbsOf(p), verbsOf(q))
		}
	})
}

func verbsOf(p agents.Plan) (out []string) {
	for _, a := range p.Actions {
		out = append(out, a.Verb)
	}
	return out
}

// What is kept of the backups: the newest, at most 24 hours' and 14 days', and nothing is lost to a clock that is wrong.
func TestPrune(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var have []failover.Backup
		for i := range rapid.IntRange(0, 200).Draw(t, "n") {
			at := ago(time.Duration(rapid.Int64Range(-int64(48*time.Hour), int64(60*24*time.Hour)).Draw(t, "age")))
			have = append(have, failover.Backup{Name: fmt.Sprintf("b%03d", i), Taken: at, Why: rapid.SampledFrom([]string{"hourly", "hourly", "version"}).Draw(t, "why")})
		}
		drop := failover.Prune(now, have)
		kept, keptHourly := 0, 0
		var newest *failover.Backup
		for i, b := range have {
			gone := slices.ContainsFunc(drop, func(d failover.Backup) bool { return d.Name == b.Name })
			if b.Taken.After(now) {
				if gone {
					t.Fatal("dropped one from the future")
				}
				continue
			}
			if newest == nil || b.Taken.After(newest.Taken) {
				newest = &have[i]
			}
			if !gone {
				kept++
				if b.Why == "hourly" {
					keptHourly++
				}
			}
		}
		if newest != nil && slices.ContainsFunc(drop, func(d failover.Backup) bool { return d.Taken.Equal(newest.Taken) && d.Name == newest.Name }) && kept == 0 {
			t.Fatal("dropped all")
		}
		if most := failover.KeepHourly + failover.KeepDaily; keptHourly > most {
			t.Fatalf("kept %d, more than %d", keptHourly, most)
		}
		var rest []failover.Backup
		for _, b := range have {
			if !slices.ContainsFunc(drop, func(d failover.Backup) bool { return d.Name == b.Name }) {
				rest = append(rest, b)
			}
		}
		if again := failover.Prune(now, rest); len(again) > 0 {
			t.Fatalf("a second pruning drops %d more", len(again))
		}
	})
	var hourly []failover.Backup
	for i := range 20 * 24 {
		hourly = append(hourly, failover.Backup{Name: fmt.Sprint(i), Taken: ago(time.Duration(i) * time.Hour), Why: "hourly"})
	}
	if kept := len(hourly) - len(failover.Prune(now, hourly)); kept < 24+12 || kept > 24+14 {
		t.Errorf("of hourly backups for 20 days %d are kept", kept)
	}
}
