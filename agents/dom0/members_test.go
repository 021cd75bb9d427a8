package dom0_test

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// asked is XAPI as FollowPool asks it directly.
type asked struct {
	mu    sync.Mutex
	pool  bus.Pool
	err   error
	calls int
}

func (a *asked) ReadPool(context.Context) (bus.Pool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls++
	return a.pool, a.err
}

func (a *asked) answers(p bus.Pool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pool, a.err = p, err
}

func (a *asked) asks() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls
}

func poolWith(uuid string, hosts ...string) bus.Pool {
	p := bus.Pool{UUID: uuid}
	for _, h := range hosts {
		p.Hosts = append(p.Hosts, bus.Host{UUID: h, Name: "name of " + h, Address: "10.0.0.1"})
	}
	return p
}

// follow runs FollowPool for host "a" and returns what it told.
func follow(t *testing.T, w bus.Wire, direct dom0.Members) chan bus.Pool {
	t.Helper()
	told := make(chan bus.Pool, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- dom0.FollowPool(ctx, w, "a", direct, func(p bus.Pool) { told <- p }, func(string, ...any) {})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return told
}

func publishPool(t *testing.T, w bus.Wire, pool string, hosts ...string) (stop func()) {
	t.Helper()
	ht, err := bus.NewTable[json.RawMessage](w, bus.XAPITable("host"), bus.TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pt, err := bus.NewTable[json.RawMessage](w, bus.XAPITable("pool"), bus.TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]json.RawMessage{}
	for _, h := range poolWith(pool, hosts...).Hosts {
		rows[h.UUID] = json.RawMessage(`{"uuid":"` + h.UUID + `","name_label":"` + h.Name + `","address":"` + h.Address + `"}`)
	}
	if _, err := ht.Replace(rows); err != nil {
		t.Fatal(err)
	}
	if _, err := pt.Replace(map[string]json.RawMessage{pool: json.RawMessage(`{}`)}); err != nil {
		t.Fatal(err)
	}
	return func() { ht.Close(); pt.Close() }
}

// pass lets virtual time pass, and what it causes come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// last drains what was told.
func last(told chan bus.Pool) (p bus.Pool, n int) {
	for {
		select {
		case p = <-told:
			n++
		default:
			return p, n
		}
	}
}

func TestFollowPool_AsksXAPIWhileNobodyFeedsAndNotMoreThanNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := poolWith("p", "a", "b")
		direct := &asked{pool: want}
		told := follow(t, bustest.NewWire(t), direct)
		pass(10 * time.Minute)
		if p, n := last(told); n == 0 || cmp.Diff(want, p) != "" {
			t.Errorf("told %d times, last %+v", n, p)
		}
		if n := direct.asks(); n < 5 || n > 15 {
			t.Errorf("XAPI was asked %d times in 10 minutes", n)
		}
		direct.answers(want, errors.New("XAPI is away"))
		pass(10 * time.Minute)
		if _, n := last(told); n > 0 {
			t.Error("told a list that XAPI did not give")
		}
	})
}

func TestFollowPool_TheFeedSparesXAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		stop := publishPool(t, w, "p", "a", "b", "c")
		direct := &asked{err: errors.New("XAPI is away")}
		told := follow(t, w, direct)
		pass(time.Hour)
		if p, _ := last(told); p.UUID != "p" || len(p.Hosts) != 3 {
			t.Errorf("told %+v", p)
		}
		if n := direct.asks(); n > 3 {
			t.Errorf("XAPI was asked %d times in an hour although the feed tells", n)
		}
		direct.answers(poolWith("p", "a", "b"), nil)
		stop() // The feed ends: XAPI is asked again.
		pass(2 * time.Minute)
		if p, n := last(told); n == 0 || len(p.Hosts) != 2 {
			t.Errorf("after the feed ended: told %d times, last %+v", n, p)
		}
	})
}

func TestFollowPool_AListWithoutThisHostIsNotTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		defer publishPool(t, w, "old pool", "b", "c")()
		want := poolWith("own pool", "a")
		direct := &asked{pool: want}
		told := follow(t, w, direct)
		pass(5 * time.Minute)
		if p, _ := last(told); cmp.Diff(want, p) != "" {
			t.Errorf("told %+v, want the pool that this host belongs to", p)
		}
		direct.answers(poolWith("x", "z"), nil)
		_, _ = last(told)
		pass(5 * time.Minute)
		if p, n := last(told); n > 0 {
			t.Errorf("told %+v", p)
		}
	})
}

func TestReadPool_AsksTheLab(t *testing.T) {
	pool := servedPool(t)
	for _, h := range pool.Hosts() { // Supporters' sockets forward to the coordinator.
		p, err := openOn(t, pool, h.Name).ReadPool(t.Context())
		if err != nil || len(p.Hosts) != 3 || !p.Has(h.UUID) || p.UUID == "" {
			t.Errorf("on %s: %+v, %v", h.Name, p, err)
		}
		for _, x := range p.Hosts {
			if want := xapidb.Value[string](pool.DB(), "host", pool.Host(x.Name).Ref, "address"); x.Address != want {
				t.Errorf("address of %s is %s, want %s", x.Name, x.Address, want)
			}
		}
	}
}
