package failover

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
	"github.com/xostor-agents/xostor-agents/bus/subject"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// ServiceConfig is how failover is set up on a host. Zero fields get XOSTOR's defaults; Self and Key are compulsory.
type ServiceConfig struct {
	Self       string              // this host's node name in DRBD and LINSTOR
	Key        []byte              // BeatKey of the pool's secret
	Force      Mode                // "": from facts
	Names      Names               // DefaultNames
	Policy     Policy              // DefaultPolicy
	Paths      Paths               // DefaultPaths
	Controller string              // base URL of the local controller; http://127.0.0.1:3370
	Jars       string              // glob of the installed controller's files; /usr/share/linstor-server/lib/*.jar
	Socket     string              // control socket; DefaultSocket
	Listen     string              // address for beats; all
	Port       int                 // DefaultPort
	Addresses  map[string][]string // further addresses of other hosts by name; SetAddresses is for those without a name
	ProbeEvery time.Duration       // 10 s
	BackupLook time.Duration       // between two looks whether a backup is due; a minute
	NoBackups  bool                // takes and fetches none
	Drbdsetup  string              // program
	Drbdadm    string              // program
	Major      int                 // of DRBD's block devices; MajorDRBD
	JobSent    func(unit string)   // hears of each start right after it was sent to systemd, for measurements; nil: nobody
	Log        *slog.Logger
}

// Service is the failover agent with all it stands on. Make it with NewService, run it with Run.
type Service struct {
	cfg     ServiceConfig
	agent   *Agent
	drbd    *hostDRBD
	units   *cachedUnits
	keys    *keyring
	net     *network
	prober  *prober
	keeper  *keeper
	files   *hostFiles
	beats   *net.UDPConn
	backups net.Listener
	control net.Listener
	mu      sync.Mutex
	wake    func(subject.Subject) // of the running agent; nil before
}

// NewService opens the sockets and makes the agent: when it returns, the service can work. Close it by ending Run's context, or with Close when Run is not called.
func NewService(cfg ServiceConfig) (*Service, error) {
	if cfg.Self == "" || len(cfg.Key) == 0 {
		return nil, errors.New("set up failover: the host's name and the pool's key are needed")
	}
	s := &Service{cfg: cfg.withDefaults()}
	if err := s.open(); err != nil {
		s.Close()
		return nil, err
	}
	s.assemble()
	epoch, err := s.files.nextEpoch(time.Now())
	if err != nil {
		s.cfg.Log.Warn("a clock that is set back will make peers deaf to this agent", agents.KeyErr, err)
	}
	s.net.epoch = epoch
	return s, nil
}

func (cfg ServiceConfig) withDefaults() ServiceConfig {
	if cfg.Names == (Names{}) {
		cfg.Names = DefaultNames()
	}
	if cfg.Policy == (Policy{}) {
		cfg.Policy = DefaultPolicy()
	}
	if cfg.Paths == (Paths{}) {
		cfg.Paths = DefaultPaths()
	}
	cfg.Controller = cmp.Or(cfg.Controller, "http://127.0.0.1:3370")
	cfg.Jars = cmp.Or(cfg.Jars, "/usr/share/linstor-server/lib/*.jar")
	cfg.Socket = cmp.Or(cfg.Socket, DefaultSocket)
	cfg.Port = cmp.Or(cfg.Port, DefaultPort)
	cfg.ProbeEvery = cmp.Or(cfg.ProbeEvery, probeEvery)
	cfg.BackupLook = cmp.Or(cfg.BackupLook, keeperEvery)
	cfg.Major = cmp.Or(cfg.Major, MajorDRBD)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return cfg
}

const lookTime = 3 * time.Second // for DRBD's first dump and options

// Look looks once, for a host on which no agent runs, and returns what an agent would do. It opens no socket, so it hears nobody: of the other hosts it knows
// only what an agent kept on disk. It writes nothing. Self is compulsory, Key is not needed.
func Look(ctx context.Context, cfg ServiceConfig) (Snapshot, agents.Plan, error) {
	s := &Service{cfg: cfg.withDefaults()}
	s.assemble()
	seen, done := context.WithTimeout(ctx, lookTime)
	defer done()
	whole := func() {
		if s.drbd.View().Fresh && s.drbd.Options().Quorum != "" {
			done()
		}
	}
	s.setWake(func(subject.Subject) { whole() })
	follow, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer s.units.Close()
	wg.Go(func() { s.drbd.Run(follow) })
	wg.Go(func() { s.drbd.readOptions(follow, s.hint) })
	<-seen.Done()
	plan, err := agents.Look(ctx, s.agent)
	return s.agent.Last(), plan, err
}

func (s *Service) setWake(wake func(subject.Subject)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wake = wake
}

func (s *Service) open() (err error) {
	if s.beats, s.backups, err = listenBeats(s.cfg.Listen, s.cfg.Port); err != nil {
		return err
	}
	if err = os.MkdirAll(filepath.Dir(s.cfg.Socket), 0o755); err != nil {
		return fmt.Errorf("open control socket: %w", err)
	}
	if err = os.Remove(s.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) { // of an agent that was killed
		return fmt.Errorf("open control socket: %w", err)
	}
	if s.control, err = net.Listen("unix", s.cfg.Socket); err != nil {
		return fmt.Errorf("open control socket: %w", err)
	}
	if err = os.Chmod(s.cfg.Socket, 0o600); err != nil {
		return fmt.Errorf("open control socket: %w", err)
	}
	return nil
}

// Close closes the sockets of a service that was never run.
func (s *Service) Close() {
	if s.beats != nil {
		_ = s.beats.Close()
	}
	for _, l := range []net.Listener{s.backups, s.control} {
		if l != nil {
			_ = l.Close()
		}
	}
}

func (s *Service) assemble() {
	c := s.cfg
	children := &child.Runner{}
	s.drbd = &hostDRBD{resource: c.Names.Resource, tool: &drbd.Tool{Drbdsetup: c.Drbdsetup, Drbdadm: c.Drbdadm}}
	s.drbd.Watcher = drbd.NewWatcher(drbd.Events2{Program: c.Drbdsetup, Resource: c.Names.Resource}, s.hint, c.Log)
	s.units = &cachedUnits{Units: &systemd.Units{Sent: c.JobSent}}
	s.files = &hostFiles{paths: c.Paths, resource: c.Names.Resource, children: children}
	s.keys = newKeyring(c.Key)
	s.net = &network{keys: s.keys, port: c.Port, extra: c.Addresses, view: s.drbd.View, changed: s.hint, save: s.files.saveKnown, log: c.Log,
		table: NewTable(c.Self, c.Policy.SuspectAfter, s.files.loadKnown()), last: map[string]packet{}, nameAt: map[netip.Addr]string{}, socks: map[netip.AddrPort]*net.UDPConn{}}
	s.prober = newProber(c.Controller, c.Names.MountPoint, children, c.ProbeEvery, s.hint)
	s.keeper = &keeper{store: &Store{Dir: c.Paths.backups()}, prober: s.prober, names: c.Names, state: c.Paths.StateDir, jars: c.Jars,
		say: s.net.sayBackups, address: s.net.addressOf, keys: s.keys, children: children, every: c.BackupLook, changed: s.hint, log: c.Log}
	s.agent = New(Config{Self: c.Self, Names: c.Names, Policy: c.Policy, Force: c.Force, DRBD: s.drbd, Units: s.units, Mounts: hostMounts{c.Major, children},
		Prober: s.prober, Talk: s.net, Files: s.files, Prepared: s.keeper.prepared, BackupTrouble: s.keeper.Trouble, Log: c.Log})
	s.keeper.last = s.agent.Last
}

// hint makes the agent look.
func (s *Service) hint() {
	s.mu.Lock()
	wake := s.wake
	s.mu.Unlock()
	if wake != nil {
		wake("")
	}
}

// unitSettle gathers systemd's signals: one change of a unit brings several, and each look after one reads the units again.
const unitSettle = time.Millisecond

// gather returns a function that calls f once, d after the first of its own calls.
func gather(ctx context.Context, d time.Duration, f func()) func() {
	var waits atomic.Bool
	return func() {
		if waits.CompareAndSwap(false, true) {
			time.AfterFunc(d, func() {
				waits.Store(false)
				if ctx.Err() == nil {
					f()
				}
			})
		}
	}
}

// Agent is the agent, for `xostor plan`.
func (s *Service) Agent() *Agent { return s.agent }

// SetAddresses tells where agents of other hosts may be, besides DRBD's own paths: the pool's management addresses. It may be called at any time.
func (s *Service) SetAddresses(list []netip.Addr) {
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	s.net.anywhere = slices.Clone(list)
	for i, a := range s.net.anywhere {
		s.net.anywhere[i] = a.Unmap()
	}
}

// UseKey takes the key of a new pool secret into use, and tells whether it is another one. The one before stays good for ten minutes. It may be called at any time.
func (s *Service) UseKey(key []byte) bool { return s.keys.use(time.Now(), key) }

// Run runs the agent and all it stands on until ctx ends. o gives the gate, reports and the watchdog; its timings are set where they are zero.
func (s *Service) Run(ctx context.Context, o agents.Options) error {
	d := RunOptions()
	o.Settle, o.SettleMax, o.Resync = cmp.Or(o.Settle, d.Settle), cmp.Or(o.SettleMax, d.SettleMax), cmp.Or(o.Resync, d.Resync)
	o.PassTimeout, o.BackoffMin, o.BackoffMax = cmp.Or(o.PassTimeout, d.PassTimeout), cmp.Or(o.BackoffMin, d.BackoffMin), cmp.Or(o.BackoffMax, d.BackoffMax)
	o.Listen = func(ctx context.Context, _ []subject.Subject, wake func(subject.Subject)) error {
		s.setWake(wake)
		wake("")
		<-ctx.Done()
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.drbd.Run(ctx) })
	wg.Go(func() { s.drbd.readOptions(ctx, s.hint) })
	wg.Go(func() {
		n := s.cfg.Names
		look := gather(ctx, unitSettle, s.hint)
		s.units.Watch(ctx, []string{n.Controller, n.MountUnit, n.Target}, func() { s.units.dirty(); look() })
	})
	wg.Go(func() { s.net.run(ctx, s.beats) })
	wg.Go(func() { s.prober.run(ctx) })
	if !s.cfg.NoBackups {
		s.keeper.begin(ctx)
		wg.Go(func() { s.keeper.run(ctx) })
	}
	wg.Go(func() { s.keeper.serve(ctx, s.backups) })
	wg.Go(func() { s.serveControl(ctx) })
	s.agent.memory.Began = time.Now()
	err := agents.Run(ctx, s.agent, o)
	cancel()
	s.units.Close()
	wg.Wait()
	s.keeper.work.Wait()
	_ = os.Remove(s.cfg.Socket) // the next start removes it too
	return err
}

func (n *network) sayBackups(list []Backup) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.backups = list
}

// addressOf is where a host serves its backups, by the storage network first.
func (n *network) addressOf(host string) string {
	by, storage := n.destinations()
	found := ""
	for ap, name := range by {
		if name == host && (found == "" || storage[ap.Addr()]) {
			found = net.JoinHostPort(ap.Addr().String(), strconv.Itoa(n.port))
		}
	}
	return found
}
