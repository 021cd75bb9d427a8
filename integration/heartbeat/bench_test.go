package heartbeat

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
)

// BenchmarkThroughThePool is one request at a time from a local client, through the front of a host that does not own and
// mutual TLS, to the owner's O_DIRECT file, all in processes of their own.
func BenchmarkThroughThePool(b *testing.B) {
	p := newPool(b, realpool.Options{})
	p.served(nil)
	h := p.Hosts[0]
	if p.owner(nil) == h {
		h = p.Hosts[1]
	}
	c := p.client(h)
	for _, size := range []int{1024, 4096} {
		for _, verb := range []string{"read", "write"} {
			b.Run(fmt.Sprintf("%s/%d", verb, size), func(b *testing.B) {
				buf := nbd.AlignedBuffer(size)
				var all []time.Duration
				for i := 0; b.Loop(); i++ {
					start := time.Now()
					off := int64(1+i%60) * 4096
					var err error
					if verb == "read" {
						err = c.Read(buf, off, time.Minute)
					} else {
						err = c.Write(buf, off, false, time.Minute)
					}
					if err != nil {
						b.Fatal(err)
					}
					all = append(all, time.Since(start))
				}
				slices.Sort(all)
				b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, "p50-us")
				b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, "p99-us")
			})
		}
	}
}
