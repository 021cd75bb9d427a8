// Package sdns starts a real systemd as PID 1 of namespaces of its own, for tests and the demo.
//
// The instance has its own mounts, processes, IPC, host name and cgroup tree, /run on a folder of the test, and only the units that the test gives it; the
// network is shared, so that several instances are hosts which can talk. It needs root, a writable cgroup2 hierarchy, and the Debian packages systemd and dbus. All in it dies with its PID 1.
package sdns

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// TB is what an instance needs of the test, or of the program, that it belongs to. *testing.T and *testing.B have it.
type TB interface {
	Helper()
	Context() context.Context // ends just before the cleanups begin
	Cleanup(func())
	Log(args ...any)
	Logf(format string, args ...any)
	Fatal(args ...any) // must not return, and neither must the next two
	Fatalf(format string, args ...any)
	Skip(args ...any)
}

// Instance is one running systemd.
type Instance struct {
	Dir string // the folder given to Start; Dir/units, Dir/run
	PID int    // of systemd, as seen from outside
}

// Need skips the test when what it takes is missing, and names it. With XOSTOR_TEST_STRICT=1 that is a failure.
func Need(tb TB) {
	tb.Helper()
	if why := Missing(); why != "" {
		if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
			tb.Fatal("cannot run systemd in namespaces: " + why)
		}
		tb.Skip("cannot run systemd in namespaces: " + why)
	}
}

// Missing says what an instance needs and this machine lacks; "": nothing.
func Missing() string {
	if os.Getuid() != 0 {
		return "root is needed"
	}
	for file, pkg := range map[string]string{"/lib/systemd/systemd": "systemd", "/usr/bin/dbus-daemon": "dbus"} {
		if _, err := os.Stat(file); err != nil {
			return file + " is missing (Debian package " + pkg + ")"
		}
	}
	for _, program := range []string{"unshare", "nsenter", "mount"} {
		if _, err := exec.LookPath(program); err != nil {
			return program + " is missing (Debian packages util-linux, mount)"
		}
	}
	if _, err := cgroup2(); err != nil {
		return err.Error()
	}
	return ""
}

// cgroup2 finds where the unified hierarchy is mounted.
func cgroup2() (string, error) {
	f, err := os.Open("/proc/mounts")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if w := strings.Fields(sc.Text()); len(w) > 2 && w[2] == "cgroup2" {
			return w[1], nil
		}
	}
	return "", fmt.Errorf("no cgroup2 hierarchy is mounted")
}

// baseUnits are what systemd wants besides the test's units: nothing of Debian's own is started.
var baseUnits = map[string]string{
	"basic.target":    "[Unit]\nDefaultDependencies=no\n",
	"sysinit.target":  "[Unit]\nDefaultDependencies=no\n",
	"sockets.target":  "[Unit]\nDefaultDependencies=no\n",
	"shutdown.target": "[Unit]\nDefaultDependencies=no\n",
	"default.target":  "[Unit]\nRequires=basic.target dbus.socket\nAfter=basic.target\nAllowIsolate=yes\n",
}

// boot runs inside the new namespaces, in the instance's cgroup, and becomes systemd. $1 is the folder.
const boot = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind "$1/run" /run
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=xostor-test SYSTEMD_UNIT_PATH="$1/units:/run/systemd/system" /lib/systemd/systemd --system --log-target=console --log-level=warning`

// Start boots systemd with the given units (name to text) in dir and waits until it answers. It is killed when the test ends.
func Start(tb TB, dir string, units map[string]string) *Instance {
	tb.Helper()
	Need(tb)
	for _, d := range []string{"units", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	for _, name := range []string{"dbus.service", "dbus.socket"} {
		text, err := os.ReadFile(filepath.Join("/lib/systemd/system", name))
		if err != nil {
			tb.Fatal(err)
		}
		Write(tb, dir, name, string(text))
	}
	for _, set := range []map[string]string{baseUnits, units} {
		for name, text := range set {
			Write(tb, dir, name, text)
		}
	}
	root, err := cgroup2()
	if err != nil {
		tb.Fatal(err)
	}
	group, err := os.MkdirTemp(root, "xostor-test-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { removeGroup(tb, group) })
	fd, err := os.Open(group)
	if err != nil {
		tb.Fatal(err)
	}
	defer fd.Close()
	log, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		tb.Fatal(err)
	}
	defer log.Close()
	// The cgroup namespace must begin after the process is in its cgroup: its root is where the process then is.
	cmd := exec.Command("unshare", "--cgroup", "sh", "-c", boot, "sh", dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		UseCgroupFD: true, CgroupFD: int(fd.Fd()), Setsid: true,
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	in := &Instance{Dir: dir, PID: cmd.Process.Pid}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	tb.Cleanup(func() {
		_ = syscall.Kill(in.PID, syscall.SIGKILL) // PID 1 of its namespace: all in it dies
		select {
		case <-exited:
		case <-time.After(time.Minute):
			tb.Log("a process of the instance is stuck in the kernel")
		}
	})
	in.await(tb, exited)
	return in
}

// await dials the sockets until both accept.
func (in *Instance) await(tb TB, exited <-chan struct{}) {
	tb.Helper()
	deadline := time.After(3 * time.Minute) // a busy machine boots it in half a minute
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-exited:
			tb.Fatalf("systemd ended: %s", in.Console())
		case <-deadline:
			tb.Fatalf("systemd does not come up: %s", in.Console())
		case <-tick.C:
			if accepts(in.Private()) && accepts(in.Bus()) {
				return
			}
		}
	}
}

func accepts(socket string) bool {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// Write adds or replaces a unit file. systemd sees it after a reload.
func Write(tb TB, dir, name, text string) {
	tb.Helper()
	if err := os.WriteFile(filepath.Join(dir, "units", name), []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
}

// Bus is the system bus's socket; it can be used from outside.
func (in *Instance) Bus() string { return filepath.Join(in.Dir, "run/dbus/system_bus_socket") }

// Private is systemd's private socket; it answers only processes of the instance's PID namespace.
func (in *Instance) Private() string { return filepath.Join(in.Dir, "run/systemd/private") }

// Console is what systemd printed.
func (in *Instance) Console() string {
	b, _ := os.ReadFile(filepath.Join(in.Dir, "console"))
	return string(b)
}

// Command is a command inside all namespaces of the instance.
func (in *Instance) Command(argv ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target", strconv.Itoa(in.PID), "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--"}, argv...)...)
}

// removeGroup takes the cgroup tree down once its last process is gone.
func removeGroup(tb TB, group string) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 3000 {
		var dirs []string
		_ = filepath.WalkDir(group, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			_ = os.Remove(dirs[i])
		}
		if _, err := os.Stat(group); err != nil {
			return
		}
		<-tick.C
	}
	tb.Logf("%s still has processes", group)
}
