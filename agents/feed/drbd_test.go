package feed

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
)

const drbdDump = `exists resource name:r1 role:Secondary suspended:no may_promote:no promotion_score:10101
exists connection name:r1 peer-node-id:1 conn-name:h2 connection:Connected role:Secondary
exists device name:r1 volume:0 minor:1000 backing_dev:/dev/vg/r1 disk:UpToDate client:no quorum:yes
exists peer-device name:r1 peer-node-id:1 conn-name:h2 volume:0 replication:Established peer-disk:UpToDate peer-client:no
exists resource name:r2 role:Secondary suspended:no
exists -
`

// drbdPipe is a source that a test writes to. Each stream ends with what next says.
type drbdPipe struct {
	streams chan io.Reader
	err     error
}

func (p *drbdPipe) Follow(ctx context.Context, read func(io.Reader) error) error {
	if p.err != nil {
		return p.err
	}
	select {
	case r := <-p.streams:
		return read(r)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// oneByOne returns one line a read, as the kernel's groups come.
type oneByOne struct{ lines chan string }

func (o oneByOne) Read(p []byte) (int, error) {
	line, ok := <-o.lines
	if !ok {
		return 0, io.EOF
	}
	return copy(p, line), nil
}

func TestDRBD_FollowsEventsAndSaysWhenItCannot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		src := &drbdPipe{streams: make(chan io.Reader, 1)}
		first := oneByOne{make(chan string, 10)}
		src.streams <- first
		f := NewDRBD(DRBDOptions{Wire: w, Source: src, Host: "host-1", Log: quietLog})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); f.Run(ctx) }()
		m, err := bus.NewMirror(w, bus.DRBDTable("host-1"), bus.MirrorOptions[DRBDResource]{})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		first.lines <- drbdDump
		if err := m.WaitFresh(ctx); err != nil {
			t.Fatal(err)
		}
		if r, _ := m.Get("r1"); m.Len() != 2 || r.Role != "Secondary" || r.Quorum == nil || !*r.Quorum || len(r.Connections) != 1 || r.Connections[0].Disks[0].Disk != "UpToDate" {
			t.Errorf("after the dump: %d rows, %+v", m.Len(), r)
		}
		if r, _ := m.Get("r2"); r.Quorum != nil || r.MayPromote != nil {
			t.Errorf("what DRBD did not tell is not unknown: %+v", r)
		}
		first.lines <- "change resource name:r1 role:Primary\n"
		first.lines <- "destroy resource name:r2\n"
		synctest.Wait()
		<-m.Changed()
		eventuallyInBubble(t, m, func() bool { r, _ := m.Get("r1"); return r.Role == "Primary" && m.Len() == 1 })
		// The stream breaks: stale, rows kept; the next dump is the truth again.
		second := oneByOne{make(chan string, 10)}
		src.streams <- second
		close(first.lines)
		eventuallyInBubble(t, m, func() bool { return !m.Freshness().Fresh })
		if !strings.Contains(m.Freshness().Reason, "DRBD is not heard") || m.Len() != 1 {
			t.Errorf("while DRBD is not heard: %+v, %d rows", m.Freshness(), m.Len())
		}
		second.lines <- strings.ReplaceAll(drbdDump, "name:r1", "name:r3")
		eventuallyInBubble(t, m, func() bool { _, ok := m.Get("r3"); return ok && m.Len() == 2 && m.Freshness().Fresh })
		cancel()
		close(second.lines)
		<-done
	})
}

func eventuallyInBubble[T any](t *testing.T, m *bus.Mirror[T], ok func() bool) {
	t.Helper()
	for n := 0; !ok(); n++ {
		if n > 1000 {
			t.Fatalf("the mirror did not get there: %+v, %d keys", m.Freshness(), m.Len())
		}
		<-m.Changed()
	}
}

func TestDRBD_GarbledLinesEndTheStream(t *testing.T) {
	for _, bad := range []string{"", "\x00\xff\n", "exists resource\n", drbdDump + "change resource name:r1 ro", drbdDump + "- skipped 3\n", drbdDump + "change device name:r1 volume:x\n", strings.Repeat("x", 1<<17)} {
		table := tableOf(t)
		if err := publishDRBD(strings.NewReader(bad), table); err == nil {
			t.Errorf("%.40q ended without an error", bad)
		}
	}
}

func tableOf(t *testing.T) *bus.Table[DRBDResource] {
	t.Helper()
	table, err := bus.NewTable[DRBDResource](bustest.NewWire(t), bus.DRBDTable("h"), bus.TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(table.Close)
	return table
}

func TestDRBDEvents_ProgramMissingOrEnding(t *testing.T) {
	err := DRBDEvents{Program: "no-such-drbdsetup"}.Follow(t.Context(), func(io.Reader) error { return nil })
	if !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("missing program: %v", err)
	}
	program := filepath.Join(t.TempDir(), "drbdsetup")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nprintf 'exists resource name:r role:Primary\\nexists -\\n'; cat >/dev/null\n"), 0o700); err != nil { //nolint:gosec // It must run.
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan string, 1)
	done := make(chan error, 1)
	go func() {
		done <- DRBDEvents{Program: program}.Follow(ctx, func(r io.Reader) error {
			buf := make([]byte, 1000)
			n, err := r.Read(buf)
			got <- string(buf[:n])
			if err == nil {
				_, err = io.Copy(io.Discard, r)
			}
			return err
		})
	}()
	if text := <-got; !strings.Contains(text, "name:r") {
		t.Errorf("read %q", text)
	}
	cancel()
	if err := <-done; err != nil {
		t.Logf("ended with: %v", err)
	}
}

// TestDRBD_RecordedTraces reads what real nodes printed; the recordings are not part of the project.
func TestDRBD_RecordedTraces(t *testing.T) {
	dir := os.Getenv("XOSTOR_REFERENCE")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "reference")
	}
	files, _ := filepath.Glob(filepath.Join(dir, "traces", "events2-*.log"))
	if len(files) == 0 {
		t.Skip("no recorded traces: set XOSTOR_REFERENCE to the folder that holds traces/")
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		table := tableOf(t)
		err = publishDRBD(strings.NewReader(string(raw)), table)
		t.Logf("%s: %d resources, ended with: %v", filepath.Base(file), table.Len(), err)
		if err == nil {
			t.Error("a stream ended without saying so")
		}
	}
}

func FuzzPublishDRBD(f *testing.F) {
	f.Add(drbdDump)
	f.Add(drbdDump + "rename resource name:r1 new_name:r9\n")
	f.Add("exists -\nchange resource name:\xff role:Primary\n")
	f.Fuzz(func(t *testing.T, text string) {
		table, err := bus.NewTable[DRBDResource](bustest.NewWire(t), bus.DRBDTable("h"), bus.TableOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer table.Close()
		if err := publishDRBD(strings.NewReader(text), table); err == nil {
			t.Fatal("a stream ended without saying so")
		}
	})
}
