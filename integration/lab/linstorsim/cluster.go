// Package linstorsim is a deterministic model of a LINSTOR cluster: what its controller stores, what its satellites
// really have, and how the two differ. It has no I/O and no goroutines; package linstorface puts HTTP on it.
package linstorsim

import (
	"context"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Versions that the model can play; behaviour differs for toggle-disk.
const (
	Version133 = "1.33.1"
	Version134 = "1.34.0"
)

// DisklessPool is the pool that every node has for resources without a disk.
const DisklessPool = "DfltDisklessStorPool"

// DefaultGroup is the resource group of definitions that name none.
const DefaultGroup = "DfltRscGrp"

// Config of a Cluster. The zero value is usable: wall clock, fixed seed, version 1.33.1.
type Config struct {
	// Now is the owner's clock. Nil means time.Now.
	Now func() time.Time
	// Rand feeds uuids and secrets. Nil means a fixed seed.
	Rand *rand.Rand
	// Version is LINSTOR's version; "" means Version133.
	Version string
	// CacheInterval is the period of the controller's capacity refresh; 0 means LINSTOR's 180 s.
	CacheInterval time.Duration
	// SyncKiBPerSecond is the resync rate per storage pool; 0 means 100 MiB/s.
	SyncKiBPerSecond int64
	// EventLog bounds how many events are kept for late readers; 0 means 65536.
	EventLog int
}

// Phase of the controller process.
type Phase int

// Phases. Starting refuses connections like Down: LINSTOR opens its REST port last.
const (
	Up Phase = iota
	Down
	Starting
)

// Controller is the state of the LINSTOR controller process as its clients meet it.
type Controller struct {
	Phase   Phase
	Delay   time.Duration // added before each answer
	Version string
}

// Cluster is the model. All methods are safe for concurrent use; the order of calls alone decides the outcome.
type Cluster struct {
	mu      sync.Mutex
	cfg     Config
	ctl     Controller
	props   Props
	kvs     map[string]*kvStore
	nodes   map[string]*node
	poolDfn map[string]*poolDfn
	groups  map[string]*group
	rds     map[string]*definition
	conns   map[string]*connection
	cuts    map[[2]string]bool
	expect  map[string]bool

	nextPort  int
	nextMinor int
	held      bool // toggles stop while the satellites prepare

	last       time.Time
	sinceCache time.Duration

	events   []Event
	firstSeq uint64
	notify   chan struct{}
	rev      uint64
}

// New makes an empty cluster: the default resource group, the properties of a fresh database, no nodes.
func New(cfg Config) *Cluster {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.New(rand.NewPCG(1, 2))
	}
	if cfg.Version == "" {
		cfg.Version = Version133
	}
	if cfg.CacheInterval == 0 {
		cfg.CacheInterval = 180 * time.Second
	}
	if cfg.SyncKiBPerSecond == 0 {
		cfg.SyncKiBPerSecond = 100 << 10
	}
	if cfg.EventLog == 0 {
		cfg.EventLog = 1 << 16
	}
	c := &Cluster{
		cfg: cfg, ctl: Controller{Version: cfg.Version},
		kvs: map[string]*kvStore{}, nodes: map[string]*node{}, poolDfn: map[string]*poolDfn{},
		groups: map[string]*group{}, rds: map[string]*definition{}, conns: map[string]*connection{},
		cuts: map[[2]string]bool{}, expect: map[string]bool{},
		nextPort: 7000, nextMinor: 1000, last: cfg.Now(), notify: make(chan struct{}),
	}
	c.props = Props{
		"DrbdOptions/auto-add-quorum-tiebreaker": "True",
		"DrbdOptions/auto-diskful-allow-cleanup": "True",
		"DrbdOptions/auto-quorum":                "io-error",
		"DrbdOptions/auto-verify-algo-allowed-list": "crct10dif-pclmul;crct10dif-generic;crc32c-intel;" +
			"crc32c-generic;sha384-generic;sha512-generic;sha256-generic;md5-generic",
		"defaultDebugSslConnector": "DebugSslConnector",
		"defaultPlainConConnector": "PlainConnector",
		"defaultSslConnector":      "SslConnector",
	}
	c.groups[key(DefaultGroup)] = &group{name: DefaultGroup, uuid: c.newUUID(), vgs: map[int]*volumeGroup{},
		filter: SelectFilter{PlaceCount: ptr(2)}}
	return c
}

func (c *Cluster) now() time.Time { return c.cfg.Now() }

func key(name string) string { return strings.ToLower(name) }

func ptr[T any](v T) *T { return &v }

func (c *Cluster) newUUID() string {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:8], c.cfg.Rand.Uint64())
	binary.LittleEndian.PutUint64(b[8:], c.cfg.Rand.Uint64())
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return uuid.UUID(b).String()
}

func (c *Cluster) secret() string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	b := make([]byte, 20)
	for i := range b {
		b[i] = letters[c.cfg.Rand.IntN(len(letters))]
	}
	return string(b)
}

// lock takes the model for one operation; the returned func ends it and wakes the waiters when write is set.
func (c *Cluster) lock(write bool) func() {
	c.mu.Lock()
	return func() {
		if write {
			c.rev++
			close(c.notify)
			c.notify = make(chan struct{})
		}
		c.mu.Unlock()
	}
}

// Revision counts mutations; equal revisions mean an unchanged model.
func (c *Cluster) Revision() uint64 {
	defer c.lock(false)()
	return c.rev
}

// Changed returns a channel that is closed at the next mutation.
func (c *Cluster) Changed() <-chan struct{} {
	defer c.lock(false)()
	return c.notify
}

// Await returns nil once ok holds, looking again after every mutation, or the context's error.
func (c *Cluster) Await(ctx context.Context, ok func() bool) error {
	for {
		changed := c.Changed()
		if ok() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Controller returns the state of the controller process.
func (c *Cluster) Controller() Controller {
	defer c.lock(false)()
	return c.ctl
}

// SetController changes the state of the controller process; an empty Version keeps the present one. Going down cuts
// every event stream and forgets what was only in the controller's memory: cached capacities are read again from the
// satellites when it comes back.
func (c *Cluster) SetController(s Controller) {
	defer c.lock(true)()
	if s.Version == "" {
		s.Version = c.ctl.Version
	}
	cameUp := c.ctl.Phase != Up && s.Phase == Up
	c.ctl = s
	if s.Phase != Up {
		c.events = nil
	}
	if cameUp {
		c.refreshAll()
	}
}

// Is134 tells whether the version has the toggle-disk semantics and endpoints of 1.34.
func (c *Cluster) is134() bool { return atLeast(c.ctl.Version, 1, 34) }

func atLeast(version string, major, minor int) bool {
	var nums [2]int
	for i, part := range strings.SplitN(version, ".", 3) {
		if i > 1 {
			break
		}
		for _, r := range part {
			if r < '0' || r > '9' {
				break
			}
			nums[i] = nums[i]*10 + int(r-'0')
		}
	}
	return nums[0] > major || nums[0] == major && nums[1] >= minor
}

// Event is one message of LINSTOR's two event streams.
type Event struct {
	Stream string // "promotion" or "nodes"
	Name   string // may-promote-change, node-create, node-delete, node-evacuate, node-evicted, node-restored, node-modified
	Data   any    // MayPromote, NodeEvent or NodeModified
}

// MayPromote is the payload of may-promote-change; nil means unknown.
type MayPromote struct {
	ResourceName string `json:"resource_name"`
	NodeName     string `json:"node_name"`
	MayPromote   *bool  `json:"may_promote,omitempty"`
}

// NodeEvent is the payload of all node events but node-modified.
type NodeEvent struct {
	Node Node `json:"node"`
}

// NodeModified is the payload of node-modified. LINSTOR takes both after the change.
type NodeModified struct {
	OldNode Node `json:"old_node"`
	NewNode Node `json:"new_node"`
}

func (c *Cluster) emit(e Event) {
	if c.ctl.Phase != Up {
		return
	}
	c.events = append(c.events, e)
	c.firstSeq++
	if over := len(c.events) - c.cfg.EventLog; over > c.cfg.EventLog { // in large steps: deleting at the front moves all the rest
		c.events = slices.Delete(c.events, 0, over)
	}
}

// EventSeq is the position after the newest event.
func (c *Cluster) EventSeq() uint64 {
	defer c.lock(false)()
	return c.firstSeq
}

// Events returns the events after position seq, the position to go on from, and a channel that is closed at the next
// mutation. LINSTOR keeps no log: a reader that falls behind the bound simply misses events.
func (c *Cluster) Events(seq uint64) ([]Event, uint64, <-chan struct{}) {
	defer c.lock(false)()
	behind := min(c.firstSeq-min(seq, c.firstSeq), uint64(len(c.events)))
	return slices.Clone(c.events[uint64(len(c.events))-behind:]), c.firstSeq, c.notify
}

// BroadcastPromotion emits the present may_promote of every resource, which LINSTOR sends to every subscriber when
// one of them asks with `Last-Event-ID: current`.
func (c *Cluster) BroadcastPromotion() {
	defer c.lock(true)()
	for _, rd := range sorted(c.rds) {
		for _, r := range rd.places() {
			c.emit(Event{"promotion", "may-promote-change", MayPromote{rd.name, r.node.name, r.mayPromote}})
		}
	}
}

// sorted returns the values of m in key order.
func sorted[V any](m map[string]V) []V {
	out := make([]V, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}

// applyProps returns props with the change applied. It never edits its argument: records share it.
func applyProps(props Props, ch PropsChange) Props {
	out := maps.Clone(props)
	if out == nil {
		out = Props{}
	}
	for _, k := range ch.Delete {
		delete(out, strings.TrimPrefix(k, "/"))
	}
	for _, ns := range ch.DeleteNamespaces {
		prefix := strings.Trim(ns, "/") + "/"
		maps.DeleteFunc(out, func(k, _ string) bool { return strings.HasPrefix(k, prefix) })
	}
	for k, v := range ch.Override {
		out[strings.TrimPrefix(k, "/")] = v
	}
	return out
}

// ControllerProps returns the controller's properties.
func (c *Cluster) ControllerProps() Props {
	defer c.lock(false)()
	return c.props
}

// ModifyControllerProps changes the controller's properties.
func (c *Cluster) ModifyControllerProps(ch PropsChange) Reply {
	defer c.lock(true)()
	if r := c.checkKeys(ch, opModify|objCtrl); r != nil {
		return r
	}
	c.props = applyProps(c.props, ch)
	var out Reply
	for _, k := range slices.Sorted(maps.Keys(ch.Override)) {
		out = append(out, c.done(opModify, objCtrl, nil, "Successfully set property '%s' to value '%s'", k, ch.Override[k]))
	}
	for _, k := range slices.Concat(ch.Delete, ch.DeleteNamespaces) {
		out = append(out, c.done(opDelete, objCtrl, nil, "Successfully deleted property '%s'", k))
	}
	if len(out) == 0 {
		out = Reply{c.done(opModify, objCtrl, nil, "Controller properties unchanged")}
	}
	return out
}

// checkKeys refuses keys that LINSTOR's property container refuses: empty ones and ones over 256 characters, and
// values over 4096.
func (c *Cluster) checkKeys(ch PropsChange, opObj int64) Reply {
	for _, k := range slices.Sorted(maps.Keys(ch.Override)) {
		if k == "" || len(k) > 256 || strings.Contains(k, "//") || len(ch.Override[k]) > 4096 {
			return c.fail(CodeInvalidProp, opObj, "Invalid property key or value: '%.64s'", k)
		}
	}
	return nil
}

type kvStore struct {
	name  string
	props Props
}

// KVList returns all key-value store instances.
func (c *Cluster) KVList() []KeyValueStore {
	defer c.lock(false)()
	out := []KeyValueStore{}
	for _, s := range sorted(c.kvs) {
		out = append(out, KeyValueStore{s.name, s.props})
	}
	return out
}

// KVGet returns one instance and whether it exists.
func (c *Cluster) KVGet(instance string) (KeyValueStore, bool) {
	defer c.lock(false)()
	s, ok := c.kvs[key(instance)]
	if !ok {
		return KeyValueStore{}, false
	}
	return KeyValueStore{s.name, s.props}, true
}

// KVSet is KVModify for one key.
func (c *Cluster) KVSet(instance, k, v string) Reply {
	return c.KVModify(instance, PropsChange{Override: Props{k: v}})
}

// KVModify merges into an instance, creating it when needed; an instance that ends up empty is gone, as in LINSTOR.
func (c *Cluster) KVModify(instance string, ch PropsChange) Reply {
	defer c.lock(true)()
	if r := c.checkKeys(ch, opModify|objKVS); r != nil {
		return r
	}
	s := c.kvs[key(instance)]
	if s == nil {
		s = &kvStore{name: instance}
		c.kvs[key(instance)] = s
	}
	s.props = applyProps(s.props, ch)
	if len(s.props) == 0 {
		delete(c.kvs, key(instance))
	}
	return Reply{c.done(opModify, objKVS, map[string]string{"KVS": s.name}, "Successfully updated properties")}
}

// KVDelete removes an instance.
func (c *Cluster) KVDelete(instance string) Reply {
	defer c.lock(true)()
	s := c.kvs[key(instance)]
	if s == nil {
		return Reply{c.warn(CodeWarnNotFound, opDelete|objKVS, "KeyValueStore '%s' not found", instance)}
	}
	delete(c.kvs, key(instance))
	return Reply{c.done(opDelete, objKVS, map[string]string{"KVS": s.name}, "Successfully deleted KeyValueStore '%s'", s.name)}
}
