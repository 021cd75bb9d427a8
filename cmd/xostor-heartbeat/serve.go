package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// settings are what all ways to start have in common.
type settings struct {
	host, resource, disk, secret, conf, res, runDir string
	peers                                           string
	listen                                          string
	port                                            int
	size                                            int64
	socket                                          string
	kernel                                          string // Name of the nbd device, "" for none, "auto" for a free one.
	insecure, verbose                               bool
	owner, front                                    bool
}

func (s *settings) flags(name string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	hostname, _ := os.Hostname()
	f.StringVar(&s.host, "host", hostname, "this host's DRBD node name")
	f.StringVar(&s.secret, "secret", heartbeat.SecretPath, "file with the pool secret")
	f.StringVar(&s.conf, "xhad-conf", statefile.ConfPath, "xhad's configuration, for its time-outs")
	f.StringVar(&s.res, "res", "", "DRBD resource file (default /var/lib/linstor.d/RESOURCE.res)")
	f.StringVar(&s.runDir, "run-dir", "/run/xostor-heartbeat", "folder for control sockets and locks")
	f.StringVar(&s.peers, "peers", "", "hosts as NAME=ADDRESS[:PORT],... instead of the resource file")
	f.StringVar(&s.listen, "listen", "", "addresses to serve other hosts on, comma separated (default: this host's in the resource file)")
	f.BoolVar(&s.insecure, "insecure", false, "serve in clear; for labs only")
	f.BoolVar(&s.verbose, "v", false, "log more")
	return f
}

func parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	return nil
}

func runBoth(ctx context.Context, args []string) error {
	s := settings{owner: true, front: true}
	f := s.flags("run")
	f.StringVar(&s.resource, "resource", "xcp-persistent-ha-statefile", "DRBD resource")
	f.StringVar(&s.disk, "disk", "", "device (default /dev/drbd/by-res/RESOURCE/0)")
	f.IntVar(&s.port, "port", 8076, "TCP port between hosts")
	f.Int64Var(&s.size, "device-size", 4<<20, "size of the local device in bytes")
	f.StringVar(&s.socket, "socket-path", "", "unix socket for local NBD clients")
	f.StringVar(&s.kernel, "kernel", "auto", `kernel device: "auto", /dev/nbdN, or "" for none`)
	if err := parse(f, args); err != nil {
		return err
	}
	return s.run(ctx)
}

// runDiskServer is the owner's side under the name that SM starts.
func runDiskServer(ctx context.Context, args []string) error {
	s := settings{owner: true}
	f := s.flags("http-disk-server")
	var ip string
	f.StringVar(&s.disk, "disk", "", "device")
	f.StringVar(&ip, "ip", "", "management address")
	f.IntVar(&s.port, "port", 8076, "TCP port")
	if err := parse(f, args); err != nil {
		return err
	}
	if s.listen == "" {
		s.listen = ip
	}
	return s.run(ctx)
}

// runNBDServer is the front under the name that SM starts.
func runNBDServer(ctx context.Context, args []string) error {
	s := settings{front: true, kernel: "auto"}
	f := s.flags("nbd-http-server")
	var urls string
	f.StringVar(&s.socket, "socket-path", "", "unix socket for local NBD clients")
	f.StringVar(&s.resource, "nbd-name", "", "name of the export: the DRBD resource")
	f.StringVar(&urls, "urls", "", "where the owners may be, comma separated")
	f.Int64Var(&s.size, "device-size", 4<<20, "bytes")
	f.StringVar(&s.kernel, "kernel", "auto", `kernel device: "auto", /dev/nbdN, or "" for none`)
	if err := parse(f, args); err != nil {
		return err
	}
	if s.peers == "" {
		list, port, err := fromURLs(urls)
		if err != nil {
			return err
		}
		s.peers, s.port = list, port
	}
	return s.run(ctx)
}

// fromURLs turns SM's list into peers. Their names are their addresses: SM gives no others.
func fromURLs(urls string) (peers string, port int, err error) {
	var list []string
	for _, raw := range strings.Split(urls, ",") {
		u, err := url.Parse(strings.TrimSpace(raw))
		if err != nil || u.Host == "" {
			return "", 0, fmt.Errorf("%w: --urls: %q is no URL", errUsage, raw)
		}
		list = append(list, u.Host+"="+u.Host)
		if n, err := strconv.Atoi(u.Port()); err == nil {
			port = n
		}
	}
	return strings.Join(list, ","), port, nil
}

// complete fills in what follows from the rest.
func (s *settings) complete() (heartbeat.Res, error) {
	if s.resource == "" {
		s.resource = filepath.Base(filepath.Dir(s.disk)) // /dev/drbd/by-res/RESOURCE/0.
	}
	if s.resource == "" || s.resource == "." || s.resource == "/" {
		return heartbeat.Res{}, fmt.Errorf("%w: no resource and no --disk", errUsage)
	}
	if s.disk == "" {
		s.disk = "/dev/drbd/by-res/" + s.resource + "/0"
	}
	if s.res == "" {
		s.res = "/var/lib/linstor.d/" + s.resource + ".res"
	}
	f, err := os.Open(s.res)
	if err != nil {
		if s.peers != "" {
			return heartbeat.Res{}, nil // SM or the administrator named the hosts.
		}
		return heartbeat.Res{}, fmt.Errorf("open resource file: %w (or name the hosts with --peers)", err)
	}
	defer f.Close()
	return heartbeat.ReadRes(f)
}

// addresses joins what the resource file and --peers say: storage network first.
func (s *settings) addresses(res heartbeat.Res) ([]heartbeat.PeerAddress, error) {
	var out []heartbeat.PeerAddress
	if s.peers == "" {
		for _, name := range res.Names() {
			out = append(out, heartbeat.PeerAddress{Host: name, Addrs: []string{net.JoinHostPort(res.Hosts[name], strconv.Itoa(s.port))}})
		}
		return out, nil
	}
	for _, p := range strings.Split(s.peers, ",") {
		name, addr, ok := strings.Cut(p, "=")
		if !ok {
			return nil, fmt.Errorf("%w: --peers: %q is not NAME=ADDRESS", errUsage, p)
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			addr = net.JoinHostPort(strings.Trim(addr, "[]"), strconv.Itoa(s.port))
		}
		out = append(out, heartbeat.PeerAddress{Host: name, Addrs: []string{addr}})
	}
	return out, nil
}

// times reads xhad's time-outs. A missing or broken file costs the fitting times, not the service.
func (s *settings) times(log *slog.Logger) (heartbeat.Timing, []agents.Finding) {
	x := statefile.Derive(60 * time.Second)
	f, err := os.Open(s.conf)
	if err == nil {
		defer f.Close()
		var c statefile.Conf
		if c, err = statefile.ReadConf(f); err == nil {
			x = c.Timeouts
		}
	}
	if err != nil {
		log.Warn("xhad's configuration is unreadable, times of T=60 are used", "err", err)
	}
	t, findings := heartbeat.DeriveTiming(x)
	for _, f := range findings {
		log.Warn("finding", "code", f.Code, "text", f.Text, "fix", f.Fix)
	}
	return t, findings
}

// name tells the processes of one export apart in the run folder.
func (s *settings) name() string {
	switch {
	case s.owner && s.front:
		return s.resource
	case s.owner:
		return s.resource + ".owner"
	default:
		return s.resource + ".front"
	}
}

func (s *settings) run(ctx context.Context) error {
	log := newLog(s.verbose)
	res, err := s.complete()
	if err != nil {
		return err
	}
	peers, err := s.addresses(res)
	if err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	timing, findings := s.times(log)
	c := heartbeat.Config{Host: s.host, Boot: bootID(), Export: s.resource, Statefile: !strings.Contains(s.resource, "redo"), Peers: peers,
		Timing: timing, Barred: res.Barred(), Size: s.size, Monitor: s.owner && !s.front, Log: log}
	if !s.insecure {
		if c.Identity, err = heartbeat.LoadIdentity(s.host, s.secret); err != nil {
			return err
		}
		go s.follow(ctx, c.Identity, log)
	}
	if s.owner {
		least := int64(statefile.Size)
		c.Open = func() (heartbeat.Device, error) {
			if err := otherHolder(s.disk); err != nil {
				return nil, err
			}
			return heartbeat.OpenDevice(s.disk, least)
		}
		if strings.HasPrefix(s.disk, "/dev/drbd") {
			c.Resource = heartbeat.DRBDResource{Name: s.resource}
		}
	}
	lockMemory(log)
	return s.serve(ctx, c, findings, log)
}

// follow takes a rotated pool secret into use.
func (s *settings) follow(ctx context.Context, id *heartbeat.Identity, log *slog.Logger) {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := id.Reload(s.secret); err != nil {
				log.Warn("pool secret not reloaded", "err", err)
			}
		}
	}
}

// serve opens all sockets, says that it is ready, and runs until ctx ends.
func (s *settings) serve(ctx context.Context, c heartbeat.Config, findings []agents.Finding, log *slog.Logger) error {
	k, err := s.kernelDevice(c)
	if err != nil {
		return err
	}
	c.Takeover = k != nil && k.takeover
	d, err := heartbeat.New(c)
	if err != nil {
		return err
	}
	var servers group
	if s.owner {
		for _, addr := range s.listenAddrs(c) {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return fmt.Errorf("listen for other hosts: %w", err)
			}
			servers.add(func(ctx context.Context) error { return d.Remote().Serve(ctx, l) })
		}
	}
	if s.socket != "" {
		_ = os.Remove(s.socket) // Of a process before; the lock says that none runs.
		l, err := net.Listen("unix", s.socket)
		if err != nil {
			return fmt.Errorf("listen for local clients: %w", err)
		}
		servers.add(func(ctx context.Context) error { return d.Local().Serve(ctx, l) })
	}
	control, err := s.control()
	if err != nil {
		return err
	}
	servers.add(func(ctx context.Context) error { return serveControl(ctx, control, d, findings) })
	if k != nil {
		if err := k.attach(&servers, d, c); err != nil {
			return err
		}
		fmt.Printf("NBD `%s` is now attached.\n", k.path)
	}
	if s.owner {
		fmt.Println("Server ready!")
	}
	log.Info("started", "host", s.host, "resource", s.resource)
	servers.add(func(ctx context.Context) error { return feedWatchdog(ctx, d) })
	// The hand-over comes before the listeners close: successors ask this host whether it has left.
	return servers.run(ctx, d.Run)
}

func (s *settings) listenAddrs(c heartbeat.Config) []string {
	var out []string
	if s.listen != "" {
		for _, a := range strings.Split(s.listen, ",") {
			if _, _, err := net.SplitHostPort(a); err != nil {
				a = net.JoinHostPort(strings.Trim(a, "[]"), strconv.Itoa(s.port))
			}
			out = append(out, a)
		}
	}
	for _, p := range c.Peers {
		if p.Host == s.host && len(out) == 0 {
			out = append(out, p.Addrs...)
		}
	}
	return out
}

// lock refuses a second daemon for the same export on this host.
func (s *settings) lock() (func(), error) {
	if err := os.MkdirAll(s.runDir, 0o700); err != nil {
		return nil, fmt.Errorf("make run folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(s.runDir, s.name()+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another xostor-heartbeat serves %s on this host", s.name())
	}
	return func() { f.Close() }, nil
}

func (s *settings) control() (net.Listener, error) {
	path := filepath.Join(s.runDir, s.name()+".sock")
	_ = os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for control: %w", err)
	}
	return l, os.Chmod(path, 0o600)
}

// serveControl answers one line per connection: "status" or "handover [HOST]".
func serveControl(ctx context.Context, l net.Listener, d *heartbeat.Daemon, findings []agents.Finding) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept control: %w", err)
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
			line, _ := bufio.NewReader(conn).ReadString('\n')
			verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
			if verb == "handover" {
				d.HandOver(arg)
			}
			r := d.Report()
			r.Findings = append(r.Findings, findings...)
			_ = json.NewEncoder(conn).Encode(r) // The client sees a broken answer by itself.
		}()
	}
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}
