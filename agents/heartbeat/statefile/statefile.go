// Package statefile reads, writes and explains the statefile of XCP-ng's HA daemon (xhad), derives its times, and models
// a host that uses it. Layout and rules are those of xha 25.2 (include/statefile.h, lib/statefileio.c).
package statefile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Sizes in bytes.
const (
	Size     = SlotSize * (1 + MaxHosts) // 266,240: what xhad uses of the device.
	SlotSize = 4096
	GlobalIO = 512  // What xhad reads and writes of the global section.
	HostIO   = 1024 // What xhad reads and writes of a slot.
	MaxHosts = 64

	globalUsed = 104
	hostUsed   = 632
	version    = 2
)

const (
	sigGlobal    = 0x6c6f6f70 // "pool".
	sigGlobalInv = 0xf2721211
	endGlobal    = 0x70646e65 // "endp".
	sigHost      = 0x74736f68 // "host".
	sigHostInv   = 0xf1719212
	endHost      = 0x68646e65 // "endh".
)

// What can be wrong with a section.
var (
	ErrShort     = errors.New("statefile is shorter than 266240 bytes")
	ErrEmpty     = errors.New("section was never written")
	ErrSignature = errors.New("wrong signature")
	ErrChecksum  = errors.New("wrong checksum")
	ErrVersion   = errors.New("unknown version or layout")
)

// ID is a uuid as xhad stores it: 32 lower-case hex characters, no dashes. 32 times "0" is nobody.
type ID string

// Nobody is the master of a pool without one.
const Nobody ID = "00000000000000000000000000000000"

// ParseID takes a uuid with or without dashes.
func ParseID(s string) (ID, error) {
	s = strings.ToLower(strings.ReplaceAll(s, "-", ""))
	if len(s) != 32 || strings.Trim(s, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is no uuid", s)
	}
	return ID(s), nil
}

// PoolState is the pool_state of the global section.
type PoolState uint32

// The states of a pool's HA.
const (
	StateNone    PoolState = 0
	StateInit    PoolState = 1
	StateActive  PoolState = 2
	StateInvalid PoolState = 3
)

// String names the state.
func (s PoolState) String() string {
	if int(s) < 4 {
		return [...]string{"none", "init", "active", "invalid"}[s]
	}
	return fmt.Sprintf("state-%d", uint32(s))
}

// Global is the global section.
type Global struct {
	Generation ID // New at each enabling of HA.
	State      PoolState
	Master     ID
	Hosts      uint32 // Configured hosts.
}

// Host is one host's slot.
type Host struct {
	Sequence  uint32 // Different at each write.
	Index     uint32 // Hosts sorted by uuid, from 0.
	ID        ID
	Excluded  bool
	Starting  bool
	SinceHB   [MaxHosts]int32 // ms since this host heard host i on the network; -1 timed out.
	SinceSF   [MaxHosts]int32 // ms since this host saw host i's slot change; -1 timed out.
	SinceXapi uint32          // ms since the first attempt to restart Xapi.
	Current   Set             // Liveset.
	Proposed  Set
	HBDomain  Set
	SFDomain  Set
	Request   bool // Wants the master lock.
	Grant     Set  // Grants it to.
	Phase     uint32
	Weight    uint32
}

// Set is a set of host indices.
type Set uint64

// Of makes a set.
func Of(members ...int) Set {
	var s Set
	for _, i := range members {
		s |= 1 << i
	}
	return s
}

// Has says whether i is a member.
func (s Set) Has(i int) bool { return s&(1<<i) != 0 }

// Len counts the members.
func (s Set) Len() int {
	n := 0
	for ; s != 0; s &= s - 1 {
		n++
	}
	return n
}

// String lists the members.
func (s Set) String() string {
	var b strings.Builder
	b.WriteByte('{')
	for i := range MaxHosts {
		if s.Has(i) {
			if b.Len() > 1 {
				b.WriteByte(' ')
			}
			fmt.Fprint(&b, i)
		}
	}
	return b.String() + "}"
}

// Offset is where host i's slot starts, in bytes.
func Offset(i int) int64 { return SlotSize * int64(i+1) }

var le = binary.LittleEndian

// sum adds the words of b from word from up to, not including, the last of used bytes.
func sum(b []byte, from, used int) uint32 {
	var s uint32
	for off := from; off < used-4; off += 4 {
		s += le.Uint32(b[off:])
	}
	return s
}

// Encode stores the section in p, at least GlobalIO bytes; the rest of them is zeroed.
func (g Global) Encode(p []byte) {
	clear(p[:GlobalIO])
	for off, v := range map[int]uint32{0: sigGlobal, 4: sigGlobalInv, 12: version, 16: SlotSize, 20: SlotSize, 24: MaxHosts,
		60: uint32(g.State), 96: g.Hosts, 100: endGlobal} {
		le.PutUint32(p[off:], v)
	}
	copy(p[28:60], g.Generation)
	copy(p[64:96], g.Master)
	le.PutUint32(p[8:], sum(p, 12, globalUsed))
}

// check judges a section's frame.
func check(p []byte, used, from int, sig, inv uint32) error {
	if len(p) < used {
		return ErrShort
	}
	if strings.Trim(string(p[:used]), "\x00") == "" {
		return ErrEmpty
	}
	if le.Uint32(p) != sig || le.Uint32(p[4:]) != inv {
		return ErrSignature
	}
	if le.Uint32(p[8:]) != sum(p, from, used) {
		return ErrChecksum
	}
	return nil
}

// DecodeGlobal reads the section from p. Errors are ErrShort, ErrEmpty, ErrSignature, ErrChecksum and ErrVersion. As in
// xhad the end marker is not looked at.
func DecodeGlobal(p []byte) (Global, error) {
	if err := check(p, globalUsed, 12, sigGlobal, sigGlobalInv); err != nil {
		return Global{}, err
	}
	if le.Uint32(p[12:]) != version || le.Uint32(p[16:]) != SlotSize || le.Uint32(p[20:]) != SlotSize || le.Uint32(p[24:]) != MaxHosts {
		return Global{}, ErrVersion
	}
	return Global{Generation: ID(p[28:60]), State: PoolState(le.Uint32(p[60:])), Master: ID(p[64:96]), Hosts: le.Uint32(p[96:])}, nil
}

func flag(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// Encode stores the slot in p, at least HostIO bytes; the rest of them is zeroed.
func (h *Host) Encode(p []byte) {
	clear(p[:HostIO])
	le.PutUint32(p, sigHost)
	le.PutUint32(p[4:], sigHostInv)
	le.PutUint32(p[12:], h.Sequence)
	le.PutUint32(p[16:], h.Index)
	copy(p[20:52], h.ID)
	le.PutUint32(p[52:], flag(h.Excluded))
	le.PutUint32(p[56:], flag(h.Starting))
	for i := range MaxHosts {
		le.PutUint32(p[60+4*i:], uint32(h.SinceHB[i]))
		le.PutUint32(p[316+4*i:], uint32(h.SinceSF[i]))
	}
	le.PutUint32(p[572:], h.SinceXapi)
	for i, s := range []Set{h.Current, h.Proposed, h.HBDomain, h.SFDomain} {
		le.PutUint64(p[576+8*i:], uint64(s))
	}
	le.PutUint32(p[608:], flag(h.Request))
	le.PutUint64(p[612:], uint64(h.Grant))
	le.PutUint32(p[620:], h.Phase)
	le.PutUint32(p[624:], h.Weight)
	le.PutUint32(p[628:], endHost)
	le.PutUint32(p[8:], sum(p, 12, hostUsed))
}

// DecodeHost reads a slot from p. Errors are those of DecodeGlobal but ErrVersion.
func DecodeHost(p []byte) (*Host, error) {
	if err := check(p, hostUsed, 12, sigHost, sigHostInv); err != nil {
		return nil, err
	}
	h := &Host{Sequence: le.Uint32(p[12:]), Index: le.Uint32(p[16:]), ID: ID(p[20:52]), Excluded: le.Uint32(p[52:]) != 0,
		Starting: le.Uint32(p[56:]) != 0, SinceXapi: le.Uint32(p[572:]), Request: le.Uint32(p[608:]) != 0, Grant: Set(le.Uint64(p[612:])),
		Phase: le.Uint32(p[620:]), Weight: le.Uint32(p[624:])}
	for i := range MaxHosts {
		h.SinceHB[i] = int32(le.Uint32(p[60+4*i:]))
		h.SinceSF[i] = int32(le.Uint32(p[316+4*i:]))
	}
	for i, s := range []*Set{&h.Current, &h.Proposed, &h.HBDomain, &h.SFDomain} {
		*s = Set(le.Uint64(p[576+8*i:]))
	}
	return h, nil
}
