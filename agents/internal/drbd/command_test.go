package drbd_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script makes a program that prints and exits as told.
func script(t *testing.T, body string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "tool")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return file
}

// What DRBD 9.2.18 printed in the lab, and what it means.
func TestTool_Refusals(t *testing.T) {
	tests := []struct {
		name, body string
		want       error
		code       int
	}{
		{"no quorum", `echo "r0: State change failed: (-25) No quorum" >&2; echo "1 of 3 nodes visible, need 2 for quorum" >&2; exit 11`, drbd.ErrNoQuorum, -25},
		{"another primary", `echo "r0: State change failed: (-1) Multiple primaries not allowed by config" >&2; exit 11`, drbd.ErrOtherPrimary, -1},
		{"held open", `echo "r0: State change failed: (-12) Device is held open by someone"; echo "drbd0 opened by hd (pid 339) at 2026-11-21 00:47:00.327"; exit 11`, drbd.ErrHeldOpen, -12},
		{"refused", `echo "r0: State change failed: (-10) State change was refused by peer node" >&2; exit 11`, drbd.ErrRefused, -10},
		{"no data", `echo "r0: State change failed: (-2) Need access to UpToDate data" >&2; exit 17`, drbd.ErrNoUpToDate, -2},
		{"no module", `echo "Could not connect to 'drbd' generic netlink family" >&2; exit 20`, drbd.ErrNoModule, 0},
		{"module removed", `exit 121`, drbd.ErrNoModule, 0},
		{"no resource", `echo "r0: Failure: (158) Unknown resource" >&2; exit 10`, drbd.ErrNoResource, 158},
		{"an unknown number", `echo "r0: State change failed: (-99) Moon in the wrong phase" >&2; exit 11`, nil, -99},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tool := drbd.Tool{Drbdsetup: script(t, tt.body)}
			err := tool.Primary(t.Context(), "r0")
			ce, ok := errors.AsType[*drbd.CommandError](err)
			if !ok || ce.Code != tt.code || ce.Text == "" && tt.name != "module removed" {
				t.Fatalf("got %#v, want a CommandError with code %d and text", err, tt.code)
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("%v does not match %v", err, tt.want)
			}
		})
	}
}

func TestTool_ConnectTwiceIsNoError(t *testing.T) {
	tool := drbd.Tool{Drbdsetup: script(t, `echo "r0: Failure: (125) Device has a net-config (use disconnect first)" >&2; exit 10`)}
	if err := tool.Connect(t.Context(), "r0", 1); err != nil {
		t.Errorf("got %v, want no error", err)
	}
}

func TestTool_Missing(t *testing.T) {
	tool := drbd.Tool{Drbdsetup: "/nonexistent/drbdsetup"}
	if _, err := tool.Status(t.Context(), "r0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want one matching fs.ErrNotExist", err)
	}
}

func TestTool_Status(t *testing.T) {
	tool := drbd.Tool{Drbdsetup: script(t, `echo '[{"name":"r0","role":"Primary","suspended":true,"suspended-quorum":true,"force-io-failures":false,"devices":[{"volume":0,"minor":1000,"disk-state":"UpToDate","quorum":false}],"connections":[]}]'`)}
	r, err := tool.Status(t.Context(), "r0")
	if err != nil || r.Role != drbd.Primary || r.SuspendedQuorum() != drbd.Yes || r.Owner() != drbd.No || r.Devices[0].Open != drbd.Unknown || r.MayPromote != drbd.Unknown {
		t.Errorf("got %+v, %v", r, err)
	}
	if _, err := tool.Status(t.Context(), "other"); !errors.Is(err, drbd.ErrNoResource) {
		t.Errorf("got %v, want ErrNoResource", err)
	}
}

func TestTool_Options(t *testing.T) {
	tool := drbd.Tool{Drbdsetup: script(t, `echo '[{"resource":"r0","options":{"quorum":"majority","on-no-quorum":"suspend-io","auto-promote":true},"_this_host":{"node-id":2},"connections":[{"net":{"rr-conflict":"disconnect"}}]}]'`)}
	o, err := tool.Options(t.Context(), "r0")
	if want := (drbd.Options{Quorum: "majority", OnNoQuorum: "suspend-io", AutoPromote: "yes", RRConflict: "disconnect", NodeID: 2}); err != nil || o != want {
		t.Errorf("got %+v, %v; want %+v", o, err, want)
	}
}

// Debian's drbdsetup on a machine without the module.
func TestTool_RealProgramWithoutModule(t *testing.T) {
	if _, err := exec.LookPath("drbdsetup"); err != nil {
		if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
			t.Fatal("drbdsetup is missing: install the Debian package drbd-utils")
		}
		t.Skip("drbdsetup is missing (Debian package drbd-utils)")
	}
	if _, err := os.Stat("/proc/drbd"); err == nil {
		t.Skip("this machine has DRBD in its kernel")
	}
	var tool drbd.Tool
	if _, err := tool.Status(t.Context(), "r0"); !errors.Is(err, drbd.ErrNoModule) {
		t.Errorf("status: %v, want ErrNoModule", err)
	}
	if err := tool.Primary(t.Context(), "r0"); !errors.Is(err, drbd.ErrNoModule) {
		t.Errorf("primary: %v, want ErrNoModule", err)
	}
	if err := tool.Adjust(t.Context(), "no-such-resource"); !errors.Is(err, drbd.ErrNoResource) {
		t.Errorf("adjust: %v, want ErrNoResource", err)
	}
	err := drbd.Events2{Resource: "r0"}.Follow(t.Context(), func(*drbd.Resource) {})
	if !errors.Is(err, drbd.ErrNoModule) {
		t.Errorf("events2: %v, want ErrNoModule", err)
	}
}

func TestEvents2_HoldsStdinAndEndsWithContext(t *testing.T) {
	// As the real one with --poll: it lives until its stdin is closed.
	s := drbd.Events2{Resource: "a", Program: script(t, `[ "$*" = "events2 --full --poll a" ] || exit 1
		echo "exists resource name:a role:Secondary may_promote:yes"; echo "exists -"; cat >/dev/null`)}
	ctx, cancel := context.WithCancel(t.Context())
	err := s.Follow(ctx, func(r *drbd.Resource) {
		if r == nil || r.MayPromote != drbd.Yes {
			t.Errorf("view %+v", r)
		}
		cancel()
	})
	if err == nil || ctx.Err() == nil {
		t.Errorf("ended with %v before the context did", err)
	}
}

func TestRunner_LeavesStuckChildBehind(t *testing.T) {
	var r child.Runner
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Run(ctx, "nap", "sleep", "600"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	if n := r.Stuck("nap"); n != 0 {
		t.Errorf("%d children count as stuck though they died of the kill", n)
	}
	res, err := r.Run(t.Context(), "nap", "sh", "-c", "echo out; echo err >&2; exit 3")
	if err != nil || res.Exit != 3 || string(res.Stdout) != "out\n" || string(res.Stderr) != "err\n" {
		t.Errorf("got %+v, %v", res, err)
	}
}

// scripted is a Source whose streams are given.
type scripted struct {
	streams [][]*drbd.Resource
	err     error
}

func (s *scripted) Follow(ctx context.Context, view func(*drbd.Resource)) error {
	if len(s.streams) == 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	now := s.streams[0]
	s.streams = s.streams[1:]
	for _, r := range now {
		view(r)
	}
	return s.err
}

// Children of a purpose can be ended from outside, others go on.
func TestRunner_Interrupt(t *testing.T) {
	var r child.Runner
	ended := map[string]chan error{"a": make(chan error, 1), "b": make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	for purpose, to := range ended {
		go func() {
			_, err := r.Run(ctx, purpose, "sleep", "600")
			to <- err
		}()
	}
	for done := false; !done; { // the child may not have started yet
		r.Interrupt("a", "c")
		select {
		case err := <-ended["a"]:
			if !errors.Is(err, child.ErrInterrupted) {
				t.Errorf("ended with %v", err)
			}
			done = true
		default:
			runtime.Gosched()
		}
	}
	select {
	case err := <-ended["b"]:
		t.Errorf("the other ended too: %v", err)
	default:
	}
	cancel()
	if err := <-ended["b"]; !errors.Is(err, context.Canceled) {
		t.Errorf("the other ended with %v", err)
	}
}

func TestWatcher_RespawnsAndTellsStaleness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &scripted{streams: [][]*drbd.Resource{{{Name: "a", Role: drbd.Primary}}, {}, {}, {{Name: "a", Role: drbd.Secondary}}}, err: drbd.ErrNoModule}
		var seen []drbd.View
		var at []time.Duration
		start := time.Now()
		var w *drbd.Watcher
		w = drbd.NewWatcher(src, func() { seen, at = append(seen, w.View()), append(at, time.Since(start)) }, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { w.Run(ctx); close(done) }()
		time.Sleep(10 * time.Second) // virtual
		cancel()
		<-done
		type step struct {
			fresh bool
			role  drbd.Role
			at    time.Duration
		}
		want := []step{{true, drbd.Primary, 0}, {false, drbd.Primary, 0}, {false, drbd.Primary, 0}, {false, drbd.Primary, 100 * time.Millisecond},
			{true, drbd.Secondary, 300 * time.Millisecond}, {false, drbd.Secondary, 300 * time.Millisecond}}
		if len(seen) != len(want) {
			t.Fatalf("%d views, want %d: %+v", len(seen), len(want), seen)
		}
		for i, v := range seen {
			if v.Fresh != want[i].fresh || v.Resource.Role != want[i].role || at[i] != want[i].at || !v.Fresh && v.Err == "" {
				t.Errorf("view %d: %+v at %s, want %+v", i, v, at[i], want[i])
			}
		}
	})
}

// A stream that is cut in the middle of a line, or in which two lines ran into each other, is left at once, and the next dump is the truth: nothing of what the
// garbled lines said remains.
func TestWatcher_GarbledStream(t *testing.T) {
	const dump = "exists resource name:db role:Secondary suspended:no may_promote:no promotion_score:10101\nexists device name:db volume:0 minor:1 disk:UpToDate client:no quorum:yes\nexists -\n"
	for name, garbage := range map[string]string{
		"cut":         "change resource name:db role:Primary may_pro",
		"cut, more":   "change resource name:db role:Pri\nchange device na\n",
		"interleaved": "change resource name:db role:Primchange device name:db volume:0 quorum:no ary may_promote:no\nchange device volume:0\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			script := filepath.Join(dir, "drbdsetup")
			// The first life prints the garbage, the second does not, and stays.
			text := "#!/bin/sh\ncat " + dir + "/dump\n[ -e " + dir + "/again ] && exec cat\ntouch " + dir + "/again\ncat " + dir + "/garbage\n"
			for file, content := range map[string]string{"drbdsetup": text, "dump": dump, "garbage": garbage} {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			changes := make(chan struct{}, 64)
			w := drbd.NewWatcher(drbd.Events2{Program: script, Resource: "db"}, func() { changes <- struct{}{} }, nil)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { w.Run(ctx); close(ended) }()
			for v := w.View(); v.Restarts == 0 || !v.Fresh; v = w.View() {
				<-changes
			}
			r := w.View().Resource
			if r == nil || r.Role != drbd.Secondary || r.Quorum() != drbd.Yes || len(r.Devices) != 1 {
				t.Errorf("after the garbage: %+v", r)
			}
			cancel()
			<-ended
		})
	}
}

// breaking is a Source that shows one view and ends.
type breaking struct{}

func (breaking) Follow(_ context.Context, view func(*drbd.Resource)) error {
	view(&drbd.Resource{Name: "db"})
	return io.EOF
}

// Ten thousand broken streams, and a few hundred commands, leave no goroutine and no open file behind.
func TestWatcher_DoesNotGrow(t *testing.T) {
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	var r child.Runner
	cycle := func(n int) {
		for range n {
			if _, err := r.Run(t.Context(), "true", "true"); err != nil {
				t.Fatal(err)
			}
		}
	}
	cycle(10)
	goroutines, open := runtime.NumGoroutine(), files()
	cycle(300)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		breaks := 0
		var w *drbd.Watcher
		w = drbd.NewWatcher(breaking{}, func() {
			if breaks = w.View().Restarts; breaks == 10000 {
				cancel()
			}
		}, nil)
		w.Run(ctx)
		if breaks != 10000 {
			t.Errorf("%d breaks", breaks)
		}
	})
	// The last call's goroutines may be ending still.
	for end := time.Now().Add(time.Minute); (runtime.NumGoroutine() > goroutines || files() > open) && time.Now().Before(end); {
		runtime.Gosched()
	}
	if g, f := runtime.NumGoroutine(), files(); g > goroutines || f > open {
		t.Errorf("goroutines %d -> %d, open files %d -> %d", goroutines, g, open, f)
	}
}
