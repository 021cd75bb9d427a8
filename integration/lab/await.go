package lab

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// Await waits until ok holds, looking again after each change of XAPI's database or of LINSTOR. When ctx ends first it returns the cause.
func (p *Pool) Await(ctx context.Context, ok func() bool) error {
	for {
		linstor := p.linstor.Changed()
		xapi, stop := p.xapiChanged(ctx)
		if ok() {
			stop()
			return nil
		}
		select {
		case <-ctx.Done():
		case <-linstor:
		case <-xapi:
		}
		stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// xapiChanged returns a channel that is closed at the next write to XAPI's database, or when ctx or stop ends it.
func (p *Pool) xapiChanged(ctx context.Context) (changed <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	token := xapidb.Token(p.db.Generation(), math.MaxInt64)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Whatever ends the call, a change, a restart or ctx, is a reason to look again.
		_, _ = p.db.From(ctx, []string{"*"}, token, 24*time.Hour)
	}()
	return done, func() { cancel(); <-done }
}

// AwaitShown waits until XAPI shows the truth: the SR's sizes and every VDI's utilisation. The error tells both when ctx ends before.
func (p *Pool) AwaitShown(ctx context.Context) error {
	if err := p.Await(ctx, p.True); err != nil {
		return fmt.Errorf("await the true sizes in XAPI: %w: it shows %v and %d wrong VDIs, the truth is %v", err, p.Shown(p.srUUID), len(p.WrongVDIs()), p.Truth(p.srUUID))
	}
	return nil
}

// True tells whether XAPI shows the truth.
func (p *Pool) True() bool { return p.Shown(p.srUUID) == p.Truth(p.srUUID) && len(p.WrongVDIs()) == 0 }
