package sm

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
)

// kib is how many bytes a KiB has; LINSTOR speaks KiB, XAPI bytes.
const kib = 1024

// Errors of the size formulas.
var (
	// ErrRedundancy: the resource group's place_count is below 1. SM would divide by zero.
	ErrRedundancy = errors.New("redundancy below 1; set place-count on the xcp-sr resource group")
	// ErrNoPool: no storage pool reports free space, so there is nothing to compute from.
	ErrNoPool = errors.New("no storage pool reports free space; check that the satellites are online")
	// ErrCapacity: a pool reports free space together with a missing or negative total; SM raises there.
	ErrCapacity = errors.New("storage pool without a usable total capacity")
	// ErrOverflow: the result does not fit the int64 of XAPI.
	ErrOverflow = errors.New("size exceeds 2^63-1 bytes")
)

// PoolCapacity is the capacity of the SR's storage pool on one node, in KiB. nil means that LINSTOR did not say.
type PoolCapacity struct{ TotalKiB, FreeKiB *int64 }

// PhysicalSize is SR.physical_size in bytes, in SM's order (LVMgr:538-559, LSR:1026-1033): the smallest total among
// the pools that report free space, times 1024, times the number of such pools, then floor-divided by the redundancy
// (place_count of the xcp-sr group). A pool without free space drops out of both the minimum and the count, so the
// value shrinks while a node is offline: the caller decides whether the view is whole. The product is exact whatever
// its size. Errors: ErrRedundancy, ErrNoPool, ErrCapacity, ErrOverflow.
func PhysicalSize(pools []PoolCapacity, redundancy int) (int64, error) {
	if redundancy < 1 {
		return 0, fmt.Errorf("compute physical size: %w", ErrRedundancy)
	}
	var smallest int64
	count := uint64(0)
	for _, p := range pools {
		if p.FreeKiB == nil {
			continue
		}
		if p.TotalKiB == nil || *p.TotalKiB < 0 {
			return 0, fmt.Errorf("compute physical size: %w", ErrCapacity)
		}
		if count == 0 || *p.TotalKiB < smallest {
			smallest = *p.TotalKiB
		}
		count++
	}
	if count == 0 {
		return 0, fmt.Errorf("compute physical size: %w", ErrNoPool)
	}
	// count*1024 fits: nobody has 2^54 pools in memory.
	hi, lo := bits.Mul64(uint64(smallest), count*kib)
	if hi >= uint64(redundancy) {
		return 0, fmt.Errorf("compute physical size: %w", ErrOverflow)
	}
	size, _ := bits.Div64(hi, lo, uint64(redundancy))
	if size > math.MaxInt64 {
		return 0, fmt.Errorf("compute physical size: %w", ErrOverflow)
	}
	return int64(size), nil
}

// Replica is one volume of a resource on one node, in the SR's storage pool. Leave out diskless ones: they have
// another pool (LVMgr:515 skips them by the pool's name).
type Replica struct {
	Resource     string
	Volume       int32
	Node         string
	AllocatedKiB *int64 // nil when absent, negative when the satellite does not know.
}

func (r Replica) known() bool { return r.AllocatedKiB != nil && *r.AllocatedKiB >= 0 }

// Utilisation is a sum of allocated sizes and what is missing from it.
type Utilisation struct {
	Bytes int64 // Sum over the volumes that have at least one known replica.
	// Unknown are replicas with an absent or negative size, in order of resource, volume, node. The stock driver of
	// 8.3's first releases fails on the first of them, R21 skips them; here the caller sees them.
	Unknown []Replica
	// Missing are resources that have a volume with no known replica at all, sorted: Bytes is too small by them.
	Missing []string
}

// Complete says that every volume is in Bytes.
func (u Utilisation) Complete() bool { return len(u.Missing) == 0 }

// PhysicalUtilisation is SR.physical_utilisation (LVMgr:499-536): over all volumes in the storage pool, foreign ones
// included, the sum of the largest allocated size among the replicas, times 1024. It is not multiplied by the number of
// replicas. Errors: ErrOverflow.
func PhysicalUtilisation(replicas []Replica) (Utilisation, error) {
	sorted := slices.Clone(replicas)
	slices.SortFunc(sorted, func(a, b Replica) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Node, b.Node))
	})
	var u Utilisation
	var sum int64
	for len(sorted) > 0 {
		n := sameVolume(sorted)
		largest, ok := largestKnown(sorted[:n])
		if !ok && (len(u.Missing) == 0 || u.Missing[len(u.Missing)-1] != sorted[0].Resource) {
			u.Missing = append(u.Missing, sorted[0].Resource)
		}
		for _, r := range sorted[:n] {
			if !r.known() {
				u.Unknown = append(u.Unknown, r)
			}
		}
		if largest > math.MaxInt64/kib-sum {
			return Utilisation{}, fmt.Errorf("sum allocated sizes: %w", ErrOverflow)
		}
		sum += largest
		sorted = sorted[n:]
	}
	u.Bytes = sum * kib
	return u, nil
}

// sameVolume counts the leading replicas of one volume.
func sameVolume(sorted []Replica) int {
	n := 1
	for n < len(sorted) && sorted[n].Resource == sorted[0].Resource && sorted[n].Volume == sorted[0].Volume {
		n++
	}
	return n
}

func largestKnown(replicas []Replica) (largestKiB int64, ok bool) {
	for _, r := range replicas {
		if r.known() {
			largestKiB, ok = max(largestKiB, *r.AllocatedKiB), true
		}
	}
	return largestKiB, ok
}

// VolumeUtilisation is VDI.physical_utilisation in bytes (LVMgr:2096-2147): the largest allocated size among the
// replicas of its resource. ok is false when no replica's size is known. Errors: ErrOverflow.
func VolumeUtilisation(replicas []Replica) (bytes int64, ok bool, err error) {
	largest, ok := largestKnown(replicas)
	if largest > math.MaxInt64/kib {
		return 0, false, fmt.Errorf("compute volume utilisation: %w", ErrOverflow)
	}
	return largest * kib, ok, nil
}

// RoundDown is what the driver does to a volume size before it offers it: down to 512 bytes (LVMgr:2073-2083).
func RoundDown(bytes int64) int64 { return bytes &^ 511 }
