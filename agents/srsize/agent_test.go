package srsize

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// pool is XAPI and LINSTOR in one, just deep enough for this agent: two nodes, one SR, one disk.
type pool struct {
	coordinator bool
	shown       Sizes
	vdi         int64 // XAPI's utilisation of vdi1
	plugged     bool
	vdiGone     bool
	refuse      error // what the setters answer

	offline   bool // node b
	storage   error
	allocated int64 // KiB of the disk on both nodes

	writes []string
}

func newPool() *pool {
	return &pool{coordinator: true, plugged: true, allocated: 4 << 20, vdi: 4 * gib, shown: Sizes{Physical: 100 * gib, Utilisation: 4 * gib, Virtual: 10 * gib}}
}

func (p *pool) LinstorSRs(context.Context) ([]SRRecord, error) {
	r := SRRecord{UUID: "sr1", Name: "XOSTOR", Sizes: p.shown,
		PBDs: []PBDRecord{{UUID: "pbd1", HostUUID: "h1", Group: "g/t", Attached: p.plugged}, {UUID: "pbd2", HostUUID: "h2", Group: "g/t", Attached: true}}}
	if !p.vdiGone {
		r.VDIs = []VDI{{UUID: "vdi1", Ref: "OpaqueRef:vdi1", Virtual: 10 * gib, Utilisation: p.vdi, Managed: true}}
	}
	return []SRRecord{r}, nil
}

func (p *pool) Nodes(context.Context) ([]linstor.Node, error) {
	b := linstor.Node{Name: "b", ConnectionStatus: "ONLINE"}
	if p.offline {
		b.ConnectionStatus = "OFFLINE"
	}
	return []linstor.Node{{Name: "a", ConnectionStatus: "ONLINE"}, b}, p.storage
}

func (p *pool) StoragePools(context.Context, linstor.PoolQuery) ([]linstor.StoragePool, error) {
	a := linstor.StoragePool{Name: "xcp-sr-g_t", Node: "a", Provider: "LVM_THIN", TotalKiB: kib(100), FreeKiB: kib(50)}
	b := a
	b.Node = "b"
	if p.offline {
		b.TotalKiB, b.FreeKiB = nil, nil
	}
	return []linstor.StoragePool{b, a, {Name: "DfltDisklessStorPool", Node: "a", Diskless: true}}, p.storage
}

func (p *pool) ResourceView(context.Context, linstor.ViewQuery) ([]linstor.Resource, error) {
	vol := func(kib int64) []linstor.Volume { return []linstor.Volume{{Pool: "xcp-sr-g_t", AllocatedKiB: &kib}} }
	rs := []linstor.Resource{{Name: "xcp-volume-1", Node: "a", Volumes: vol(p.allocated)}, {Name: "xcp-volume-1", Node: "b", Volumes: vol(p.allocated)},
		{Name: "xcp-volume-1", Node: "c", Volumes: []linstor.Volume{{Pool: "DfltDisklessStorPool"}}}}
	return rs, p.storage
}

func (p *pool) Group(_ context.Context, name string) (linstor.Group, error) {
	two := int32(2)
	if name != "xcp-sr-g_t" {
		return linstor.Group{}, linstor.ErrNotFound
	}
	return linstor.Group{Name: name, SelectFilter: linstor.SelectFilter{PlaceCount: &two}}, p.storage
}

func (p *pool) KV(context.Context, string) (map[string]string, error) {
	return map[string]string{"xcp/volume/vdi1/not-exists": "0", "xcp/volume/vdi1/volume-name": "xcp-volume-1"}, p.storage
}

func (p *pool) GetByUUID(_ context.Context, class, uuid string) (xapi.Ref, error) {
	if uuid == "gone" {
		return "", &xapi.Error{Code: "UUID_INVALID", Params: []string{class, uuid}}
	}
	return xapi.Ref("OpaqueRef:" + uuid), nil
}

func (p *pool) Plugged(context.Context, xapi.Ref, xapi.Ref) (bool, error) { return p.plugged, nil }

func (p *pool) SRSetSizes(_ context.Context, sr xapi.Ref, s xapi.SRSizes) error {
	if p.refuse != nil {
		return p.refuse
	}
	for _, f := range []struct {
		name string
		to   *int64
		from *int64
	}{{"virtual", &p.shown.Virtual, s.VirtualAllocation}, {"physical", &p.shown.Physical, s.PhysicalSize}, {"used", &p.shown.Utilisation, s.PhysicalUtilisation}} {
		if f.from != nil {
			*f.to = *f.from
			p.writes = append(p.writes, fmt.Sprintf("%s=%d", f.name, *f.from))
		}
	}
	return nil
}

func (p *pool) SRSizes(context.Context, xapi.Ref) (Sizes, error) { return p.shown, nil }

func (p *pool) VDIUtilisation(_ context.Context, vdi xapi.Ref) (int64, error) {
	if p.vdiGone {
		return 0, &xapi.Error{Code: "HANDLE_INVALID", Params: []string{"VDI", string(vdi)}}
	}
	return p.vdi, nil
}

func (p *pool) VDISetPhysicalUtilisation(_ context.Context, _, vdi xapi.Ref, bytes int64) error {
	if p.refuse != nil {
		return p.refuse
	}
	if p.vdiGone {
		return &xapi.Error{Code: "HANDLE_INVALID", Params: []string{"VDI", string(vdi)}}
	}
	p.vdi = bytes
	p.writes = append(p.writes, fmt.Sprintf("%s=%d", vdi, bytes))
	return nil
}

func (p *pool) SRUpdate(context.Context, xapi.Ref) error {
	p.writes = append(p.writes, "SR.update")
	return nil
}

func (p *pool) agent(file string) *Agent {
	return New(Config{HostUUID: "h1", Records: p, Writer: p, Storage: p, StateFile: file,
		Coordinator: func(context.Context) (bool, string, error) { return p.coordinator, "host h2 is coordinator", nil }})
}

// pass is one look with its actions, and gives their outcomes.
func pass(t *testing.T, a *Agent) (acted, finds []string) {
	t.Helper()
	plan, err := agents.Look(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	for _, act := range plan.Actions {
		err := a.Act(t.Context(), act)
		switch {
		case errors.Is(err, agents.ErrMoot):
			acted = append(acted, act.Verb+" moot")
		case err != nil:
			acted = append(acted, act.Verb+" failed: "+err.Error())
		default:
			acted = append(acted, act.Verb)
		}
	}
	_, finds = verbs(plan)
	return acted, finds
}

func TestAgent_GrowthIsWrittenOnceAndThenNothing(t *testing.T) {
	p := newPool()
	a := p.agent("")
	if acted, finds := pass(t, a); len(acted)+len(finds) > 0 {
		t.Fatalf("a right pool: %v %v, want nothing", acted, finds)
	}
	p.allocated = 6 << 20
	acted, _ := pass(t, a)
	if d := cmp.Diff([]string{SetSRSize, SetVDISizes}, acted); d != "" {
		t.Errorf("actions (-want +got):\n%s", d)
	}
	want := []string{fmt.Sprintf("used=%d", 6*gib), fmt.Sprintf("OpaqueRef:vdi1=%d", 6*gib)}
	if d := cmp.Diff(want, p.writes); d != "" {
		t.Errorf("writes (-want +got):\n%s", d)
	}
	if acted, _ := pass(t, a); len(acted) > 0 {
		t.Errorf("second pass: %v, want nothing", acted)
	}
}

func TestAgent_HostLostScanWritesWrongNumbersHostBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool()
		a := p.agent("")
		pass(t, a)
		p.offline = true
		if acted, finds := pass(t, a); len(acted)+len(finds) > 0 {
			t.Errorf("just gone: %v %v, want nothing yet", acted, finds)
		}
		<-time.After(6 * time.Second)
		p.shown.Physical = 50 * gib // SM's scan leaves the offline node out
		acted, finds := pass(t, a)
		if d := cmp.Diff([]string{"warning partial-view", "warning wrong-numbers"}, finds); d != "" || len(acted) > 0 {
			t.Errorf("acted %v; findings (-want +got):\n%s", acted, d)
		}
		p.offline = false
		acted, finds = pass(t, a)
		if d := cmp.Diff([]string{SetSRSize}, acted); d != "" || p.shown.Physical != 100*gib {
			t.Errorf("size %d; actions (-want +got):\n%s", p.shown.Physical, d)
		}
		if d := cmp.Diff([]string{"info wrong-numbers"}, finds); d != "" {
			t.Errorf("findings (-want +got):\n%s", d)
		}
		<-time.After(11 * time.Minute)
		if _, finds = pass(t, a); len(finds) > 0 {
			t.Errorf("ten minutes later: %v, want nothing", finds)
		}
	})
}

func TestAgent_WhatChangesBetweenLookAndWriteStopsIt(t *testing.T) {
	tests := []struct {
		name   string
		change func(p *pool)
	}{
		{"no longer coordinator", func(p *pool) { p.coordinator = false }},
		{"PBD unplugged", func(p *pool) { p.plugged = false }},
		{"SM wrote sizes of its own", func(p *pool) { p.shown.Utilisation = 5 * gib }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPool()
			p.shown.Physical = 1
			a := p.agent("")
			plan, err := agents.Look(t.Context(), a)
			if err != nil || len(plan.Actions) != 1 {
				t.Fatalf("plan %+v, err %v", plan, err)
			}
			tt.change(p)
			if err := a.Act(t.Context(), plan.Actions[0]); !errors.Is(err, agents.ErrMoot) || len(p.writes) > 0 {
				t.Errorf("err %v, writes %v; want moot and none", err, p.writes)
			}
		})
	}
}

func TestAgent_VanishedObjectsAreNoFailure(t *testing.T) {
	p := newPool()
	p.vdi = 1
	a := p.agent("")
	plan, err := agents.Look(t.Context(), a)
	if err != nil || len(plan.Actions) != 1 {
		t.Fatalf("plan %+v, err %v", plan, err)
	}
	p.vdiGone = true
	if err := a.Act(t.Context(), plan.Actions[0]); err != nil {
		t.Errorf("the VDI vanished: %v, want no error", err)
	}
	plan.Actions[0].Target = "gone"
	if err := a.Act(t.Context(), plan.Actions[0]); !errors.Is(err, agents.ErrMoot) {
		t.Errorf("the SR vanished: %v, want moot", err)
	}
}

func TestAgent_RefusedSessionKeyFallsBackToUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool()
		p.refuse = fmt.Errorf("SR.set_physical_size: PERMISSION_DENIED: %w", xapi.ErrNoSMSession)
		p.shown.Physical, p.vdi = 1, 1
		a := p.agent("")
		acted, _ := pass(t, a)
		if d := cmp.Diff([]string{SetSRSize, SetVDISizes + " moot"}, acted); d != "" {
			t.Errorf("actions (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]string{"SR.update"}, p.writes); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
		_, finds := pass(t, a)
		if d := cmp.Diff([]string{"warning no-sm-session"}, finds); d != "" || len(p.writes) != 1 {
			t.Errorf("calls %v; findings (-want +got):\n%s", p.writes, d)
		}
		<-time.After(time.Minute)
		pass(t, a)
		if len(p.writes) != 2 {
			t.Errorf("a minute later: calls %v, want a second SR.update", p.writes)
		}
	})
}

func TestAgent_LINSTORAwayIsAFindingXAPIAwayIsAnError(t *testing.T) {
	p := newPool()
	p.storage = errors.New("GET /v1/nodes: 500 Internal Server Error\n<html>")
	p.shown.Physical = 1
	a := p.agent("")
	acted, finds := pass(t, a)
	if d := cmp.Diff([]string{"warning linstor-unreachable"}, finds); d != "" || len(acted) > 0 {
		t.Errorf("acted %v; findings (-want +got):\n%s", acted, d)
	}
	a.cfg.Records = broken{}
	if _, err := agents.Look(t.Context(), a); err == nil || !strings.Contains(err.Error(), "read SRs from XAPI") {
		t.Errorf("XAPI away: %v, want an error", err)
	}
}

type broken struct{}

func (broken) LinstorSRs(context.Context) ([]SRRecord, error) {
	return nil, errors.New("connection refused")
}

func TestAgent_StateFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		file := filepath.Join(dir, "state", "sr-size.json")
		p := newPool()
		a := p.agent(file)
		for range 40 * 6 { // 40 hours of growth
			pass(t, a)
			p.allocated += 40 << 10
			<-time.After(10 * time.Minute)
		}
		again := p.agent(file)
		_, finds := pass(t, again)
		if d := cmp.Diff([]string{"warning days-until-full"}, finds); d != "" {
			t.Errorf("findings after a restart (-want +got):\n%s", d)
		}
		if err := os.WriteFile(file, []byte("{not json"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, finds := pass(t, p.agent(file)); len(finds) > 0 {
			t.Errorf("findings with a broken state file: %v, want none", finds)
		}
		// A folder that cannot be made must not stop the agent.
		if acted, _ := pass(t, p.agent(filepath.Join(file, "below-a-file", "x.json"))); len(acted) > 0 {
			t.Errorf("acted %v", acted)
		}
		left, err := filepath.Glob(filepath.Join(dir, "state", "*"))
		if err != nil || len(left) != 1 {
			t.Errorf("files left: %v, %v; want the state file alone", left, err)
		}
	})
}

// lagging shows the pool's records as they were when it was frozen.
type lagging struct {
	*pool
	frozen []SRRecord
}

func (l *lagging) freeze() { l.frozen, _ = l.pool.LinstorSRs(context.Background()) }

func (l *lagging) LinstorSRs(ctx context.Context) ([]SRRecord, error) {
	if l.frozen != nil {
		return l.frozen, nil
	}
	return l.pool.LinstorSRs(ctx)
}

func TestAgent_NumbersThatSMJustWroteAreNotUndoneByAnOlderCopy(t *testing.T) {
	p, old := newPool(), newPool() // old is what the mirror of LINSTOR still shows
	a := New(Config{HostUUID: "h1", Records: p, Writer: p, Storage: old, Direct: p,
		Coordinator: func(context.Context) (bool, string, error) { return true, "", nil }})
	pass(t, a)
	// SM attaches the disk: it grows, and SM writes what it read from LINSTOR.
	p.allocated = 6 << 20
	p.shown.Utilisation, p.vdi = 6*gib, 6*gib
	if acted, _ := pass(t, a); len(acted) > 0 || len(p.writes) > 0 {
		t.Errorf("acted %v, wrote %v; want nothing: XAPI is right and the copy is old", acted, p.writes)
	}
	if acted, _ := pass(t, a); len(acted) > 0 || len(p.writes) > 0 { // nothing new in XAPI, and the copy is still old
		t.Errorf("acted %v, wrote %v; want nothing", acted, p.writes)
	}
	// The mirror catches up and then moves by itself: it is believed.
	old.allocated, p.allocated = 7<<20, 7<<20
	if acted, _ := pass(t, a); len(acted) != 2 || p.shown.Utilisation != 7*gib {
		t.Errorf("acted %v, XAPI shows %d; want both written", acted, p.shown.Utilisation)
	}
}

func TestAgent_AMirrorThatDoesNotShowOurWriteYetCausesNoSecondOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool()
		records := &lagging{pool: p}
		a := New(Config{HostUUID: "h1", Records: records, Writer: p, Storage: p,
			Coordinator: func(context.Context) (bool, string, error) { return true, "", nil }})
		pass(t, a)
		p.allocated = 6 << 20
		records.freeze()
		pass(t, a)
		wrote := len(p.writes)
		<-time.After(time.Second)
		if acted, _ := pass(t, a); len(acted) > 0 {
			t.Errorf("a second later: %v, want nothing", acted)
		}
		<-time.After(2 * time.Second)
		if acted, _ := pass(t, a); !slices.Equal(acted, []string{SetSRSize + " moot", SetVDISizes + " moot"}) || len(p.writes) != wrote {
			t.Errorf("with a mirror that lags for long: %v, writes %v; want none: XAPI itself is asked before", acted, p.writes)
		}
		p.shown.Utilisation, p.vdi = 4*gib, 4*gib // somebody really wrote the old values again
		<-time.After(time.Second)
		if pass(t, a); len(p.writes) != 2*wrote {
			t.Errorf("three seconds later: writes %v, want the same again", p.writes)
		}
	})
}

func TestAgent_SomebodyWhoWritesTheOldValueAgainIsNoticedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool()
		a := p.agent("")
		pass(t, a)
		p.allocated = 6 << 20
		pass(t, a)
		p.vdi = 4 * gib // a snapshot made SM write what it had cached; from here it looks like a mirror that lags
		plan, err := agents.Look(t.Context(), a)
		if err != nil || len(plan.Actions) > 0 || plan.Recheck <= 0 || plan.Recheck > writeLag {
			t.Fatalf("plan %+v, %v; want nothing but another look within %s", plan, err, writeLag)
		}
		<-time.After(plan.Recheck)
		if pass(t, a); p.vdi != 6*gib {
			t.Errorf("XAPI shows %d, want %d", p.vdi, 6*gib)
		}
	})
}
