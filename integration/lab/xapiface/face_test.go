package xapiface_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type pool struct {
	xapidb.Pool
	t    testing.TB
	db   *xapidb.DB
	face *xapiface.Face
	s    string // a root session on the coordinator
}

// newPool makes a pool of some hosts behind a face that is closed with the test.
func newPool(t testing.TB, hosts int) pool {
	t.Helper()
	p := pool{t: t, db: xapidb.New(xapidb.Options{Rand: xapidb.SeededRand(1)})}
	var err error
	if p.Pool, err = p.db.SeedPool(xapidb.Seed{Hosts: hosts}); err != nil {
		t.Fatal(err)
	}
	p.face = xapiface.New(xapiface.Options{DB: p.db, Password: "secret"})
	t.Cleanup(func() {
		if err := p.face.Close(); err != nil {
			t.Error(err)
		}
	})
	if p.s, err = p.face.Login("test"); err != nil {
		t.Fatal(err)
	}
	return p
}

// call does a call with the pool's session and fails the test on an error.
func (p pool) call(name string, args ...any) any {
	p.t.Helper()
	v, err := p.try(name, args...)
	if err != nil {
		p.t.Fatalf("%s: %v", name, err)
	}
	return v
}

func (p pool) try(name string, args ...any) (any, error) {
	return p.face.Do(context.Background(), "", name, append([]any{p.s}, args...)...)
}

func (p pool) create(class string, fields map[string]any) string {
	p.t.Helper()
	ref, err := p.db.Create(class, fields)
	if err != nil {
		p.t.Fatal(err)
	}
	return ref
}

func wantError(t testing.TB, err error, code string, params ...string) {
	t.Helper()
	var e *xapidb.Error
	if !errors.As(err, &e) || e.Code != code || params != nil && !slices.Equal(e.Params, params) {
		t.Errorf("error %v, want %s%v", err, code, params)
	}
}

func TestListedMethodsAreServed(t *testing.T) {
	p := newPool(t, 1)
	listed := p.face.Methods()
	if len(listed) < 1500 {
		t.Errorf("%d methods listed, want at least 1500", len(listed))
	}
	for _, name := range listed {
		_, err := p.face.Do(context.Background(), "", name)
		if errors.Is(err, &xapidb.Error{Code: "MESSAGE_METHOD_UNKNOWN"}) {
			t.Errorf("%s is listed and unknown", name)
		}
	}
	for _, name := range []string{"VM.get_all_where", "SR.probe", "VM.set_power_state"} {
		if slices.Contains(listed, name) {
			t.Errorf("%s is listed", name)
		}
	}
}

func TestDispatchErrors(t *testing.T) {
	p := newPool(t, 1)
	vm := p.create("VM", nil)
	for _, c := range []struct {
		method string
		args   []any
		code   string
		params []string
	}{
		{"VM.nosuch", nil, "MESSAGE_METHOD_UNKNOWN", []string{"VM.nosuch"}},
		{"vm.get_all", nil, "MESSAGE_METHOD_UNKNOWN", []string{"vm.get_all"}},
		{"Async.VM.get_all", nil, "MESSAGE_METHOD_UNKNOWN", []string{"VM.get_all"}},
		{"SR.probe", nil, "MESSAGE_METHOD_UNKNOWN", nil},
		{"VM.set_power_state", []any{vm, "Running"}, "MESSAGE_METHOD_UNKNOWN", nil},
		{"VM.get_record", nil, "MESSAGE_PARAMETER_COUNT_MISMATCH", []string{"VM.get_record", "1", "0"}},
		{"VM.get_record", []any{vm, "x"}, "MESSAGE_PARAMETER_COUNT_MISMATCH", []string{"VM.get_record", "1", "2"}},
		{"VDI.snapshot", nil, "MESSAGE_PARAMETER_COUNT_MISMATCH", []string{"VDI.snapshot", "1", "0"}},
		{"VM.get_record", []any{"OpaqueRef:none"}, "HANDLE_INVALID", []string{"VM", "OpaqueRef:none"}},
		{"VM.get_record", []any{xapidb.NullRef}, "HANDLE_INVALID", []string{"VM", xapidb.NullRef}},
		{"VM.pool_migrate", []any{vm, "OpaqueRef:none", map[string]any{}}, "HANDLE_INVALID", []string{"host", "OpaqueRef:none"}},
		{"VM.get_by_uuid", []any{"none"}, "UUID_INVALID", []string{"VM", "none"}},
		{"VM.get_record", []any{int64(5)}, "FIELD_TYPE_ERROR", []string{"self"}},
		{"VM.set_is_a_template", []any{vm, "true"}, "FIELD_TYPE_ERROR", nil},
		{"VM.set_memory_limits", []any{vm, "x", "1", "1", "1"}, "FIELD_TYPE_ERROR", []string{"static_min"}},
		{"VM.get_all_records_where", []any{"x"}, "INVALID_VALUE", nil},
		{"event.from", []any{[]any{}, "bad", 0.0}, "EVENT_FROM_TOKEN_PARSE_FAILURE", []string{"bad"}},
		{"event.inject", []any{"vm", vm}, "HANDLE_INVALID", []string{"vm", vm}},
		{"event.next", nil, "SESSION_NOT_REGISTERED", nil},
		{"message.create", []any{"n", "1", "VM", "none", "b"}, "UUID_INVALID", []string{"VM", "none"}},
		{"VBD.create", []any{map[string]any{"VM": vm}}, "FIELD_TYPE_ERROR", nil},
		{"VM.hard_shutdown", []any{vm}, "VM_BAD_POWER_STATE", []string{vm, "running, paused", "halted"}},
		{"host.call_plugin", []any{p.Hosts[0], "p", "f", map[string]any{}}, "XENAPI_MISSING_PLUGIN", []string{"p"}},
	} {
		t.Run(c.method, func(t *testing.T) {
			_, err := p.try(c.method, c.args...)
			wantError(t, err, c.code, c.params...)
		})
	}
	_, err := p.face.Do(context.Background(), "", "VM.get_all")
	wantError(t, err, "MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.get_all", "0", "-1")
	_, err = p.face.Do(context.Background(), "", "VM.get_all", "OpaqueRef:none")
	wantError(t, err, "SESSION_INVALID", "OpaqueRef:none")
}

func TestGeneratedMethods(t *testing.T) {
	p := newPool(t, 1)
	sr := p.create("SR", map[string]any{"name_label": "a"})
	vm := p.create("VM", map[string]any{"name_label": "a"})
	if got := p.call("SR.get_by_name_label", "none"); !cmp.Equal(got, []string{}) {
		t.Errorf("get_by_name_label of nothing: %v", got)
	}
	vdi := p.call("VDI.create", map[string]any{
		"name_label": "d", "SR": sr, "virtual_size": "1073741824", "type": "user", "sharable": false, "read_only": false, "other_config": map[string]any{"k": "v"},
		"physical_utilisation": "5", "unknown": "ignored",
	}).(string)
	for field, want := range map[string]any{"virtual_size": int64(1 << 30), "physical_utilisation": int64(0), "SR": sr, "on_boot": "persist"} {
		if got := p.call("VDI.get_"+field, vdi); !cmp.Equal(got, want) {
			t.Errorf("VDI.get_%s = %v, want %v", field, got, want)
		}
	}
	p.call("VM_set_name_label", vm, "b")
	p.call("host_metrics_get_all")
	p.call("VM.add_to_other_config", vm, "k", "v")
	p.call("VM.remove_from_other_config", vm, "absent")
	p.call("VM.add_tags", vm, "t")
	p.call("VM.set_memory_static_max", vm, "5")
	p.call("VM.set_HVM_shadow_multiplier", vm, int64(2))
	for field, want := range map[string]any{
		"name_label": "b", "other_config": map[string]string{"k": "v"}, "tags": []string{"t"}, "memory_static_max": int64(5), "HVM_shadow_multiplier": 2.0,
	} {
		if got := p.call("VM.get_"+field, vm); !cmp.Equal(got, want) {
			t.Errorf("VM.get_%s = %v, want %v", field, got, want)
		}
	}
	if got := p.call("VM.get_all_where", `field "name__label"="b"`); !cmp.Equal(got, []string{vm}) {
		t.Errorf("get_all_where: %v", got)
	}
}

func TestOnlyTheStorageManagerWritesSizes(t *testing.T) {
	p := newPool(t, 1)
	sr, other := p.create("SR", nil), p.create("SR", nil)
	vdi := p.create("VDI", map[string]any{"SR": sr})
	guarded := map[string][]any{
		"SR.set_physical_size": {sr, "1"}, "SR.set_physical_utilisation": {sr, "2"}, "SR.set_virtual_allocation": {sr, "3"},
		"VDI.set_physical_utilisation": {vdi, "4"}, "VDI.set_virtual_size": {vdi, "5"}, "VDI.set_managed": {vdi, false}, "VDI.set_sharable": {vdi, true},
		"VDI.set_missing": {vdi, true}, "VDI.set_snapshot_of": {vdi, vdi},
	}
	refused := func() {
		t.Helper()
		for name, args := range guarded {
			_, err := p.try(name, args...)
			wantError(t, err, "PERMISSION_DENIED", "")
		}
	}
	refused()
	p.call("session.add_to_other_config", p.s, "_sm_session", other)
	refused()
	p.call("session.remove_from_other_config", p.s, "_sm_session")
	p.call("session.add_to_other_config", p.s, "_sm_session", sr)
	for name, args := range guarded {
		p.call(name, args...)
		class, method, _ := strings.Cut(name, ".")
		field := strings.TrimPrefix(method, "set_")
		if got := p.call(class+".get_"+field, args[0]); fmt.Sprint(got) != fmt.Sprint(args[1]) {
			t.Errorf("%s.%s = %v after %v", class, field, got, args[1])
		}
	}
	p.call("VDI.add_to_sm_config", vdi, "free", "for all")
}

func TestRolesOfHosts(t *testing.T) {
	p := newPool(t, 2)
	p.db.Restart() // The task of Login is not the point here.
	ctx := context.Background()
	s, err := p.face.Do(ctx, p.Hosts[1], "session.login_with_password", "anyone", "anything")
	if err != nil {
		t.Fatalf("login over a supporter's unix socket: %v", err)
	}
	if this, err := p.face.Do(ctx, p.Hosts[1], "session.get_this_host", s, s); err != nil || this != p.Hosts[1] {
		t.Errorf("this host = %v, error %v; want the supporter", this, err)
	}
	if _, err := p.face.Do(ctx, p.Hosts[1], "VM.get_all", s); err != nil {
		t.Errorf("a supporter does not forward: %v", err)
	}
	p.face.SetFault(p.Hosts[0], xapiface.Fault{Kind: xapiface.Refuse})
	_, err = p.face.Do(ctx, p.Hosts[1], "VM.get_all", s)
	wantError(t, err, "CANNOT_CONTACT_HOST")
	local, err := p.face.Do(ctx, p.Hosts[1], "session.slave_local_login_with_password", "root", "")
	if err != nil {
		t.Fatal(err)
	}
	if v, err := p.face.Do(ctx, p.Hosts[1], "host.is_in_emergency_mode", local); err != nil || v != true {
		t.Errorf("is_in_emergency_mode = %v, %v", v, err)
	}
	if err := p.face.ClearFaults(p.Hosts[0]); err != nil {
		t.Fatal(err)
	}
	_, err = p.face.Do(ctx, p.Hosts[1], "VM.get_all", local)
	wantError(t, err, "SESSION_INVALID")
	p.face.SetFault(p.Hosts[1], xapiface.Fault{Kind: xapiface.Emergency, Code: "HOST_HAS_NO_MANAGEMENT_IP"})
	_, err = p.face.Do(ctx, p.Hosts[1], "VM.get_all", s)
	wantError(t, err, "HOST_HAS_NO_MANAGEMENT_IP")
	if err := p.face.SetCoordinator(p.Hosts[1]); err != nil {
		t.Fatal(err)
	}
	_, err = p.face.Do(ctx, p.Hosts[0], "VM.get_all", s)
	wantError(t, err, "SESSION_INVALID")
}

func TestSessionEndWakesEventFrom(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(p pool)
	}{
		{"logout", func(p pool) { p.call("session.logout") }},
		{"restart", func(p pool) { p.face.Restart() }},
		{"failover", func(p pool) { _ = p.face.SetCoordinator(p.Hosts[1]) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPool(t, 2)
				token := p.call("event.from", []any{"*"}, "", 0.0).(xapidb.Batch).Token
				done := make(chan error)
				go func() {
					_, err := p.try("event.from", []any{"session"}, token, 60.0)
					done <- err
				}()
				synctest.Wait()
				start := time.Now()
				c.end(p)
				wantError(t, <-done, "SESSION_INVALID", p.s)
				if time.Since(start) != 0 {
					t.Errorf("took %v", time.Since(start))
				}
			})
		})
	}
}

func TestSessionsPerOriginatorAreLimited(t *testing.T) {
	now := time.Unix(1e9, 0)
	db := xapidb.New(xapidb.Options{Clock: func() time.Time { return now }})
	f := xapiface.New(xapiface.Options{DB: db, SessionLimit: 5})
	t.Cleanup(func() { _ = f.Close() })
	var first string
	for n := range 7 {
		now = now.Add(time.Second)
		s, err := f.Login("a")
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			first = s
		}
	}
	if _, err := f.Login("b"); err != nil {
		t.Fatal(err)
	}
	if db.Len("session") != 6 {
		t.Errorf("%d sessions, want 5 of a and 1 of b", db.Len("session"))
	}
	_, err := f.Do(context.Background(), "", "VM.get_all", first)
	wantError(t, err, "SESSION_INVALID")
}

// await waits for a task to leave pending, by events.
func (p pool) await(task string) xapidb.Record {
	p.t.Helper()
	token := ""
	for {
		b := p.call("event.from", []any{"task/" + task}, token, 60.0).(xapidb.Batch)
		token = b.Token
		for _, e := range b.Events {
			if s := e.Snapshot.Get("status"); s != "pending" && s != "cancelling" {
				return *e.Snapshot
			}
		}
	}
}

func TestAsync(t *testing.T) {
	p := newPool(t, 1)
	vm := p.create("VM", nil)
	sr := p.create("SR", nil)
	vdi := p.create("VDI", map[string]any{"SR": sr})

	r := p.await(p.call("Async.VM.start", vm, false, false).(string))
	if diff := cmp.Diff([]any{"success", "", 1.0, "Async.VM.start", []string{}}, []any{r.Get("status"), r.Get("result"), r.Get("progress"), r.Get("name_label"), r.Get("error_info")}); diff != "" {
		t.Errorf("void task (-want +got):\n%s", diff)
	}
	r = p.await(p.call("Async.VDI.snapshot", vdi).(string))
	snapshots := xapidb.Value[[]string](p.db, "VDI", vdi, "snapshots")
	if len(snapshots) != 1 || r.Get("result") != "<value>"+snapshots[0]+"</value>" {
		t.Errorf("result %v, snapshots %v", r.Get("result"), snapshots)
	}
	task := p.call("Async.VM.start", vm, false, false).(string)
	r = p.await(task)
	if diff := cmp.Diff([]any{"failure", []string{"VM_BAD_POWER_STATE", vm, "halted", "running"}}, []any{r.Get("status"), r.Get("error_info")}); diff != "" {
		t.Errorf("failed task (-want +got):\n%s", diff)
	}
	p.call("task.destroy", task)

	entered := make(chan string)
	p.face.Handle("SR.scan", func(ctx context.Context, c *xapiface.Call) (any, error) {
		end, err := c.Begin("SR", c.Str(0), "scan")
		if err != nil {
			return nil, err
		}
		defer end()
		c.Progress(0.5)
		entered <- c.Task
		<-ctx.Done()
		return nil, ctx.Err()
	})
	task = p.call("Async.SR.scan", sr).(string)
	if got := <-entered; got != task {
		t.Errorf("handler saw task %s, want %s", got, task)
	}
	if got := p.call("SR.get_current_operations", sr); !cmp.Equal(got, map[string]string{task: "scan"}) {
		t.Errorf("current_operations = %v", got)
	}
	_, err := p.try("SR.scan", sr)
	wantError(t, err, "OTHER_OPERATION_IN_PROGRESS", "SR", sr, "scan", task)
	p.call("task.destroy", task)
	if p.db.Len("task") == 0 || xapidb.Value[string](p.db, "task", task, "status") != "pending" {
		t.Error("destroy of a pending task removed it")
	}
	p.call("task.cancel", task)
	r = p.await(task)
	if r.Get("status") != "cancelled" {
		t.Errorf("status %v after cancel", r.Get("status"))
	}
	if got := p.call("SR.get_current_operations", sr); len(got.(map[string]string)) != 0 {
		t.Errorf("current_operations = %v after cancel", got)
	}
}

func TestTasksOfClients(t *testing.T) {
	p := newPool(t, 1)
	task := p.call("task.create", "label", "text").(string)
	p.call("task.set_progress", task, 0.25)
	p.call("task.set_other_config", task, map[string]any{"a": "b"})
	p.call("task.set_status", task, "success")
	p.call("task.set_result", task, "x")
	p.call("task.destroy", task)
	if p.db.Len("task") != 0 {
		t.Error("the task is still there")
	}
}

func TestPowerStates(t *testing.T) {
	p := newPool(t, 3)
	sr := p.create("SR", nil)
	vm := p.create("VM", map[string]any{"affinity": p.Hosts[1]})
	vbd := p.create("VBD", map[string]any{"VM": vm, "VDI": p.create("VDI", map[string]any{"SR": sr})})
	state := func() []any {
		r, err := p.db.Record("VM", vm)
		if err != nil {
			t.Fatal(err)
		}
		return []any{r.Get("power_state"), r.Get("resident_on"), r.Get("scheduled_to_be_resident_on"), xapidb.Value[bool](p.db, "VBD", vbd, "currently_attached")}
	}
	for _, c := range []struct {
		method string
		args   []any
		power  string
		host   string
	}{
		{"VM.start", []any{vm, false, false}, "Running", p.Hosts[1]},
		{"VM.pool_migrate", []any{vm, p.Hosts[2], map[string]any{"live": "true"}}, "Running", p.Hosts[2]},
		{"VM.hard_reboot", []any{vm}, "Running", p.Hosts[2]},
		{"VM.pause", []any{vm}, "Paused", p.Hosts[2]},
		{"VM.unpause", []any{vm}, "Running", p.Hosts[2]},
		{"VM.clean_shutdown", []any{vm}, "Halted", xapidb.NullRef},
		{"VM.start_on", []any{vm, p.Hosts[0], true, false}, "Paused", p.Hosts[0]},
		{"VM.hard_shutdown", []any{vm}, "Halted", xapidb.NullRef},
	} {
		p.call(c.method, c.args...)
		if diff := cmp.Diff([]any{c.power, c.host, xapidb.NullRef, c.power != "Halted"}, state()); diff != "" {
			t.Fatalf("after %s (-want +got):\n%s", c.method, diff)
		}
	}
	p.call("VM.set_memory_limits", vm, "1", "4", "2", "3")
	if got := p.call("VM.get_memory_dynamic_max", vm); got != int64(3) {
		t.Errorf("memory_dynamic_max = %v", got)
	}
	p.call("host.disable", p.Hosts[0])
	if got := p.call("VM.get_possible_hosts", vm); !cmp.Equal(got, p.Hosts[1:]) {
		t.Errorf("possible hosts %v, want %v", got, p.Hosts[1:])
	}
	_, err := p.try("VM.start_on", vm, p.Hosts[0], false, false)
	wantError(t, err, "HOST_DISABLED")
	_, err = p.try("VBD.plug", vbd)
	if err != nil {
		t.Error(err)
	}
	_, err = p.try("VDI.destroy", xapidb.Value[string](p.db, "VBD", vbd, "VDI"))
	wantError(t, err, "VDI_IN_USE")
	p.call("VBD.unplug", vbd)
	p.call("VM.destroy", vm)
	if p.db.Len("VBD") != 0 {
		t.Error("VBDs stay after VM.destroy")
	}
}

func TestMessages(t *testing.T) {
	p := newPool(t, 1)
	id := p.call("host.get_uuid", p.Hosts[0])
	token := p.call("event.from", []any{"message"}, "", 0.0).(xapidb.Batch).Token
	ref := p.call("message.create", "N", "3", "Host", id, "body").(string)
	b := p.call("event.from", []any{"message"}, token, 0.0).(xapidb.Batch)
	if len(b.Events) != 1 || b.Events[0].Operation != "add" || b.Events[0].Ref != ref {
		t.Errorf("events %v", b.Events)
	}
	r := p.call("message.get_record", ref).(xapidb.Record)
	if r.Get("priority") != int64(3) || r.Get("cls") != "Host" || r.Get("body") != "body" {
		t.Errorf("record %v", r.Map())
	}
	for _, found := range []any{
		p.call("message.get", "Host", id, "19700101T00:00:00Z"), p.call("message.get_since", r.Get("timestamp")), p.call("message.get_all_records_where", `field "name" = "N"`),
	} {
		if got := fmt.Sprint(found); !strings.Contains(got, ref) {
			t.Errorf("message is not found: %s", got)
		}
	}
	second := p.call("message.create", "M", 1, "Pool", p.call("pool.get_uuid", p.Ref), "").(string)
	p.call("message.destroy_many", []any{second})
	p.call("message.destroy", ref)
	b = p.call("event.from", []any{"message"}, b.Token, 0.0).(xapidb.Batch)
	if len(b.Events) != 1 || b.Events[0].Operation != "del" {
		t.Errorf("events %v", b.Events)
	}
}

func TestEventNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(t, 1)
		p.call("event.register", []any{"vm"})
		got := make(chan any)
		go func() {
			v, err := p.try("event.next")
			if err != nil {
				t.Error(err)
			}
			got <- v
		}()
		synctest.Wait()
		vm := p.create("VM", nil)
		events := (<-got).([]any)
		if len(events) != 1 || events[0].(map[string]any)["ref"] != vm {
			t.Errorf("events %v", events)
		}
		p.call("event.unregister", []any{"vm"})
		_, err := p.try("event.next")
		wantError(t, err, "SESSION_NOT_REGISTERED")
	})
}

func TestSharedStorageIsCreatedAndForgotten(t *testing.T) {
	p := newPool(t, 3)
	sr := p.call("SR.create", p.Hosts[0], map[string]any{"group-name": "g"}, "0", "n", "", "linstor", "user", true, map[string]any{}).(string)
	if n := p.db.Len("PBD"); n != 3 {
		t.Fatalf("%d PBDs, want one per host", n)
	}
	_, err := p.try("SR.forget", sr)
	wantError(t, err, "SR_HAS_PBD", sr)
	for _, pbd := range p.db.Refs("PBD") {
		p.call("PBD.unplug", pbd)
	}
	p.call("SR.forget", sr)
	if p.db.Len("SR")+p.db.Len("PBD") != 0 {
		t.Error("rows are left")
	}
}

func TestDisks(t *testing.T) {
	p := newPool(t, 1)
	sr := p.create("SR", nil)
	vdi := p.create("VDI", map[string]any{"SR": sr, "virtual_size": 1 << 30, "name_label": "d"})
	vbd := p.create("VBD", map[string]any{"VDI": vdi, "VM": p.create("VM", nil)})
	p.call("VDI.resize", vdi, "2147483648")
	clone := p.call("VDI.clone", vdi).(string)
	if got := p.call("VDI.get_virtual_size", clone); got != int64(2<<30) {
		t.Errorf("size of the clone %v", got)
	}
	p.call("VBD.plug", vbd)
	_, err := p.try("VBD.plug", vbd)
	wantError(t, err, "DEVICE_ALREADY_ATTACHED", vbd)
	_, err = p.try("VBD.destroy", vbd)
	wantError(t, err, "OPERATION_NOT_ALLOWED")
	p.call("VBD.unplug", vbd)
	_, err = p.try("VBD.unplug", vbd)
	wantError(t, err, "DEVICE_ALREADY_DETACHED", vbd)
	second := p.create("VBD", map[string]any{"VDI": vdi})
	p.call("VBD.destroy", second)
	p.call("VDI.destroy", vdi)
	if p.db.Len("VBD") != 0 || p.db.Len("VDI") != 1 {
		t.Errorf("%d VBDs and %d VDIs are left, want 0 and 1", p.db.Len("VBD"), p.db.Len("VDI"))
	}
}

func TestCoordinatorIsDesignated(t *testing.T) {
	p := newPool(t, 2)
	p.call("pool.designate_new_master", p.Hosts[0])
	if p.db.Len("session") != 1 {
		t.Error("designating the coordinator itself restarted it")
	}
	p.call("pool.designate_new_master", p.Hosts[1])
	if p.face.Coordinator() != p.Hosts[1] || p.db.Len("session") != 0 {
		t.Errorf("coordinator %s, %d sessions", p.face.Coordinator(), p.db.Len("session"))
	}
	local, err := p.face.Do(context.Background(), p.Hosts[0], "session.slave_local_login_with_password", "root", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.face.Do(context.Background(), p.Hosts[0], "pool.emergency_transition_to_master", local); err != nil || p.face.Coordinator() != p.Hosts[0] {
		t.Errorf("emergency transition: %v, coordinator %s", err, p.face.Coordinator())
	}
}

func TestDeclareAndRecord(t *testing.T) {
	p := newPool(t, 1)
	if err := p.face.Declare("SR.probe_again sr:ref:SR n:int=5", func(_ context.Context, c *xapiface.Call) (any, error) { return c.Int(1), nil }); err != nil {
		t.Fatal(err)
	}
	sr := p.create("SR", nil)
	if got := p.call("SR.probe_again", sr); got != int64(5) {
		t.Errorf("default argument = %v", got)
	}
	if err := p.face.Declare("nodot", nil); err == nil {
		t.Error("a signature without a class was accepted")
	}
	calls := p.face.Calls()
	last := calls[len(calls)-1]
	if last.Method != "SR.probe_again" || last.Transport != "direct" || !cmp.Equal(last.Params, []any{p.s, sr}) || last.Error != "" {
		t.Errorf("recorded %+v", last)
	}
	p.face.ForgetCalls()
	go func() { _, _ = p.try("SR.get_uuid", "OpaqueRef:none") }()
	found, err := p.face.AwaitCall(t.Context(), func(c xapiface.CallRecord) bool { return c.Error == "HANDLE_INVALID" })
	if err != nil || found.Method != "SR.get_uuid" {
		t.Errorf("found %+v, error %v", found, err)
	}
}
