package dom0

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseConfig(t *testing.T) {
	tests := []struct {
		name, text string
		want       func(c *Config)
		err        string // part of the one-line error
	}{
		{"empty: all defaults", "", func(*Config) {}, ""},
		{"a comment only", "# nothing\n", func(*Config) {}, ""},
		{"everything", `
[host]
pool_conf = "/p"
inventory = "/i"
name = "xcp1"
[xapi]
socket = "/x"
[linstor]
controllers = ["10.0.0.1", "https://10.0.0.2:3371"]
[bus]
socket = "/b"
store = "none"
cluster = false
route_listen = "10.0.0.1:7"
ptoken = "/t"
subscribe_listen = "[::1]:8"
subscribe_users = "/u"
subscribe_cert = "/c"
subscribe_key = "/k"
[agents]
state_dir = "/s"
[agents.sr-size]
mode = "observe"
grace = "1m30s"
resync = "10s"
[agents.failover]
mode = "guard"
name = "xcp1.example"
port = 7998
listen = "10.0.0.1"
addresses = ["10.1.0.2", "fd00::2"]
socket = "/f/s"
state_dir = "/f/d"
backup_dir = "/f/b"
backups = false
resource = "db"
mount_point = "/f/m"
mount_unit = "m.service"
controller_unit = "c.service"
controller_url = "http://10.0.0.1:3370"
probe_every = "1s"
res_dir = "/f/r"
reactor_config = "/f/rc"
reactor_dir = "/f/rd"
drbdsetup = "/f/setup"
drbdadm = "/f/adm"
device_major = 7
`, func(c *Config) {
			c.Host, c.XAPI.Socket = HostConfig{PoolConf: "/p", Inventory: "/i", Name: "xcp1"}, "/x"
			c.LINSTOR.Controllers, c.Bus = []string{"10.0.0.1", "https://10.0.0.2:3371"}, BusConfig{Socket: "/b", Store: "none", RouteListen: "10.0.0.1:7", Ptoken: "/t",
				SubscribeListen: "[::1]:8", SubscribeUsers: "/u", SubscribeCert: "/c", SubscribeKey: "/k"}
			c.Agents = AgentsConfig{StateDir: "/s", SRSize: SRSizeConfig{Mode: "observe", Grace: Duration(90 * time.Second), Resync: Duration(10 * time.Second)},
				Failover: FailoverConfig{Mode: "guard", Name: "xcp1.example", Port: 7998, Listen: "10.0.0.1", Addresses: []string{"10.1.0.2", "fd00::2"}, Socket: "/f/s", StateDir: "/f/d",
					BackupDir: "/f/b", Resource: "db", MountPoint: "/f/m", MountUnit: "m.service", ControllerUnit: "c.service", ControllerURL: "http://10.0.0.1:3370",
					ProbeEvery: Duration(time.Second), ResDir: "/f/r", ReactorConfig: "/f/rc", ReactorDir: "/f/rd", Drbdsetup: "/f/setup", Drbdadm: "/f/adm", DeviceMajor: 7}}
		}, ""},
		{"unknown key", "[bus]\nsockt = \"x\"\n", nil, "unknown key bus.sockt; known keys are host.pool_conf"},
		{"unknown section", "[buss]\n", nil, "unknown key buss;"},
		{"not TOML", "[bus\n", nil, "line 2: expected"},
		{"wrong type", "[bus]\nsocket = 5\n", nil, "bus.socket"},
		{"bad duration", "[agents.sr-size]\ngrace = \"soon\"\n", nil, `"soon" is not a time span such as "5s"`},
		{"negative duration", "[agents.sr-size]\ngrace = \"-5s\"\n", nil, "is not a time span"},
		{"a number as duration", "[agents.sr-size]\nresync = 5\n", nil, "is not a time span"},
		{"bad mode", "[agents.sr-size]\nmode = \"maybe\"\n", nil, `agents.sr-size.mode is "maybe"; want "act" or "observe"`},
		{"failover: unknown key", "[agents.failover]\nprot = 1\n", nil, "unknown key agents.failover.prot"},
		{"failover: bad mode", "[agents.failover]\nmode = \"act\"\n", nil, `agents.failover.mode is "act"; want "auto", "guard", "owner" or "observe"`},
		{"failover: bad port", "[agents.failover]\nport = 0\n", nil, "agents.failover.port is 0"},
		{"failover: bad address", "[agents.failover]\naddresses = [\"10.0.0.1:7999\"]\n", nil, `"10.0.0.1:7999"; want an IP address without a port`},
		{"failover: bad listen", "[agents.failover]\nlisten = \":7999\"\n", nil, "want an IP address without a port"},
		{"failover: relative path", "[agents.failover]\nstate_dir = \"state\"\n", nil, `agents.failover.state_dir is "state"; want an absolute path`},
		{"failover: a slash too much", "[agents.failover]\nmount_point = \"/var/lib/linstor/\"\n", nil, "agents.failover.mount_point"},
		{"failover: backups on the database", "[agents.failover]\nbackup_dir = \"/var/lib/linstor/backups\"\n", nil, "backup_dir is below"},
		{"failover: bad URL", "[agents.failover]\ncontroller_url = \"localhost:3370\"\n", nil, "agents.failover.controller_url"},
		{"failover: no resource", "[agents.failover]\nresource = \"\"\n", nil, "agents.failover.resource is empty"},
		{"failover: a path as resource", "[agents.failover]\nresource = \"../db\"\n", nil, "want the name of a DRBD resource"},
		{"failover: bad major", "[agents.failover]\ndevice_major = -1\n", nil, "agents.failover.device_major"},
		{"bad route address", "[bus]\nroute_listen = \"6222\"\n", nil, `bus.route_listen is "6222"; want ":PORT"`},
		{"bad subscribe port", "[bus]\nsubscribe_listen = \":0\"\n", nil, `bus.subscribe_listen is ":0"`},
		{"certificate without key", "[bus]\nsubscribe_cert = \"/c\"\n", nil, "belong together"},
		{"empty path", "[xapi]\nsocket = \"\"\n", nil, "xapi.socket is empty"},
		{"invalid UTF-8", "[host]\nname = \"\xff\"\n", nil, "line 2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseConfig(tt.text)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "\n") {
					t.Errorf("error %v, want one line with %q", err, tt.err)
				}
				return
			}
			want := DefaultConfig()
			tt.want(&want)
			if d := cmp.Diff(want, got); d != "" || err != nil {
				t.Errorf("err %v (-want +got):\n%s", err, d)
			}
		})
	}
}

func TestKnownKeys_AreThoseOfTheConfig(t *testing.T) {
	for _, key := range knownKeys() {
		section, name := key[:strings.LastIndex(key, ".")], key[strings.LastIndex(key, ".")+1:]
		// Every value but the right one is refused with another message than that of an unknown key.
		if _, err := ParseConfig("[" + section + "]\n" + name + " = {}\n"); err == nil || strings.Contains(err.Error(), "unknown key") {
			t.Errorf("%s: %v, want a complaint about its type", key, err)
		}
	}
}

func TestLoadConfig_NamedFileMustExist(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadConfig(filepath.Join(dir, "none.toml")); err == nil || !strings.Contains(err.Error(), "none.toml") {
		t.Errorf("missing file: %v, want an error that names it", err)
	}
	path := filepath.Join(dir, "agents.toml")
	if err := os.WriteFile(path, []byte("[bus]\nx=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err == nil || !strings.HasPrefix(err.Error(), "read configuration "+path+": unknown key bus.x") {
		t.Errorf("got %v", err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add("[agents.sr-size]\ngrace = \"5s\"\n")
	f.Add("[agents.failover]\nmode = \"auto\"\nport = 1\naddresses = [\"::1\"]\n")
	f.Add("[linstor]\ncontrollers = [\"a\", \"b\"]\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConfig(text)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("error of several lines: %q", err)
			}
			return
		}
		if c.Agents.SRSize.Grace <= 0 || c.Bus.Socket == "" || c.Agents.Failover.Resource == "" || c.Agents.Failover.Port < 1 {
			t.Errorf("accepted an unusable configuration: %+v", c)
		}
	})
}
