package statefile

import (
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// ConfPath is where XAPI writes xhad's configuration.
const ConfPath = "/etc/xensource/xhad.conf"

// Timeouts are xhad's times; names as in its source.
type Timeouts struct {
	HeartbeatInterval time.Duration `json:"t1_ns"` // t1.
	HeartbeatTimeout  time.Duration `json:"T1_ns"` // T1.
	StateFileInterval time.Duration `json:"t2_ns"` // t2.
	StateFileTimeout  time.Duration `json:"T2_ns"` // T2.
	HeartbeatWatchdog time.Duration `json:"Wh_ns"` // Wh.
	StateFileWatchdog time.Duration `json:"Ws_ns"` // Ws.
}

// Derive gives what XAPI writes for an HA timeout T (ha-config:timeout, default 60 s, at least 10 s; xapi_ha.ml).
func Derive(timeout time.Duration) Timeouts {
	whole := func(d time.Duration) time.Duration { return d.Truncate(time.Second) }
	return Timeouts{HeartbeatInterval: min(whole((timeout+10*time.Second)/10), 3*time.Second), HeartbeatTimeout: timeout,
		StateFileInterval: max(2*time.Second, whole(timeout/20)), StateFileTimeout: timeout, HeartbeatWatchdog: timeout,
		StateFileWatchdog: timeout + 15*time.Second}
}

// Tolerated is the longest outage of the statefile that no host falls out for: T2 - 2(t2 + 1 s). The factor is that the
// writer's and the reader's intervals add on both sides of the outage (measured with the real xhad).
func (t Timeouts) Tolerated() time.Duration {
	return t.StateFileTimeout - 2*(t.StateFileInterval+time.Second)
}

// Unnoticed is the longest outage that does not even make XAPI warn that the time-out is near: T2/2 - 2(t2 + 1 s). It may
// be negative.
func (t Timeouts) Unnoticed() time.Duration {
	return t.StateFileTimeout/2 - 2*(t.StateFileInterval+time.Second)
}

// ConfHost is a host in xhad.conf.
type ConfHost struct {
	ID      ID
	UUID    string // As written.
	Address string // Management address, IPv4 or IPv6.
}

// Conf is xhad.conf.
type Conf struct {
	Generation string
	Hosts      []ConfHost // Sorted by ID: the index is xhad's host index.
	Self       ID
	StateFile  string
	Interface  string // HeartbeatInterface.
	Timeouts   Timeouts
}

type confXML struct {
	XMLName xml.Name `xml:"xhad-config"`
	Version string   `xml:"version,attr"`
	Common  struct {
		Generation string `xml:"GenerationUUID"`
		Hosts      []struct {
			ID      string `xml:"HostID"`
			Address string `xml:"IPaddress"`
		} `xml:"host"`
		Parameters struct {
			T1 int64 `xml:"HeartbeatTimeout"`
			I1 int64 `xml:"HeartbeatInterval"`
			T2 int64 `xml:"StateFileTimeout"`
			I2 int64 `xml:"StateFileInterval"`
			Wh int64 `xml:"HeartbeatWatchdogTimeout"`
			Ws int64 `xml:"StateFileWatchdogTimeout"`
		} `xml:"parameters"`
	} `xml:"common-config"`
	Local struct {
		Host struct {
			ID        string `xml:"HostID"`
			Interface string `xml:"HeartbeatInterface"`
			StateFile string `xml:"StateFile"`
		} `xml:"localhost"`
	} `xml:"local-config"`
}

// ReadConf parses xhad.conf. Times that it does not give have xhad's built-in defaults (include/config.h). An error says
// which element is missing or wrong.
func ReadConf(r io.Reader) (Conf, error) {
	var x confXML
	if err := xml.NewDecoder(io.LimitReader(r, 1<<20)).Decode(&x); err != nil {
		return Conf{}, fmt.Errorf("parse xhad.conf: %w", err)
	}
	c := Conf{Generation: x.Common.Generation, StateFile: strings.TrimSpace(x.Local.Host.StateFile), Interface: strings.TrimSpace(x.Local.Host.Interface)}
	for _, h := range x.Common.Hosts {
		id, err := ParseID(strings.TrimSpace(h.ID))
		if err != nil {
			return Conf{}, fmt.Errorf("parse xhad.conf: HostID: %w", err)
		}
		c.Hosts = append(c.Hosts, ConfHost{ID: id, UUID: strings.TrimSpace(h.ID), Address: strings.TrimSpace(h.Address)})
	}
	if len(c.Hosts) == 0 || len(c.Hosts) > MaxHosts {
		return Conf{}, fmt.Errorf("parse xhad.conf: %d host elements, want 1 to %d", len(c.Hosts), MaxHosts)
	}
	slices.SortFunc(c.Hosts, func(a, b ConfHost) int { return strings.Compare(string(a.ID), string(b.ID)) })
	self, err := ParseID(strings.TrimSpace(x.Local.Host.ID))
	if err != nil {
		return Conf{}, fmt.Errorf("parse xhad.conf: localhost: %w", err)
	}
	c.Self = self
	seconds := func(v int64, builtin time.Duration) time.Duration {
		if v <= 0 || v > 86400 {
			return builtin * time.Second
		}
		return time.Duration(v) * time.Second
	}
	p := x.Common.Parameters
	c.Timeouts = Timeouts{HeartbeatInterval: seconds(p.I1, 4), HeartbeatTimeout: seconds(p.T1, 30), StateFileInterval: seconds(p.I2, 4),
		StateFileTimeout: seconds(p.T2, 30), HeartbeatWatchdog: seconds(p.Wh, 30), StateFileWatchdog: seconds(p.Ws, 45)}
	return c, nil
}

// Index is the host index of id, -1 if it is not configured.
func (c Conf) Index(id ID) int {
	return slices.IndexFunc(c.Hosts, func(h ConfHost) bool { return h.ID == id })
}
