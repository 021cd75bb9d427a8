package systemd_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/xostor-agents/xostor-agents/integration/failover/sdns"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// inside tells the re-executed test binary that it runs in the instance.
const inside = "XOSTOR_TEST_INSIDE_SYSTEMD"

var testUnits = map[string]string{
	"up.service":       "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sleep 600\n",
	"fails.service":    "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/false\n",
	"stubborn.service": "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sh -c 'trap \"\" TERM; sleep 600'\nTimeoutStopSec=60\n",
	"slow.service":     "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sleep 600\n",
}

// short is a folder whose socket paths stay below the limit.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

const patience = 2 * time.Minute // for what takes milliseconds on a machine with nothing else to do

// await reads the unit until the condition holds.
func await(t *testing.T, u *systemd.Units, name, what string, cond func(systemd.Unit) bool) systemd.Unit {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	hints := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		u.Watch(ctx, []string{name}, func() {
			select {
			case hints <- struct{}{}:
			default:
			}
		})
	}()
	defer func() { cancel(); <-done }()
	for {
		s, err := u.State(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if cond(s) {
			return s
		}
		select {
		case <-hints:
		case <-ctx.Done():
			t.Fatalf("%s never was %s: %+v", name, what, s)
		}
	}
}

func TestUnits_RealSystemd(t *testing.T) {
	in := sdns.Start(t, short(t), testUnits)
	t.Run("system bus", func(t *testing.T) {
		// From outside, the private socket refuses us; the bus is the way.
		u := &systemd.Units{Private: in.Private(), Bus: in.Bus(), Timeout: patience}
		defer u.Close()
		lifeOfUnits(t, u)
	})
	t.Run("private socket", func(t *testing.T) {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := in.Command(exe, "-test.run", "^TestUnits_Inside$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("inside the instance: %v\n%s", err, out)
		}
	})
	t.Run("a watch begins while jobs end", func(t *testing.T) {
		u := &systemd.Units{Private: in.Private(), Bus: in.Bus(), Timeout: patience}
		defer u.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { // jobs end all the time, and systemd says so to all
			for ctx.Err() == nil {
				_ = u.Restart(ctx, "fails.service")
			}
		})
		for range 50 {
			fresh := &systemd.Units{Private: in.Private(), Bus: in.Bus(), Timeout: patience}
			seen, done := context.WithCancel(ctx)
			n := 0
			fresh.Watch(seen, []string{"fails.service"}, func() {
				if n++; n > 4 { // two of them come without any signal
					done()
				}
			})
			done()
			fresh.Close()
		}
		cancel()
	})
	t.Run("systemd executes itself anew", func(t *testing.T) {
		u := &systemd.Units{Private: in.Private(), Bus: in.Bus(), Timeout: patience}
		defer u.Close()
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(u.Start(t.Context(), "up.service"))
		before := await(t, u, "up.service", "active", func(s systemd.Unit) bool { return s.MainPID != 0 })
		const reexec = syscall.Signal(34 + 25) // SIGRTMIN+25, systemd(1)
		must(syscall.Kill(in.PID, reexec))
		// The connection breaks without notice; calls fail for a moment, then work again.
		deadline := time.Now().Add(10 * time.Second)
		for {
			after, err := u.State(t.Context(), "up.service")
			if err == nil && after.MainPID == before.MainPID && after.Active == "active" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("after the re-execution: %+v, %v", after, err)
			}
		}
		must(u.Kill(t.Context(), "up.service", syscall.SIGKILL))
		await(t, u, "up.service", "failed", func(s systemd.Unit) bool { return s.Active == "failed" })
	})
	t.Run("systemd gone", func(t *testing.T) {
		u := &systemd.Units{Private: in.Private(), Bus: in.Bus(), Timeout: patience}
		defer u.Close()
		if _, err := u.State(t.Context(), "up.service"); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(in.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(10 * time.Second)
		for {
			_, err := u.State(t.Context(), "up.service")
			if errors.Is(err, systemd.ErrUnreachable) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("state of a dead systemd: %v, want ErrUnreachable", err)
			}
		}
	})
}

// TestUnits_Inside runs in the instance's namespaces, over the private socket alone.
func TestUnits_Inside(t *testing.T) {
	if os.Getenv(inside) == "" {
		t.Skip("run by TestUnits_RealSystemd inside namespaces")
	}
	u := &systemd.Units{Bus: "/nonexistent", Timeout: patience}
	defer u.Close()
	lifeOfUnits(t, u)
}

func lifeOfUnits(t *testing.T, u *systemd.Units) {
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if s, err := u.State(ctx, "nowhere.service"); err != nil || s.Load != "not-found" || !s.Down() {
		t.Errorf("missing unit: %+v, %v", s, err)
	}
	must(u.Stop(ctx, "nowhere.service", systemd.Replace))
	must(u.Kill(ctx, "nowhere.service", syscall.SIGKILL))
	if err := u.Start(ctx, "nowhere.service"); err == nil || errors.Is(err, systemd.ErrUnreachable) {
		t.Errorf("start of a missing unit: %v, want systemd's no", err)
	}

	must(u.Start(ctx, "up.service"))
	first := await(t, u, "up.service", "active", func(s systemd.Unit) bool { return s.Active == "active" && s.MainPID != 0 })
	if first.ActiveSince.IsZero() || !first.Running() {
		t.Errorf("running unit: %+v", first)
	}
	must(u.Kill(ctx, "up.service", syscall.SIGKILL))
	if s := await(t, u, "up.service", "failed", func(s systemd.Unit) bool { return s.Active == "failed" }); s.Result != "signal" || s.MainPID != 0 || !s.Down() {
		t.Errorf("killed unit: %+v", s)
	}
	must(u.Kill(ctx, "up.service", syscall.SIGKILL)) // nothing left to kill
	must(u.Start(ctx, "up.service"))                 // resets the failure
	await(t, u, "up.service", "active again", func(s systemd.Unit) bool { return s.Active == "active" })
	before := await(t, u, "up.service", "active", func(s systemd.Unit) bool { return s.MainPID != 0 }).MainPID
	must(u.Restart(ctx, "up.service"))
	await(t, u, "up.service", "active with another process", func(s systemd.Unit) bool { return s.Active == "active" && s.MainPID != before })
	must(u.Stop(ctx, "up.service", systemd.Irreversibly))
	await(t, u, "up.service", "down", systemd.Unit.Down)

	for range 8 { // more often than the start limit allows
		must(u.Start(ctx, "fails.service"))
		await(t, u, "fails.service", "failed", func(s systemd.Unit) bool { return s.Active == "failed" && s.Job == 0 })
	}

	// A job that does not end holds nobody up, and is seen as a job.
	must(u.Start(ctx, "slow.service"))
	await(t, u, "slow.service", "activating with a job", func(s systemd.Unit) bool { return s.Active == "activating" && s.Job != 0 })
	must(u.Stop(ctx, "slow.service", systemd.Irreversibly))
	await(t, u, "slow.service", "down", systemd.Unit.Down)

	// Stopping takes a minute; the kill does not wait for that.
	must(u.Start(ctx, "stubborn.service"))
	await(t, u, "stubborn.service", "active", func(s systemd.Unit) bool { return s.Active == "active" })
	must(u.Stop(ctx, "stubborn.service", systemd.Irreversibly))
	must(u.Kill(ctx, "stubborn.service", syscall.SIGKILL))
	await(t, u, "stubborn.service", "down", systemd.Unit.Down)
}

// A systemd that accepts and says nothing must not hold a caller.
func TestUnits_MuteSystemd(t *testing.T) {
	path := filepath.Join(short(t), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u := &systemd.Units{Private: path, Bus: "/nonexistent"}
	defer u.Close()
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := files()
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := u.State(ctx, "x.service"); !errors.Is(err, systemd.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want ErrUnreachable after the deadline", err)
		}
		cancel()
	}
	if now := files(); now > before {
		t.Errorf("%d open files, were %d", now, before)
	}
}

// pretend is a systemd that answers each call, when answer returns, with a reply without values or with the name that the error is.
func pretend(t *testing.T, answer func(member string) error) (socket string) {
	t.Helper()
	socket = filepath.Join(short(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	serve := func(c net.Conn) error {
		in := bufio.NewReader(c)
		for _, say := range []string{"REJECTED EXTERNAL", "OK 00", "AGREE_UNIX_FD", ""} { // to AUTH, AUTH EXTERNAL, NEGOTIATE_UNIX_FD, BEGIN
			if _, err := in.ReadString('\n'); err != nil {
				return err
			}
			if say != "" {
				if _, err := io.WriteString(c, say+"\r\n"); err != nil {
					return err
				}
			}
		}
		var mu sync.Mutex
		serial := uint32(0)
		for {
			m, err := dbus.DecodeMessage(in)
			if err != nil {
				return err
			}
			go func() {
				member, _ := m.Headers[dbus.FieldMember].Value().(string)
				reply := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(m.Serial())}}
				if err := answer(member); err != nil {
					reply.Type = dbus.TypeError
					reply.Headers[dbus.FieldErrorName] = dbus.MakeVariant(err.Error())
				}
				mu.Lock()
				defer mu.Unlock()
				var text bytes.Buffer
				if err := reply.EncodeTo(&text, binary.LittleEndian); err != nil {
					t.Errorf("encode a reply: %v", err)
				}
				serial++
				binary.LittleEndian.PutUint32(text.Bytes()[8:], serial) // godbus gives one only to what it sends itself
				_, _ = c.Write(text.Bytes())                            // the client may be gone
			}()
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = serve(c) // the client is gone, or will say what it misses
				_ = c.Close()
			}()
		}
	}()
	return socket
}

// A systemd that refuses to send signals still takes calls: the watch must not take their connection away, or a restart would be sent twice.
func TestUnits_SubscriptionRefused(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]int{}
	restarting, heard := make(chan struct{}), make(chan struct{})
	socket := pretend(t, func(member string) error {
		mu.Lock()
		seen[member]++
		first := seen[member] == 1
		mu.Unlock()
		switch member {
		case "Subscribe":
			<-restarting
			return errors.New("org.freedesktop.DBus.Error.AccessDenied")
		case "RestartUnit":
			if first {
				close(restarting)
			}
			<-heard
		}
		return nil
	})
	u := &systemd.Units{Private: socket, Bus: "/nonexistent", Timeout: patience}
	defer u.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	hints := make(chan struct{}, 100)
	wg.Go(func() { u.Watch(ctx, []string{"x.service"}, func() { hints <- struct{}{} }) })
	restart := make(chan error)
	wg.Go(func() { restart <- u.Restart(ctx, "x.service") })
	for range 3 { // at the beginning, after the no, and by the clock
		<-hints
	}
	close(heard)
	if err := <-restart; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if seen["RestartUnit"] != 1 || seen["ResetFailedUnit"] != 1 {
		t.Errorf("one restart was sent as %v", seen)
	}
}

func TestUnits_NoSystemd(t *testing.T) {
	u := &systemd.Units{Private: "/nonexistent/p", Bus: "/nonexistent/b"}
	if _, err := u.State(t.Context(), "x.service"); !errors.Is(err, systemd.ErrUnreachable) {
		t.Errorf("got %v, want ErrUnreachable", err)
	}
	u.Close()
	if err := u.Start(t.Context(), "x.service"); !errors.Is(err, systemd.ErrUnreachable) {
		t.Errorf("closed: got %v, want ErrUnreachable", err)
	}
}

func ExampleUnit_Down() {
	fmt.Println(systemd.Unit{Active: "failed"}.Down(), systemd.Unit{Active: "inactive", Job: 7}.Down())
	// Output: true false
}
