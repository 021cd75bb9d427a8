package drbdsim

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdface"
)

// Wall is a Scheduler by the wall clock. Do runs a function alone, as Cluster wants it.
type Wall struct {
	mu   sync.Mutex
	look []func()
}

// Now implements Scheduler.
func (w *Wall) Now() time.Time { return time.Now() }

// After implements Scheduler.
func (w *Wall) After(d time.Duration, f func()) {
	time.AfterFunc(d, func() { w.Do(f) })
}

// Do runs f while nothing else of the model runs.
func (w *Wall) Do(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	for _, look := range w.look {
		look()
	}
}

// Observe has f called after everything that ran, before anything else runs. f must be quick, and must not call w.
func (w *Wall) Observe(f func()) { w.Do(func() { w.look = append(w.look, f) }) }

// Call is one command that a face program was given, for tests.
type Call struct {
	Node, Command string
	At            time.Time
	Took          time.Duration
	Exit          int
}

// Server answers face programs for one cluster.
type Server struct {
	Cluster *Cluster
	Wall    *Wall

	mu      sync.Mutex
	calls   []Call
	printed []Printed
}

// Printed is one group of lines that events2 printed on a host, for tests.
type Printed struct {
	Node  string
	At    time.Time // right before it was written
	Lines []string
}

// Printed returns what events2 printed so far.
func (s *Server) Printed() []Printed {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.printed)
}

// Calls returns the commands answered so far.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Serve answers until the listener is closed, and then waits for the answers in flight.
func (s *Server) Serve(l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		wg.Go(func() {
			defer c.Close()
			s.one(c)
		})
	}
}

// one answers one program. Its output goes back as it is; the last line is NUL and the exit code.
func (s *Server) one(c net.Conn) {
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	q, ok := drbdface.ParseCall(line)
	if !ok {
		return
	}
	began := time.Now()
	n := s.Cluster.Node(q.Node)
	if n == nil || len(q.Args) == 0 {
		fmt.Fprintf(c, "\x00%d\n", 1)
		return
	}
	if q.Args[0] == "events2" {
		s.events(n, c, in)
		return
	}
	out, exit := s.command(n, q)
	s.mu.Lock()
	s.calls = append(s.calls, Call{Node: q.Node, Command: strings.Join(q.Args, " "), At: began, Took: time.Since(began), Exit: exit})
	s.mu.Unlock()
	fmt.Fprintf(c, "%s\x00%d\n", out, exit)
}

// events streams until the program ends. The model never waits for a slow reader.
func (s *Server) events(n *Node, c net.Conn, in *bufio.Reader) {
	lines := make(chan []string, 4096)
	var stop func()
	s.Wall.Do(func() {
		stop = n.Listen(func(group []string) {
			select {
			case lines <- group:
			default: // as the kernel's receive buffer overflows
			}
		})
	})
	defer func() { s.Wall.Do(stop) }()
	gone := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, in) // ends when the program does
		close(gone)
	}()
	for {
		select {
		case <-gone:
			return
		case group := <-lines:
			s.mu.Lock()
			s.printed = append(s.printed, Printed{n.Name, time.Now(), group})
			s.mu.Unlock()
			if _, err := io.WriteString(c, strings.Join(group, "\n")+"\n"); err != nil {
				return
			}
		}
	}
}

func (s *Server) command(n *Node, q drbdface.Call) (out string, exit int) {
	answer := func(e *Error) (string, int) {
		if e == nil {
			return "", 0
		}
		what := "State change failed"
		if e.Exit == 10 {
			what = "Failure"
		}
		return fmt.Sprintf("%s: %s: (%d) %s\n", s.Cluster.Resource, what, e.Code, e.Text), e.Exit
	}
	switch q.Args[0] {
	case "primary":
		done := make(chan *Error, 1)
		s.Wall.Do(func() { n.Primary(func(e *Error) { done <- e }) })
		return answer(<-done)
	case "secondary":
		s.Wall.Do(func() {
			out, exit = answer(n.Secondary(slices.ContainsFunc(q.Args, func(a string) bool { return a == "--force" || a == "--force=yes" })))
		})
	case "connect":
		id := -1
		if len(q.Args) > 2 {
			id, _ = strconv.Atoi(q.Args[2])
		}
		s.Wall.Do(func() { out, exit = answer(n.Connect(id)) })
	case "adjust":
		s.Wall.Do(func() { out, exit = answer(n.Adjust()) })
	case "status":
		s.Wall.Do(func() { out = n.StatusJSON() })
		if out == "[]\n" {
			return answer(errUnknownRes)
		}
	case "show":
		s.Wall.Do(func() { out = n.ShowJSON() })
	case "--version": // drbdadm's: what others check before they go on
		out = "DRBDADM_VERSION_CODE=0x092200\nDRBD_KERNEL_VERSION_CODE=0x090212\n"
	case "sh-ll-dev":
		out = "none\n" // nothing to wait for
	case "sim-may-open": // what the kernel says to a mount
		s.Wall.Do(func() {
			if !n.Writable() {
				exit = 1
			}
		})
	default:
		return "unknown command\n", 20
	}
	return out, exit
}
