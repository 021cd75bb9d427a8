package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab"
)

const (
	healLimit   = 90 * time.Second // from the end of the chaos to correct numbers
	chaosSize   = 12               // disks that are kept about
	pauseBlow   = 2 * time.Second  // longest pause between two blows
	pauseChange = 300 * time.Millisecond
)

// blow is one thing that chaos does.
type blow struct {
	name string
	do   func(ctx context.Context, r *rand.Rand) error
}

// chaos kills and restarts everything at random while disks change, lets the dust settle, and demands correct numbers.
func chaos(ctx context.Context, o options, t *timeline) (err error) {
	s, err := openSite(o.xostor, func(dir string) (*lab.Pool, error) {
		return lab.New(lab.Options{Dir: dir, Seed: o.seed, Cluster: true})
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	t.text(heading, fmt.Sprintf("Chaos for %s, seed %d (the same again: --seed %d). Disks change all the time; everything is killed and restarted at random.", o.length, o.seed, o.seed))
	t.begin()
	for _, h := range s.pool.Hosts() {
		if err := s.startHost(ctx, h.Name); err != nil {
			return err
		}
	}
	counts := map[string]int{}
	storm, cancel := context.WithTimeout(ctx, o.length)
	defer cancel()
	var changes int
	var hands sync.WaitGroup
	hands.Go(func() { changes = s.changeDisks(storm, rand.New(rand.NewPCG(o.seed, 1))) })
	err = s.strike(storm, rand.New(rand.NewPCG(o.seed, 2)), t, counts)
	cancel()
	hands.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	if err := errors.Join(s.pool.XAPIUp(), s.pool.ControllerUp()); err != nil {
		return err
	}
	t.text(plain, "")
	t.line(heading, "demo", "The storm is over. Now everything must become right by itself.")
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		t.note("%3d x %s", counts[name], name)
	}
	t.note("%3d changes of disks", changes)
	took, err := s.trueWithin(ctx, healLimit)
	if err != nil {
		return fmt.Errorf("the numbers did not become right (seed %d): %w\n%s", o.seed, err, s.lastWords())
	}
	t.line(right, "XAPI", "%s, and all %d disks: right %.1f s after the storm", s.pool.Shown(s.pool.SR()), len(s.pool.Disks()), took.Seconds())
	return nil
}

// strike does blows until ctx ends.
func (s *site) strike(ctx context.Context, r *rand.Rand, t *timeline, counts map[string]int) error {
	blows := s.blows()
	for wait(ctx, time.Duration(r.Int64N(int64(pauseBlow)))) {
		b := blows[r.IntN(len(blows))]
		counts[b.name]++
		t.line(warning, "chaos", "%s", b.name)
		if err := b.do(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
	}
	return nil
}

func (s *site) blows() []blow {
	anyHost := func(r *rand.Rand) string { return s.pool.Hosts()[r.IntN(len(s.pool.Hosts()))].Name }
	away := func(ctx context.Context, r *rand.Rand) { wait(ctx, time.Duration(r.Int64N(int64(2*time.Second)))) }
	kill := func(kind string) func(context.Context, *rand.Rand) error {
		return func(_ context.Context, r *rand.Rand) error {
			host := anyHost(r)
			if r.IntN(2) == 0 {
				host = s.pool.Coordinator().Name // where it hurts
			}
			for _, d := range s.daemons {
				if d.host == host && d.kind == kind {
					return d.Kill()
				}
			}
			return nil
		}
	}
	return []blow{
		{"kill bus", kill("bus")},
		{"kill agent", kill("sr-size")},
		{"restart XAPI", func(context.Context, *rand.Rand) error { s.pool.RestartXAPI(); return nil }},
		{"stop and start XAPI", func(ctx context.Context, r *rand.Rand) error {
			s.pool.XAPIDown()
			away(ctx, r)
			return s.pool.XAPIUp()
		}},
		{"stop and start LINSTOR's controller", func(ctx context.Context, r *rand.Rand) error {
			s.pool.ControllerDown()
			away(ctx, r)
			return s.pool.ControllerUp()
		}},
		{"move LINSTOR's controller", func(_ context.Context, r *rand.Rand) error { return s.pool.MoveController(anyHost(r)) }},
		{"move XAPI's coordinator", func(_ context.Context, r *rand.Rand) error { return s.pool.MoveCoordinator(anyHost(r)) }},
		{"scan while a satellite is cut off", func(ctx context.Context, r *rand.Rand) error {
			host := anyHost(r)
			s.pool.SatelliteOffline(host)
			_ = s.pool.SRScan() // It may well fail now; that it may write wrong numbers is the point.
			away(ctx, r)
			s.pool.SatelliteOnline(host)
			return nil
		}},
	}
}

// changeDisks creates, writes, grows, snapshots and deletes disks until ctx ends, and returns how many changes were made. Refusals, as while LINSTOR is away, are part of it.
func (s *site) changeDisks(ctx context.Context, r *rand.Rand) (changes int) {
	for wait(ctx, time.Duration(r.Int64N(int64(pauseChange)))) {
		disks := s.pool.Disks()
		var err error
		switch n := r.IntN(10); {
		case len(disks) == 0 || n < 2 && len(disks) < chaosSize:
			_, err = s.pool.CreateDisk(int64(1+r.IntN(20)) * gib)
		case n < 7:
			err = s.pool.WriteDisk(disks[r.IntN(len(disks))], int64(1+r.IntN(256))*mib)
		case n < 8:
			err = s.pool.ResizeDisk(disks[r.IntN(len(disks))], int64(20+r.IntN(40))*gib)
		case n < 9 && len(disks) < chaosSize:
			_, err = s.pool.SnapshotDisk(disks[r.IntN(len(disks))])
		default:
			err = s.pool.DeleteDisk(disks[r.IntN(len(disks))])
		}
		if err == nil {
			changes++
		}
	}
	return changes
}

// wait lets d pass; it is false when ctx ended before.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
