package xapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Ref is an opaque reference to an object, "OpaqueRef:" followed by a random UUID. Refs change when a host joins a pool and when the
// database is restored; UUIDs do not. Key what you keep by UUID.
type Ref string

// NullRef is XAPI's reference to nothing (ocaml/xapi-types/ref.ml).
const NullRef Ref = "OpaqueRef:NULL"

// IsNull tells whether r refers to nothing: the null reference or no text at all.
func (r Ref) IsNull() bool { return r == NullRef || r == "" }

// Int is an integer of XAPI. It reads from a JSON number (JSON-RPC) and from text (XML-RPC, where XAPI writes integers untyped).
type Int int64

// UnmarshalJSON accepts 42, "42" and 42.0; XAPI's integers are 64 bits wide on both wires.
func (i *Int) UnmarshalJSON(b []byte) error {
	s := strings.Trim(string(b), `"`)
	if s == "null" {
		return nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err == nil {
		*i = Int(n)
		return nil
	}
	f, ferr := strconv.ParseFloat(s, 64)
	if ferr != nil || f != math.Trunc(f) || math.Abs(f) >= 1<<53 {
		return fmt.Errorf("read integer %.40q: %w", s, err)
	}
	*i = Int(f)
	return nil
}

// Float is a float of XAPI. It also reads "NaN", "Infinity" and "-Infinity", which the JSON reader makes of the bare words that XAPI
// prints, and the "nan" and "inf" of XML-RPC.
type Float float64

// UnmarshalJSON accepts numbers and, as text, numbers and the three words that JSON has no form for.
func (f *Float) UnmarshalJSON(b []byte) error {
	s := strings.Trim(string(b), `"`)
	if s == "null" {
		return nil
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return fmt.Errorf("read float %.40q: %w", s, err)
	}
	*f = Float(n)
	return nil
}

// MarshalJSON writes NaN and the infinities as text, because JSON has no form for them.
func (f Float) MarshalJSON() ([]byte, error) {
	n := float64(f)
	switch {
	case math.IsNaN(n):
		return []byte(`"NaN"`), nil
	case math.IsInf(n, 1):
		return []byte(`"Infinity"`), nil
	case math.IsInf(n, -1):
		return []byte(`"-Infinity"`), nil
	}
	return json.Marshal(n)
}

// timeLayout is XAPI's form of a UTC time: no dashes, "Z" at the end.
const timeLayout = "20060102T15:04:05Z"

// Time is a point in time as XAPI writes it, to the second. 1970-01-01 stands for "never".
type Time struct{ time.Time }

// UnmarshalJSON reads XAPI's form, with dashes or without, with a zone or without (then taken as UTC).
func (t *Time) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("read time: %w", err)
	}
	if s == "" {
		t.Time = time.Time{}
		return nil
	}
	for _, layout := range []string{"20060102T15:04:05Z07:00", "20060102T15:04:05", time.RFC3339, "2006-01-02T15:04:05"} {
		if v, err := time.Parse(layout, s); err == nil {
			t.Time = v.UTC()
			return nil
		}
	}
	return fmt.Errorf("read time %.40q: not in XAPI's form %s", s, timeLayout)
}

// MarshalJSON writes XAPI's form.
func (t Time) MarshalJSON() ([]byte, error) {
	return json.Marshal(t.UTC().Format(timeLayout))
}

// Pool is what the agents read of XAPI's class pool. A pool has exactly one such record.
type Pool struct {
	UUID                     string            `json:"uuid"`
	NameLabel                string            `json:"name_label"`
	Master                   Ref               `json:"master"` // Master is the coordinator's host.
	DefaultSR                Ref               `json:"default_SR"`
	OtherConfig              map[string]string `json:"other_config"`
	HAEnabled                bool              `json:"ha_enabled"`
	HAConfiguration          map[string]string `json:"ha_configuration"`
	HAStatefiles             []string          `json:"ha_statefiles"` // HAStatefiles are VDI refs, as text.
	HAHostFailuresToTolerate Int               `json:"ha_host_failures_to_tolerate"`
	HAPlanExistsFor          Int               `json:"ha_plan_exists_for"`
	HAOvercommitted          bool              `json:"ha_overcommitted"`
	HAClusterStack           string            `json:"ha_cluster_stack"`
	Tags                     []string          `json:"tags"`
}

// Host is what the agents read of XAPI's class host.
type Host struct {
	UUID              string            `json:"uuid"`
	NameLabel         string            `json:"name_label"`
	Hostname          string            `json:"hostname"`
	Address           string            `json:"address"` // Address is the management address, IPv4 or IPv6.
	Enabled           bool              `json:"enabled"` // Enabled is administrative; see HostMetrics.Live for liveness.
	Metrics           Ref               `json:"metrics"`
	ResidentVMs       []Ref             `json:"resident_VMs"`
	PIFs              []Ref             `json:"PIFs"`
	PBDs              []Ref             `json:"PBDs"`
	ControlDomain     Ref               `json:"control_domain"`
	HAStatefiles      []string          `json:"ha_statefiles"`    // HAStatefiles is empty when the host cannot reach its statefile.
	HANetworkPeers    []string          `json:"ha_network_peers"` // HANetworkPeers are host UUIDs, not refs.
	OtherConfig       map[string]string `json:"other_config"`
	SoftwareVersion   map[string]string `json:"software_version"`
	APIVersionMajor   Int               `json:"API_version_major"`
	APIVersionMinor   Int               `json:"API_version_minor"` // APIVersionMinor is 15 in XCP-ng 8.2 and 21 in 8.3.
	CurrentOperations map[string]string `json:"current_operations"`
	Tags              []string          `json:"tags"`
}

// HostMetrics is XAPI's class host_metrics.
type HostMetrics struct {
	UUID        string            `json:"uuid"`
	MemoryTotal Int               `json:"memory_total"` // MemoryTotal is in bytes.
	MemoryFree  Int               `json:"memory_free"`  // MemoryFree is in bytes.
	Live        bool              `json:"live"`         // Live turns false about ten minutes after a host falls silent without HA.
	LastUpdated Time              `json:"last_updated"`
	OtherConfig map[string]string `json:"other_config"`
}

// SR is what the agents read of XAPI's class SR. Sizes are in bytes; -1 is XAPI's "never set".
type SR struct {
	UUID                string            `json:"uuid"`
	NameLabel           string            `json:"name_label"`
	Type                string            `json:"type"` // Type is "linstor" for XOSTOR.
	ContentType         string            `json:"content_type"`
	Shared              bool              `json:"shared"`
	VDIs                []Ref             `json:"VDIs"`
	PBDs                []Ref             `json:"PBDs"`
	VirtualAllocation   Int               `json:"virtual_allocation"`
	PhysicalUtilisation Int               `json:"physical_utilisation"`
	PhysicalSize        Int               `json:"physical_size"`
	CurrentOperations   map[string]string `json:"current_operations"`
	OtherConfig         map[string]string `json:"other_config"`
	SMConfig            map[string]string `json:"sm_config"`
	Tags                []string          `json:"tags"`
}

// PBD is XAPI's class PBD: the plug of one SR on one host.
type PBD struct {
	UUID              string            `json:"uuid"`
	Host              Ref               `json:"host"`
	SR                Ref               `json:"SR"`
	DeviceConfig      map[string]string `json:"device_config"` // DeviceConfig has group-name, redundancy and provisioning for XOSTOR.
	CurrentlyAttached bool              `json:"currently_attached"`
	OtherConfig       map[string]string `json:"other_config"`
}

// VDI is what the agents read of XAPI's class VDI. Sizes are in bytes.
type VDI struct {
	UUID                string            `json:"uuid"`
	NameLabel           string            `json:"name_label"`
	SR                  Ref               `json:"SR"`
	VBDs                []Ref             `json:"VBDs"`
	VirtualSize         Int               `json:"virtual_size"`
	PhysicalUtilisation Int               `json:"physical_utilisation"`
	Type                string            `json:"type"`
	Sharable            bool              `json:"sharable"`
	ReadOnly            bool              `json:"read_only"`
	Location            string            `json:"location"` // Location is the VDI's UUID for XOSTOR.
	Managed             bool              `json:"managed"`
	Missing             bool              `json:"missing"`
	IsASnapshot         bool              `json:"is_a_snapshot"`
	SnapshotOf          Ref               `json:"snapshot_of"`
	Snapshots           []Ref             `json:"snapshots"`
	SnapshotTime        Time              `json:"snapshot_time"`
	CBTEnabled          bool              `json:"cbt_enabled"`
	CurrentOperations   map[string]string `json:"current_operations"`
	OtherConfig         map[string]string `json:"other_config"`
	SMConfig            map[string]string `json:"sm_config"` // SMConfig holds SM's marks: host_<ref>, paused, activating, relinking, vdi_type, ...
	Tags                []string          `json:"tags"`
}

// VBD is what the agents read of XAPI's class VBD: the attachment of one VDI to one VM.
type VBD struct {
	UUID              string            `json:"uuid"`
	VM                Ref               `json:"VM"`
	VDI               Ref               `json:"VDI"`
	Device            string            `json:"device"`
	Userdevice        string            `json:"userdevice"`
	Mode              string            `json:"mode"` // Mode is RO or RW.
	Type              string            `json:"type"` // Type is CD, Disk or Floppy.
	Empty             bool              `json:"empty"`
	CurrentlyAttached bool              `json:"currently_attached"`
	CurrentOperations map[string]string `json:"current_operations"`
	OtherConfig       map[string]string `json:"other_config"`
}

// VM is what the agents read of XAPI's class VM, which also holds templates, snapshots and control domains.
type VM struct {
	UUID                    string            `json:"uuid"`
	NameLabel               string            `json:"name_label"`
	PowerState              string            `json:"power_state"` // PowerState is Halted, Paused, Running or Suspended.
	IsATemplate             bool              `json:"is_a_template"`
	IsASnapshot             bool              `json:"is_a_snapshot"`
	IsControlDomain         bool              `json:"is_control_domain"`
	SuspendVDI              Ref               `json:"suspend_VDI"`
	ResidentOn              Ref               `json:"resident_on"`
	ScheduledToBeResidentOn Ref               `json:"scheduled_to_be_resident_on"` // ScheduledToBeResidentOn is the target while a start or migration runs.
	Affinity                Ref               `json:"affinity"`
	MemoryStaticMax         Int               `json:"memory_static_max"` // MemoryStaticMax is in bytes.
	VBDs                    []Ref             `json:"VBDs"`
	VIFs                    []Ref             `json:"VIFs"`
	Domid                   Int               `json:"domid"`
	SnapshotOf              Ref               `json:"snapshot_of"`
	Metrics                 Ref               `json:"metrics"`
	HARestartPriority       string            `json:"ha_restart_priority"` // HARestartPriority is "restart", "best-effort" or "".
	CurrentOperations       map[string]string `json:"current_operations"`
	BlockedOperations       map[string]string `json:"blocked_operations"`
	OtherConfig             map[string]string `json:"other_config"`
	Tags                    []string          `json:"tags"`
}

// PIF is what the agents read of XAPI's class PIF: a NIC, bond, VLAN or tunnel of one host.
type PIF struct {
	UUID                string            `json:"uuid"`
	Device              string            `json:"device"`
	Network             Ref               `json:"network"`
	Host                Ref               `json:"host"`
	MAC                 string            `json:"MAC"`
	MTU                 Int               `json:"MTU"`
	VLAN                Int               `json:"VLAN"` // VLAN is -1 for untagged.
	Metrics             Ref               `json:"metrics"`
	Physical            bool              `json:"physical"`
	CurrentlyAttached   bool              `json:"currently_attached"` // CurrentlyAttached is configuration; the link is PIFMetrics.Carrier.
	IPConfigurationMode string            `json:"ip_configuration_mode"`
	IP                  string            `json:"IP"`
	Netmask             string            `json:"netmask"`
	Gateway             string            `json:"gateway"`
	IPv6                []string          `json:"IPv6"`
	PrimaryAddressType  string            `json:"primary_address_type"`
	BondSlaveOf         Ref               `json:"bond_slave_of"`
	BondMasterOf        []Ref             `json:"bond_master_of"`
	VLANMasterOf        Ref               `json:"VLAN_master_of"`
	VLANSlaveOf         []Ref             `json:"VLAN_slave_of"`
	Management          bool              `json:"management"`
	Managed             bool              `json:"managed"`
	OtherConfig         map[string]string `json:"other_config"`
}

// PIFMetrics is what the agents read of XAPI's class PIF_metrics, refreshed every 5 s when changed.
type PIFMetrics struct {
	UUID        string            `json:"uuid"`
	IOReadKBs   Float             `json:"io_read_kbs"`  // IOReadKBs is in KiB per second.
	IOWriteKBs  Float             `json:"io_write_kbs"` // IOWriteKBs is in KiB per second.
	Carrier     bool              `json:"carrier"`
	DeviceName  string            `json:"device_name"`
	Speed       Int               `json:"speed"` // Speed is in Mbit per second.
	Duplex      bool              `json:"duplex"`
	PCIBusPath  string            `json:"pci_bus_path"`
	LastUpdated Time              `json:"last_updated"`
	OtherConfig map[string]string `json:"other_config"`
}

// Network is what the agents read of XAPI's class network.
type Network struct {
	UUID        string            `json:"uuid"`
	NameLabel   string            `json:"name_label"`
	PIFs        []Ref             `json:"PIFs"`
	MTU         Int               `json:"MTU"`
	Bridge      string            `json:"bridge"`
	Managed     bool              `json:"managed"`
	OtherConfig map[string]string `json:"other_config"`
	Purpose     []string          `json:"purpose"`
	Tags        []string          `json:"tags"`
}

// Task is XAPI's class task. Completed tasks vanish after 65 minutes, or sooner when there are more than 200.
type Task struct {
	UUID            string            `json:"uuid"`
	NameLabel       string            `json:"name_label"`
	NameDescription string            `json:"name_description"`
	Created         Time              `json:"created"`
	Finished        Time              `json:"finished"`
	Status          string            `json:"status"` // Status is pending, success, failure, cancelling or cancelled.
	ResidentOn      Ref               `json:"resident_on"`
	Progress        Float             `json:"progress"` // Progress runs from 0 to 1.
	Type            string            `json:"type"`
	Result          string            `json:"result"` // Result is an XML-RPC value as text.
	ErrorInfo       []string          `json:"error_info"`
	OtherConfig     map[string]string `json:"other_config"`
	SubtaskOf       Ref               `json:"subtask_of"`
}

// Message is XAPI's class message: what Xen Orchestra shows as an alert on an object.
type Message struct {
	UUID      string `json:"uuid"`
	Name      string `json:"name"`
	Priority  Int    `json:"priority"` // Priority is 1 (worst) to 5.
	Cls       string `json:"cls"`      // Cls is VM, Host, SR, Pool, VDI, ...
	ObjUUID   string `json:"obj_uuid"`
	Timestamp Time   `json:"timestamp"`
	Body      string `json:"body"`
}

// classNames are XAPI's table names by their lower-case form: event.from speaks lower case, get_all_records wants the exact name.
var classNames = func() map[string]string {
	m := make(map[string]string)
	for _, n := range []string{
		"pool", "host", "host_metrics", "SR", "PBD", "VDI", "VBD", "VM", "VM_metrics", "VM_guest_metrics", "PIF", "PIF_metrics", "network",
		"task", "message", "VIF", "Bond", "VLAN", "tunnel", "SM", "console", "Cluster", "Cluster_host", "VBD_metrics", "VIF_metrics",
		"host_cpu", "VTPM", "PCI", "PGPU", "GPU_group", "VGPU", "VGPU_type", "PUSB", "USB_group", "VUSB", "VMPP", "VMSS", "VM_appliance",
		"Certificate", "Repository", "Observer", "VM_group", "network_sriov", "subject", "role", "pool_update", "pool_patch", "host_patch",
		"Feature", "SDN_controller", "DR_task", "LVHD", "PVS_site", "PVS_server", "PVS_proxy", "PVS_cache_storage",
	} {
		m[strings.ToLower(n)] = n
	}
	return m
}()

// className gives XAPI's exact name of a class written in any case; a class that is not known is given back as it came.
func className(class string) string {
	if n, ok := classNames[strings.ToLower(class)]; ok {
		return n
	}
	return class
}

// recordUUID reads the uuid of a record; false when the record is no object.
func recordUUID(record json.RawMessage) (string, bool) {
	if t := bytes.TrimLeft(record, " \t\r\n"); len(t) == 0 || t[0] != '{' {
		return "", false
	}
	var r struct {
		UUID string `json:"uuid"`
	}
	if json.Unmarshal(record, &r) != nil {
		return "", false
	}
	return r.UUID, true
}
