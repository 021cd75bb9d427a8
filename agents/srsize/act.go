package srsize

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// Writer is what this agent calls in XAPI; *xapi.Client is one.
type Writer interface {
	GetByUUID(ctx context.Context, class, uuid string) (xapi.Ref, error)
	SRSetSizes(ctx context.Context, sr xapi.Ref, s xapi.SRSizes) error
	VDISetPhysicalUtilisation(ctx context.Context, sr, vdi xapi.Ref, bytes int64) error
	SRUpdate(ctx context.Context, sr xapi.Ref) error
	// SRSizes and VDIUtilisation read what XAPI shows this moment, in bytes.
	SRSizes(ctx context.Context, sr xapi.Ref) (Sizes, error)
	VDIUtilisation(ctx context.Context, vdi xapi.Ref) (int64, error)
	// Plugged tells whether the SR has a PBD on the host that is attached.
	Plugged(ctx context.Context, sr, host xapi.Ref) (bool, error)
}

// XAPIWriter is the Writer over a client.
type XAPIWriter struct{ *xapi.Client }

// SRSizes implements Writer with three small calls: the whole record names every VDI.
func (x XAPIWriter) SRSizes(ctx context.Context, sr xapi.Ref) (Sizes, error) {
	var s Sizes
	for _, f := range []struct {
		method string
		to     *int64
	}{
		{"SR.get_physical_size", &s.Physical}, {"SR.get_physical_utilisation", &s.Utilisation}, {"SR.get_virtual_allocation", &s.Virtual},
	} {
		var v xapi.Int
		if err := x.Call(ctx, &v, f.method, sr); err != nil {
			return Sizes{}, err
		}
		*f.to = int64(v)
	}
	return s, nil
}

// VDIUtilisation implements Writer.
func (x XAPIWriter) VDIUtilisation(ctx context.Context, vdi xapi.Ref) (int64, error) {
	var v xapi.Int
	err := x.Call(ctx, &v, "VDI.get_physical_utilisation", vdi)
	return int64(v), err
}

// Plugged implements Writer.
func (x XAPIWriter) Plugged(ctx context.Context, sr, host xapi.Ref) (bool, error) {
	of, err := xapi.Field("SR", string(sr))
	if err != nil {
		return false, err
	}
	pbds, err := xapi.GetAllRecordsWhere[xapi.PBD](ctx, x.Client, "PBD", of)
	for _, p := range pbds {
		if p.Host == host && p.CurrentlyAttached {
			return true, nil
		}
	}
	return false, err
}

// Act implements agents.Agent. It checks a.Needs at XAPI first.
func (a *Agent) Act(ctx context.Context, act agents.Action) error {
	sr, err := a.cfg.Writer.GetByUUID(ctx, "SR", act.Target)
	if gone(err) {
		return fmt.Errorf("SR is gone: %w", agents.ErrMoot)
	}
	if err != nil {
		return err
	}
	if err := a.check(ctx, sr); err != nil {
		return err
	}
	m := a.memory[act.Target]
	if m == nil {
		return fmt.Errorf("act on %s: it was never observed", act.Target)
	}
	switch act.Verb {
	case SetSRSize:
		err = a.setSR(ctx, sr, m, act.Args)
	case SetVDISizes:
		err = a.setVDIs(ctx, sr, act.Args)
	case UpdateSR:
		err = a.update(ctx, sr, m)
	default:
		return fmt.Errorf("act: unknown verb %q", act.Verb)
	}
	m.past.LastWrite = time.Now()
	return err
}

// check asks XAPI again for the two needs that every action of this agent has.
func (a *Agent) check(ctx context.Context, sr xapi.Ref) error {
	coordinator, why, err := a.cfg.Coordinator(ctx)
	if err != nil {
		return fmt.Errorf("check that this host is coordinator: %w", err)
	}
	if !coordinator {
		return fmt.Errorf("%s: %w", why, agents.ErrMoot)
	}
	host, err := a.cfg.Writer.GetByUUID(ctx, "host", a.cfg.HostUUID)
	if err != nil {
		return fmt.Errorf("find this host in XAPI: %w", err)
	}
	plugged, err := a.cfg.Writer.Plugged(ctx, sr, host)
	if err != nil {
		return fmt.Errorf("check that the PBD is plugged: %w", err)
	}
	if !plugged {
		return fmt.Errorf("the PBD is no longer plugged here: %w", agents.ErrMoot)
	}
	return nil
}

func (a *Agent) setSR(ctx context.Context, sr xapi.Ref, m *memory, args map[string]string) error {
	var s xapi.SRSizes
	for name, p := range map[string]**int64{
		"physical_size": &s.PhysicalSize, "physical_utilisation": &s.PhysicalUtilisation, "virtual_allocation": &s.VirtualAllocation,
	} {
		text, ok := args[name]
		if !ok {
			continue
		}
		bytes, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		*p = &bytes
	}
	// XAPI cannot compare and set: looking once more leaves SM's own writes a window of milliseconds, not of a whole pass.
	shown, err := a.cfg.Writer.SRSizes(ctx, sr)
	if err == nil && shown != m.shown.value {
		m.shown = seen[Sizes]{value: shown, known: true}
		return fmt.Errorf("somebody else has just written sizes: %w", agents.ErrMoot)
	}
	if err == nil {
		err = a.cfg.Writer.SRSetSizes(ctx, sr, s)
	}
	if errors.Is(err, xapi.ErrNoSMSession) {
		a.refused = err.Error()
		a.log.Warn("XAPI refuses the session key for sizes, SR.update is used instead", agents.KeyErr, err)
		return a.update(ctx, sr, m)
	}
	if gone(err) {
		return fmt.Errorf("SR is gone: %w", agents.ErrMoot)
	}
	if err != nil {
		return err
	}
	now := m.shown.value
	for _, f := range []struct{ at, to *int64 }{{&now.Physical, s.PhysicalSize}, {&now.Utilisation, s.PhysicalUtilisation}, {&now.Virtual, s.VirtualAllocation}} {
		if f.to != nil {
			*f.at = *f.to
		}
	}
	m.shown.write(time.Now(), now)
	m.settled = &now.Physical
	return nil
}

// setVDIs writes VDI by VDI. One that vanished meanwhile is left out; after another error the rest waits for the next pass.
func (a *Agent) setVDIs(ctx context.Context, sr xapi.Ref, args map[string]string) error {
	moved := 0 // VDIs that somebody else has just written: the next look tells what is right
	for _, uuid := range slices.Sorted(maps.Keys(args)) {
		bytes, err := strconv.ParseInt(args[uuid], 10, 64)
		if err != nil {
			return fmt.Errorf("read size of VDI %s: %w", uuid, err)
		}
		d := a.vdis[uuid]
		if d == nil {
			continue // it was planned on an older look
		}
		shown, err := a.cfg.Writer.VDIUtilisation(ctx, xapi.Ref(d.ref))
		if err == nil && shown != d.shown.value {
			d.shown = seen[int64]{value: shown, known: true}
			moved++
			continue
		}
		if err == nil {
			err = a.cfg.Writer.VDISetPhysicalUtilisation(ctx, sr, xapi.Ref(d.ref), bytes)
		}
		switch {
		case errors.Is(err, xapi.ErrNoSMSession):
			a.refused = err.Error()
			return fmt.Errorf("XAPI refuses sizes of VDIs: %w", agents.ErrMoot)
		case gone(err):
			continue
		case err != nil:
			return fmt.Errorf("set size of VDI %s: %w", uuid, err)
		}
		d.shown.write(time.Now(), bytes)
	}
	if moved > 0 {
		return fmt.Errorf("somebody else has just written the size of %s: %w", count(moved, "VDI"), agents.ErrMoot)
	}
	return nil
}

func (a *Agent) update(ctx context.Context, sr xapi.Ref, m *memory) error {
	m.past.LastUpdate = time.Now()
	return a.cfg.Writer.SRUpdate(ctx, sr)
}

// gone tells that XAPI does not know the object any more.
func gone(err error) bool { return xapi.IsCode(err, "HANDLE_INVALID", "UUID_INVALID") }
