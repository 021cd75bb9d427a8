package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
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
	urls                                            []string // Management addresses as host:port, of hosts that SM does not name.
	ip                                              string   // This host's management address.
	hasRes                                          bool
}

func (s *settings) flags(name string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	hostname, _ := os.Hostname()
	f.StringVar(&s.host, "host", hostname, "this host's DRBD node name")
	f.StringVar(&s.secret, "secret", heartbeat.SecretPath, "file with the pool secret")
	f.StringVar(&s.conf, "xhad-conf", statefile.ConfPath, "xhad's configuration, for its time-outs")
	f.StringVar(&s.res, "res", "", "DRBD resource file (default /var/lib/linstor.d/RESOURCE.res)")
	f.StringVar(&s.runDir, "run-dir", heartbeat.RunDir, "folder for control sockets and locks")
	f.StringVar(&s.peers, "peers", "", "hosts as NAME=ADDRESS[:PORT],... instead of the resource file; a name may come again with an address to fall back to")
	f.StringVar(&s.listen, "listen", "", "addresses to serve other hosts on, comma separated (default: this host's in the resource file, and in xhad.conf)")
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
	f.StringVar(&s.disk, "disk", "", "device")
	f.StringVar(&s.ip, "ip", "", "management address")
	f.IntVar(&s.port, "port", 8076, "TCP port")
	if err := parse(f, args); err != nil {
		return err
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
	var err error
	if s.urls, s.port, err = fromURLs(urls); err != nil {
		return err
	}
	return s.run(ctx)
}

// fromURLs takes the addresses out of SM's list.
func fromURLs(urls string) (addrs []string, port int, err error) {
	for _, raw := range strings.Split(urls, ",") {
		u, err := url.Parse(strings.TrimSpace(raw))
		if err != nil || u.Host == "" {
			return nil, 0, fmt.Errorf("%w: --urls: %q is no URL", errUsage, raw)
		}
		if u.Port() == "" {
			u.Host = net.JoinHostPort(u.Hostname(), "8076")
		}
		addrs = append(addrs, u.Host)
		if port, err = strconv.Atoi(u.Port()); err != nil {
			return nil, 0, fmt.Errorf("%w: --urls: %q has no port", errUsage, raw)
		}
	}
	return addrs, port, nil
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
		if s.peers != "" || len(s.urls) > 0 {
			return heartbeat.Res{}, nil // SM or the administrator named the hosts.
		}
		return heartbeat.Res{}, fmt.Errorf("open resource file: %w (or name the hosts with --peers)", err)
	}
	defer f.Close()
	s.hasRes = true
	return heartbeat.ReadRes(f)
}

// addresses are where the hosts are: those of the resource file are the storage network's. SM's have no names but
// themselves; they are taken only without a resource file, and serve as the fallback otherwise.
func (s *settings) addresses(res heartbeat.Res) ([]heartbeat.PeerAddress, error) {
	var out []heartbeat.PeerAddress
	if s.peers == "" {
		for _, name := range res.Names() {
			out = append(out, heartbeat.PeerAddress{Host: name, Addrs: []string{net.JoinHostPort(res.Hosts[name], strconv.Itoa(s.port))}})
		}
		if len(out) == 0 {
			for _, addr := range s.urls {
				out = append(out, heartbeat.PeerAddress{Host: addr, Addrs: []string{addr}})
			}
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
		if i := slices.IndexFunc(out, func(p heartbeat.PeerAddress) bool { return p.Host == name }); i >= 0 {
			out[i].Addrs = append(out[i].Addrs, addr)
			continue
		}
		out = append(out, heartbeat.PeerAddress{Host: name, Addrs: []string{addr}})
	}
	return out, nil
}

// readConf reads xhad's configuration.
func (s *settings) readConf() (statefile.Conf, error) {
	f, err := os.Open(s.conf)
	if err != nil {
		return statefile.Conf{}, fmt.Errorf("open xhad.conf: %w", err)
	}
	defer f.Close()
	return statefile.ReadConf(f)
}

// fallback are management addresses: SM's, and those in xhad.conf, which may come or change later.
func (s *settings) fallback() []string {
	out := slices.Clone(s.urls)
	c, err := s.readConf()
	if err != nil {
		return out // times says so.
	}
	for _, h := range c.Hosts {
		if addr := net.JoinHostPort(h.Address, strconv.Itoa(s.port)); h.Address != "" && !slices.Contains(out, addr) {
			out = append(out, addr)
		}
	}
	return out
}

// times reads xhad's time-outs. A missing or broken file costs the fitting times, not the service.
func (s *settings) times() (heartbeat.Timing, heartbeat.Xhad) {
	x := heartbeat.Xhad{Timeouts: statefile.Derive(60 * time.Second), Source: s.conf}
	c, err := s.readConf()
	switch {
	case err == nil:
		x.Timeouts = c.Timeouts
	case errors.Is(err, os.ErrNotExist):
		x.Source = "XAPI's default for T=60; there is no " + s.conf + ": HA is not enabled"
	default:
		x.Source = "XAPI's default for T=60; " + s.conf + " is unreadable"
		x.Findings = []agents.Finding{{Code: "heartbeat-conf-broken", Subject: s.conf, Severity: agents.Warning,
			Text: err.Error() + "; the times of T=60 are used", Fix: "disable HA and enable it again: XAPI writes the file anew"}}
	}
	t, findings := heartbeat.DeriveTiming(x.Timeouts)
	x.Findings = append(x.Findings, findings...)
	return t, x
}

// followConf takes changes of xhad's configuration into use: XAPI may write it after it has attached the statefile.
func (s *settings) followConf(ctx context.Context, d *heartbeat.Daemon, x heartbeat.Xhad, log *slog.Logger) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		t, now := s.times()
		if now.Timeouts == x.Timeouts && now.Source == x.Source && len(now.Findings) == len(x.Findings) {
			continue
		}
		log.Info("take xhad's configuration", "source", now.Source, "statefile_timeout", now.StateFileTimeout, "hold", t.Hold)
		logFindings(log, now.Findings)
		d.SetTiming(t, now)
		x = now
	}
}

func logFindings(log *slog.Logger, findings []agents.Finding) {
	for _, f := range findings {
		log.Warn("finding", "code", f.Code, "text", f.Text, "fix", f.Fix)
	}
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
	timing, xhad := s.times()
	logFindings(log, xhad.Findings)
	c := heartbeat.Config{Host: s.host, Boot: bootID(), Export: s.resource, Statefile: !strings.Contains(s.resource, "redo"), Peers: peers,
		Timing: timing, Xhad: xhad, Fallback: s.fallback, Size: s.size, Monitor: s.owner && !s.front, Log: log}
	if !s.insecure {
		if c.Identity, err = heartbeat.LoadIdentity(s.host, s.secret); err != nil {
			return err
		}
		go s.follow(ctx, c.Identity, log)
	}
	if strings.HasPrefix(s.disk, "/dev/drbd") && s.owner || s.hasRes {
		c.Resource = heartbeat.DRBDResource{Name: s.resource}
	}
	if s.owner {
		least := int64(statefile.Size)
		holders := watch(ctx, func() error { return otherHolder(s.disk) }, log)
		c.Open = func() (heartbeat.Device, error) {
			if err := holders.fresh(freshLook); err != nil {
				return nil, err
			}
			return heartbeat.OpenDevice(s.disk, least)
		}
	}
	if s.owner {
		c.CutMemo = filepath.Join(s.runDir, s.name()+".cut")
	}
	lockMemory(log)
	return s.serve(ctx, c, log)
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
func (s *settings) serve(ctx context.Context, c heartbeat.Config, log *slog.Logger) error {
	k, err := s.kernelDevice(log)
	if err != nil {
		return err
	}
	if k != nil {
		c.HangUp, c.Before = k.hangUp, k.before
	}
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
	servers.add(func(ctx context.Context) error { return serveControl(ctx, control, d) })
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
	servers.add(func(ctx context.Context) error { s.followConf(ctx, d, c.Xhad, log); return nil })
	// The hand-over comes before the listeners close: successors ask this host whether it has left.
	return servers.run(ctx, func(ctx context.Context) error { return errors.Join(d.Run(ctx), k.detach()) })
}

// listenAddrs are this host's addresses on the storage network and on the management network. What is not known yet is
// left out: a host is reached over the other one meanwhile.
func (s *settings) listenAddrs(c heartbeat.Config) []string {
	var out []string
	add := func(addrs ...string) {
		for _, a := range addrs {
			if _, _, err := net.SplitHostPort(a); err != nil {
				a = net.JoinHostPort(strings.Trim(a, "[]"), strconv.Itoa(s.port))
			}
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	if s.listen != "" {
		add(strings.Split(s.listen, ",")...)
		return out
	}
	for _, p := range c.Peers {
		if p.Host == s.host {
			add(p.Addrs...)
		}
	}
	if s.ip != "" {
		add(s.ip)
	} else if conf, err := s.readConf(); err == nil && s.peers == "" {
		if i := conf.Index(conf.Self); i >= 0 && conf.Hosts[i].Address != "" {
			add(conf.Hosts[i].Address)
		}
	}
	return out
}

// lock refuses a second daemon for the same part of the same export on this host. "run" has both parts.
func (s *settings) lock() (unlock func(), err error) {
	if err := os.MkdirAll(s.runDir, 0o700); err != nil {
		return nil, fmt.Errorf("make run folder: %w", err)
	}
	var held []*os.File
	unlock = func() {
		for _, f := range held {
			f.Close()
		}
	}
	for part, wanted := range map[string]bool{"owner": s.owner, "front": s.front} {
		if !wanted {
			continue
		}
		f, err := os.OpenFile(filepath.Join(s.runDir, s.resource+"."+part+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			unlock()
			return nil, fmt.Errorf("open lock: %w", err)
		}
		held = append(held, f)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			unlock()
			return nil, fmt.Errorf("another xostor-heartbeat serves %s on this host as %s: \"xostor-heartbeat status\" shows it", s.resource, part)
		}
	}
	return unlock, nil
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

// serveControl answers one line per connection.
func serveControl(ctx context.Context, l net.Listener, d *heartbeat.Daemon) error {
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
			line, _ := bufio.NewReader(io.LimitReader(conn, 256)).ReadString('\n')
			_ = d.Control(line, conn) // The client sees a broken answer by itself.
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
