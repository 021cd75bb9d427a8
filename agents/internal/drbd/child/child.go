// Package child runs short commands that may get stuck in the kernel.
//
// A process in uninterruptible sleep does not die of SIGKILL, and whoever waits for it hangs too. Run waits no longer than its context: it kills the
// child and leaves it behind. A child left behind blocks a second one for the same purpose until it is gone, so they do not pile up.
package child

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"
)

// maxOutput bounds what is kept of a child's output, in bytes.
const maxOutput = 1 << 20

// ErrStuck says that an earlier child for the same purpose was left behind and is still there.
var ErrStuck = errors.New("an earlier call is still stuck in the kernel")

// ErrInterrupted says that Interrupt ended the call.
var ErrInterrupted = errors.New("interrupted")

// Result is what a child that ended left.
type Result struct {
	Exit   int // exit code; 128+n when signal n ended it
	Stdout []byte
	Stderr []byte
}

// Runner runs children. Its zero value is ready.
type Runner struct {
	mu      sync.Mutex
	stuck   map[string]int // children left behind, by purpose
	running map[*started]context.CancelCauseFunc
}

// Interrupt kills the children that run for these purposes now, so that they hold nothing open. Their calls end with an error matching ErrInterrupted.
func (r *Runner) Interrupt(purposes ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c, cancel := range r.running {
		if slices.Contains(purposes, c.purpose) {
			cancel(ErrInterrupted)
		}
	}
}

// Stuck counts the children left behind for a purpose that have not ended yet.
func (r *Runner) Stuck(purpose string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stuck[purpose]
}

// Run starts argv and waits for its end or for ctx. Errors: ErrStuck, the context's (the child was killed and perhaps left behind), or that the
// program could not be started (matching fs.ErrNotExist when it is missing). An exit code other than 0 is a Result, not an error.
func (r *Runner) Run(ctx context.Context, purpose string, argv ...string) (Result, error) {
	if r.Stuck(purpose) > 0 {
		return Result{}, fmt.Errorf("run %s: %w", argv[0], ErrStuck)
	}
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("run %s: %w", argv[0], err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	// The child gets pipes that we own. With exec's own ones Wait would also wait for whoever inherited them.
	out, err := pipe(&cmd.Stdout)
	if err != nil {
		return Result{}, fmt.Errorf("run %s: %w", argv[0], err)
	}
	errs, err := pipe(&cmd.Stderr)
	if err != nil {
		out.close()
		return Result{}, fmt.Errorf("run %s: %w", argv[0], err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that the kill reaches what the child started
	err = cmd.Start()
	out.started()
	errs.started()
	if err != nil {
		out.close()
		errs.close()
		return Result{}, fmt.Errorf("run %s: %w", argv[0], err)
	}
	c := &started{purpose: purpose}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.begin(c, cancel)
	defer r.end(c)
	ended := make(chan Result, 1)
	go func() {
		_ = cmd.Wait() // the state says it all
		r.gone(c)
		ended <- Result{Exit: exitCode(cmd.ProcessState), Stdout: out.rest(), Stderr: errs.rest()}
	}()
	select {
	case res := <-ended:
		return res, nil
	case <-ctx.Done():
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it may have ended this moment
	// Most children die at once. Only one stuck in the kernel is worth remembering.
	grace := time.NewTimer(killGrace)
	defer grace.Stop()
	select {
	case <-ended:
	case <-grace.C:
		r.leave(c)
	}
	return Result{}, fmt.Errorf("run %s: %w", argv[0], context.Cause(ctx))
}

// killGrace is how long a killed child gets to disappear before the caller goes on without it.
const killGrace = 20 * time.Millisecond

// started is one running child.
type started struct {
	purpose     string
	ended, left bool // under the Runner's lock
}

func (r *Runner) begin(c *started, cancel context.CancelCauseFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running == nil {
		r.running = map[*started]context.CancelCauseFunc{}
	}
	r.running[c] = cancel
}

func (r *Runner) end(c *started) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, c)
}

func (r *Runner) leave(c *started) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.ended {
		return
	}
	if r.stuck == nil {
		r.stuck = map[string]int{}
	}
	c.left = true
	r.stuck[c.purpose]++
}

func (r *Runner) gone(c *started) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.ended = true
	if c.left {
		r.stuck[c.purpose]--
	}
}

func exitCode(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}

// stream collects one output of a child through a pipe of our own.
type stream struct {
	r, w *os.File
	done chan []byte
}

func pipe(to *io.Writer) (*stream, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	*to = w
	return &stream{r: r, w: w, done: make(chan []byte, 1)}, nil
}

// started closes our copy of the write end and begins to read.
func (s *stream) started() {
	_ = s.w.Close()
	go func() {
		var b bytes.Buffer
		_, _ = io.Copy(&b, io.LimitReader(s.r, maxOutput)) // an early close is the end of the text
		_ = s.r.Close()
		s.done <- b.Bytes()
	}()
}

func (s *stream) close() { _ = s.r.Close() }

// rest returns what was read. A grandchild that keeps the pipe open does not hold us up.
func (s *stream) rest() []byte {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case b := <-s.done:
		return b
	case <-t.C:
		_ = s.r.Close()
		return <-s.done
	}
}
