package bus_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
)

func TestDoorIsForItsOwnerOnly(t *testing.T) {
	old := syscall.Umask(0) // The worst umask there is.
	defer syscall.Umask(old)
	_, o := startBus(t, nil)
	info, err := os.Stat(o.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode of the door: %s", info.Mode())
	}
}

func TestDoorIsTaken(t *testing.T) {
	_, o := startBus(t, nil)
	if _, err := bus.Start(t.Context(), o); !errors.Is(err, bus.ErrDoorTaken) {
		t.Fatalf("second bus on one door: %v", err)
	}
	dial(t, o, "still works")
}

func TestDoorOfAnotherServerIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, err = bus.Start(t.Context(), bus.Options{Socket: path, ServerName: "h", ClusterName: "p", Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, bus.ErrDoorTaken) {
		t.Fatalf("door of another server: %v", err)
	}
}

func TestStaleDoorIsReplacedAndAFileIsNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // As after kill -9.
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, o := startBus(t, func(o *bus.Options) { o.Socket = path })
	dial(t, o, "on the new door")

	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bus.Start(t.Context(), bus.Options{Socket: file, ServerName: "h", ClusterName: "p"}); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Fatalf("door on a file: %v", err)
	}
	if raw, err := os.ReadFile(file); err != nil || string(raw) != "precious" {
		t.Fatal("the file was removed")
	}
}

func TestDialSaysWhatToDo(t *testing.T) {
	_, err := bus.Dial(t.Context(), filepath.Join(t.TempDir(), "none"), "x")
	var away *bus.AwayError
	if !errors.As(err, &away) || !strings.Contains(away.Hint, "systemctl start") {
		t.Fatalf("dial without a bus: %v", err)
	}
}

// TestDialWaitsForAServerThatIsReplaced: the door takes connections and ends them until the server behind it is there.
func TestDialWaitsForAServerThatIsReplaced(t *testing.T) {
	_, o := startBus(t, nil)
	socket := filepath.Join(t.TempDir(), "s")
	door, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = door.Close() }()
	var ends sync.WaitGroup
	defer ends.Wait()
	ends.Go(func() {
		for i := range 3 {
			in, err := door.Accept()
			if err != nil || i < 2 {
				if err == nil {
					_ = in.Close()
				}
				continue
			}
			server, err := net.Dial("unix", o.Socket)
			if err != nil {
				t.Error(err)
				return
			}
			ends.Go(func() { _, _ = io.Copy(server, in); _ = server.Close() })
			ends.Go(func() { _, _ = io.Copy(in, server); _ = in.Close() })
		}
	})
	c, err := bus.Dial(t.Context(), socket, "patient")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestAgentOutlivesTheBus: a lazy connection works before, between and after runs of the bus, and a mirror says what it knows.
func TestAgentOutlivesTheBus(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	o := bus.Options{Socket: filepath.Join(t.TempDir(), "s"), ServerName: "h", ClusterName: "p", Log: slog.New(slog.DiscardHandler)}
	agent, err := bus.DialLazy(o.Socket, "agent")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	alive := 100 * time.Millisecond
	m, err := bus.NewMirror(agent, bus.XAPITable("sr"), bus.MirrorOptions[vdi]{Alive: alive})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if agent.Connected() || m.Freshness().Fresh {
		t.Fatal("connected to nothing")
	}
	for round := range int64(2) {
		b, err := bus.Start(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		feed, err := b.Connect("feed")
		if err != nil {
			t.Fatal(err)
		}
		table, err := bus.NewTable[vdi](feed, bus.XAPITable("sr"), bus.TableOptions{Alive: alive})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := table.Replace(map[string]vdi{"a": {round}}); err != nil {
			t.Fatal(err)
		}
		waitUntil(t, m, func() bool { v, _ := m.Get("a"); return m.Freshness().Fresh && v.Size == round })
		table.Close()
		feed.Close()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		waitUntil(t, m, func() bool { return !m.Freshness().Fresh })
	}
}

func TestCloseEndsInTimeWithSubscribersThatNeverRead(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	o := bus.Options{Socket: filepath.Join(t.TempDir(), "s"), ServerName: "h", ClusterName: "p", MaxPending: 1 << 20, Log: slog.New(slog.DiscardHandler)}
	b, err := bus.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	deaf, err := net.Dial("unix", o.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = deaf.Close() }()
	if _, err := deaf.Write([]byte("CONNECT {\"verbose\":false}\r\nSUB xostor.> 1\r\nPING\r\n")); err != nil {
		t.Fatal(err)
	}
	c, err := bus.Dial(t.Context(), o.Socket, "loud")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	heard := make(chan struct{}, 10000)
	if _, err := c.Subscribe(func(*bus.Message) { heard <- struct{}{} }, "xostor.>"); err != nil {
		t.Fatal(err)
	}
	const messages = 500
	body := make([]byte, 16<<10) // Far more in all than may be pending.
	for range messages {
		if err := c.Publish(&bus.Message{Subject: string(subject.XAPI("vm", "u")), Data: body}); err != nil {
			t.Fatal(err)
		}
		<-heard // The one that reads gets everything.
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	closed := make(chan error, 1)
	go func() { closed <- b.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Fatal(err)
		}
	case <-ctx.Done():
		t.Fatal("the bus did not close within 5 s")
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestServiceAnswers(t *testing.T) {
	_, o := startBus(t, nil)
	for _, host := range []string{"h1", "h2"} {
		c := dial(t, o, host)
		s, err := bus.Serve(c, bus.ServiceInfo{Agent: "sr-size", Host: host, HostName: "xcp-" + host, Version: "1.2.3"}, func() any {
			return map[string]string{"state": "idle on " + host}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
		})
		if err := c.Flush(t.Context()); err != nil { // from here on the server knows that it answers
			t.Fatal(err)
		}
	}
	asker := dial(t, o, "asker")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	all, err := bus.Statuses(ctx, asker, func(got []bus.Status) bool { return len(got) == 2 })
	if err != nil || len(all) != 2 {
		t.Fatalf("statuses: %+v, %v", all, err)
	}
	for _, s := range all {
		if s.Agent != "sr-size" || s.HostName != "xcp-"+s.Host || string(s.Body) != `{"state":"idle on `+s.Host+`"}` || s.RTT <= 0 {
			t.Errorf("status %+v %s", s, s.Body)
		}
	}
	for _, verb := range []string{"PING", "INFO", "STATS"} {
		reply, err := asker.Request(t.Context(), &bus.Message{Subject: "$SRV." + verb + ".xostor-sr-size"})
		if err != nil || !strings.Contains(string(reply.Data), `"xostor-sr-size"`) {
			t.Errorf("$SRV.%s: %v, %v", verb, reply, err)
		}
	}
}

func TestStatusesWithoutAgents(t *testing.T) {
	_, o := startBus(t, nil)
	if all, err := bus.Statuses(t.Context(), dial(t, o, "asker"), nil); err != nil || len(all) != 0 {
		t.Fatalf("statuses: %v, %v", all, err)
	}
}
