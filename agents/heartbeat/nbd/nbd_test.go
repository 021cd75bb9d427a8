package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(envServe); path != "" {
		benchServer(path)
	}
	goleak.VerifyTestMain(m)
}

func TestClientAndServerAgree(t *testing.T) {
	for _, structured := range []bool{false, true} {
		m := newMemory(t, 1<<20)
		addr := listen(t, &Server{Exports: Single{"disk", m}})
		c := connect(t, addr, Options{Name: "disk", Structured: structured})
		if c.Info().Size != 1<<20 || c.Info().MinBlock != 512 || c.Info().MaxBlock != MaxPayload {
			t.Fatalf("info = %+v", c.Info())
		}
		mirror := make([]byte, 1<<20)
		rapid.Check(t, func(r *rapid.T) {
			n := 512 * rapid.IntRange(1, 1200).Draw(r, "sectors")
			off := 512 * rapid.IntRange(0, (1<<20-n)/512).Draw(r, "sector")
			switch rapid.IntRange(0, 3).Draw(r, "verb") {
			case 0:
				p := bytes.Repeat([]byte{rapid.Byte().Draw(r, "fill")}, n)
				if err := c.Write(p, int64(off), true, patience); err != nil {
					r.Fatal(err)
				}
				copy(mirror[off:], p)
			case 1:
				if err := c.Zero(int64(off), int64(n), false, patience); err != nil {
					r.Fatal(err)
				}
				clear(mirror[off : off+n])
			case 2:
				if err := c.Flush(patience); err != nil {
					r.Fatal(err)
				}
			case 3:
				p := make([]byte, n)
				if err := c.Read(p, int64(off), patience); err != nil {
					r.Fatal(err)
				}
				if !bytes.Equal(p, mirror[off:off+n]) {
					r.Fatalf("read at %d of %d bytes differs from what was written", off, n)
				}
			}
		})
		if m.fua == 0 || m.flush == 0 {
			t.Errorf("fua = %d, flush = %d: flags did not reach the session", m.fua, m.flush)
		}
	}
}

func TestConcurrentRequestsOfOneClient(t *testing.T) {
	addr := listen(t, &Server{Exports: Single{"", newMemory(t, 1<<20)}})
	c := connect(t, addr, Options{})
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(i)}, 4096)
			got := make([]byte, 4096)
			for range 20 {
				if err := c.Write(p, int64(i)*4096, false, patience); err != nil {
					t.Error(err)
				}
				if err := c.Read(got, int64(i)*4096, patience); err != nil || !bytes.Equal(p, got) {
					t.Errorf("read = %v", err)
				}
			}
		})
	}
	wg.Wait()
}

// raw is a client made of bytes.
type raw struct {
	t *testing.T
	net.Conn
}

func dialRaw(t *testing.T, addr string) raw {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	r := raw{t, conn}
	r.read(18)
	return r
}

func (r raw) read(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		r.t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

func (r raw) put(parts ...any) {
	r.t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		if s, ok := p.(string); ok {
			b.WriteString(s)
			continue
		}
		_ = binary.Write(&b, binary.BigEndian, p)
	}
	if _, err := r.Write(b.Bytes()); err != nil {
		r.t.Fatal(err)
	}
}

func (r raw) option(opt uint32, data string) {
	r.put(magicOption, opt, uint32(len(data)), data)
}

func (r raw) reply(opt uint32) uint32 {
	r.t.Helper()
	b := r.read(20)
	if got := binary.BigEndian.Uint32(b[8:]); got != opt {
		r.t.Fatalf("reply to option %d, want %d", got, opt)
	}
	r.read(int(binary.BigEndian.Uint32(b[16:])))
	return binary.BigEndian.Uint32(b[12:])
}

func (r raw) closed() {
	r.t.Helper()
	if n, err := r.Conn.Read(make([]byte, 1)); n != 0 || err == nil {
		r.t.Fatal("connection lives, want it closed")
	}
}

func (r raw) request(flags, kind uint16, off uint64, n uint32, data string) {
	r.put(magicRequest, flags, kind, uint64(7), off, n, data)
}

func (r raw) errno() Error {
	r.t.Helper()
	b := r.read(16)
	if binary.BigEndian.Uint32(b) != magicSimple || binary.BigEndian.Uint64(b[8:]) != 7 {
		r.t.Fatalf("reply % x", b)
	}
	return Error(binary.BigEndian.Uint32(b[4:]))
}

func (r raw) goTo(name string) {
	r.t.Helper()
	r.option(optGo, string(binary.BigEndian.AppendUint32(nil, uint32(len(name))))+name+"\x00\x00")
	for {
		switch k := r.reply(optGo); k {
		case repInfo:
		case repAck:
			return
		default:
			r.t.Fatalf("GO answered %#x", k)
		}
	}
}

func TestHandshakeRules(t *testing.T) {
	m := newMemory(t, 1<<20)
	addr := listen(t, &Server{Exports: Single{"disk", m}})
	name := func(s string) string { return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s }
	cases := []struct {
		name string
		do   func(r raw)
	}{
		{"unknown client flags", func(r raw) { r.put(uint32(4)); r.closed() }},
		{"wrong option magic", func(r raw) { r.put(uint32(3), uint64(1), uint32(3), uint32(0)); r.closed() }},
		{"unknown options with payload are read off", func(r raw) {
			r.put(uint32(3))
			for _, opt := range []uint32{4, 9, 10, 11, 77} {
				r.option(opt, string(make([]byte, 1000)))
				if k := r.reply(opt); k != repUnsup {
					t.Errorf("option %d answered %#x", opt, k)
				}
			}
			r.goTo("disk")
		}},
		{"option too big", func(r raw) {
			r.put(uint32(3))
			r.option(optInfo, string(make([]byte, maxOption+1)))
			if k := r.reply(optInfo); k != repTooBig {
				t.Errorf("answered %#x", k)
			}
			r.goTo("disk")
		}},
		{"option far too big", func(r raw) { r.put(uint32(3), magicOption, optInfo, uint32(maxDrain+1)); r.closed() }},
		{"endless options", func(r raw) {
			r.put(uint32(3))
			for range maxOptions {
				r.option(77, "")
				r.reply(77)
			}
			r.closed()
		}},
		{"list", func(r raw) {
			r.put(uint32(3))
			r.option(optList, "x")
			if k := r.reply(optList); k != repInvalid {
				t.Errorf("LIST with data answered %#x", k)
			}
			r.option(optList, "")
			if a, b := r.reply(optList), r.reply(optList); a != repServer || b != repAck {
				t.Errorf("LIST answered %#x %#x", a, b)
			}
		}},
		{"malformed GO", func(r raw) {
			r.put(uint32(3))
			for _, bad := range []string{"", "\x00\x00\x00\xff\x00\x00", name("disk") + "\x00\x02\x00", name("disk") + "\x00\x00\x00"} {
				r.option(optGo, bad)
				if k := r.reply(optGo); k != repInvalid {
					t.Errorf("GO %q answered %#x", bad, k)
				}
			}
		}},
		{"unknown export", func(r raw) {
			r.put(uint32(3))
			r.option(optGo, name("other")+"\x00\x00")
			if k := r.reply(optGo); k != repUnknown {
				t.Errorf("answered %#x", k)
			}
			r.option(optExportName, "other")
			r.closed()
		}},
		{"info does not open", func(r raw) {
			r.put(uint32(3))
			r.option(optInfo, name("disk")+"\x00\x01\x00\x03")
			if a, b, c := r.reply(optInfo), r.reply(optInfo), r.reply(optInfo); a != repInfo || b != repInfo || c != repAck {
				t.Errorf("answered %#x %#x %#x", a, b, c)
			}
			r.option(optAbort, "")
			if k := r.reply(optAbort); k != repAck {
				t.Errorf("ABORT answered %#x", k)
			}
			r.closed()
		}},
		{"export name with zeroes", func(r raw) {
			r.put(uint32(1))
			r.option(optExportName, "disk")
			b := r.read(134)
			if binary.BigEndian.Uint64(b) != 1<<20 {
				t.Errorf("size % x", b[:8])
			}
			r.request(0, cmdFlush, 0, 0, "")
			if e := r.errno(); e != 0 {
				t.Errorf("flush: %v", e)
			}
		}},
		{"export name without zeroes", func(r raw) {
			r.put(uint32(3))
			r.option(optExportName, "disk")
			r.read(10)
			r.request(0, cmdFlush, 0, 0, "")
			if e := r.errno(); e != 0 {
				t.Errorf("flush: %v", e)
			}
		}},
		{"no TLS here", func(r raw) {
			r.put(uint32(3))
			r.option(optStartTLS, "")
			if k := r.reply(optStartTLS); k != repPolicy {
				t.Errorf("answered %#x", k)
			}
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.do(dialRaw(t, addr)) })
	}
}

func TestTransmissionRules(t *testing.T) {
	m := newMemory(t, 1<<20)
	addr := listen(t, &Server{Exports: Single{"disk", m}})
	const size = 1 << 20
	k1 := string(make([]byte, 1024))
	cases := []struct {
		name  string
		flags uint16
		kind  uint16
		off   uint64
		n     uint32
		data  string
		want  Error
	}{
		{"write with FUA", cmdFlagFUA, cmdWrite, 0, 1024, k1, 0},
		{"misaligned write", 0, cmdWrite, 100, 1024, k1, EINVAL},
		{"misaligned length", 0, cmdWrite, 512, 1000, k1[:1000], EINVAL},
		{"write past the end", 0, cmdWrite, size - 512, 1024, k1, ENOSPC},
		{"write far past the end", 0, cmdWrite, 1 << 63, 1024, k1, ENOSPC},
		{"write with wrapping end", 0, cmdWrite, ^uint64(0) - 511, 1024, k1, ENOSPC},
		{"read past the end", 0, cmdRead, size - 512, 1024, "", EINVAL},
		{"read at the end", 0, cmdRead, size, 512, "", EINVAL},
		{"read of nothing", 0, cmdRead, 0, 0, "", EINVAL},
		{"oversized read", 0, cmdRead, 0, MaxPayload + 512, "", EINVAL},
		{"zeroes past the end", 0, cmdWriteZeroes, size, 512, "", ENOSPC},
		{"zeroes with NO_HOLE", cmdFlagNoHole | cmdFlagFUA, cmdWriteZeroes, 0, 4096, "", 0},
		{"zeroes with FAST_ZERO", 1 << 4, cmdWriteZeroes, 0, 4096, "", EINVAL},
		{"read with DF", 1 << 2, cmdRead, 0, 512, "", EINVAL},
		{"write with unknown flag", 1 << 9, cmdWrite, 0, 512, k1[:512], EINVAL},
		{"trim", 0, 4, 0, 512, "", EINVAL},
		{"block status", 0, 7, 0, 512, "", EINVAL},
		{"unknown command", 0, 99, 0, 512, "", EINVAL},
		{"flush with FUA", cmdFlagFUA, cmdFlush, 0, 0, "", 0},
	}
	r := dialRaw(t, addr)
	r.put(uint32(3))
	r.goTo("disk")
	for _, c := range cases {
		r.request(c.flags, c.kind, c.off, c.n, c.data)
		if e := r.errno(); e != c.want {
			t.Errorf("%s: %v, want %v", c.name, e, c.want)
		}
	}
	r.request(0, cmdWrite, 0, 2*MaxPayload+512, "")
	r.closed()
}

func TestDeviceErrorsComeBeforeData(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Error
	}{{syscall.EIO, EIO}, {ESHUTDOWN, ESHUTDOWN}, {errors.New("odd"), EIO}, {syscall.EROFS, EIO}, {syscall.ENOSPC, ENOSPC}} {
		m := newMemory(t, 1<<20)
		m.fail = c.err
		addr := listen(t, &Server{Exports: Single{"", m}})
		for _, structured := range []bool{false, true} {
			client := connect(t, addr, Options{Structured: structured})
			p := make([]byte, 4096)
			for _, err := range []error{client.Read(p, 0, patience), client.Write(p, 0, false, patience), client.Write(make([]byte, 600<<10), 0, false, patience),
				client.Flush(patience), client.Zero(0, 512, false, patience)} {
				if !errors.Is(err, c.want) {
					t.Errorf("device error %v arrives as %v, want %v", c.err, err, c.want)
				}
			}
		}
	}
}

func TestErrorInALaterPiece(t *testing.T) {
	m := newMemory(t, 1<<20)
	m.fail, m.after = errDevice, 300<<10
	addr := listen(t, &Server{Exports: Single{"", m}})
	p := make([]byte, 600<<10)
	if err := connect(t, addr, Options{Structured: true}).Read(p, 0, patience); !errors.Is(err, EIO) {
		t.Errorf("structured: %v, want EIO", err)
	}
	if err := connect(t, addr, Options{}).Read(p, 0, patience); !errors.Is(err, ErrClosed) {
		t.Errorf("simple: %v, want a closed connection", err)
	}
}

func TestReadOnlyExport(t *testing.T) {
	m := newMemory(t, 1<<20)
	m.info.Flags |= FlagReadOnly
	c := connect(t, listen(t, &Server{Exports: Single{"", m}}), Options{})
	for _, err := range []error{c.Write(make([]byte, 512), 0, false, patience), c.Zero(0, 512, false, patience)} {
		if !errors.Is(err, EPERM) {
			t.Errorf("write to a read-only export: %v", err)
		}
	}
	if err := c.Read(make([]byte, 512), 0, patience); err != nil {
		t.Error(err)
	}
}

// The defect that made this package: one silent client must not stop another one.
func TestStalledClientsDelayNobody(t *testing.T) {
	m := newMemory(t, 8<<20)
	addr := listen(t, &Server{Exports: Single{"", m}, TransferTimeout: 200 * time.Millisecond, HandshakeTimeout: 300 * time.Millisecond})
	silent := dialRaw(t, addr)
	halfOption := dialRaw(t, addr)
	halfOption.put(uint32(3), magicOption)
	halfWrite := dialRaw(t, addr)
	halfWrite.put(uint32(3))
	halfWrite.goTo("")
	halfWrite.request(0, cmdWrite, 0, 4096, "half")
	neverReads := dialRaw(t, addr)
	neverReads.put(uint32(3))
	neverReads.goTo("")
	for range 64 {
		neverReads.request(0, cmdRead, 0, 4<<20, "")
	}
	c := connect(t, addr, Options{})
	for range 100 {
		if err := c.Write(make([]byte, 1024), 4096, true, patience); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []raw{silent, halfOption, halfWrite} {
		r.closed()
	}
	if _, err := io.Copy(io.Discard, neverReads); err == nil {
		t.Log("the server closed the connection of the client that never read in good order")
	}
}

func TestConnectionLimit(t *testing.T) {
	addr := listen(t, &Server{Exports: Single{"", newMemory(t, 1<<20)}, MaxConns: 1})
	c := connect(t, addr, Options{})
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Connect(t.Context(), conn, Options{}); err == nil {
		t.Error("second connection was served")
	}
	if err := c.Flush(patience); err != nil {
		t.Error(err)
	}
}

// stuck is a session whose reads wait.
type stuck struct {
	*memory
	release chan struct{}
}

func (s stuck) Read(p []byte, off int64) error { <-s.release; return s.memory.Read(p, off) }

func TestTimeoutClosesTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		release := make(chan struct{})
		server := &Server{Exports: Single{"", stuck{newMemory(t, 1<<20), release}}}
		done := make(chan error, 1)
		go func() { done <- server.ServeConn(context.Background(), far) }()
		c, err := Connect(t.Context(), near, Options{})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := c.Read(make([]byte, 512), 0, 2*time.Second); !errors.Is(err, ErrTimeout) {
			t.Errorf("err = %v, want ErrTimeout", err)
		}
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("timed out after %v", d)
		}
		if err := c.Flush(time.Second); !errors.Is(err, ErrClosed) {
			t.Errorf("request after a time-out: %v, want ErrClosed", err)
		}
		close(release)
		if err := <-done; err == nil {
			t.Error("the server missed that its client left in the middle of a request")
		}
	})
}

func TestHandshakeTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		server := &Server{Exports: Single{"", newMemory(t, 1<<20)}}
		done := make(chan error, 1)
		go func() { done <- server.ServeConn(context.Background(), far) }()
		if _, err := io.ReadFull(near, make([]byte, 18)); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := <-done; err == nil {
			t.Error("a silent client was served")
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("gave up after %v, want 10 s", d)
		}
		near.Close()
	})
}

func TestNames(t *testing.T) {
	addr := listen(t, &Server{Exports: Single{"disk", newMemory(t, 4096)}})
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	names, err := Names(t.Context(), conn, nil)
	if err != nil || len(names) != 1 || names[0] != "disk" {
		t.Errorf("names = %v, %v", names, err)
	}
}

func TestSteadyStateAllocatesNothing(t *testing.T) {
	c := connect(t, listen(t, &Server{Exports: Single{"", newMemory(t, 1<<20)}}), Options{})
	p := make([]byte, 4096)
	allocs := testing.AllocsPerRun(500, func() {
		if c.Write(p[:1024], 4096, true, patience) != nil || c.Read(p, 0, patience) != nil || c.Flush(patience) != nil {
			t.Error("request failed")
		}
	})
	if allocs >= 1 && !raceEnabled {
		t.Errorf("%v allocations for three requests, client and server together", allocs)
	}
}
