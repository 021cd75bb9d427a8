package heartbeat

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// Resource is what the candidate asks DRBD beyond opening the device. All of it may fail or be slow; nothing in the data
// path waits for it.
type Resource interface {
	// State is DRBD's own view of the resource on this host.
	State(ctx context.Context) (ResourceState, error)
	// Policy is what DRBD is set to do when quorum is lost, defaults included.
	Policy(ctx context.Context) (Policy, error)
	// Cut disconnects from a host by force. A graceful disconnect would make this host's disk Outdated.
	Cut(ctx context.Context, host string) error
	// Join undoes Cut.
	Join(ctx context.Context, host string) error
}

// PeerDisk is what DRBD knows of a host's disk.
type PeerDisk string

// The disks that make a difference. Any other state is a disk, too.
const (
	DiskUpToDate PeerDisk = "UpToDate"
	DiskDiskless PeerDisk = "Diskless"
)

// ResourceState is DRBD's view.
type ResourceState struct {
	Diskful bool                // This host's disk is UpToDate.
	Disk    PeerDisk            // This host's disk.
	Quorum  *bool               // This host's; nil if DRBD does not say.
	Primary string              // A connected host that is Primary, "" if none.
	Peers   map[string]PeerDisk // Connected or not.
}

// cutOff says that DRBD knows this host to be without the device's quorum.
func (s *ResourceState) cutOff() bool { return s.Quorum != nil && !*s.Quorum }

// Policy is what a resource is set to do when quorum is lost.
type Policy struct {
	Quorum     string `json:"quorum"`       // "off", "majority", "all" or a number; "" if DRBD does not say.
	OnNoQuorum string `json:"on_no_quorum"` // "io-error" or "suspend-io"; "" if DRBD does not say.
}

// Barred says why a device must not be served, "" if it may: under suspend-io DRBD can report a suspended write as done and
// then lose it (measured: 13 of 13). Without quorum nothing is ever suspended.
func (p Policy) Barred() string {
	if p.Quorum == "off" || p.OnNoQuorum == "io-error" {
		return ""
	}
	is := p.OnNoQuorum
	if is == "" {
		is = "unknown, and drbd's own default is suspend-io"
	}
	return "on-no-quorum is " + is + ": drbd can report a suspended write as done and then lose it"
}

// DRBDResource drives drbdsetup.
type DRBDResource struct {
	Name string
	// Run runs a program; tests put their own in. Nil means exec.
	Run func(ctx context.Context, name string, args ...string) ([]byte, error)
}

func (r DRBDResource) run(ctx context.Context, args ...string) ([]byte, error) {
	if r.Run != nil {
		return r.Run(ctx, "drbdsetup", args...)
	}
	out, err := exec.CommandContext(ctx, "drbdsetup", args...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("run drbdsetup %s: %w: %s", args[0], err, strings.TrimSpace(string(out)))
	}
	return out, nil
}

type statusJSON struct {
	Name    string `json:"name"`
	Devices []struct {
		Disk   PeerDisk `json:"disk-state"`
		Quorum *bool    `json:"quorum"`
	} `json:"devices"`
	Connections []struct {
		Node  int    `json:"peer-node-id"`
		Name  string `json:"name"`
		State string `json:"connection-state"`
		Role  string `json:"peer-role"`
		Peers []struct {
			Disk PeerDisk `json:"peer-disk-state"`
		} `json:"peer_devices"`
	} `json:"connections"`
}

func (r DRBDResource) status(ctx context.Context) (statusJSON, error) {
	out, err := r.run(ctx, "status", "--json", r.Name)
	if err != nil {
		return statusJSON{}, err
	}
	return parseStatus(out)
}

func parseStatus(out []byte) (statusJSON, error) {
	var all []statusJSON
	if err := json.Unmarshal(out, &all); err != nil {
		return statusJSON{}, fmt.Errorf("parse drbdsetup status: %w", err)
	}
	if len(all) == 0 {
		return statusJSON{}, fmt.Errorf("drbd knows no such resource")
	}
	return all[0], nil
}

// State asks drbdsetup status.
func (r DRBDResource) State(ctx context.Context) (ResourceState, error) {
	st, err := r.status(ctx)
	if err != nil {
		return ResourceState{}, err
	}
	s := ResourceState{Peers: map[string]PeerDisk{}}
	for _, d := range st.Devices {
		s.Diskful, s.Disk, s.Quorum = d.Disk == DiskUpToDate, d.Disk, d.Quorum
	}
	for _, c := range st.Connections {
		if c.State == "Connected" && c.Role == "Primary" {
			s.Primary = c.Name
		}
		s.Peers[c.Name] = ""
		if len(c.Peers) > 0 {
			s.Peers[c.Name] = c.Peers[0].Disk
		}
	}
	return s, nil
}

// Policy asks drbdsetup show.
func (r DRBDResource) Policy(ctx context.Context) (Policy, error) {
	out, err := r.run(ctx, "show", r.Name, "--show-defaults", "--json")
	if err != nil {
		return Policy{}, err
	}
	return parsePolicy(out, r.Name)
}

func parsePolicy(out []byte, name string) (Policy, error) {
	var all []struct {
		Resource string `json:"resource"`
		Options  struct {
			Quorum     any    `json:"quorum"` // A word or a number.
			OnNoQuorum string `json:"on-no-quorum"`
		} `json:"options"`
	}
	if err := json.Unmarshal(out, &all); err != nil {
		return Policy{}, fmt.Errorf("parse drbdsetup show: %w", err)
	}
	for _, r := range all {
		if r.Resource == name {
			p := Policy{OnNoQuorum: r.Options.OnNoQuorum}
			if r.Options.Quorum != nil {
				p.Quorum = fmt.Sprint(r.Options.Quorum)
			}
			return p, nil
		}
	}
	return Policy{}, fmt.Errorf("drbd knows no resource %s", name)
}

// standAlone is the state of a connection that is not to be made.
const standAlone = "StandAlone"

func (r DRBDResource) peer(ctx context.Context, host, verb string, flags ...string) error {
	st, err := r.status(ctx)
	if err != nil {
		return err
	}
	for _, c := range st.Connections {
		if c.Name == host {
			if (c.State == standAlone) == (verb == "disconnect") {
				return nil // It is so already: a command before was cut short, or somebody else was faster.
			}
			_, err := r.run(ctx, append([]string{verb, r.Name, fmt.Sprint(c.Node)}, flags...)...)
			return err
		}
	}
	return fmt.Errorf("drbd has no connection to %s", host)
}

// Cut disconnects from host by force.
func (r DRBDResource) Cut(ctx context.Context, host string) error {
	return r.peer(ctx, host, "disconnect", "--force")
}

// Join connects to host again.
func (r DRBDResource) Join(ctx context.Context, host string) error {
	return r.peer(ctx, host, "connect")
}

// Res is what the shim needs of a resource's .res file, which LINSTOR leaves in /var/lib/linstor.d.
type Res struct {
	Hosts map[string]string // Node name to the address of its replication link.
}

var (
	resHost    = regexp.MustCompile(`^host\s+"?([A-Za-z0-9._-]+)"?\s+address\s+(?:ipv[46]\s+)?\[?([0-9A-Fa-f.:]+?)\]?:\d+\s*;`)
	resOn      = regexp.MustCompile(`^on\s+"?([A-Za-z0-9._-]+)"?`)
	resAddress = regexp.MustCompile(`^address\s+(?:ipv[46]\s+)?\[?([0-9A-Fa-f.:]+?)\]?:\d+\s*;`)
)

// ReadRes parses a .res file. It is an error if it names no host.
func ReadRes(r io.Reader) (Res, error) {
	res := Res{Hosts: map[string]string{}}
	on := ""
	lines := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if m := resHost.FindStringSubmatch(line); m != nil {
			if _, seen := res.Hosts[m[1]]; !seen || res.Hosts[m[1]] == "" {
				res.Hosts[m[1]] = m[2]
			}
		} else if m := resOn.FindStringSubmatch(line); m != nil {
			on = m[1]
			if _, seen := res.Hosts[on]; !seen {
				res.Hosts[on] = ""
			}
		} else if m := resAddress.FindStringSubmatch(line); m != nil && on != "" && res.Hosts[on] == "" {
			res.Hosts[on] = m[1]
		}
	}
	if err := lines.Err(); err != nil {
		return Res{}, fmt.Errorf("read resource file: %w", err)
	}
	if len(res.Hosts) == 0 {
		return Res{}, fmt.Errorf("resource file names no host")
	}
	for host, addr := range res.Hosts {
		if addr == "" && len(res.Hosts) > 1 { // Dialled as it is, it would be this host, which then speaks for all others.
			return Res{}, fmt.Errorf("resource file names no address of host %s on a line of its own", host)
		}
	}
	return res, nil
}

// Names lists the hosts in order.
func (r Res) Names() []string {
	var names []string
	for n := range r.Hosts {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
