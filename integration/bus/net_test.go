// Package bus_test runs the buses of a pool in network namespaces. See DESIGN.md.
package bus_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

const (
	poolSecret = "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"
	routePort  = "6222"
	patience   = 2 * time.Minute // Of one wait; a healthy run needs a fraction.
)

var xostor string // The binary under test.

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "xostor-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	xostor = filepath.Join(dir, "xostor")
	if err := lab.Build(xostor, "../../cmd/xostor"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// lack skips the test with a reason, or fails it where everything must be there.
func lack(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

func need(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		lack(t, "needs root for network namespaces")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			lack(t, p+" is missing: install it (Debian: iproute2, nftables, openssl, nats-server)")
		}
	}
}

// sh runs a program that must succeed.
func sh(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// node is one host: a namespace, an address, a bus.
type node struct {
	lab.Host
	ns, dir, config string
	daemon          *lab.Daemon
}

func (n *node) door() string { return filepath.Join(n.dir, "bus.sock") }

// site is a pool of hosts on one bridge.
type site struct {
	t      testing.TB
	dir    string
	pool   *lab.Pool
	secret string
	bridge string // Namespace of the switch.
	nodes  []*node
}

var sites struct {
	sync.Mutex
	n int
}

// newSite makes the network and the pool's XAPI. Nothing runs yet.
func newSite(t testing.TB, hosts int) *site {
	t.Helper()
	need(t, "ip")
	sites.Lock()
	sites.n++
	number := sites.n
	sites.Unlock()
	dir, err := os.MkdirTemp("", "xb-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	pool, err := lab.New(lab.Options{Hosts: hosts, Seed: 1, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pool.Close() })
	s := &site{t: t, dir: dir, pool: pool, secret: filepath.Join(dir, "ptoken"), bridge: fmt.Sprintf("xb%d-%d-sw", os.Getpid(), number)}
	s.network(number)
	if _, err := pool.Serve(); err != nil {
		t.Fatal(err)
	}
	s.write(s.secret, poolSecret)
	for _, n := range s.nodes {
		if err := pool.DB().Set("host", n.Ref, "address", n.Addr); err != nil {
			t.Fatal(err)
		}
		n.dir = filepath.Dir(pool.FacesOf(n.Name).Socket)
		s.configure(n, "")
	}
	return s
}

func (s *site) write(path, text string) {
	s.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// network makes one namespace a host, all on a bridge in one of its own.
func (s *site) network(number int) {
	s.t.Helper()
	sh(s.t, "ip", "netns", "add", s.bridge)
	s.t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", s.bridge).Run() })
	sh(s.t, "ip", "-n", s.bridge, "link", "add", "br0", "type", "bridge")
	sh(s.t, "ip", "-n", s.bridge, "link", "set", "br0", "up")
	for i, h := range s.pool.Hosts() {
		n := &node{Host: h, ns: fmt.Sprintf("xb%d-%d-%d", os.Getpid(), number, i)}
		n.Addr = fmt.Sprintf("10.77.%d.%d", number%250, i+1)
		sh(s.t, "ip", "netns", "add", n.ns)
		s.t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", n.ns).Run() })
		port := fmt.Sprintf("p%d", i)
		sh(s.t, "ip", "-n", s.bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", n.ns)
		sh(s.t, "ip", "-n", s.bridge, "link", "set", port, "master", "br0", "up")
		sh(s.t, "ip", "-n", n.ns, "addr", "add", n.Addr+"/24", "dev", "eth0")
		sh(s.t, "ip", "-n", n.ns, "link", "set", "eth0", "up")
		sh(s.t, "ip", "-n", n.ns, "link", "set", "lo", "up")
		s.nodes = append(s.nodes, n)
	}
}

// configure writes the host's agents.toml; more goes into its section [bus].
func (s *site) configure(n *node, more string) {
	s.t.Helper()
	f := s.pool.FacesOf(n.Name)
	n.config = filepath.Join(n.dir, "agents.toml")
	s.write(n.config, fmt.Sprintf("[host]\npool_conf = %q\ninventory = %q\nname = %q\n[xapi]\nsocket = %q\n[linstor]\ncontrollers = [\"127.0.0.1:1\"]\n[agents]\nstate_dir = %q\n[bus]\nsocket = %q\nstore = %q\nptoken = %q\n%s\n",
		f.PoolConf, f.Inventory, n.Name, f.Socket, filepath.Join(n.dir, "state"), n.door(), filepath.Join(n.dir, "bus"), s.secret, more))
}

// start runs the host's bus, and again a second after it dies, as systemd does.
func (s *site) start(n *node) {
	s.t.Helper()
	d, err := lab.StartDaemon(lab.DaemonOptions{Bin: "ip", Args: []string{"netns", "exec", n.ns, xostor, "bus", "--config", n.config}, Restart: time.Second,
		Notify: filepath.Join(n.dir, "notify.sock")})
	if err != nil {
		s.t.Fatal(err)
	}
	n.daemon = d
	s.t.Cleanup(func() {
		if err := d.Stop(); err != nil {
			s.t.Logf("stop bus of %s: %v", n.Name, err)
		}
		if s.t.Failed() {
			s.t.Logf("bus of %s printed:\n%s", n.Name, d.Output())
		}
	})
}

func (s *site) startAll() {
	s.t.Helper()
	for _, n := range s.nodes {
		s.start(n)
	}
	s.meshed(s.nodes...)
}

// answer is one line of `xostor status --json`.
type answer struct {
	Agent    string `json:"agent"`
	HostName string `json:"hostname"`
	Missing  bool   `json:"missing"`
	Status   struct {
		Findings []struct {
			Code string `json:"code"`
		} `json:"findings"`
		Bus struct {
			Connected []string `json:"connected"`
			History   string   `json:"history"`
		} `json:"bus"`
	} `json:"status"`
}

// tool runs the xostor command as on the host.
func (s *site) tool(n *node, args ...string) (out, errOut string, err error) {
	var o, e bytes.Buffer
	cmd := exec.Command("ip", append([]string{"netns", "exec", n.ns, xostor}, append(args, "--config", n.config)...)...)
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return o.String(), e.String(), err
}

func (s *site) status(n *node) []answer {
	s.t.Helper()
	out, _, _ := s.tool(n, "status", "--json") // Its code tells of missing hosts, which some tests want.
	var all []answer
	if json.Unmarshal([]byte(out), &all) != nil {
		return nil
	}
	return all
}

// meshed waits until each of the hosts is connected to all others, as status on the first one says.
func (s *site) meshed(nodes ...*node) {
	s.t.Helper()
	s.eventually("all hosts are connected", func() bool {
		full := 0
		for _, a := range s.status(nodes[0]) {
			if a.Agent == "bus" && len(a.Status.Bus.Connected) >= len(nodes)-1 {
				full++
			}
		}
		return full >= len(nodes)
	})
}

func (s *site) eventually(what string, ok func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// watcher is an agent on a host: a mirror of the hosts' names, which is what the tests change.
type watcher struct {
	*bus.Mirror[string]
	n *node
}

func (s *site) watch(n *node) *watcher {
	s.t.Helper()
	c, err := bus.DialLazy(n.door(), "test")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	m, err := bus.NewMirror(c, bus.XAPITable("host"), bus.MirrorOptions[string]{Project: func(_ string, raw json.RawMessage) (string, bool, error) {
		var h struct {
			Description string `json:"name_description"`
		}
		err := json.Unmarshal(raw, &h)
		return h.Description, true, err
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(m.Close)
	return &watcher{m, n}
}

// set changes what XAPI has; the watchers must see it.
func (s *site) set(text string) {
	s.t.Helper()
	if err := s.pool.DB().Set("host", s.nodes[0].Ref, "name_description", text); err != nil {
		s.t.Fatal(err)
	}
}

// sees waits until the watcher is fresh and has the text.
func (s *site) sees(w *watcher, text string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	for {
		got, _ := w.Get(s.nodes[0].UUID)
		if got == text && w.Freshness().Fresh {
			return
		}
		select {
		case <-w.Changed():
		case <-ctx.Done():
			s.t.Fatalf("%s sees %q (%+v), want %q", w.n.Name, got, w.Freshness(), text)
		}
	}
}

// stale waits until the watcher says that it cannot be believed.
func (s *site) stale(w *watcher) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	for w.Freshness().Fresh {
		select {
		case <-w.Changed():
		case <-ctx.Done():
			s.t.Fatalf("%s still believes its mirror: %+v", w.n.Name, w.Freshness())
		}
	}
}

// neverRestarted asserts that no bus but those given was started twice.
func (s *site) neverRestarted(except ...*node) {
	s.t.Helper()
	for _, n := range s.nodes {
		skip := false
		for _, e := range except {
			skip = skip || e == n
		}
		if starts, _ := n.daemon.Starts(); !skip && starts != 1 {
			s.t.Errorf("the bus of %s was started %d times:\n%s", n.Name, starts, n.daemon.Output())
		}
	}
}

func (s *site) link(n *node, state string) {
	s.t.Helper()
	sh(s.t, "ip", "-n", n.ns, "link", "set", "eth0", state)
}

// description reads the truth.
func (s *site) description() string {
	return xapidb.Value[string](s.pool.DB(), "host", s.nodes[0].Ref, "name_description")
}

var errExit *exec.ExitError

// exitCode is the code of a command's end; -1 when it could not be run.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if errors.As(err, &errExit) {
		return errExit.ExitCode()
	}
	return -1
}
