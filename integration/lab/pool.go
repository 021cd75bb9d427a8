// Package lab is one model of an XCP-ng pool with XOSTOR: hosts, LINSTOR, the SR with SM's book-keeping, disks, VMs, and faults by name. Its faces make it a pool
// that real programs can talk to. See DESIGN.md.
package lab

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// Options say what pool to make. The zero value is a thin three-host pool with redundancy 2 and 1 TiB per host.
type Options struct {
	Hosts      int   // default 3
	Redundancy int   // default 2, at most Hosts
	Thick      bool  // LVM instead of thin LVM
	PoolKiB    int64 // capacity of each host's storage pool; default 1 TiB
	Seed       uint64
	Clock      Clock         // default WallClock
	Dir        string        // where Serve puts one folder per host; a socket path must stay under 100 bytes
	GroupName  string        // device_config:group-name; default "linstor_group/thin_device"
	SRName     string        // default "XOSTOR"
	DeadAfter  time.Duration // from a host's death to host_metrics.live = false; default 10 min, as XAPI without HA
	Calls      int           // how many XAPI calls the face remembers; 0 means its default
	// Cluster gives each host an address of its own in 127.0.0.0/8 and the pool a secret, so that the buses configured by WriteConfig find each other. Else they run alone.
	Cluster bool
}

func (o Options) withDefaults() Options {
	if o.Hosts == 0 {
		o.Hosts = 3
	}
	if o.Redundancy == 0 {
		o.Redundancy = min(2, o.Hosts)
	}
	if o.PoolKiB == 0 {
		o.PoolKiB = 1 << 30
	}
	if o.Clock == nil {
		o.Clock = WallClock{}
	}
	if o.GroupName == "" {
		o.GroupName = "linstor_group/thin_device"
	}
	if o.SRName == "" {
		o.SRName = "XOSTOR"
	}
	if o.DeadAfter == 0 {
		o.DeadAfter = 10 * time.Minute
	}
	return o
}

// Host is one host of the pool as the model knows it. The fields never change.
type Host struct {
	Name string // hostname, and so the LINSTOR node name
	UUID string // XAPI uuid
	Ref  string // XAPI ref
	Addr string // management address, as XAPI has it
	Dom0 string // ref of its control domain
	PBD  string // ref of its PBD of the SR
}

// Pool is the model. All methods are safe for concurrent use; verbs run one at a time.
type Pool struct {
	routePort string // of the buses, in a cluster
	o         Options
	clock     Clock
	db        *xapidb.DB
	linstor   *linstorsim.Cluster
	xapi      *xapiface.Face
	ref       string // of the XAPI pool
	hosts     []Host
	sr        string // ref
	srUUID    string
	group     string // xcp-sr-..., the name of storage pool, resource group and KV instance
	haGroup   string

	mu         sync.Mutex // the SR lock, and all below
	rng        *rand.Rand
	disks      map[string]*disk       // by VDI uuid
	bulk       *bulk                  // while many disks are made at once
	down       map[string]bool        // by host name
	dying      map[string]func() bool // stops the timer that declares a host dead
	controller string                 // name of the host that runs LINSTOR's controller
	serving    *serving
	capacity   map[string]int64  // KiB, by host name
	held       map[replica]int64 // bytes each replica held when it was last seen
	lying      map[replica]bool  // replicas that tell a wrong size
	truth      map[string]int64  // of satellites, for truthRev
	truthRev   uint64
}

// New makes a pool, running and healthy, with an empty SR. It fails when the options make no sense.
func New(o Options) (*Pool, error) {
	o = o.withDefaults()
	if o.Redundancy < 1 || o.Redundancy > o.Hosts {
		return nil, fmt.Errorf("make pool: redundancy %d does not fit %d hosts", o.Redundancy, o.Hosts)
	}
	p := &Pool{
		o: o, clock: o.Clock, disks: map[string]*disk{}, down: map[string]bool{}, dying: map[string]func() bool{},
		capacity: map[string]int64{}, lying: map[replica]bool{},
		rng: rand.New(rand.NewPCG(o.Seed, 3)), group: "xcp-sr-" + flat(o.GroupName), haGroup: "xcp-ha-" + flat(o.GroupName),
	}
	p.db = xapidb.New(xapidb.Options{Clock: o.Clock.Now, Rand: xapidb.SeededRand(o.Seed)})
	p.linstor = linstorsim.New(linstorsim.Config{Now: o.Clock.Now, Rand: rand.New(rand.NewPCG(o.Seed, 2))})
	if err := p.makeHosts(); err != nil {
		return nil, fmt.Errorf("make pool: %w", err)
	}
	if err := p.makeSR(); err != nil {
		return nil, fmt.Errorf("make SR: %w", err)
	}
	p.controller = p.hosts[0].Name
	p.xapi = xapiface.New(xapiface.Options{DB: p.db, Calls: o.Calls})
	p.handle()
	return p, nil
}

// flat is SM's mapping from group-name to LINSTOR's names (linstorvolumemanager.py, _build_group_name).
func flat(groupName string) string { return strings.ReplaceAll(groupName, "/", "_") }

func (p *Pool) makeHosts() error {
	seeded, err := p.db.SeedPool(xapidb.Seed{Hosts: p.o.Hosts, Address: p.o.addresses()})
	if err != nil {
		return err
	}
	p.ref = seeded.Ref
	for n, ref := range seeded.Hosts {
		h := Host{
			Name: xapidb.Value[string](p.db, "host", ref, "hostname"), UUID: xapidb.Value[string](p.db, "host", ref, "uuid"), Ref: ref,
			Addr: xapidb.Value[string](p.db, "host", ref, "address"), Dom0: seeded.Dom0[n],
		}
		p.linstor.AddNode(h.Name, h.Addr)
		p.linstor.AddPool(h.Name, p.group, p.providerKind(), p.o.PoolKiB)
		p.hosts = append(p.hosts, h)
		p.capacity[h.Name] = p.o.PoolKiB
	}
	return nil
}

func (p *Pool) providerKind() string {
	if p.o.Thick {
		return "LVM"
	}
	return "LVM_THIN"
}

func (p *Pool) provisioning() string {
	if p.o.Thick {
		return "thick"
	}
	return "thin"
}

// makeSR does what creating an SR does: two resource groups, LINSTOR's own database as a volume, the SR and its PBDs.
func (p *Pool) makeSR() error {
	if err := p.linstor.CreateGroup(p.group, p.group, p.o.Redundancy).Err(); err != nil {
		return err
	}
	if err := p.linstor.CreateGroup(p.haGroup, p.group, min(3, p.o.Hosts)).Err(); err != nil {
		return err
	}
	if err := p.makeDatabaseVolume(); err != nil {
		return err
	}
	ref, err := p.db.Create("SR", map[string]any{
		"name_label": p.o.SRName, "type": "linstor", "content_type": "user", "shared": true, "sm_config": map[string]string{"provisioning": p.provisioning()},
		"allowed_operations": []string{"unplug", "plug", "pbd_create", "update", "pbd_destroy", "vdi_resize", "vdi_clone", "scan", "vdi_snapshot", "vdi_create", "vdi_destroy"},
	})
	if err != nil {
		return err
	}
	p.sr, p.srUUID = ref, xapidb.Value[string](p.db, "SR", ref, "uuid")
	for i, h := range p.hosts {
		pbd, err := p.db.Create("PBD", map[string]any{"host": h.Ref, "SR": ref, "currently_attached": true, "device_config": map[string]string{
			"group-name": p.o.GroupName, "redundancy": strconv.Itoa(p.o.Redundancy), "provisioning": p.provisioning(),
		}})
		if err != nil {
			return err
		}
		p.hosts[i].PBD = pbd
	}
	if err := p.db.Set("pool", p.ref, "default_SR", ref); err != nil {
		return err
	}
	if err := p.linstor.KVSet(p.group, "xcp/sr/metadata", `{"name_label": "`+p.o.SRName+`", "name_description": ""}`).Err(); err != nil {
		return err
	}
	return p.pushStats(0)
}

// Hosts lists the hosts; the first was made the coordinator.
func (p *Pool) Hosts() []Host { return append([]Host(nil), p.hosts...) }

// Host finds a host by name; it panics on a name that the pool does not have, because the test is wrong then.
func (p *Pool) Host(name string) Host {
	for _, h := range p.hosts {
		if h.Name == name {
			return h
		}
	}
	panic("lab: no host " + name)
}

// Coordinator is XAPI's coordinator.
func (p *Pool) Coordinator() Host {
	ref := xapidb.Value[string](p.db, "pool", p.ref, "master")
	for _, h := range p.hosts {
		if h.Ref == ref {
			return h
		}
	}
	panic("lab: pool.master names no host")
}

// SR is the uuid of the SR.
func (p *Pool) SR() string { return p.srUUID }

// Group is the name of the SR's storage pool, resource group and KV instance in LINSTOR.
func (p *Pool) Group() string { return p.group }

// DB is XAPI's database.
func (p *Pool) DB() *xapidb.DB { return p.db }

// LINSTOR is the model of the LINSTOR cluster.
func (p *Pool) LINSTOR() *linstorsim.Cluster { return p.linstor }

// XAPI is the XAPI face, with its record of calls.
func (p *Pool) XAPI() *xapiface.Face { return p.xapi }

// Close ends what was served. The model itself needs no end.
func (p *Pool) Close() error {
	p.mu.Lock()
	for _, stop := range p.dying {
		stop()
	}
	s := p.serving
	p.serving = nil
	p.mu.Unlock()
	return closeAll(s, p.xapi)
}
