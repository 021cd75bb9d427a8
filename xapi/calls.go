package xapi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// GetAllRecords reads every object of a class, written in any case ("SR", "host_metrics", "vdi"). Records are decoded one by one as they
// arrive, so the cost is that of the decoded records. T is one of the record types or any type with JSON tags.
func GetAllRecords[T any](ctx context.Context, c *Client, class string) (map[Ref]T, error) {
	return getRecords[T](ctx, c, className(class)+".get_all_records")
}

// GetAllRecordsWhere reads the objects of a class for which XAPI's filter expression holds, such as
// `field "SR" = "OpaqueRef:..."` (ocaml/database/db_filter_lex.mll). Fields have their database names: name__label, not
// name_label. See Field for one comparison.
func GetAllRecordsWhere[T any](ctx context.Context, c *Client, class, expr string) (map[Ref]T, error) {
	return getRecords[T](ctx, c, className(class)+".get_all_records_where", expr)
}

func getRecords[T any](ctx context.Context, c *Client, method string, args ...any) (map[Ref]T, error) {
	var all map[Ref]T
	for attempt := 0; ; attempt++ {
		session, err := c.session(ctx)
		if err != nil {
			return nil, fmt.Errorf("call %s: %w", method, err)
		}
		all = make(map[Ref]T)
		out := sink{records: func(ref Ref, decode func(any) error) error {
			var t T
			if err := decode(&t); err != nil {
				return fmt.Errorf("record %.60q: %w", ref, err)
			}
			all[ref] = t
			return nil
		}}
		err = c.exchange(ctx, c.rpc, jsonWire{}, c.cfg.Timeout, method, prepend(session, args), out)
		if err == nil {
			return all, nil
		}
		if attempt > 0 || !sessionLost(err) {
			return nil, err
		}
		c.forget(session)
	}
}

// Field makes the filter expression `field "name" = "value"`. XAPI's grammar has no escape for quotes, so neither may
// hold one.
func Field(name, value string) (string, error) {
	if bad := strings.IndexFunc(name+value, func(r rune) bool { return r == '"' || r == '\'' || r == '\\' || unicode.IsControl(r) }); bad >= 0 {
		return "", fmt.Errorf("make filter on %.40q: quotes, backslashes and control characters cannot be written in a filter", name)
	}
	return fmt.Sprintf(`field "%s" = "%s"`, name, value), nil
}

// GetRecord reads one object; IsCode(err, "HANDLE_INVALID") when it is gone.
func GetRecord[T any](ctx context.Context, c *Client, class string, ref Ref) (T, error) {
	var t T
	err := c.Query(ctx, &t, className(class)+".get_record", ref)
	return t, err
}

// GetByUUID finds the object of a class by its UUID; IsCode(err, "UUID_INVALID") when there is none.
func (c *Client) GetByUUID(ctx context.Context, class, uuid string) (Ref, error) {
	var ref Ref
	err := c.Call(ctx, &ref, className(class)+".get_by_uuid", uuid)
	return ref, err
}

// Pool reads the pool's own record.
func (c *Client) Pool(ctx context.Context) (Ref, Pool, error) {
	all, err := GetAllRecords[Pool](ctx, c, "pool")
	if err != nil {
		return "", Pool{}, err
	}
	for ref, p := range all {
		return ref, p, nil
	}
	return "", Pool{}, errors.New("read pool: xapi knows no pool")
}

// PoolMaster gives the coordinator's host.
func (c *Client) PoolMaster(ctx context.Context) (Ref, error) {
	_, p, err := c.Pool(ctx)
	return p.Master, err
}

// SRSizes are the sizes of an SR in bytes; nil leaves a field as it is.
type SRSizes struct {
	PhysicalSize, PhysicalUtilisation, VirtualAllocation *int64
}

// SRSetSizes writes the sizes of an SR without running its SM driver. XAPI lets only its storage managers do so; the client gives itself
// that right for this SR on a session apart. When XAPI refuses, the error matches ErrNoSMSession and SRUpdate is the way. The order is
// SM's own (_db_update, drivers/SR.py of xcp-ng/sm). The three writes are not atomic: an error may leave some of them done.
func (c *Client) SRSetSizes(ctx context.Context, sr Ref, s SRSizes) error {
	writes := []struct {
		method string
		bytes  *int64
	}{
		{"SR.set_virtual_allocation", s.VirtualAllocation},
		{"SR.set_physical_size", s.PhysicalSize},
		{"SR.set_physical_utilisation", s.PhysicalUtilisation},
	}
	for _, w := range writes {
		if w.bytes != nil && *w.bytes < 0 {
			return fmt.Errorf("call %s: size %d is negative", w.method, *w.bytes)
		}
	}
	if s == (SRSizes{}) {
		return nil
	}
	return c.asSM(ctx, sr, func(session Ref) error {
		for _, w := range writes {
			if w.bytes == nil {
				continue
			}
			if err := c.asSession(ctx, session, w.method, sr, *w.bytes); err != nil {
				return err
			}
		}
		return nil
	})
}

// VDISetPhysicalUtilisation writes the bytes that a VDI of sr takes on its storage. The right to do so and its refusal are as in
// SRSetSizes.
func (c *Client) VDISetPhysicalUtilisation(ctx context.Context, sr, vdi Ref, bytes int64) error {
	if bytes < 0 {
		return fmt.Errorf("call VDI.set_physical_utilisation: size %d is negative", bytes)
	}
	return c.asSM(ctx, sr, func(session Ref) error {
		return c.asSession(ctx, session, "VDI.set_physical_utilisation", vdi, bytes)
	})
}

// SRUpdate lets the SM driver of an SR refresh its sizes, on a host where it is plugged. It takes no lock in XAPI.
func (c *Client) SRUpdate(ctx context.Context, sr Ref) error { return c.slow(ctx, "SR.update", sr) }

// SRScan lets the SM driver of an SR look for its VDIs. It excludes all other operations on the SR while it runs.
func (c *Client) SRScan(ctx context.Context, sr Ref) error { return c.slow(ctx, "SR.scan", sr) }

// slow makes a control call that runs storage code.
func (c *Client) slow(ctx context.Context, method string, args ...any) error {
	return c.withSession(ctx, xmlWire{}, c.cfg.SlowTimeout, sink{}, method, args)
}

// MessageCreate puts an alert on the object of a class ("VM", "Host", "SR", "Pool", "VDI") with that UUID. Priority is 1 (worst) to 5. The ref
// may be NullRef: XAPI then could not store the message.
func (c *Client) MessageCreate(ctx context.Context, name string, priority int, cls, objUUID, body string) (Ref, error) {
	var ref Ref
	err := c.Call(ctx, &ref, "message.create", name, priority, cls, objUUID, body)
	return ref, err
}

// MessageDestroy removes an alert.
func (c *Client) MessageDestroy(ctx context.Context, message Ref) error {
	return c.Call(ctx, nil, "message.destroy", message)
}

// MessagesOf lists the alerts on the object with that UUID. XAPI reads every message file for it: not for a loop.
func (c *Client) MessagesOf(ctx context.Context, objUUID string) (map[Ref]Message, error) {
	expr, err := Field("obj_uuid", objUUID)
	if err != nil {
		return nil, err
	}
	return GetAllRecordsWhere[Message](ctx, c, "message", expr)
}

// TaskCreate makes a pending task that Xen Orchestra shows. It belongs to the client's session and must be destroyed.
func (c *Client) TaskCreate(ctx context.Context, label, description string) (Ref, error) {
	var ref Ref
	err := c.Call(ctx, &ref, "task.create", label, description)
	return ref, err
}

// TaskSetProgress moves a task's bar, from 0 to 1.
func (c *Client) TaskSetProgress(ctx context.Context, task Ref, progress float64) error {
	return c.Call(ctx, nil, "task.set_progress", task, progress)
}

// TaskSetStatus ends a task: "success", "failure" or "cancelled".
func (c *Client) TaskSetStatus(ctx context.Context, task Ref, status string) error {
	return c.Call(ctx, nil, "task.set_status", task, status)
}

// TaskDestroy removes a task. XAPI keeps a pending one until it ends: set its status first.
func (c *Client) TaskDestroy(ctx context.Context, task Ref) error {
	return c.Call(ctx, nil, "task.destroy", task)
}
