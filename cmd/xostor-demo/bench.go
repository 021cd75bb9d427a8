package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/feed"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/integration/lab"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorface"
)

const (
	benchHosts, benchDisks = 6, 1000
	sampleLimit            = 60 * time.Second
	idleFor                = 20 * time.Second
	quietFor               = 100 * time.Second // from a minute after the last growth on the feed looks at satellites ever more rarely, until 10 s apart
	growingPause           = 400 * time.Millisecond

	largeHosts, largeVMs, largeVDIs = 64, 2000, 6000
)

// bench prints how fast and how costly the agents are. It fails when numbers do not become right; how fast is for the reader to judge.
func bench(ctx context.Context, o options, t *timeline) error {
	return errors.Join(benchLatency(ctx, o, t), benchMirror(ctx, o, t))
}

// bencher measures on one served pool.
type bencher struct {
	*site
	t *timeline
	n int // volumes that this made behind SM's back
}

func benchLatency(ctx context.Context, o options, t *timeline) (err error) {
	s, err := openSite(o.xostor, func(dir string) (*lab.Pool, error) {
		pool, err := lab.New(lab.Options{Dir: dir, Seed: o.seed, Hosts: benchHosts, PoolKiB: 20 << 30})
		if err == nil {
			_, err = pool.CreateDisks(benchDisks, 40*gib)
		}
		return pool, err
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	b := &bencher{site: s, t: t}
	t.text(heading, fmt.Sprintf("From a change in LINSTOR to correct sizes in XAPI: %d volumes on %d hosts, redundancy 2, %d samples each", benchDisks, benchHosts, o.changes))
	if err := s.startHost(ctx, s.pool.Coordinator().Name); err != nil {
		return err
	}
	if err := b.measure(ctx, "warm-up", 1, nil, func() error { return s.pool.WriteDisk(s.pool.Disks()[0], 64*mib) }, false); err != nil {
		return err
	}
	t.text(plain, fmt.Sprintf("\n  %-34s %7s %9s %9s %9s %9s %9s", "change", "samples", "min", "median", "p90", "p99", "max"))
	disks := s.pool.Disks()
	next := 0
	grow := func() error {
		next++
		return s.pool.WriteDisk(disks[next%len(disks)], 64*mib)
	}
	for _, k := range []struct {
		name    string
		samples int
		before  func(context.Context)
		do      func() error
	}{
		{"volume created (not by SM)", o.changes, nil, b.createVolume},
		{"volume deleted (not by SM)", o.changes, nil, b.deleteVolume},
		{"guest writes, others do too", o.changes, func(ctx context.Context) { wait(ctx, growingPause) }, grow},
		{"capacity added on all hosts", o.changes, nil, b.addCapacity},
	} {
		if err := b.measure(ctx, k.name, k.samples, k.before, k.do, true); err != nil {
			return err
		}
	}
	wait(ctx, quietFor-idleFor)
	if err := b.idle(ctx); err != nil {
		return err
	}
	if o.quietGrowth == 0 {
		return nil
	}
	return b.measure(ctx, "guest writes after a quiet time", o.quietGrowth, func(ctx context.Context) { wait(ctx, quietFor) }, grow, true)
}

// addCapacity adds to all hosts, because the smallest one decides the SR's size.
func (b *bencher) addCapacity() error {
	for _, h := range b.pool.Hosts() {
		b.pool.AddCapacity(h.Name, 1<<20)
	}
	return nil
}

func (b *bencher) createVolume() error {
	b.n++
	return b.pool.LINSTOR().Spawn(b.pool.Group(), fmt.Sprintf("foreign-%d", b.n), 4<<20).Err()
}

func (b *bencher) deleteVolume() error {
	err := b.pool.LINSTOR().DeleteDefinition(fmt.Sprintf("foreign-%d", b.n)).Err()
	b.n--
	return err
}

// measure does a change n times, each when all was right before, and prints how long XAPI took to be right.
func (b *bencher) measure(ctx context.Context, name string, n int, before func(context.Context), do func() error, print bool) error {
	var times []time.Duration
	for range n {
		if before != nil {
			before(ctx)
		}
		if err := do(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		took, err := b.trueWithin(ctx, sampleLimit)
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", name, err, b.lastWords())
		}
		times = append(times, took)
	}
	if !print {
		return nil
	}
	slices.Sort(times)
	ms := func(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
	b.t.text(plain, fmt.Sprintf("  %-34s %7d %9s %9s %9s %9s %9s", name, n, ms(times[0]), ms(quantile(times, 0.5)), ms(quantile(times, 0.9)), ms(quantile(times, 0.99)), ms(times[n-1])))
	return nil
}

// quantile of sorted durations, by nearest rank: no value that was not measured.
func quantile(sorted []time.Duration, q float64) time.Duration {
	i := int(q*float64(len(sorted)) + 0.999999)
	return sorted[min(max(i, 1), len(sorted))-1]
}

// idle prints what the processes and LINSTOR spend while nothing changes.
func (b *bencher) idle(ctx context.Context) error {
	face := b.pool.LINSTORFace()
	face.ResetCalls()
	var before time.Duration
	for _, d := range b.daemons {
		used, err := cpuTime(d.Pid())
		if err != nil {
			return err
		}
		before += used
	}
	if !wait(ctx, idleFor) {
		return ctx.Err()
	}
	var after time.Duration
	text := ""
	for _, d := range b.daemons {
		used, err := cpuTime(d.Pid())
		if err != nil {
			return err
		}
		after += used
		m, err := memoryOf(d.Pid())
		if err != nil {
			return err
		}
		text += fmt.Sprintf("; %s %s resident", d.kind, lab.Human(m.resident))
	}
	b.t.text(plain, fmt.Sprintf("  %-34s %.2f %% of a core for bus, feeds and agent; LINSTOR asked %.2f times/s from memory, %.2f times/s at satellites%s", fmt.Sprintf("idle for %s", idleFor),
		100*(after-before).Seconds()/idleFor.Seconds(), float64(face.Total(linstorface.Mem))/idleFor.Seconds(), float64(face.Total(linstorface.Sat))/idleFor.Seconds(), text))
	return nil
}

// benchMirror measures the first mirror of a large pool.
func benchMirror(ctx context.Context, o options, t *timeline) (err error) {
	t.text(heading, fmt.Sprintf("\nFirst mirror of a pool of %d hosts, %d VMs, %d VDIs", largeHosts, largeVMs, largeVDIs))
	s, err := openSite(o.xostor, func(dir string) (*lab.Pool, error) {
		return lab.Large(lab.Options{Dir: dir, Seed: o.seed}, largeHosts, largeVMs, largeVDIs)
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	config, err := s.pool.WriteConfig(s.pool.Coordinator().Name, "")
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := s.start(s.pool.Coordinator().Name, "bus", "bus", "--config", config); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sampleLimit)
	defer cancel()
	conn, err := bus.Dial(ctx, filepath.Join(filepath.Dir(config), "bus.sock"), "xostor-demo")
	if err != nil {
		return err
	}
	defer conn.Close()
	var specs []bus.Spec
	for _, class := range feed.Classes() {
		specs = append(specs, bus.XAPITable(class))
	}
	mirrored := func(what string, specs ...bus.Spec) error {
		objects, err := mirrorAll(ctx, conn, specs)
		if err == nil {
			t.text(plain, fmt.Sprintf("  %-34s %d objects fresh in a subscriber %.2f s after the start of the process", what, objects, time.Since(begin).Seconds()))
		}
		return err
	}
	if err := mirrored("XAPI", specs...); err != nil {
		return err
	}
	if err := mirrored("LINSTOR", bus.LINSTORTable("node"), bus.LINSTORTable("pool"), bus.LINSTORTable("definition"), bus.LINSTORTable("resource")); err != nil {
		return err
	}
	m, err := memoryOf(s.daemons[0].Pid())
	if err != nil {
		return err
	}
	t.text(plain, fmt.Sprintf("  %-34s %s resident, %s at most", "bus with its feeds", lab.Human(m.resident), lab.Human(m.peak)))
	return nil
}

// mirrorAll mirrors these tables until all are fresh, and counts the objects.
func mirrorAll(ctx context.Context, conn *bus.Conn, specs []bus.Spec) (objects int, err error) {
	var mirrors []*bus.Mirror[struct{}]
	for _, spec := range specs {
		m, err := bus.NewMirror(conn, spec, bus.MirrorOptions[struct{}]{})
		if err != nil {
			return 0, err
		}
		defer m.Close()
		mirrors = append(mirrors, m)
	}
	for i, m := range mirrors {
		if err := m.WaitFresh(ctx); err != nil {
			return 0, fmt.Errorf("mirror %s: %w", specs[i].Name, err)
		}
		objects += m.Len()
	}
	return objects, nil
}
