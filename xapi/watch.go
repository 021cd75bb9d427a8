package xapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// Defaults of WatchConfig.
const (
	DefaultWatchTimeout = 30 * time.Second
	DefaultWatchPause   = 100 * time.Millisecond
)

const (
	// pollMargin is what the client grants XAPI beyond the timeout it asked for, before it takes the connection for dead.
	pollMargin = 10 * time.Second
	// firstBackoff and lastBackoff bound the wait after a failure.
	firstBackoff = 250 * time.Millisecond
	lastBackoff  = 30 * time.Second
	// firstDoubt and lastDoubt bound how often a class is read again whose size never agrees with XAPI's count.
	firstDoubt = time.Second
	lastDoubt  = 5 * time.Minute
)

// Op is what happened to an object.
type Op string

// The operations of a Change.
const (
	Add Op = "add"
	Mod Op = "mod"
	Del Op = "del"
)

// Change is one object's change.
type Change struct {
	Class  string          // Class is in lower case, as in event.from: "vdi", "host_metrics".
	Op     Op              // Op is relative to what this watch delivered before.
	Ref    Ref             //
	UUID   string          // UUID is the object's, also for Del.
	Record json.RawMessage // Record is the whole object after the change, nil for Del. NaN and infinities are text in it; see Float.
}

// Handler receives what Watch sees. It is called from one goroutine, which also reads from XAPI: a slow handler delays
// events but loses none. It may keep the records it is given.
type Handler interface {
	// Reset delivers all objects of a class, once per class, before any change of it. Class is in lower case.
	Reset(class string, all map[Ref]json.RawMessage)
	// Apply delivers changes. Deletions come first; there is no other order. A later resync also comes this way, as the changes that make the
	// delivered copy equal to XAPI's.
	Apply(batch []Change)
	// Stale tells that the copy may lag behind XAPI from now on, and why. It is called once until Fresh.
	Stale(reason string)
	// Fresh tells that the copy equals what XAPI had a moment ago. The first call means that all classes were delivered.
	Fresh()
}

// WatchConfig says what to watch and how patiently.
type WatchConfig struct {
	// Classes are the classes to watch, in any case. Fewer is better: XAPI walks whole tables for each. A class that XAPI does not know is
	// left out and said once.
	Classes []string
	// Timeout is how long XAPI may hold a call with nothing to tell; the client waits 10 s longer. DefaultWatchTimeout when zero.
	Timeout time.Duration
	// Pause is waited between replies, so that bursts come as one; DefaultWatchPause when zero, none when negative.
	Pause time.Duration
	// Handler receives everything. Required.
	Handler Handler
}

// Watch follows the classes until ctx ends, whose error it returns; no other error ends it once cfg is sound. It starts with a token from
// event.inject, reads every class, then follows event.from. It reads a class again when its count disagrees with XAPI's
// (deletions are lost without a word when there are more than a few hundred, ocaml/database/db_cache_types.ml), and everything again when the session
// is gone, the token is refused or runs backwards, or XAPI says EVENTS_LOST. Failures are waited out with growing, jittered pauses.
func Watch(ctx context.Context, c *Client, cfg WatchConfig) error {
	w, err := newWatcher(c, cfg)
	if err != nil {
		return fmt.Errorf("watch events: %w", err)
	}
	backoff := firstBackoff
	for ctx.Err() == nil {
		err := w.step(ctx)
		if err == nil {
			// Reading everything alone is no success: when event.from then fails again, that must not become a tight loop of readings.
			if w.fresh {
				backoff = firstBackoff
			}
			continue
		}
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, ErrClosed) {
			return fmt.Errorf("watch events: %w", err)
		}
		w.failed(err)
		sleep(ctx, backoff/2+rand.N(backoff))
		backoff = min(2*backoff, lastBackoff)
	}
	return fmt.Errorf("watch events: %w", context.Cause(ctx))
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// watcher is the state of one Watch.
type watcher struct {
	c       *Client
	cfg     WatchConfig
	log     *slog.Logger
	seed    maphash.Seed
	classes []*watchedClass
	byName  map[string]*watchedClass

	// session is the one that token was made with. A token says nothing about the time before a restart of XAPI, and a restart is
	// seen only by the death of the session it was made with; so a session renewed by somebody else must not be used with it.
	session Ref
	token   string // token is empty when everything must be read again.
	fresh   bool
	stale   bool
	said    map[string]bool // said holds the oddities that were logged already.
}

// watchedClass is what is kept of a class: enough to tell what changed, not the records themselves.
type watchedClass struct {
	api     string // api is the class as get_all_records wants it.
	name    string // name is the class as event.from gives it.
	rows    map[Ref]row
	loaded  bool
	absent  bool // absent is a class that XAPI does not know.
	suspect bool // suspect is a class that an unreadable event was about.

	doubt    time.Duration // doubt is how long to wait before the class is read again for its count; zero after agreement.
	recheck  time.Time     // recheck is when the class may be read again for its count.
	mismatch bool          // mismatch tells that the last count disagreed and the reading was put off.
}

// row is what is kept of an object.
type row struct {
	uuid string
	sum  uint64 // sum is a hash of the record, to leave out repetitions.
}

func newWatcher(c *Client, cfg WatchConfig) (*watcher, error) {
	if cfg.Handler == nil {
		return nil, errors.New("no handler")
	}
	if len(cfg.Classes) == 0 {
		return nil, errors.New("no classes")
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultWatchTimeout
	}
	if cfg.Pause == 0 {
		cfg.Pause = DefaultWatchPause
	}
	w := &watcher{
		c: c, cfg: cfg, log: c.log.With("component", "xapi-watch"), seed: maphash.MakeSeed(),
		byName: make(map[string]*watchedClass), said: make(map[string]bool),
	}
	for _, class := range cfg.Classes {
		k := &watchedClass{api: className(class), name: strings.ToLower(class)}
		if !methodName.MatchString(k.api + ".get_all_records") {
			return nil, fmt.Errorf("class %.40q: not a class name of XAPI", class)
		}
		if w.byName[k.name] == nil {
			w.byName[k.name] = k
			w.classes = append(w.classes, k)
		}
	}
	return w, nil
}

// step reads everything when there is no token, or follows events once.
func (w *watcher) step(ctx context.Context) error {
	if w.token == "" || !w.c.holds(w.session) {
		return w.sync(ctx)
	}
	return w.follow(ctx)
}

// failed decides what a failure leaves of the session and the token. A broken connection leaves both: XAPI will answer from
// where we were. A refusal, or a reply that cannot be used (it may be too large), drops the token, for reading everything is
// always right and asking the same again may fail for ever.
func (w *watcher) failed(err error) {
	if sessionLost(err) {
		w.c.forget(w.session)
	}
	var transport *TransportError
	if !errors.As(err, &transport) || transport.answered {
		w.token = ""
	}
	w.fresh = false
	if !w.stale {
		w.stale = true
		w.log.Warn("event stream interrupted", "err", err)
		w.cfg.Handler.Stale(err.Error())
		return
	}
	w.log.Debug("event stream still interrupted", "err", err)
}

// first tells whether an oddity is met for the first time and should be logged.
func (w *watcher) first(oddity string) bool {
	// XAPI decides what may be said here: bound it.
	if w.said[oddity] || len(w.said) > 100 {
		return false
	}
	w.said[oddity] = true
	return true
}

// sync takes a token first and reads every class after it: what changes in between comes again with the first events.
func (w *watcher) sync(ctx context.Context) error {
	session, err := w.c.session(ctx)
	if err != nil {
		return err
	}
	w.session, w.token, w.fresh = session, "", false
	var pools []Ref
	if err := w.query(ctx, &pools, "pool.get_all"); err != nil {
		return err
	}
	if len(pools) == 0 {
		return errors.New("call pool.get_all: xapi knows no pool")
	}
	var token string
	if err := w.query(ctx, &token, "event.inject", "pool", pools[0]); err != nil {
		return err
	}
	if _, err := generation(token); err != nil {
		return fmt.Errorf("call event.inject: %w", err)
	}
	for _, k := range w.classes {
		if err := w.read(ctx, k); err != nil {
			return err
		}
	}
	w.token = token
	return nil
}

// query calls with the watch's own session, without renewal.
func (w *watcher) query(ctx context.Context, result any, method string, args ...any) error {
	return w.c.exchange(ctx, w.c.rpc, jsonWire{}, w.c.cfg.Timeout, method, prepend(w.session, args), sink{into: result})
}

// read reads a class and delivers it, the first time as a whole and later as the difference. Nothing is delivered or kept of a
// reading that breaks off.
func (w *watcher) read(ctx context.Context, k *watchedClass) error {
	next := make(map[Ref]row, len(k.rows))
	all := make(map[Ref]json.RawMessage)
	out := sink{records: func(ref Ref, decode func(any) error) error {
		var record json.RawMessage
		if err := decode(&record); err != nil {
			return err
		}
		uuid, ok := recordUUID(record)
		if !ok || ref.IsNull() {
			if w.first("record/" + k.name) {
				w.log.Warn("record is no object and is left out", "class", k.name)
			}
			return nil
		}
		r := row{uuid: uuid, sum: maphash.Bytes(w.seed, record)}
		next[ref] = r
		if !k.loaded || k.rows[ref] != r {
			all[ref] = record
		}
		return nil
	}}
	method := k.api + ".get_all_records"
	err := w.c.exchange(ctx, w.c.rpc, jsonWire{}, w.c.cfg.Timeout, method, []any{w.session}, out)
	if IsCode(err, codeMethodUnknown, codeMessageRemoved) {
		k.absent = true
		if w.first("class/" + k.name) {
			w.log.Warn("xapi does not know this class and it is left out", "class", k.api)
		}
		return nil
	}
	if err != nil {
		return err
	}
	k.absent, k.suspect, k.mismatch = false, false, false
	if !k.loaded {
		k.rows, k.loaded = next, true
		w.cfg.Handler.Reset(k.name, all)
		return nil
	}
	batch := k.difference(next, all)
	k.rows = next
	w.apply(batch)
	return nil
}

// difference lists the changes from the kept rows to next, deletions first. Changed has the records that are new or different.
func (k *watchedClass) difference(next map[Ref]row, changed map[Ref]json.RawMessage) []Change {
	var batch []Change
	for ref, r := range k.rows {
		if _, ok := next[ref]; !ok {
			batch = append(batch, Change{Class: k.name, Op: Del, Ref: ref, UUID: r.uuid})
		}
	}
	for ref, record := range changed {
		op := Add
		if _, ok := k.rows[ref]; ok {
			op = Mod
		}
		batch = append(batch, Change{Class: k.name, Op: op, Ref: ref, UUID: next[ref].uuid, Record: record})
	}
	return batch
}

func (w *watcher) apply(batch []Change) {
	if len(batch) > 0 {
		w.cfg.Handler.Apply(batch)
	}
}

// eventsReply is the result of event.from. Its parts are decoded one by one, so that one bad event spoils only itself.
type eventsReply struct {
	Events []json.RawMessage `json:"events"`
	Counts json.RawMessage   `json:"valid_ref_counts"`
	Token  string            `json:"token"`
}

type event struct {
	Class     string          `json:"class"`
	Operation Op              `json:"operation"`
	Ref       Ref             `json:"ref"`
	Snapshot  json.RawMessage `json:"snapshot"`
}

// follow makes one event.from, applies what it tells, and checks the counts.
func (w *watcher) follow(ctx context.Context) error {
	timeout := w.patience()
	names := make([]string, 0, len(w.classes))
	for _, k := range w.classes {
		if !k.absent {
			names = append(names, k.name)
		}
	}
	var reply eventsReply
	args := []any{w.session, names, w.token, timeout.Seconds()}
	if err := w.c.exchange(ctx, w.c.poll, jsonWire{}, timeout+pollMargin, "event.from", args, sink{into: &reply}); err != nil {
		return err
	}
	if err := w.advance(reply.Token); err != nil {
		return err
	}
	w.apply(w.digest(reply.Events))
	if err := w.reconcile(ctx, reply.Counts); err != nil {
		return err
	}
	if !w.fresh {
		w.fresh, w.stale = true, false
		w.log.Info("event stream is up to date")
		w.cfg.Handler.Fresh()
	}
	if w.cfg.Pause > 0 {
		sleep(ctx, w.cfg.Pause)
	}
	return nil
}

// patience is the timeout of the next event.from: none when we want to know at once whether we are up to date, and short when
// a class waits to be read again.
func (w *watcher) patience() time.Duration {
	if !w.fresh {
		return 0
	}
	d := w.cfg.Timeout
	for _, k := range w.classes {
		if k.mismatch || k.suspect {
			d = min(d, max(0, time.Until(k.recheck)))
		}
	}
	return d
}

// advance takes the token of a reply. One that runs backwards is another coordinator's, with an older copy of the database.
func (w *watcher) advance(token string) error {
	old, err := generation(w.token)
	if err != nil {
		return err
	}
	now, err := generation(token)
	if err != nil {
		return fmt.Errorf("call event.from: %w", err)
	}
	if now < old {
		return fmt.Errorf("call event.from: token runs backwards from generation %d to %d", old, now)
	}
	w.token = token
	return nil
}

// generation reads the database's generation out of a token, "%020d,%020d" of database and message generation.
func generation(token string) (uint64, error) {
	g, _, ok := strings.Cut(token, ",")
	n, err := strconv.ParseUint(g, 10, 64)
	if !ok || err != nil {
		return 0, fmt.Errorf("token %.60q is not XAPI's", token)
	}
	return n, nil
}

// digest turns events into changes of the kept rows. Repetitions fall out; of several events on one object the last wins.
func (w *watcher) digest(events []json.RawMessage) []Change {
	type object struct {
		class string
		ref   Ref
	}
	last := make(map[object]event, len(events))
	var order []object
	for _, raw := range events {
		e, k := w.readEvent(raw)
		if k == nil {
			continue
		}
		o := object{k.name, e.Ref}
		if _, seen := last[o]; !seen {
			order = append(order, o)
		}
		last[o] = e
	}
	var dels, rest []Change
	for _, o := range order {
		change, ok := w.byName[o.class].take(w.seed, last[o])
		switch {
		case !ok:
		case change.Op == Del:
			dels = append(dels, change)
		default:
			rest = append(rest, change)
		}
	}
	return append(dels, rest...)
}

// readEvent decodes an event; the class is nil when there is nothing to be done with it.
func (w *watcher) readEvent(raw json.RawMessage) (event, *watchedClass) {
	var e event
	err := json.Unmarshal(raw, &e)
	k := w.byName[strings.ToLower(e.Class)]
	switch {
	case err != nil && k == nil:
		if w.first("garbage") {
			w.log.Warn("event cannot be read and is left out", "err", err)
		}
		return e, nil
	case k == nil:
		if w.first("event/" + e.Class) {
			w.log.Warn("event is of a class not asked for and is left out", "class", e.Class)
		}
		return e, nil
	case err == nil && e.complete():
		return e, k
	}
	// The object it is about is unknown, so the class is read again.
	if w.first("garbage/" + k.name) {
		w.log.Warn("event cannot be read; the class is read again", "class", k.name)
	}
	k.suspect = true
	return e, nil
}

// complete tells whether an event says all that is needed.
func (e event) complete() bool {
	if e.Ref.IsNull() {
		return false
	}
	switch e.Operation {
	case Del:
		return true
	case Add, Mod:
		_, ok := recordUUID(e.Snapshot)
		return ok
	}
	return false
}

// take brings the kept rows up to an event and gives the change, if it is one.
func (k *watchedClass) take(seed maphash.Seed, e event) (Change, bool) {
	old, known := k.rows[e.Ref]
	if e.Operation == Del {
		delete(k.rows, e.Ref)
		return Change{Class: k.name, Op: Del, Ref: e.Ref, UUID: old.uuid}, known
	}
	uuid, _ := recordUUID(e.Snapshot)
	now := row{uuid: uuid, sum: maphash.Bytes(seed, e.Snapshot)}
	k.rows[e.Ref] = now
	op := Add
	if known {
		op = Mod
	}
	return Change{Class: k.name, Op: op, Ref: e.Ref, UUID: uuid, Record: e.Snapshot}, !known || now != old
}

// uncounted are classes whose valid_ref_counts prove nothing: messages are files, not rows, and always count as zero.
var uncounted = map[string]bool{"message": true}

// reconcile reads those classes again whose number of objects differs from XAPI's count, or that had an unreadable event. Additions are
// never lost, so equal numbers mean equal sets.
func (w *watcher) reconcile(ctx context.Context, raw json.RawMessage) error {
	var counts map[string]Int
	if err := json.Unmarshal(raw, &counts); err != nil {
		if w.first("counts") {
			w.log.Warn("counts of event.from cannot be read; lost deletions go unseen", "err", err)
		}
	}
	for _, k := range w.classes {
		if k.absent || !k.loaded {
			continue
		}
		count, counted := counts[k.name]
		counted = counted && !uncounted[k.name]
		agrees := !counted || int(count) == len(k.rows)
		if agrees && !k.suspect {
			k.mismatch, k.doubt = false, 0
			continue
		}
		if err := w.reread(ctx, k, int(count), len(k.rows)); err != nil {
			return err
		}
	}
	return nil
}

// reread reads a class again, but not over and over when that does not help: after each reading the next must wait twice as long, until
// a count agrees. Before Fresh is said nothing is put off.
func (w *watcher) reread(ctx context.Context, k *watchedClass, count, have int) error {
	if w.fresh && time.Now().Before(k.recheck) {
		k.mismatch = true
		return nil
	}
	w.log.Info("class is read again", "class", k.name, "counted", count, "known", have)
	if err := w.read(ctx, k); err != nil {
		k.suspect = true
		return err
	}
	k.doubt = min(max(2*k.doubt, firstDoubt), lastDoubt)
	k.recheck = time.Now().Add(k.doubt)
	return nil
}
