package srsize

import (
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
)

var noon = time.Date(2026, 3, 19, 12, 0, 0, 0, time.UTC)

func kib(gibs float64) *int64 { v := int64(gibs * (1 << 20)); return &v }

// healthy is a pool of three hosts with 100 GiB each at redundancy 2 and two disks, whose XAPI values are right.
func healthy() Snapshot {
	sr := SR{UUID: "sr1", Name: "XOSTOR", PBDHere: "pbd1", PluggedHere: true, Groups: []string{"linstor_group/thin_device"},
		Stored: Stored{GroupFound: true, Redundancy: 2,
			Pools: []Pool{
				{Node: "a", NodeStatus: "ONLINE", Thin: true, TotalKiB: kib(100), FreeKiB: kib(60)},
				{Node: "b", NodeStatus: "ONLINE", Thin: true, TotalKiB: kib(120), FreeKiB: kib(90)},
				{Node: "c", NodeStatus: "ONLINE", Thin: true, TotalKiB: kib(100), FreeKiB: kib(70)},
			},
			Replicas: []sm.Replica{
				{Resource: "xcp-persistent-database", Node: "a", AllocatedKiB: kib(1)}, {Resource: "xcp-persistent-database", Node: "b", AllocatedKiB: kib(1)},
				{Resource: "xcp-volume-1", Node: "a", AllocatedKiB: kib(10)}, {Resource: "xcp-volume-1", Node: "b", AllocatedKiB: kib(12)},
				{Resource: "xcp-volume-2", Node: "b", AllocatedKiB: kib(3)}, {Resource: "xcp-volume-2", Node: "c", AllocatedKiB: kib(3)},
			},
			VolumeOf: map[string]string{"vdi1": "xcp-volume-1", "vdi2": "xcp-volume-2"},
		},
		VDIs: []VDI{
			{UUID: "vdi1", Virtual: 40 * gib, Utilisation: 12 * gib, Managed: true},
			{UUID: "vdi2", Virtual: 20 * gib, Utilisation: 3 * gib, Managed: false},
		},
		// 100 GiB x 3 / 2; 1 + 12 + 3; vdi2 is hidden.
		Shown: Sizes{Physical: 150 * gib, Utilisation: 16 * gib, Virtual: 40 * gib},
	}
	return Snapshot{Here: "h1", Coordinator: true, SRs: []SR{sr}, GracePeriod: 5 * time.Second, UpdateSpacing: time.Minute}
}

// verbs gives each action as "verb key=value ...", findings as "severity code".
func verbs(p agents.Plan) (acts, finds []string) {
	for _, a := range p.Actions {
		var args []string
		for k, v := range a.Args {
			args = append(args, k+"="+v)
		}
		slices.Sort(args)
		acts = append(acts, strings.TrimSpace(a.Verb+" "+strings.Join(args, " ")))
	}
	for _, f := range p.Findings {
		if f.Code != "capacity" {
			finds = append(finds, string(f.Severity)+" "+f.Code)
		}
	}
	return acts, finds
}

func TestDecide(t *testing.T) {
	neg := int64(-1)
	tests := []struct {
		name   string
		change func(s *Snapshot, sr *SR)
		acts   []string
		finds  []string
	}{
		{"all is right: nothing is written", func(*Snapshot, *SR) {}, nil, nil},
		{"not the coordinator", func(s *Snapshot, sr *SR) { s.Coordinator = false; sr.Shown = Sizes{} }, nil, nil},
		{"a disk was added to every host", func(_ *Snapshot, sr *SR) {
			for i := range sr.Stored.Pools {
				sr.Stored.Pools[i].TotalKiB = kib(200)
			}
		}, []string{"set-sr-size physical_size=322122547200"}, nil},
		{"a thin disk grew on one replica", func(_ *Snapshot, sr *SR) { sr.Stored.Replicas[2].AllocatedKiB = kib(13) },
			[]string{"set-sr-size physical_utilisation=18253611008", "set-vdi-sizes vdi1=13958643712"}, nil},
		{"it grew on the smaller replica, the largest counts", func(_ *Snapshot, sr *SR) { sr.Stored.Replicas[2].AllocatedKiB = kib(11) }, nil, nil},
		{"a disk is hidden by a snapshot", func(_ *Snapshot, sr *SR) { sr.VDIs[0].Managed = false },
			[]string{"set-sr-size virtual_allocation=0"}, nil},
		{"a VDI that is being made has no volume yet", func(_ *Snapshot, sr *SR) {
			sr.VDIs = append(sr.VDIs, VDI{UUID: "vdi3", Virtual: 5 * gib, Managed: true})
		}, []string{"set-sr-size virtual_allocation=48318382080"}, nil},
		{"an offline node: nothing is written, and it is said", func(_ *Snapshot, sr *SR) {
			sr.Stored.Pools[2] = Pool{Node: "c", NodeStatus: "OFFLINE", Thin: true}
			sr.Past.PartialSince = noon.Add(-time.Minute)
			sr.Shown.Virtual = 1
		}, nil, []string{"warning partial-view"}},
		{"offline for a moment only: nothing is written, nothing said", func(_ *Snapshot, sr *SR) {
			sr.Stored.Pools[2] = Pool{Node: "c", NodeStatus: "OFFLINE", Thin: true}
			sr.Past.PartialSince = noon.Add(-time.Second)
			sr.Shown.Virtual = 1
		}, nil, nil},
		{"a scan wrote numbers without the offline node", func(_ *Snapshot, sr *SR) {
			sr.Stored.Pools[2] = Pool{Node: "c", NodeStatus: "OFFLINE", Thin: true}
			sr.Past.PartialSince = noon.Add(-time.Minute)
			sr.Past.Good = &Sizes{Physical: 150 * gib, Utilisation: 16 * gib, Virtual: 40 * gib}
			sr.Shown.Physical = 100 * gib
		}, nil, []string{"warning partial-view", "warning wrong-numbers"}},
		{"back again: they are corrected", func(_ *Snapshot, sr *SR) {
			sr.Past.Overwritten = noon
			sr.Shown.Physical = 100 * gib
		}, []string{"set-sr-size physical_size=161061273600"}, []string{"info wrong-numbers"}},
		{"a negative allocated size", func(_ *Snapshot, sr *SR) {
			sr.Stored.Replicas[3].AllocatedKiB = &neg
			sr.Past.PartialSince = noon.Add(-time.Minute)
			sr.Shown.Utilisation = 1
		}, nil, []string{"warning partial-view"}},
		{"a replica that does not tell its size", func(_ *Snapshot, sr *SR) {
			sr.Stored.Replicas[3].AllocatedKiB = nil
			sr.Past.PartialSince = noon.Add(-time.Minute)
			sr.Shown.Utilisation = 1
		}, nil, []string{"warning partial-view"}},
		{"an online node that does not tell its capacity", func(_ *Snapshot, sr *SR) {
			sr.Stored.Pools[0].FreeKiB = nil
			sr.Past.PartialSince = noon.Add(-time.Minute)
			sr.Shown.Physical = 1
		}, nil, []string{"warning partial-view"}},
		{"no controller", func(s *Snapshot, sr *SR) {
			s.LINSTORError, s.LINSTORFix = "connection refused", "start it"
			sr.Stored = Stored{}
			sr.Shown = Sizes{}
		},
			nil, []string{"warning linstor-unreachable"}},
		{"PBD not plugged here", func(_ *Snapshot, sr *SR) { sr.PluggedHere = false; sr.Shown = Sizes{} }, nil, []string{"warning pbd-unplugged"}},
		{"two groups", func(_ *Snapshot, sr *SR) { sr.Groups = []string{"a", "b"}; sr.Shown = Sizes{} }, nil, []string{"warning sr-with-two-groups"}},
		{"no group", func(_ *Snapshot, sr *SR) { sr.Groups = []string{""}; sr.Shown = Sizes{} }, nil, []string{"warning sr-without-group"}},
		{"no PBD at all", func(_ *Snapshot, sr *SR) { sr.Groups, sr.PBDHere, sr.PluggedHere = nil, "", false; sr.Shown = Sizes{} },
			nil, []string{"warning pbd-unplugged"}},
		{"LINSTOR does not know the group", func(_ *Snapshot, sr *SR) { sr.Stored = Stored{}; sr.Shown = Sizes{} }, nil, []string{"warning group-missing"}},
		{"LINSTOR has no pool of it", func(_ *Snapshot, sr *SR) { sr.Stored.Pools = nil; sr.Shown = Sizes{} }, nil, []string{"warning group-missing"}},
		{"redundancy 0", func(_ *Snapshot, sr *SR) { sr.Stored.Redundancy = 0; sr.Shown = Sizes{} }, nil, []string{"warning redundancy-zero"}},
		{"written a moment ago: wait", func(_ *Snapshot, sr *SR) {
			sr.Shown.Physical, sr.Past.LastWrite = 1, noon.Add(-100*time.Millisecond)
		}, nil, nil},
		{"no session key: SR.update", func(s *Snapshot, sr *SR) { s.NoSMSession = true; sr.Shown.Physical, sr.VDIs[0].Utilisation = 1, 1 },
			[]string{"update-sr"}, []string{"warning no-sm-session"}},
		{"no session key, updated a moment ago", func(s *Snapshot, sr *SR) {
			s.NoSMSession, sr.Shown.Physical, sr.Past.LastUpdate = true, 1, noon.Add(-time.Second)
		}, nil, []string{"warning no-sm-session"}},
		{"a thin pool at 85 %", func(_ *Snapshot, sr *SR) { sr.Stored.Pools[1].FreeKiB = kib(18) }, nil, []string{"warning thin-pool-filling"}},
		{"a thin pool at 95 %", func(_ *Snapshot, sr *SR) { sr.Stored.Pools[1].FreeKiB = kib(6) }, nil, []string{"critical thin-pool-filling"}},
		{"a thick pool at 95 % is in order", func(_ *Snapshot, sr *SR) { sr.Stored.Pools[1].FreeKiB, sr.Stored.Pools[1].Thin = kib(6), false }, nil, nil},
		{"79 % after it was raised", func(_ *Snapshot, sr *SR) {
			sr.Stored.Pools[0].FreeKiB, sr.Stored.Pools[0].WasFilling = kib(21), "warning"
		},
			nil, []string{"warning thin-pool-filling"}},
		{"89 % after it was critical", func(_ *Snapshot, sr *SR) {
			sr.Stored.Pools[0].FreeKiB, sr.Stored.Pools[0].WasFilling = kib(11), "critical"
		},
			nil, []string{"critical thin-pool-filling"}},
		{"odd KV entries", func(_ *Snapshot, sr *SR) { sr.Stored.Odd = []string{"xcp/volume/x/not-exists: not a number"} }, nil, []string{"info unknown-volumes"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := healthy()
			tt.change(&s, &s.SRs[0])
			p := decide(noon, s)
			acts, finds := verbs(p)
			if d := cmp.Diff(tt.acts, acts); d != "" {
				t.Errorf("actions (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.finds, finds); d != "" {
				t.Errorf("findings (-want +got):\n%s", d)
			}
			for _, a := range p.Actions {
				if a.Why == "" || len(a.Needs) != 3 || a.Target != "sr1" || a.On != "h1" {
					t.Errorf("action %+v must say why, on which host, and what it needs", a)
				}
			}
			for _, f := range p.Findings {
				if f.Text == "" || strings.Contains(f.Text, "\n") || (f.Fix == "" && f.Code != "capacity") {
					t.Errorf("finding %+v must be one line and say what to do", f)
				}
			}
			if len(tt.acts) == 0 && (len(tt.finds) > 0 && strings.HasPrefix(tt.finds[0], "warning partial")) && p.Recheck == 0 {
				t.Error("a partial view must be looked at again soon")
			}
		})
	}
}

// drawSnapshot makes any snapshot, healthy or not.
func drawSnapshot(t *rapid.T) Snapshot {
	size := func(label string) *int64 {
		v := rapid.Int64Range(-2, 1<<40).Draw(t, label)
		if v == -2 {
			return nil
		}
		return &v
	}
	s := healthy()
	s.Coordinator = rapid.Bool().Draw(t, "coordinator")
	s.NoSMSession = rapid.Bool().Draw(t, "no session")
	if rapid.Bool().Draw(t, "away") {
		s.LINSTORError = "away"
	}
	sr := &s.SRs[0]
	sr.PluggedHere = rapid.Bool().Draw(t, "plugged")
	sr.Stored.Redundancy = rapid.IntRange(0, 4).Draw(t, "redundancy")
	sr.Stored.Pools, sr.Stored.Replicas = nil, nil
	for i := range rapid.IntRange(0, 5).Draw(t, "pools") {
		sr.Stored.Pools = append(sr.Stored.Pools, Pool{Node: fmt.Sprintf("n%d", i), Thin: true, TotalKiB: size("total"), FreeKiB: size("free"),
			NodeStatus: rapid.SampledFrom([]string{"ONLINE", "ONLINE", "ONLINE", "OFFLINE", ""}).Draw(t, "status")})
	}
	for i := range rapid.IntRange(0, 6).Draw(t, "replicas") {
		sr.Stored.Replicas = append(sr.Stored.Replicas, sm.Replica{Resource: fmt.Sprintf("xcp-volume-%d", i/2), Node: fmt.Sprintf("n%d", i%2), AllocatedKiB: size("allocated")})
	}
	sr.Past.PartialSince = noon.Add(-time.Duration(rapid.IntRange(0, 10).Draw(t, "partial for")) * time.Second)
	return s
}

func TestDecide_Properties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSnapshot(t)
		p := decide(noon, s)
		sr := s.SRs[0]
		whole := s.Coordinator && s.LINSTORError == "" && sr.PluggedHere && sr.Stored.Redundancy > 0 && len(sr.Stored.Pools) > 0 && len(partial(sr)) == 0
		if !whole && len(p.Actions) > 0 {
			t.Fatalf("wrote from a partial view: %+v", p.Actions)
		}
		// Order of input does not matter.
		rng := rand.New(rand.NewSource(1))
		shuffled := s
		shuffled.SRs = slices.Clone(s.SRs)
		st := &shuffled.SRs[0].Stored
		st.Pools, st.Replicas = slices.Clone(st.Pools), slices.Clone(st.Replicas)
		rng.Shuffle(len(st.Replicas), func(i, j int) { st.Replicas[i], st.Replicas[j] = st.Replicas[j], st.Replicas[i] })
		if d := cmp.Diff(p.Actions, decide(noon, shuffled).Actions); d != "" {
			t.Fatalf("order of replicas matters:\n%s", d)
		}
		// A plan that was carried out is not planned again.
		if s.NoSMSession || !whole {
			return
		}
		want, vdis, err := truth(sr)
		if err != nil {
			return
		}
		after := s
		after.SRs = slices.Clone(s.SRs)
		after.SRs[0].Shown = want
		after.SRs[0].VDIs = slices.Clone(sr.VDIs)
		for i, v := range after.SRs[0].VDIs {
			if bytes, ok := vdis[v.UUID]; ok {
				after.SRs[0].VDIs[i].Utilisation = bytes
			}
		}
		if again := decide(noon, after); len(again.Actions) > 0 {
			t.Fatalf("does not converge: %+v", again.Actions)
		}
	})
}

func TestVolumeBytes(t *testing.T) {
	// Computed with the driver's own functions (reference of the SM driver, section on VHD and DRBD sizes).
	for virtual, want := range map[int64]int64{
		4 * mib: 8531968, gib: 1080168448, 10 * gib: 10762719232, 100 * gib: 107588227072, 1 << 40: 1101663440896, 2040 * gib: 2194715840512,
	} {
		if got := volumeBytes(virtual); got != want {
			t.Errorf("volume of a VHD of %d bytes: %d, want %d", virtual, got, want)
		}
	}
}

func TestLargestVDI(t *testing.T) {
	online := func(gibs ...float64) (ps []Pool) {
		for i, g := range gibs {
			ps = append(ps, Pool{Node: fmt.Sprint(i), NodeStatus: "ONLINE", FreeKiB: kib(g)})
		}
		return ps
	}
	tests := []struct {
		name       string
		pools      []Pool
		redundancy int
		least      int64
		most       int64
	}{
		{"second largest counts at redundancy 2", online(50, 100, 10), 2, 49 * gib, 50 * gib},
		{"too few pools", online(50), 2, 0, 0},
		{"no redundancy", online(50), 0, 0, 0},
		{"VHD's own limit", online(9000, 9000), 2, 2040 * gib, 2040 * gib},
		{"no room", online(0.001, 0.001), 2, 0, 0},
		{"an offline pool does not count", append(online(50), Pool{Node: "x", NodeStatus: "OFFLINE", FreeKiB: kib(50)}), 2, 0, 0},
	}
	for _, tt := range tests {
		if got := largestVDI(tt.pools, tt.redundancy); got < tt.least || got > tt.most {
			t.Errorf("%s: %s, want %s to %s", tt.name, human(got), human(tt.least), human(tt.most))
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		free := rapid.Int64Range(0, 1<<32).Draw(t, "free KiB")
		v := largestVDI([]Pool{{NodeStatus: "ONLINE", FreeKiB: &free}}, 1)
		if v > 0 && volumeBytes(v) > free*1024 {
			t.Fatalf("a VDI of %d bytes does not fit into %d KiB", v, free)
		}
	})
}

func TestDaysUntilFull(t *testing.T) {
	trend := func(span time.Duration, perDay int64, n int) (out []Sample) {
		for i := range n {
			at := noon.Add(-span + span*time.Duration(i)/time.Duration(n-1))
			out = append(out, Sample{At: at, Used: 10*gib + int64(float64(perDay)*at.Sub(noon.Add(-span)).Hours()/24)})
		}
		return out
	}
	tests := []struct {
		name  string
		trend []Sample
		want  string // severity of days-until-full, "" for none
	}{
		{"fast growth", trend(3*24*time.Hour, 30*gib, 50), "critical"},
		{"slow growth", trend(3*24*time.Hour, 7*gib, 50), "warning"},
		{"hardly any growth", trend(3*24*time.Hour, gib/10, 50), ""},
		{"shrinking", trend(3*24*time.Hour, -gib, 50), ""},
		{"constant", trend(3*24*time.Hour, 0, 50), ""},
		{"too short", trend(12*time.Hour, 30*gib, 50), ""},
		{"too few samples", trend(3*24*time.Hour, 30*gib, 3), ""},
		{"none", nil, ""},
	}
	for _, tt := range tests {
		s := healthy()
		s.SRs[0].Past = Past{Trend: tt.trend, Good: &Sizes{Physical: 150 * gib, Utilisation: 16 * gib}}
		_, finds := verbs(decide(noon, s))
		got := ""
		for _, f := range finds {
			if sev, ok := strings.CutSuffix(f, " days-until-full"); ok {
				got = sev
			}
		}
		if got != tt.want {
			t.Errorf("%s: finding %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestAddSample(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var trend []Sample
		now := noon
		for range rapid.IntRange(0, 200).Draw(t, "n") {
			// The clock may also jump back.
			now = now.Add(time.Duration(rapid.Int64Range(-int64(2*time.Hour), int64(24*time.Hour)).Draw(t, "step")))
			trend = addSample(trend, now, rapid.Int64().Draw(t, "used"))
			for i, s := range trend {
				if s.At.After(now) || now.Sub(s.At) > sampleKeep || (i > 0 && s.At.Sub(trend[i-1].At) < sampleEvery) {
					t.Fatalf("trend at %s is out of order, too old or too dense: %v", now, trend)
				}
			}
		}
	})
}
