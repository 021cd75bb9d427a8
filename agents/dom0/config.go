package dom0

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/poolcert"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// DefaultConfigFile is read when no file is named; it may be missing.
const DefaultConfigFile = "/etc/xostor/agents.toml"

// Config is /etc/xostor/agents.toml. Every key is optional; unknown keys are refused.
type Config struct {
	Host    HostConfig    `toml:"host"`
	XAPI    XAPIConfig    `toml:"xapi"`
	LINSTOR LINSTORConfig `toml:"linstor"`
	Bus     BusConfig     `toml:"bus"`
	Agents  AgentsConfig  `toml:"agents"`
}

// HostConfig says where the host's own facts are.
type HostConfig struct {
	PoolConf  string `toml:"pool_conf"` // XAPI's role file
	Inventory string `toml:"inventory"` // has INSTALLATION_UUID, the host's uuid
	Name      string `toml:"name"`      // shown to people; empty: the kernel's host name
}

// XAPIConfig says how to reach XAPI.
type XAPIConfig struct {
	Socket string `toml:"socket"` // the root-owned unix socket; needs no password
}

// LINSTORConfig says where LINSTOR controllers may run.
type LINSTORConfig struct {
	Controllers []string `toml:"controllers"` // host, host:port or URL; empty: localhost and every host of the pool
}

// BusConfig says where the bus of this host is, and how the buses of a pool find each other.
type BusConfig struct {
	Socket      string `toml:"socket"`       // the local door, mode 0600
	Store       string `toml:"store"`        // folder of the history and of the list of hosts; "none" for neither
	Cluster     bool   `toml:"cluster"`      // connect to the buses of the pool's other hosts
	RouteListen string `toml:"route_listen"` // where they connect; the port is the same on all hosts
	Ptoken      string `toml:"ptoken"`       // the pool secret, from which the certificates are derived

	SubscribeListen string `toml:"subscribe_listen"` // TLS port for programs outside, which may only read; empty: none
	SubscribeUsers  string `toml:"subscribe_users"`  // file with name:password lines, mode 0600
	SubscribeCert   string `toml:"subscribe_cert"`   // PEM; empty: derived from the pool secret
	SubscribeKey    string `toml:"subscribe_key"`    // PEM
}

// Options are the bus's own options; the caller adds the log.
func (c BusConfig) Options(host string) bus.Options {
	o := bus.Options{Socket: c.Socket, ServerName: host, Secret: c.Ptoken,
		Subscribe: bus.SubscribeOptions{Listen: c.SubscribeListen, Users: c.SubscribeUsers, Cert: c.SubscribeCert, Key: c.SubscribeKey}}
	o.StoreDir = c.KeptIn()
	if c.Cluster {
		o.RouteListen = c.RouteListen
	}
	return o
}

// KeptIn is the folder in which the bus keeps what outlives it; "" for none.
func (c BusConfig) KeptIn() string {
	if c.Store == noStore {
		return ""
	}
	return c.Store
}

// noStore is the value of bus.store for no history.
const noStore = "none"

// AgentsConfig is what agents share, and a section for each agent.
type AgentsConfig struct {
	StateDir string         `toml:"state_dir"` // small files that survive a restart
	SRSize   SRSizeConfig   `toml:"sr-size"`
	Failover FailoverConfig `toml:"failover"`
}

// SRSizeConfig is the section [agents.sr-size].
type SRSizeConfig struct {
	Mode   string   `toml:"mode"`   // "act" or "observe"
	Grace  Duration `toml:"grace"`  // how long a partial view is no finding
	Resync Duration `toml:"resync"` // a look without any event
}

// FailoverConfig is the section [agents.failover].
type FailoverConfig struct {
	Mode           string   `toml:"mode"`            // "auto", "guard", "owner", or "observe": findings only, nothing is done
	Name           string   `toml:"name"`            // this host's name in LINSTOR; empty: from the .res file and the kernel's host name
	Port           int      `toml:"port"`            // UDP for beats, TCP for fetching backups; the same on all hosts
	Listen         string   `toml:"listen"`          // address for these; empty: all
	Addresses      []string `toml:"addresses"`       // further addresses of the other hosts; empty: the pool's management addresses, as the bus or XAPI knows them
	Socket         string   `toml:"socket"`          // where `xostor controller` asks, mode 0600
	StateDir       string   `toml:"state_dir"`       // the copy of the .res file and what the other hosts said last
	BackupDir      string   `toml:"backup_dir"`      // backups of the database; not on the database's own filesystem
	Backups        bool     `toml:"backups"`         // take and fetch backups
	Resource       string   `toml:"resource"`        // DRBD resource of the database
	MountPoint     string   `toml:"mount_point"`     // of the database
	MountUnit      string   `toml:"mount_unit"`      // mounts it
	ControllerUnit string   `toml:"controller_unit"` // runs LINSTOR's controller
	ControllerURL  string   `toml:"controller_url"`  // of this host's controller
	ProbeEvery     Duration `toml:"probe_every"`     // between two probes of the controller; three that fail make it hung
	ResDir         string   `toml:"res_dir"`         // LINSTOR's .res files
	ReactorConfig  string   `toml:"reactor_config"`  // drbd-reactor's main configuration
	ReactorDir     string   `toml:"reactor_dir"`     // and its snippets
	Drbdsetup      string   `toml:"drbdsetup"`       // program
	Drbdadm        string   `toml:"drbdadm"`         // program
	DeviceMajor    int      `toml:"device_major"`    // of the database's block device
}

// Duration is a time span such as "5s" or "2m30s".
type Duration time.Duration

// UnmarshalText reads a duration and refuses negative ones.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil || v <= 0 {
		return fmt.Errorf("%q is not a time span such as \"5s\" or \"2m\"", b)
	}
	*d = Duration(v)
	return nil
}

// DefaultConfig is what holds for keys that are not set.
func DefaultConfig() Config {
	return Config{
		Host: HostConfig{PoolConf: xapi.DefaultPoolConf, Inventory: xapi.DefaultInventory},
		XAPI: XAPIConfig{Socket: xapi.DefaultSocket},
		Bus: BusConfig{Socket: "/run/xostor/bus.sock", Store: "/var/lib/xostor/bus", Cluster: true, RouteListen: ":6222", Ptoken: poolcert.SecretPath,
			SubscribeUsers: "/etc/xostor/subscribers"},
		Agents: AgentsConfig{StateDir: "/var/lib/xostor/agents", SRSize: SRSizeConfig{Mode: "act", Grace: Duration(5 * time.Second), Resync: Duration(time.Minute)},
			Failover: FailoverConfig{Mode: "auto", Port: 7999, Socket: "/run/xostor/failover.sock", StateDir: "/var/lib/xostor/failover", BackupDir: "/var/lib/xostor/failover/backups",
				Backups: true, Resource: "xcp-persistent-database", MountPoint: "/var/lib/linstor", MountUnit: "var-lib-linstor.service", ControllerUnit: "linstor-controller.service",
				ControllerURL: "http://127.0.0.1:3370", ProbeEvery: Duration(10 * time.Second), ResDir: "/var/lib/linstor.d", ReactorConfig: "/etc/drbd-reactor.toml",
				ReactorDir: "/etc/drbd-reactor.d", Drbdsetup: "drbdsetup", Drbdadm: "drbdadm", DeviceMajor: 147}},
	}
}

// ConfigError is a configuration that cannot be used. Its text is one line that names the file, the key and what is allowed.
type ConfigError struct{ Text string }

// Error implements error.
func (e *ConfigError) Error() string { return e.Text }

// LoadConfig reads a configuration file. An empty path means DefaultConfigFile, which may be missing; a named file must exist. Errors are *ConfigError.
func LoadConfig(path string) (Config, error) {
	named := path != ""
	if !named {
		path = DefaultConfigFile
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return DefaultConfig(), nil
	}
	if err != nil {
		return Config{}, &ConfigError{fmt.Sprintf("read configuration: %v", err)}
	}
	c, err := ParseConfig(string(text))
	if err != nil {
		return Config{}, &ConfigError{fmt.Sprintf("read configuration %s: %v", path, err)}
	}
	return c, nil
}

// ParseConfig reads a configuration over the defaults.
func ParseConfig(text string) (Config, error) {
	c := DefaultConfig()
	meta, err := toml.Decode(text, &c)
	if perr, ok := errors.AsType[toml.ParseError](err); ok {
		return Config{}, fmt.Errorf("line %d: %s", perr.Position.Line, strings.TrimSpace(strings.SplitN(perr.Message, "\n", 2)[0]))
	}
	if err != nil {
		return Config{}, errors.New(strings.SplitN(err.Error(), "\n", 2)[0])
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return Config{}, fmt.Errorf("unknown key %s; known keys are %s", unknown[0], strings.Join(knownKeys(), ", "))
	}
	if m := c.Agents.SRSize.Mode; !slices.Contains([]string{"act", "observe"}, m) {
		return Config{}, fmt.Errorf("agents.sr-size.mode is %q; want \"act\" or \"observe\"", m)
	}
	if err := c.Agents.Failover.check(); err != nil {
		return Config{}, err
	}
	for key, value := range map[string]string{"host.pool_conf": c.Host.PoolConf, "host.inventory": c.Host.Inventory, "xapi.socket": c.XAPI.Socket,
		"bus.socket": c.Bus.Socket, "bus.store": c.Bus.Store, "bus.route_listen": c.Bus.RouteListen, "bus.ptoken": c.Bus.Ptoken, "bus.subscribe_users": c.Bus.SubscribeUsers,
		"agents.state_dir": c.Agents.StateDir, "agents.failover.resource": c.Agents.Failover.Resource, "agents.failover.mount_unit": c.Agents.Failover.MountUnit,
		"agents.failover.controller_unit": c.Agents.Failover.ControllerUnit, "agents.failover.drbdsetup": c.Agents.Failover.Drbdsetup, "agents.failover.drbdadm": c.Agents.Failover.Drbdadm} {
		if value == "" {
			return Config{}, fmt.Errorf("%s is empty; leave the key out for its default", key)
		}
	}
	for key, listen := range map[string]string{"bus.route_listen": c.Bus.RouteListen, "bus.subscribe_listen": c.Bus.SubscribeListen} {
		if listen != "" && !isListen(listen) {
			return Config{}, fmt.Errorf("%s is %q; want \":PORT\" or \"ADDRESS:PORT\"", key, listen)
		}
	}
	if (c.Bus.SubscribeCert == "") != (c.Bus.SubscribeKey == "") {
		return Config{}, errors.New("bus.subscribe_cert and bus.subscribe_key belong together; set both or none")
	}
	return c, nil
}

// check refuses what waiting cannot cure.
func (c FailoverConfig) check() error {
	if !slices.Contains([]string{"auto", "guard", "owner", "observe"}, c.Mode) {
		return fmt.Errorf("agents.failover.mode is %q; want \"auto\", \"guard\", \"owner\" or \"observe\"", c.Mode)
	}
	if c.Port < 1 || c.Port > 65535 {
		return fmt.Errorf("agents.failover.port is %d; want 1 to 65535", c.Port)
	}
	if c.DeviceMajor < 1 || c.DeviceMajor > 4095 { // 12 bits in the kernel's dev_t
		return fmt.Errorf("agents.failover.device_major is %d; want 1 to 4095", c.DeviceMajor)
	}
	for _, text := range append(slices.Clone(c.Addresses), cmp.Or(c.Listen, "127.0.0.1")) {
		if _, err := netip.ParseAddr(text); err != nil {
			return fmt.Errorf("agents.failover.listen or addresses has %q; want an IP address without a port", text)
		}
	}
	if u, err := url.Parse(c.ControllerURL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("agents.failover.controller_url is %q; want \"http://ADDRESS:PORT\"", c.ControllerURL)
	}
	if strings.ContainsAny(c.Resource, "/ ") || strings.HasPrefix(c.Resource, ".") {
		return fmt.Errorf("agents.failover.resource is %q; want the name of a DRBD resource", c.Resource)
	}
	for key, path := range map[string]string{"socket": c.Socket, "state_dir": c.StateDir, "backup_dir": c.BackupDir, "mount_point": c.MountPoint, "res_dir": c.ResDir,
		"reactor_config": c.ReactorConfig, "reactor_dir": c.ReactorDir} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path {
			return fmt.Errorf("agents.failover.%s is %q; want an absolute path without \"..\" or a slash at its end", key, path)
		}
	}
	if strings.HasPrefix(c.BackupDir+"/", c.MountPoint+"/") {
		return errors.New("agents.failover.backup_dir is below agents.failover.mount_point; a backup must not be on the filesystem that it is made of")
	}
	return nil
}

func isListen(text string) bool {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return false
	}
	n, err := strconv.Atoi(port)
	if err != nil || n < 1 || n > 65535 {
		return false
	}
	_, err = netip.ParseAddr(host)
	return host == "" || err == nil
}

func knownKeys() []string {
	return []string{"host.pool_conf", "host.inventory", "host.name", "xapi.socket", "linstor.controllers", "bus.socket", "bus.store",
		"bus.cluster", "bus.route_listen", "bus.ptoken", "bus.subscribe_listen", "bus.subscribe_users", "bus.subscribe_cert", "bus.subscribe_key",
		"agents.state_dir", "agents.sr-size.mode", "agents.sr-size.grace", "agents.sr-size.resync",
		"agents.failover.mode", "agents.failover.name", "agents.failover.port", "agents.failover.listen", "agents.failover.addresses", "agents.failover.socket",
		"agents.failover.state_dir", "agents.failover.backup_dir", "agents.failover.backups", "agents.failover.resource", "agents.failover.mount_point",
		"agents.failover.mount_unit", "agents.failover.controller_unit", "agents.failover.controller_url", "agents.failover.probe_every", "agents.failover.res_dir",
		"agents.failover.reactor_config", "agents.failover.reactor_dir", "agents.failover.drbdsetup", "agents.failover.drbdadm", "agents.failover.device_major"}
}
