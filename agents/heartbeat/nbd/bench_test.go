package nbd

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// file is an export on a file opened like the statefile: O_DIRECT, full length or an error.
type file struct {
	f    *os.File
	size int64
}

func openFile(t testing.TB, path string, flag int) file {
	t.Helper()
	const size = 4 << 20
	if err := os.WriteFile(path, pattern(size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|flag, 0)
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

// BenchmarkLatency compares one request at a time over loopback TCP against nbdkit's file plugin on the same file,
// interleaved in one run, and reports medians, 99th percentiles and the ratios ours/theirs. The budget is 1.5.
//
// cached: both servers use the page cache, so the ratio is that of the servers. direct: ours opens the file with
// O_DIRECT as it must, and writes carry FUA for both; nbdkit's reads then come from its page cache, ours from the disk.
func BenchmarkLatency(b *testing.B) {
	need(b, "nbdkit")
	for _, mode := range []struct {
		name string
		flag int
		fua  bool
	}{{"cached", 0, false}, {"direct", syscall.O_DIRECT, true}} {
		ours := openFile(b, filepath.Join(b.TempDir(), "disk"), mode.flag)
		a := connect(b, listen(b, &Server{Exports: Single{"", ours}}), Options{})
		port := freePort(b)
		nbdkitTCP(b, port, ours.f.Name())
		other := connect(b, fmt.Sprintf("127.0.0.1:%d", port), Options{})
		for _, size := range []int{1024, 4096} {
			for _, verb := range []string{"read", "write"} {
				b.Run(fmt.Sprintf("%s/%s/%d", mode.name, verb, size), func(b *testing.B) {
					compare(b, a, other, verb, size, mode.fua)
				})
			}
		}
	}
}

func compare(b *testing.B, ours, other *Client, verb string, size int, fua bool) {
	p := AlignedBuffer(size)
	one := func(c *Client, i int) time.Duration {
		off := int64(i%64) * 4096
		start := time.Now()
		var err error
		if verb == "read" {
			err = c.Read(p, off, patience)
		} else {
			err = c.Write(p, off, fua, patience)
		}
		if err != nil {
			b.Fatal(err)
		}
		return time.Since(start)
	}
	var mine, theirs []time.Duration
	for i := 0; b.Loop(); i++ {
		mine, theirs = append(mine, one(ours, i)), append(theirs, one(other, i))
	}
	slices.Sort(mine)
	slices.Sort(theirs)
	report := func(name string, q float64) {
		m, t := mine[int(q*float64(len(mine)-1))], theirs[int(q*float64(len(theirs)-1))]
		b.ReportMetric(float64(m.Nanoseconds())/1e3, name+"-us")
		b.ReportMetric(float64(t.Nanoseconds())/1e3, name+"-nbdkit-us")
		b.ReportMetric(float64(m)/float64(t), name+"-ratio")
	}
	report("p50", 0.5)
	report("p99", 0.99)
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
