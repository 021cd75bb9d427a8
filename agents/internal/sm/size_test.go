package sm_test

import (
	"errors"
	"math"
	"math/big"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
)

func ptr(v int64) *int64 { return &v }

func pool(total, free int64) sm.PoolCapacity {
	return sm.PoolCapacity{TotalKiB: &total, FreeKiB: &free}
}

// The figures are worked out by hand from LVMgr:538-559 and LSR:1026-1033.
func TestPhysicalSize(t *testing.T) {
	offline := sm.PoolCapacity{}
	for name, tc := range map[string]struct {
		pools      []sm.PoolCapacity
		redundancy int
		want       int64
		err        error
	}{
		// 3 x 1 TiB, two copies: 3 TiB / 2.
		"three equal pools": {[]sm.PoolCapacity{pool(1<<30, 5), pool(1<<30, 6), pool(1<<30, 7)}, 2, 1_649_267_441_664, nil},
		// The smallest counts for all: 3 x 100 GiB (104857600 KiB) / 2 = 150 GiB.
		"the smallest counts": {[]sm.PoolCapacity{pool(1<<30, 5), pool(104_857_600, 5), pool(1<<31, 5)}, 2, 161_061_273_600, nil},
		// One host down: it leaves the minimum and the count. 2 x 1 TiB / 2.
		"one offline": {[]sm.PoolCapacity{pool(1<<30, 5), offline, pool(1<<30, 5)}, 2, 1 << 40, nil},
		// A total without free space is no report.
		"total alone": {[]sm.PoolCapacity{pool(1<<30, 5), {TotalKiB: ptr(1)}}, 1, 1 << 40, nil},
		// 1024 comes before the division: 1 KiB x 1024 x 1 / 3 = 341, not 0.
		"bytes before division": {[]sm.PoolCapacity{pool(1, 0)}, 3, 341, nil},
		// The count comes before the division: 1024 x 2 / 3 = 682, not 341 x 2 = 682; 5 KiB: 5120 x 2 / 3 = 3413, not 3412.
		"count before division":  {[]sm.PoolCapacity{pool(5, 0), pool(5, 0)}, 3, 3413, nil},
		"full pool":              {[]sm.PoolCapacity{pool(2048, 0)}, 1, 2_097_152, nil},
		"empty pool":             {[]sm.PoolCapacity{pool(0, 0), pool(1<<30, 1)}, 1, 0, nil},
		"large, exact":           {[]sm.PoolCapacity{pool(1<<53-1, 0), pool(1<<53, 0), pool(1<<53, 0)}, 3, (1<<53 - 1) * 1024, nil},
		"no pools":               {nil, 2, 0, sm.ErrNoPool},
		"all offline":            {[]sm.PoolCapacity{offline, offline}, 2, 0, sm.ErrNoPool},
		"redundancy 0":           {[]sm.PoolCapacity{pool(1, 1)}, 0, 0, sm.ErrRedundancy},
		"redundancy -1":          {[]sm.PoolCapacity{pool(1, 1)}, -1, 0, sm.ErrRedundancy},
		"free without total":     {[]sm.PoolCapacity{{FreeKiB: ptr(1)}}, 1, 0, sm.ErrCapacity},
		"negative total":         {[]sm.PoolCapacity{pool(-1, 1)}, 1, 0, sm.ErrCapacity},
		"above int64":            {[]sm.PoolCapacity{pool(1<<53, 0)}, 1, 0, sm.ErrOverflow},
		"far above int64":        {[]sm.PoolCapacity{pool(math.MaxInt64, 0), pool(math.MaxInt64, 0)}, 1, 0, sm.ErrOverflow},
		"pool more than replica": {[]sm.PoolCapacity{pool(1<<20, 1)}, 3, 357_913_941, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := sm.PhysicalSize(tc.pools, tc.redundancy)
			if got != tc.want || !errors.Is(err, tc.err) {
				t.Errorf("got %d, %v; want %d, %v", got, err, tc.want, tc.err)
			}
		})
	}
}

func drawPools(t *rapid.T) []sm.PoolCapacity {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) sm.PoolCapacity {
		var p sm.PoolCapacity
		if rapid.Bool().Draw(t, "reports") {
			p.FreeKiB = ptr(rapid.Int64Min(0).Draw(t, "free"))
		}
		p.TotalKiB = ptr(rapid.OneOf(rapid.Int64Range(0, 1<<34), rapid.Int64Min(0)).Draw(t, "total"))
		return p
	}), 0, 70).Draw(t, "pools")
}

// The driver computes in python, without limits: so does this.
func TestPhysicalSize_EqualsUnboundedArithmetic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pools, redundancy := drawPools(t), rapid.IntRange(1, 4).Draw(t, "redundancy")
		var smallest *big.Int
		count := int64(0)
		for _, p := range pools {
			if p.FreeKiB == nil {
				continue
			}
			count++
			if total := big.NewInt(*p.TotalKiB); smallest == nil || total.Cmp(smallest) < 0 {
				smallest = total
			}
		}
		got, err := sm.PhysicalSize(pools, redundancy)
		if smallest == nil {
			if !errors.Is(err, sm.ErrNoPool) {
				t.Fatalf("got %d, %v", got, err)
			}
			return
		}
		want := new(big.Int).Mul(smallest, big.NewInt(1024))
		want.Mul(want, big.NewInt(count)).Div(want, big.NewInt(int64(redundancy)))
		switch {
		case !want.IsInt64():
			if !errors.Is(err, sm.ErrOverflow) {
				t.Fatalf("got %d, %v; want overflow of %v", got, err, want)
			}
		case err != nil || got != want.Int64():
			t.Fatalf("got %d, %v; want %v", got, err, want)
		}
	})
}

func TestPhysicalSize_OrderDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pools := drawPools(t)
		a, errA := sm.PhysicalSize(pools, 2)
		b, errB := sm.PhysicalSize(rapid.Permutation(pools).Draw(t, "shuffled"), 2)
		if a != b || (errA == nil) != (errB == nil) {
			t.Fatalf("%d %v, shuffled %d %v", a, errA, b, errB)
		}
	})
}

func replica(resource, node string, allocated int64) sm.Replica {
	return sm.Replica{Resource: resource, Node: node, AllocatedKiB: &allocated}
}

func TestPhysicalUtilisation(t *testing.T) {
	second := replica("a", "n1", 7)
	second.Volume = 1
	for name, tc := range map[string]struct {
		replicas []sm.Replica
		want     sm.Utilisation
		err      error
	}{
		"nothing": {},
		// max(100, 120) + max(50, 50) = 170 KiB, whatever the number of replicas.
		"largest replica of each": {
			[]sm.Replica{replica("a", "n1", 100), replica("b", "n1", 50), replica("a", "n2", 120), replica("b", "n3", 50)},
			sm.Utilisation{Bytes: 174_080}, nil,
		},
		// LINSTOR's database of 1 GiB as the documentation shows it: allocated 1052672 KiB.
		"the database counts": {[]sm.Replica{replica(sm.DatabaseVolume, "n1", 1_052_672)}, sm.Utilisation{Bytes: 1_077_936_128}, nil},
		"two volumes add up":  {[]sm.Replica{second, replica("a", "n1", 5)}, sm.Utilisation{Bytes: 12_288}, nil},
		"negative is reported": {
			[]sm.Replica{replica("a", "n2", -1), replica("a", "n1", 4)},
			sm.Utilisation{Bytes: 4096, Unknown: []sm.Replica{replica("a", "n2", -1)}}, nil,
		},
		"absent is reported": {
			[]sm.Replica{{Resource: "a", Node: "n1"}, replica("a", "n2", 4)},
			sm.Utilisation{Bytes: 4096, Unknown: []sm.Replica{{Resource: "a", Node: "n1"}}}, nil,
		},
		"no replica known": {
			[]sm.Replica{replica("z", "n2", -1), replica("a", "n1", 4), {Resource: "z", Node: "n1"}, {Resource: "z", Node: "n1", Volume: 1}},
			sm.Utilisation{
				Bytes: 4096, Missing: []string{"z"},
				Unknown: []sm.Replica{{Resource: "z", Node: "n1"}, replica("z", "n2", -1), {Resource: "z", Node: "n1", Volume: 1}},
			}, nil,
		},
		"zero is known": {[]sm.Replica{replica("a", "n1", 0)}, sm.Utilisation{}, nil},
		"largest that fits": {
			[]sm.Replica{replica("a", "n1", math.MaxInt64/1024-1), replica("b", "n1", 1)}, sm.Utilisation{Bytes: math.MaxInt64 - 1023}, nil,
		},
		"one more":        {[]sm.Replica{replica("a", "n1", math.MaxInt64/1024), replica("b", "n1", 1)}, sm.Utilisation{}, sm.ErrOverflow},
		"absurd":          {[]sm.Replica{replica("a", "n1", math.MaxInt64), replica("b", "n1", math.MaxInt64)}, sm.Utilisation{}, sm.ErrOverflow},
		"lowest negative": {[]sm.Replica{replica("a", "n1", math.MinInt64)}, sm.Utilisation{Missing: []string{"a"}, Unknown: []sm.Replica{replica("a", "n1", math.MinInt64)}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := sm.PhysicalUtilisation(tc.replicas)
			if !errors.Is(err, tc.err) {
				t.Fatalf("got %v, want %v", err, tc.err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			if got.Complete() != (len(tc.want.Missing) == 0) {
				t.Error("Complete is wrong")
			}
		})
	}
}

// Written another way, over maps: the sum of maxima, and everything unknown accounted for, in any order.
func TestPhysicalUtilisation_IsTheSumOfMaxima(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		replicas := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) sm.Replica {
			r := sm.Replica{
				Resource: rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "resource"),
				Volume:   rapid.Int32Range(0, 1).Draw(t, "volume"),
				Node:     rapid.SampledFrom([]string{"n1", "n2", "n3"}).Draw(t, "node"),
			}
			if rapid.Bool().Draw(t, "present") {
				r.AllocatedKiB = ptr(rapid.Int64Range(-2, 1<<40).Draw(t, "allocated"))
			}
			return r
		}), 0, 30).Draw(t, "replicas")
		type key struct {
			resource string
			volume   int32
		}
		maxima, unknown, volumes := map[key]int64{}, 0, map[key]bool{}
		for _, r := range replicas {
			k := key{r.Resource, r.Volume}
			volumes[k] = true
			if r.AllocatedKiB == nil || *r.AllocatedKiB < 0 {
				unknown++
				continue
			}
			maxima[k] = max(maxima[k], *r.AllocatedKiB)
		}
		want := int64(0)
		for _, m := range maxima {
			want += m * 1024
		}
		got, err := sm.PhysicalUtilisation(replicas)
		if err != nil || got.Bytes != want || len(got.Unknown) != unknown || got.Complete() != (len(maxima) == len(volumes)) {
			t.Fatalf("got %+v, %v; want %d bytes, %d unknown", got, err, want, unknown)
		}
		again, _ := sm.PhysicalUtilisation(rapid.Permutation(replicas).Draw(t, "shuffled"))
		if again.Bytes != got.Bytes || !cmp.Equal(again.Missing, got.Missing) {
			t.Fatalf("%+v, shuffled %+v", got, again)
		}
	})
}

func TestVolumeUtilisation(t *testing.T) {
	for name, tc := range map[string]struct {
		replicas []sm.Replica
		bytes    int64
		ok       bool
		err      error
	}{
		"largest":      {[]sm.Replica{replica("a", "n1", 3), replica("a", "n2", 5)}, 5120, true, nil},
		"one unknown":  {[]sm.Replica{replica("a", "n1", -1), replica("a", "n2", 5), {}}, 5120, true, nil},
		"zero":         {[]sm.Replica{replica("a", "n1", 0)}, 0, true, nil},
		"all unknown":  {[]sm.Replica{replica("a", "n1", -1), {}}, 0, false, nil},
		"no replica":   {nil, 0, false, nil},
		"out of range": {[]sm.Replica{replica("a", "n1", 1<<53)}, 0, false, sm.ErrOverflow},
	} {
		t.Run(name, func(t *testing.T) {
			bytes, ok, err := sm.VolumeUtilisation(tc.replicas)
			if bytes != tc.bytes || ok != tc.ok || !errors.Is(err, tc.err) {
				t.Errorf("got %d, %v, %v", bytes, ok, err)
			}
		})
	}
}

func TestRoundDown(t *testing.T) {
	for in, want := range map[int64]int64{0: 0, 511: 0, 512: 512, 1023: 512, 1 << 40: 1 << 40} {
		if got := sm.RoundDown(in); got != want {
			t.Errorf("%d: got %d, want %d", in, got, want)
		}
	}
}
