package linstorsim

// The records of the REST API, with the field names of LINSTOR's own OpenAPI document (rest_v1_openapi.yaml). LINSTOR
// serialises with "non-empty" rules: null, empty strings, lists and maps are absent; false and 0 are present. So:
// pointers where a value can be unknown, omitempty on strings, lists and maps, never on numbers and booleans.
// Maps and slices in a record may be shared with the model and with other records: treat them as read-only.

// Props are LINSTOR properties: full key to value.
type Props map[string]string

// Node is one LINSTOR node.
type Node struct {
	Name                 string              `json:"name"`
	Type                 string              `json:"type"`
	Flags                []string            `json:"flags,omitempty"`
	Props                Props               `json:"props,omitempty"`
	NetInterfaces        []NetInterface      `json:"net_interfaces,omitempty"`
	ConnectionStatus     string              `json:"connection_status,omitempty"`
	UUID                 string              `json:"uuid,omitempty"`
	StorageProviders     []string            `json:"storage_providers,omitempty"`
	ResourceLayers       []string            `json:"resource_layers,omitempty"`
	UnsupportedProviders map[string][]string `json:"unsupported_providers,omitempty"`
	UnsupportedLayers    map[string][]string `json:"unsupported_layers,omitempty"`
	EvictionTimestamp    *int64              `json:"eviction_timestamp,omitempty"`
}

// NetInterface is one address of a node. Port 0 means the interface carries no satellite connection.
type NetInterface struct {
	Name           string `json:"name"`
	Address        string `json:"address"`
	SatellitePort  *int   `json:"satellite_port,omitempty"`
	EncryptionType string `json:"satellite_encryption_type,omitempty"`
	IsActive       bool   `json:"is_active"`
	UUID           string `json:"uuid,omitempty"`
}

// StoragePool is a pool on a node. Capacities in KiB; nil while the node is not online.
type StoragePool struct {
	Name              string            `json:"storage_pool_name"`
	NodeName          string            `json:"node_name"`
	ProviderKind      string            `json:"provider_kind"`
	Props             Props             `json:"props,omitempty"`
	StaticTraits      map[string]string `json:"static_traits,omitempty"`
	FreeCapacity      *int64            `json:"free_capacity,omitempty"`
	TotalCapacity     *int64            `json:"total_capacity,omitempty"`
	FreeSpaceMgrName  string            `json:"free_space_mgr_name,omitempty"`
	UUID              string            `json:"uuid,omitempty"`
	Reports           []Entry           `json:"reports,omitempty"`
	SupportsSnapshots bool              `json:"supports_snapshots"`
	ExternalLocking   bool              `json:"external_locking"`
}

// StoragePoolDefinition is the cluster-wide half of a storage pool.
type StoragePoolDefinition struct {
	Name  string `json:"storage_pool_name"`
	Props Props  `json:"props,omitempty"`
}

// SelectFilter is LINSTOR's AutoSelectFilter.
type SelectFilter struct {
	PlaceCount           *int           `json:"place_count,omitempty"`
	AdditionalPlaceCount *int           `json:"additional_place_count,omitempty"`
	NodeNameList         []string       `json:"node_name_list,omitempty"`
	StoragePool          string         `json:"storage_pool,omitempty"`
	StoragePoolList      []string       `json:"storage_pool_list,omitempty"`
	StoragePoolDiskless  []string       `json:"storage_pool_diskless_list,omitempty"`
	NotPlaceWithRsc      []string       `json:"not_place_with_rsc,omitempty"`
	NotPlaceWithRscRegex string         `json:"not_place_with_rsc_regex,omitempty"`
	ReplicasOnSame       []string       `json:"replicas_on_same,omitempty"`
	ReplicasOnDifferent  []string       `json:"replicas_on_different,omitempty"`
	XReplicasOnDifferent map[string]int `json:"x_replicas_on_different_map,omitempty"`
	LayerStack           []string       `json:"layer_stack,omitempty"`
	ProviderList         []string       `json:"provider_list,omitempty"`
	DisklessOnRemaining  *bool          `json:"diskless_on_remaining,omitempty"`
	DisklessType         string         `json:"diskless_type,omitempty"`
	Overprovision        *float64       `json:"overprovision,omitempty"`
	PortCount            *int           `json:"port_count,omitempty"`
}

// ResourceGroup is the template that resource definitions are spawned from.
type ResourceGroup struct {
	Name         string        `json:"name"`
	Description  string        `json:"description,omitempty"`
	Props        Props         `json:"props,omitempty"`
	SelectFilter *SelectFilter `json:"select_filter,omitempty"`
	UUID         string        `json:"uuid,omitempty"`
	PeerSlots    *int          `json:"peer_slots,omitempty"`
}

// VolumeGroup is one volume of a resource group.
type VolumeGroup struct {
	Number int      `json:"volume_number"`
	Props  Props    `json:"props,omitempty"`
	UUID   string   `json:"uuid,omitempty"`
	Flags  []string `json:"flags,omitempty"`
}

// ResourceDefinition is a resource without its places.
type ResourceDefinition struct {
	Name              string             `json:"name"`
	ExternalName      string             `json:"external_name,omitempty"`
	Props             Props              `json:"props,omitempty"`
	Flags             []string           `json:"flags,omitempty"`
	LayerData         []DefinitionLayer  `json:"layer_data,omitempty"`
	UUID              string             `json:"uuid,omitempty"`
	ResourceGroupName string             `json:"resource_group_name,omitempty"`
	VolumeDefinitions []VolumeDefinition `json:"volume_definitions,omitempty"`
}

// DefinitionLayer is one layer of a resource definition; Data only on DRBD.
type DefinitionLayer struct {
	Type string          `json:"type"`
	Data *DrbdDefinition `json:"data,omitempty"`
}

// DrbdDefinition is the DRBD part of a resource definition. AlStripeSize in KiB.
type DrbdDefinition struct {
	PeerSlots     int    `json:"peer_slots"`
	AlStripes     int    `json:"al_stripes"`
	AlStripeSize  int64  `json:"al_stripe_size_kib"`
	Port          int    `json:"port"`
	TransportType string `json:"transport_type,omitempty"`
	Secret        string `json:"secret,omitempty"`
	Down          bool   `json:"down"`
}

// VolumeDefinition is one volume's size in KiB.
type VolumeDefinition struct {
	Number    int           `json:"volume_number"`
	SizeKiB   int64         `json:"size_kib"`
	Props     Props         `json:"props,omitempty"`
	Flags     []string      `json:"flags,omitempty"`
	LayerData []VolDfnLayer `json:"layer_data,omitempty"`
	UUID      string        `json:"uuid,omitempty"`
}

// VolDfnLayer is one layer of a volume definition; Data only on DRBD.
type VolDfnLayer struct {
	Type string      `json:"type"`
	Data *DrbdVolDfn `json:"data,omitempty"`
}

// DrbdVolDfn is the DRBD minor of a volume definition.
type DrbdVolDfn struct {
	VolumeNumber int `json:"volume_number"`
	MinorNumber  int `json:"minor_number"`
}

// Resource is one place of a resource definition. State is nil while the satellite is not connected; Volumes are
// filled by the view only.
type Resource struct {
	Name            string         `json:"name"`
	NodeName        string         `json:"node_name"`
	Props           Props          `json:"props,omitempty"`
	Flags           []string       `json:"flags,omitempty"`
	LayerObject     ResourceLayer  `json:"layer_object"`
	State           *ResourceState `json:"state,omitempty"`
	UUID            string         `json:"uuid,omitempty"`
	CreateTimestamp *int64         `json:"create_timestamp,omitempty"`
	Volumes         []Volume       `json:"volumes,omitempty"`
}

// ResourceState is the live part of a resource; InUse nil means unknown.
type ResourceState struct {
	InUse *bool `json:"in_use,omitempty"`
}

// ResourceLayer is the layer tree of a resource.
type ResourceLayer struct {
	Children []ResourceLayer  `json:"children,omitempty"`
	Type     string           `json:"type"`
	Drbd     *DrbdResource    `json:"drbd,omitempty"`
	Storage  *StorageResource `json:"storage,omitempty"`
}

// DrbdResource is the DRBD layer of a resource.
type DrbdResource struct {
	Definition     *DrbdDefinition           `json:"drbd_resource_definition,omitempty"`
	NodeID         int                       `json:"node_id"`
	TCPPorts       []int                     `json:"tcp_ports,omitempty"`
	PeerSlots      int                       `json:"peer_slots"`
	AlStripes      int                       `json:"al_stripes"`
	AlSize         int64                     `json:"al_size"`
	Flags          []string                  `json:"flags,omitempty"`
	Volumes        []DrbdVolume              `json:"drbd_volumes,omitempty"`
	Connections    map[string]DrbdConnection `json:"connections,omitempty"`
	PromotionScore *int                      `json:"promotion_score,omitempty"`
	MayPromote     *bool                     `json:"may_promote,omitempty"`
}

// DrbdConnection is a resource's link to one peer. Message is DRBD's connection state.
type DrbdConnection struct {
	Connected bool   `json:"connected"`
	Message   string `json:"message,omitempty"`
}

// DrbdVolume is the DRBD layer of a volume. Sizes in KiB, -1 while unknown.
type DrbdVolume struct {
	Definition    *DrbdVolDfn `json:"drbd_volume_definition,omitempty"`
	DevicePath    string      `json:"device_path,omitempty"`
	BackingDevice string      `json:"backing_device,omitempty"`
	AllocatedKiB  int64       `json:"allocated_size_kib"`
	UsableKiB     int64       `json:"usable_size_kib"`
}

// StorageResource is the storage layer of a resource.
type StorageResource struct {
	Volumes []StorageVolume `json:"storage_volumes,omitempty"`
}

// StorageVolume is the storage layer of a volume. Sizes in KiB.
type StorageVolume struct {
	Number       int    `json:"volume_number"`
	DevicePath   string `json:"device_path,omitempty"`
	AllocatedKiB int64  `json:"allocated_size_kib"`
	UsableKiB    int64  `json:"usable_size_kib"`
	DiskState    string `json:"disk_state,omitempty"`
}

// Volume is a volume of a placed resource. AllocatedKiB is what the satellite says where it was asked, else what the
// controller knew last; it can be negative on a broken satellite.
type Volume struct {
	Number       int           `json:"volume_number"`
	PoolName     string        `json:"storage_pool_name,omitempty"`
	ProviderKind string        `json:"provider_kind,omitempty"`
	DevicePath   string        `json:"device_path,omitempty"`
	AllocatedKiB *int64        `json:"allocated_size_kib,omitempty"`
	UsableKiB    *int64        `json:"usable_size_kib,omitempty"`
	Props        Props         `json:"props,omitempty"`
	Flags        []string      `json:"flags,omitempty"`
	State        *VolumeState  `json:"state,omitempty"`
	LayerData    []VolumeLayer `json:"layer_data_list,omitempty"`
	UUID         string        `json:"uuid,omitempty"`
	Reports      []Entry       `json:"reports,omitempty"`
}

// VolumeLayer is one layer of a volume: exactly one of Drbd and Storage is set, under "data".
type VolumeLayer struct {
	Type string `json:"type"`
	Data any    `json:"data,omitempty"`
}

// VolumeState is the live state of a volume.
type VolumeState struct {
	DiskState         string                      `json:"disk_state,omitempty"`
	ReplicationStates map[string]ReplicationState `json:"replication_states,omitempty"`
}

// ReplicationState is the replication towards one peer.
type ReplicationState struct {
	State string   `json:"replication_state"`
	Done  *float64 `json:"done_percentage,omitempty"`
}

// Snapshot is a snapshot definition with its places.
type Snapshot struct {
	Name              string           `json:"name"`
	ResourceName      string           `json:"resource_name"`
	Nodes             []string         `json:"nodes,omitempty"`
	Flags             []string         `json:"flags,omitempty"`
	VolumeDefinitions []SnapshotVolDfn `json:"volume_definitions,omitempty"`
	UUID              string           `json:"uuid,omitempty"`
	Snapshots         []SnapshotNode   `json:"snapshots,omitempty"`
}

// SnapshotVolDfn is a volume's size in KiB at snapshot time.
type SnapshotVolDfn struct {
	Number  int   `json:"volume_number"`
	SizeKiB int64 `json:"size_kib"`
}

// SnapshotNode is a snapshot on one node.
type SnapshotNode struct {
	SnapshotName    string        `json:"snapshot_name"`
	NodeName        string        `json:"node_name"`
	CreateTimestamp *int64        `json:"create_timestamp,omitempty"`
	Flags           []string      `json:"flags,omitempty"`
	UUID            string        `json:"uuid,omitempty"`
	Volumes         []SnapshotVol `json:"snapshot_volumes,omitempty"`
}

// SnapshotVol is one volume of a snapshot on one node.
type SnapshotVol struct {
	UUID   string `json:"uuid,omitempty"`
	Number int    `json:"vlm_nr"`
	State  string `json:"state,omitempty"`
}

// KeyValueStore is one KVS instance.
type KeyValueStore struct {
	Name  string `json:"name"`
	Props Props  `json:"props,omitempty"`
}

// PropsChange is the body of every property modification.
type PropsChange struct {
	Override         Props    `json:"override_props,omitempty"`
	Delete           []string `json:"delete_props,omitempty"`
	DeleteNamespaces []string `json:"delete_namespaces,omitempty"`
}

// Connection is a node connection (Resource empty) or a resource connection: properties of a pair.
type Connection struct {
	Resource string   `json:"resource_name,omitempty"`
	NodeA    string   `json:"node_a"`
	NodeB    string   `json:"node_b"`
	Props    Props    `json:"props,omitempty"`
	Flags    []string `json:"flags,omitempty"`
	Port     *int     `json:"port,omitempty"`
}

// SpaceInfo is the answer of query-size-info, in KiB.
type SpaceInfo struct {
	MaxVolume     int64         `json:"max_vlm_size_in_kib"`
	Available     int64         `json:"available_size_in_kib"`
	Capacity      int64         `json:"capacity_in_kib"`
	DefaultRatio  float64       `json:"default_max_oversubscription_ratio"`
	NextSpawn     []SpawnTarget `json:"next_spawn_result,omitempty"`
	MaxRatio      *float64      `json:"max_oversubscription_ratio,omitempty"`
	MaxFreeRatio  *float64      `json:"max_free_capacity_oversubscription_ratio,omitempty"`
	MaxTotalRatio *float64      `json:"max_total_capacity_oversubscription_ratio,omitempty"`
}

// SpawnTarget is where the next resource of a group would go.
type SpawnTarget struct {
	NodeName string  `json:"node_name"`
	PoolName string  `json:"stor_pool_name"`
	Ratio    float64 `json:"stor_pool_oversubscription_ratio"`
}

// Candidate is one answer of query-max-volume-size, in KiB.
type Candidate struct {
	StoragePool  string   `json:"storage_pool"`
	MaxVolumeKiB int64    `json:"max_volume_size_kib"`
	NodeNames    []string `json:"node_names,omitempty"`
	AllThin      bool     `json:"all_thin"`
}
