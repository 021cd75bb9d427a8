package heartbeat

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
)

func hasFinding(r heartbeat.Report, code string) bool {
	return slices.ContainsFunc(r.Findings, func(f agents.Finding) bool { return f.Code == code })
}

// Hosts talk over the storage network. While that is cut they go on over the management network, say so, and return. A
// host of which DRBD says that it has no quorum does not: it must lose the statefile as it has lost its disks.
func TestStorageNetworkIsPreferred(t *testing.T) {
	t.Parallel()
	p := newPool(t, realpool.Options{Timeout: 20 * time.Second, DRBD: true, Storage: true})
	p.served(nil)
	on := func(fallback bool) func() error {
		return func() error {
			for _, h := range p.Hosts {
				r, err := p.Report(h)
				if err != nil {
					return err
				}
				if r.OwnerAddress == "" || r.Fallback != fallback || hasFinding(r, "heartbeat-management-network") != fallback {
					return fmt.Errorf("%s reaches %s at %q, over the management network %v", h.Name, r.Owner, r.OwnerAddress, r.Fallback)
				}
			}
			return nil
		}
	}
	p.until("not on the storage network", on(false))
	gap := p.run(nil, func() {
		p.CutStorage()
		p.until("not on the management network", on(true))
	})
	t.Logf("storage network cut: longest request %v", gap)

	owner := p.owner(nil)
	lost := p.Hosts[0]
	if lost == owner {
		lost = p.Hosts[1]
	}
	if err := p.SetQuorum(lost, false); err != nil {
		t.Fatal(err)
	}
	c := p.client(lost)
	p.until(lost.Name+" has the statefile without storage", func() error {
		if err := c.Read(make([]byte, 512), 0, time.Minute); !errors.Is(err, nbd.EIO) {
			return fmt.Errorf("read: %w", err)
		}
		return nil
	})
	p.served(lost)
	if err := p.SetQuorum(lost, true); err != nil {
		t.Fatal(err)
	}
	p.MendStorage()
	p.until("not back on the storage network", on(false))
	p.served(nil)
}
