package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	bufferedChanges = 20000           // Changes kept while a list is under way; more means: list again.
	bufferedBytes   = 16 << 20        // The same in bytes.
	pageTimeout     = 5 * time.Second // One page of a list.
	firstRetry      = 250 * time.Millisecond
	lastRetry       = 30 * time.Second       // Between two lists while nobody answers.
	signRetry       = time.Second            // Between two lists while a publisher is heard.
	herdSpread      = 100 * time.Millisecond // All mirrors of a pool hear of a new publisher at once.
)

// Freshness says whether a mirror may be believed.
type Freshness struct {
	// Fresh: the mirror equals what the publisher had at most a few seconds ago, and the publisher itself believes it.
	Fresh bool
	// Reason is why it is not fresh, in words for an operator.
	Reason string
	// Since is when it became fresh or stale.
	Since time.Time
	// Epoch and Seq are the publisher's run and the change that the contents include. 0, 0 before the first list.
	Epoch, Seq uint64
}

// MirrorOptions are the optional parts of a mirror.
type MirrorOptions[T any] struct {
	// Project makes of one value what the mirror keeps; keep=false drops the key. Raw is only valid during the call.
	// Default: the value is decoded as JSON into T. An error makes the mirror stale as long as the key has that value.
	Project func(key string, raw json.RawMessage) (v T, keep bool, err error)
	// Alive must equal the publisher's. Default DefaultAlive. Three missed signs of life make the mirror stale.
	Alive time.Duration
	// Log gets lists and losses at debug level. Default: nothing is logged.
	Log *slog.Logger
}

// Mirror is the consuming side of a Table: a copy of what Project keeps, followed change by change. It subscribes, lists,
// and then applies changes in sequence. Any hole, a new epoch or three missed signs of life make it Stale, with
// the reason, until a new list succeeds; it keeps the last contents meanwhile. Duplicates do nothing.
//
// Promised: contents are always those of one sequence of one publisher, never a mixture; when Fresh, at most three signs of
// life behind. Not promised: that each intermediate value is seen, or that two mirrors change together.
type Mirror[T any] struct {
	wire Wire
	spec Spec
	opts MirrorOptions[T]

	cancel  context.CancelFunc
	stop    func()
	wg      sync.WaitGroup
	kick    chan struct{}
	changed chan struct{}

	mu    sync.Mutex
	rows  map[string]T
	bad   map[string]error // Keys whose value Project refused.
	fresh Freshness
	turn  chan struct{} // Closed and replaced when freshness turns.

	epoch, seq     uint64
	following      bool
	publisherStale string // What the publisher says about itself.
	lost           string // Why we are not following.
	sign           time.Time
	prefer         uint64 // Epoch to ask first; 0 for any.

	listing  bool
	buffer   []change
	bytes    int
	overflow bool

	nextList time.Time
	lastList time.Time
	failures int
}

type change struct {
	tableHeader
	data []byte
}

// NewMirror subscribes and begins to list in the background; it does not wait for anything. The mirror is Stale until the
// first list succeeded. Close it when done.
func NewMirror[T any](w Wire, spec Spec, o MirrorOptions[T]) (*Mirror[T], error) {
	if o.Project == nil {
		o.Project = func(_ string, raw json.RawMessage) (v T, keep bool, err error) {
			err = json.Unmarshal(raw, &v)
			return v, true, err
		}
	}
	if o.Alive <= 0 {
		o.Alive = DefaultAlive
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	now := time.Now()
	m := &Mirror[T]{
		wire: w, spec: spec, opts: o, cancel: cancel,
		kick: make(chan struct{}, 1), changed: make(chan struct{}, 1), turn: make(chan struct{}),
		rows: map[string]T{}, bad: map[string]error{}, lost: "not listed yet", nextList: now,
		fresh: Freshness{Reason: "not listed yet", Since: now},
	}
	stop, err := w.Subscribe(m.receive, string(spec.Pattern), spec.control())
	if err != nil {
		cancel()
		return nil, fmt.Errorf("mirror table %s: %w", spec.Name, err)
	}
	m.stop = stop
	m.wg.Go(func() { m.run(ctx) })
	return m, nil
}

// Close ends the mirror. Its contents stay readable and become stale. It may be called more than once.
func (m *Mirror[T]) Close() {
	m.cancel()
	m.stop()
	m.wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lose("the mirror is closed")
}

// Get is the value of one key. Look at Freshness before believing it, or its absence.
func (m *Mirror[T]) Get(key string) (T, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.rows[key]
	return v, ok
}

// Len is the number of keys that are kept.
func (m *Mirror[T]) Len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.rows)
}

// Snapshot is a copy of all keys at one sequence, and how far to believe it.
func (m *Mirror[T]) Snapshot() (map[string]T, Freshness) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.rows), m.fresh
}

// Each calls fn for all keys at one sequence, in no order, until it returns false. It copies nothing; fn must be short
// and must not call the mirror.
func (m *Mirror[T]) Each(fn func(key string, v T) bool) Freshness {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, v := range m.rows {
		if !fn(k, v) {
			break
		}
	}
	return m.fresh
}

// Freshness says whether the mirror may be believed now.
func (m *Mirror[T]) Freshness() Freshness {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fresh
}

// Changed has something to receive after contents or freshness changed. Many changes may be one notification. There is one
// channel: for several readers, fan out yourself.
func (m *Mirror[T]) Changed() <-chan struct{} { return m.changed }

// WaitFresh waits until the mirror is fresh. The error is ctx's, with the reason for the staleness.
func (m *Mirror[T]) WaitFresh(ctx context.Context) error {
	for {
		m.mu.Lock()
		f, turn := m.fresh, m.turn
		m.mu.Unlock()
		if f.Fresh {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for table %s: %s: %w", m.spec.Name, f.Reason, ctx.Err())
		case <-turn:
		}
	}
}

// receive takes one message of the table.
func (m *Mirror[T]) receive(msg *Message) {
	h, err := decodeTableHeader(m.spec.Name, msg.Header)
	if err != nil {
		m.opts.Log.Debug("ignore message on a table's subject", "table", m.spec.Name, "err", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.listing:
		m.hold(change{tableHeader: h, data: msg.Data})
	case !m.following:
		m.heard(h.epoch)
	default:
		m.follow(change{tableHeader: h, data: msg.Data})
	}
}

// hold keeps a change until the list under way is complete.
func (m *Mirror[T]) hold(c change) {
	if m.overflow {
		return
	}
	m.bytes += len(c.data) + len(c.key)
	if len(m.buffer) >= bufferedChanges || m.bytes > bufferedBytes {
		m.overflow, m.buffer = true, nil
		return
	}
	m.buffer = append(m.buffer, c)
}

// heard brings the next list forward because a publisher lives.
func (m *Mirror[T]) heard(epoch uint64) {
	m.prefer = max(m.prefer, epoch)
	soon := m.lastList.Add(signRetry).Add(time.Duration(rand.Float64() * float64(firstRetry)))
	if soon.Before(m.nextList) {
		m.nextList = soon
		m.poke()
	}
}

// follow applies one message while nothing is missing.
func (m *Mirror[T]) follow(c change) {
	switch {
	case c.epoch > m.epoch:
		m.prefer = c.epoch
		m.relist("another publisher took over", rand.N(herdSpread))
		return
	case c.epoch < m.epoch:
		// The predecessor of ours, still talking. If ours dies we will hear that and ask anybody.
		return
	}
	switch {
	case c.kind == kindAlive && c.seq == m.seq:
		m.sign = time.Now()
	case c.kind == kindAlive && c.seq > m.seq, c.seq > m.seq+1:
		m.relist(fmt.Sprintf("changes %d to %d were lost", m.seq+1, c.seq), 0)
	case c.seq == m.seq+1 && c.kind != kindAlive:
		m.sign = time.Now()
		m.apply(c)
	}
}

// apply takes the change whose turn it is.
func (m *Mirror[T]) apply(c change) {
	m.seq = c.seq
	m.publisherStale = c.stale
	switch c.kind {
	case kindPut:
		m.project(m.rows, m.bad, c.key, c.data)
	case kindDelete:
		delete(m.rows, c.key)
		delete(m.bad, c.key)
	case kindReset:
		m.relist("the publisher began anew", rand.N(herdSpread))
		return
	}
	m.judge()
	m.notify()
}

func (m *Mirror[T]) project(rows map[string]T, bad map[string]error, key string, raw []byte) {
	v, keep, err := m.opts.Project(key, raw)
	delete(bad, key)
	switch {
	case err != nil:
		delete(rows, key)
		bad[key] = err
	case keep:
		rows[key] = v
	default:
		delete(rows, key)
	}
}

// lose stops following.
func (m *Mirror[T]) lose(why string) {
	m.following, m.lost = false, why
	m.judge()
	m.notify()
}

// relist stops following and lists after the delay.
func (m *Mirror[T]) relist(why string, after time.Duration) {
	m.lose(why)
	m.failures = 0
	m.nextList = time.Now().Add(after)
	m.poke()
}

// judge works out Freshness from the rest of the state.
func (m *Mirror[T]) judge() {
	next := Freshness{Epoch: m.epoch, Seq: m.seq, Since: m.fresh.Since}
	switch {
	case !m.following:
		next.Reason = m.lost
	case m.publisherStale != "":
		next.Reason = "the publisher says: " + m.publisherStale
	case len(m.bad) > 0:
		key := slices.Min(slices.Collect(maps.Keys(m.bad)))
		next.Reason = fmt.Sprintf("cannot read %s %s: %v", m.spec.Name, key, m.bad[key])
	default:
		next.Fresh = true
	}
	turned := next.Fresh != m.fresh.Fresh
	if turned {
		next.Since = time.Now()
	}
	m.fresh = next
	if turned {
		close(m.turn)
		m.turn = make(chan struct{})
	}
}

func (m *Mirror[T]) notify() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

func (m *Mirror[T]) poke() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// run lists when it is time and watches for the publisher's silence.
func (m *Mirror[T]) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.kick:
		case <-timer.C:
		}
		timer.Reset(m.step(ctx, time.Now()))
	}
}

// step does what is due and returns the time until the next look.
func (m *Mirror[T]) step(ctx context.Context, now time.Time) time.Duration {
	m.mu.Lock()
	silence := 3 * m.opts.Alive
	if m.following && now.Sub(m.sign) >= silence {
		m.prefer = 0
		m.relist(fmt.Sprintf("no sign of life from the publisher for %s", silence), 0)
	}
	due := !m.following && !now.Before(m.nextList)
	m.mu.Unlock()
	if due {
		m.list(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.following {
		return max(0, time.Until(m.sign.Add(silence)))
	}
	return max(0, time.Until(m.nextList))
}

// list takes a new copy, then the changes that came meanwhile.
func (m *Mirror[T]) list(ctx context.Context) {
	m.mu.Lock()
	m.listing, m.overflow, m.buffer, m.bytes = true, false, nil, 0
	prefer := m.prefer
	m.mu.Unlock()

	c, err := m.fetch(ctx, prefer)

	m.mu.Lock()
	defer m.mu.Unlock()
	held, overflow := m.buffer, m.overflow
	m.listing, m.buffer, m.overflow, m.lastList = false, nil, false, time.Now()
	if err == nil && overflow {
		err = errors.New("too many changes came while listing")
	}
	if err != nil {
		m.failed(err)
		return
	}
	m.rows, m.bad, m.epoch, m.seq, m.publisherStale = c.rows, c.bad, c.epoch, c.seq, c.stale
	m.prefer, m.failures, m.following, m.sign = c.epoch, 0, true, m.lastList
	m.catchUp(held)
	m.judge()
	m.notify()
}

// catchUp applies what was held back, in the order of its numbers. Each step may stop following and ask for another list.
func (m *Mirror[T]) catchUp(held []change) {
	slices.SortStableFunc(held, func(a, b change) int {
		return cmp.Or(cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.seq, b.seq))
	})
	for _, c := range held {
		if !m.following {
			return
		}
		m.follow(c)
	}
}

func (m *Mirror[T]) failed(err error) {
	m.prefer = 0 // Whoever we asked does not answer; next time ask anybody.
	wait := min(lastRetry, firstRetry<<min(m.failures, 10))
	m.failures++
	wait = wait/2 + time.Duration(rand.Float64()*float64(wait))
	m.nextList = m.lastList.Add(wait)
	m.opts.Log.Debug("list table", "table", m.spec.Name, "err", err)
	if m.lost == "" || m.epoch == 0 {
		m.lost = err.Error()
	}
	m.lose(m.lost)
}

// contents is a complete list.
type contents[T any] struct {
	epoch, seq uint64
	stale      string
	rows       map[string]T
	bad        map[string]error
}

func (m *Mirror[T]) fetch(ctx context.Context, prefer uint64) (contents[T], error) {
	c := contents[T]{rows: map[string]T{}, bad: map[string]error{}}
	var req listRequest
	for {
		h, data, err := m.ask(ctx, prefer, req)
		if err != nil {
			return c, err
		}
		if req.Page == 0 {
			c.epoch, c.seq, c.stale = h.epoch, h.seq, h.stale
			prefer, req.List = h.epoch, h.list
		}
		if h.epoch != c.epoch || h.seq != c.seq || h.page != req.Page {
			return c, fmt.Errorf("list table %s: pages do not belong together", m.spec.Name)
		}
		if err := m.take(c, data); err != nil {
			return c, err
		}
		if req.Page++; req.Page >= h.pages {
			return c, nil
		}
	}
}

func (m *Mirror[T]) ask(ctx context.Context, epoch uint64, req listRequest) (tableHeader, []byte, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return tableHeader{}, nil, fmt.Errorf("encode list request: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, pageTimeout)
	defer cancel()
	reply, err := m.wire.Request(ctx, &Message{Subject: m.spec.list(epoch), Data: body})
	if errors.Is(err, ErrNoResponder) {
		return tableHeader{}, nil, fmt.Errorf("list table %s: no feed publishes it", m.spec.Name)
	}
	if err != nil {
		return tableHeader{}, nil, fmt.Errorf("list table %s: %w", m.spec.Name, err)
	}
	h, err := decodeTableHeader(m.spec.Name, reply.Header)
	if err != nil {
		return h, nil, err
	}
	if h.kind != kindPage {
		return h, nil, fmt.Errorf("list table %s: the publisher refused: %s", m.spec.Name, h.stale)
	}
	return h, reply.Data, nil
}

// take projects one page.
func (m *Mirror[T]) take(c contents[T], data []byte) error {
	var page []struct {
		Key  string          `json:"key"`
		Data json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(data, &page); err != nil {
		return fmt.Errorf("list table %s: page: %w", m.spec.Name, err)
	}
	for _, row := range page {
		m.project(c.rows, c.bad, row.Key, row.Data)
	}
	return nil
}
