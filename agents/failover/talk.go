package failover

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
)

// DefaultPort is where agents talk: UDP for beats, TCP for fetching backups. It lies in the range that XCP-ng's firewall opens for DRBD.
const DefaultPort = 7999

// BeatKey derives the key that seals beats from a secret that all hosts of the pool share.
func BeatKey(secret []byte) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write([]byte("xostor failover beats v1"))
	return m.Sum(nil)
}

// packet is a beat on the wire: its JSON text, after an HMAC-SHA256 of that text.
type packet struct {
	Epoch int64  `json:"epoch"` // one life of the sender
	Seq   uint64 `json:"seq"`
	Beat  Beat   `json:"beat"`
}

const maxPacket = 8 << 10 // bytes

func seal(key []byte, p packet) ([]byte, error) {
	text, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("seal beat: %w", err)
	}
	m := hmac.New(sha256.New, key)
	m.Write(text)
	return append(m.Sum(nil), text...), nil
}

// errForged says that a packet was not made by a host of this pool.
var errForged = errors.New("beat is not sealed with the pool's secret")

func unseal(key, data []byte) (packet, error) {
	if len(data) <= sha256.Size || len(data) > maxPacket {
		return packet{}, errForged
	}
	m := hmac.New(sha256.New, key)
	m.Write(data[sha256.Size:])
	if !hmac.Equal(m.Sum(nil), data[:sha256.Size]) {
		return packet{}, errForged
	}
	var p packet
	if err := json.Unmarshal(data[sha256.Size:], &p); err != nil {
		return packet{}, fmt.Errorf("read beat: %w", err)
	}
	return p, nil
}

// network carries beats between the agents of a pool.
type network struct {
	keys    *keyring
	port    int
	extra   map[string][]string // further addresses of hosts by name
	view    func() drbd.View    // where DRBD's own paths are read from
	changed func()
	save    func(map[string]string) error
	log     *slog.Logger
	epoch   int64

	mu    sync.Mutex
	table *Table
	last  map[string]packet // newest by sender: older ones are replays or reordered
	// anywhere are addresses at which agents may be, such as on the management network; who is at one is learned from the beats that come from it.
	anywhere []netip.Addr
	nameAt   map[netip.Addr]string
	seq      uint64
	// backups are the newest ones of this host, for the others to fetch.
	backups []Backup

	socks map[netip.AddrPort]*net.UDPConn // by destination; only the sender's goroutine uses it
}

// Hear implements Talk.
func (n *network) Hear(now time.Time) ([]Peer, *Move) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.table.Hear(now)
}

// Tell implements Talk.
func (n *network) Tell(b Beat) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b.Backups = n.backups
	n.table.Tell(b)
}

func (n *network) order(m Move) {
	n.mu.Lock()
	n.table.Order(time.Now(), m)
	n.mu.Unlock()
	n.changed()
}

// storageAddress is the address in one end of a DRBD path, such as "ipv4:10.0.0.1:7000".
func storageAddress(path string) (netip.Addr, bool) {
	_, rest, ok := strings.Cut(path, ":")
	if !ok {
		return netip.Addr{}, false
	}
	ap, err := netip.ParseAddrPort(rest)
	return ap.Addr().Unmap(), err == nil
}

// destinations are the addresses of all other hosts, with their names as far as they are known: DRBD's paths, and what was told.
func (n *network) destinations() (by map[netip.AddrPort]string, storage map[netip.Addr]bool) {
	by, storage = map[netip.AddrPort]string{}, map[netip.Addr]bool{}
	if r := n.view().Resource; r != nil {
		for _, c := range r.Connections {
			for _, p := range c.Paths {
				if a, ok := storageAddress(p.Peer); ok {
					by[netip.AddrPortFrom(a, uint16(n.port))] = c.Name
					storage[a] = true
				}
			}
		}
	}
	for name, list := range n.extra {
		for _, text := range list {
			if a, err := netip.ParseAddr(text); err == nil {
				by[netip.AddrPortFrom(a.Unmap(), uint16(n.port))] = name
			}
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.anywhere {
		if to := netip.AddrPortFrom(a, uint16(n.port)); by[to] == "" {
			by[to] = n.nameAt[a] // "" until it has been heard
		}
	}
	return by, storage
}

// run sends and receives until ctx ends. conn is the socket that beats come to.
func (n *network) run(ctx context.Context, conn *net.UDPConn) {
	var wg sync.WaitGroup
	wg.Go(func() { n.receive(conn) })
	tick := time.NewTicker(BeatInterval)
	defer tick.Stop()
	for ctx.Err() == nil {
		n.send()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	for _, s := range n.socks {
		_ = s.Close()
	}
	_ = conn.Close()
	wg.Wait()
}

func (n *network) send() {
	now := time.Now()
	by, _ := n.destinations()
	n.mu.Lock()
	news := n.table.Tick(now)
	n.seq++
	p := packet{Epoch: n.epoch, Seq: n.seq, Beat: n.table.Beat(now)}
	n.mu.Unlock()
	if news {
		n.changed()
	}
	var sealed [][]byte
	for _, key := range n.keys.all(now) {
		data, err := seal(key, p)
		if err != nil {
			n.log.Error("beat lost", agents.KeyErr, err)
			return
		}
		sealed = append(sealed, data)
	}
	for to, s := range n.socks {
		if _, still := by[to]; !still {
			_ = s.Close()
			delete(n.socks, to)
		}
	}
	for _, to := range slices.SortedFunc(maps.Keys(by), netip.AddrPort.Compare) {
		for _, data := range sealed {
			n.sendTo(now, to, by[to], data)
		}
	}
}

// sendTo sends over a connected socket: only such a one is told that nobody listens there, which proves that the other kernel lives.
func (n *network) sendTo(now time.Time, to netip.AddrPort, name string, data []byte) {
	s := n.socks[to]
	if s == nil {
		var err error
		if s, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)); err != nil {
			return // no route at the moment
		}
		n.socks[to] = s
	}
	_ = s.SetWriteDeadline(now.Add(BeatInterval / 2))
	if _, err := s.Write(data); name != "" && errors.Is(err, syscall.ECONNREFUSED) {
		n.mu.Lock()
		n.table.Answered(now, name)
		n.mu.Unlock()
	}
}

func (n *network) receive(conn *net.UDPConn) {
	buf := make([]byte, maxPacket)
	for {
		size, from, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		p, err := n.unseal(buf[:size])
		if err != nil {
			n.log.Debug("beat refused", agents.KeyErr, err)
			continue
		}
		n.take(p, from.Addr().Unmap())
	}
}

// unseal opens a beat with whichever key is good.
func (n *network) unseal(data []byte) (p packet, err error) {
	for _, key := range n.keys.all(time.Now()) {
		if p, err = unseal(key, data); err == nil {
			return p, nil
		}
	}
	return packet{}, err
}

// take accepts a beat that is newer than the last one of its sender.
func (n *network) take(p packet, from netip.Addr) {
	_, storage := n.destinations()
	now := time.Now()
	n.mu.Lock()
	last, seen := n.last[p.Beat.Node]
	if seen && (p.Epoch < last.Epoch || p.Epoch == last.Epoch && p.Seq < last.Seq) {
		n.mu.Unlock()
		return
	}
	n.last[p.Beat.Node] = packet{Epoch: p.Epoch, Seq: p.Seq}
	if slices.Contains(n.anywhere, from) {
		n.nameAt[from] = p.Beat.Node
	}
	before := n.table.Known()
	news := n.table.Receive(now, p.Beat, storage[from])
	known := n.table.Known()
	n.mu.Unlock()
	if !maps.Equal(before, known) {
		if err := n.save(known); err != nil {
			n.log.Warn("peers not saved", agents.KeyErr, err)
		}
	}
	if news {
		n.changed()
	}
}

// listenBeats opens the socket for beats and the listener for backups, on the same port.
func listenBeats(address string, port int) (*net.UDPConn, net.Listener, error) {
	at := net.JoinHostPort(address, strconv.Itoa(port))
	ua, err := net.ResolveUDPAddr("udp", at)
	if err != nil {
		return nil, nil, fmt.Errorf("listen for beats: %w", err)
	}
	conn, err := net.ListenUDP("udp", ua)
	if err != nil {
		return nil, nil, fmt.Errorf("listen for beats: %w", err)
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		_ = conn.Close()
		return nil, nil, fmt.Errorf("listen for backup requests: %w", err)
	}
	return conn, l, nil
}
