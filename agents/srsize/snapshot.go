package srsize

import (
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
)

// Snapshot is all that Decide looks at. Slices are sorted by uuid or name. Sizes are bytes unless the name says KiB.
type Snapshot struct {
	Here          string // uuid of this host
	Coordinator   bool   // pool.conf and pool.master both name this host; when false the rest is empty
	SRs           []SR
	LINSTORError  string // why LINSTOR could not be read; "" when it could
	LINSTORFix    string // what the operator can do about it
	NoSMSession   bool   // XAPI refused the session key before: SR.update is the way
	SMSessionWhy  string
	GracePeriod   time.Duration // how long a view may be partial before it is a finding
	UpdateSpacing time.Duration // least time between two SR.update
}

// SR is one SR of type linstor: what XAPI shows, what LINSTOR has, and what this agent remembers.
type SR struct {
	UUID, Name  string
	Shown       Sizes // XAPI's present values
	VDIs        []VDI
	PBDHere     string   // uuid of this host's PBD, "" when there is none
	PluggedHere bool     // it is attached
	Groups      []string // distinct device-config group-name of its PBDs, as written there; "" stands for a PBD without one
	Guessed     bool     // some of these sizes are what we wrote, although XAPI's mirror does not show it yet
	Stored      Stored
	Past        Past
}

// Sizes are the three sizes of an SR in bytes.
type Sizes struct {
	Physical    int64 `json:"physical_size"`
	Utilisation int64 `json:"physical_utilisation"`
	Virtual     int64 `json:"virtual_allocation"`
}

// VDI is one disk as XAPI shows it.
type VDI struct {
	UUID, Ref   string
	Virtual     int64 // virtual_size
	Utilisation int64 // physical_utilisation
	Managed     bool  // false: hidden, the base of a snapshot chain
}

// Stored is what LINSTOR has for one SR.
type Stored struct {
	GroupFound bool
	Redundancy int // place count of the resource group; 0 when LINSTOR does not tell one
	Pools      []Pool
	Replicas   []sm.Replica      // all volumes with a disk in one of the SR's pools, whoever made them
	VolumeOf   map[string]string // VDI uuid -> resource name, existing volumes only
	Odd        []string          // KV entries that cannot be understood
}

// Pool is one storage pool of the SR on one node.
type Pool struct {
	Node              string
	NodeStatus        string // LINSTOR's connection status of the node
	Thin              bool
	TotalKiB, FreeKiB *int64 // nil: not told
	WasFilling        string // severity that was raised at the last look, for hysteresis
}

// Past is what the agent remembers of one SR.
type Past struct {
	Good         *Sizes    // last values computed from a full view
	PartialSince time.Time // zero: the last view was full
	LastWrite    time.Time
	LastUpdate   time.Time // last SR.update
	Overwritten  time.Time // when somebody else's wrong numbers were last seen
	Trend        []Sample  // sorted by time
}

// Sample is the SR's physical utilisation at one time.
type Sample struct {
	At   time.Time `json:"at"`
	Used int64     `json:"used"`
}
