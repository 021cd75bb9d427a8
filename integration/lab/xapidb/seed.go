package xapidb

import "fmt"

// Seed says how large a pool SeedPool makes.
type Seed struct {
	Name    string   // pool name; default "xostor-pool"
	Hosts   int      // default 1
	Address []string // management addresses; default 10.0.0.11, .12, ...
	NICs    int      // PIFs per host, one pool-wide network each; default 2, the first is the management interface
	Version string   // product version; default "8.3.0", or "8.2.1" on Schema82
}

// Pool names the rows that SeedPool made, by ref, in host order.
type Pool struct {
	Ref      string
	Hosts    []string
	Dom0     []string
	Networks []string
	PIFs     [][]string // [host][NIC]
}

// minor is API_version_minor: 15 for 8.2, 21 for 8.3.
func (b *seeder) minor() int {
	if b.db.schema == Schema82() {
		return 15
	}
	return 21
}

// SeedPool fills an empty database with what every pool has: pool, hosts with metrics, dom0 VMs, networks, PIFs with metrics. The first host is the coordinator.
func (db *DB) SeedPool(s Seed) (Pool, error) {
	if s.Name == "" {
		s.Name = "xostor-pool"
	}
	if s.Version == "" {
		s.Version = "8.3.0"
		if db.schema == Schema82() {
			s.Version = "8.2.1"
		}
	}
	s.Hosts = max(1, s.Hosts)
	if s.NICs == 0 {
		s.NICs = 2
	}
	b := seeder{db: db}
	var p Pool
	for n := range s.NICs {
		p.Networks = append(p.Networks, b.create("network", map[string]any{
			"name_label": fmt.Sprintf("Pool-wide network associated with eth%d", n), "bridge": fmt.Sprintf("xenbr%d", n), "MTU": 1500,
		}))
	}
	for n := range s.Hosts {
		address := fmt.Sprintf("10.0.0.%d", 11+n)
		if n < len(s.Address) {
			address = s.Address[n]
		}
		host, dom0 := b.host(n, address, s.Version)
		p.Hosts, p.Dom0 = append(p.Hosts, host), append(p.Dom0, dom0)
		p.PIFs = append(p.PIFs, b.pifs(n, host, address, p.Networks))
	}
	pool := map[string]any{
		"name_label": s.Name, "master": p.Hosts[0], "other_config": map[string]string{"auto_poweron": "true"},
		"cpu_info": map[string]string{"cpu_count": fmt.Sprint(16 * s.Hosts), "socket_count": fmt.Sprint(2 * s.Hosts), "vendor": "AuthenticAMD"},
	}
	if db.schema != Schema82() {
		pool["tls_verification_enabled"] = true
	}
	p.Ref = b.create("pool", pool)
	return p, b.err
}

type seeder struct {
	db  *DB
	err error
}

func (b *seeder) create(class string, fields map[string]any) string {
	if b.err != nil {
		return NullRef
	}
	ref, err := b.db.Create(class, fields)
	if err != nil {
		b.err = fmt.Errorf("create %s: %w", class, err)
	}
	return ref
}

func (b *seeder) host(n int, address, version string) (host, dom0 string) {
	name := fmt.Sprintf("xcp%d", n+1)
	metrics := b.create("host_metrics", map[string]any{"memory_total": int64(64 << 30), "memory_free": int64(56 << 30), "live": true})
	host = b.create("host", map[string]any{
		"name_label": name, "name_description": "Default install", "hostname": name, "address": address, "metrics": metrics, "enabled": true,
		"API_version_major": 2, "API_version_minor": b.minor(), "API_version_vendor": "XenSource", "edition": "xcp-ng", "sched_policy": "credit",
		"software_version": map[string]string{
			"product_version": version, "product_version_text": version, "product_brand": "XCP-ng", "platform_name": "XCP", "platform_version": "3.4.0",
			"build_number": "cloud", "hostname": "localhost", "xapi": "25.33", "xapi_build": "25.33.1", "xen": "4.17.5-15", "linux": "4.19.0+1",
			"dbv": "0.0.1", "network_backend": "openvswitch",
		},
		"capabilities":                       []string{"xen-3.0-x86_64", "hvm-3.0-x86_32", "hvm-3.0-x86_64"},
		"cpu_info":                           map[string]string{"cpu_count": "16", "socket_count": "2", "vendor": "AuthenticAMD", "speed": "2994.372"},
		"virtual_hardware_platform_versions": []int64{0, 1, 2}, "allowed_operations": []string{"vm_migrate", "evacuate", "provision", "vm_resume", "vm_start"},
	})
	vmMetrics := b.create("VM_metrics", map[string]any{"memory_actual": int64(4 << 30), "VCPUs_number": 16})
	dom0 = b.create("VM", map[string]any{
		"name_label": "Control domain on host: " + name, "power_state": "Running", "is_control_domain": true, "resident_on": host, "metrics": vmMetrics,
		"domain_type": "pv", "memory_static_max": int64(4 << 30), "memory_dynamic_max": int64(4 << 30), "memory_target": int64(4 << 30),
	})
	if b.err == nil {
		b.err = b.db.Set("host", host, "control_domain", dom0)
	}
	return host, dom0
}

func (b *seeder) pifs(n int, host, address string, networks []string) []string {
	var refs []string
	for nic, network := range networks {
		metrics := b.create("PIF_metrics", map[string]any{"carrier": true, "speed": 10000, "duplex": true, "vendor_name": "Intel Corporation", "device_name": "X710"})
		fields := map[string]any{
			"device": fmt.Sprintf("eth%d", nic), "network": network, "host": host, "metrics": metrics, "physical": true, "currently_attached": true, "managed": true,
			"MAC": fmt.Sprintf("52:54:00:00:%02x:%02x", n, nic), "MTU": 1500, "VLAN": -1, "properties": map[string]string{"gro": "on"},
		}
		if nic == 0 {
			fields["management"], fields["ip_configuration_mode"] = true, "Static"
			fields["IP"], fields["netmask"] = address, "255.255.255.0"
		}
		refs = append(refs, b.create("PIF", fields))
	}
	return refs
}
