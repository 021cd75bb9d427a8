package xapiface

import (
	"context"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// requirePower fails with VM_BAD_POWER_STATE [vm; expected; actual], in lower case as XAPI writes it, and with VM_IS_TEMPLATE for templates.
func requirePower(c *Call, want ...string) error {
	vm := c.Str(0)
	if xapidb.Value[bool](c.DB, "VM", vm, "is_a_template") {
		return xapidb.Errorf("VM_IS_TEMPLATE", vm)
	}
	actual := xapidb.Value[string](c.DB, "VM", vm, "power_state")
	for _, w := range want {
		if w == actual {
			return nil
		}
	}
	return xapidb.Errorf("VM_BAD_POWER_STATE", vm, strings.ToLower(strings.Join(want, ", ")), strings.ToLower(actual))
}

// usable says whether VMs can be started on a host.
func usable(db *xapidb.DB, host string) bool {
	metrics := xapidb.Value[string](db, "host", host, "metrics")
	return xapidb.Value[bool](db, "host", host, "enabled") && xapidb.Value[bool](db, "host_metrics", metrics, "live")
}

// vmStart serves VM.start(vm, paused, force) and VM.start_on(vm, host, paused, force): reserve the host, attach the disks, set the state, as XAPI orders it.
func vmStart(_ context.Context, c *Call) (any, error) {
	if err := requirePower(c, "Halted"); err != nil {
		return nil, err
	}
	paused := c.Bool(c.NArg() - 2)
	host := chooseHost(c)
	if c.NArg() == 4 {
		host = c.Str(1)
	}
	if host == xapidb.NullRef {
		return nil, xapidb.Errorf("NO_HOSTS_AVAILABLE")
	}
	if !usable(c.DB, host) {
		return nil, xapidb.Errorf("HOST_DISABLED", host)
	}
	return nil, bootVM(c, host, paused)
}

func chooseHost(c *Call) string {
	if affinity := xapidb.Value[string](c.DB, "VM", c.Str(0), "affinity"); affinity != xapidb.NullRef && usable(c.DB, affinity) {
		return affinity
	}
	for _, h := range c.DB.Refs("host") {
		if usable(c.DB, h) {
			return h
		}
	}
	return xapidb.NullRef
}

func bootVM(c *Call, host string, paused bool) error {
	vm, state := c.Str(0), "Running"
	if paused {
		state = "Paused"
	}
	w := writer{db: c.DB}
	w.set("VM", vm, "scheduled_to_be_resident_on", host)
	w.devices(vm, true)
	w.set("VM", vm, "domid", nextDomain(c.DB, host))
	w.set("VM", vm, "resident_on", host)
	w.set("VM", vm, "scheduled_to_be_resident_on", xapidb.NullRef)
	w.set("VM", vm, "power_state", state)
	if metrics := xapidb.Value[string](c.DB, "VM", vm, "metrics"); metrics != xapidb.NullRef {
		w.set("VM_metrics", metrics, "start_time", c.DB.Now())
	}
	return w.err
}

// nextDomain is one more than the highest domain id on the host.
func nextDomain(db *xapidb.DB, host string) int64 {
	var top int64
	for _, vm := range xapidb.Value[[]string](db, "host", host, "resident_VMs") {
		top = max(top, xapidb.Value[int64](db, "VM", vm, "domid"))
	}
	return top + 1
}

// writer keeps the first error of a sequence of writes.
type writer struct {
	db  *xapidb.DB
	err error
}

func (w *writer) set(class, ref, field string, v any) {
	if w.err == nil {
		w.err = w.db.Set(class, ref, field, v)
	}
}

func (w *writer) devices(vm string, attached bool) {
	for class, field := range map[string]string{"VBD": "VBDs", "VIF": "VIFs"} {
		for _, ref := range xapidb.Value[[]string](w.db, "VM", vm, field) {
			w.set(class, ref, "currently_attached", attached)
		}
	}
}

func vmStop(_ context.Context, c *Call) (any, error) {
	if err := requirePower(c, "Running", "Paused"); err != nil {
		return nil, err
	}
	vm := c.Str(0)
	w := writer{db: c.DB}
	w.set("VM", vm, "power_state", "Halted")
	w.set("VM", vm, "resident_on", xapidb.NullRef)
	w.set("VM", vm, "domid", -1)
	w.devices(vm, false)
	return nil, w.err
}

func vmReboot(_ context.Context, c *Call) (any, error) {
	if err := requirePower(c, "Running"); err != nil {
		return nil, err
	}
	host := xapidb.Value[string](c.DB, "VM", c.Str(0), "resident_on")
	return nil, c.DB.Set("VM", c.Str(0), "domid", nextDomain(c.DB, host))
}

func vmSwitch(from, to string) Handler {
	return func(_ context.Context, c *Call) (any, error) {
		if err := requirePower(c, from); err != nil {
			return nil, err
		}
		return nil, c.DB.Set("VM", c.Str(0), "power_state", to)
	}
}

// vmMigrate moves a running VM: the reservation is visible while resident_on still is the source.
func vmMigrate(_ context.Context, c *Call) (any, error) {
	if err := requirePower(c, "Running"); err != nil {
		return nil, err
	}
	vm, host := c.Str(0), c.Str(1)
	if !usable(c.DB, host) {
		return nil, xapidb.Errorf("HOST_DISABLED", host)
	}
	end, err := c.Begin("VM", vm, "pool_migrate")
	if err != nil {
		return nil, err
	}
	defer end()
	w := writer{db: c.DB}
	w.set("VM", vm, "scheduled_to_be_resident_on", host)
	w.set("VM", vm, "resident_on", host)
	w.set("VM", vm, "scheduled_to_be_resident_on", xapidb.NullRef)
	return nil, w.err
}

func vmPossibleHosts(_ context.Context, c *Call) (any, error) {
	hosts := []string{}
	for _, h := range c.DB.Refs("host") {
		if usable(c.DB, h) {
			hosts = append(hosts, h)
		}
	}
	return hosts, nil
}

// vmDestroy removes a halted VM (or a template or snapshot) with its VBDs and VIFs; disks stay.
func vmDestroy(_ context.Context, c *Call) (any, error) {
	vm := c.Str(0)
	if state := xapidb.Value[string](c.DB, "VM", vm, "power_state"); state != "Halted" {
		return nil, xapidb.Errorf("VM_BAD_POWER_STATE", vm, "halted", strings.ToLower(state))
	}
	for class, field := range map[string]string{"VBD": "VBDs", "VIF": "VIFs"} {
		for _, ref := range xapidb.Value[[]string](c.DB, "VM", vm, field) {
			if err := c.DB.Destroy(class, ref); err != nil {
				return nil, err
			}
		}
	}
	return nil, c.DB.Destroy("VM", vm)
}

// vmMemoryLimits serves VM.set_memory_limits(vm, static_min, static_max, dynamic_min, dynamic_max).
func vmMemoryLimits(_ context.Context, c *Call) (any, error) {
	w := writer{db: c.DB}
	for i, field := range []string{"memory_static_min", "memory_static_max", "memory_dynamic_min", "memory_dynamic_max"} {
		w.set("VM", c.Str(0), field, c.Int(i+1))
	}
	return nil, w.err
}
