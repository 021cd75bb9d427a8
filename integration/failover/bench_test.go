package failover_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

func atoi(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// report prints the distribution.
func report(b *testing.B, what string, d []time.Duration) {
	b.Helper()
	if len(d) == 0 {
		return
	}
	slices.Sort(d)
	ms := func(x time.Duration) float64 { return float64(x.Microseconds()) / 1000 }
	at := func(q float64) time.Duration { return d[min(int(q*float64(len(d))), len(d)-1)] }
	b.ReportMetric(ms(at(0.5)), "p50-ms")
	b.ReportMetric(ms(at(0.99)), "p99-ms")
	b.ReportMetric(ms(d[len(d)-1]), "max-ms")
	b.ReportMetric(0, "ns/op")
	fmt.Printf("%s: n=%d min %.1f p50 %.1f p95 %.1f p99 %.1f max %.1f ms\n", what, len(d), ms(d[0]), ms(at(0.5)), ms(at(0.95)), ms(at(0.99)), ms(d[len(d)-1]))
}

// stolen begins to watch what the hypervisor takes from this machine, and returns what reports it: in milliseconds it is seen at once.
func stolen(b *testing.B) (stop func()) {
	b.Helper()
	sum, steal := processors(b)
	return func() {
		now, lost := processors(b)
		b.ReportMetric(100*(lost-steal)/max(now-sum, 1), "%-stolen")
	}
}

// processors is the time of all processors since boot, and what of it went to other machines, in ticks (proc_stat(5)).
func processors(b *testing.B) (sum, steal float64) {
	b.Helper()
	text, err := os.ReadFile("/proc/stat")
	must(b, err)
	line, _, _ := strings.Cut(string(text), "\n")
	for i, f := range strings.Fields(line)[1:9] { // what follows are parts of the first two
		sum += float64(atoi(f))
		if i == 7 {
			steal = float64(atoi(f))
		}
	}
	return sum, steal
}

const startTakes = 250 * time.Millisecond // from the message to systemd's begin, with room

// The controller is killed -> systemd begins to start it again. A pool each, because the third failure hands it over.
func BenchmarkControllerKilled(b *testing.B) {
	defer stolen(b)()
	var all []time.Duration
	for range b.N {
		p := newPool(b, "io-error")
		o := p.Settled()
		began := time.Now()
		o.SignalController(syscall.SIGKILL)
		// While the start is under way nothing is asked of systemd, which would be measured too: it keeps the time.
		p.Until(lasting, "the unit starts again", func() bool {
			sent := jobSent(b, o, realpool.Controller, began)
			return !sent.IsZero() && time.Since(sent) > startTakes && o.State(realpool.Controller).BegunAt.After(began)
		})
		all = append(all, o.State(realpool.Controller).BegunAt.Sub(began))
		p.Close()
	}
	report(b, "controller killed -> restarting", all)
}

// Quorum is lost with writes frozen and the writer in state D -> Secondary and unmounted. Of that, 500 ms are the grace for short flaps.
func BenchmarkQuorumLost(b *testing.B) {
	for _, policy := range []string{"suspend-io", "io-error"} {
		b.Run(policy, func(b *testing.B) {
			var all []time.Duration
			p := newPool(b, policy)
			for range b.N {
				o := p.Settled()
				p.Until(lasting, "all hosts are connected", p.Connected)
				began := time.Now()
				p.Cut(o, true)
				p.Until(lasting, "the owner has let go", func() bool { return !o.Since(began, "unmounted").IsZero() && !o.Since(began, "no primary").IsZero() })
				end := o.Since(began, "unmounted")
				if s := o.Since(began, "no primary"); s.After(end) {
					end = s
				}
				all = append(all, end.Sub(o.Since(began, "no quorum")))
				p.Cut(o, false)
			}
			report(b, "quorum lost ("+policy+") -> Secondary and unmounted", all)
			p.Close()
		})
	}
}

// events2 prints may_promote:yes -> the StartUnit message for the mount unit, the first of the chain, is written to systemd. Between the two drbdsetup primary
// runs: from its program's request to its answer is DRBD's own time, and is left out; starting and ending that program is ours.
// What an agent holds more after all promotions than after three of them is reported too.
func BenchmarkPromote(b *testing.B) {
	defer stolen(b)()
	var asked, answered, sent, begun []time.Duration
	p := newPool(b, "io-error")
	var warm held
	for i := range b.N {
		o := p.Settled()
		p.Until(lasting, "all hosts are connected", p.Connected)
		// The hosts of a real pool do not share their processors, so none of them may be at work on what was before.
		p.Until(lasting, "DRBD has been quiet", func() bool {
			g := p.Server.Printed()
			return time.Since(g[len(g)-1].At) > 2*time.Second
		})
		if i == min(3, b.N-1) {
			warm = most(b, p)
		}
		began := time.Now()
		p.Cut(o, true) // the others notice by their own clocks
		var next *realpool.Host
		// Nothing is asked of systemd meanwhile: that would be measured too.
		p.Until(lasting, "another host mounts it", func() bool {
			for _, h := range p.Others(o) {
				if !h.Since(began, "mounted").IsZero() {
					next = h
				}
			}
			return next != nil
		})
		may, primary, back := promotion(p, next, began)
		start := jobSent(b, next, realpool.MountUnit, began)
		if !may.IsZero() && !start.IsZero() { // else it was promoted by a probe, before may_promote
			own := primary.Sub(may) + start.Sub(back)
			asked, answered, sent = append(asked, primary.Sub(may)), append(answered, start.Sub(back)), append(sent, own)
			begun = append(begun, own+next.State(realpool.MountUnit).BegunAt.Sub(start))
		}
		p.Until(lasting, "one controller", func() bool { return p.Owner() == next })
		p.Cut(o, false)
	}
	report(b, "may_promote:yes printed -> drbdsetup primary has asked DRBD", asked)
	report(b, "DRBD has answered -> StartUnit is sent", answered)
	report(b, "may_promote:yes printed -> systemd has begun the mount unit, without DRBD's time", begun)
	report(b, "may_promote:yes printed -> StartUnit is sent, without DRBD's time", sent)
	p.Settled()
	p.Until(lasting, "all hosts are connected", p.Connected)
	end := most(b, p)
	b.ReportMetric(float64(end.files-warm.files), "files-grown")
	b.ReportMetric(float64(end.threads-warm.threads), "threads-grown")
	b.ReportMetric(float64(end.kib-warm.kib), "KiB-grown")
	p.Close()
}

// held is what a process has: open files, threads, and memory of its own in KiB.
type held struct{ files, threads, kib int }

// most is the most that an agent of the pool has of each.
func most(b *testing.B, p *realpool.Pool) (m held) {
	b.Helper()
	for _, h := range p.Hosts {
		for _, pid := range h.PIDs("agent") {
			files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			must(b, err)
			m.files = max(m.files, len(files))
			m.threads = max(m.threads, lab.ProcNumber(b, pid, "status", "Threads:"))
			m.kib = max(m.kib, lab.ProcNumber(b, pid, "status", "RssAnon:"))
		}
	}
	return m
}

// promotion returns when events2 printed may_promote:yes on a host after t, and when the first `drbdsetup primary` after that asked DRBD and a successful one was
// answered; zero: not.
func promotion(p *realpool.Pool, next *realpool.Host, t time.Time) (may, primary, back time.Time) {
	for _, c := range p.Server.Calls() {
		if c.Node != next.Name || !strings.HasPrefix(c.Command, "primary") || c.At.Before(t) || !back.IsZero() {
			continue
		}
		if primary.IsZero() {
			primary = c.At
		}
		if c.Exit == 0 { // after refusals perhaps: DRBD takes one promotion at a time
			back = c.At.Add(c.Took)
		}
	}
	for _, g := range p.Server.Printed() {
		if g.Node == next.Name && g.At.After(t) && g.At.Before(primary) && strings.Contains(strings.Join(g.Lines, "\n"), "may_promote:yes") {
			may = g.At
		}
	}
	return may, primary, back
}

// jobSent returns when the agent of a host first sent a start of a unit after t; zero: not.
func jobSent(b *testing.B, h *realpool.Host, unit string, t time.Time) time.Time {
	b.Helper()
	text, err := os.ReadFile(jobsFile(h))
	must(b, err)
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if at := time.Unix(0, int64(atoi(f[0]))); f[1] == unit && at.After(t) {
			return at
		}
	}
	return time.Time{}
}

// The owner's host dies -> the database is mounted elsewhere, in all and without what `drbdsetup primary` took.
func BenchmarkHostDies(b *testing.B) {
	var all, own []time.Duration
	for range b.N {
		p := newPool(b, "io-error")
		o := p.Settled()
		p.Until(lasting, "all hosts are connected", p.Connected)
		p.Wall.Do(func() { p.Cluster.PingInt = 10 * time.Second })
		began := time.Now()
		p.Die(o)
		var next *realpool.Host
		p.Until(lasting, "another host has mounted it", func() bool {
			for _, h := range p.Others(o) {
				if !h.Since(began, "mounted").IsZero() {
					next = h
				}
			}
			return next != nil
		})
		total := next.Since(began, "mounted").Sub(began)
		all = append(all, total)
		for _, c := range p.Server.Calls() {
			if c.Node == next.Name && strings.HasPrefix(c.Command, "primary") && c.At.After(began) {
				total -= c.Took
			}
		}
		own = append(own, total)
		p.Close()
	}
	report(b, "host dead -> mounted, DRBD's time included", all)
	report(b, "host dead -> mounted, our own time", own)
}

// Resident memory of the shipped agent that owns, with two peers, after the pool has settled and moved twice and the agent has given back what only its start
// needed.
func BenchmarkAgentMemory(b *testing.B) {
	for range b.N {
		p := newShippedPool(b, 0)
		for range 2 {
			o := p.Settled()
			p.Until(lasting, "all hosts are connected", p.Connected)
			p.Cut(o, true)
			p.Until(lasting, "another host takes over", func() bool { n := p.Owner(); return n != nil && n != o })
			p.Cut(o, false)
		}
		o := p.Settled()
		<-time.After(20 * time.Second)
		for _, pid := range o.PIDs("agent") {
			for _, f := range []struct{ file, key, unit string }{{"status", "VmRSS:", "MiB-RSS"}, {"status", "RssAnon:", "MiB-anon"}, {"smaps_rollup", "Pss:", "MiB-PSS"}} {
				b.ReportMetric(float64(lab.ProcNumber(b, pid, f.file, f.key))/1024, f.unit)
			}
		}
		p.Close()
	}
}
