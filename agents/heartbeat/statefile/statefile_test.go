package statefile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const idA ID = "0123456789abcdef0123456789abcdef"

// The offsets were printed by a program compiled against xha's header.
func TestLayoutIsXhads(t *testing.T) {
	p := make([]byte, SlotSize)
	Global{Generation: idA, State: StateActive, Master: Nobody, Hosts: 3}.Encode(p)
	if string(p[:4]) != "pool" || string(p[28:60]) != string(idA) || p[60] != 2 || string(p[64:96]) != string(Nobody) || p[96] != 3 || string(p[100:104]) != "endp" {
		t.Errorf("global section: % x", p[:104])
	}
	if inv := binary.LittleEndian.Uint32(p[4:]); inv != 0xf2721211 {
		t.Errorf("inverse signature %#x", inv)
	}
	var want uint32
	for off := 12; off < 100; off += 4 {
		want += binary.LittleEndian.Uint32(p[off:])
	}
	if got := binary.LittleEndian.Uint32(p[8:]); got != want {
		t.Errorf("checksum %#x, want %#x", got, want)
	}
	h := Host{Sequence: 7, Index: 2, ID: idA, Excluded: true, Request: true, Grant: Of(0, 63), Phase: 3, Weight: 9, SFDomain: Of(1)}
	h.SinceSF[63] = -1
	h.Encode(p)
	if string(p[:4]) != "host" || p[12] != 7 || p[16] != 2 || p[52] != 1 || p[568] != 0xff || p[600] != 2 || p[608] != 1 || p[612] != 1 || p[619] != 0x80 ||
		p[620] != 3 || p[624] != 9 || string(p[628:632]) != "endh" {
		t.Errorf("host slot: % x", p[:632])
	}
	if Size != 266240 || Offset(63)+SlotSize != Size {
		t.Errorf("size %d", Size)
	}
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		id := rapid.StringMatching("[0-9a-f]{32}")
		g := Global{ID(id.Draw(r, "gen")), PoolState(rapid.Uint32().Draw(r, "state")), ID(id.Draw(r, "master")), rapid.Uint32().Draw(r, "hosts")}
		p := make([]byte, HostIO)
		g.Encode(p)
		if got, err := DecodeGlobal(p); err != nil || got != g {
			r.Fatalf("%+v, %v", got, err)
		}
		h := &Host{Sequence: rapid.Uint32().Draw(r, "seq"), Index: rapid.Uint32().Draw(r, "i"), ID: ID(id.Draw(r, "id")), Excluded: rapid.Bool().Draw(r, "x"),
			Starting: rapid.Bool().Draw(r, "s"), Request: rapid.Bool().Draw(r, "r"), Grant: Set(rapid.Uint64().Draw(r, "g")), Current: Set(rapid.Uint64().Draw(r, "c")),
			Proposed: 5, HBDomain: 6, SFDomain: Set(rapid.Uint64().Draw(r, "sf")), SinceXapi: 8, Phase: 9, Weight: 10}
		for i := range MaxHosts {
			h.SinceHB[i], h.SinceSF[i] = int32(i)-1, -int32(i)
		}
		h.Encode(p)
		got, err := DecodeHost(p)
		if err != nil {
			r.Fatal(err)
		}
		if d := cmp.Diff(h, got); d != "" {
			r.Fatal(d)
		}
		p[rapid.IntRange(12, 627).Draw(r, "where")] ^= byte(rapid.IntRange(1, 255).Draw(r, "flip"))
		if _, err := DecodeHost(p); !errors.Is(err, ErrChecksum) {
			r.Fatalf("a flipped byte: %v", err)
		}
	})
}

func TestDecodeErrors(t *testing.T) {
	p := make([]byte, GlobalIO)
	if _, err := DecodeGlobal(p); !errors.Is(err, ErrEmpty) {
		t.Errorf("zeroes: %v", err)
	}
	if _, err := DecodeGlobal(p[:50]); !errors.Is(err, ErrShort) {
		t.Errorf("short: %v", err)
	}
	Global{Generation: idA, Master: Nobody}.Encode(p)
	q := bytes.Clone(p)
	q[0]++
	if _, err := DecodeGlobal(q); !errors.Is(err, ErrSignature) {
		t.Errorf("signature: %v", err)
	}
	q = bytes.Clone(p)
	q[12]++
	q[8]++
	if _, err := DecodeGlobal(q); !errors.Is(err, ErrVersion) {
		t.Errorf("version: %v", err)
	}
}

func TestExplain(t *testing.T) {
	image := make([]byte, Size)
	var out strings.Builder
	if err := Explain(&out, image[:100]); !errors.Is(err, ErrShort) {
		t.Errorf("short image: %v", err)
	}
	if err := Explain(&out, image); err != nil || !strings.Contains(out.String(), "never initialised") {
		t.Errorf("empty image: %v\n%s", err, &out)
	}
	Global{Generation: idA, State: StateActive, Master: idA, Hosts: 3}.Encode(image)
	h := Host{ID: idA, Index: 0, Sequence: 12, Phase: 1, Weight: 1, Request: true, SFDomain: Of(0), HBDomain: Of(0, 1)}
	h.SinceSF[2] = -1
	h.Encode(image[Offset(0):])
	h.Index, h.Excluded = 1, true
	h.Encode(image[Offset(1):])
	image[Offset(1)+13] ^= 1
	out.Reset()
	if err := Explain(&out, image); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"pool: active", "3 hosts", "host 0: " + string(idA) + ", sequence 12, started", "asks for the master lock", "timed out",
		"hears {0 1} on the network, sees {0} on the statefile", "host 1: unreadable: wrong checksum", "host 2: never wrote"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("dump lacks %q:\n%s", want, &out)
		}
	}
}

func FuzzExplain(f *testing.F) {
	p := make([]byte, HostIO)
	Global{Generation: idA, State: 9, Master: Nobody, Hosts: 1 << 31}.Encode(p)
	f.Add(p, 0)
	(&Host{ID: idA, Phase: 77}).Encode(p)
	f.Add(p, 4096)
	f.Fuzz(func(t *testing.T, part []byte, at int) {
		image := make([]byte, Size)
		if at < 0 || at > Size {
			return
		}
		copy(image[at:], part)
		if err := Explain(&strings.Builder{}, image); err != nil {
			t.Error(err)
		}
	})
}

const sec = time.Second

// The table of XAPI's formulas for T = 60, 20 and 10 s.
func TestDerivedTimes(t *testing.T) {
	for _, c := range []struct {
		t                                time.Duration
		t1, t2, ws, tolerated, unnoticed time.Duration
	}{
		{60 * sec, 3 * sec, 3 * sec, 75 * sec, 52 * sec, 22 * sec},
		{20 * sec, 3 * sec, 2 * sec, 35 * sec, 14 * sec, 4 * sec},
		{10 * sec, 2 * sec, 2 * sec, 25 * sec, 4 * sec, -1 * sec},
	} {
		got := Derive(c.t)
		if got.HeartbeatInterval != c.t1 || got.StateFileInterval != c.t2 || got.StateFileWatchdog != c.ws || got.Tolerated() != c.tolerated || got.Unnoticed() != c.unnoticed {
			t.Errorf("T=%v: %+v, tolerated %v, unnoticed %v", c.t, got, got.Tolerated(), got.Unnoticed())
		}
	}
}

const confText = `<?xml version="1.0" encoding="utf-8"?>
<xhad-config version="1.0"><common-config><GenerationUUID>5f1a7d3e-0000-0000-0000-000000000000</GenerationUUID><UDPport>694</UDPport>
<host><HostID>bbbbbbbb-0000-0000-0000-000000000000</HostID><IPaddress>10.0.0.2</IPaddress></host>
<host><HostID>AAAAAAAA-0000-0000-0000-000000000000</HostID><IPaddress>fd00::1</IPaddress></host>
<parameters><HeartbeatInterval>3</HeartbeatInterval><HeartbeatTimeout>60</HeartbeatTimeout><StateFileInterval>3</StateFileInterval><StateFileTimeout>60</StateFileTimeout>
<StateFileWatchdogTimeout>75</StateFileWatchdogTimeout></parameters></common-config>
<local-config><localhost><HostID>bbbbbbbb-0000-0000-0000-000000000000</HostID><HeartbeatInterface>xenbr0</HeartbeatInterface><StateFile>/dev/xapi/x</StateFile></localhost></local-config></xhad-config>`

func TestReadConf(t *testing.T) {
	c, err := ReadConf(strings.NewReader(confText))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Hosts) != 2 || c.Hosts[0].Address != "fd00::1" || c.Index(c.Self) != 1 || c.StateFile != "/dev/xapi/x" || c.Timeouts.Tolerated() != 52*sec ||
		c.Timeouts.HeartbeatWatchdog != 30*sec {
		t.Errorf("%+v", c)
	}
	for _, bad := range []string{"", "<xhad-config", "<x/>", strings.ReplaceAll(confText, "bbbbbbbb", "zz"), strings.ReplaceAll(confText, "host>", "h>")} {
		if _, err := ReadConf(strings.NewReader(bad)); err == nil {
			t.Errorf("accepted %.40q", bad)
		}
	}
}

func FuzzReadConf(f *testing.F) {
	f.Add(confText)
	f.Add("<xhad-config/>")
	f.Fuzz(func(t *testing.T, s string) {
		if c, err := ReadConf(strings.NewReader(s)); err == nil && (len(c.Hosts) == 0 || len(c.Hosts) > MaxHosts || c.Timeouts.StateFileTimeout <= 0) {
			t.Errorf("%+v", c)
		}
	})
}
