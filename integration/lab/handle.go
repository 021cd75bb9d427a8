package lab

import (
	"context"
	"fmt"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

// handle gives XAPI's storage and VM calls the behaviour of this pool, so that a client over the wire does what the verbs do. Objects outside the SR keep the face's own.
func (p *Pool) handle() {
	uuidOf := func(class, ref string) string { return xapidb.Value[string](p.db, class, ref, "uuid") }
	void := func(do func(c *xapiface.Call) error) xapiface.Handler {
		return func(_ context.Context, c *xapiface.Call) (any, error) { return nil, do(c) }
	}
	p.xapi.Handle("SR.scan", void(func(c *xapiface.Call) error { return p.onSR(c, p.SRScan) }))
	p.xapi.Handle("SR.update", void(func(c *xapiface.Call) error { return p.onSR(c, p.SRUpdate) }))
	p.xapi.Handle("VDI.create", func(_ context.Context, c *xapiface.Call) (any, error) { return p.clientCreates(c.Struct(0)) })
	p.xapi.Handle("VDI.destroy", void(func(c *xapiface.Call) error { return p.DeleteDisk(uuidOf("VDI", c.Str(0))) }))
	p.xapi.Handle("VDI.resize", void(func(c *xapiface.Call) error { return p.ResizeDisk(uuidOf("VDI", c.Str(0)), c.Int(1)) }))
	p.xapi.Handle("VDI.snapshot", func(_ context.Context, c *xapiface.Call) (any, error) {
		uuid, err := p.SnapshotDisk(uuidOf("VDI", c.Str(0)))
		if err != nil {
			return nil, err
		}
		return p.db.ByUUID("VDI", uuid)
	})
	p.xapi.Handle("VM.start", void(func(c *xapiface.Call) error { return p.startAnywhere(c.Str(0)) }))
	p.xapi.Handle("VM.start_on", void(func(c *xapiface.Call) error {
		return p.StartVM(uuidOf("VM", c.Str(0)), p.named(c.Str(1)).Name)
	}))
	for _, call := range []string{"VM.clean_shutdown", "VM.hard_shutdown", "VM.shutdown"} {
		p.xapi.Handle(call, void(func(c *xapiface.Call) error { return p.StopVM(uuidOf("VM", c.Str(0))) }))
	}
	p.xapi.Handle("VM.pool_migrate", void(func(c *xapiface.Call) error {
		return p.MigrateVM(uuidOf("VM", c.Str(0)), p.named(c.Str(1)).Name)
	}))
	p.xapi.Handle("pool.designate_new_master", void(func(c *xapiface.Call) error { return p.designate(c) }))
}

// onSR runs an SR operation when it is this pool's SR and its PBD is plugged on the coordinator.
func (p *Pool) onSR(c *xapiface.Call, do func() error) error {
	if c.Str(0) != p.sr {
		return nil // not ours: nothing to do, as for an SR whose driver finds nothing new
	}
	if !xapidb.Value[bool](p.db, "PBD", p.Coordinator().PBD, "currently_attached") {
		return xapidb.Errorf("SR_HAS_NO_PBDS", p.sr)
	}
	return do()
}

func (p *Pool) clientCreates(fields map[string]any) (any, error) {
	size, _ := fields["virtual_size"].(int64)
	if sr, _ := fields["SR"].(string); sr != p.sr {
		return nil, xapidb.Errorf("SR_OPERATION_NOT_SUPPORTED", sr)
	}
	uuid, err := p.CreateDisk(size)
	if err != nil {
		return nil, err
	}
	ref, err := p.db.ByUUID("VDI", uuid)
	if err != nil {
		return nil, err
	}
	update := map[string]any{}
	for _, name := range []string{"name_label", "name_description", "other_config", "tags"} {
		if v, ok := fields[name]; ok {
			update[name] = v
		}
	}
	return ref, p.db.Update("VDI", ref, update)
}

// startAnywhere starts a VM on the first host that takes it.
func (p *Pool) startAnywhere(ref string) error {
	err := error(xapidb.Errorf("NO_HOSTS_AVAILABLE"))
	for _, h := range p.hosts {
		if err = p.StartVM(xapidb.Value[string](p.db, "VM", ref, "uuid"), h.Name); err == nil {
			return nil
		}
	}
	return err
}

// designate is pool.designate_new_master. The caller's connection is cut with all others, as by the real one, so it happens after the answer.
func (p *Pool) designate(c *xapiface.Call) error {
	to := p.named(c.Str(0))
	if to.Name == "" || p.isDown(to.Name) {
		return xapidb.Errorf("HOST_OFFLINE", c.Str(0))
	}
	p.clock.AfterFunc(0, func() {
		if err := p.MoveCoordinator(to.Name); err != nil {
			panic(fmt.Sprintf("lab: move coordinator to %s: %v", to.Name, err)) // Only writing a small file can fail here.
		}
	})
	return nil
}
