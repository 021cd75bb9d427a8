package heartbeat

import "time"

// Session is one connection's place in the order of a host's connections. Sessions of one boot are ordered by Count, the
// time since boot at the dial, so no clock is compared between hosts or across reboots.
type Session struct {
	Boot  string // The kernel's boot id.
	Count uint64 // Nanoseconds since boot; never the same twice.
}

// Before says whether s is known to be older than o. Of different boots the one that arrives later is the newer: a
// handshake needs answers, so nobody of an earlier boot can finish one.
func (s Session) Before(o Session) bool { return s.Boot == o.Boot && s.Count < o.Count }

// Verdict is what an owner says to a request.
type Verdict int

// The verdicts.
const (
	Run     Verdict = iota // Submit it to the device, then call End.
	Wait                   // A request that it conflicts with is not done.
	Stale                  // The host has a newer session: drop it, with its connection.
	Leaving                // This owner has left: nothing of it was done.
)

// Request is one request at an owner. The caller keeps it from Enter until End, or until Try says Stale or Leaving, and
// may then use it again.
type Request struct {
	Host    string // "" is the owner itself, which is not ordered with itself.
	Session Session
	Off     int64 // Bytes.
	Len     int64
	Write   bool

	running bool
}

// conflicts says whether a and b must not be at the device at the same time. Requests of one host never are. A read that
// overlaps a write in flight could return data that is never acknowledged and gone after a failover.
func (r *Request) conflicts(o *Request) bool {
	if r.Host == o.Host && r.Host != "" {
		return true
	}
	return (r.Write || o.Write) && r.Off < o.Off+o.Len && o.Off < r.Off+r.Len
}

// Owner is one ownership of the device, from a successful open to the close. Its zero value is not useful. It is not safe
// for concurrent use.
type Owner struct {
	t         Timing
	serveFrom time.Time
	vouched   time.Time // When the newest completed replicated write started.
	sessions  map[string]Session
	requests  []*Request // Waiting and running, in the order of Enter.
	left      bool
}

// NewOwner begins an ownership at now, the moment after the open returned. clean says that the record on the device shows
// that the owner before closed it in order; otherwise that one may be answering reads for up to t.Lease.
func NewOwner(now time.Time, t Timing, clean bool) *Owner {
	o := &Owner{t: t, serveFrom: now, sessions: map[string]Session{}}
	if !clean {
		o.serveFrom = now.Add(t.Settle)
	}
	return o
}

// ServesIn is how long the owner still has to wait before it may answer anything.
func (o *Owner) ServesIn(now time.Time) time.Duration { return max(0, o.serveFrom.Sub(now)) }

// Left says whether the ownership has ended.
func (o *Owner) Left() bool { return o.left }

// Hello registers a host's new session; false says that the host already has a newer one, or that the owner has left.
// What the older session has submitted goes on; what it had queued becomes Stale.
func (o *Owner) Hello(host string, s Session) bool {
	if o.left {
		return false
	}
	if old, ok := o.sessions[host]; ok && s.Before(old) {
		return false
	}
	o.sessions[host] = s
	return true
}

// Enter queues a request.
func (o *Owner) Enter(r *Request) {
	r.running = false
	o.requests = append(o.requests, r)
}

// Try asks whether a queued request may go to the device now. Run must be followed by End. Wait means that an earlier
// request of the host, or one that overlaps, is not done: ask again after any End or Hello. Stale and Leaving take the
// request off the queue.
func (o *Owner) Try(r *Request) Verdict {
	switch {
	case o.left:
		o.remove(r)
		return Leaving
	case o.stale(r):
		o.remove(r)
		return Stale
	}
	for _, earlier := range o.requests {
		if earlier == r {
			break
		}
		if earlier.conflicts(r) && (earlier.running || !o.stale(earlier)) {
			return Wait
		}
	}
	r.running = true
	return Run
}

func (o *Owner) stale(r *Request) bool { return r.Host != "" && o.sessions[r.Host] != r.Session }

// End reports that the device has answered a request, whatever the answer.
func (o *Owner) End(r *Request) { o.remove(r) }

func (o *Owner) remove(r *Request) {
	r.running = false
	for i, q := range o.requests {
		if q == r {
			last := len(o.requests) - 1
			copy(o.requests[i:], o.requests[i+1:])
			o.requests[last] = nil
			o.requests = o.requests[:last]
			return
		}
	}
}

// Wrote reports that the device acknowledged a write that started at start.
func (o *Owner) Wrote(start time.Time) {
	if start.After(o.vouched) {
		o.vouched = start
	}
}

// Current says whether data that the device had delivered by at was current then. If not, Wrote of a write that started
// after at settles it; the data need not be read again.
func (o *Owner) Current(at time.Time) bool {
	return !o.left && !o.vouched.IsZero() && at.Sub(o.vouched) <= o.t.Lease
}

// ProbeIn is how long until an idle owner has to write its probe.
func (o *Owner) ProbeIn(now time.Time) time.Duration {
	if o.vouched.IsZero() {
		return 0
	}
	return max(0, o.vouched.Add(o.t.Probe).Sub(now))
}

// Leave ends the ownership: nothing is begun and no data counts as current any more. The device may be closed once Idle.
func (o *Owner) Leave() { o.left = true }

// Idle says that no request is at the device.
func (o *Owner) Idle() bool {
	for _, r := range o.requests {
		if r.running {
			return false
		}
	}
	return true
}
