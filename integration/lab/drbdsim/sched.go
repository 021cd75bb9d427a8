// Package drbdsim models one DRBD 9 resource on several hosts: roles, quorum, connections and their late views of each other. See DESIGN.md.
package drbdsim

import (
	"container/heap"
	"time"
)

// Scheduler is the model's clock. Functions run one at a time, never concurrently with each other.
type Scheduler interface {
	Now() time.Time
	After(d time.Duration, f func())
}

// Virtual is a Scheduler in virtual time. The zero value starts at the zero time plus one year, so that no moment is zero.
type Virtual struct {
	now   time.Time
	queue events
	seq   int
}

type event struct {
	at  time.Time
	seq int
	f   func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	if !e[i].at.Equal(e[j].at) {
		return e[i].at.Before(e[j].at)
	}
	return e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }

// Push implements heap.Interface.
func (e *events) Push(x any) { *e = append(*e, x.(event)) }

// Pop implements heap.Interface.
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

// NewVirtual returns a clock that starts at an arbitrary fixed date.
func NewVirtual() *Virtual { return &Virtual{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)} }

// Now implements Scheduler.
func (v *Virtual) Now() time.Time { return v.now }

// After implements Scheduler. Events of one moment run in the order in which they were added.
func (v *Virtual) After(d time.Duration, f func()) {
	v.seq++
	heap.Push(&v.queue, event{v.now.Add(max(d, 0)), v.seq, f})
}

// Run runs all that is due until d from now.
func (v *Virtual) Run(d time.Duration) {
	end := v.now.Add(d)
	for len(v.queue) > 0 && !v.queue[0].at.After(end) {
		e := heap.Pop(&v.queue).(event)
		v.now = e.at
		e.f()
	}
	v.now = end
}
