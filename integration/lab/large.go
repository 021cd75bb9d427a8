package lab

import "fmt"

// Large makes a pool of many hosts, with vdis disks of 40 GiB shared out among vms running VMs; the first disk of each VM has data. It takes seconds, not minutes, for 64
// hosts, 2,000 VMs and 6,000 VDIs. The redundancy is 2 unless o says otherwise: SM's three peer slots leave no room for three replicas, a diskless coordinator and a VM elsewhere.
func Large(o Options, hosts, vms, vdis int) (*Pool, error) {
	o.Hosts = hosts
	if o.PoolKiB == 0 {
		o.PoolKiB = 20 << 30
	}
	p, err := New(o)
	if err != nil {
		return nil, err
	}
	disks, err := p.CreateDisks(vdis, 40*gib)
	if err != nil {
		return nil, fmt.Errorf("make disks: %w", err)
	}
	for n := range vms {
		mine := disks[n*vdis/vms : (n+1)*vdis/vms]
		vm, err := p.CreateVM(fmt.Sprintf("vm %d", n+1), mine...)
		if err != nil {
			return nil, err
		}
		if err := p.StartVM(vm, p.hosts[n%hosts].Name); err != nil {
			return nil, err
		}
		if len(mine) > 0 {
			if err := p.WriteDisk(mine[0], gib+int64(n)*mib); err != nil {
				return nil, err
			}
		}
	}
	return p, p.SRUpdate()
}
