package statefile

import (
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
		hosts = min(int(g.Hosts), MaxHosts)
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
