package bus

import (
	"fmt"
	"testing"
	"time"
)

// TestCluster_SixtyFourHosts: the largest pool, all buses in this process, without history (64 stores on one disk measure the disk). The figures are in the log.
func TestCluster_SixtyFourHosts(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("2016 TLS connections take minutes under the race detector; run without -race and -short")
	}
	const hosts = 64
	p := newTestPool(t, hosts)
	began := time.Now()
	p.startAll(func(o *Options) { o.StoreDir = "" })
	t.Logf("%d buses started after %s", hosts, time.Since(began).Round(time.Millisecond))
	for _, h := range p.pool.Hosts {
		eventually(t, patience, h.UUID+" is connected to all", func() bool { return len(p.nodes[h.UUID].Condition().Connected) == hosts-1 })
	}
	t.Logf("each connected to each after %s", time.Since(began).Round(time.Millisecond))
	var ears []*ear
	for _, h := range p.pool.Hosts[1:] {
		ears = append(ears, p.listen(h, "x"))
	}
	from := p.conn(p.pool.Hosts[0])
	sent := time.Now()
	for i, e := range ears {
		e.hears(t, from, "x", fmt.Sprint("to ", i))
	}
	t.Logf("heard on all others after %s", time.Since(sent).Round(time.Millisecond))

	gone := p.pool.Hosts[hosts-1]
	if err := p.nodes[gone.UUID].Close(); err != nil {
		t.Error(err)
	}
	delete(p.nodes, gone.UUID)
	p.pool.Hosts = p.pool.Hosts[:hosts-1]
	left := time.Now()
	for _, b := range p.nodes {
		b.SetPool(p.pool)
	}
	for _, h := range p.pool.Hosts {
		eventually(t, patience, h.UUID+" knows that one left", func() bool {
			c := p.nodes[h.UUID].Condition()
			return len(c.Missing) == 0 && len(c.Connected) == hosts-2
		})
	}
	t.Logf("one host taken out of all lists after %s", time.Since(left).Round(time.Millisecond))
}
