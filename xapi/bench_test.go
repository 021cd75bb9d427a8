package xapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// bigVM is a VM record of realistic size, about 4.8 KB of JSON.
func bigVM(i int) map[string]any {
	return map[string]any{
		"uuid": fmt.Sprintf("%08x-0000-4000-8000-000000000000", i), "name_label": fmt.Sprint("vm", i), "name_description": "", "power_state": "Running",
		"is_a_template": false, "is_a_snapshot": false, "is_control_domain": false, "resident_on": "OpaqueRef:h1",
		"scheduled_to_be_resident_on": "OpaqueRef:NULL", "memory_static_max": int64(2147483648), "HVM_shadow_multiplier": 1.0,
		"VBDs": []any{"OpaqueRef:vbd1", "OpaqueRef:vbd2"}, "other_config": map[string]any{"mac_seed": "3f0c", "base_template_name": "Debian Bookworm 12"},
		"allowed_operations":  []any{"suspend", "hard_reboot", "hard_shutdown", "clean_reboot", "clean_shutdown", "pause", "checkpoint", "snapshot"},
		"last_boot_CPU_flags": map[string]any{"vendor": "AuthenticAMD", "features": strings.Repeat("178bfbff-", 20)},
		"recommendations":     strings.Repeat(`<restriction field="memory-static-max" max="137438953472"/>`, 40), "platform": map[string]any{"acpi": "1"},
	}
}

func vmReply(n int) map[string]any {
	all := map[string]any{}
	for i := range n {
		all[fmt.Sprintf("OpaqueRef:%08x-0000-4000-8000-000000000000", i)] = bigVM(i)
	}
	return all
}

// BenchmarkDecodeVMs decodes 2,000 VM records from the wire to records.
func BenchmarkDecodeVMs(b *testing.B) {
	reply := jsonReply(vmReply(2000), nil)
	b.SetBytes(int64(len(reply)))
	b.ReportAllocs()
	for b.Loop() {
		all := map[Ref]VM{}
		err := (jsonWire{}).decode("m", bufio.NewReaderSize(bytes.NewReader(reply), 64<<10), sink{records: func(ref Ref, decode func(any) error) error {
			var vm VM
			err := decode(&vm)
			all[ref] = vm
			return err
		}})
		if err != nil || len(all) != 2000 {
			b.Fatal(err, len(all))
		}
	}
}

// BenchmarkMend passes the same reply through the mending of floats alone.
func BenchmarkMend(b *testing.B) {
	reply := jsonReply(vmReply(2000), nil)
	b.SetBytes(int64(len(reply)))
	for b.Loop() {
		if _, err := io.Copy(io.Discard, &mendReader{r: bytes.NewReader(reply)}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNormalise rewrites 200 VM records of XML.
func BenchmarkNormalise(b *testing.B) {
	reply := xmlReply(vmReply(200), nil)
	b.SetBytes(int64(len(reply)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := normalise(reply); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDecodeXML takes 200 VM records all the way over the XML wire.
func BenchmarkDecodeXML(b *testing.B) {
	reply := xmlReply(vmReply(200), nil)
	b.SetBytes(int64(len(reply)))
	b.ReportAllocs()
	for b.Loop() {
		var all map[Ref]VM
		if err := (xmlWire{}).decode("m", bufio.NewReader(bytes.NewReader(reply)), sink{into: &all}); err != nil || len(all) != 200 {
			b.Fatal(err, len(all))
		}
	}
}

// bulkServer answers as a pool of 27,000 objects does, without keeping them: the records are printed as they are sent, so that the memory measured
// is the client's.
type bulkServer struct{ classes map[string]bulkClass }

type bulkClass struct {
	count, size int // size is that of a record in bytes.
}

// largePool is 64 hosts, 2,000 VMs, 6,000 VDIs (section 5 of the wire reference), 27,000 objects and 25 MB.
var largePool = map[string]bulkClass{
	"pool": {1, 3000}, "host": {64, 4000}, "host_metrics": {64, 250}, "SR": {4, 75000}, "PBD": {200, 400}, "VM": {2000, 4800},
	"VBD": {12000, 760}, "VDI": {12000, 1400}, "PIF": {320, 1600}, "PIF_metrics": {320, 400}, "network": {27, 600},
}

func (s bulkServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	if r.URL.Path != "/jsonrpc" {
		_, _ = w.Write(xmlReply("OpaqueRef:session", nil))
		return
	}
	method, args, _ := readJSONCall(body)
	switch class, verb, _ := strings.Cut(method, "."); verb {
	case "get_all_records":
		s.records(w, class)
	case "from":
		if args[3].(float64) > 0 {
			<-r.Context().Done()
			return
		}
		counts := map[string]any{}
		for class, c := range s.classes {
			counts[strings.ToLower(class)] = c.count
		}
		_, _ = w.Write(jsonReply(map[string]any{"events": []any{}, "valid_ref_counts": counts, "token": token(1)}, nil))
	case "inject":
		_, _ = w.Write(jsonReply(token(1), nil))
	default:
		_, _ = w.Write(jsonReply([]any{"OpaqueRef:pool"}, nil))
	}
}

func (s bulkServer) records(w io.Writer, class string) {
	out := bufio.NewWriterSize(w, 32<<10)
	defer out.Flush()
	c := s.classes[class]
	pad := strings.Repeat("x", c.size)
	fmt.Fprint(out, `{"jsonrpc":"2.0","result":{`)
	for i := range c.count {
		if i > 0 {
			fmt.Fprint(out, ",")
		}
		fmt.Fprintf(out, `"OpaqueRef:%08x-0000-4000-8000-%012x":{"uuid":"%08x-0000-4000-8000-%012x","name_label":"%s"}`, i, len(class), i, len(class), pad)
	}
	fmt.Fprint(out, `},"id":1}`)
}

// counter is a consumer that keeps nothing.
type counter struct {
	objects int
	fresh   chan struct{}
}

func (c *counter) Reset(_ string, all map[Ref]json.RawMessage) { c.objects += len(all) }
func (c *counter) Apply([]Change)                              {}
func (c *counter) Stale(string)                                {}
func (c *counter) Fresh()                                      { close(c.fresh) }

// BenchmarkWatchLargePool starts a watch on 27,000 objects. kept-MB is what the watch holds afterwards, peak-MB the most the heap grew meanwhile
// (server included, which prints without keeping).
func BenchmarkWatchLargePool(b *testing.B) {
	path := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	web := &http.Server{Handler: bulkServer{largePool}, ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = web.Serve(l) }()
	defer web.Close()
	var classes []string
	want := 0
	for class, c := range largePool {
		classes = append(classes, class)
		want += c.count
	}
	for b.Loop() {
		b.StopTimer()
		c, err := New(Config{Socket: path, Originator: "bench", Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			b.Fatal(err)
		}
		before := heap(true)
		peak := watchHeap(before)
		b.StartTimer()
		h := &counter{fresh: make(chan struct{})}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = Watch(ctx, c, WatchConfig{Classes: classes, Handler: h}) }()
		<-h.fresh
		b.StopTimer()
		if h.objects != want {
			b.Fatalf("%d objects of %d", h.objects, want)
		}
		b.ReportMetric(peak(), "peak-MB")
		b.ReportMetric((heap(true)-before)/1e6, "kept-MB")
		cancel()
		<-ended
		_ = c.Close(context.Background())
		b.StartTimer()
	}
	b.ReportMetric(float64(want), "objects")
}

func heap(collect bool) float64 {
	if collect {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// watchHeap samples the heap until the function it gives is called, which tells by how many MB it grew at most.
func watchHeap(before float64) func() float64 {
	stop, peak := make(chan struct{}), make(chan float64)
	go func() {
		most := before
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				most = max(most, heap(false))
			case <-stop:
				peak <- (most - before) / 1e6
				return
			}
		}
	}()
	return func() float64 { close(stop); return <-peak }
}
