package bus_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
)

type stamped struct {
	Sent int64  `json:"sent"` // Nanoseconds since the epoch.
	Pad  string `json:"pad"`
}

// BenchmarkPublishToMirror measures from Put to the mirror's notification at 500 changes a second over the unix door. The
// figures are percentiles; ns/op is the pace.
func BenchmarkPublishToMirror(b *testing.B) {
	_, o := startBus(b, nil)
	table, err := bus.NewTable[stamped](dial(b, o, "feed"), bus.XAPITable("vm"), bus.TableOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer table.Close()
	if _, err := table.Replace(nil); err != nil {
		b.Fatal(err)
	}
	delays := make(chan time.Duration, 1<<16)
	m, err := bus.NewMirror(dial(b, o, "agent"), bus.XAPITable("vm"), bus.MirrorOptions[struct{}]{
		Project: func(_ string, raw json.RawMessage) (struct{}, bool, error) {
			var v stamped
			err := json.Unmarshal(raw, &v)
			delays <- time.Since(time.Unix(0, v.Sent))
			return struct{}{}, true, err
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	if err := m.WaitFresh(b.Context()); err != nil {
		b.Fatal(err)
	}
	pad := strings.Repeat("x", 1000)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	var got []time.Duration
	for i := 0; b.Loop(); i++ {
		<-tick.C
		if _, err := table.Put(strconv.Itoa(i%1000), stamped{time.Now().UnixNano(), pad}); err != nil {
			b.Fatal(err)
		}
		got = append(got, <-delays)
	}
	slices.Sort(got)
	for _, p := range []float64{50, 99, 99.9} {
		b.ReportMetric(float64(got[int(float64(len(got)-1)*p/100)].Microseconds()), fmt.Sprintf("p%g-us", p))
	}
}

// BenchmarkFanOut has the bus and all its clients in one process, without history.
func BenchmarkFanOut(b *testing.B) {
	_, o := startBus(b, nil)
	bustest.FanOut(b, func(name string) *bus.Conn { return dial(b, o, name) })
}

// pool64 has the number and size of the objects of a pool of 64 hosts, as measured on synthetic XAPI records.
var pool64 = []struct {
	class       string
	count, size int
}{
	{"vm", 2000, 4800}, {"vdi", 6000, 1400}, {"vbd", 6000, 760}, {"vif", 3000, 870}, {"host", 64, 4000}, {"pif", 512, 1600}, {"pbd", 128, 700},
	{"sr", 66, 1200}, {"vm_metrics", 2000, 500}, {"vm_guest_metrics", 2000, 900}, {"network", 64, 800}, {"console", 2000, 400}, {"host_metrics", 64, 300},
	{"pif_metrics", 512, 500}, {"vif_metrics", 2590, 300},
}

type row struct {
	Name   string            `json:"name_label"`
	Size   int64             `json:"virtual_size"`
	SR     string            `json:"SR"`
	Config map[string]string `json:"other_config"`
}

// BenchmarkFirstMirror fills the tables of 27,000 objects and mirrors all of them, keeping one field each. Feed, bus and agent
// share this process, so rss is that of all three.
func BenchmarkFirstMirror(b *testing.B) {
	defer debug.SetGCPercent(debug.SetGCPercent(50)) // As the units set it.
	objects := 0
	for b.Loop() {
		b.StopTimer()
		debug.FreeOSMemory()
		before := rss(b)
		_, o := startBus(b, nil)
		feed, agent := dial(b, o, "feed"), dial(b, o, "agent")
		var closers []func()
		fillBegan := time.Now()
		for _, c := range pool64 {
			table, err := bus.NewTable[json.RawMessage](feed, bus.XAPITable(c.class), bus.TableOptions{})
			if err != nil {
				b.Fatal(err)
			}
			closers = append(closers, table.Close)
			rows := make(map[string]json.RawMessage, c.count)
			for i := range c.count {
				rows[fmt.Sprintf("%08x-0000-4000-8000-%s", i, c.class)] = record(b, i, c.size)
			}
			if _, err := table.Replace(rows); err != nil {
				b.Fatal(err)
			}
		}
		filled := time.Since(fillBegan)
		withTables := rss(b)
		b.StartTimer()
		began := time.Now()
		var wait []*bus.Mirror[int64]
		for _, c := range pool64 {
			m, err := bus.NewMirror(agent, bus.XAPITable(c.class), bus.MirrorOptions[int64]{Project: func(_ string, raw json.RawMessage) (int64, bool, error) {
				var v struct {
					Size int64 `json:"virtual_size"`
				}
				err := json.Unmarshal(raw, &v)
				return v.Size, true, err
			}})
			if err != nil {
				b.Fatal(err)
			}
			closers = append(closers, m.Close)
			wait = append(wait, m)
		}
		objects = 0
		for _, m := range wait {
			if err := m.WaitFresh(b.Context()); err != nil {
				b.Fatal(err)
			}
			objects += m.Len()
		}
		mirrored := time.Since(began)
		b.StopTimer()
		b.ReportMetric(filled.Seconds(), "fill-s")
		b.ReportMetric(mirrored.Seconds(), "first-mirror-s")
		b.ReportMetric(withTables-before, "rss-tables-MB")
		b.ReportMetric(rss(b)-before, "rss-all-MB")
		for _, c := range closers {
			c()
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(objects), "objects")
}

func record(b *testing.B, i, size int) json.RawMessage {
	b.Helper()
	raw, err := json.Marshal(row{
		Name: fmt.Sprintf("disk %d", i), Size: int64(i), SR: "OpaqueRef:00000000-0000-4000-8000-000000000000",
		Config: map[string]string{"pad": strings.Repeat("x", max(0, size-150))},
	})
	if err != nil {
		b.Fatal(err)
	}
	return raw
}

// rss is this process's resident memory in MB.
func rss(b *testing.B) float64 {
	b.Helper()
	f, err := os.Open("/proc/self/status")
	if err != nil {
		b.Skip(err)
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "VmRSS:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			if err != nil {
				b.Fatal(err)
			}
			return kib / 1024
		}
	}
	return 0
}
