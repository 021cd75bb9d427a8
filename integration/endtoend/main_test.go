// Package endtoend runs the real binary against the lab's faces: processes, sockets and wires, as on a host.
package endtoend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

const (
	gib      = int64(1) << 30
	mib      = int64(1) << 20
	patience = 25 * time.Second // of one wait; a healthy run needs a fraction
)

// The binaries under test.
var xostor, demo string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

// parallel is how many tests run at once: most of their time is waiting, so it is more than there are processors.
const parallel = "8"

func run(m *testing.M) int {
	flag.Parse()
	if err := flag.Set("test.parallel", parallel); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "xostor-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	xostor, demo = filepath.Join(dir, "xostor"), filepath.Join(dir, "xostor-demo")
	if err := lab.Build(dir, "../../cmd/xostor", "../../cmd/xostor-demo"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// site is a pool with its daemons.
type site struct {
	t       *testing.T
	pool    *lab.Pool
	dir     string
	daemons map[string]*lab.Daemon // "host/bus", "host/sr-size"
	more    string                 // for the section [agents.sr-size]
}

// newSite serves a pool; no daemon runs yet.
func newSite(t *testing.T, o lab.Options) *site {
	t.Helper()
	t.Parallel()
	// t.TempDir would put the test's name into the sockets' paths, which have room for 100 bytes.
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	o.Dir = dir
	pool, err := lab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Serve(); err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, pool: pool, dir: dir, daemons: map[string]*lab.Daemon{}}
	t.Cleanup(func() {
		for name, d := range s.daemons {
			if err := d.Stop(); err != nil {
				t.Errorf("stop %s: %v", name, err)
			}
			if t.Failed() {
				t.Logf("--- %s\n%s", name, d.Output())
			}
		}
		if err := pool.Close(); err != nil {
			t.Errorf("close pool: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove %s: %v", dir, err)
		}
	})
	return s
}

// config writes a host's configuration; a short grace time keeps the tests short.
func (s *site) config(host string) string {
	s.t.Helper()
	path, err := s.pool.WriteConfig(host, "\n[agents.sr-size]\ngrace = \"300ms\"\n"+s.more)
	s.ok(err)
	return path
}

// start runs bus and agent on a host, restarted when they die.
func (s *site) start(host string) {
	s.t.Helper()
	config := s.config(host)
	s.daemon(host+"/bus", "bus", "--config", config)
	s.daemon(host+"/sr-size", "agent", "sr-size", "--config", config)
}

func (s *site) daemon(name string, args ...string) *lab.Daemon {
	s.t.Helper()
	d, err := lab.StartDaemon(lab.DaemonOptions{Bin: xostor, Args: args, Restart: 100 * time.Millisecond,
		Notify: filepath.Join(s.dir, strings.ReplaceAll(name, "/", "-")+".notify")})
	s.ok(err)
	s.daemons[name] = d
	return d
}

func (s *site) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// shown waits until XAPI shows the truth.
func (s *site) shown(why string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	if err := s.pool.AwaitShown(ctx); err != nil {
		s.t.Fatalf("%s: %v", why, err)
	}
}

// eventually asks until the answer is yes: for what no change notification tells of, such as the output of a process.
func (s *site) eventually(why string, yes func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !yes() {
		select {
		case <-ctx.Done():
			s.t.Fatalf("waited in vain: %s", why)
		case <-tick.C:
		}
	}
}

// result is one run of the binary to its end.
type result struct {
	code        int
	out, errOut string
}

func (s *site) run(args ...string) result {
	s.t.Helper()
	return runProgram(s.t, patience, xostor, args...)
}

func runProgram(t *testing.T, limit time.Duration, bin string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run %s %s: %v", filepath.Base(bin), strings.Join(args, " "), err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// status asks a host's bus, and returns the status of its sr-size; false while none answers.
func (s *site) status(host string) (agents.Status, bool) {
	s.t.Helper()
	r := s.run("status", "--json", "--config", s.config(host))
	var answers []struct {
		HostName string        `json:"hostname"`
		Status   agents.Status `json:"status"`
	}
	if json.Unmarshal([]byte(r.out), &answers) != nil || len(answers) == 0 {
		return agents.Status{}, false
	}
	return answers[0].Status, true
}

// finding waits until a host's agent has a finding, and returns it.
func (s *site) finding(host, code string) agents.Finding {
	s.t.Helper()
	var found agents.Finding
	s.eventually("finding "+code, func() bool {
		st, _ := s.status(host)
		for _, f := range st.Findings {
			if f.Code == code {
				found = f
				return true
			}
		}
		return false
	})
	if found.Text == "" || found.Fix == "" || strings.Contains(found.Text, "\n") {
		s.t.Errorf("finding %s must be one line and name what to do: %+v", code, found)
	}
	return found
}

// onlyStart asserts that no daemon was ever restarted.
func (s *site) onlyStart() {
	s.t.Helper()
	for name, d := range s.daemons {
		if n, _ := d.Starts(); n != 1 || d.Pid() == 0 {
			s.t.Errorf("%s did not keep running: %d starts", name, n)
		}
	}
}

// nothingWritten asserts that no size was written since ForgetCalls.
func (s *site) nothingWritten() {
	s.t.Helper()
	for _, c := range s.setters() {
		s.t.Errorf("written to XAPI: %s %v", c.Method, c.Params[1:])
	}
}

// setters are the calls by which sizes are written.
func (s *site) setters() []xapiface.CallRecord {
	var list []xapiface.CallRecord
	for _, c := range s.pool.XAPI().Calls() {
		if strings.Contains(c.Method, ".set_") || strings.HasSuffix(c.Method, "SR.update") || strings.HasSuffix(c.Method, "SR.scan") {
			list = append(list, c)
		}
	}
	return list
}
