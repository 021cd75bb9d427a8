package failover_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
)

// patience is used up only when something is wrong.
const patience = 90 * time.Second

// finding returns what the agent of a host says under a code, nil when it says nothing.
func finding(t *testing.T, h *realpool.Host, code string) *agents.Finding {
	t.Helper()
	r, err := h.Client().Status(t.Context())
	if err != nil {
		return nil
	}
	for _, f := range r.Findings {
		if f.Code == code {
			return &f
		}
	}
	return nil
}

// cleared tells whether the agent of a host can be asked and does not find something.
func cleared(t *testing.T, h *realpool.Host, code string) bool {
	t.Helper()
	_, err := h.Client().Status(t.Context())
	return err == nil && finding(t, h, code) == nil
}

// inside runs a command on a host, which must succeed.
func inside(t *testing.T, h *realpool.Host, argv ...string) {
	t.Helper()
	if out, err := h.In.Command(argv...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
}

// processes finds the host's processes with this command line, as seen from outside.
func processes(h *realpool.Host, argv ...string) (out []int) {
	ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.In.PID))
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		cmd, _ := os.ReadFile(d + "/cmdline")
		if to, _ := os.Readlink(d + "/ns/pid"); to == ns && string(cmd) == strings.Join(argv, "\x00")+"\x00" {
			out = append(out, atoi(filepath.Base(d)))
		}
	}
	return out
}

// A database's filesystem that is full is told and disturbs nobody; one that has turned read-only is handed to another host.
func TestFailover_BadFilesystem(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	t.Run("full", func(t *testing.T) {
		pid := o.State(realpool.Controller).MainPID
		if err := o.In.Command("dd", "if=/dev/zero", "of="+o.MountPoint+"/fill", "bs=64k").Run(); err == nil {
			t.Fatal("the filesystem did not fill up")
		}
		p.Until(patience, "a finding says that it is full", func() bool { return finding(t, o, "database-filesystem-full") != nil })
		inside(t, o, "rm", o.MountPoint+"/fill")
		p.Until(patience, "the finding goes", func() bool { return cleared(t, o, "database-filesystem-full") })
		if now := o.State(realpool.Controller).MainPID; now != pid {
			t.Errorf("the controller was restarted for it: %d, was %d", now, pid)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		inside(t, o, "mount", "-o", "remount,abort", o.MountPoint) // as after an error of its journal
		p.Until(patience, "another host runs the controller", func() bool { n := p.Owner(); return n != nil && n != o })
	})
}

// A mount namespace that somebody made while the database was mounted keeps the device open after the unmount. It is named, nothing is forced, and the release
// ends when it is gone.
func TestFailover_PinnedByMountNamespace(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	sleep := []string{"sleep", "61357"}
	pin := o.In.Command(append([]string{"unshare", "--mount", "--propagation", "private"}, sleep...)...)
	must(t, pin.Start())
	ended := make(chan struct{})
	go func() { _ = pin.Wait(); close(ended) }()
	p.Until(patience, "the other namespace is there", func() bool { return len(processes(o, sleep...)) == 1 })
	p.Wall.Do(func() { _ = o.Node.Open("pin") }) // the model sees only the host's own mounts
	p.Cut(o, true)
	p.Until(patience, "a finding names the holder", func() bool {
		f := finding(t, o, "release-stuck")
		return f != nil && strings.Contains(f.Text, "sleep (pid") && strings.Contains(f.Text, "in another mount namespace")
	})
	if len(processes(o, sleep...)) != 1 {
		t.Error("the holder was killed")
	}
	for _, pid := range processes(o, sleep...) {
		must(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	<-ended
	p.Wall.Do(func() { o.Node.Close("pin") })
	p.Until(patience, "the release ends", func() bool { return cleared(t, o, "release-stuck") })
	p.Cut(o, false)
	p.Until(patience, "all hosts are connected", p.Connected)
}

// Before a controller of another version opens the database, the database is kept.
func TestFailover_VersionChange(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	jar := filepath.Join(o.Dir, "controller.jar")
	restart := func(version string) {
		t.Helper()
		must(t, os.WriteFile(jar, []byte(version), 0o600))
		pid := o.State(realpool.Controller).MainPID
		o.SignalController(syscall.SIGKILL)
		restarted(t, p, o, pid)
	}
	restart("1")
	p.Until(patience, "the version is noted", func() bool { _, err := os.Stat(filepath.Join(o.StateDir(), "version")); return err == nil })
	restart("22")
	store := &failover.Store{Dir: filepath.Join(o.StateDir(), "backups")}
	p.Until(patience, "the database of the old version is kept", func() bool {
		list, err := store.List()
		return err == nil && slices.ContainsFunc(list, func(b failover.Backup) bool { return b.Why == "version" && store.Check(b) == nil })
	})
}

// zips are what backups left on the database's filesystem.
func zips(t *testing.T, h *realpool.Host) string {
	t.Helper()
	out, err := h.In.Command("find", h.MountPoint, "-name", "*.zip").Output()
	must(t, err)
	return string(bytes.TrimSpace(out))
}

// The disk that keeps the backups is full: that is told, nothing is left on the database's filesystem, and it goes on when there is room.
func TestFailover_BackupVolumeFull(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	pid := o.State(realpool.Controller).MainPID
	inside(t, o, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", o.StateDir()) // with no backup on it, one is due
	_ = o.In.Command("dd", "if=/dev/zero", "of="+o.StateDir()+"/fill", "bs=4k").Run()
	p.Until(patience, "a finding says that backups fail", func() bool {
		f := finding(t, o, "backup-failed")
		return f != nil && strings.Contains(strings.ToLower(f.Text), "no space")
	})
	p.Until(patience, "nothing is left on the database's filesystem", func() bool { return zips(t, o) == "" })
	inside(t, o, "rm", o.StateDir()+"/fill")
	p.Until(patience, "the finding goes", func() bool { return cleared(t, o, "backup-failed") })
	if now := o.State(realpool.Controller).MainPID; now != pid {
		t.Errorf("the controller was restarted for it: %d, was %d", now, pid)
	}
}

// The owner is cut off in the middle of a backup. The release does not wait for it, and no host keeps half a backup.
func TestFailover_BackupDuringFailover(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	store := func(h *realpool.Host) *failover.Store {
		return &failover.Store{Dir: filepath.Join(h.StateDir(), "backups")}
	}
	for _, h := range p.Hosts {
		p.Until(patience, h.Name+" keeps a backup", func() bool { list, err := store(h).List(); return err == nil && len(list) > 0 })
	}
	must(t, os.WriteFile(o.ModeFile(), []byte("backup-hangs"), 0o600))
	for _, h := range p.Hosts { // so that the next is due at once
		must(t, os.RemoveAll(store(h).Dir))
	}
	p.Until(patience, "a backup has begun", func() bool { return strings.Contains(zips(t, o), "xostor-") })
	p.Cut(o, true)
	p.Until(patience, "the owner has let go", func() bool { return !o.Mounted() && o.State(realpool.Controller).Down() })
	p.Until(patience, "another host runs the controller", func() bool { n := p.Owner(); return n != nil && n != o })
	next := p.Owner()
	p.Until(patience, "the new owner keeps a backup", func() bool { list, err := store(next).List(); return err == nil && len(list) > 0 })
	for _, h := range p.Hosts {
		list, err := store(h).List()
		must(t, err)
		for _, b := range list {
			if err := store(h).Check(b); err != nil {
				t.Errorf("%s keeps %s: %v", h.Name, b.Name, err)
			}
		}
	}
}

// A host that cannot run the controller says why and leaves it to the next one, although it would have been first.
func TestFailover_UnfitHost(t *testing.T) {
	p := newPool(t, "io-error")
	tests := []struct {
		name, finding string
		bend, mend    func(t *testing.T, h *realpool.Host)
	}{
		{"unit missing", "mount-unit-missing", func(t *testing.T, h *realpool.Host) {
			must(t, os.Rename(filepath.Join(h.Dir, "units", realpool.MountUnit), filepath.Join(h.Dir, "unit")))
			inside(t, h, "systemctl", "daemon-reload")
		}, func(t *testing.T, h *realpool.Host) {
			must(t, os.Rename(filepath.Join(h.Dir, "unit"), filepath.Join(h.Dir, "units", realpool.MountUnit)))
			inside(t, h, "systemctl", "daemon-reload")
		}},
		{"mount point is no directory", "mount-point-missing", func(t *testing.T, h *realpool.Host) {
			if h.Mounted() {
				t.Fatal("the database is mounted on a host that does not own it")
			}
			must(t, os.Remove(h.MountPoint)) // empty, or something was left below the mount
			must(t, os.WriteFile(h.MountPoint, nil, 0o600))
		}, func(t *testing.T, h *realpool.Host) {
			must(t, os.Remove(h.MountPoint))
			must(t, os.Mkdir(h.MountPoint, 0o755))
		}},
		{"something else is mounted there", "mount-point-taken", func(t *testing.T, h *realpool.Host) {
			inside(t, h, "mount", "-t", "tmpfs", "tmpfs", h.MountPoint)
		}, func(t *testing.T, h *realpool.Host) { inside(t, h, "umount", h.MountPoint) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := p.Settled()
			p.Until(patience, "all hosts are connected", p.Connected)
			unfit, other := p.Others(o)[0], p.Others(o)[1] // by name: the first would be first
			usable := func(want bool) func() bool {
				return func() bool {
					r, err := other.Client().Status(t.Context())
					return err == nil && slices.ContainsFunc(r.Hosts, func(h failover.HostReport) bool { return h.Name == unfit.Name && h.Usable == want })
				}
			}
			p.Until(patience, "it could take it", usable(true)) // else it may be unfit for another reason, such as its start
			tt.bend(t, unfit)
			p.Until(patience, "the others know that it cannot take it", usable(false))
			p.Cut(o, true)
			p.Until(patience, "the fit host runs the controller", func() bool { return p.Owner() == other })
			p.Cut(o, false)
			p.Until(patience, "all hosts are connected", p.Connected)
			tt.mend(t, unfit)
			p.Until(patience, "it can take it again", usable(true))
			if log, err := os.ReadFile(filepath.Join(unfit.Dir, "agent.log")); err != nil || !bytes.Contains(log, []byte("finding="+tt.finding)) {
				t.Errorf("the unfit host did not say %s (%v)", tt.finding, err)
			}
		})
	}
}

// A host on which the database does not mount, which nobody can know before it tries, hands it to one on which it does.
func TestFailover_MountFailsOnOneHost(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	p.Until(patience, "all hosts are connected", p.Connected)
	unfit, other := p.Others(o)[0], p.Others(o)[1] // by name: the first is first
	unit := filepath.Join(unfit.Dir, "units", realpool.MountUnit)
	good, err := os.ReadFile(unit)
	must(t, err)
	bad := regexp.MustCompile(`(?m)^ExecStart=.*$`).ReplaceAll(good, []byte("ExecStart=/bin/false"))
	if bytes.Equal(bad, good) {
		t.Fatalf("no ExecStart in %s", good)
	}
	must(t, os.WriteFile(unit, bad, 0o600))
	inside(t, unfit, "systemctl", "daemon-reload")
	p.Cut(o, true)
	p.Until(patience, "the host on which it mounts runs the controller", func() bool { return p.Owner() == other })
	log, err := os.ReadFile(filepath.Join(unfit.Dir, "agent.log"))
	must(t, err)
	for _, want := range []string{"finding=mount-fails", "starting it failed here 3 times"} {
		if !bytes.Contains(log, []byte(want)) {
			t.Errorf("the host on which it does not mount did not say %q", want)
		}
	}
	must(t, os.WriteFile(unit, good, 0o600))
	inside(t, unfit, "systemctl", "daemon-reload")
	p.Cut(o, false)
	p.Until(patience, "all hosts are connected", p.Connected)
}

// drbd-utils are gone or say that the kernel module is. The agent says so and touches nothing; the controller runs on, and all is well when they are back.
func TestFailover_NoDrbdUtils(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	pid := o.State(realpool.Controller).MainPID
	program := p.Drbdsetup()
	real, err := os.Readlink(program)
	must(t, err)
	for _, kind := range []struct{ name, script, want string }{
		{"missing", "", "no such file"},
		{"exit code 20", "#!/bin/sh\necho 'Could not connect to drbd generic netlink family' >&2\nexit 20\n", "exit code 20"},
		{"exit code 121", "#!/bin/sh\nexit 121\n", "exit code 121"},
	} {
		t.Run(kind.name, func(t *testing.T) {
			must(t, os.Remove(program))
			if kind.script != "" {
				must(t, os.WriteFile(program, []byte(kind.script), 0o755))
			}
			for _, stream := range eventStreams(o) {
				_ = syscall.Kill(stream, syscall.SIGKILL) // it may have ended
			}
			p.Until(patience, "a finding says so", func() bool {
				f := finding(t, o, "drbd-unknown")
				return f != nil && strings.Contains(f.Text, kind.want)
			})
			if kind.script != "" {
				must(t, os.Remove(program))
			}
			must(t, os.Symlink(real, program))
			p.Until(patience, "DRBD is seen again", func() bool { return cleared(t, o, "drbd-unknown") && cleared(t, o, "drbd-events-lost") })
		})
	}
	if now := o.State(realpool.Controller).MainPID; now != pid || p.Owner() != o {
		t.Errorf("the controller was disturbed: process %d, was %d", now, pid)
	}
}

// systemd executes itself anew, as in an upgrade. The agent finds it again: a controller that dies after that is started again.
func TestFailover_SystemdReexec(t *testing.T) {
	p := newPool(t, "io-error")
	o := p.Settled()
	pid := o.State(realpool.Controller).MainPID
	inside(t, o, "systemctl", "daemon-reexec")
	o.SignalController(syscall.SIGKILL)
	restarted(t, p, o, pid)
}
