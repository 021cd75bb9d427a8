package bus_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
	"github.com/xostor-agents/xostor-agents/bus/subject"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// BenchmarkEventToAnotherHost changes disks in XAPI 500 times a second and measures on another host: from the feed's publishing to the callback (bus), which is what
// the bus adds to XAPI's own delay, and from the change in XAPI to the callback (all), which has XAPI's and the feed's batching in it.
func BenchmarkEventToAnotherHost(b *testing.B) {
	s := newSite(b, 3)
	s.startAll()
	if _, err := s.pool.CreateDisks(100, 1<<30); err != nil {
		b.Fatal(err)
	}
	c, err := bus.Dial(b.Context(), s.nodes[1].door(), "bench")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	m, err := bus.NewMirror(c, bus.XAPITable("vdi"), bus.MirrorOptions[struct{}]{})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	if err := m.WaitFresh(b.Context()); err != nil {
		b.Fatal(err)
	}
	type delay struct{ bus, all time.Duration }
	delays := make(chan delay, 1<<20)
	stop, err := bus.SubscribeEvents(c, subject.XAPI("vdi", "*"), func(e bus.Event) {
		now := time.Now()
		var v struct {
			Description string `json:"name_description"`
		}
		if json.Unmarshal(e.Data, &v) != nil {
			return
		}
		if sent, err := strconv.ParseInt(v.Description, 10, 64); err == nil {
			delays <- delay{now.Sub(e.Time), now.Sub(time.Unix(0, sent))}
		}
	}, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	if err := c.Flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	refs := s.pool.DB().Refs("VDI")
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for i := 0; b.Loop(); i++ {
		<-tick.C
		if err := s.pool.DB().Set("VDI", refs[i%len(refs)], "name_description", fmt.Sprint(time.Now().UnixNano())); err != nil {
			b.Fatal(err)
		}
	}
	quiet := time.After(2 * time.Second)
	var onBus, all []time.Duration
	for done := false; !done; {
		select {
		case d := <-delays:
			onBus, all = append(onBus, d.bus), append(all, d.all)
		case <-quiet:
			done = true
		}
	}
	if len(onBus) == 0 {
		b.Fatal("nothing arrived")
	}
	slices.Sort(onBus)
	slices.Sort(all)
	for _, p := range []float64{50, 99} {
		b.ReportMetric(float64(onBus[int(float64(len(onBus)-1)*p/100)].Microseconds()), fmt.Sprintf("bus-p%g-us", p))
		b.ReportMetric(float64(all[int(float64(len(all)-1)*p/100)].Microseconds()), fmt.Sprintf("all-p%g-us", p))
	}
	b.ReportMetric(float64(len(onBus)), "events")
}

// BenchmarkFanOut has the bus in a process of its own, as shipped and with its history, and all its clients in this one.
func BenchmarkFanOut(b *testing.B) {
	s := newSite(b, 1)
	s.start(s.nodes[0])
	bustest.FanOut(b, func(name string) *bus.Conn {
		c, err := bus.Dial(b.Context(), s.nodes[0].door(), name)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(c.Close)
		return c
	})
}

const idleFor = 20 * time.Second

// BenchmarkIdleHost measures one of three hosts on which nothing happens: the bus's processor time and resident memory, then the memory of seven processes of
// the one binary (the bus and six agents; sr-size stands for the ones that are not there yet) and the bus's processor time with them.
func BenchmarkIdleHost(b *testing.B) {
	s := newSite(b, 3)
	s.startAll()
	n := s.nodes[1]
	s.eventually("history runs", func() bool {
		for _, a := range s.status(n) {
			if a.Agent == "bus" && a.HostName == n.Name && strings.HasSuffix(a.Status.Bus.History, "copies") {
				return true
			}
		}
		return false
	})
	pids := []int{n.daemon.Pid()}
	for b.Loop() {
		b.ReportMetric(percent(b, pids[0]), "bus-cpu-%")
		b.ReportMetric(float64(lab.ProcNumber(b, pids[0], "status", "VmRSS:"))/1024, "bus-rss-MB")
		b.ReportMetric(float64(lab.ProcNumber(b, pids[0], "status", "RssAnon:"))/1024, "bus-anon-MB")
		for i := len(pids); i < 7; i++ {
			d, err := lab.StartDaemon(lab.DaemonOptions{Bin: "ip", Args: []string{"netns", "exec", n.ns, xostor, "agent", "sr-size", "--config", n.config},
				Notify: filepath.Join(n.dir, fmt.Sprint("n", i))})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = d.Stop() }()
			pids = append(pids, d.Pid())
		}
		b.ReportMetric(percent(b, pids[0]), "bus-with-agents-cpu-%")
		pss := 0
		for _, pid := range pids {
			pss += lab.ProcNumber(b, pid, "smaps_rollup", "Pss:")
		}
		b.ReportMetric(float64(lab.ProcNumber(b, pids[0], "smaps_rollup", "Pss:"))/1024, "bus-pss-MB")
		b.ReportMetric(float64(pss)/1024, "seven-pss-MB")
	}
}

// percent is how much of one processor a process takes over idleFor.
func percent(b *testing.B, pid int) float64 {
	b.Helper()
	before := cpu(b, pid)
	<-time.After(idleFor)
	return float64(cpu(b, pid)-before) / idleFor.Seconds() // A tick is 10 ms: as many as hundredths of a second.
}

// cpu is the processor time of a process in ticks of 10 ms.
func cpu(b *testing.B, pid int) int {
	b.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	f := strings.Fields(rest)
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return user + system
}
