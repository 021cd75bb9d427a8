package xapidb

import (
	_ "embed"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// schemaText lists every class, field, type, qualifier and default of XAPI 25.33 (the XCP-ng 8.3 line) in wire order. Names and types are those of
// upstream's published datamodel (doc/data/xenapi.json); a reference test compares the order with recorded records.
//
//go:embed schema.txt
var schemaText string

// Kind is the shape of a value on the API.
type Kind uint8

// The kinds of the XAPI data model. Enumerations are strings with a closed list of values.
const (
	String Kind = iota
	Bool
	Int
	Float
	Datetime
	Ref
	Set
	Map
)

// Type is the type of a field. Elem is set for Set and Map; map keys are always strings on the wire. Class names the class a Ref points to.
type Type struct {
	Kind  Kind
	Class string
	Enum  string
	Elem  *Type
}

// Qualifier says who may write a field (upstream datamodel_types.ml).
type Qualifier uint8

// RW fields have generated setters, StaticRO fields are constructor arguments only, DynamicRO fields are written by XAPI itself.
const (
	RW Qualifier = iota
	StaticRO
	DynamicRO
)

// Field is one column of a class.
type Field struct {
	Name      string
	DBName    string // the name used in where-expressions: name__label for name_label
	Type      Type
	Qualifier Qualifier
	Setter    bool // XAPI offers set_<name> although the field is not RW
	Required  bool // a generated constructor refuses a struct without it
	Absent82  bool // the field does not exist in XCP-ng 8.2
	Derived   bool // the set side of a relation: maintained by the database, never written
	Default   any

	inverseClass string // the class and field of the other end, on the ref side of a relation
	inverseField string
}

// Class is one table.
type Class struct {
	Name     string
	Fields   []Field
	Events   bool // event.from reports changes
	Volatile bool // rows do not survive a restart of XAPI

	index    map[string]int
	dbIndex  map[string]int
	derived  bool
	lower    string
	messages bool // messages are files, not rows: own generation, never counted
}

// Field returns the field called name.
func (c *Class) Field(name string) (Field, bool) {
	i, ok := c.index[name]
	if !ok {
		return Field{}, false
	}
	return c.Fields[i], true
}

// relations are the symmetric relations of upstream's datamodel.ml (all_relations) whose ref side is a single reference: writing the left side
// changes, and sends an event for, the row on the right.
const relations = `
VM.snapshot_of VM.snapshots
VDI.snapshot_of VDI.snapshots
VM.parent VM.children
task.subtask_of task.subtasks
PIF.bond_slave_of Bond.slaves
Bond.master PIF.bond_master_of
VLAN.tagged_PIF PIF.VLAN_slave_of
tunnel.access_PIF PIF.tunnel_access_PIF_of
tunnel.transport_PIF PIF.tunnel_transport_PIF_of
PBD.host host.PBDs
PBD.SR SR.PBDs
VBD.VDI VDI.VBDs
crashdump.VDI VDI.crash_dumps
VBD.VM VM.VBDs
crashdump.VM VM.crash_dumps
VIF.VM VM.VIFs
VIF.network network.VIFs
Cluster_host.cluster Cluster.cluster_hosts
PIF.host host.PIFs
PIF.network network.PIFs
VDI.SR SR.VDIs
VTPM.VM VM.VTPMs
console.VM VM.consoles
VM.resident_on host.resident_VMs
host_cpu.host host.host_CPUs
host_crashdump.host host.crashdumps
host_patch.host host.patches
host_patch.pool_patch pool_patch.host_patches
VM.protection_policy VMPP.VMs
VM.snapshot_schedule VMSS.VMs
VM.appliance VM_appliance.VMs
PGPU.GPU_group GPU_group.PGPUs
VGPU.GPU_group GPU_group.VGPUs
VGPU.VM VM.VGPUs
VGPU.resident_on PGPU.resident_VGPUs
PCI.host host.PCIs
PGPU.host host.PGPUs
VDI.metadata_of_pool pool.metadata_VDIs
SR.introduced_by DR_task.introduced_SRs
PVS_server.site PVS_site.servers
PVS_proxy.site PVS_site.proxies
PVS_cache_storage.site PVS_site.cache_storage
PUSB.host host.PUSBs
PUSB.USB_group USB_group.PUSBs
VUSB.USB_group USB_group.VUSBs
VUSB.VM VM.VUSBs
Feature.host host.features
network_sriov.physical_PIF PIF.sriov_physical_PIF_of
network_sriov.logical_PIF PIF.sriov_logical_PIF_of
`

// Schema is a parsed data model. It is immutable.
type Schema struct {
	Classes []*Class // in alphabetical order
	byName  map[string]*Class
	enums   map[string]map[string]bool
}

// Class returns the class with this exact (case-sensitive) name.
func (s *Schema) Class(name string) (*Class, bool) {
	c, ok := s.byName[name]
	return c, ok
}

// DefaultSchema is the embedded data model. It panics on a broken table, which is a build error.
func DefaultSchema() *Schema { return defaultSchema() }

// Schema82 is the data model of XCP-ng 8.2: the same classes without the fields that came later.
func Schema82() *Schema { return schema82() }

var (
	defaultSchema = sync.OnceValue(func() *Schema { return mustParse(false) })
	schema82      = sync.OnceValue(func() *Schema { return mustParse(true) })
)

func mustParse(old bool) *Schema {
	s, err := parseSchema(schemaText, relations, old)
	if err != nil {
		panic(err)
	}
	return s
}

// parseSchema reads the schema text; old leaves out the fields that XCP-ng 8.2 does not have.
func parseSchema(text, rel string, old bool) (*Schema, error) {
	s := &Schema{byName: map[string]*Class{}, enums: map[string]map[string]bool{}}
	var c *Class
	for n, line := range strings.Split(text, "\n") {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		var err error
		switch {
		case words[0] == "enum":
			s.addEnum(words[1], words[2:])
		case words[0] == "class":
			c = s.addClass(words[1], words[2:])
		case c == nil:
			err = fmt.Errorf("field outside a class")
		case old && slices.Contains(words, "!82"):
		default:
			err = s.addField(c, words)
		}
		if err != nil {
			return nil, fmt.Errorf("parse schema line %d: %w", n+1, err)
		}
	}
	return s, s.relate(rel)
}

func (s *Schema) addEnum(name string, values []string) {
	set := make(map[string]bool, len(values))
	for _, v := range values {
		set[v] = true
	}
	s.enums[name] = set
}

func (s *Schema) addClass(name string, flags []string) *Class {
	c := &Class{Name: name, index: map[string]int{}, dbIndex: map[string]int{}, lower: strings.ToLower(name), messages: name == "message"}
	for _, f := range flags {
		c.Events = c.Events || f == "events"
		c.Volatile = c.Volatile || f == "volatile"
	}
	s.Classes = append(s.Classes, c)
	s.byName[name] = c
	return c
}

// addField reads "name type qualifier [default] [!82] [+set]"; a default of "-" is the type's zero value.
func (s *Schema) addField(c *Class, words []string) error {
	if len(words) < 3 {
		return fmt.Errorf("field needs a name, a type and a qualifier")
	}
	typ, err := parseType(words[1])
	if err != nil {
		return err
	}
	f := Field{Name: words[0], DBName: dbName(words[0]), Type: typ, Required: true}
	switch words[2] {
	case "RW":
		f.Qualifier = RW
	case "StaticRO":
		f.Qualifier = StaticRO
	case "DynamicRO":
		f.Qualifier = DynamicRO
	default:
		return fmt.Errorf("unknown qualifier %q", words[2])
	}
	f.Default = typ.zero()
	for _, w := range words[3:] {
		switch w {
		case "!82":
			f.Absent82 = true
		case "+set":
			f.Setter = true
		case "-":
			f.Required = false
		default:
			f.Required = false
			if f.Default, err = parseDefault(typ, w); err != nil {
				return fmt.Errorf("default of %s.%s: %w", c.Name, f.Name, err)
			}
		}
	}
	f.Setter = f.Setter || f.Qualifier == RW
	c.index[f.Name] = len(c.Fields)
	c.dbIndex[f.DBName] = len(c.Fields)
	c.Fields = append(c.Fields, f)
	return nil
}

func (s *Schema) relate(rel string) error {
	for _, line := range strings.Split(strings.TrimSpace(rel), "\n") {
		left, right, _ := strings.Cut(line, " ")
		l, err := s.fieldAt(left)
		if err != nil {
			return err
		}
		r, err := s.fieldAt(right)
		if err != nil {
			return err
		}
		if l.Type.Kind != Ref || r.Type.Kind != Set {
			return fmt.Errorf("relation %q does not join a ref and a set", line)
		}
		l.inverseClass, l.inverseField, _ = strings.Cut(right, ".")
		r.Derived = true
		s.byName[l.inverseClass].derived = true
	}
	return nil
}

func (s *Schema) fieldAt(path string) (*Field, error) {
	class, field, _ := strings.Cut(path, ".")
	c, ok := s.byName[class]
	if !ok {
		return nil, fmt.Errorf("relation names unknown class %q", class)
	}
	i, ok := c.index[field]
	if !ok {
		return nil, fmt.Errorf("relation names unknown field %q", path)
	}
	return &c.Fields[i], nil
}

// ParseType reads a type as the schema text writes it: "string", "enum:NAME", "bool", "int", "float", "datetime", "ref:CLASS", "set:TYPE", "map:KEY:TYPE".
func ParseType(s string) (Type, error) { return parseType(s) }

// ParseValue reads a default as the schema text writes it; the empty text is the type's zero value.
func ParseValue(t Type, s string) (any, error) {
	if s == "" {
		return t.zero(), nil
	}
	return parseDefault(t, s)
}

func parseType(s string) (Type, error) {
	head, rest, _ := strings.Cut(s, ":")
	switch head {
	case "string":
		return Type{Kind: String}, nil
	case "enum":
		return Type{Kind: String, Enum: rest}, nil
	case "bool":
		return Type{Kind: Bool}, nil
	case "int":
		return Type{Kind: Int}, nil
	case "float":
		return Type{Kind: Float}, nil
	case "datetime":
		return Type{Kind: Datetime}, nil
	case "ref":
		return Type{Kind: Ref, Class: rest}, nil
	case "set":
		elem, err := parseType(rest)
		return Type{Kind: Set, Elem: &elem}, err
	case "map":
		_, value, _ := strings.Cut(rest, ":")
		elem, err := parseType(value)
		return Type{Kind: Map, Elem: &elem}, err
	}
	return Type{}, fmt.Errorf("unknown type %q", s)
}

func parseDefault(t Type, s string) (any, error) {
	switch t.Kind {
	case Bool:
		return strconv.ParseBool(s)
	case Int:
		return strconv.ParseInt(s, 10, 64)
	case Float:
		return strconv.ParseFloat(s, 64)
	case Set:
		return t.coerce(strings.Split(s, ","))
	case Map:
		m := map[string]string{}
		for _, pair := range strings.Split(s, ",") {
			k, v, _ := strings.Cut(pair, "=")
			m[k] = v
		}
		return t.coerce(m)
	default:
		return t.coerce(s)
	}
}

// namespaces are the prefixes that upstream's datamodel declares as namespaces; in the database they are joined by two underscores.
var namespaces = []string{"name_label", "name_description", "memory_", "VCPUs_", "actions_", "PV_", "HVM_", "API_version_", "qos_", "io_"}

func dbName(wire string) string {
	for _, ns := range namespaces {
		if strings.HasPrefix(wire, ns) {
			cut := strings.TrimSuffix(ns, "_")
			switch ns {
			case "name_label", "name_description":
				cut = "name"
			}
			return cut + "__" + wire[len(cut)+1:]
		}
	}
	return wire
}
