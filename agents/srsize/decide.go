package srsize

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
)

// Verbs of this agent.
const (
	SetSRSize   = "set-sr-size"   // Args: physical_size, physical_utilisation, virtual_allocation in bytes, those that change
	SetVDISizes = "set-vdi-sizes" // Args: VDI uuid -> physical_utilisation in bytes
	UpdateSR    = "update-sr"     // SR.update, when the setters are refused
)

const (
	recheckBlind     = 5 * time.Second  // while LINSTOR is away or the view is partial
	recheckSupporter = 2 * time.Second  // becoming coordinator has no event here; a look costs two small files
	overwrittenFor   = 10 * time.Minute // how long wrong numbers of somebody else stay a finding
	writeSpacing     = 100 * time.Millisecond
	writeSpacingVDI  = 150 * time.Microsecond
)

// decide compares what XAPI shows with what LINSTOR has. It is pure.
func decide(now time.Time, s Snapshot) (p agents.Plan) {
	if !s.Coordinator {
		p.RecheckIn(recheckSupporter)
		return p
	}
	if s.NoSMSession {
		p.Find(agents.Finding{Code: "no-sm-session", Subject: "host/" + s.Here, Severity: agents.Warning,
			Text: "XAPI refuses to let this agent write sizes (" + s.SMSessionWhy + "); SR.update is used, sizes follow within a minute",
			Fix:  "run the agent as root with the local XAPI socket; it tries again when it is restarted"})
	}
	for _, sr := range s.SRs {
		decideSR(now, s, sr, &p)
	}
	return p
}

func decideSR(now time.Time, s Snapshot, sr SR, p *agents.Plan) {
	if sr.Guessed {
		p.RecheckIn(writeLag)
	}
	if f, unusable := unusable(s, sr); unusable {
		p.Find(f)
		p.RecheckIn(recheckBlind)
		return
	}
	findCapacity(now, sr, p)
	if len(sr.Stored.Odd) > 0 {
		p.Find(agents.Finding{Code: "unknown-volumes", Subject: sr.subject(), Severity: agents.Info,
			Text: fmt.Sprintf("%d entries of LINSTOR's key-value store are not understood: %s", len(sr.Stored.Odd), some(sr.Stored.Odd)),
			Fix:  "linstor key-value-store show " + groupOf(sr)})
	}
	if reasons := partial(sr); len(reasons) > 0 {
		findPartial(now, s, sr, reasons, p)
		return
	}
	want, vdis, err := truth(sr)
	if err != nil {
		p.Find(agents.Finding{Code: "partial-view", Subject: sr.subject(), Severity: agents.Warning,
			Text: "sizes cannot be computed, XAPI keeps what it shows: " + err.Error(), Fix: "linstor storage-pool list"})
		p.RecheckIn(recheckBlind)
		return
	}
	findOverwritten(now, sr, want, p)
	if sr.Shown == want && len(vdis) == 0 {
		return
	}
	planWrites(now, s, sr, want, vdis, p)
}

// unusable gives the finding of an SR whose sizes cannot be computed at all.
func unusable(s Snapshot, sr SR) (agents.Finding, bool) {
	f := agents.Finding{Subject: sr.subject(), Severity: agents.Warning}
	group := ""
	if len(sr.Groups) == 1 {
		group = sr.Groups[0]
	}
	switch {
	case !sr.PluggedHere:
		f.Code, f.Text = "pbd-unplugged", "sizes of "+sr.Name+" are not followed: its PBD is not plugged on the coordinator"
		f.Fix = "xe pbd-plug uuid=" + sr.PBDHere
		if sr.PBDHere == "" {
			f.Fix = "xe pbd-create sr-uuid=" + sr.UUID + " host-uuid=" + s.Here + " device-config:group-name=…, then xe pbd-plug"
		}
	case len(sr.Groups) > 1:
		f.Code, f.Text = "sr-with-two-groups", "the PBDs of "+sr.Name+" name different LINSTOR groups: "+some(sr.Groups)
		f.Fix = "xe pbd-list sr-uuid=" + sr.UUID + " params=uuid,host-uuid,device-config, then give all PBDs the same group-name"
	case group == "":
		f.Code, f.Text = "sr-without-group", "the PBDs of "+sr.Name+" name no LINSTOR group"
		f.Fix = "xe pbd-list sr-uuid=" + sr.UUID + " params=uuid,device-config, and re-create the PBD with device-config:group-name"
	case s.LINSTORError != "":
		f.Code, f.Text = "linstor-unreachable", "no LINSTOR controller answers, XAPI keeps the last sizes of "+sr.Name+": "+s.LINSTORError
		f.Fix = s.LINSTORFix
	case !sr.Stored.GroupFound:
		f.Code, f.Text = "group-missing", "LINSTOR has no resource group "+groupOf(sr)+" for "+sr.Name
		f.Fix = "linstor resource-group list"
	case sr.Stored.Redundancy <= 0:
		f.Code, f.Text = "redundancy-zero", fmt.Sprintf("resource group %s has a place count of %d, so the size of %s is undefined", groupOf(sr), sr.Stored.Redundancy, sr.Name)
		f.Fix = "linstor resource-group modify --place-count 2 " + groupOf(sr)
	case len(sr.Stored.Pools) == 0:
		f.Code, f.Text = "group-missing", "LINSTOR has no storage pool "+groupOf(sr)+" for "+sr.Name
		f.Fix = "linstor storage-pool list"
	default:
		return f, false
	}
	return f, true
}

// partial lists, sorted, why the view of LINSTOR does not show the whole SR. Empty: it does.
func partial(sr SR) (reasons []string) {
	for _, pool := range sr.Stored.Pools {
		switch {
		case pool.NodeStatus != "ONLINE":
			reasons = append(reasons, "node "+pool.Node+" is "+strings.ToLower(orUnknown(pool.NodeStatus)))
		case pool.TotalKiB == nil || pool.FreeKiB == nil:
			reasons = append(reasons, "the pool on "+pool.Node+" does not tell its capacity")
		case *pool.TotalKiB < 0 || *pool.FreeKiB < 0:
			reasons = append(reasons, "the pool on "+pool.Node+" tells a negative capacity")
		}
	}
	for _, r := range sr.Stored.Replicas {
		switch {
		case r.AllocatedKiB == nil:
			reasons = append(reasons, r.Resource+" on "+r.Node+" does not tell its allocated size")
		case *r.AllocatedKiB < 0:
			reasons = append(reasons, r.Resource+" on "+r.Node+" tells a negative allocated size")
		}
	}
	slices.Sort(reasons)
	return slices.Compact(reasons)
}

// truth computes what XAPI should show: the SR's sizes, and the VDIs whose utilisation differs. The view must not be partial.
func truth(sr SR) (want Sizes, vdis map[string]int64, err error) {
	capacities := make([]sm.PoolCapacity, 0, len(sr.Stored.Pools))
	for _, p := range sr.Stored.Pools {
		capacities = append(capacities, sm.PoolCapacity{TotalKiB: p.TotalKiB, FreeKiB: p.FreeKiB})
	}
	if want.Physical, err = sm.PhysicalSize(capacities, sr.Stored.Redundancy); err != nil {
		return want, nil, fmt.Errorf("compute physical size: %w", err)
	}
	used, err := sm.PhysicalUtilisation(sr.Stored.Replicas)
	if err != nil {
		return want, nil, fmt.Errorf("compute physical utilisation: %w", err)
	}
	want.Utilisation = used.Bytes
	replicas := map[string][]sm.Replica{}
	for _, r := range sr.Stored.Replicas {
		replicas[r.Resource] = append(replicas[r.Resource], r)
	}
	vdis = map[string]int64{}
	for _, v := range sr.VDIs {
		if v.Managed {
			want.Virtual += v.Virtual
		}
		bytes, known, err := sm.VolumeUtilisation(replicas[sr.Stored.VolumeOf[v.UUID]])
		if err != nil {
			return want, nil, fmt.Errorf("compute size of VDI %s: %w", v.UUID, err)
		}
		// A VDI without a volume, or a volume without a disk yet, is being made or removed: SM writes its first size.
		if known && bytes != v.Utilisation {
			vdis[v.UUID] = bytes
		}
	}
	return want, vdis, nil
}

func planWrites(now time.Time, s Snapshot, sr SR, want Sizes, vdis map[string]int64, p *agents.Plan) {
	spacing := writeSpacing + time.Duration(len(sr.VDIs))*writeSpacingVDI
	last := sr.Past.LastWrite
	if s.NoSMSession {
		spacing, last = s.UpdateSpacing, sr.Past.LastUpdate
	}
	if wait := last.Add(spacing).Sub(now); wait > 0 && !last.IsZero() {
		p.RecheckIn(wait)
		return
	}
	needs := []agents.Need{
		{Of: "pool", Fact: "coordinator", Is: s.Here},
		{Of: sr.subject(), Fact: "pbd-plugged-on", Is: s.Here},
		{Of: sr.subject(), Fact: "sizes", Is: fmt.Sprintf("%d %d %d", sr.Shown.Physical, sr.Shown.Utilisation, sr.Shown.Virtual)},
	}
	if s.NoSMSession {
		if sr.Shown != want {
			p.Add(agents.Action{Verb: UpdateSR, Target: sr.UUID, On: s.Here, Needs: needs, Risk: agents.RiskObserve, Why: why(sr, want)})
		}
		return
	}
	if args := changes(sr.Shown, want); len(args) > 0 {
		p.Add(agents.Action{Verb: SetSRSize, Target: sr.UUID, On: s.Here, Args: args, Needs: needs, Risk: agents.RiskObserve, Why: why(sr, want)})
	}
	if len(vdis) > 0 {
		args := make(map[string]string, len(vdis))
		for uuid, bytes := range vdis {
			args[uuid] = strconv.FormatInt(bytes, 10)
		}
		p.Add(agents.Action{Verb: SetVDISizes, Target: sr.UUID, On: s.Here, Args: args, Needs: needs, Risk: agents.RiskObserve,
			Why: fmt.Sprintf("%s: LINSTOR and XAPI differ in the size of %s", sr.Name, count(len(vdis), "VDI"))})
	}
}

// changes gives the setters to call, by the name of the XAPI field, in decimal bytes.
func changes(shown, want Sizes) map[string]string {
	args := map[string]string{}
	for _, f := range []struct {
		name        string
		shown, want int64
	}{
		{"physical_size", shown.Physical, want.Physical},
		{"physical_utilisation", shown.Utilisation, want.Utilisation},
		{"virtual_allocation", shown.Virtual, want.Virtual},
	} {
		if f.shown != f.want {
			args[f.name] = strconv.FormatInt(f.want, 10)
		}
	}
	return args
}

func why(sr SR, want Sizes) string {
	var parts []string
	for _, f := range []struct {
		name        string
		shown, want int64
	}{
		{"size", sr.Shown.Physical, want.Physical},
		{"used", sr.Shown.Utilisation, want.Utilisation},
		{"allocated", sr.Shown.Virtual, want.Virtual},
	} {
		if f.shown != f.want {
			parts = append(parts, fmt.Sprintf("%s %s -> %s", f.name, human(f.shown), human(f.want)))
		}
	}
	return sr.Name + ": LINSTOR and XAPI differ: " + strings.Join(parts, ", ")
}

func findPartial(now time.Time, s Snapshot, sr SR, reasons []string, p *agents.Plan) {
	p.RecheckIn(recheckBlind)
	if left := s.GracePeriod - now.Sub(sr.Past.PartialSince); left > 0 {
		p.RecheckIn(left) // a volume being made or a satellite reconnecting looks like this for a moment
		return
	}
	kept := "XAPI keeps what it shows"
	if g := sr.Past.Good; g != nil {
		kept = fmt.Sprintf("the last good values are kept (size %s, used %s)", human(g.Physical), human(g.Utilisation))
	}
	p.Find(agents.Finding{Code: "partial-view", Subject: sr.subject(), Severity: agents.Warning,
		Text: fmt.Sprintf("LINSTOR does not show all of %s, %s: %s", sr.Name, kept, some(reasons)),
		Fix:  "linstor node list; linstor storage-pool list; bring the node back, or if it is gone for good: linstor node lost NODE"})
	if g := sr.Past.Good; g != nil && sr.Shown.Physical != g.Physical {
		p.Find(agents.Finding{Code: "wrong-numbers", Subject: sr.subject(), Severity: agents.Warning,
			Text: fmt.Sprintf("%s shows size %s, used %s, written by a scan while LINSTOR's view was partial; last good were %s and %s",
				sr.Name, human(sr.Shown.Physical), human(sr.Shown.Utilisation), human(g.Physical), human(g.Utilisation)),
			Fix: "nothing: it is corrected as soon as LINSTOR shows all nodes again"})
	}
}

// findOverwritten tells that somebody else wrote numbers that are not true: they are neither what was last true nor what is true now.
func findOverwritten(now time.Time, sr SR, want Sizes, p *agents.Plan) {
	if at := sr.Past.Overwritten; !at.IsZero() && now.Sub(at) < overwrittenFor {
		p.Find(agents.Finding{Code: "wrong-numbers", Subject: sr.subject(), Severity: agents.Info,
			Text: fmt.Sprintf("somebody else, most likely a scan, wrote sizes of %s at %s that were not true; corrected to size %s, used %s",
				sr.Name, at.UTC().Format(time.RFC3339), human(want.Physical), human(want.Utilisation)),
			Fix: "stop the periodic scan: systemctl disable --now linstor-monitor on every host"})
		p.RecheckIn(overwrittenFor - now.Sub(at))
	}
}

func (sr SR) subject() string { return "sr/" + sr.UUID }

// groupOf gives the SR's group as LINSTOR calls it.
func groupOf(sr SR) string {
	if len(sr.Groups) != 1 {
		return ""
	}
	return sm.GroupName(sr.Groups[0])
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// some lists at most five entries, and how many more there are.
func some(list []string) string {
	const most = 5
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}

// count is "1 VDI", "2 VDIs".
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// human prints bytes with a binary unit.
func human(bytes int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	v, i := float64(bytes), 0
	for (v >= 1024 || v <= -1024) && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%.2f %s", v, units[i])
}
