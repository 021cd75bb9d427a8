package srsize

import (
	"fmt"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
)

const (
	mib = int64(1) << 20
	gib = int64(1) << 30

	// VHD sizes, from the SM driver (linstorvhdutil.py, vhdutil.py): metadata for the largest disk, and one bitmap per 2 MiB block.
	vhdMetadata   = 4329472
	vhdBlock      = 2 * mib
	vhdBitmap     = 4096
	vhdMaxVirtual = 2040 * gib

	fillingWarning    = 80 // per cent of a thin pool
	fillingCritical   = 90
	fillingHysteresis = 2

	daysWarning  = 30
	daysCritical = 7
)

// volumeBytes is the size of the LINSTOR volume that SM makes for a VHD of the given virtual size.
func volumeBytes(virtual int64) int64 {
	blocks := (virtual + vhdBlock - 1) / vhdBlock
	size := virtual + vhdMetadata + blocks*vhdBitmap
	return (size + 511) / 512 * 512
}

// largestVDI is the virtual size of the largest VHD that fits into the pools with all its replicas and without over-commitment, a multiple of 2 MiB. It is the
// redundancy-th largest free capacity, less what DRBD and LVM need around a volume, less the VHD's own overhead. Pools that do not tell are left out.
func largestVDI(pools []Pool, redundancy int) int64 {
	var free []int64
	for _, p := range pools {
		if p.FreeKiB != nil && *p.FreeKiB > 0 && p.NodeStatus == "ONLINE" {
			free = append(free, *p.FreeKiB*1024)
		}
	}
	if redundancy < 1 || len(free) < redundancy {
		return 0
	}
	slices.Sort(free)
	room := free[len(free)-redundancy]
	// DRBD keeps one bit per 4 KiB for each of seven peers (224 KiB per GiB); one 4 MiB extent is lost to rounding.
	room -= room/gib*224*1024 + 8*mib
	virtual := (room - vhdMetadata) / (vhdBlock + vhdBitmap) * vhdBlock
	for virtual > 0 && volumeBytes(virtual) > room {
		virtual -= vhdBlock
	}
	return min(max(virtual, 0), vhdMaxVirtual)
}

// filling gives the severity of a thin pool's fill level, "" below the first limit. A level that was raised stays until the pool is two points below it.
func filling(p Pool) agents.Severity {
	if !p.Thin || p.TotalKiB == nil || p.FreeKiB == nil || *p.TotalKiB <= 0 {
		return ""
	}
	used := 100 - float64(*p.FreeKiB)*100/float64(*p.TotalKiB)
	over := func(limit float64, raised ...agents.Severity) bool {
		if slices.Contains(raised, agents.Severity(p.WasFilling)) {
			limit -= fillingHysteresis
		}
		return used >= limit
	}
	switch {
	case over(fillingCritical, agents.Critical):
		return agents.Critical
	case over(fillingWarning, agents.Warning, agents.Critical):
		return agents.Warning
	}
	return ""
}

func findCapacity(now time.Time, sr SR, p *agents.Plan) {
	for _, pool := range sr.Stored.Pools {
		sev := filling(pool)
		if sev == "" {
			continue
		}
		p.Find(agents.Finding{Code: "thin-pool-filling", Subject: sr.subject() + "/node/" + pool.Node, Severity: sev,
			Text: fmt.Sprintf("the thin pool of %s on %s is %.1f %% full, %s are left; when it is full every disk on it stops",
				sr.Name, pool.Node, 100-float64(*pool.FreeKiB)*100/float64(*pool.TotalKiB), human(*pool.FreeKiB*1024)),
			Fix: "delete snapshots or disks, or add a disk to the volume group on " + pool.Node + " and extend the thin pool"})
	}
	text := "largest VDI that still fits with all its replicas: " + human(largestVDI(sr.Stored.Pools, sr.Stored.Redundancy))
	if days, ok := daysUntilFull(now, sr); ok {
		text += fmt.Sprintf("; full in about %.0f days at the present trend", days)
		if days <= daysWarning {
			sev := agents.Warning
			if days <= daysCritical {
				sev = agents.Critical
			}
			p.Find(agents.Finding{Code: "days-until-full", Subject: sr.subject(), Severity: sev,
				Text: fmt.Sprintf("%s will be full in about %.0f days at the present trend", sr.Name, days),
				Fix:  "add disks or hosts, or delete snapshots and disks that are no longer needed"})
		}
	}
	p.Find(agents.Finding{Code: "capacity", Subject: sr.subject(), Severity: agents.Info, Text: sr.Name + ": " + text})
}
