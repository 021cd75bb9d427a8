package lab

import (
	"fmt"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// thinChunkKiB is the granularity of thin allocations.
const thinChunkKiB = 64

// databaseVolume holds the database of LINSTOR's controller.
const databaseVolume = "xcp-persistent-database"

// place puts replicas of a resource where LINSTOR's auto-placer wants them, or on the next hosts in turn while disks are made in bulk.
func (p *Pool) place(resource string, count int64) error {
	if p.bulk != nil {
		return p.placeInTurn(resource, count)
	}
	n := int(count)
	return p.linstor.Autoplace(resource, linstorsim.SelectFilter{PlaceCount: &n}).Err()
}

func (p *Pool) placeInTurn(resource string, count int64) error {
	for range count {
		h := p.hosts[p.bulk.next%len(p.hosts)]
		p.bulk.next++
		if err := p.linstor.CreateResource(resource, h.Name, linstorsim.CreateRequest{Props: linstorsim.Props{"StorPoolName": p.group}}).Err(); err != nil {
			return err
		}
	}
	return nil
}

// makeAvailable makes a resource usable on a host, diskless when it has no replica there.
func (p *Pool) makeAvailable(resource, host string) error {
	return p.linstor.MakeAvailable(resource, host, false).Err()
}

// view is what the controller tells about a resource and its volumes, all resources when none is named.
func (p *Pool) view(resources ...string) []linstorsim.Resource {
	return p.linstor.Resources(linstorsim.ResourceFilter{Names: resources, Volumes: true})
}

// allocated is what the driver reads as allocated size of a volume, in bytes: the largest among its replicas.
func (p *Pool) allocated(resource string) int64 {
	var largest int64
	for _, r := range p.view(resource) {
		for _, v := range r.Volumes {
			if strings.EqualFold(v.PoolName, p.group) && v.AllocatedKiB != nil {
				largest = max(largest, *v.AllocatedKiB)
			}
		}
	}
	return largest * kib
}

// volumeKiB is the defined size of a resource's volume.
func (p *Pool) volumeKiB(resource string) int64 {
	for _, rd := range p.linstor.Definitions([]string{resource}, nil, true) {
		for _, v := range rd.VolumeDefinitions {
			return v.SizeKiB
		}
	}
	return 0
}

// format writes what vhd-util writes into a new volume: footer, header and a table for the largest disk.
func (p *Pool) format(resource string) {
	// A pool that is full at this moment shows in the next write; the driver does not notice either.
	_ = p.grow(resource, vhdMetadata)
}

// grow writes bytes into a resource that had nothing there. Thick volumes do not grow.
func (p *Pool) grow(resource string, bytes int64) error {
	chunks := (bytes/kib + thinChunkKiB - 1) / thinChunkKiB
	return p.linstor.Write(resource, p.allocated(resource)/kib+chunks*thinChunkKiB)
}

// setInUse opens or closes a resource on a host. What cannot be closed was not open.
func (p *Pool) setInUse(resource, host string, inUse bool) {
	_ = p.linstor.SetInUse(resource, host, inUse)
}

// WriteDisk is a guest writing bytes of new data into a VDI. Thin volumes grow on the satellites; neither the controller nor XAPI hears of it. The error is that of
// the satellite: a full thin pool, no replica in reach.
func (p *Pool) WriteDisk(uuid string, bytes int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, err := p.disk(uuid)
	if err != nil {
		return err
	}
	if d.hidden {
		return fmt.Errorf("write %s: hidden disks are read-only", uuid)
	}
	return p.grow(d.resource, bytes+(bytes+vhdBlock-1)/vhdBlock*vhdBitmap)
}

// AddCapacity grows the storage pool of a host by addKiB, as adding a disk to its volume group does.
func (p *Pool) AddCapacity(host string, addKiB int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.linstor.GrowPool(p.Host(host).Name, p.group, addKiB)
	p.capacity[host] += addKiB
}

// makeDatabaseVolume makes xcp-persistent-database: diskful on the first hosts, diskless on all others, 1 GiB, an ext4 in it (LVMgr:2745-2800).
func (p *Pool) makeDatabaseVolume() error {
	r := p.linstor.SpawnWith(p.haGroup, linstorsim.SpawnRequest{Name: databaseVolume, SizesKiB: []int64{gib / kib}, DefinitionsOnly: true, PeerSlots: peerSlots})
	if err := r.Err(); err != nil {
		return err
	}
	for i, h := range p.hosts {
		req := linstorsim.CreateRequest{Props: linstorsim.Props{"StorPoolName": p.group}}
		switch {
		case i > peerSlots:
			return p.formatDatabase() // no room for more peers
		case i >= p.o.Redundancy:
			req = linstorsim.CreateRequest{Flags: []string{"DRBD_DISKLESS"}}
		}
		if err := p.linstor.CreateResource(databaseVolume, h.Name, req).Err(); err != nil {
			return err
		}
	}
	return p.formatDatabase()
}

func (p *Pool) formatDatabase() error {
	if err := p.grow(databaseVolume, 48*mib); err != nil {
		return err
	}
	p.setInUse(databaseVolume, p.hosts[0].Name, true)
	return nil
}
