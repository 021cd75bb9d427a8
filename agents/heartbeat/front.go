package heartbeat

import (
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// Front is what a host's front knows about the present outage. It is not safe for concurrent use.
//
// The budget belongs to the outage and not to the request: after a failing cycle xhad makes 1+3(N+1) more requests before
// it feeds its watchdog again.
type Front struct {
	t      Timing
	outage time.Time     // Zero: there is none.
	kernel time.Duration // The longest request time-out that a request of the kernel may have.
	shared time.Time     // From when on shared writes are taken.
}

// NewFront starts in an outage that began at now: no owner has answered yet. before is the longest request time-out that the
// kernel's device has had, 0 if it is new: the kernel may send a write again that a process before had passed on, and times
// each request by what the time-out was when it was sent.
func NewFront(now time.Time, t Timing, before time.Duration) *Front {
	f := &Front{t: t, kernel: max(t.KernelTimeout(), before), outage: now}
	if before > 0 {
		f.Repeating(now)
	}
	return f
}

// Repeating reports that the kernel lost a socket by now and may send a write again that was in flight there.
func (f *Front) Repeating(now time.Time) { f.shared = now.Add(f.kernel + time.Second) }

// Repeatable says whether a write may be done twice: only if nobody else writes there. That is so for one host slot of the
// statefile. A write to the global section whose outcome is unknown must fail instead: done again after another host's
// write, it would undo that one.
func Repeatable(off, n int64) bool {
	return off >= statefile.SlotSize && off+n <= statefile.Size && off/statefile.SlotSize == (off+n-1)/statefile.SlotSize
}

// TakesShared says whether a write that must not be repeated is taken at all now. It fails with EIO while it may be a
// repetition by the kernel.
func (f *Front) TakesShared(now time.Time) bool { return !now.Before(f.shared) }

// Lost reports that the owner was lost while it owed an answer since the given time, or is now if it owed none.
func (f *Front) Lost(since time.Time) {
	if f.outage.IsZero() {
		f.outage = since
	}
}

// Answered reports that an owner answered a request or a ping, which ends the outage. A connection alone does not: an
// owner that accepts connections and answers nothing must not renew the budget.
func (f *Front) Answered() { f.outage = time.Time{} }

// Outage is when the present outage began; false if there is none.
func (f *Front) Outage() (time.Time, bool) { return f.outage, !f.outage.IsZero() }

// Until is when a request that arrived at arrived has to fail; false says that it has to fail now.
func (f *Front) Until(now, arrived time.Time) (time.Time, bool) {
	since := arrived
	if !f.outage.IsZero() {
		since = f.outage
	}
	until := since.Add(f.t.Hold)
	return until, now.Before(until)
}
