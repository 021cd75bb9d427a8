package drbd

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// Source is a stream of what happens to a resource. Follow delivers views until ctx ends or the stream breaks; each call begins with a whole new
// dump. A view is the caller's to keep; nil means that the resource does not exist. The error says why the stream ended.
type Source interface {
	Follow(ctx context.Context, view func(*Resource)) error
}

// Events2 is the Source that runs `drbdsetup events2 --full --poll <resource>`.
type Events2 struct {
	Program  string // path; "drbdsetup"
	Resource string
}

// maxLine bounds a line in bytes. Real ones have about 400.
const maxLine = 64 << 10

// Follow implements Source.
func (s Events2) Follow(ctx context.Context, view func(*Resource)) error {
	return FollowEvents(ctx, cmp.Or(s.Program, "drbdsetup"), s.Resource, func(r io.Reader) error { return ReadEvents(r, s.Resource, view) })
}

// FollowEvents runs `drbdsetup events2 --full --poll`, for one resource or with "" for all of this host, and gives read what it prints until ctx ends or read
// returns. The error says why the stream ended: the program's refusal (ErrNoModule, *CommandError) before read's own.
func FollowEvents(ctx context.Context, program, resource string, read func(io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	args := []string{"events2", "--full", "--poll"}
	if resource != "" {
		args = append(args, resource)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	stdin, err := cmd.StdinPipe() // with --poll the child lives as long as its stdin is open
	if err != nil {
		return fmt.Errorf("start events2: %w", err)
	}
	defer func() { _ = stdin.Close() }()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start events2: %w", err)
	}
	var text tail
	cmd.Stderr = &text
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start events2: %w", err)
	}
	readErr := read(out)
	cancel()
	waitErr := cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](waitErr); ok && exit.ExitCode() > 0 {
		return refusalOfStream(cmd.Args, exit.ExitCode(), text.String())
	}
	return fmt.Errorf("read events2: %w", cmp.Or(readErr, io.ErrUnexpectedEOF))
}

func refusalOfStream(args []string, code int, text string) error {
	e := &CommandError{Args: args, Exit: code, Text: strings.Join(strings.Fields(text), " ")}
	if code == 20 || code == 121 {
		e.kind, e.Hint = ErrNoModule, "check that the kernel module is loaded: modprobe drbd"
	}
	return e
}

// tail keeps the first few hundred bytes of what a child complains.
type tail struct{ strings.Builder }

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	if room := 512 - t.Len(); room > 0 {
		t.Builder.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// ReadEvents reads lines of events2 until they end or one cannot be read, and shows the resource each time the lines pause after the initial dump.
// Errors are those of ReadGroups.
func ReadEvents(r io.Reader, resource string, view func(*Resource)) error {
	return ReadGroups(r, func(st *State, _ map[string]bool) error {
		var v *Resource
		if r := st.Resources[resource]; r != nil {
			v = r.Clone()
		}
		view(v)
		return nil
	})
}

// ReadGroups reads lines of events2 until they end or one cannot be read, and calls group each time the lines pause after the initial dump, with the state, which
// stays the reader's, and the names of the resources that the lines since the last call were about.
// The error is io.EOF at an orderly end, or group's; a garbled line is an error matching ErrSyntax, because what it said is lost; so is
// a report of skipped events (ErrSkipped).
func ReadGroups(r io.Reader, group func(st *State, touched map[string]bool) error) error {
	in := bufio.NewReaderSize(r, maxLine)
	var st State
	var ev Event
	touched := map[string]bool{}
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("read events2: a line of more than %d bytes: %w", maxLine, ErrSyntax)
		}
		if err != nil {
			return err
		}
		text := string(line[:len(line)-1])
		if skip(text) {
			continue
		}
		if err := ev.Parse(text); err != nil {
			return err
		}
		if err := st.Apply(&ev); err != nil {
			return err
		}
		if st.Skipped > 0 {
			return ErrSkipped
		}
		for _, key := range []string{"name", "new_name"} {
			if name, ok := ev.Get(key); ok {
				touched[name] = true
			}
		}
		// The kernel's transition comes as one group, written at once: what is still in the buffer belongs to it.
		if st.Complete && !moreLines(in) {
			if err := group(&st, touched); err != nil {
				return err
			}
			clear(touched)
		}
	}
}

// skip tells whether a line carries nothing: empty, or a comment as recordings have.
func skip(line string) bool { return strings.TrimSpace(line) == "" || line[0] == '#' }

// moreLines tells whether a whole line is buffered already.
func moreLines(in *bufio.Reader) bool {
	b, _ := in.Peek(in.Buffered()) // never reads
	for _, c := range b {
		if c == '\n' {
			return true
		}
	}
	return false
}

// View is what a Watcher knows.
type View struct {
	Resource *Resource // nil: the resource does not exist, or nothing is known yet (Seen is zero)
	Fresh    bool      // the stream behind it is alive
	Seen     time.Time // when it was taken; zero: never
	Restarts int       // how often the stream broke
	Err      string    // why it broke last
}

// Watcher keeps a view current. Make it with NewWatcher and run it with Run.
type Watcher struct {
	source  Source
	changed func()
	log     *slog.Logger
	mu      sync.Mutex
	view    View
}

// NewWatcher watches a source. changed is called after each new view, from Run's goroutine; it must not block. A nil log discards.
func NewWatcher(source Source, changed func(), log *slog.Logger) *Watcher {
	return &Watcher{source: source, changed: changed, log: cmp.Or(log, slog.New(slog.DiscardHandler))}
}

// View returns the latest view. Its Resource is shared: do not change it.
func (w *Watcher) View() View {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.view
}

// Pauses between a broken stream and the next.
const (
	respawnMin = 100 * time.Millisecond
	respawnMax = 5 * time.Second
)

// Run follows the source until ctx ends, and starts it again when it breaks.
func (w *Watcher) Run(ctx context.Context) {
	var pause time.Duration // the first restart after a view is immediate: blindness costs more than a process
	for ctx.Err() == nil {
		err := w.source.Follow(ctx, func(r *Resource) {
			pause = 0
			w.set(func(v *View) { v.Resource, v.Fresh, v.Seen, v.Err = r, true, time.Now(), "" })
		})
		if ctx.Err() != nil {
			return
		}
		w.log.Warn("drbd events ended", "err", err, "pause", pause)
		w.set(func(v *View) { v.Fresh, v.Err, v.Restarts = false, err.Error(), v.Restarts+1 })
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		pause = min(max(2*pause, respawnMin), respawnMax)
	}
}

func (w *Watcher) set(f func(*View)) {
	w.mu.Lock()
	f(&w.view)
	w.mu.Unlock()
	w.changed()
}
