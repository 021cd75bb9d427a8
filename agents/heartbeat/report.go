package heartbeat

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// Xhad is what is known of xhad's times.
type Xhad struct {
	statefile.Timeouts
	Source   string           `json:"source"` // The file, or what was taken instead.
	Findings []agents.Finding `json:"-"`
}

// Report is the state of one export on one host, for `status`.
type Report struct {
	Export       string                `json:"export"`
	Host         string                `json:"host"`
	Owner        string                `json:"owner"`         // Who last answered; "" if nobody ever did.
	OwnerSince   time.Time             `json:"owner_since"`   // When it first answered this host.
	OwnerAddress string                `json:"owner_address"` // "" while there is no connection.
	Fallback     bool                  `json:"fallback"`      // The connection runs over the management network.
	Heard        time.Time             `json:"heard"`         // When the owner last answered this host.
	Owns         bool                  `json:"owns"`
	Since        time.Time             `json:"since"` // When this host became the owner.
	Epoch        uint64                `json:"epoch"` // Of this host's ownership.
	Outage       time.Time             `json:"outage"`
	Stats        Stats                 `json:"stats"`
	Xhad         Xhad                  `json:"xhad"`
	Timing       Timing                `json:"timing"`
	Hosts        map[string]HostWrites `json:"hosts,omitempty"` // Only the owner knows.
	Cut          []string              `json:"cut,omitempty"`   // Hosts whose DRBD link this host has cut.
	Quorum       *bool                 `json:"quorum,omitempty"`
	Policy       *Policy               `json:"policy,omitempty"`
	Barred       string                `json:"barred,omitempty"`
	LastError    string                `json:"last_error,omitempty"`
	Doing        string                `json:"doing,omitempty"`
	Findings     []agents.Finding      `json:"findings"`
	Passes       uint64                `json:"passes"`     // Grows while the daemon lives: the watchdog's food.
	Goroutines   int                   `json:"goroutines"` // Of the process.
}

// Report describes the daemon.
func (d *Daemon) Report() Report {
	d.front.mu.Lock()
	f := d.front
	r := Report{Export: d.c.Export, Host: d.c.Host, Owner: f.owner, OwnerSince: f.since, Heard: f.heard, Stats: f.stats}
	r.Outage, _ = f.f.Outage()
	var exported uint64
	if f.link != nil {
		r.OwnerAddress, r.Fallback, exported = f.link.addr, f.link.fallback, f.link.client.Info().Size
	}
	d.front.mu.Unlock()
	d.mu.Lock()
	w := d.owner
	r.Timing, r.Xhad, r.Policy = d.c.Timing, d.c.Xhad, d.policy
	r.LastError, r.Doing, r.Passes = d.lastErr, d.lastWhy, d.passes
	if d.view.Barred != neverOwns {
		r.Barred = d.view.Barred
	}
	if d.drbd != nil {
		r.Quorum = d.drbd.Quorum
	}
	r.Goroutines = runtime.NumGoroutine()
	r.Cut = slices.Sorted(maps.Keys(d.view.Cut))
	r.Since = d.since
	r.Findings = append(append([]agents.Finding{}, d.c.Xhad.Findings...), d.deviceFindings()...)
	d.mu.Unlock()
	if w != nil {
		w.mu.Lock()
		r.Owns, r.Epoch, r.Hosts = !w.o.Left(), w.record.Epoch, maps.Clone(w.hosts)
		w.mu.Unlock()
	}
	if !r.Owns {
		r.Since = time.Time{}
	}
	if exported > 0 && exported < uint64(d.c.Size) {
		r.Findings = append(r.Findings, agents.Finding{Code: "heartbeat-device-short", Subject: d.c.Export, Severity: agents.Warning,
			Text: fmt.Sprintf("the local device has %d bytes, the owner's %d: requests behind them fail", d.c.Size, exported)})
	}
	if r.Fallback {
		r.Findings = append(r.Findings, agents.Finding{Code: "heartbeat-management-network", Subject: d.c.Export, Severity: agents.Warning,
			Text: "requests go over the management network: xhad's two paths are one",
			Fix:  "check the storage network of " + r.Host + " and " + r.Owner + ", and that its firewall lets the port of " + r.OwnerAddress + " through"})
	}
	return r
}

// deviceFindings is what is wrong with the device and DRBD's settings for it. The caller holds mu.
func (d *Daemon) deviceFindings() []agents.Finding {
	var out []agents.Finding
	find := func(s agents.Severity, code, text, fix string) {
		out = append(out, agents.Finding{Code: code, Subject: d.c.Export, Severity: s, Text: text, Fix: fix})
	}
	const option = "linstor resource-definition drbd-options "
	if p := d.policy; p != nil {
		if barred := p.Barred(); barred != "" {
			find(agents.Critical, "heartbeat-suspend-io", "the device is not served: "+barred, option+"--on-no-quorum io-error "+d.c.Export)
		}
		if p.Quorum == "off" {
			find(agents.Critical, "heartbeat-quorum-off", "DRBD's quorum is off: two hosts that lose each other can both write the statefile", option+"--quorum majority "+d.c.Export)
		}
	} else if d.view.Barred == policyUnknown {
		find(agents.Warning, "heartbeat-policy-unknown", "the device is not served: "+policyUnknown+": "+d.lastErr, "drbdsetup show "+d.c.Export+" --show-defaults --json")
	}
	if s := d.drbd; s != nil {
		voters, disks := 1, 1
		if s.Disk == DiskDiskless {
			disks = 0
		}
		for _, disk := range s.Peers {
			voters++
			if disk != DiskDiskless { // Unknown may be one.
				disks++
			}
		}
		if voters < 3 {
			find(agents.Warning, "heartbeat-few-voters", fmt.Sprintf("%d hosts vote on the device: the loss of one can end it for all", voters),
				"linstor resource create --drbd-diskless HOST "+d.c.Export)
		} else if disks < 2 {
			find(agents.Warning, "heartbeat-one-replica", "the device has one replica: the loss of its host ends it for all", "linstor resource-definition auto-place --place-count 2 "+d.c.Export)
		}
	}
	var holder *HolderError
	switch err := d.openErr; {
	case err == nil, errors.Is(err, ErrHeld):
	case errors.As(err, &holder):
		find(agents.Critical, "heartbeat-device-taken", err.Error(), fmt.Sprintf("detach the statefile there (disable HA) or stop process %d, then enable HA again", holder.PID))
	case errors.Is(err, ErrTooSmall):
		find(agents.Critical, "heartbeat-device-small", err.Error(), "disable HA, destroy this volume and enable HA again: XAPI makes it at least 4 MiB")
	default:
		find(agents.Critical, "heartbeat-device", "this host cannot own: "+err.Error(), "drbdsetup status "+d.c.Export)
	}
	return out
}

// HolderError is a program of another make that has the device open on this host: DRBD would let both in.
type HolderError struct {
	PID     int
	Command string
	Disk    string
}

func (e *HolderError) Error() string {
	return fmt.Sprintf("process %d (%s) holds %s: stop it first", e.PID, e.Command, e.Disk)
}

// Unwell says whether somebody has to act: an outage now, or a finding that is Critical.
func (r Report) Unwell() bool {
	return !r.Outage.IsZero() || slices.ContainsFunc(r.Findings, func(f agents.Finding) bool { return f.Severity == agents.Critical })
}

// margins are how close this host came to each time-out.
func (r Report) margins(now time.Time) []margin {
	outage := r.Stats.LongestOutage
	if !r.Outage.IsZero() && !r.Heard.IsZero() {
		outage = max(outage, now.Sub(r.Outage))
	}
	x := r.Xhad
	out := []margin{
		{"hold", r.Timing.Hold, outage, "longest outage; beyond, requests fail until an owner answers"},
		{"kernel time-out", r.Timing.KernelTimeout(), r.Stats.Longest, "longest request; beyond, the kernel gives the socket up"},
		{"XAPI's warning", x.Unnoticed(), outage, "longest outage; T2/2 - 2(t2 + 1 s)"},
		{"tolerated outage", x.Tolerated(), outage, "longest outage; T2 - 2(t2 + 1 s): beyond, with a host missing, all others fence themselves"},
		{"watchdog Ws", x.StateFileWatchdog, r.Stats.Longest, "longest request; a cycle that takes longer resets the host"},
	}
	for _, host := range slices.Sorted(maps.Keys(r.Hosts)) {
		out = append(out, margin{"T2 of " + host, x.StateFileTimeout, max(r.Hosts[host].LongestGap, now.Sub(r.Hosts[host].Last)), "longest time between its writes here, or since the last"})
	}
	return out
}

type margin struct {
	name         string
	limit, worst time.Duration
	what         string
}

// Print writes the report for people; now is when it was made.
func (r Report) Print(w io.Writer, now time.Time) {
	fmt.Fprintf(w, "%s on %s\n", r.Export, r.Host)
	r.printOwner(w, now)
	s := r.Stats
	fmt.Fprintf(w, "  requests  %d, %d failed; %d outages; longest request %s\n", s.Requests, s.Failed, s.Outages, short(s.Longest))
	for i, n := range s.Buckets {
		if n == 0 {
			continue
		}
		bound := "longer"
		if i < len(LatencyBounds) {
			bound = "up to " + LatencyBounds[i].String()
		}
		fmt.Fprintf(w, "            %-12s %10d  %5.1f %%\n", bound, n, 100*float64(n)/float64(max(1, s.Requests-s.Failed)))
	}
	x := r.Xhad
	fmt.Fprintf(w, "  xhad      T1 %v, T2 %v, t1 %v, t2 %v, Wh %v, Ws %v (%s)\n", x.HeartbeatTimeout, x.StateFileTimeout, x.HeartbeatInterval, x.StateFileInterval,
		x.HeartbeatWatchdog, x.StateFileWatchdog, x.Source)
	fmt.Fprintf(w, "  ours      owner suspected after %v, evicted when frozen for %v; its crash costs up to %v\n", r.Timing.Suspect, r.Timing.Evict, r.Timing.Failover())
	fmt.Fprintln(w, "  how close each time-out came:")
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, m := range r.margins(now) {
		share := "over"
		if m.limit > 0 && m.worst <= m.limit {
			share = fmt.Sprintf("%.0f %%", 100*m.worst.Seconds()/m.limit.Seconds())
		}
		fmt.Fprintf(table, "    %s\t%s of %v\t%s\t%s\n", m.name, short(m.worst), m.limit, share, m.what)
	}
	table.Flush()
	for _, host := range slices.Sorted(maps.Keys(r.Hosts)) {
		fmt.Fprintf(w, "  %s wrote %s, %d times\n", host, ago(now, r.Hosts[host].Last), r.Hosts[host].Writes)
	}
	for _, host := range r.Cut {
		fmt.Fprintf(w, "  the DRBD link to %s is cut by this host: its user space is frozen\n", host)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(w, "  %s: %s\n", f.Severity, f.Text)
		if f.Fix != "" {
			fmt.Fprintf(w, "    next: %s\n", f.Fix)
		}
	}
	if r.LastError != "" {
		fmt.Fprintf(w, "  last error: %s\n", r.LastError)
	}
}

func (r Report) printOwner(w io.Writer, now time.Time) {
	switch {
	case r.Owns:
		fmt.Fprintf(w, "  owner     this host, since %s (%s), epoch %d\n", stamp(r.Since), ago(now, r.Since), r.Epoch)
	case r.Owner == "":
		fmt.Fprintln(w, "  owner     unknown: none has answered this host yet")
	default:
		fmt.Fprintf(w, "  owner     %s, since %s (%s) as this host saw it; last heard %s\n", r.Owner, stamp(r.OwnerSince), ago(now, r.OwnerSince), ago(now, r.Heard))
	}
	if r.OwnerAddress != "" {
		network := "storage network"
		if r.Fallback {
			network = "MANAGEMENT NETWORK"
		}
		fmt.Fprintf(w, "  path      %s, %s\n", r.OwnerAddress, network)
	}
	if !r.Outage.IsZero() {
		fmt.Fprintf(w, "  OUTAGE    since %s; requests fail after %v; %s\n", ago(now, r.Outage), r.Timing.Hold, r.Doing)
	}
	if r.Barred != "" {
		fmt.Fprintf(w, "  this host does not try to own: %s\n", r.Barred)
	}
}

func stamp(t time.Time) string { return t.Format(time.RFC3339) }

func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return short(now.Sub(t)) + " ago"
}

// short rounds to three digits or so.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < 10*time.Second:
		return d.Round(time.Millisecond).String()
	default:
		return d.Round(time.Second).String()
	}
}
