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
	// Cut disconnects from a host by force. A graceful disconnect would make this host's disk Outdated.
	Cut(ctx context.Context, host string) error
	// Join undoes Cut.
	Join(ctx context.Context, host string) error
}

// ResourceState is DRBD's view.
type ResourceState struct {
	Diskful bool            // This host's disk is UpToDate.
	Primary string          // A connected host that is Primary, "" if none.
	Peers   map[string]bool // Connected or not, whose disk is UpToDate.
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
		Disk string `json:"disk-state"`
	} `json:"devices"`
	Connections []struct {
		Node  int    `json:"peer-node-id"`
		Name  string `json:"name"`
		State string `json:"connection-state"`
		Role  string `json:"peer-role"`
		Peers []struct {
			Disk string `json:"peer-disk-state"`
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
	s := ResourceState{Peers: map[string]bool{}}
	for _, d := range st.Devices {
		s.Diskful = d.Disk == "UpToDate"
	}
	for _, c := range st.Connections {
		if c.State == "Connected" && c.Role == "Primary" {
			s.Primary = c.Name
		}
		s.Peers[c.Name] = len(c.Peers) > 0 && c.Peers[0].Disk == "UpToDate"
	}
	return s, nil
}

func (r DRBDResource) peer(ctx context.Context, host, verb string, flags ...string) error {
	st, err := r.status(ctx)
	if err != nil {
		return err
	}
	for _, c := range st.Connections {
		if c.Name == host {
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
	Hosts      map[string]string // Node name to the address of its replication link.
	OnNoQuorum string            // on-no-quorum; "" if the file does not say.
	Quorum     string
	Minor      string
}

var (
	resHost    = regexp.MustCompile(`^host\s+"?([A-Za-z0-9._-]+)"?\s+address\s+(?:ipv[46]\s+)?\[?([0-9A-Fa-f.:]+?)\]?:\d+\s*;`)
	resOn      = regexp.MustCompile(`^on\s+"?([A-Za-z0-9._-]+)"?`)
	resAddress = regexp.MustCompile(`^address\s+(?:ipv[46]\s+)?\[?([0-9A-Fa-f.:]+?)\]?:\d+\s*;`)
	resOption  = regexp.MustCompile(`^(on-no-quorum|quorum|device\s+minor)\s+"?([A-Za-z0-9-]+)"?\s*;`)
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
		} else if m := resOption.FindStringSubmatch(line); m != nil {
			switch m[1] {
			case "on-no-quorum":
				res.OnNoQuorum = m[2]
			case "quorum":
				res.Quorum = m[2]
			default:
				res.Minor = m[2]
			}
		}
	}
	if err := lines.Err(); err != nil {
		return Res{}, fmt.Errorf("read resource file: %w", err)
	}
	if len(res.Hosts) == 0 {
		return Res{}, fmt.Errorf("resource file names no host")
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

// Barred says why the device must not be served, "" if it may: under suspend-io DRBD can report a suspended write as done
// and then lose it (measured: 13 of 13).
func (r Res) Barred() string {
	if r.OnNoQuorum != "" && r.OnNoQuorum != "io-error" {
		return "on-no-quorum is " + r.OnNoQuorum + "; the statefile needs io-error: linstor resource-definition drbd-options --on-no-quorum io-error"
	}
	return ""
}
