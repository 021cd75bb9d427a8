package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/bus"
)

const (
	cheapDeadline  = 5 * time.Second
	costlyDeadline = 15 * time.Second
	hintsKept      = 256
)

// LINSTORSource is where LINSTOR's objects come from. *linstor.Client is one.
type LINSTORSource interface {
	Nodes(ctx context.Context) ([]linstor.Node, error)
	StoragePools(ctx context.Context, q linstor.PoolQuery) ([]linstor.StoragePool, error)
	Definitions(ctx context.Context, withVolumes bool) ([]linstor.Definition, error)
	EachResource(ctx context.Context, q linstor.ViewQuery, begin func(), each func(linstor.Resource)) error
	Events(ctx context.Context, stream linstor.Stream, h linstor.Handler) error
}

var _ LINSTORSource = (*linstor.Client)(nil)

// LINSTOROptions say what the LINSTOR feed does.
type LINSTOROptions struct {
	Wire   bus.Wire      // Required.
	Source LINSTORSource // Required.
	// Coordinator: the feed publishes only while it holds. Required.
	Coordinator Fact
	// Host is this host's uuid; it becomes part of the events' source.
	Host string
	// Log defaults to slog.Default().
	Log *slog.Logger
}

// LINSTOR publishes the tables linstor.node, linstor.pool, linstor.definition and linstor.resource. LINSTOR tells almost
// nothing by itself: see DESIGN.md for what is asked when.
type LINSTOR struct {
	opts  LINSTOROptions
	hints chan hint
}

// hint is a reason to look sooner.
type hint struct {
	resource    string // Read this resource again.
	all         bool   // Read all resources again.
	definitions bool   // Read the definitions again.
	nodes       bool   // Read the nodes again.
	growth      bool   // Thin volumes may grow now.
}

// NewLINSTOR prepares the feed. It panics when a required option is missing, which is a programming error.
func NewLINSTOR(o LINSTOROptions) *LINSTOR {
	if o.Wire == nil || o.Source == nil || o.Coordinator.Holds == nil {
		panic("feed.NewLINSTOR: Wire, Source and Coordinator are required")
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &LINSTOR{opts: o, hints: make(chan hint, hintsKept)}
}

// Run publishes until ctx ends.
func (f *LINSTOR) Run(ctx context.Context) { f.opts.Coordinator.during(ctx, f.session) }

// HintXAPI tells the feed of a change in XAPI; give it to XAPIOptions.OnChange. A disk that appears or goes changes LINSTOR's
// definitions; a disk that is plugged (which is what a VM's start is) will be written to. Changes of existing VDIs say
// nothing: most of them are our own corrections of sizes.
func (f *LINSTOR) HintXAPI(c XAPIChange) {
	switch {
	case c.Class == "vbd":
		f.hint(hint{growth: true})
	case c.Class == "vdi" && (c.Added || c.Deleted):
		f.hint(hint{growth: true, definitions: true, all: true})
	}
}

// Hint asks to read one LINSTOR resource again, for example because DRBD said something about it.
func (f *LINSTOR) Hint(resource string) { f.hint(hint{resource: resource, growth: true}) }

// hint never blocks. Hints that do not fit are lost, which costs the time until the next regular poll.
func (f *LINSTOR) hint(h hint) {
	select {
	case f.hints <- h:
	default:
	}
}

// linstorSession is the feed while this host is the coordinator.
type linstorSession struct {
	feed  *LINSTOR
	log   *slog.Logger
	state pollState

	nodes       *bus.Table[linstor.Node]
	pools       *bus.Table[Pool]
	definitions *bus.Table[linstor.Definition]
	resources   *bus.Table[json.RawMessage] // Encoded while they are read: a large pool's resources are never held decoded.

	pool    map[string]Pool   // What linstor.pool holds, with the newest capacities.
	cached  map[string]Pool   // What the controller's cache said last.
	status  map[string]string // Connection status by node.
	defined map[string]bool
	viewed  time.Time // When all resources were read last.

	results chan result
	wg      sync.WaitGroup
}

type result struct {
	call      call
	began     time.Time
	took      time.Duration
	waited    time.Duration // The part of took until the answer began.
	err       error
	asked     []string // For callResources the resources, for callView the nodes; no nodes means all.
	nodes     []linstor.Node
	pools     []linstor.StoragePool
	defs      []linstor.Definition
	resources map[string]json.RawMessage // Rows of linstor.resource.
	doubtful  map[string]bool            // Nodes that give no believable size of some volume.
}

func (f *LINSTOR) session(ctx context.Context) {
	s := &linstorSession{
		feed: f, log: f.opts.Log, state: pollState{probeEvery: probeFast, grew: time.Now()}, results: make(chan result, lanes),
		pool: map[string]Pool{}, cached: map[string]Pool{}, status: map[string]string{}, defined: map[string]bool{},
	}
	if err := s.open(); err != nil {
		s.log.Warn("publish LINSTOR", "err", err)
		return
	}
	s.log.Info("publishing LINSTOR", "host", f.opts.Host)
	s.wg.Go(func() { s.listen(ctx, linstor.StreamPromotion) })
	s.wg.Go(func() { s.listen(ctx, linstor.StreamNodes) })
	s.loop(ctx)
	s.wg.Wait()
	s.close()
	s.log.Info("no longer publishing LINSTOR", "host", f.opts.Host)
}

func (s *linstorSession) open() (err error) {
	o := bus.TableOptions{Source: source(s.feed.opts.Host), Log: s.log}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.nodes, err = bus.NewTable[linstor.Node](s.feed.opts.Wire, bus.LINSTORTable("node"), o); err != nil {
		return err
	}
	if s.pools, err = bus.NewTable[Pool](s.feed.opts.Wire, bus.LINSTORTable("pool"), o); err != nil {
		return err
	}
	if s.definitions, err = bus.NewTable[linstor.Definition](s.feed.opts.Wire, bus.LINSTORTable("definition"), o); err != nil {
		return err
	}
	s.resources, err = bus.NewTable[json.RawMessage](s.feed.opts.Wire, bus.LINSTORTable("resource"), o)
	return err
}

func (s *linstorSession) close() {
	if s.nodes != nil {
		s.nodes.Close()
	}
	if s.pools != nil {
		s.pools.Close()
	}
	if s.definitions != nil {
		s.definitions.Close()
	}
	if s.resources != nil {
		s.resources.Close()
	}
}

// listen turns a stream's events into hints. The promotion stream repeats everything whenever somebody subscribes, so
// only changes count.
func (s *linstorSession) listen(ctx context.Context, stream linstor.Stream) {
	known := map[string]string{}
	h := linstor.Handler{
		Connected: func(string) { s.feed.hint(hint{all: true, nodes: true}) },
		Event: func(e linstor.Event) {
			p := e.MayPromote
			if p == nil {
				s.feed.hint(hint{nodes: true, all: true})
				return
			}
			key, now := p.Resource+"/"+p.Node, triState(p.MayPromote)
			if known[key] != now {
				known[key] = now
				s.feed.hint(hint{resource: p.Resource, growth: true})
			}
		},
	}
	if err := s.feed.opts.Source.Events(ctx, stream, h); err != nil && ctx.Err() == nil {
		s.log.Warn("listen to LINSTOR", "stream", string(stream), "err", err)
	}
}

func triState(b *bool) string {
	switch {
	case b == nil:
		return "unknown"
	case *b:
		return "yes"
	}
	return "no"
}

func (s *linstorSession) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-s.results:
			s.absorb(r)
		case h := <-s.feed.hints:
			s.take(time.Now(), h)
		case <-timer.C:
		}
		due, wait := nextPoll(time.Now(), &s.state)
		for _, c := range due {
			s.begin(ctx, c)
		}
		timer.Reset(wait)
	}
}

func (s *linstorSession) take(now time.Time, h hint) {
	if h.growth {
		s.state.growing(now)
	}
	if h.definitions {
		s.state.dirtyDefinitions = true
	}
	if h.nodes {
		s.state.last[callNodes].began = time.Time{}
	}
	if h.all {
		s.state.markAll()
	}
	if h.resource != "" {
		if !s.defined[h.resource] {
			s.state.dirtyDefinitions = true
		}
		s.state.mark(now, h.resource)
	}
}

// begin makes one call in the background. What asked for it is forgotten now, so that a hint that comes during the call
// leads to another.
func (s *linstorSession) begin(ctx context.Context, c call) {
	s.state.busy[c.lane()] = true
	r := result{call: c, began: time.Now()}
	switch c {
	case callDefinitions:
		s.state.dirtyDefinitions = false
	case callView:
		if !s.state.dirtyAll && r.began.Sub(s.viewed) < viewEvery {
			r.asked = slices.Sorted(maps.Keys(s.state.dirtyNodes))
		}
		if len(r.asked) == 0 {
			s.viewed = r.began
			s.state.markAll()
			s.state.dirtyAll = false
		}
		clear(s.state.dirtyNodes)
	case callResources:
		r.asked = slices.Sorted(maps.Keys(s.state.dirty))
		clear(s.state.dirty)
	}
	s.wg.Go(func() {
		limit := costlyDeadline
		if c.lane() == laneCheap {
			limit = cheapDeadline
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		// The satellites have done their work when the answer begins; the rest is our own.
		var answered atomic.Int64
		s.ask(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotFirstResponseByte: func() { answered.Store(int64(time.Since(r.began))) }}), &r)
		r.took = time.Since(r.began)
		if r.waited = time.Duration(answered.Load()); r.waited == 0 {
			r.waited = r.took
		}
		s.results <- r
	})
}

func (s *linstorSession) ask(ctx context.Context, r *result) {
	src := s.feed.opts.Source
	switch r.call {
	case callPools:
		r.pools, r.err = src.StoragePools(ctx, linstor.PoolQuery{Cached: true})
	case callNodes:
		r.nodes, r.err = src.Nodes(ctx)
	case callDefinitions:
		r.defs, r.err = src.Definitions(ctx, true)
	case callProbe:
		r.pools, r.err = src.StoragePools(ctx, linstor.PoolQuery{})
	case callResources:
		r.err = r.readResources(ctx, src, linstor.ViewQuery{Resources: r.asked})
	case callView:
		r.err = r.readResources(ctx, src, linstor.ViewQuery{Nodes: r.asked})
	}
	if r.err != nil {
		r.err = fmt.Errorf("read LINSTOR %s: %w", r.call, r.err)
	}
}

// absorb takes a result into the tables and the state.
func (s *linstorSession) absorb(r result) {
	now := r.began.Add(r.took)
	s.state.busy[r.call.lane()] = false
	last := &s.state.last[r.call]
	last.began, last.took, last.waited = r.began, r.took, r.waited
	s.log.Debug("asked LINSTOR", "call", r.call.String(), "of", len(r.asked), "took", r.took, "waited", r.waited, "err", r.err)
	if r.err != nil {
		last.failures++
		s.failed(now, r)
		return
	}
	last.failures = 0
	if r.call.lane() == laneCheap {
		s.present()
	}
	switch r.call {
	case callPools:
		s.absorbCached(now, r.pools)
	case callNodes:
		s.absorbNodes(r.nodes)
	case callDefinitions:
		s.absorbDefinitions(now, r.defs)
	case callProbe:
		s.absorbProbe(now, r.pools)
	case callResources:
		s.absorbSome(r, func(name, _ string) bool { return slices.Contains(r.asked, name) })
	case callView:
		s.absorbView(r)
	}
}

// failed makes stale what can no longer be vouched for.
func (s *linstorSession) failed(now time.Time, r result) {
	why := r.err.Error()
	switch r.call {
	case callPools, callNodes, callDefinitions:
		s.state.away++
		wait := min(awayLast, awayFirst<<min(s.state.away-1, 10))
		s.state.retryAt = now.Add(wait/2 + rand.N(wait/2))
		s.nodes.SetStale(why)
		s.pools.SetStale(why)
		s.definitions.SetStale(why)
		s.resources.SetStale(why)
		if s.state.away == 1 {
			s.log.Warn("LINSTOR is away", "err", r.err)
		}
	case callProbe:
		s.pools.SetStale(why)
	case callView, callResources:
		s.state.dirtyAll = true
		s.resources.SetStale(why)
	}
	if r.call == callDefinitions {
		s.state.dirtyDefinitions = true
	}
}

// present ends an absence: everything is read again before its table is fresh again.
func (s *linstorSession) present() {
	if s.state.away == 0 {
		return
	}
	s.log.Info("LINSTOR is back", "failures", s.state.away)
	s.state.away = 0
	s.state.last = [calls]stamp{}
	s.state.dirtyDefinitions = true
	s.state.markAll()
}

// absorbCached takes what the controller remembers. Its capacities may be three minutes old, so they count only when
// the controller changed its mind, and for pools that are new; a probe then tells the truth.
func (s *linstorSession) absorbCached(now time.Time, list []linstor.StoragePool) {
	next, cached := make(map[string]Pool, len(list)), make(map[string]Pool, len(list))
	moved := false
	for _, p := range list {
		if p.Diskless {
			continue
		}
		row, key := poolRow(p), poolKey(p)
		cached[key] = row
		have, known := s.pool[key]
		was, seen := s.cached[key]
		if known && seen && sameKiB(was.FreeKiB, row.FreeKiB) && sameKiB(was.TotalKiB, row.TotalKiB) {
			row.FreeKiB, row.TotalKiB = have.FreeKiB, have.TotalKiB
		} else if seen {
			moved = true
			s.state.markNode(p.Node)
		}
		next[key] = row
	}
	if len(next) != len(s.pool) {
		moved = true
		s.state.markAll()
	}
	s.pool, s.cached = next, cached
	if moved {
		s.state.growing(now)
		s.state.dirtyDefinitions = true
	}
	s.publishPools(s.state.last[callProbe].ok())
}

// ok tells whether the last call of this kind succeeded.
func (t stamp) ok() bool { return !t.began.IsZero() && t.failures == 0 }

// absorbProbe takes what the satellites say.
func (s *linstorSession) absorbProbe(now time.Time, list []linstor.StoragePool) {
	next := make(map[string]Pool, len(list))
	grown := false
	s.state.thin = false
	for _, p := range list {
		if p.Diskless {
			continue
		}
		row, key := poolRow(p), poolKey(p)
		next[key] = row
		s.state.thin = s.state.thin || thin(row.Provider)
		if have, known := s.pool[key]; known && !sameKiB(have.FreeKiB, row.FreeKiB) {
			grown = true
			s.state.markNode(p.Node)
		}
	}
	s.pool = next
	s.state.probed(now, grown)
	s.publishPools(true)
}

func (s *linstorSession) publishPools(fresh bool) {
	if fresh {
		s.replaced("pool", replace(s.pools, maps.Clone(s.pool)))
		return
	}
	for key, row := range s.pool {
		if _, err := s.pools.Put(key, row); err != nil {
			s.log.Warn("publish LINSTOR pool", "err", err)
		}
	}
}

func sameKiB(a, b *int64) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func (s *linstorSession) absorbNodes(list []linstor.Node) {
	rows, status := make(map[string]linstor.Node, len(list)), make(map[string]string, len(list))
	for _, n := range list {
		rows[n.Name] = nodeRow(n)
		status[n.Name] = n.ConnectionStatus
	}
	if len(s.status) > 0 && !maps.Equal(status, s.status) {
		s.state.markAll()
		s.state.last[callProbe].began = time.Time{} // Capacities come and go with their node.
	}
	s.status = status
	s.replaced("node", replace(s.nodes, rows))
}

func (s *linstorSession) absorbDefinitions(now time.Time, list []linstor.Definition) {
	rows, defined := make(map[string]linstor.Definition, len(list)), make(map[string]bool, len(list))
	for _, d := range list {
		rows[d.Name] = definitionRow(d)
		defined[d.Name] = true
	}
	for name := range defined {
		if !s.defined[name] {
			s.state.mark(now, name)
		}
	}
	for name := range s.defined {
		if !defined[name] {
			s.state.mark(now, name)
		}
	}
	s.defined = defined
	s.replaced("definition", replace(s.definitions, rows))
}

// readResources encodes the rows as they come.
func (r *result) readResources(ctx context.Context, src LINSTORSource, q linstor.ViewQuery) error {
	var failed error
	begin := func() { r.resources, r.doubtful, failed = map[string]json.RawMessage{}, map[string]bool{}, nil }
	begin() // A source that has nothing may never call it.
	err := src.EachResource(ctx, q, begin, func(res linstor.Resource) {
		raw, err := json.Marshal(resourceRow(res))
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("encode resource %s: %w", res.Name, err))
			return
		}
		r.resources[resourceKey(res)] = raw
		if slices.ContainsFunc(res.Volumes, func(v linstor.Volume) bool {
			return v.Provider != linstor.ProviderDiskless && (v.AllocatedKiB == nil || *v.AllocatedKiB < 0)
		}) {
			r.doubtful[res.Node] = true
		}
	})
	return errors.Join(err, failed)
}

// absorbView takes the view of all resources, or of all on some nodes.
func (s *linstorSession) absorbView(r result) {
	if len(r.asked) > 0 {
		s.absorbSome(r, func(_, node string) bool { return slices.Contains(r.asked, node) })
		return
	}
	s.state.doubtful = s.doubtful(r)
	s.replaced("resource", replace(s.resources, r.resources))
}

// doubtful tells whether an online satellite gives no believable size of some volume. No event tells when that ends.
func (s *linstorSession) doubtful(r result) bool {
	for node := range r.doubtful {
		if s.status[node] == linstor.StatusOnline {
			return true
		}
	}
	return false
}

// absorbSome takes a view of the part of the resources for which within is true. What the view leaves out is gone from that part.
func (s *linstorSession) absorbSome(r result, within func(name, node string) bool) {
	s.state.doubtful = s.state.doubtful || s.doubtful(r)
	for key, row := range r.resources {
		if name, node, _ := strings.Cut(key, "/"); !within(name, node) {
			continue
		}
		if _, err := s.resources.Put(key, row); err != nil {
			s.replaced("resource", err)
			return
		}
	}
	for _, key := range s.resources.Keys() {
		name, node, _ := strings.Cut(key, "/")
		if _, seen := r.resources[key]; within(name, node) && !seen {
			s.resources.Delete(key)
		}
	}
}

func replace[T any](t *bus.Table[T], rows map[string]T) error {
	_, err := t.Replace(rows)
	return err
}

func (s *linstorSession) replaced(kind string, err error) {
	var rows *bus.RowsError
	switch {
	case err == nil:
	case errors.As(err, &rows):
		s.log.Warn("publish LINSTOR objects", "kind", kind, "objects", len(rows.Rows), "err", err)
	default:
		s.log.Warn("publish LINSTOR", "kind", kind, "err", err)
	}
}
