package statefile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

var phases = [...]string{"starting", "started", "aborted"}

func phase(p uint32) string {
	if int(p) < len(phases) {
		return phases[p]
	}
	return fmt.Sprintf("fault handler (%d)", p)
}

func age(ms int32) string {
	if ms < 0 {
		return "timed out"
	}
	return fmt.Sprintf("%.1fs", float64(ms)/1000)
}

// MarshalJSON lists the members.
func (s Set) MarshalJSON() ([]byte, error) {
	members := []int{}
	for i := range MaxHosts {
		if s.Has(i) {
			members = append(members, i)
		}
	}
	return json.Marshal(members)
}

// Decoded is an image as data. A section that cannot be read has an error instead.
type Decoded struct {
	Pool  *DecodedPool  `json:"pool,omitempty"`
	Error string        `json:"error,omitempty"` // Of the global section.
	Hosts []DecodedHost `json:"hosts"`           // Those that ever wrote.
}

// DecodedPool is the global section.
type DecodedPool struct {
	Generation ID     `json:"generation"`
	State      string `json:"state"`
	Master     ID     `json:"master"`
	Hosts      uint32 `json:"hosts"`
}

// DecodedHost is a slot. Milliseconds of -1 mean timed out.
type DecodedHost struct {
	Slot     int     `json:"slot"`
	Error    string  `json:"error,omitempty"`
	ID       ID      `json:"id,omitempty"`
	Sequence uint32  `json:"sequence"`
	Phase    string  `json:"phase,omitempty"`
	Excluded bool    `json:"excluded"`
	Starting bool    `json:"starting"`
	Weight   uint32  `json:"weight"`
	Request  bool    `json:"asks_for_master_lock"`
	Grant    Set     `json:"grants_master_lock"`
	Current  Set     `json:"liveset"`
	Proposed Set     `json:"proposed_liveset"`
	HBDomain Set     `json:"hears"`
	SFDomain Set     `json:"sees"`
	SinceHB  []int32 `json:"since_heard_ms,omitempty"`
	SinceSF  []int32 `json:"since_seen_ms,omitempty"`
}

// Decode takes an image of at least Size bytes apart. The error is only ErrShort.
func Decode(image []byte) (Decoded, error) {
	if len(image) < Size {
		return Decoded{}, fmt.Errorf("%w: %d", ErrShort, len(image))
	}
	out := Decoded{Hosts: []DecodedHost{}}
	hosts := MaxHosts
	if g, err := DecodeGlobal(image); err != nil {
		out.Error = err.Error()
	} else {
		out.Pool = &DecodedPool{g.Generation, g.State.String(), g.Master, g.Hosts}
		hosts = int(min(g.Hosts, MaxHosts))
	}
	for i := range MaxHosts {
		h, err := DecodeHost(image[Offset(i):][:HostIO])
		switch {
		case errors.Is(err, ErrEmpty):
		case err != nil:
			out.Hosts = append(out.Hosts, DecodedHost{Slot: i, Error: err.Error()})
		default:
			out.Hosts = append(out.Hosts, DecodedHost{Slot: i, ID: h.ID, Sequence: h.Sequence, Phase: phase(h.Phase), Excluded: h.Excluded, Starting: h.Starting,
				Weight: h.Weight, Request: h.Request, Grant: h.Grant, Current: h.Current, Proposed: h.Proposed, HBDomain: h.HBDomain, SFDomain: h.SFDomain,
				SinceHB: h.SinceHB[:hosts], SinceSF: h.SinceSF[:hosts]})
		}
	}
	return out, nil
}

// Explain writes what an image of at least Size bytes says, for people. A broken section is named and does not end the
// explanation; the error is only ErrShort or w's.
func Explain(w io.Writer, image []byte) error {
	if len(image) < Size {
		return fmt.Errorf("%w: %d", ErrShort, len(image))
	}
	hosts := MaxHosts
	g, err := DecodeGlobal(image)
	switch {
	case errors.Is(err, ErrEmpty):
		fmt.Fprintln(w, "pool: never initialised (all zeroes); HA has not been enabled on this device")
	case err != nil:
		fmt.Fprintf(w, "pool: unreadable: %v\n", err)
	default:
		master := string(g.Master)
		if g.Master == Nobody {
			master = "nobody"
		}
		fmt.Fprintf(w, "pool: %s, generation %s, master %s, %d hosts configured\n", g.State, g.Generation, master, g.Hosts)
		hosts = int(min(g.Hosts, MaxHosts))
	}
	for i := range MaxHosts {
		h, err := DecodeHost(image[Offset(i):][:HostIO])
		switch {
		case errors.Is(err, ErrEmpty):
			if i < hosts && g.Hosts > 0 {
				fmt.Fprintf(w, "host %d: never wrote\n", i)
			}
		case err != nil:
			fmt.Fprintf(w, "host %d: unreadable: %v\n", i, err)
		default:
			explainHost(w, i, h, hosts)
		}
	}
	return nil
}

func explainHost(w io.Writer, i int, h *Host, hosts int) {
	var notes []string
	if h.Excluded {
		notes = append(notes, "excluded (may be missing without harm)")
	}
	if h.Starting {
		notes = append(notes, "starting")
	}
	if h.Request {
		notes = append(notes, "asks for the master lock")
	}
	if h.Grant != 0 {
		notes = append(notes, "grants the master lock to "+h.Grant.String())
	}
	if int(h.Index) != i {
		notes = append(notes, fmt.Sprintf("says that it is host %d", h.Index))
	}
	if h.SFDomain == 0 && h.Phase != 0 {
		notes = append(notes, "sees nobody on the statefile")
	}
	fmt.Fprintf(w, "host %d: %s, sequence %d, %s, weight %d\n", i, h.ID, h.Sequence, phase(h.Phase), h.Weight)
	fmt.Fprintf(w, "  liveset %v, proposed %v; hears %v on the network, sees %v on the statefile\n", h.Current, h.Proposed, h.HBDomain, h.SFDomain)
	var last []string
	for j := range hosts {
		last = append(last, fmt.Sprintf("%d: %s/%s", j, age(h.SinceHB[j]), age(h.SinceSF[j])))
	}
	fmt.Fprintf(w, "  since last heard/seen when it wrote: %s\n", strings.Join(last, ", "))
	if len(notes) > 0 {
		fmt.Fprintf(w, "  %s\n", strings.Join(notes, "; "))
	}
}
