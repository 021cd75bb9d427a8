package dom0

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
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
	o := bus.Options{Socket: c.Socket, StoreDir: c.Store, ServerName: host, Secret: c.Ptoken,
		Subscribe: bus.SubscribeOptions{Listen: c.SubscribeListen, Users: c.SubscribeUsers, Cert: c.SubscribeCert, Key: c.SubscribeKey}}
	if c.Store == noStore {
		o.StoreDir = ""
	}
	if c.Cluster {
		o.RouteListen = c.RouteListen
	}
	return o
}

// noStore is the value of bus.store for no history.
const noStore = "none"

// AgentsConfig is what agents share, and a section for each agent.
type AgentsConfig struct {
	StateDir string       `toml:"state_dir"` // small files that survive a restart
	SRSize   SRSizeConfig `toml:"sr-size"`
}

// SRSizeConfig is the section [agents.sr-size].
type SRSizeConfig struct {
	Mode   string   `toml:"mode"`   // "act" or "observe"
	Grace  Duration `toml:"grace"`  // how long a partial view is no finding
	Resync Duration `toml:"resync"` // a look without any event
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
		Agents: AgentsConfig{StateDir: "/var/lib/xostor/agents", SRSize: SRSizeConfig{Mode: "act", Grace: Duration(5 * time.Second), Resync: Duration(time.Minute)}},
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
	for key, value := range map[string]string{"host.pool_conf": c.Host.PoolConf, "host.inventory": c.Host.Inventory, "xapi.socket": c.XAPI.Socket,
		"bus.socket": c.Bus.Socket, "bus.store": c.Bus.Store, "bus.route_listen": c.Bus.RouteListen, "bus.ptoken": c.Bus.Ptoken, "bus.subscribe_users": c.Bus.SubscribeUsers,
		"agents.state_dir": c.Agents.StateDir} {
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
		"agents.state_dir", "agents.sr-size.mode", "agents.sr-size.grace", "agents.sr-size.resync"}
}
