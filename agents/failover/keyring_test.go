package failover

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
)

// A new secret reaches the hosts one after the other. Whoever knows the old one or the new one hears everybody for ten minutes; afterwards the old one is worth nothing.
func TestKeyring_HostsHearEachOtherWhileTheSecretChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := BeatKey([]byte("first")), BeatKey([]byte("second"))
		early, late := newKeyring(first), newKeyring(first)
		if early.use(time.Now(), bytes.Clone(first)) {
			t.Error("the same key counts as another one")
		}
		if !early.use(time.Now(), second) {
			t.Error("another key was not noticed")
		}
		hears := func(to, from *keyring) bool {
			for _, key := range from.all(time.Now()) {
				data, err := seal(key, packet{Beat: Beat{Node: "h1"}})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := (&network{keys: to}).unseal(data); err == nil {
					return true
				}
			}
			return false
		}
		if !hears(late, early) || !hears(early, late) {
			t.Error("hosts with the old and the new secret do not hear each other")
		}
		time.Sleep(keyKept + time.Second)
		if hears(late, early) || hears(early, late) {
			t.Error("the old secret still counts after its time")
		}
		late.use(time.Now(), second)
		if !hears(late, early) || !hears(early, late) {
			t.Error("hosts with the new secret do not hear each other")
		}
	})
}

// An address without a name is sent to; who is there is learned from a beat that comes from it, and from nothing else.
func TestNetwork_LearnsWhoIsAtAnAddress(t *testing.T) {
	n := &network{keys: newKeyring(BeatKey([]byte("k"))), port: 7999, view: func() drbd.View { return drbd.View{} }, changed: func() {}, save: func(map[string]string) error { return nil },
		table: NewTable("h1", time.Second, nil), last: map[string]packet{}, nameAt: map[netip.Addr]string{}, socks: map[netip.AddrPort]*net.UDPConn{}}
	s := &Service{net: n}
	management := netip.MustParseAddr("192.0.2.2")
	s.SetAddresses([]netip.Addr{netip.MustParseAddr("::ffff:192.0.2.2")})
	to := netip.AddrPortFrom(management, 7999)
	if by, storage := n.destinations(); len(by) != 1 || by[to] != "" || len(storage) != 0 {
		t.Errorf("before anything was heard: %v, storage %v", by, storage)
	}
	if got := n.addressOf("h2"); got != "" {
		t.Errorf("h2 is taken to be at %s", got)
	}
	n.take(packet{Epoch: 1, Seq: 1, Beat: Beat{Node: "h3"}}, netip.MustParseAddr("192.0.2.3")) // an address that nobody told
	n.take(packet{Epoch: 1, Seq: 1, Beat: Beat{Node: "h2"}}, management)
	if by, _ := n.destinations(); len(by) != 1 || by[to] != "h2" {
		t.Errorf("after a beat: %v", by)
	}
	if got := n.addressOf("h2"); got != to.String() {
		t.Errorf("h2 is at %q, want %s", got, to)
	}
}
