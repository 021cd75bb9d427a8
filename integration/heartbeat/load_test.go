package heartbeat

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
	"github.com/xostor-agents/xostor-agents/bus/poolcert"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
)

// footprint is what a process uses.
type footprint struct {
	resident, anon int64 // Bytes; all that is resident is locked.
	fds            int
	goroutines     int
}

func (f footprint) String() string {
	return fmt.Sprintf("%.1f MiB resident, %.1f of them its own, %d descriptors, %d goroutines", float64(f.resident)/(1<<20), float64(f.anon)/(1<<20), f.fds, f.goroutines)
}

func (p *pool) footprint(h *realpool.Host) footprint {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.PID()))
	if err != nil {
		p.t.Fatal(err)
	}
	var f footprint
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		if at := map[string]*int64{"VmRSS": &f.resident, "RssAnon": &f.anon}[name]; at != nil {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			*at = n << 10
		}
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", h.PID()))
	if err != nil {
		p.t.Fatal(err)
	}
	r, err := p.Report(h)
	if err != nil {
		p.t.Fatal(err)
	}
	f.fds, f.goroutines = len(fds), r.Goroutines
	return f
}

// owned is a connection of a made-up host to the owner, over the pool's TLS.
func (p *pool) owned(owner *realpool.Host, host string) *nbd.Client {
	p.t.Helper()
	id, err := poolcert.NewIdentity(host, realpool.Secret)
	if err != nil {
		p.t.Fatal(err)
	}
	var c *nbd.Client
	p.until("no connection of "+host, func() error {
		conn, err := net.Dial("tcp", owner.Addr)
		if err != nil {
			return err
		}
		c, err = nbd.Connect(p.t.Context(), conn, nbd.Options{Name: realpool.Resource + "@" + host + "/boot/1", TLS: id.Client(poolcert.PoolName)})
		return err
	})
	p.t.Cleanup(c.Close)
	return c
}

// stalled are clients that stop in the middle: before they say anything, in the handshake, in a request, and with answers
// that they never read.
func (p *pool) stalled(owner *realpool.Host) {
	p.t.Helper()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", owner.Addr)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { conn.Close() })
		return conn
	}
	dial()
	// The client's flags, and half of STARTTLS.
	if _, err := dial().Write([]byte{0, 0, 0, 3, 'I', 'H', 'A', 'V'}); err != nil {
		p.t.Fatal(err)
	}
	for i := range 3 {
		host := fmt.Sprintf("stalled%d", i)
		id, err := poolcert.NewIdentity(host, realpool.Secret)
		if err != nil {
			p.t.Fatal(err)
		}
		conn := dial()
		if err := rawGo(conn, id, realpool.Resource+"@"+host+"/boot/1"); err != nil {
			p.t.Fatal(err)
		}
	}
}

// rawGo opens an export by hand and then sends 1000 reads whose answers nobody takes, and half a request.
func rawGo(conn net.Conn, id *poolcert.Identity, name string) error {
	greeting := make([]byte, 18)
	if _, err := conn.Read(greeting); err != nil {
		return err
	}
	option := func(kind byte, data []byte) []byte {
		return append([]byte{'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0, 0, 0, kind, 0, 0, 0, byte(len(data))}, data...)
	}
	if _, err := conn.Write(append([]byte{0, 0, 0, 3}, option(5, nil)...)); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 20)); err != nil { // The answer to STARTTLS.
		return err
	}
	secure := tls.Client(conn, id.Client(poolcert.PoolName))
	if err := secure.HandshakeContext(context.Background()); err != nil {
		return err
	}
	data := append([]byte{0, 0, 0, byte(len(name))}, name...)
	var all bytes.Buffer
	all.Write(option(7, append(data, 0, 0)))
	for range 1000 {
		all.Write([]byte{0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0})
	}
	all.Write([]byte{0x25, 0x60, 0x95})
	_, err := secure.Write(all.Bytes())
	return err
}

// 64 hosts use one owner while other clients are stalled. Nobody fails, no read is old, and the owner's process does not
// grow. XOSTOR_SOAK_REQUESTS says how many requests.
func TestLoad(t *testing.T) {
	total := 8_000
	if v := os.Getenv("XOSTOR_SOAK_REQUESTS"); v != "" {
		var err error
		if total, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	} else {
		t.Parallel()
	}
	const hosts = statefile.MaxHosts
	p := newPool(t, realpool.Options{Hosts: 1})
	p.served(nil)
	owner := p.owner(nil)
	alone := p.footprint(owner)
	var clients []*nbd.Client
	for i := range hosts {
		clients = append(clients, p.owned(owner, fmt.Sprintf("h%d", i)))
	}
	first := p.load(clients, total/4, 1)
	before := p.footprint(owner)
	p.stalled(owner)
	second := p.load(clients, total-total/4, 2)
	t.Logf("%d hosts, %d requests alone: median %v, p99 %v, longest %v", hosts, len(first), first[len(first)/2], first[len(first)*99/100], first[len(first)-1])
	t.Logf("beside stalled clients, %d requests: median %v, p99 %v, longest %v", len(second), second[len(second)/2], second[len(second)*99/100], second[len(second)-1])
	t.Logf("owner with no client: %v", alone)
	t.Logf("with %d, after %d requests: %v", hosts, len(first), before)
	for _, c := range clients {
		c.Disconnect()
	}
	// What the stalled ones and the clients held is given back, in the time that a transfer may take.
	p.until("the owner keeps what its clients held", func() error {
		after := p.footprint(owner)
		if after.fds > alone.fds || after.goroutines > alone.goroutines || after.anon > before.anon+8<<20 {
			return fmt.Errorf("%v", after)
		}
		return nil
	})
	t.Logf("after %d requests, clients gone: %v", len(first)+len(second), p.footprint(owner))
}

// load lets each client make its share of the requests: cycles of a write of the own slot and reads of others.
func (p *pool) load(clients []*nbd.Client, total int, round uint32) []time.Duration {
	p.t.Helper()
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	var newest [statefile.MaxHosts]atomic.Uint32 // Sequences that were acknowledged.
	for i, c := range clients {
		wg.Go(func() {
			times := make([]time.Duration, 0, total/len(clients)+1)
			slot := statefile.Host{Index: uint32(i), ID: statefile.Nobody, Sequence: round << 24}
			buf := nbd.AlignedBuffer(statefile.HostIO)
			err := func() error {
				for n := range total / len(clients) {
					start := time.Now()
					if n%4 == 0 {
						slot.Sequence++
						slot.Encode(buf)
						if err := c.Write(buf, statefile.Offset(i), true, time.Minute); err != nil {
							return err
						}
						newest[i].Store(slot.Sequence)
					} else {
						other := (i + n) % len(clients)
						least := newest[other].Load()
						if err := c.Read(buf, statefile.Offset(other), time.Minute); err != nil {
							return err
						}
						h, err := statefile.DecodeHost(buf)
						if err != nil && !errors.Is(err, statefile.ErrEmpty) {
							return err
						}
						if err == nil && h.Sequence < least {
							return fmt.Errorf("slot %d is %d after %d was acknowledged", other, h.Sequence, least)
						}
					}
					times = append(times, time.Since(start))
				}
				return nil
			}()
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				p.t.Errorf("host %d: %v", i, err)
			}
			all = append(all, times...)
		})
	}
	wg.Wait()
	if len(all) == 0 {
		p.t.FailNow()
	}
	slices.Sort(all)
	return all
}
