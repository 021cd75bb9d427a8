package sm

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Keys as LINSTOR's REST gives them: the driver's own keys start with a slash (LVMgr:314-335, LJ:53-58).
const (
	volumeNamespace  = "xcp/volume/"
	journalNamespace = "xcp/sr/journal/"
)

// Existence is the state of a volume in SM's book-keeping: the value of not-exists (LVMgr:315, 328-331).
type Existence int

// The states of not-exists, and the one of a namespace that lacks it.
const (
	Exists           Existence = 0
	NotExists        Existence = 1  // Being deleted, or a rename before its commit point.
	Creating         Existence = 2  // Destroyed by the next repairing constructor.
	ExistenceUnknown Existence = -1 // No or unreadable not-exists: the driver ignores the namespace for ever.
)

// String names the state.
func (e Existence) String() string {
	switch e {
	case Exists:
		return "exists"
	case NotExists:
		return "not-exists"
	case Creating:
		return "creating"
	default:
		return "unknown"
	}
}

// ReadonlyLease is how long a readonly-timestamp protects a volume from a rename (LVMgr:317-323).
const ReadonlyLease = 60 * time.Second

// Volume is what SM's key-value store says about one VDI.
type Volume struct {
	UUID            string // The VDI uuid, or a name such as DELETED_<uuid>.
	Resource        string // volume-name; "" when absent.
	Existence       Existence
	Metadata        Metadata
	HasMetadata     bool      // The driver skips a volume without metadata when it introduces VDIs (LSR:1103-1140).
	ReadonlySince   time.Time // On the coordinator's clock; zero when absent.
	UpdatingUUIDSrc string    // Old uuid while a rename is in flight; "" when absent.
	ForeignKeys     []string  // Properties that are not the driver's, sorted. Lost on rename.
}

// Deleted says that SM has renamed the volume to get rid of it (LSR:1103).
func (v Volume) Deleted() bool { return strings.HasPrefix(v.UUID, "DELETED_") }

// Old says that the volume is what a leaf coalesce left behind (LSR:1095).
func (v Volume) Old() bool { return strings.HasPrefix(v.UUID, "OLD_") }

// Metadata is the JSON that the driver keeps per volume (LSR:1695-1706).
type Metadata struct {
	NameLabel       string `json:"name_label"`
	NameDescription string `json:"name_description"`
	IsASnapshot     bool   `json:"is_a_snapshot"`
	SnapshotOf      string `json:"snapshot_of"`
	SnapshotTime    string `json:"snapshot_time"`
	Type            string `json:"type"`     // XAPI VDI type, for example "user", "ha_statefile".
	VDIType         string `json:"vdi_type"` // "vhd" or "aio"; "" makes the driver skip the volume.
	ReadOnly        bool   `json:"read_only"`
	MetadataOfPool  string `json:"metadata_of_pool"`
	Hidden          *bool  `json:"hidden"` // RAW volumes only: VHDs keep it in their footer.
	CBTLog          string `json:"cbtlog"`
}

// Problem is a key that does not follow the driver's format. Nothing is guessed from it.
type Problem struct {
	Key  string
	Text string
}

// String is "key: what is wrong".
func (p Problem) String() string { return p.Key + ": " + p.Text }

// ParseVolumes reads the volumes out of a key-value instance. Keys are as in REST, with or without leading slash. The
// map has one entry per volume namespace, whatever its state; problems are sorted by key.
func ParseVolumes(kv map[string]string) (map[string]Volume, []Problem) {
	volumes := map[string]Volume{}
	var problems []Problem
	for _, key := range sortedKeys(kv) {
		rest, ok := strings.CutPrefix(strings.TrimPrefix(key, "/"), volumeNamespace)
		if !ok {
			continue
		}
		uuid, property, ok := strings.Cut(rest, "/")
		if !ok || uuid == "" || property == "" {
			problems = append(problems, Problem{Key: key, Text: "expected xcp/volume/<vdi uuid>/<property>"})
			continue
		}
		v, known := volumes[uuid]
		if !known {
			v = Volume{UUID: uuid, Existence: ExistenceUnknown}
		}
		if err := v.set(property, kv[key]); err != nil {
			problems = append(problems, Problem{Key: key, Text: err.Error()})
		}
		volumes[uuid] = v
	}
	return volumes, problems
}

func (v *Volume) set(property, value string) error {
	switch property {
	case "not-exists":
		switch value {
		case "0":
			v.Existence = Exists
		case "1":
			v.Existence = NotExists
		case "2":
			v.Existence = Creating
		default:
			return fmt.Errorf("expected 0, 1 or 2, got %q", value)
		}
	case "volume-name":
		v.Resource = value
	case "metadata":
		var m *Metadata
		if err := json.Unmarshal([]byte(value), &m); err != nil {
			return fmt.Errorf("read metadata: %w", err)
		}
		if m == nil {
			return errors.New("read metadata: expected a JSON object, got null")
		}
		v.Metadata, v.HasMetadata = *m, true
	case "readonly-timestamp":
		t, err := parseTimestamp(value)
		if err != nil {
			return err
		}
		v.ReadonlySince = t
	case "updating-uuid-src":
		v.UpdatingUUIDSrc = value
	default:
		v.ForeignKeys = append(v.ForeignKeys, property)
	}
	return nil
}

// parseTimestamp reads python's str(time.time()): decimal seconds with a fraction.
func parseTimestamp(value string) (time.Time, error) {
	seconds, err := strconv.ParseFloat(value, 64)
	if err != nil || !(seconds >= 0 && seconds < 1<<33) {
		return time.Time{}, fmt.Errorf("expected seconds since the epoch, got %q", value)
	}
	return time.UnixMicro(int64(seconds * 1e6)), nil
}

// Types of journals (LSR:2385-2398, CL:1768-2743).
const (
	JournalClone    = "clone"
	JournalInflate  = "inflate"
	JournalZero     = "zero"
	JournalCoalesce = "coalesce"
	JournalRelink   = "relink"
	JournalLeaf     = "leaf"
)

// Journal is an operation of SM that is under way, or was interrupted.
type Journal struct {
	Type  string // One of the Journal constants; open set.
	ID    string // The VDI uuid that it is about.
	Value string // By type: "<base>_<snap>", old size in bytes, byte offset, "1", parent uuid.
}

// Journals lists the journals in a key-value instance, sorted by type and id.
func Journals(kv map[string]string) ([]Journal, []Problem) {
	var journals []Journal
	var problems []Problem
	for _, key := range sortedKeys(kv) {
		rest, ok := strings.CutPrefix(strings.TrimPrefix(key, "/"), journalNamespace)
		if !ok {
			continue
		}
		kind, id, ok := strings.Cut(rest, "/")
		if !ok || kind == "" || id == "" || strings.Contains(id, "/") {
			problems = append(problems, Problem{Key: key, Text: "expected xcp/sr/journal/<type>/<id>"})
			continue
		}
		journals = append(journals, Journal{Type: kind, ID: id, Value: kv[key]})
	}
	slices.SortFunc(journals, func(a, b Journal) int { return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.ID, b.ID)) })
	return journals, problems
}

func sortedKeys(kv map[string]string) []string {
	keys := make([]string, 0, len(kv))
	for k := range kv {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
