package dom0_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// openOn opens the named host of a served pool; the configuration's controllers are left out when own is set, so that they are found through XAPI.
func openOn(t *testing.T, pool *lab.Pool, host string) *dom0.Dom0 {
	t.Helper()
	file, err := pool.WriteConfig(host, "")
	if err != nil {
		t.Fatal(err)
	}
	c, err := dom0.LoadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := dom0.Open(c, "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

func servedPool(t *testing.T) *lab.Pool {
	t.Helper()
	dir, err := os.MkdirTemp("", "d0-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	pool, err := lab.New(lab.Options{Seed: 1, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pool.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := pool.Serve(); err != nil {
		t.Fatal(err)
	}
	return pool
}

func TestCoordinator_FileAndXAPIMustAgree(t *testing.T) {
	pool := servedPool(t)
	here := pool.Coordinator()
	var other lab.Host
	for _, h := range pool.Hosts() {
		if h.Name != here.Name {
			other = h
		}
	}
	d, supporter := openOn(t, pool, here.Name), openOn(t, pool, other.Name)
	if ok, why, err := d.Coordinator(t.Context()); !ok || err != nil {
		t.Errorf("on the coordinator: %v %q %v", ok, why, err)
	}
	if ok, why, err := supporter.Coordinator(t.Context()); ok || err != nil || !strings.Contains(why, "says that this host is supporter") {
		t.Errorf("on a supporter: %v %q %v", ok, why, err)
	}
	// After a split the old coordinator's file still says so.
	if err := os.WriteFile(supporter.Config.Host.PoolConf, []byte("master"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ok, why, err := supporter.Coordinator(t.Context()); ok || err != nil || why != "XAPI's pool.master is another host" {
		t.Errorf("with a file that lies: %v %q %v", ok, why, err)
	}
	pool.XAPIDown()
	if ok, _, err := d.Coordinator(t.Context()); ok || err == nil {
		t.Errorf("without XAPI: %v %v, want an error: nobody knows", ok, err)
	}
	if err := pool.XAPIUp(); err != nil {
		t.Fatal(err)
	}
}

func TestCoordinatorGate_TakesPermissionBackWhenTheRoleMoves(t *testing.T) {
	pool := servedPool(t)
	d := openOn(t, pool, pool.Coordinator().Name)
	ctx, leave, err := d.CoordinatorGate().Enter(t.Context(), agents.Action{})
	if err != nil {
		t.Fatal(err)
	}
	defer leave(nil)
	for _, h := range pool.Hosts() {
		if h.Name != pool.Coordinator().Name {
			if err := pool.MoveCoordinator(h.Name); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	select {
	case <-ctx.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the action may still go on 20 s after the role moved")
	}
	if _, no := errors.AsType[*agents.Refusal](context.Cause(ctx)); !no {
		t.Errorf("cancelled with %v, want the gate's refusal", context.Cause(ctx))
	}
	if _, _, err := d.CoordinatorGate().Enter(t.Context(), agents.Action{}); err == nil {
		t.Error("a second action was permitted")
	}
}

func TestOpen_WhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	c := dom0.DefaultConfig()
	c.Host = dom0.HostConfig{PoolConf: filepath.Join(dir, "pool.conf"), Inventory: filepath.Join(dir, "inventory")}
	_, err := dom0.Open(c, "test", slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "is this the dom0 of an XCP-ng host?") {
		t.Errorf("missing host files: %v, want an error with the next step", err)
	}
	for name, text := range map[string]string{"pool.conf": "master", "inventory": "INSTALLATION_UUID='h1'\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.XAPI.Socket, c.Bus.Socket = filepath.Join(dir, "x"), filepath.Join(dir, "b")
	d, err := dom0.Open(c, "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("XAPI, LINSTOR and the bus may come later than we do: %v", err)
	}
	defer d.Close()
	if _, _, err := d.Coordinator(t.Context()); err == nil || !strings.Contains(err.Error(), "systemctl status xapi") {
		t.Errorf("without XAPI: %v, want an error with the next step", err)
	}
}

func TestOptions_WakesReportsAndStatusGoOverTheBus(t *testing.T) {
	pool := servedPool(t)
	here := pool.Coordinator()
	socket := filepath.Join(filepath.Dir(pool.FacesOf(here.Name).Socket), "bus.sock")
	b, err := bus.Start(t.Context(), bus.Options{Socket: socket, ServerName: here.UUID, ClusterName: "p", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	d := openOn(t, pool, here.Name)
	o := d.Options("sr-size", "act", time.Minute)
	events := make(chan bus.Event, 10)
	mine, err := b.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	stop, err := bus.SubscribeEvents(mine, subject.Agent("*", "*", "*"), func(e bus.Event) { events <- e }, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if err := mine.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	within := func(what string) bus.Event {
		t.Helper()
		select {
		case e := <-events:
			return e
		case <-time.After(20 * time.Second):
			t.Fatalf("%s did not arrive", what)
			return bus.Event{}
		}
	}
	o.Report.Action(agents.Record{Action: agents.Action{Verb: "set-sr-size", Target: "sr1"}, Outcome: agents.Done})
	if e := within("the action"); e.Type != dom0.TypeAction || e.Key != "sr1" {
		t.Errorf("got %+v", e)
	}
	o.Report.Finding(agents.Finding{Code: "x", Subject: "sr/1"}, true)
	if e := within("the finding"); e.Type != dom0.TypeFinding || !strings.Contains(string(e.Data), `"raised":true`) {
		t.Errorf("got %+v", e)
	}
	end, err := d.Serve("sr-size", "1.2.3", o.Board)
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	if err := d.Bus.Flush(t.Context()); err != nil { // from here on the server knows who answers
		t.Fatal(err)
	}
	asking, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	answers, err := bus.Statuses(asking, mine, func(s []bus.Status) bool { return len(s) == 1 })
	if err != nil || len(answers) != 1 || answers[0].Agent != "sr-size" || answers[0].Host != d.Facts.HostUUID {
		t.Errorf("statuses %+v, %v", answers, err)
	}
	wakes := make(chan subject.Subject, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- o.Listen(ctx, []subject.Subject{subject.XAPI("sr", "*")}, func(s subject.Subject) {
			select {
			case wakes <- s:
			default:
			}
		})
	}()
	tick := time.NewTicker(20 * time.Millisecond) // the subscription is made on another connection: publish until it stands
	defer tick.Stop()
	for got := false; !got; {
		select {
		case s := <-wakes:
			got = s == subject.XAPI("sr", "u1")
		case <-tick.C:
			if err := bus.PublishEvent(mine, bus.Event{Source: "/t", Type: "t", Subject: subject.XAPI("sr", "u1")}); err != nil {
				t.Fatal(err)
			}
		case <-t.Context().Done():
			t.Fatal("no wake")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("listen: %v", err)
	}
}

// TestListen_TheEndOfTheBussAbsenceIsAWake: what nobody heard meanwhile must not wait for the next resync.
func TestListen_TheEndOfTheBussAbsenceIsAWake(t *testing.T) {
	pool := servedPool(t)
	here := pool.Coordinator()
	door := bus.Options{Socket: filepath.Join(filepath.Dir(pool.FacesOf(here.Name).Socket), "bus.sock"), ServerName: here.UUID, Log: slog.New(slog.DiscardHandler)}
	d := openOn(t, pool, here.Name)
	wakes := make(chan subject.Subject, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- d.Options("sr-size", "act", time.Minute).Listen(ctx, []subject.Subject{subject.XAPI("sr", "*")}, func(s subject.Subject) { wakes <- s })
	}()
	for woken, tries := 0, 0; woken < 3; tries++ { // More tries, because the listener may come after the first connection.
		if tries == 10 {
			t.Fatalf("%d wakes in %d connections", woken, tries)
		}
		b, err := bus.Start(t.Context(), door)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case s := <-wakes:
			if woken++; s != dom0.Connected {
				t.Errorf("woken by %s", s)
			}
		case <-time.After(10 * time.Second):
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("listen: %v", err)
	}
}
