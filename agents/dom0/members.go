package dom0

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/xapi"
)

const (
	firstAsk   = 5 * time.Second // Between two direct reads of the list of hosts, growing to lastAsk.
	lastAsk    = time.Minute
	askTimeout = 10 * time.Second
)

// Members is where the list of the pool's hosts comes from when the feed cannot be heard. *Dom0 is one.
type Members interface {
	// ReadPool asks XAPI. On a supporter the local socket forwards to the coordinator.
	ReadPool(ctx context.Context) (bus.Pool, error)
}

// ReadPool implements Members.
func (d *Dom0) ReadPool(ctx context.Context) (bus.Pool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, pool, err := d.XAPI.Pool(ctx)
	if err != nil {
		return bus.Pool{}, fmt.Errorf("read pool: %w", err)
	}
	hosts, err := xapi.GetAllRecords[xapi.Host](ctx, d.XAPI, "host")
	if err != nil {
		return bus.Pool{}, fmt.Errorf("read hosts of the pool: %w", err)
	}
	p := bus.Pool{UUID: pool.UUID}
	for _, h := range hosts {
		p.Hosts = append(p.Hosts, member(h))
	}
	return p, nil
}

func member(h xapi.Host) bus.Host {
	return bus.Host{UUID: h.UUID, Name: h.NameLabel, Address: h.Address}
}

// FollowPool tells the list of the pool's hosts at first and whenever it changes, until ctx ends. It follows the feed, which costs XAPI nothing; while the feed
// cannot be heard, or speaks of a pool without this host, it asks XAPI itself. A list without this host is never told: it is that of a pool that this
// host left, or has not joined yet.
func FollowPool(ctx context.Context, w bus.Wire, host string, direct Members, tell func(bus.Pool), log func(msg string, args ...any)) error {
	hosts, err := bus.NewMirror(w, bus.XAPITable("host"), bus.MirrorOptions[bus.Host]{Project: func(_ string, raw json.RawMessage) (bus.Host, bool, error) {
		var h xapi.Host
		err := json.Unmarshal(raw, &h)
		return member(h), true, err
	}})
	if err != nil {
		return err
	}
	defer hosts.Close()
	pools, err := bus.NewMirror(w, bus.XAPITable("pool"), bus.MirrorOptions[string]{Project: func(uuid string, _ json.RawMessage) (string, bool, error) { return uuid, true, nil }})
	if err != nil {
		return err
	}
	defer pools.Close()
	wait := time.Duration(0)
	ask := time.NewTimer(0)
	defer ask.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return nil
		case <-hosts.Changed():
		case <-pools.Changed():
		case <-ask.C:
			asked = true
		}
		if p, ok := heard(hosts, pools, host); ok {
			wait = 0
			tell(p)
			if asked {
				ask.Reset(lastAsk)
			}
			continue
		}
		if !asked {
			if wait == 0 { // The feed was heard until now.
				wait = firstAsk
				ask.Reset(wait)
			}
			continue
		}
		p, err := direct.ReadPool(ctx)
		if err == nil && !p.Has(host) {
			err = errors.New("XAPI's list of hosts lacks this host")
		}
		if err == nil {
			tell(p)
		} else if ctx.Err() == nil {
			log("hosts of the pool not known", agents.KeyErr, err)
		}
		wait = min(max(2*wait, firstAsk), lastAsk)
		ask.Reset(wait)
	}
}

// heard is the pool as the feed tells it, if it can be believed.
func heard(hosts *bus.Mirror[bus.Host], pools *bus.Mirror[string], host string) (bus.Pool, bool) {
	list, fresh := hosts.Snapshot()
	uuids, poolFresh := pools.Snapshot()
	if !fresh.Fresh || !poolFresh.Fresh || len(uuids) != 1 {
		return bus.Pool{}, false
	}
	var p bus.Pool
	for _, uuid := range uuids {
		p.UUID = uuid
	}
	for _, h := range list {
		p.Hosts = append(p.Hosts, h)
	}
	return p, p.Has(host)
}
