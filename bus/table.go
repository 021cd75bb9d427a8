package bus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// DefaultAlive is how often a table says that its publisher lives. A mirror that missed three of them is stale.
const DefaultAlive = 2 * time.Second

const (
	pageTarget     = 128 << 10 // Bytes of one page of a list: small enough that many lists at once need little memory.
	rowOverhead    = 32        // Bytes that a row in a page takes besides key and value, and then some.
	headerReserve  = 4 << 10   // Bytes kept free below the wire's limit for headers.
	snapshotsKept  = 64        // Lists under way at once, counted per sequence.
	snapshotExpiry = 30 * time.Second
)

// ErrTooLarge says that a value does not fit into one message. The table keeps the value that it had before.
var ErrTooLarge = errors.New("value does not fit into one message")

// TableOptions are the optional parts of a table.
type TableOptions struct {
	// Source is the CloudEvents source of the changes, for example "/xostor/<host uuid>/feed". Default "/xostor".
	Source string
	// Alive is the time between two signs of life. Default DefaultAlive. Mirrors must use the same.
	Alive time.Duration
	// Log gets what the table cannot return. Default: nothing is logged.
	Log *slog.Logger
	// Epoch tells this run of the publisher from all others. Default: the time in microseconds and 12 random bits, so
	// that of two publishers mirrors prefer the younger.
	Epoch uint64
}

// Diff counts what a Replace changed.
type Diff struct{ Added, Changed, Deleted int }

// Table is the publishing side of a piece of pool state: a set of keys with JSON values. It publishes each change as an
// event with the table's epoch and the next sequence number, answers list requests (in pages, consistent at one
// sequence while changes go on) and says every few seconds that it lives. Writing a value that is already there
// publishes nothing.
//
// A new table is stale ("not filled yet") until the first Replace or SetFresh. All methods may be called at any time
// from any goroutine. None waits for the network.
type Table[T any] struct {
	wire  Wire
	spec  Spec
	opts  TableOptions
	limit int // Bytes of one value.

	mu        sync.Mutex
	seq       uint64
	rows      map[string][]byte // Compact JSON, never changed in place: lists share the bytes.
	stale     string            // Why the publisher itself doubts the rows; "" while they are good.
	filled    bool
	snapshots map[uint64]*snapshot // By sequence.
	closed    bool

	stops []func()
	done  chan struct{}
	wg    sync.WaitGroup
}

// NewTable begins to answer for the table. It fails only when the wire refuses the subscriptions.
func NewTable[T any](w Wire, spec Spec, o TableOptions) (*Table[T], error) {
	if o.Source == "" {
		o.Source = "/xostor"
	}
	if o.Alive <= 0 {
		o.Alive = DefaultAlive
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Epoch == 0 {
		o.Epoch = newEpoch(time.Now())
	}
	t := &Table[T]{
		wire: w, spec: spec, opts: o, limit: w.MaxPayload() - headerReserve,
		rows: map[string][]byte{}, snapshots: map[uint64]*snapshot{}, stale: "not filled yet", done: make(chan struct{}),
	}
	stop, err := w.Subscribe(t.answer, spec.list(0), spec.list(o.Epoch))
	if err != nil {
		return nil, fmt.Errorf("serve table %s: %w", spec.Name, err)
	}
	t.stops = append(t.stops, stop)
	t.wg.Go(t.live)
	return t, nil
}

// At is this run of the publisher and the number of its last change.
func (t *Table[T]) At() (epoch, seq uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.opts.Epoch, t.seq
}

// Len is the number of keys.
func (t *Table[T]) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.rows)
}

// Keys are the keys in no order.
func (t *Table[T]) Keys() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.rows))
}

// Get is the JSON that the table holds for the key. The bytes must not be changed.
func (t *Table[T]) Get(key string) (json.RawMessage, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	raw, ok := t.rows[key]
	return raw, ok
}

// Put sets a key and tells whether that changed anything. It fails with ErrTooLarge, or when v is no JSON value. A json.RawMessage is kept as it is and must not be changed afterwards.
func (t *Table[T]) Put(key string, v T) (changed bool, err error) {
	raw, err := t.encode(key, v)
	if err != nil {
		return false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.put(key, raw), nil
}

// Delete removes a key and tells whether it was there.
func (t *Table[T]) Delete(key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.delete(key)
}

// RowsError says which keys of a Replace could not be published.
type RowsError struct {
	Table string
	Rows  map[string]error // By key.
}

func (e *RowsError) Error() string {
	first := slices.Min(slices.Collect(maps.Keys(e.Rows)))
	return fmt.Sprintf("publish %d rows of %s: %v", len(e.Rows), e.Table, e.Rows[first])
}

// Unwrap returns the errors of the rows, in the order of their keys.
func (e *RowsError) Unwrap() []error {
	var all []error
	for _, key := range slices.Sorted(maps.Keys(e.Rows)) {
		all = append(all, e.Rows[key])
	}
	return all
}

// Replace makes all the whole contents and the table fresh. The first Replace of a table publishes one reset (mirrors list
// again, because they have to anyway) and not one event per key; later ones publish just what differs, in the order of the
// keys. Rows that cannot be published keep the value that they had; then the table is stale and the error a *RowsError.
func (t *Table[T]) Replace(all map[string]T) (Diff, error) {
	rows := make(map[string][]byte, len(all))
	bad := map[string]error{}
	for key, v := range all {
		raw, err := t.encode(key, v)
		if err != nil {
			bad[key] = err
			continue
		}
		rows[key] = raw
	}
	var err error
	reason := ""
	if len(bad) > 0 {
		err = &RowsError{Table: t.spec.Name, Rows: bad}
		reason = err.Error()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key := range bad {
		if old, ok := t.rows[key]; ok {
			rows[key] = old
		}
	}
	if !t.filled {
		t.filled, t.rows, t.stale = true, rows, reason
		t.control(kindReset)
		return Diff{Added: len(rows)}, err
	}
	d := t.merge(rows)
	t.setStale(reason)
	return d, err
}

func (t *Table[T]) merge(rows map[string][]byte) (d Diff) {
	for _, key := range slices.Sorted(maps.Keys(t.rows)) {
		if _, ok := rows[key]; !ok {
			t.delete(key)
			d.Deleted++
		}
	}
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		_, had := t.rows[key]
		switch changed := t.put(key, rows[key]); {
		case changed && had:
			d.Changed++
		case changed:
			d.Added++
		}
	}
	return d
}

// SetStale says that the rows may no longer be the truth, and why. Mirrors become stale with this reason and keep the rows.
func (t *Table[T]) SetStale(reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.setStale(reason)
}

// SetFresh takes SetStale back.
func (t *Table[T]) SetFresh() { t.SetStale("") }

// Close says that this publisher stops and stops it. Mirrors that miss the word notice by the missing signs of life. It may be
// called more than once.
func (t *Table[T]) Close() {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return
	}
	t.setStale("the feed was stopped")
	t.closed = true
	t.mu.Unlock()
	close(t.done)
	for _, stop := range t.stops {
		stop()
	}
	t.wg.Wait()
}

func (t *Table[T]) encode(key string, v T) ([]byte, error) {
	raw, ready := any(v).(json.RawMessage)
	if !ready || !json.Valid(raw) { // Valid JSON is kept as it is: Marshal would copy each row of a large table.
		var err error
		if raw, err = json.Marshal(v); err != nil {
			return nil, fmt.Errorf("encode %s %s: %w", t.spec.Name, key, err)
		}
	}
	if len(raw)+len(key)+rowOverhead > t.limit {
		return nil, fmt.Errorf("encode %s %s: %d bytes: %w", t.spec.Name, key, len(raw), ErrTooLarge)
	}
	return raw, nil
}

func (t *Table[T]) put(key string, raw []byte) bool {
	if old, ok := t.rows[key]; ok && bytes.Equal(old, raw) {
		return false
	}
	t.rows[key] = raw
	t.publish(kindPut, t.spec.Subject(key), key, raw)
	return true
}

func (t *Table[T]) delete(key string) bool {
	if _, ok := t.rows[key]; !ok {
		return false
	}
	delete(t.rows, key)
	t.publish(kindDelete, t.spec.Subject(key), key, nil)
	return true
}

func (t *Table[T]) setStale(reason string) {
	if t.stale == reason {
		return
	}
	t.stale = reason
	t.control(kindState)
}

func (t *Table[T]) control(k kind) { t.publish(k, Subject(t.spec.control()), "", nil) }

// publish sends under the lock, so that sequence numbers leave in their order. Sending only fills the connection's
// buffer. A message that is lost here leaves a hole that mirrors see.
func (t *Table[T]) publish(k kind, s subject.Subject, key string, raw []byte) {
	if t.closed {
		return
	}
	if k != kindAlive {
		t.seq++
	}
	h := tableHeader{kind: k, epoch: t.opts.Epoch, seq: t.seq, key: key, stale: t.stale}
	m := &Message{Subject: string(s), Header: h.encode(t.spec.Name, t.opts.Source, time.Now()), Data: raw}
	if err := t.wire.Publish(m); err != nil {
		t.opts.Log.Debug("publish table change", "table", t.spec.Name, "err", err)
	}
}

func (t *Table[T]) live() {
	tick := time.NewTicker(t.opts.Alive)
	defer tick.Stop()
	for {
		select {
		case <-t.done:
			return
		case now := <-tick.C:
			t.mu.Lock()
			t.control(kindAlive)
			maps.DeleteFunc(t.snapshots, func(_ uint64, s *snapshot) bool { return now.Sub(s.used) > snapshotExpiry })
			t.mu.Unlock()
		}
	}
}

// listRequest is the JSON body of a list request. The first has no list id; the answer names it for the next pages.
type listRequest struct {
	List string `json:"list,omitempty"`
	Page int    `json:"page,omitempty"`
}

// answer serves one page of a list.
func (t *Table[T]) answer(m *Message) {
	if m.Reply == "" {
		return
	}
	var req listRequest
	if len(m.Data) > 0 {
		if err := json.Unmarshal(m.Data, &req); err != nil {
			t.refuse(m.Reply, "request is not JSON")
			return
		}
	}
	s, ok := t.snapshot(req)
	if !ok || req.Page < 0 || req.Page >= s.pages() {
		t.refuse(m.Reply, "list is gone, ask again from the start")
		return
	}
	h := tableHeader{kind: kindPage, epoch: t.opts.Epoch, seq: s.seq, stale: s.stale, list: s.id(), page: req.Page, pages: s.pages()}
	reply := &Message{Subject: m.Reply, Header: h.encode(t.spec.Name, t.opts.Source, time.Now()), Data: s.page(req.Page)}
	if err := t.wire.Publish(reply); err != nil {
		t.opts.Log.Debug("answer list", "table", t.spec.Name, "err", err)
	}
}

func (t *Table[T]) refuse(reply, why string) {
	h := tableHeader{kind: kindRefused, epoch: t.opts.Epoch, stale: why}
	if err := t.wire.Publish(&Message{Subject: reply, Header: h.encode(t.spec.Name, t.opts.Source, time.Now())}); err != nil {
		t.opts.Log.Debug("refuse list", "table", t.spec.Name, "err", err)
	}
}

// snapshot finds the list that the request continues, or makes one of the present rows. Lists at the same sequence share it.
func (t *Table[T]) snapshot(req listRequest) (*snapshot, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	seq := t.seq
	if req.List != "" {
		n, err := strconv.ParseUint(req.List, 10, 64)
		if err != nil {
			return nil, false
		}
		seq = n
	}
	s, ok := t.snapshots[seq]
	if !ok && req.List != "" {
		return nil, false
	}
	if !ok {
		if len(t.snapshots) >= snapshotsKept {
			t.dropOldest()
		}
		s = newSnapshot(t.seq, t.stale, t.rows, min(pageTarget, t.limit))
		t.snapshots[seq] = s
	}
	s.used = time.Now()
	return s, true
}

func (t *Table[T]) dropOldest() {
	var oldest *snapshot
	for _, s := range t.snapshots {
		if oldest == nil || s.used.Before(oldest.used) || s.used.Equal(oldest.used) && s.seq < oldest.seq {
			oldest = s
		}
	}
	delete(t.snapshots, oldest.seq)
}

// snapshot is the table's contents at one sequence, cut into pages. Only used changes, under the table's lock.
type snapshot struct {
	seq    uint64
	stale  string
	keys   []string
	values [][]byte
	starts []int // First row of each page.
	used   time.Time
}

func newSnapshot(seq uint64, stale string, rows map[string][]byte, pageSize int) *snapshot {
	s := &snapshot{seq: seq, stale: stale, keys: slices.Sorted(maps.Keys(rows)), values: make([][]byte, 0, len(rows)), starts: []int{0}}
	size := 0
	for i, key := range s.keys {
		raw := rows[key]
		s.values = append(s.values, raw)
		if n := len(key) + len(raw) + rowOverhead; size > 0 && size+n > pageSize {
			s.starts = append(s.starts, i)
			size = n
		} else {
			size += n
		}
	}
	return s
}

func (s *snapshot) id() string { return strconv.FormatUint(s.seq, 10) }

func (s *snapshot) pages() int { return len(s.starts) }

// page is [{"key":…,"data":…},…]. It is written by hand because the values are JSON already.
func (s *snapshot) page(n int) []byte {
	from, to := s.starts[n], len(s.keys)
	if n+1 < len(s.starts) {
		to = s.starts[n+1]
	}
	size := 2
	for i := from; i < to; i++ {
		size += len(s.keys[i]) + len(s.values[i]) + rowOverhead
	}
	b := make([]byte, 0, size)
	b = append(b, '[')
	for i := from; i < to; i++ {
		if i > from {
			b = append(b, ',')
		}
		b = append(b, `{"key":`...)
		b = appendJSONString(b, s.keys[i])
		b = append(b, `,"data":`...)
		b = append(b, s.values[i]...)
		b = append(b, '}')
	}
	return append(b, ']')
}

func appendJSONString(b []byte, s string) []byte {
	quoted, err := json.Marshal(s)
	if err != nil { // Cannot happen for a string.
		return append(b, `""`...)
	}
	return append(b, quoted...)
}

func newEpoch(now time.Time) uint64 { return uint64(now.UnixMicro())<<12 | rand.Uint64N(1<<12) }

func formatEpoch(e uint64) string { return fmt.Sprintf("%016x", e) }
