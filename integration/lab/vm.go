package lab

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// guest is a VM as XAPI's database has it: that is where the model keeps VMs, so that those made by a client over the wire are the same.
type guest struct {
	ref  string
	host string // name of the host it runs on, "" while halted
	vbds []plug // in device order, disks of this SR only
}

type plug struct{ vbd, disk string } // ref, VDI uuid

// CreateVM makes a halted VM with these VDIs as its disks and returns its uuid.
func (p *Pool) CreateVM(label string, disks ...string) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	metrics, err := p.db.Create("VM_metrics", map[string]any{"memory_actual": 2 * gib, "VCPUs_number": 2})
	if err != nil {
		return "", fmt.Errorf("create VM: %w", err)
	}
	ref, err := p.db.Create("VM", map[string]any{
		"name_label": label, "power_state": "Halted", "metrics": metrics, "memory_static_max": 2 * gib, "memory_dynamic_max": 2 * gib, "memory_dynamic_min": 2 * gib,
		"memory_static_min": gib, "memory_target": 2 * gib, "VCPUs_max": 2, "VCPUs_at_startup": 2, "domain_type": "hvm", "HVM_boot_policy": "BIOS order",
		"HVM_boot_params": map[string]string{"firmware": "bios", "order": "cdn"}, "platform": map[string]string{"acpi": "1", "apic": "true", "nx": "true", "device-model": "qemu-upstream-compat"},
		"allowed_operations": haltedOperations,
	})
	if err != nil {
		return "", fmt.Errorf("create VM: %w", err)
	}
	for i, uuid := range disks {
		if err := p.createVBD(ref, i, uuid); err != nil {
			return "", err
		}
	}
	return xapidb.Value[string](p.db, "VM", ref, "uuid"), nil
}

var (
	haltedOperations  = []string{"start", "start_on", "destroy", "clone", "snapshot"}
	runningOperations = []string{"clean_shutdown", "hard_shutdown", "pool_migrate", "snapshot"}
)

func (p *Pool) createVBD(vm string, device int, uuid string) error {
	d, err := p.disk(uuid)
	if err != nil {
		return err
	}
	_, err = p.db.Create("VBD", map[string]any{
		"VM": vm, "VDI": d.ref, "userdevice": strconv.Itoa(device), "device": "xvd" + string(rune('a'+device%26)), "bootable": device == 0, "mode": "RW", "type": "Disk",
		"unpluggable": true, "other_config": map[string]string{"owner": ""}, "allowed_operations": []string{"attach"},
	})
	if err != nil {
		return fmt.Errorf("create VBD: %w", err)
	}
	return nil
}

// guest reads a VM: UUID_INVALID.
func (p *Pool) guest(uuid string) (guest, error) {
	ref, err := p.db.ByUUID("VM", uuid)
	if err != nil {
		return guest{}, err
	}
	g := guest{ref: ref}
	if at := xapidb.Value[string](p.db, "VM", ref, "resident_on"); at != xapidb.NullRef {
		g.host = p.named(at).Name
	}
	for _, vbd := range xapidb.Value[[]string](p.db, "VM", ref, "VBDs") {
		vdi := xapidb.Value[string](p.db, "VBD", vbd, "VDI")
		if uuid := xapidb.Value[string](p.db, "VDI", vdi, "uuid"); p.disks[uuid] != nil {
			g.vbds = append(g.vbds, plug{vbd, uuid})
		}
	}
	slices.SortFunc(g.vbds, func(a, b plug) int {
		return cmp.Compare(xapidb.Value[string](p.db, "VBD", a.vbd, "userdevice"), xapidb.Value[string](p.db, "VBD", b.vbd, "userdevice"))
	})
	return g, nil
}

// named finds a host by ref; the zero Host when there is none.
func (p *Pool) named(ref string) Host {
	for _, h := range p.hosts {
		if h.Ref == ref {
			return h
		}
	}
	return Host{}
}

// StartVM starts a halted VM on a host: VM_BAD_POWER_STATE, HOST_OFFLINE, or the driver's error when a disk cannot be attached there.
func (p *Pool) StartVM(uuid, host string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	g, err := p.guest(uuid)
	if err != nil {
		return err
	}
	h := p.Host(host)
	if g.host != "" {
		return xapidb.Errorf("VM_BAD_POWER_STATE", g.ref, "halted", "running")
	}
	if p.down[host] {
		return xapidb.Errorf("HOST_OFFLINE", h.Ref)
	}
	if err := p.reserve(g, h); err != nil {
		return err
	}
	for i, d := range g.vbds {
		if err := p.attach(d, h); err != nil {
			for _, undo := range g.vbds[:i] {
				err = errors.Join(err, p.unplug(undo, h))
			}
			return errors.Join(err, p.db.Set("VM", g.ref, "scheduled_to_be_resident_on", xapidb.NullRef))
		}
	}
	return p.reside(g, h, map[string]any{"power_state": "Running", "domid": 1 + p.rng.IntN(999), "allowed_operations": runningOperations})
}

func (p *Pool) reserve(g guest, h Host) error {
	return p.db.Set("VM", g.ref, "scheduled_to_be_resident_on", h.Ref)
}

// reside ends a start or a migration: resident_on first, then the reservation is cleared.
func (p *Pool) reside(g guest, h Host, fields map[string]any) error {
	if err := p.db.Set("VM", g.ref, "resident_on", h.Ref); err != nil {
		return err
	}
	if err := p.db.Set("VM", g.ref, "scheduled_to_be_resident_on", xapidb.NullRef); err != nil {
		return err
	}
	return p.db.Update("VM", g.ref, fields)
}

// attach makes a disk usable on a host. A volume that is smaller than its VHD needs is grown first, and the sizes are pushed (LSR:1806-1826, 2203-2214).
func (p *Pool) attach(at plug, h Host) error {
	d, err := p.disk(at.disk)
	if err != nil {
		return err
	}
	if err := p.ready(); err != nil {
		return err
	}
	if err := p.inflateForAttach(d); err != nil {
		return err
	}
	if err := p.makeAvailable(d.resource, h.Name); err != nil {
		return backend("Unable to attach %s: %v", d.uuid, err)
	}
	if d.holders[h.Name] == 0 {
		if err := p.linstor.SetInUse(d.resource, h.Name, true); err != nil {
			return backend("Unable to open %s: %v", d.uuid, err)
		}
		if err := p.db.PutInMap("VDI", d.ref, "sm_config", "host_"+h.Ref, "RW"); err != nil {
			return err
		}
	}
	d.holders[h.Name]++
	return p.db.Update("VBD", at.vbd, map[string]any{"currently_attached": true, "allowed_operations": []string{"unplug", "unplug_force"}})
}

func (p *Pool) inflateForAttach(d *disk) error {
	if p.volumeKiB(d.resource)*kib >= VolumeBytes(d.virtual) {
		return nil
	}
	if err := p.inflate(d, d.virtual); err != nil {
		return err
	}
	if err := p.db.Set("VDI", d.ref, "physical_utilisation", p.allocated(d.resource)); err != nil {
		return err
	}
	return p.pushStats(0)
}

// detach closes a disk on a host. A supporter removes the diskless resource that it no longer needs, the coordinator keeps its own (LSR:1890-1906).
func (p *Pool) detach(at plug, h Host) {
	d, ok := p.disks[at.disk]
	if !ok || d.holders[h.Name] == 0 {
		return
	}
	if d.holders[h.Name]--; d.holders[h.Name] == 0 {
		delete(d.holders, h.Name)
		p.setInUse(d.resource, h.Name, false)
		_ = p.db.RemoveFromMap("VDI", d.ref, "sm_config", "host_"+h.Ref) // The row is there as long as the disk is.
		if h.Ref != p.Coordinator().Ref && p.linstor.Controller().Phase == linstorsim.Up {
			p.dropDiskless(d.resource, h.Name)
		}
	}
}

// unplug is detach as XAPI sees it.
func (p *Pool) unplug(at plug, h Host) error {
	p.detach(at, h)
	return p.db.Update("VBD", at.vbd, map[string]any{"currently_attached": false, "allowed_operations": []string{"attach"}})
}

func (p *Pool) dropDiskless(resource, host string) {
	for _, r := range p.linstor.Resources(linstorsim.ResourceFilter{Names: []string{resource}, Nodes: []string{host}}) {
		if slices.Contains(r.Flags, "DRBD_DISKLESS") && !slices.Contains(r.Flags, "TIE_BREAKER") {
			_ = p.linstor.DeleteResource(resource, host, true) // The driver ignores it too when it stays as tie-breaker.
		}
	}
}

// StopVM halts a VM; halting a halted one is VM_BAD_POWER_STATE.
func (p *Pool) StopVM(uuid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	g, err := p.guest(uuid)
	if err != nil {
		return err
	}
	if g.host == "" {
		return xapidb.Errorf("VM_BAD_POWER_STATE", g.ref, "running", "halted")
	}
	return p.halt(g)
}

func (p *Pool) halt(g guest) error {
	h := p.Host(g.host)
	for _, d := range g.vbds {
		if err := p.unplug(d, h); err != nil {
			return err
		}
	}
	return p.db.Update("VM", g.ref, map[string]any{
		"power_state": "Halted", "resident_on": xapidb.NullRef, "domid": -1, "allowed_operations": haltedOperations,
	})
}

// MigrateVM moves a running VM to another host; its disks are open on one host at a time. A guest whose disk cannot be opened on the other host is gone: it has left the
// first one.
func (p *Pool) MigrateVM(uuid, host string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	g, err := p.guest(uuid)
	if err != nil {
		return err
	}
	to := p.Host(host)
	switch {
	case g.host == "":
		return xapidb.Errorf("VM_BAD_POWER_STATE", g.ref, "running", "halted")
	case p.down[host] || p.down[g.host]:
		return xapidb.Errorf("HOST_OFFLINE", to.Ref)
	case g.host == host:
		return nil
	}
	from := p.Host(g.host)
	if err := p.reserve(g, to); err != nil {
		return err
	}
	for i, d := range g.vbds {
		p.detach(d, from)
		if err := p.attach(d, to); err != nil {
			for _, moved := range g.vbds[:i] {
				p.detach(moved, to)
			}
			return errors.Join(fmt.Errorf("migrate %s: %w", uuid, err), p.halt(g), p.db.Set("VM", g.ref, "scheduled_to_be_resident_on", xapidb.NullRef))
		}
	}
	return p.reside(g, to, nil)
}

// VMs lists the uuids of all VMs, oldest first; control domains are not among them.
func (p *Pool) VMs() []string {
	var ids []string
	for _, r := range p.db.Records("VM") {
		if r.Get("is_control_domain") != true && r.Get("is_a_template") != true {
			ids = append(ids, r.Get("uuid").(string))
		}
	}
	return ids
}
