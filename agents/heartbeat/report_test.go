package heartbeat

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// What DRBD prints for a resource with and without the options, defaults included.
func TestPolicy(t *testing.T) {
	for text, want := range map[string]Policy{
		`[{"resource":"other","options":{"quorum":"off"}},{"resource":"r0","options":{"quorum":"majority","on-no-quorum":"io-error"}}]`: {"majority", "io-error"},
		`[{"resource":"r0","options":{"quorum":2,"on-no-quorum":"suspend-io"}}]`:                                                        {"2", "suspend-io"},
		`[{"resource":"r0"}]`: {},
	} {
		if got, err := parsePolicy([]byte(text), "r0"); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "{}", `[{"resource":"other"}]`} {
		if p, err := parsePolicy([]byte(text), "r0"); err == nil {
			t.Errorf("%q is %+v", text, p)
		}
	}
	for p, served := range map[Policy]bool{{"majority", "io-error"}: true, {"off", "suspend-io"}: true, {"majority", "suspend-io"}: false, {"majority", ""}: false, {}: false} {
		if got := p.Barred() == ""; got != served {
			t.Errorf("%+v: served %v, want %v", p, got, served)
		}
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add([]byte(`[{"resource":"r0","options":{"quorum":"majority","on-no-quorum":"io-error"}}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, err := parsePolicy(text, "r0"); err == nil && p.Barred() == "" && p.Quorum != "off" && p.OnNoQuorum != "io-error" {
			t.Errorf("served with %+v", p)
		}
	})
}

// scriptedResource answers as DRBD would.
type scriptedResource struct {
	state  ResourceState
	policy Policy
	err    error
}

func (r scriptedResource) State(context.Context) (ResourceState, error) { return r.state, r.err }
func (r scriptedResource) Policy(context.Context) (Policy, error)       { return r.policy, r.err }
func (scriptedResource) Cut(context.Context, string) error              { return nil }
func (scriptedResource) Join(context.Context, string) error             { return nil }

func TestFindings(t *testing.T) {
	good := Policy{"majority", "io-error"}
	three := map[string]PeerDisk{"n2": DiskUpToDate, "n3": DiskDiskless}
	for _, c := range []struct {
		name string
		r    scriptedResource
		open error
		want []string
	}{
		{"all is well", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, good, nil}, nil, nil},
		{"held elsewhere is how it should be", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, good, nil}, ErrHeld, nil},
		{"suspend-io", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, Policy{"majority", "suspend-io"}, nil}, nil, []string{"heartbeat-suspend-io"}},
		{"quorum off", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, Policy{"off", "suspend-io"}, nil}, nil, []string{"heartbeat-quorum-off"}},
		{"two voters", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: map[string]PeerDisk{"n2": "DUnknown"}}, good, nil}, nil, []string{"heartbeat-few-voters"}},
		{"one replica", scriptedResource{ResourceState{Disk: DiskDiskless, Peers: three}, good, nil}, nil, []string{"heartbeat-one-replica"}},
		{"drbd cannot be asked", scriptedResource{err: errors.New("no module")}, nil, []string{"heartbeat-policy-unknown"}},
		{"too small", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, good, nil}, ErrTooSmall, []string{"heartbeat-device-small"}},
		{"http-disk-server", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, good, nil}, &HolderError{7, "http-disk-server", "/dev/drbd1"}, []string{"heartbeat-device-taken"}},
		{"other", scriptedResource{ResourceState{Disk: DiskUpToDate, Peers: three}, good, nil}, errors.New("no such device"), []string{"heartbeat-device"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			timing, _ := DeriveTiming(statefile.Derive(60 * time.Second))
			d, err := New(Config{Host: "n1", Boot: "b", Export: "sf", Timing: timing, Resource: c.r, Open: func() (Device, error) { return nil, c.open }})
			if err != nil {
				t.Fatal(err)
			}
			d.ask(t.Context())
			d.learnPolicy(t.Context())
			d.openErr = c.open
			var got []string
			for _, f := range d.Report().Findings {
				got = append(got, f.Code)
				if f.Text == "" || f.Fix == "" || f.Subject != "sf" {
					t.Errorf("%+v", f)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("findings %q, want %q", got, c.want)
			}
		})
	}
}

// A host whose DRBD is cut off must not reach the statefile over the management network: it would look healthy while its
// VMs hang.
func TestManagementNetworkNeedsQuorum(t *testing.T) {
	timing, _ := DeriveTiming(statefile.Derive(60 * time.Second))
	yes, no := true, false
	for _, c := range []struct {
		quorum *bool
		want   []string
	}{{&yes, []string{"s", "m"}}, {nil, []string{"s", "m"}}, {&no, []string{"s"}}} {
		d, err := New(Config{Host: "n1", Boot: "b", Export: "sf", Timing: timing, Resource: scriptedResource{state: ResourceState{Quorum: c.quorum}}})
		if err != nil {
			t.Fatal(err)
		}
		d.ask(t.Context())
		d.learned["m"], d.learned["x"] = "n2", "n3"
		if got := d.addresses(PeerAddress{"n2", []string{"s"}}); !slices.Equal(got, c.want) {
			t.Errorf("quorum %v: addresses %q, want %q", c.quorum, got, c.want)
		}
	}
}

// The kernel's time-out was fixed at the attach: a budget that grows past it would make the kernel give its socket up.
func TestBudgetStaysBelowTheKernels(t *testing.T) {
	short, _ := DeriveTiming(statefile.Derive(20 * time.Second))
	long, _ := DeriveTiming(statefile.Derive(60 * time.Second))
	w := newForwarder(short, 4<<20, true, 0)
	w.setTiming(long)
	if w.f.t.Hold != short.Hold || w.f.t.Suspect != long.Suspect {
		t.Errorf("hold %v", w.f.t.Hold)
	}
	w = newForwarder(long, 4<<20, true, 0)
	w.setTiming(short)
	w.f.Repeating(time.Unix(0, 0))
	if w.f.t.Hold != short.Hold || !w.f.shared.Equal(time.Unix(0, 0).Add(long.KernelTimeout()+time.Second)) {
		t.Errorf("hold %v, shared writes wait until %v", w.f.t.Hold, w.f.shared)
	}
}

func TestPrint(t *testing.T) {
	now := time.Unix(100000, 0)
	timing, findings := DeriveTiming(statefile.Derive(10 * time.Second))
	r := Report{Export: "sf", Host: "n1", Owner: "n2", OwnerSince: now.Add(-time.Hour), OwnerAddress: "10.0.0.2:8076", Heard: now.Add(-time.Second), Owns: true, Since: now.Add(-time.Hour), Epoch: 3,
		Stats:  Stats{Requests: 10, Failed: 1, Outages: 1, Longest: 2 * time.Second, LongestOutage: 2 * time.Second, Buckets: [len(LatencyBounds) + 1]uint64{8, 0, 1}},
		Timing: timing, Xhad: Xhad{statefile.Derive(10 * time.Second), "/etc/xensource/xhad.conf", findings}, Findings: findings,
		Hosts: map[string]HostWrites{"n3": {Last: now.Add(-3 * time.Second), LongestGap: 7 * time.Second, Writes: 12}}}
	var out strings.Builder
	r.Print(&out, now)
	for _, want := range []string{"this host, since", "epoch 3", "10 requests"[:2], "up to 1ms", "88.9 %", "T1 10s, T2 10s, t1 2s, t2 2s, Wh 10s, Ws 25s (/etc/xensource/xhad.conf)",
		"2s of 3s", "67 %", "2s of 4s", "50 %", "over", "T2 of n3", "7s of 10s", "70 %", "n3 wrote 3s ago, 12 times", "warning: HA time-out 10s tolerates", "next: disable HA"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("lacks %q:\n%s", want, &out)
		}
	}
	if r.Unwell() {
		t.Error("a warning is no emergency")
	}
	r.Outage = now
	if !r.Unwell() {
		t.Error("an outage is one")
	}
	text, err := json.Marshal(r)
	if err != nil || !bytes.Contains(text, []byte(`"T2_ns":10000000000`)) || !bytes.Contains(text, []byte(`"hold_ns":3000000000`)) {
		t.Errorf("%v %s", err, text)
	}
}
