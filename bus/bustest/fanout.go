package bustest

import (
	"encoding/json"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
)

// FanOut publishes 20,000 changes a second to six mirrors, each on a connection of its own that dial makes. One operation is a burst of 200. It reports what
// was published and delivered each second, how far the last mirror was behind at the end, and as lists how often a mirror lost something and had to list
// again.
func FanOut(b *testing.B, dial func(name string) *bus.Conn) {
	b.Helper()
	const mirrors, rate, burst = 6, 20000, 200
	type row struct {
		Sent int64  `json:"sent"`
		Pad  string `json:"pad"`
	}
	spec := bus.XAPITable("bench") // A class that no feed publishes.
	table, err := bus.NewTable[row](dial("feed"), spec, bus.TableOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer table.Close()
	if _, err := table.Replace(nil); err != nil {
		b.Fatal(err)
	}
	lists := atomic.Int64{}
	stop, err := dial("counter").Subscribe(func(*bus.Message) { lists.Add(1) }, "xostor.v1.table.*.bench.list.>", "xostor.v1.table.*.bench.list")
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	var all []*bus.Mirror[struct{}]
	for range mirrors {
		m, err := bus.NewMirror(dial("agent"), spec, bus.MirrorOptions[struct{}]{
			Project: func(string, json.RawMessage) (struct{}, bool, error) { return struct{}{}, true, nil },
		})
		if err != nil {
			b.Fatal(err)
		}
		defer m.Close()
		if err := m.WaitFresh(b.Context()); err != nil {
			b.Fatal(err)
		}
		all = append(all, m)
	}
	first := lists.Load()
	pad := strings.Repeat("x", 200)
	began, sent := time.Now(), int64(0)
	for b.Loop() { // A late burst is made up for.
		<-time.After(time.Until(began.Add(time.Duration(sent) * time.Second / rate)))
		for range burst {
			sent++
			if _, err := table.Put(strconv.FormatInt(sent%1000, 10), row{sent, pad}); err != nil {
				b.Fatal(err)
			}
		}
	}
	published := time.Since(began)
	_, seq := table.At()
	for _, m := range all {
		for m.Freshness().Seq < seq {
			<-m.Changed()
		}
	}
	b.ReportMetric(float64(sent)/published.Seconds(), "published/s")
	b.ReportMetric(float64(sent*mirrors)/time.Since(began).Seconds(), "delivered/s")
	b.ReportMetric(float64(time.Since(began)-published)/1e6, "last-mirror-ms-behind")
	b.ReportMetric(float64(lists.Load()-first), "lists")
}
