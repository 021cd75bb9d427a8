package heartbeat

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
)

// Report is the state of one export on one host, for `status`.
type Report struct {
	Export    string               `json:"export"`
	Host      string               `json:"host"`
	Owner     string               `json:"owner"`
	Owns      bool                 `json:"owns"`
	Since     time.Time            `json:"since"` // When this host became the owner.
	Epoch     uint64               `json:"epoch"`
	Heard     time.Time            `json:"heard"`  // When the owner last answered this host.
	Outage    time.Time            `json:"outage"` // Zero: there is none.
	Stats     Stats                `json:"stats"`
	Hold      time.Duration        `json:"hold_ns"`
	Attempt   time.Duration        `json:"attempt_ns"`
	LastWrite map[string]time.Time `json:"last_write,omitempty"` // By host; only the owner knows.
	Cut       []string             `json:"cut,omitempty"`        // Hosts whose DRBD link this host has cut.
	Barred    string               `json:"barred,omitempty"`
	LastError string               `json:"last_error,omitempty"`
	Doing     string               `json:"doing,omitempty"`
	Findings  []agents.Finding     `json:"findings,omitempty"`
	Passes    uint64               `json:"passes"` // Grows while the daemon lives: the watchdog's food.
}

// Report describes the daemon.
func (d *Daemon) Report() Report {
	d.front.mu.Lock()
	r := Report{Export: d.c.Export, Host: d.c.Host, Owner: d.front.owner, Heard: d.front.heard, Stats: d.front.stats,
		Hold: d.c.Timing.Hold, Attempt: d.c.Timing.Attempt}
	r.Outage, _ = d.front.f.Outage()
	d.front.mu.Unlock()
	d.mu.Lock()
	w := d.owner
	r.Barred, r.LastError, r.Doing, r.Passes = d.view.Barred, d.lastErr, d.lastWhy, d.passes
	for host := range d.view.Cut {
		r.Cut = append(r.Cut, host)
	}
	r.Since = d.since
	d.mu.Unlock()
	slices.Sort(r.Cut)
	if w != nil {
		w.mu.Lock()
		r.Owns, r.Epoch, r.LastWrite = !w.o.Left(), w.record.Epoch, map[string]time.Time{}
		for host, at := range w.hosts {
			r.LastWrite[host] = at
		}
		w.mu.Unlock()
	}
	if d.c.Barred != "" {
		r.Findings = append(r.Findings, agents.Finding{Code: "heartbeat-barred", Subject: d.c.Export, Severity: agents.Critical, Text: d.c.Barred})
	}
	return r
}

// Print writes the report for people; now is when it was made.
func (r Report) Print(w io.Writer, now time.Time) {
	ago := func(t time.Time) string {
		if t.IsZero() {
			return "never"
		}
		return now.Sub(t).Round(time.Millisecond).String() + " ago"
	}
	owner := r.Owner
	if owner == "" {
		owner = "unknown"
	}
	fmt.Fprintf(w, "%s on %s: owner %s, last heard %s\n", r.Export, r.Host, owner, ago(r.Heard))
	if r.Owns {
		fmt.Fprintf(w, "  this host owns the device since %s, epoch %d\n", ago(r.Since), r.Epoch)
	}
	if !r.Outage.IsZero() {
		fmt.Fprintf(w, "  OUTAGE since %s; requests fail after %v; %s\n", ago(r.Outage), r.Hold, r.Doing)
	}
	fmt.Fprintf(w, "  %d requests, %d failed, %d outages; longest wait %v of %v held (%.0f %%)\n", r.Stats.Requests, r.Stats.Failed, r.Stats.Outages,
		r.Stats.Longest.Round(time.Microsecond), r.Hold, 100*r.Stats.Longest.Seconds()/r.Hold.Seconds())
	for i, n := range r.Stats.Buckets {
		switch {
		case n == 0:
		case i < len(LatencyBounds):
			fmt.Fprintf(w, "    up to %v: %d\n", LatencyBounds[i], n)
		default:
			fmt.Fprintf(w, "    longer: %d\n", n)
		}
	}
	hosts := make([]string, 0, len(r.LastWrite))
	for host := range r.LastWrite {
		hosts = append(hosts, host)
	}
	slices.Sort(hosts)
	for _, host := range hosts {
		fmt.Fprintf(w, "  %s wrote %s\n", host, ago(r.LastWrite[host]))
	}
	for _, host := range r.Cut {
		fmt.Fprintf(w, "  DRBD link to %s is cut by this host\n", host)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(w, "  %s: %s\n", f.Severity, f.Text)
	}
	if r.LastError != "" {
		fmt.Fprintf(w, "  last error: %s\n", r.LastError)
	}
}
