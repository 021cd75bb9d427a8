package lab

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// Sizes are the three sizes of an SR, in bytes.
type Sizes struct{ Physical, Utilisation, Virtual int64 }

// String prints the sizes for people.
func (s Sizes) String() string {
	return fmt.Sprintf("size %s, used %s, allocated %s", Human(s.Physical), Human(s.Utilisation), Human(s.Virtual))
}

// Human prints bytes with a binary unit and two digits.
func Human(bytes int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	v, i := float64(bytes), 0
	for (v >= 1024 || v <= -1024) && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%.2f %s", v, units[i])
}

// replica is one copy of a resource, as its satellite has it.
type replica struct{ resource, host string }

// Truth is what XAPI should show for the SR: the formulas of SM over what the satellites really hold, those of hosts that are away included. Only the SR of this pool is
// known; another uuid gives zeros.
func (p *Pool) Truth(sr string) Sizes {
	p.mu.Lock()
	defer p.mu.Unlock()
	if sr != p.srUUID {
		return Sizes{}
	}
	var s Sizes
	for _, bytes := range p.satellites() {
		s.Utilisation += bytes
	}
	for _, d := range p.disks {
		s.Virtual += d.visible()
	}
	if redundancy, err := p.placeCount(); err == nil {
		smallest := slices.Min(slices.Collect(maps.Values(p.capacity)))
		s.Physical = smallest * kib * int64(len(p.capacity)) / redundancy
	}
	return s
}

// satellites returns the largest allocation of each resource over all its replicas, in bytes. A satellite that is away or tells nonsense counts with what it held when it was
// last seen: a host that is off does not change, and a satellite that only lost its controller holds what its peers hold. It is computed once per state of LINSTOR.
func (p *Pool) satellites() map[string]int64 {
	if rev := p.linstor.Revision(); p.truth == nil || rev != p.truthRev {
		p.truth, p.truthRev = p.readSatellites(), rev
	}
	return p.truth
}

func (p *Pool) readSatellites() map[string]int64 {
	away := map[string]bool{}
	for _, n := range p.linstor.Nodes(nil, nil) {
		away[n.Name] = n.ConnectionStatus != linstorsim.StatusOnline
	}
	seen := make(map[replica]int64, len(p.held))
	largest := make(map[string]int64, len(p.held))
	for _, r := range p.view() {
		for _, v := range r.Volumes {
			if !strings.EqualFold(v.PoolName, p.group) || v.AllocatedKiB == nil {
				continue
			}
			k, bytes := replica{r.Name, r.NodeName}, *v.AllocatedKiB*kib
			if before, known := p.held[k]; known && (away[r.NodeName] || p.lying[k]) {
				bytes = before
			}
			seen[k] = bytes
			largest[r.Name] = max(largest[r.Name], bytes)
		}
	}
	p.held = seen
	return largest
}

// TruthVDI is what XAPI should show as physical_utilisation of a VDI, in bytes; false for a VDI that the pool does not have.
func (p *Pool) TruthVDI(uuid string) (int64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, ok := p.disks[uuid]
	if !ok {
		return 0, false
	}
	return p.satellites()[d.resource], true
}

// WrongVDIs lists the VDIs whose physical_utilisation in XAPI is not the truth, sorted by uuid.
func (p *Pool) WrongVDIs() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	truth := p.satellites()
	var wrong []string
	for uuid, d := range p.disks {
		if xapidb.Value[int64](p.db, "VDI", d.ref, "physical_utilisation") != truth[d.resource] {
			wrong = append(wrong, uuid)
		}
	}
	slices.Sort(wrong)
	return wrong
}

// Shown is what XAPI shows for an SR; zeros for an unknown uuid.
func (p *Pool) Shown(sr string) Sizes {
	ref, err := p.db.ByUUID("SR", sr)
	if err != nil {
		return Sizes{}
	}
	get := func(field string) int64 { return xapidb.Value[int64](p.db, "SR", ref, field) }
	return Sizes{Physical: get("physical_size"), Utilisation: get("physical_utilisation"), Virtual: get("virtual_allocation")}
}

// ShownVDI is what XAPI shows as physical_utilisation of a VDI; false when it shows no such VDI.
func (p *Pool) ShownVDI(uuid string) (int64, bool) {
	ref, err := p.db.ByUUID("VDI", uuid)
	if err != nil {
		return 0, false
	}
	return xapidb.Value[int64](p.db, "VDI", ref, "physical_utilisation"), true
}

// Disks lists the uuids of the visible VDIs, sorted.
func (p *Pool) Disks() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ids []string
	for uuid, d := range p.disks {
		if !d.hidden {
			ids = append(ids, uuid)
		}
	}
	slices.Sort(ids)
	return ids
}

// Resource is the LINSTOR resource of a VDI; "" for an unknown one.
func (p *Pool) Resource(vdi string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d, ok := p.disks[vdi]; ok {
		return d.resource
	}
	return ""
}
