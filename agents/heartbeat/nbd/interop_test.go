package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/bus/poolcert"
)

// need skips the test when a program is missing; XOSTOR_TEST_STRICT=1 makes that a failure.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err == nil {
			continue
		}
		if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
			t.Fatalf("%s is not installed", p)
		}
		t.Skipf("%s is not installed", p)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// shortDir is a folder whose unix sockets stay under the 108 bytes of a socket's address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>9) ^ byte(i*7)
	}
	return b
}

const secret = "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"

// Foreign clients against our server, over TCP in clear and with mutual TLS.
func TestForeignClients(t *testing.T) {
	// libnbd checks the certificate against the host in the address.
	id, err := poolcert.NewIdentity("localhost", secret)
	if err != nil {
		t.Fatal(err)
	}
	pki := t.TempDir()
	if err := id.WritePEM(pki); err != nil {
		t.Fatal(err)
	}
	for _, secure := range []bool{false, true} {
		m := newMemory(t, 4<<20)
		copy(m.data, pattern(4<<20))
		s := &Server{Exports: Single{"disk", m}}
		uri := func(addr string) string { return "nbd://" + addr + "/disk" }
		if secure {
			s.TLS = id.Server()
			uri = func(addr string) string {
				return "nbds://" + strings.Replace(addr, "127.0.0.1", "localhost", 1) + "/disk?tls-certificates=" + pki
			}
		}
		addr := listen(t, s)
		prefix := fmt.Sprintf("tls=%v ", secure)
		t.Run(prefix+"nbdinfo", func(t *testing.T) {
			need(t, "nbdinfo")
			out := run(t, "nbdinfo", uri(addr))
			for _, want := range []string{"export-size: 4194304", "can_fua: true", "can_flush: true", "can_multi_conn: true", "can_zero: true",
				"block_size_minimum: 512", "is_read_only: false"} {
				if !strings.Contains(out, want) {
					t.Errorf("nbdinfo lacks %q:\n%s", want, out)
				}
			}
			if out := run(t, "nbdinfo", "--list", uri(addr)); !strings.Contains(out, `"disk"`) {
				t.Errorf("nbdinfo --list:\n%s", out)
			}
		})
		t.Run(prefix+"nbdcopy", func(t *testing.T) {
			need(t, "nbdcopy")
			file := filepath.Join(t.TempDir(), "copy")
			run(t, "nbdcopy", uri(addr), file)
			got, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(got, m.bytes()) {
				t.Errorf("nbdcopy from us differs: %v", err)
			}
			flipped := pattern(4 << 20)
			for i := range flipped {
				flipped[i] ^= 0xFF
			}
			if err := os.WriteFile(file, flipped, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "nbdcopy", "--flush", file, uri(addr))
			if !bytes.Equal(m.bytes(), flipped) {
				t.Error("nbdcopy to us differs")
			}
		})
		// qemu takes the certificate's name to check from tls-hostname.
		host, port, _ := net.SplitHostPort(addr)
		image := "driver=nbd,server.type=inet,server.host=" + host + ",server.port=" + port + ",export=disk"
		var objects []string
		if secure {
			objects = []string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + pki + ",verify-peer=on"}
			image += ",tls-creds=tls0,tls-hostname=" + poolcert.PoolName
		}
		t.Run(prefix+"qemu-io", func(t *testing.T) {
			need(t, "qemu-io")
			args := append(objects, "--image-opts", "-c", "write -P 0x5a -f 8192 1024", "-c", "read -P 0x5a 8192 1024", "-c", "write -z 65536 65536",
				"-c", "read -P 0 65536 65536", "-c", "write -P 0x77 1M 2M", "-c", "read -P 0x77 1M 2M", "-c", "flush", image)
			if out := run(t, "qemu-io", args...); strings.Contains(out, "failed") || strings.Contains(out, "error") {
				t.Error(out)
			}
			if d := m.bytes(); d[8192] != 0x5a || d[65536] != 0 || d[2<<20] != 0x77 || m.fua == 0 {
				t.Errorf("what qemu-io wrote did not arrive (FUA writes: %d)", m.fua)
			}
		})
		t.Run(prefix+"qemu-img", func(t *testing.T) {
			need(t, "qemu-img")
			file := filepath.Join(t.TempDir(), "img")
			run(t, "qemu-img", append(append([]string{"convert"}, objects...), "--image-opts", image, "-O", "raw", file)...)
			got, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(got, m.bytes()) {
				t.Errorf("qemu-img convert differs: %v", err)
			}
		})
		if secure {
			continue // fio gives libnbd no permission to read certificates from files.
		}
		t.Run(prefix+"fio", func(t *testing.T) {
			need(t, "fio")
			run(t, "fio", "--name=v", "--aux-path="+t.TempDir(), "--ioengine=nbd", "--uri="+uri(addr), "--rw=randrw", "--bsrange=1k-64k", "--size=4m", "--iodepth=16",
				"--verify=crc32c", "--verify_fatal=1", "--io_size=16m")
		})
	}
}

func TestTLSRules(t *testing.T) {
	id, err := poolcert.NewIdentity("host-a", secret)
	if err != nil {
		t.Fatal(err)
	}
	other, err := poolcert.NewIdentity("host-a", "11111111-dddd/22222222-eeee/33333333-ffff")
	if err != nil {
		t.Fatal(err)
	}
	m := newMemory(t, 1<<20)
	addr := listen(t, &Server{Exports: Single{"disk", m}, TLS: id.Server()})
	c := connect(t, addr, Options{Name: "disk", TLS: id.Client(poolcert.PoolName), Structured: true})
	p := pattern(300 << 10)
	if err := c.Write(p, 0, true, patience); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if err := c.Read(got, 0, patience); err != nil || !bytes.Equal(got, p) {
		t.Fatalf("read over TLS: %v", err)
	}
	t.Run("other pool", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Connect(t.Context(), conn, Options{Name: "disk", TLS: other.Client(poolcert.PoolName)}); err == nil {
			t.Error("a client of another pool got in")
		}
	})
	t.Run("in clear", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		var r *Refusal
		if _, err := Connect(t.Context(), conn, Options{Name: "disk"}); !errors.As(err, &r) || r.Code != TLSRequired {
			t.Errorf("in clear: %v, want TLS required", err)
		}
		x := dialRaw(t, addr)
		x.put(uint32(3))
		x.option(optExportName, "disk")
		x.closed()
	})
	t.Run("bytes behind STARTTLS", func(t *testing.T) {
		x := dialRaw(t, addr)
		x.put(uint32(3), magicOption, optStartTLS, uint32(0), magicOption, optList, uint32(0))
		x.closed()
	})
}

// nbdkit starts nbdkit on a unix socket and returns its path.
func nbdkit(t testing.TB, args ...string) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "s")
	startNbdkit(t, "unix", path, append([]string{"-U", path}, args...)...)
	return path
}

// nbdkitTCP starts nbdkit's file plugin.
func nbdkitTCP(t testing.TB, port int, file string, options ...string) {
	t.Helper()
	startNbdkit(t, "tcp", fmt.Sprintf("127.0.0.1:%d", port), append([]string{"-i", "127.0.0.1", "-p", strconv.Itoa(port), "file", file}, options...)...)
}

func startNbdkit(t testing.TB, network, addr string, args ...string) {
	t.Helper()
	startServer(t, "nbdkit", network, addr, append([]string{"-f"}, args...)...)
}

// startServer runs a foreign server in the foreground until the test ends.
func startServer(t testing.TB, program, network, addr string, args ...string) {
	t.Helper()
	need(t, program)
	cmd := exec.Command(program, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		if conn, err := net.Dial(network, addr); err == nil {
			conn.Close()
			return
		}
		<-tick.C
	}
	t.Fatalf("%s does not listen\n%s", program, &log)
}

func connectUnix(t testing.TB, path string, o Options) *Client {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Connect(t.Context(), conn, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Our client against a foreign server with faults.
func TestAgainstNbdkit(t *testing.T) {
	for _, structured := range []bool{false, true} {
		o := Options{Structured: structured}
		t.Run(fmt.Sprintf("structured=%v", structured), func(t *testing.T) {
			c := connectUnix(t, nbdkit(t, "memory", "8M"), o)
			p, got := pattern(1<<20), make([]byte, 1<<20)
			if err := c.Write(p, 4096, true, patience); err != nil {
				t.Fatal(err)
			}
			if err := c.Zero(4096+8192, 4096, false, patience); err != nil {
				t.Fatal(err)
			}
			clear(p[8192 : 8192+4096])
			if err := c.Read(got, 4096, patience); err != nil || !bytes.Equal(p, got) {
				t.Fatalf("read differs: %v", err)
			}
			if err := c.Flush(patience); err != nil {
				t.Fatal(err)
			}
			if err := c.Read(make([]byte, 512), 8<<20, patience); !errors.Is(err, EINVAL) {
				t.Errorf("read past the end: %v", err)
			}
			c.Disconnect()
		})
		t.Run(fmt.Sprintf("error structured=%v", structured), func(t *testing.T) {
			c := connectUnix(t, nbdkit(t, "--filter=error", "memory", "1M", "error=EIO", "error-rate=100%"), o)
			p := make([]byte, 1024)
			for _, err := range []error{c.Read(p, 0, patience), c.Write(p, 0, false, patience)} {
				if !errors.Is(err, EIO) {
					t.Errorf("err = %v, want EIO", err)
				}
			}
		})
	}
	t.Run("delay", func(t *testing.T) {
		path := nbdkit(t, "--filter=delay", "memory", "1M", "delay-write=60")
		c := connectUnix(t, path, Options{})
		if err := c.Read(make([]byte, 512), 0, patience); err != nil {
			t.Fatal(err)
		}
		if err := c.Write(make([]byte, 512), 0, false, 100*time.Millisecond); !errors.Is(err, ErrTimeout) {
			t.Errorf("delayed write: %v, want ErrTimeout", err)
		}
		select {
		case <-c.Ended():
		default:
			t.Error("the connection of a request with unknown outcome lives")
		}
	})
	t.Run("pause", func(t *testing.T) {
		control := filepath.Join(shortDir(t), "p")
		path := nbdkit(t, "--filter=pause", "memory", "1M", "pause-control="+control)
		c := connectUnix(t, path, Options{})
		conn, err := net.Dial("unix", control)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		say := func(verb string) {
			if _, err := conn.Write([]byte(verb)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		say("p")
		done := make(chan error, 1)
		go func() { done <- c.Write(make([]byte, 512), 0, false, patience) }()
		say("r")
		if err := <-done; err != nil {
			t.Errorf("write over a pause: %v", err)
		}
	})
}
