package heartbeat

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// RunDir is where daemons have their control sockets.
const RunDir = "/run/xostor-heartbeat"

// ErrNoDaemon says that no daemon runs on this host.
var ErrNoDaemon = errors.New("no heartbeat daemon runs on this host")

const startIt = `HA starts it (xe pool-ha-enable heartbeat-sr-uuids=...), or by hand "xostor-heartbeat run"`

// Answer of a daemon to one line on its control socket.
type reply struct {
	Report *Report `json:"report,omitempty"`
	Image  []byte  `json:"image,omitempty"`
	Error  string  `json:"error,omitempty"`
}

// Ask sends line, "status" or "handover [HOST]", to the daemon of each export on this host. A daemon that does not answer
// is an error, after the reports of the others.
func Ask(runDir, line string) ([]Report, error) {
	sockets, err := controlSockets(runDir)
	if err != nil {
		return nil, err
	}
	var reports []Report
	var failed []error
	for _, path := range sockets {
		r, err := askOne(path, line)
		if err == nil && r.Report == nil {
			err = errors.New("an empty answer")
		}
		if err != nil {
			failed = append(failed, err)
			continue
		}
		reports = append(reports, *r.Report)
	}
	return reports, errors.Join(failed...)
}

func controlSockets(runDir string) ([]string, error) {
	entries, err := os.ReadDir(runDir)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("look for daemons: %w: call it as root", err)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("look for daemons: %w", err)
	}
	var out []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".sock") {
			out = append(out, filepath.Join(runDir, e.Name()))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w (no socket in %s): %s", ErrNoDaemon, runDir, startIt)
	}
	return out, nil
}

func askOne(path, line string) (reply, error) {
	name := strings.TrimSuffix(filepath.Base(path), ".sock")
	conn, err := net.DialTimeout("unix", path, time.Second)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return reply{}, fmt.Errorf("the heartbeat daemon of %s has died and left its socket: %s", name, startIt)
	}
	if err != nil {
		return reply{}, fmt.Errorf("ask daemon of %s: %w", name, err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second)) // A socket of ours takes any deadline.
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return reply{}, fmt.Errorf("ask daemon of %s: %w", name, err)
	}
	var r reply
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = errors.New("no answer in 30 s: the daemon hangs, look at its log")
		}
		return reply{}, fmt.Errorf("ask daemon of %s: %w", name, err)
	}
	if r.Error != "" {
		return reply{}, fmt.Errorf("ask daemon of %s: %s", name, r.Error)
	}
	return r, nil
}

// Control answers one line of a control connection.
func (d *Daemon) Control(line string, w io.Writer) error {
	verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
	var r reply
	switch verb {
	case "handover":
		if err := d.mayTake(arg); err != nil {
			r.Error = err.Error()
			break
		}
		d.HandOver(arg)
		fallthrough
	case "status":
		report := d.Report()
		r.Report = &report
	case "dump":
		r.Image = make([]byte, imageLen)
		if err := d.front.readImage(r.Image); err != nil {
			r = reply{Error: fmt.Sprintf("read statefile through the owner: %v; status tells more", err)}
		}
	default:
		r.Error = fmt.Sprintf("unknown request %q", verb)
	}
	return json.NewEncoder(w).Encode(r)
}

// mayTake refuses a successor that this host knows nothing of: the others would wait for nobody. "": anyone.
func (d *Daemon) mayTake(host string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if host == "" || d.owner == nil {
		return nil // Nothing will change.
	}
	if host == d.c.Host {
		return fmt.Errorf("%s is this host; name another one, or none", host)
	}
	known := map[string]bool{}
	for _, p := range d.c.Peers {
		known[p.Host] = true
	}
	for _, name := range d.learned {
		known[name] = true
	}
	for _, name := range d.owner.clients() {
		known[name] = true
	}
	if known[host] {
		return nil
	}
	delete(known, d.c.Host)
	return fmt.Errorf("no host %s is known; there are %s", host, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
}

// imageLen is the statefile and the owner's record behind it.
const imageLen = recordOffset + recordLen

// readImage reads the statefile as a local client would, piece by piece so that heartbeats get in between.
func (w *forwarder) readImage(image []byte) error {
	s := w.session(nil)
	for off := 0; off < len(image); off += statefile.SlotSize {
		if err := s.Read(image[off:min(off+statefile.SlotSize, len(image))], int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// Image reads the statefile and the record behind it: from a file or device, or with source "" through this host's daemon.
func Image(runDir, source string) ([]byte, error) {
	if source != "" {
		return readFile(source)
	}
	sockets, err := controlSockets(runDir)
	if err != nil {
		return nil, err
	}
	err = errors.New("no daemon of a statefile runs on this host, name a file or device")
	for _, path := range sockets {
		if strings.Contains(filepath.Base(path), "redo") || strings.HasSuffix(path, ".owner.sock") && len(sockets) > 1 {
			continue
		}
		var r reply
		if r, err = askOne(path, "dump"); err == nil {
			return r.Image, nil
		}
	}
	return nil, err
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, syscall.EMEDIUMTYPE) {
		return nil, fmt.Errorf("open statefile: %w: this host's DRBD is Secondary; leave the name out to read through the daemon", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open statefile: %w", err)
	}
	defer f.Close()
	image := make([]byte, imageLen)
	n, err := io.ReadFull(f, image)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read statefile: %w", err)
	}
	return image[:n], nil
}

// Explain writes what an image says, the record included, for people.
func Explain(w io.Writer, image []byte) error {
	if err := statefile.Explain(w, image); err != nil {
		return err
	}
	if r, ok := ParseRecord(image[min(len(image), recordOffset):]); ok {
		state := "in use"
		if r.Clean {
			state = "closed in order"
		}
		fmt.Fprintf(w, "owner's record: host %s, epoch %d, %d probes, %s\n", r.Owner, r.Epoch, r.Counter, state)
	}
	return nil
}

// ExplainJSON writes the same as JSON.
func ExplainJSON(w io.Writer, image []byte) error {
	x, err := statefile.Decode(image)
	if err != nil {
		return err
	}
	out := struct {
		statefile.Decoded
		Record *Record `json:"record,omitempty"`
	}{Decoded: x}
	if r, ok := ParseRecord(image[min(len(image), recordOffset):]); ok {
		out.Record = &r
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(out)
}
