// Package heartbeat gives every host of a pool the HA statefile although DRBD lets one host open it: the owner serves it,
// candidates take over, and a front on each host holds requests meanwhile. See DESIGN.md.
//
// Owner, Candidate and Front are state machines without clock, I/O or goroutines. Promised by them together, for one
// device under DRBD's quorum: acknowledged writes are not lost, reads are linearizable, a request that was given up never
// takes effect after a later request of the same host was acknowledged. Not promised: that a request succeeds; after the
// hold budget of an outage it fails with EIO.
package heartbeat

import (
	"fmt"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// Timing is every duration that the shim uses. They follow from xhad's time-outs.
type Timing struct {
	Attempt time.Duration `json:"attempt_ns"` // One request at one owner, before its connection is given up.
	Ping    time.Duration `json:"ping_ns"`    // Between pings of an idle connection to the owner.
	Suspect time.Duration `json:"suspect_ns"` // Silence of the owner that founds a suspicion.
	Rank    time.Duration `json:"rank_ns"`    // A candidate's delay per rank.
	Reopen  time.Duration `json:"reopen_ns"`  // Between two opens of one candidate.
	Hold    time.Duration `json:"hold_ns"`    // What an outage may take before requests fail, from its start.
	Evict   time.Duration `json:"evict_ns"`   // Silence of an owner whose kernel answers, before the own link to it is cut.
	Lease   time.Duration `json:"lease_ns"`   // How long a completed replicated write vouches for reads, from its start.
	Settle  time.Duration `json:"settle_ns"`  // What a new owner waits after an unclean end of the one before; more than Lease.
	Probe   time.Duration `json:"probe_ns"`   // Between an idle owner's probe writes.
}

// longestHold bounds Hold, whatever xhad tolerates.
const longestHold = 17 * time.Second

// LongestKernelTimeout is the longest KernelTimeout that any configuration gives.
const LongestKernelTimeout = longestHold + kernelSlack

const kernelSlack = 2 * time.Second

// KernelTimeout is the kernel's request time-out for nbd: more than Hold, or it would end the socket that is being held.
func (t Timing) KernelTimeout() time.Duration { return t.Hold + kernelSlack }

// KernelDead is how long the kernel waits for a new socket when the shim has died.
func (t Timing) KernelDead() time.Duration { return t.Hold + 7*time.Second }

// AskAgain is the pause before a host that did not serve is asked again, in a pool of so many hosts, so long into an outage.
// jitter is from 0 to 1. An ask costs both sides a TLS handshake, so the pause grows with the hosts; it stays below Settle,
// in which a new owner lets those who found it wait anyway. And it grows with the outage, of which it is a twentieth at most.
func (t Timing) AskAgain(hosts int, outage time.Duration, jitter float64) time.Duration {
	pause := min(max(time.Duration(hosts)*6*time.Millisecond, 50*time.Millisecond), t.Settle*5/6)
	pause = min(max(pause, outage/20), time.Second)
	return pause - time.Duration(min(max(jitter, 0), 1)*float64(pause)/2)
}

// evictionTakes is from the first cut of a link to an answer of the next owner: cuts of up to 0.4 s on slow machines, the
// new owner's open and settling.
const evictionTakes = 2500 * time.Millisecond

// Failover is the longest time that a host's crash takes, as xhad sees it: silence, DRBD dropping the dead peer, settling
// and finding the new owner.
func (t Timing) Failover() time.Duration {
	return t.Suspect + 1200*time.Millisecond + t.Settle
}

// DeriveTiming scales the times to xhad's. Below T=20 nothing that can be tuned leaves enough room, which the finding
// says with its numbers.
func DeriveTiming(x statefile.Timeouts) (Timing, []agents.Finding) {
	tolerated := x.Tolerated()
	t := Timing{Attempt: 2 * time.Second, Rank: 300 * time.Millisecond, Reopen: time.Second,
		Lease: 250 * time.Millisecond, Settle: 300 * time.Millisecond, Probe: time.Second}
	switch {
	case tolerated >= 30*time.Second:
		t.Suspect = 3 * time.Second
	case tolerated >= 10*time.Second:
		t.Suspect = 2 * time.Second
	default:
		t.Suspect = time.Second
	}
	t.Attempt = min(t.Attempt, t.Suspect)
	t.Ping = t.Suspect / 3
	t.Evict = min(max(tolerated/5, t.Suspect+1500*time.Millisecond), 10*time.Second)
	// An error makes xhad sleep before it asks again, so the budget covers an eviction where half of what is tolerated does.
	evicted := min(t.Evict+evictionTakes, tolerated/2)
	t.Hold = min(max(tolerated/3, evicted, 3*time.Second), longestHold)
	if x.StateFileTimeout >= 20*time.Second && tolerated > t.Failover()+t.Hold/2 {
		return t, nil
	}
	return t, []agents.Finding{{Code: "heartbeat-timeout-short", Subject: "ha-config:timeout", Severity: agents.Warning,
		Text: fmt.Sprintf("HA time-out %v tolerates an outage of the statefile of %v; a crash of its owner takes up to %v and the kernel's request time-out is %v",
			x.StateFileTimeout, tolerated, t.Failover(), t.KernelTimeout()),
		Fix: "disable HA and enable it with ha-config:timeout=60 (at least 20)"}}
}
