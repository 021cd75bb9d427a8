package xapiface

import (
	"context"
	"slices"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// builtin is a behaviour that needs nothing but the database. Those with an effect run under a task, as in XAPI.
type builtin struct {
	fn     Handler
	effect bool
}

// builtins lists the behaviours that come with the face. Handle replaces any of them; glue that models hosts and storage does so for the verbs.
func builtins(f *Face) map[string]builtin {
	b := map[string]builtin{
		"system.listMethods":                      {fn: func(context.Context, *Call) (any, error) { return f.Methods(), nil }},
		"session.login_with_password":             {fn: f.login},
		"session.slave_local_login_with_password": {fn: f.localLogin},
		"session.logout":                          {fn: f.logout},
		"session.local_logout":                    {fn: f.logout},
		"event.from":                              {fn: f.eventFrom},
		"event.inject":                            {fn: f.eventInject},
		"event.register":                          {fn: f.eventRegister},
		"event.unregister":                        {fn: f.eventUnregister},
		"event.next":                              {fn: f.eventNext},
		"event.get_current_id":                    {fn: f.eventCurrentID},
		"task.create":                             {fn: f.taskCreate},
		"task.destroy":                            {fn: f.taskDestroy},
		"task.cancel":                             {fn: f.taskCancel},
		"message.create":                          {fn: messageCreate},
		"message.destroy":                         {fn: messageDestroy},
		"message.destroy_many":                    {fn: messageDestroyMany},
		"message.get":                             {fn: messageGet},
		"message.get_since":                       {fn: messageGetSince},
		"host.get_servertime":                     {fn: serverTime},
		"host.get_server_localtime":               {fn: serverTime},
		"host.is_in_emergency_mode":               {fn: f.inEmergency},
		"host.enable":                             {fn: set("host", "enabled", true), effect: true},
		"host.disable":                            {fn: set("host", "enabled", false), effect: true},
		"host.call_plugin":                        {fn: noPlugin, effect: true},
		"host.has_extension":                      {fn: func(context.Context, *Call) (any, error) { return false, nil }},
		"pool.designate_new_master":               {fn: f.designate, effect: true},
		"pool.emergency_transition_to_master":     {fn: f.emergencyTransition},
		"pool.emergency_reset_master":             {fn: nothing},
		"pool.recover_slaves":                     {fn: func(context.Context, *Call) (any, error) { return []string{}, nil }, effect: true},
		"pool.sync_database":                      {fn: nothing, effect: true},
		"SR.set_physical_utilisation":             {fn: setField("SR", "physical_utilisation")},
		"SR.set_virtual_allocation":               {fn: setField("SR", "virtual_allocation")},
		"SR.scan":                                 {fn: nothing, effect: true},
		"SR.update":                               {fn: nothing, effect: true},
		"SR.create":                               {fn: srCreate, effect: true},
		"SR.forget":                               {fn: srForget, effect: true},
		"SR.destroy":                              {fn: srForget, effect: true},
		"PBD.plug":                                {fn: set("PBD", "currently_attached", true), effect: true},
		"PBD.unplug":                              {fn: set("PBD", "currently_attached", false), effect: true},
		"VDI.destroy":                             {fn: vdiDestroy, effect: true},
		"VDI.forget":                              {fn: vdiDestroy, effect: true},
		"VDI.db_forget":                           {fn: vdiDestroy},
		"VDI.snapshot":                            {fn: vdiSnapshot, effect: true},
		"VDI.clone":                               {fn: vdiClone, effect: true},
		"VDI.resize":                              {fn: vdiResize, effect: true},
		"VBD.destroy":                             {fn: vbdDestroy, effect: true},
		"VBD.plug":                                {fn: vbdPlug, effect: true},
		"VBD.unplug":                              {fn: vbdUnplug, effect: true},
		"VBD.unplug_force":                        {fn: vbdUnplug, effect: true},
		"VM.destroy":                              {fn: vmDestroy, effect: true},
		"VM.start":                                {fn: vmStart, effect: true},
		"VM.start_on":                             {fn: vmStart, effect: true},
		"VM.hard_shutdown":                        {fn: vmStop, effect: true},
		"VM.clean_shutdown":                       {fn: vmStop, effect: true},
		"VM.shutdown":                             {fn: vmStop, effect: true},
		"VM.hard_reboot":                          {fn: vmReboot, effect: true},
		"VM.clean_reboot":                         {fn: vmReboot, effect: true},
		"VM.pause":                                {fn: vmSwitch("Running", "Paused"), effect: true},
		"VM.unpause":                              {fn: vmSwitch("Paused", "Running"), effect: true},
		"VM.pool_migrate":                         {fn: vmMigrate, effect: true},
		"VM.get_possible_hosts":                   {fn: vmPossibleHosts},
		"VM.assert_can_boot_here":                 {fn: nothing},
		"VM.set_memory_limits":                    {fn: vmMemoryLimits},
		"pool.ha_compute_max_host_failures_to_tolerate": {fn: func(context.Context, *Call) (any, error) { return int64(0), nil }},
	}
	for _, v := range []struct{ name, field string }{
		{"set_physical_utilisation", "physical_utilisation"}, {"set_virtual_size", "virtual_size"}, {"set_managed", "managed"}, {"set_missing", "missing"},
		{"set_is_a_snapshot", "is_a_snapshot"}, {"set_snapshot_of", "snapshot_of"}, {"set_snapshot_time", "snapshot_time"},
	} {
		b["VDI."+v.name] = builtin{fn: setField("VDI", v.field)}
	}
	return b
}

func nothing(context.Context, *Call) (any, error) { return nil, nil }

// set writes a constant to a field of the first argument.
func set(class, field string, v any) Handler {
	return func(_ context.Context, c *Call) (any, error) { return nil, c.DB.Set(class, c.Str(0), field, v) }
}

// setField writes the second argument to a field of the first.
func setField(class, field string) Handler {
	return func(_ context.Context, c *Call) (any, error) { return nil, c.DB.Set(class, c.Str(0), field, c.Arg(1)) }
}

func serverTime(_ context.Context, c *Call) (any, error) { return c.DB.Now(), nil }

func noPlugin(_ context.Context, c *Call) (any, error) {
	return nil, xapidb.Errorf("XENAPI_MISSING_PLUGIN", c.Str(1))
}

// inEmergency is true on a host that has an Emergency fault, or whose coordinator is down.
func (f *Face) inEmergency(_ context.Context, c *Call) (any, error) {
	f.mu.Lock()
	emergency := slices.ContainsFunc(f.faults[c.Host], func(x *Fault) bool { return x.Kind == Emergency })
	f.mu.Unlock()
	coordinator := f.Coordinator()
	return emergency || c.Host != coordinator && f.down(coordinator), nil
}

// designate moves the coordinator. The caller's connection is cut with all others, so the answer may not arrive, as in XAPI.
func (f *Face) designate(_ context.Context, c *Call) (any, error) {
	host := c.Str(0)
	if host == f.Coordinator() {
		return nil, nil
	}
	return nil, f.SetCoordinator(host)
}

func (f *Face) emergencyTransition(_ context.Context, c *Call) (any, error) {
	return nil, f.SetCoordinator(c.Host)
}

var messageClasses = map[string]string{
	"VM": "VM", "Host": "host", "SR": "SR", "Pool": "pool", "VMPP": "VMPP", "VMSS": "VMSS", "PVS_proxy": "PVS_proxy", "VDI": "VDI", "Certificate": "Certificate",
}

func messageCreate(_ context.Context, c *Call) (any, error) {
	class, ok := messageClasses[c.Str(2)]
	if !ok {
		return nil, xapidb.Errorf("INVALID_VALUE", "cls", c.Str(2))
	}
	if _, err := c.DB.ByUUID(class, c.Str(3)); err != nil {
		return nil, err
	}
	return c.DB.Create("message", map[string]any{
		"name": c.Str(0), "priority": c.Int(1), "cls": c.Str(2), "obj_uuid": c.Str(3), "body": c.Str(4), "timestamp": c.DB.Now(),
	})
}

func messageDestroy(_ context.Context, c *Call) (any, error) {
	return nil, c.DB.Destroy("message", c.Str(0))
}

func messageDestroyMany(_ context.Context, c *Call) (any, error) {
	for _, ref := range c.Set(0) {
		if err := c.DB.Destroy("message", ref); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func messageGet(_ context.Context, c *Call) (any, error) {
	return messagesSince(c.DB, c.Time(2), func(r xapidb.Record) bool {
		return r.Get("cls") == c.Str(0) && r.Get("obj_uuid") == c.Str(1)
	}), nil
}

func messageGetSince(_ context.Context, c *Call) (any, error) {
	return messagesSince(c.DB, c.Time(0), func(xapidb.Record) bool { return true }), nil
}

func messagesSince(db *xapidb.DB, since time.Time, match func(xapidb.Record) bool) records {
	var out records
	for _, r := range db.Records("message") {
		if !r.Get("timestamp").(time.Time).Before(since) && match(r) {
			out = append(out, r)
		}
	}
	return out
}

// srCreate introduces an SR with a plugged PBD on each host when it is shared, else on the named host.
func srCreate(_ context.Context, c *Call) (any, error) {
	sr, err := c.DB.Create("SR", map[string]any{
		"physical_size": c.Int(2), "name_label": c.Str(3), "name_description": c.Str(4), "type": c.Str(5), "content_type": c.Str(6), "shared": c.Bool(7), "sm_config": c.Map(8),
	})
	if err != nil {
		return nil, err
	}
	hosts := []string{c.Str(0)}
	if c.Bool(7) {
		hosts = c.DB.Refs("host")
	}
	for _, h := range hosts {
		if _, err := c.DB.Create("PBD", map[string]any{"host": h, "SR": sr, "device_config": c.Map(1), "currently_attached": true}); err != nil {
			return nil, err
		}
	}
	return sr, nil
}

// srForget removes an SR with its PBDs and VDIs. A plugged PBD forbids it: SR_HAS_PBD.
func srForget(_ context.Context, c *Call) (any, error) {
	sr := c.Str(0)
	pbds := xapidb.Value[[]string](c.DB, "SR", sr, "PBDs")
	for _, p := range pbds {
		if xapidb.Value[bool](c.DB, "PBD", p, "currently_attached") {
			return nil, xapidb.Errorf("SR_HAS_PBD", sr)
		}
	}
	for _, p := range pbds {
		if err := c.DB.Destroy("PBD", p); err != nil {
			return nil, err
		}
	}
	for _, v := range xapidb.Value[[]string](c.DB, "SR", sr, "VDIs") {
		if err := c.DB.Destroy("VDI", v); err != nil {
			return nil, err
		}
	}
	return nil, c.DB.Destroy("SR", sr)
}

// vdiDestroy removes a VDI and its VBDs; one that is attached is VDI_IN_USE [vdi; operation].
func vdiDestroy(_ context.Context, c *Call) (any, error) {
	vdi := c.Str(0)
	vbds := xapidb.Value[[]string](c.DB, "VDI", vdi, "VBDs")
	for _, v := range vbds {
		if xapidb.Value[bool](c.DB, "VBD", v, "currently_attached") {
			return nil, xapidb.Errorf("VDI_IN_USE", vdi, "destroy")
		}
	}
	for _, v := range vbds {
		if err := c.DB.Destroy("VBD", v); err != nil {
			return nil, err
		}
	}
	return nil, c.DB.Destroy("VDI", vdi)
}

func vdiSnapshot(_ context.Context, c *Call) (any, error) {
	return copyVDI(c, map[string]any{"is_a_snapshot": true, "snapshot_of": c.Str(0), "snapshot_time": c.DB.Now()})
}

func vdiClone(_ context.Context, c *Call) (any, error) { return copyVDI(c, nil) }

// copyVDI makes a row with the constructor fields of another VDI and some changes.
func copyVDI(c *Call, changes map[string]any) (any, error) {
	r, err := c.DB.Record("VDI", c.Str(0))
	if err != nil {
		return nil, err
	}
	id := c.DB.NewUUID()
	fields := map[string]any{"uuid": id, "location": id}
	for _, name := range []string{
		"name_label", "name_description", "SR", "virtual_size", "type", "sharable", "read_only", "other_config", "managed", "xenstore_data", "sm_config", "tags",
	} {
		fields[name] = r.Get(name)
	}
	for name, v := range changes {
		fields[name] = v
	}
	return c.DB.Create("VDI", fields)
}

func vdiResize(_ context.Context, c *Call) (any, error) {
	return nil, c.DB.Set("VDI", c.Str(0), "virtual_size", c.Int(1))
}

func vbdDestroy(_ context.Context, c *Call) (any, error) {
	if xapidb.Value[bool](c.DB, "VBD", c.Str(0), "currently_attached") {
		return nil, xapidb.Errorf("OPERATION_NOT_ALLOWED", "VBD '"+xapidb.Value[string](c.DB, "VBD", c.Str(0), "uuid")+"' still attached to VM")
	}
	return nil, c.DB.Destroy("VBD", c.Str(0))
}

func vbdPlug(_ context.Context, c *Call) (any, error) {
	if xapidb.Value[bool](c.DB, "VBD", c.Str(0), "currently_attached") {
		return nil, xapidb.Errorf("DEVICE_ALREADY_ATTACHED", c.Str(0))
	}
	return nil, c.DB.Set("VBD", c.Str(0), "currently_attached", true)
}

func vbdUnplug(_ context.Context, c *Call) (any, error) {
	if !xapidb.Value[bool](c.DB, "VBD", c.Str(0), "currently_attached") {
		return nil, xapidb.Errorf("DEVICE_ALREADY_DETACHED", c.Str(0))
	}
	return nil, c.DB.Set("VBD", c.Str(0), "currently_attached", false)
}
