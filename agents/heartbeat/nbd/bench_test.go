package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// file is an export on a file opened like the statefile: O_DIRECT, full length or an error.
type file struct {
	f    *os.File
	size int64
}

func openFile(t testing.TB, path string) file {
	t.Helper()
	const size = 4 << 20
	if err := os.WriteFile(path, pattern(size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return file{f, size}
}

func (f file) Info() Info {
	return Info{Size: uint64(f.size), MinBlock: 512, Flags: FlagFlush | FlagFUA | FlagMultiConn}
}
func (f file) Read(p []byte, off int64) error { _, err := f.f.ReadAt(p, off); return err }
func (f file) Write(p []byte, off int64, fua bool) error {
	_, err := f.f.WriteAt(p, off)
	if err == nil && fua {
		err = syscall.Fdatasync(int(f.f.Fd()))
	}
	return err
}
func (f file) Zero(off, n int64, fua bool) error { return f.Write(aligned(int(n)), off, fua) }
func (f file) Flush() error                      { return syscall.Fdatasync(int(f.f.Fd())) }
func (f file) Close()                            {}

// envServe makes the test binary a server of the named file, so that ours is a process of its own as theirs are.
const envServe = "XOSTOR_NBD_BENCH_FILE"

// benchServer serves path until its standard input ends, and prints its address.
func benchServer(path string) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
	if err == nil {
		var l net.Listener
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err == nil {
			fmt.Println(l.Addr())
			go func() {
				_, _ = io.Copy(io.Discard, os.Stdin)
				os.Exit(0)
			}()
			err = (&Server{Exports: Single{"", file{f, 4 << 20}}}).Serve(context.Background(), l)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func startOurs(b *testing.B, path string) string {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envServe+"="+path)
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// BenchmarkLatency compares one request at a time over loopback TCP with other servers on the same file, each a process of
// its own, interleaved in one run. It reports medians and 99th percentiles, and their ratios; the budget is 1.5.
//
// Ours reads and writes with O_DIRECT when it owns a device; nbdkit's file plugin has no such mode. Its answers to reads
// come from the page cache, which a heartbeat must not trust: that difference is the device's, not the server's. So:
//
//	ram      ours with O_DIRECT against nbdkit, on a file in RAM, where the page cache is the device: the ratio is that of the servers
//	uncached ours with O_DIRECT against nbdkit with cache=none and without readahead: it drops pages once used, but only whole ones
//	         are dropped, so requests of 4 KiB go to the device with both, and reads of 1 KiB need not with nbdkit
//	direct   ours with O_DIRECT against qemu-nbd with cache=none, which is O_DIRECT, too: the same work at the device
//	shipped  ours with O_DIRECT against nbdkit; device is what the same pread or pwrite takes without any server
//
// Writes carry FUA. The parts named fio are the same without our client: fio's, with one request at a time and
// no FUA, which it does not know; each server in turn.
func BenchmarkLatency(b *testing.B) {
	need(b, "nbdkit", "qemu-nbd")
	for _, mode := range []struct {
		name, other string
	}{{"ram", "nbdkit"}, {"uncached", "nbdkit-none"}, {"direct", "qemu-nbd"}, {"shipped", "nbdkit"}} {
		dir := b.TempDir()
		if mode.name == "ram" {
			var err error
			if dir, err = os.MkdirTemp("/dev/shm", "xostor"); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = os.RemoveAll(dir) })
		}
		disk := openFile(b, filepath.Join(dir, "disk")) // In RAM since Linux 6.6.
		addr := startOurs(b, disk.f.Name())
		port := freePort(b)
		theirs := fmt.Sprintf("127.0.0.1:%d", port)
		switch mode.other {
		case "nbdkit":
			nbdkitTCP(b, port, disk.f.Name())
		case "nbdkit-none":
			nbdkitTCP(b, port, disk.f.Name(), "cache=none", "fadvise=random")
		default:
			startServer(b, "qemu-nbd", "tcp", theirs, "-b", "127.0.0.1", "-p", strconv.Itoa(port), "-f", "raw", "--cache=none", "--aio=threads", "-t", "-e", "8", disk.f.Name())
		}
		a, other := connect(b, addr, Options{}), connect(b, theirs, Options{})
		for _, size := range []int{1024, 4096} {
			for _, verb := range []string{"read", "write"} {
				b.Run(fmt.Sprintf("%s/%s/%d", mode.name, verb, size), func(b *testing.B) {
					compare(b, a, other, disk, mode.other, verb, size)
				})
				b.Run(fmt.Sprintf("%s/fio/%s/%d", mode.name, verb, size), func(b *testing.B) {
					compareFIO(b, addr, theirs, mode.other, verb, size)
				})
			}
		}
	}
}

func compare(b *testing.B, ours, other *Client, disk file, name, verb string, size int) {
	p := AlignedBuffer(size)
	client := func(c *Client) func(off int64) error {
		return func(off int64) error {
			if verb == "read" {
				return c.Read(p, off, patience)
			}
			return c.Write(p, off, true, patience)
		}
	}
	raw := func(off int64) error {
		if verb == "read" {
			return disk.Read(p, off)
		}
		return disk.Write(p, off, true)
	}
	who := []struct {
		name  string
		do    func(off int64) error
		times []time.Duration
	}{{name: "ours", do: client(ours)}, {name: name, do: client(other)}, {name: "device", do: raw}}
	for i := 0; b.Loop(); i++ {
		for k := range who {
			w := &who[(i+k)%len(who)] // Nobody is always the one after the same other.
			off := int64(i%64) * 4096
			start := time.Now()
			if err := w.do(off); err != nil {
				b.Fatal(err)
			}
			w.times = append(w.times, time.Since(start))
		}
	}
	for _, w := range who {
		slices.Sort(w.times)
	}
	for label, q := range map[string]float64{"p50": 0.5, "p99": 0.99} {
		at := func(k int) float64 {
			return float64(who[k].times[int(q*float64(len(who[k].times)-1))].Nanoseconds()) / 1e3
		}
		for k := range who {
			b.ReportMetric(at(k), label+"-"+who[k].name+"-us")
		}
		b.ReportMetric(at(0)/at(1), label+"-ratio")
	}
}

// compareFIO lets fio ask both servers in turn and reports the medians of what it found.
func compareFIO(b *testing.B, ours, other, name, verb string, size int) {
	if _, err := exec.LookPath("fio"); err != nil {
		b.Skip("fio is not installed")
	}
	who := []struct {
		name, addr string
		p50, p99   []float64 // Microseconds, by round.
	}{{name: "ours", addr: ours}, {name: name, addr: other}}
	for i := 0; b.Loop(); i++ {
		for k := range who {
			w := &who[(i+k)%len(who)]
			var out struct {
				Jobs []map[string]json.RawMessage `json:"jobs"`
			}
			var side struct {
				Latency struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			}
			text, err := exec.Command("fio", "--name=l", "--aux-path="+b.TempDir(), "--ioengine=nbd", "--uri=nbd://"+w.addr+"/", "--rw=rand"+verb, "--bs="+strconv.Itoa(size),
				"--size=4m", "--iodepth=1", "--number_ios=2000", "--randrepeat=1", "--output-format=json", "--percentile_list=50:99").Output()
			if err == nil {
				err = json.Unmarshal(text[max(0, bytes.IndexByte(text, '{')):], &out) // The engine says something first.
			}
			if err == nil {
				err = json.Unmarshal(out.Jobs[0][verb], &side)
			}
			if err != nil {
				b.Fatalf("fio: %v: %s", err, text)
			}
			w.p50 = append(w.p50, side.Latency.Percentile["50.000000"]/1e3)
			w.p99 = append(w.p99, side.Latency.Percentile["99.000000"]/1e3)
		}
	}
	median := func(x []float64) float64 { slices.Sort(x); return x[len(x)/2] }
	for _, w := range who {
		b.ReportMetric(median(w.p50), "p50-"+w.name+"-us")
		b.ReportMetric(median(w.p99), "p99-"+w.name+"-us")
	}
	b.ReportMetric(median(who[0].p50)/median(who[1].p50), "p50-ratio")
	b.ReportMetric(median(who[0].p99)/median(who[1].p99), "p99-ratio")
}

func freePort(t testing.TB) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// BenchmarkRequests is a million-request check by -benchtime=1000000x: allocations stay at 0 per request.
func BenchmarkRequests(b *testing.B) {
	c := connect(b, listen(b, &Server{Exports: Single{"", newMemory(b, 1<<20)}}), Options{})
	p := make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Write(p, 4096, true, patience); err != nil {
			b.Fatal(err)
		}
	}
}
