package linstor

import (
	"slices"
	"strconv"
	"strings"
)

// Version is what GET /v1/controller/version tells.
type Version struct {
	Version string `json:"version"`          // For example "1.33.1".
	REST    string `json:"rest_api_version"` // For example "1.27.0".
	GitHash string `json:"git_hash"`
}

// Connection states of a node that the agents name. Only StatusOnline is usable.
const (
	StatusOnline          = "ONLINE"
	StatusOffline         = "OFFLINE"
	StatusOtherController = "OTHER_CONTROLLER" // Symptom of two live controllers.
)

// Node is a LINSTOR node.
type Node struct {
	Name             string            `json:"name"`
	Type             string            `json:"type"` // Upper case on the wire, whatever the OpenAPI document says.
	Flags            []string          `json:"flags"`
	Props            map[string]string `json:"props"`
	NetInterfaces    []NetInterface    `json:"net_interfaces"`
	ConnectionStatus string            `json:"connection_status"` // Open set; "" when the controller did not say.
	UUID             string            `json:"uuid"`
	EvictionMs       *int64            `json:"eviction_timestamp"` // Milliseconds since the epoch.
}

// Online says whether the satellite is fully connected.
func (n *Node) Online() bool { return n.ConnectionStatus == StatusOnline }

// HasFlag says whether the node carries the flag. Flags are super-sets: EVICTED also shows DELETE.
func (n *Node) HasFlag(flag string) bool { return slices.Contains(n.Flags, flag) }

// NetInterface is an address of a node.
type NetInterface struct {
	Name                    string `json:"name"`
	Address                 string `json:"address"`
	SatellitePort           *int32 `json:"satellite_port"`
	SatelliteEncryptionType string `json:"satellite_encryption_type"`
	Active                  *bool  `json:"is_active"` // The interface that the controller talks to the satellite on.
	UUID                    string `json:"uuid"`
}

// ProviderDiskless is the provider of pools without storage.
const ProviderDiskless = "DISKLESS"

// PoolQuery selects storage pools. Empty lists mean all.
type PoolQuery struct {
	// Cached takes the values that the controller refreshes every 180 s (cheap). Otherwise every online satellite
	// is asked, under LINSTOR's pool write lock.
	Cached       bool
	Nodes, Pools []string
}

// StoragePool is one pool on one node.
type StoragePool struct {
	Name     string
	Node     string
	Provider string
	// FreeKiB and TotalKiB are nil when the controller does not know them (node not online), and for diskless pools,
	// for which LINSTOR reports 2^63-1.
	FreeKiB, TotalKiB *int64
	Diskless          bool
	Props             map[string]string
	UUID              string
	SupportsSnapshots bool
	FreeSpaceManager  string
	Reports           []Entry // Why a capacity is missing, for example warning 1002.
}

// Replica flags that the agents name. Flags are super-sets: a TIE_BREAKER also shows DRBD_DISKLESS and DISKLESS.
const (
	FlagDelete              = "DELETE"
	FlagDiskless            = "DISKLESS"
	FlagDRBDDiskless        = "DRBD_DISKLESS"
	FlagTieBreaker          = "TIE_BREAKER"
	FlagDiskAddRequested    = "DISK_ADD_REQUESTED"
	FlagDiskAdding          = "DISK_ADDING"
	FlagDiskRemoveRequested = "DISK_REMOVE_REQUESTED"
	FlagDiskRemoving        = "DISK_REMOVING"
	FlagInactive            = "INACTIVE"
	FlagEvicted             = "EVICTED"
	FlagEvacuate            = "EVACUATE"
)

// ViewQuery selects resources. Empty lists mean all.
type ViewQuery struct{ Resources, Nodes, Pools []string }

// Resource is one definition on one node: a replica, a diskless attachment or a tie-breaker.
type Resource struct {
	Name      string
	Node      string
	UUID      string
	Flags     []string
	InUse     *bool // DRBD role Primary on this node; nil when unknown (satellite not connected).
	Props     map[string]string
	CreatedMs int64    // Milliseconds since the epoch, 0 when absent.
	DRBD      *DRBD    // nil without a DRBD layer.
	Volumes   []Volume // Only filled by ResourceView.
}

// HasFlag says whether the resource carries the flag.
func (r *Resource) HasFlag(flag string) bool { return slices.Contains(r.Flags, flag) }

// Diskless says whether the resource has no disk on its node, by its flags.
func (r *Resource) Diskless() bool { return r.HasFlag(FlagDiskless) || r.HasFlag(FlagDRBDDiskless) }

// Toggling says whether a disk is being added or removed.
func (r *Resource) Toggling() bool {
	return r.HasFlag(FlagDiskAddRequested) || r.HasFlag(FlagDiskAdding) ||
		r.HasFlag(FlagDiskRemoveRequested) || r.HasFlag(FlagDiskRemoving)
}

// DRBD is the DRBD layer of a resource.
type DRBD struct {
	NodeID         *int32
	PeerSlots      *int32
	Ports          []int32
	Flags          []string
	PromotionScore *int32
	MayPromote     *bool // nil when unknown.
	Connections    map[string]Connection
}

// Connection is the DRBD connection to a peer node.
type Connection struct {
	Connected *bool  `json:"connected"`
	Message   string `json:"message"` // DRBD connection state, such as Connected, Connecting, StandAlone.
}

// Volume is one volume of a resource.
type Volume struct {
	Number   int32
	Pool     string
	Provider string
	// AllocatedKiB is nil when absent. A negative value is what a satellite says when it does not know: it is kept.
	AllocatedKiB *int64
	UsableKiB    *int64 // From the volume, else from its DRBD layer.
	DevicePath   string
	Flags        []string
	DiskState    string                 // "" when unknown; open set, for example UpToDate or SyncTarget(12.34%).
	Replication  map[string]Replication // By peer node, from LINSTOR 1.31 on.
	Reports      []Entry
}

// Replication is the state of the resync with one peer.
type Replication struct {
	State       string   `json:"replication_state"`
	DonePercent *float64 `json:"done_percentage"`
}

// DiskUpToDate is the disk state of a complete replica.
const DiskUpToDate = "UpToDate"

// SyncPercent reads the progress out of a disk state such as "SyncTarget(12.34%)". The satellite formats it with its
// default locale, so a decimal comma is accepted. ok is false when the state carries no progress.
func (v *Volume) SyncPercent() (percent float64, ok bool) {
	s, found := strings.CutPrefix(v.DiskState, "SyncTarget(")
	if !found {
		return 0, false
	}
	s, found = strings.CutSuffix(s, "%)")
	if !found {
		return 0, false
	}
	percent, err := strconv.ParseFloat(strings.Replace(s, ",", ".", 1), 64)
	if err != nil || !(percent >= 0 && percent <= 100) {
		return 0, false
	}
	return percent, true
}

// Definition is a resource definition.
type Definition struct {
	Name    string             `json:"name"`
	Group   string             `json:"resource_group_name"`
	Props   map[string]string  `json:"props"`
	Flags   []string           `json:"flags"`
	UUID    string             `json:"uuid"`
	Volumes []VolumeDefinition `json:"volume_definitions"` // Only when asked for.
}

// HasFlag says whether the definition carries the flag.
func (d *Definition) HasFlag(flag string) bool { return slices.Contains(d.Flags, flag) }

// VolumeDefinition is the size of a volume of a definition.
type VolumeDefinition struct {
	Number  int32             `json:"volume_number"`
	SizeKiB int64             `json:"size_kib"`
	Props   map[string]string `json:"props"`
	Flags   []string          `json:"flags"`
	UUID    string            `json:"uuid"`
}

// Group is a resource group.
type Group struct {
	Name         string            `json:"name"`
	Props        map[string]string `json:"props"`
	UUID         string            `json:"uuid"`
	SelectFilter SelectFilter      `json:"select_filter"`
}

// SelectFilter is what LINSTOR's autoplacer obeys.
type SelectFilter struct {
	PlaceCount          *int32   `json:"place_count"` // nil when the group does not set it.
	StoragePools        []string `json:"storage_pool_list"`
	StoragePool         string   `json:"storage_pool"`
	Nodes               []string `json:"node_name_list"`
	LayerStack          []string `json:"layer_stack"`
	Providers           []string `json:"provider_list"`
	DisklessOnRemaining *bool    `json:"diskless_on_remaining"`
}

// Candidate is a pool that a new volume of a group could go to.
type Candidate struct {
	Pool             string   `json:"storage_pool"`
	MaxVolumeSizeKiB int64    `json:"max_volume_size_kib"`
	Nodes            []string `json:"node_names"`
	AllThin          bool     `json:"all_thin"`
}

// SpaceInfo is LINSTOR's own view of the room in a group. Only pools of online nodes count, so the figures drop when a
// host is down, and are 0 when place-count nodes cannot be found.
type SpaceInfo struct {
	MaxVolumeSizeKiB *int64  `json:"max_vlm_size_in_kib"`   // Largest single volume, over-subscription applied.
	AvailableKiB     *int64  `json:"available_size_in_kib"` // Replica-adjusted, no over-subscription.
	CapacityKiB      *int64  `json:"capacity_in_kib"`       // Replica-adjusted, no over-subscription.
	Reports          []Entry `json:"-"`
}
