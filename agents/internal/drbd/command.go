package drbd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
)

// What DRBD says no with. A *CommandError matches one of these.
var (
	ErrOtherPrimary = errors.New("another node is primary")
	ErrNoUpToDate   = errors.New("no up-to-date data in reach")
	ErrRefused      = errors.New("refused by a peer")
	ErrHeldOpen     = errors.New("the device is held open")
	ErrNoQuorum     = errors.New("no quorum")
	ErrNoResource   = errors.New("no such resource")
	ErrNoModule     = errors.New("the DRBD kernel module does not answer")
	ErrConnected    = errors.New("the connection has its network configuration already")
)

// CommandError is a call of drbdsetup or drbdadm that was refused.
type CommandError struct {
	Args []string
	Exit int
	Code int    // the kernel's number, such as -25; 0 when none was printed
	Text string // all that was printed, on one line
	Hint string // what an operator does next, or ""
	kind error
}

// Error implements error.
func (e *CommandError) Error() string {
	return fmt.Sprintf("%s: exit code %d: %s", strings.Join(e.Args, " "), e.Exit, cmp.Or(e.Text, "no text"))
}

// Unwrap returns the sentinel error, or nil.
func (e *CommandError) Unwrap() error { return e.kind }

// Tool calls drbd-utils. Its zero value uses the programs on PATH.
type Tool struct {
	Drbdsetup string // path; "drbdsetup"
	Drbdadm   string // path; "drbdadm"
	children  child.Runner
}

// Bounds of one call. Promotion may wait for two ping-timeouts and a cluster-wide change (drbd-lab.md 1.1: up to 1.7 s).
const (
	readTimeout    = 2 * time.Second
	commandTimeout = 5 * time.Second
	promoteTimeout = 10 * time.Second
	adjustTimeout  = 15 * time.Second
)

// Primary promotes. It is also the fastest detector of a dead peer: DRBD pings every connected peer first and drops those that do not answer, so never
// call it on a mere guess (drbd-lab.md 1.3). It never forces.
func (t *Tool) Primary(ctx context.Context, resource string) error {
	return t.setup(ctx, promoteTimeout, "primary", resource)
}

// Secondary demotes. With force, I/O of whoever still holds the device ends with errors, and promotion is refused until they let go.
func (t *Tool) Secondary(ctx context.Context, resource string, force bool) error {
	args := []string{"secondary", resource}
	if force {
		args = append(args, "--force")
	}
	return t.setup(ctx, commandTimeout, args...)
}

// Connect takes a StandAlone connection back up, without discarding anything. The other end must do the same. Already connected: no error.
func (t *Tool) Connect(ctx context.Context, resource string, peerNodeID int) error {
	err := t.setup(ctx, commandTimeout, "connect", resource, strconv.Itoa(peerNodeID))
	if errors.Is(err, ErrConnected) {
		return nil
	}
	return err
}

// Adjust makes the kernel's configuration that of the .res file. It brings the resource up when it is down.
func (t *Tool) Adjust(ctx context.Context, resource string) error {
	_, err := t.run(ctx, adjustTimeout, cmp.Or(t.Drbdadm, "drbdadm"), "adjust", resource)
	return err
}

// Status reads the resource once. Errors: ErrNoResource, ErrNoModule.
func (t *Tool) Status(ctx context.Context, resource string) (*Resource, error) {
	out, err := t.run(ctx, readTimeout, cmp.Or(t.Drbdsetup, "drbdsetup"), "status", resource, "--json")
	if err != nil {
		return nil, err
	}
	list, err := ParseStatus(out)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].Name == resource {
			return &list[i], nil
		}
	}
	return nil, fmt.Errorf("read status of %s: %w", resource, ErrNoResource)
}

// Options are the settings of a resource that decide how to treat it; "" is unknown.
type Options struct {
	Quorum         string // "off", "majority", "all" or a number
	OnNoQuorum     string // "io-error" or "suspend-io"
	AutoPromote    string // "yes" or "no"
	OnSuspOutdated string // on-suspended-primary-outdated
	RRConflict     string // of the first connection
	NodeID         int    // this host's, -1 unknown
}

// Options reads the settings in force, defaults included.
func (t *Tool) Options(ctx context.Context, resource string) (Options, error) {
	out, err := t.run(ctx, readTimeout, cmp.Or(t.Drbdsetup, "drbdsetup"), "show", resource, "--show-defaults", "--json")
	if err != nil {
		return Options{}, err
	}
	return parseOptions(out, resource)
}

func parseOptions(text []byte, resource string) (Options, error) {
	var shown []struct {
		Resource string         `json:"resource"`
		Options  map[string]any `json:"options"`
		ThisHost struct {
			NodeID *int `json:"node-id"`
		} `json:"_this_host"`
		Connections []struct {
			Net map[string]any `json:"net"`
		} `json:"connections"`
	}
	if err := json.Unmarshal(text, &shown); err != nil {
		return Options{}, fmt.Errorf("read drbdsetup show: %w", err)
	}
	for _, s := range shown {
		if s.Resource != resource {
			continue
		}
		o := Options{Quorum: option(s.Options, "quorum"), OnNoQuorum: option(s.Options, "on-no-quorum"),
			AutoPromote: option(s.Options, "auto-promote"), OnSuspOutdated: option(s.Options, "on-suspended-primary-outdated")}
		if o.NodeID = -1; s.ThisHost.NodeID != nil {
			o.NodeID = *s.ThisHost.NodeID
		}
		if len(s.Connections) > 0 {
			o.RRConflict = option(s.Connections[0].Net, "rr-conflict")
		}
		return o, nil
	}
	return Options{}, fmt.Errorf("read options of %s: %w", resource, ErrNoResource)
}

// option turns a value, which drbdsetup prints as string, number or boolean, into text.
func option(m map[string]any, key string) string {
	switch v := m[key].(type) {
	case string:
		return v
	case bool:
		return TriOf(v).String()
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	return ""
}

func (t *Tool) setup(ctx context.Context, limit time.Duration, args ...string) error {
	_, err := t.run(ctx, limit, append([]string{cmp.Or(t.Drbdsetup, "drbdsetup")}, args...)...)
	return err
}

func (t *Tool) run(ctx context.Context, limit time.Duration, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	res, err := t.children.Run(ctx, strings.Join(argv[1:], " "), argv...)
	if err != nil {
		return nil, err
	}
	if res.Exit != 0 {
		return nil, refusal(argv, res)
	}
	return res.Stdout, nil
}

// kernelCode finds the number that drbdsetup prints with a refusal: "State change failed: (-25) No quorum", "(125) Device has a net-config".
var kernelCode = regexp.MustCompile(`\((-?[0-9]{1,4})\)`)

func refusal(argv []string, res child.Result) error {
	text := strings.Join(strings.Fields(string(res.Stderr)+" "+string(res.Stdout)), " ")
	e := &CommandError{Args: argv, Exit: res.Exit, Text: text}
	if m := kernelCode.FindStringSubmatch(text); m != nil {
		e.Code, _ = strconv.Atoi(m[1]) // four digits at most
	}
	switch {
	case res.Exit == 20 || res.Exit == 121:
		e.kind, e.Hint = ErrNoModule, "check that the kernel module is loaded: modprobe drbd"
	case e.Code == -25:
		e.kind, e.Hint = ErrNoQuorum, "bring back the hosts that hold replicas, or their storage network"
	case e.Code == -12:
		e.kind, e.Hint = ErrHeldOpen, "end the holder that the text names"
	case e.Code == -10:
		e.kind = ErrRefused
	case e.Code == -2 || res.Exit == 17:
		e.kind, e.Hint = ErrNoUpToDate, "a host with an up-to-date replica must be reachable"
	case e.Code == -1:
		e.kind = ErrOtherPrimary
	case e.Code == 125:
		e.kind = ErrConnected
	case res.Exit == 10 && (e.Code == 158 || strings.Contains(text, "No such resource") || strings.Contains(text, "Unknown resource")):
		e.kind, e.Hint = ErrNoResource, "drbdadm adjust brings the resource up from its .res file"
	case strings.Contains(text, "not defined in your config") || strings.Contains(text, "no resources defined"):
		e.kind, e.Hint = ErrNoResource, "the .res file of the resource is missing or empty in /var/lib/linstor.d"
	}
	return e
}
