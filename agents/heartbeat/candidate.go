package heartbeat

import (
	"cmp"
	"slices"
	"time"
)

// Answer is what a host last said when it was asked to serve.
type Answer int

// The answers.
const (
	Silent   Answer = iota // Nothing came back in time.
	NotOwner               // Its daemon runs and does not hold the device.
	Refused                // The host answers and no daemon listens.
	Opening                // It has asked DRBD for the device, and is not the owner yet.
	Serves                 // It is the owner.
)

// Peer is what a candidate knows of another host.
type Peer struct {
	Host    string
	Answer  Answer
	At      time.Time // Since when it says so; in an outage, not before its begin.
	Diskful bool      // It has an UpToDate replica of the device.
	// Heard is when it last said anything, whatever it says now. That it is still opening counts once: an open may hang.
	Heard time.Time
}

// Note takes an answer in. The time of an answer that only repeats itself stays, or ranks would never come up.
func (v *View) Note(now time.Time, host string, a Answer) {
	for i := range v.Peers {
		p := &v.Peers[i]
		if p.Host != host {
			continue
		}
		if a != Silent && (a != Opening || p.Answer != Opening) {
			p.Heard = now
		}
		if p.Answer != a || p.At.Before(v.LostAt) {
			p.Answer, p.At = a, now
		}
	}
}

// See takes in whom DRBD shows as Primary.
func (v *View) See(now time.Time, primary string) {
	if v.Primary != primary {
		v.Primary, v.PrimarySince = primary, now
	}
}

// View is all that a candidate decides on.
type View struct {
	Self    string
	Diskful bool // This host has an UpToDate replica.
	Peers   []Peer
	// Served: an owner answers this host's requests. A connection alone is not enough: an owner whose device hangs accepts
	// connections, and an open by anybody makes DRBD drop the dead peer that it hangs on.
	Served bool
	// LostAt is when the outage began, or when the daemon started to look.
	LostAt time.Time
	// Owner is the last known owner and Heard when it last answered a request; both zero if none is known.
	Owner string
	Heard time.Time
	// Successor is whom a leaving owner named; "" if none, or since somebody serves again.
	Successor string
	// Primary is the connected host that DRBD shows as Primary, "" when it shows none or was not asked, and PrimarySince when it
	// was first seen to be: nobody is silent as the owner for longer than that.
	Primary      string
	PrimarySince time.Time
	// Opening: an open is under way. Opened is when the last one returned; Held says that it found another owner (EROFS).
	Opening bool
	Opened  time.Time
	Held    bool
	// LeftAt is when this host itself stopped to own; zero if it never did.
	LeftAt time.Time
	// Cut are the hosts to which this host has cut its DRBD link, and when, and those to which it has tried to: a command that
	// failed or took too long may have had its effect. Uncut are those of which it is not known.
	Cut   map[string]time.Time
	Uncut map[string]bool
	// Barred is why this host must not own: a policy that loses writes, a second holder. "" if it may.
	Barred string
}

// Step is what a candidate should do now, at most one thing of each kind.
type Step struct {
	Open    bool          // Try to open the device.
	Cut     string        // Cut the DRBD link to this host by force.
	Join    string        // Restore the DRBD link to this host.
	Recheck time.Duration // Decide again after this at the latest; 0 = when something changes.
	Why     string
}

// DecideCandidate is pure. The conditions to open are, in order: nobody serves; the suspicion is founded; this host's turn
// has come; the last open is long enough ago. To cut a link: all of that, and the owner was silent for t.Evict while an
// open said that its kernel lives.
func DecideCandidate(now time.Time, t Timing, v View) Step {
	if join := rejoin(v); join != "" {
		return Step{Join: join, Why: "the host whose link was cut answers again"}
	}
	if v.Served || v.Opening {
		return Step{}
	}
	founded, why := suspicion(now, t, v)
	founded = afterOpening(founded, t, v)
	if founded.After(now) {
		return Step{Recheck: founded.Sub(now), Why: why}
	}
	if target := evictable(now, t, v); target != "" {
		return Step{Cut: target, Why: "owner silent although its kernel answers"}
	}
	if v.Barred != "" {
		return Step{Why: v.Barred}
	}
	turn := time.Duration(rank(v)) * t.Rank
	due := founded.Add(turn)
	if awaited(v) {
		due = later(due, v.LostAt.Add(t.Suspect+turn))
	}
	if !v.LeftAt.IsZero() && now.Sub(v.LeftAt) < 2*t.Suspect && v.Successor != v.Self {
		// Whoever handed over takes back only when nobody else wants. One that was frozen and evicted learns both at once.
		due = later(due, v.LeftAt.Add(turn)).Add(t.Suspect)
	}
	reopen := t.Reopen
	if len(v.Cut) > 0 {
		reopen = t.Rank // The owner falls when the next host cuts its link, and every host does so within moments.
	}
	if next := v.Opened.Add(reopen); next.After(due) && !cutSince(v, v.Opened) {
		due = next
	}
	if due.After(now) {
		return Step{Recheck: due.Sub(now), Why: why}
	}
	return Step{Open: true, Why: why}
}

// suspicion is when it is or will be founded to open the device, if nothing changes.
func suspicion(now time.Time, t Timing, v View) (time.Time, string) {
	silence := later(v.Heard, v.LostAt)
	if !v.Heard.IsZero() {
		silence = v.Heard
	}
	silence = silence.Add(t.Suspect)
	var ownerSays, all time.Time
	unanimous := true
	for _, p := range v.Peers {
		no := (p.Answer == NotOwner || p.Answer == Refused) && !p.At.Before(v.LostAt)
		if !no {
			unanimous = false
			continue
		}
		all = later(all, p.At)
		if p.Host == v.Owner {
			ownerSays = p.At
		}
	}
	switch {
	case !ownerSays.IsZero() && v.Successor == v.Self:
		return later(ownerSays, v.LostAt), "named by the owner that left" // Nobody else is to open it, so nobody else need be heard.
	case unanimous && (v.Owner == "" || v.Owner == v.Self || !ownerSays.IsZero()):
		return later(all, v.LostAt), "no host serves"
	case !ownerSays.IsZero(), v.Owner == v.Self:
		// Some host has not answered yet. It may be the new owner, or be dead; a moment tells.
		return earlier(later(ownerSays, v.LostAt).Add(t.Rank), silence), "the owner says that it is none"
	default:
		return silence, "owner silent"
	}
}

// afterOpening leaves another host's open its time before this host opens, too: on a slow host it takes seconds. Together the
// others get no more than t.Suspect, or hosts that open in vain would keep one away that could.
func afterOpening(founded time.Time, t Timing, v View) time.Time {
	limit := founded
	for _, p := range v.Peers {
		if p.Answer == Opening {
			founded = later(founded, p.At.Add(t.Suspect))
		}
	}
	return earlier(founded, limit.Add(t.Suspect))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// awaited says whether another host was named as the successor and is not known to be down. Two opens at once cost each other seconds in DRBD, which changes one
// state at a time, and a host that is slow to notice its turn would meet the next in rank.
func awaited(v View) bool {
	if v.Successor == v.Self || v.Successor == v.Owner {
		return false
	}
	return slices.ContainsFunc(v.Peers, func(p Peer) bool {
		down := (p.Answer == Silent || p.Answer == Refused) && !p.At.Before(v.LostAt)
		return p.Host == v.Successor && !down
	})
}

// rank is this host's place among those who can open the device: the named successor, then hosts with data, then the
// others; hosts by name. Hosts that do not answer have no place.
func rank(v View) int {
	type entry struct {
		host    string
		diskful bool
	}
	all := []entry{{v.Self, v.Diskful}}
	for _, p := range v.Peers {
		if (p.Answer == NotOwner || p.Answer == Opening) && p.Host != v.Owner && !p.At.Before(v.LostAt) {
			all = append(all, entry{p.Host, p.Diskful})
		}
	}
	order := func(e entry) int {
		switch {
		case e.host == v.Successor:
			return 0
		case e.diskful:
			return 1
		default:
			return 2
		}
	}
	slices.SortFunc(all, func(a, b entry) int { return cmp.Or(cmp.Compare(order(a), order(b)), cmp.Compare(a.host, b.host)) })
	return slices.IndexFunc(all, func(e entry) bool { return e.host == v.Self })
}

// evictable is the host to cut the link to, or "". A host whose daemon answers, or that refuses connections, is not
// frozen: if its device is held all the same, something else holds it, and cutting would not cure that.
func evictable(now time.Time, t Timing, v View) string {
	target := v.Primary // An open fails for lack of quorum, too: only DRBD's own view says that the other kernel lives.
	if target == "" || target == v.Self || !v.Held {
		return ""
	}
	since := later(v.LostAt, v.PrimarySince)
	if target == v.Owner && !v.Heard.IsZero() {
		since = later(v.Heard, v.PrimarySince)
	}
	if _, done := v.Cut[target]; done && !v.Uncut[target] {
		return ""
	}
	for _, p := range v.Peers {
		if p.Host != target {
			continue
		}
		if p.Answer != Silent && p.Answer != Opening && p.At.After(since) {
			return ""
		}
		since = later(since, p.Heard) // It may have opened, answered slowly and be the owner by now.
	}
	if now.Sub(since) < t.Evict || v.Opened.Before(since.Add(t.Suspect)) {
		return ""
	}
	return target
}

// cutSince says whether a link was cut after t: then the next open may succeed and need not wait.
func cutSince(v View, t time.Time) bool {
	for _, at := range v.Cut {
		if at.After(t) {
			return true
		}
	}
	return false
}

// rejoin is a host whose link was cut and that has answered since: it no longer holds the device, or it is the one that
// answers this host's requests, because the eviction found no majority. A host that only says that it serves may not have
// noticed yet that it was evicted, and DRBD refuses to connect a Primary that was.
func rejoin(v View) string {
	hosts := make([]string, 0, len(v.Cut))
	for host, at := range v.Cut {
		for _, p := range v.Peers {
			if p.Host != host || !p.At.After(at) {
				continue
			}
			if p.Answer == NotOwner || p.Answer == Refused || p.Answer == Serves && v.Served && v.Owner == host && v.Heard.After(at) {
				hosts = append(hosts, host)
			}
		}
	}
	if len(hosts) == 0 {
		return ""
	}
	return slices.Min(hosts)
}
