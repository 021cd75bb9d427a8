package xapidb

import (
	"container/list"
	crand "crypto/rand"
	"encoding/binary"
	"io"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Options tunes a DB. The zero value is a real-time database with random uuids.
type Options struct {
	Clock  func() time.Time // time stamps of tasks and messages; default time.Now
	Rand   io.Reader        // source of uuids and refs; default crypto/rand. SeededRand makes runs repeatable
	Schema *Schema          // default DefaultSchema()

	// TombstoneLimit is the length at which a class's list of deleted rows is cut to half of it; default 512, as upstream (db_cache_types.ml),
	// which so remembers 256 to 511 deletions.
	TombstoneLimit int
	// Pacing delays the look after a wake-up in From: 50 ms up to 24.19, 3 to 50 ms in 25.33; default none.
	Pacing time.Duration
}

// SeededRand is a deterministic source for Options.Rand.
func SeededRand(seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

// DB is an in-memory XAPI database with the event semantics of the real one. All methods are safe for concurrent use.
type DB struct {
	clock     func() time.Time
	schema    *Schema
	tombLimit int

	mu         sync.Mutex
	rand       io.Reader
	pacing     time.Duration
	generation int64
	messageGen int64
	tables     map[string]*table
	changed    chan struct{} // closed at the next write, made by the first waiter
	restarted  chan struct{} // closed by Restart
}

type table struct {
	class   *Class
	rows    map[string]*row
	byUUID  map[string]*row
	births  *list.List // of *row, oldest first
	changes *list.List // of *row, least recently modified first
	deleted []tombstone
}

type tombstone struct {
	ref              string
	created, deleted int64
}

type row struct {
	ref, uuid         string
	values            []any
	created, modified int64
	birth, change     *list.Element
}

// refSet is the derived side of a relation: a set of refs with constant-time insert and remove, turned into a slice only when somebody reads it, so that
// 6,000 VDIs can come and go without copying their SR's list each time.
type refSet struct {
	members []string
	at      map[string]int
	read    []string
}

func (s *refSet) add(ref string) bool {
	if s.at == nil {
		s.at = map[string]int{}
	}
	if _, ok := s.at[ref]; ok {
		return false
	}
	s.at[ref] = len(s.members)
	s.members = append(s.members, ref)
	s.read = nil
	return true
}

func (s *refSet) remove(ref string) bool {
	i, ok := s.at[ref]
	if !ok {
		return false
	}
	last := len(s.members) - 1
	s.members[i] = s.members[last]
	s.at[s.members[i]] = i
	s.members = s.members[:last]
	delete(s.at, ref)
	s.read = nil
	return true
}

func (s *refSet) slice() []string {
	if s.read == nil {
		s.read = append(make([]string, 0, len(s.members)), s.members...)
	}
	return s.read
}

// New returns an empty database at generation 1.
func New(o Options) *DB {
	db := &DB{
		clock: o.Clock, rand: o.Rand, schema: o.Schema, tombLimit: o.TombstoneLimit, pacing: o.Pacing,
		generation: 1, tables: map[string]*table{}, restarted: make(chan struct{}),
	}
	if db.clock == nil {
		db.clock = time.Now
	}
	if db.rand == nil {
		db.rand = crand.Reader
	}
	if db.schema == nil {
		db.schema = DefaultSchema()
	}
	if db.tombLimit <= 0 {
		db.tombLimit = 512
	}
	for _, c := range db.schema.Classes {
		db.tables[c.Name] = newTable(c)
	}
	return db
}

func newTable(c *Class) *table {
	return &table{class: c, rows: map[string]*row{}, byUUID: map[string]*row{}, births: list.New(), changes: list.New()}
}

// Schema returns the data model.
func (db *DB) Schema() *Schema { return db.schema }

// Now is the injected clock, in UTC and whole seconds as the API shows it.
func (db *DB) Now() time.Time { return db.clock().UTC().Truncate(time.Second) }

// NewUUID draws a uuid from the injected source.
func (db *DB) NewUUID() string {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.newUUID()
}

func (db *DB) newUUID() string { return uuid.Must(uuid.NewRandomFromReader(db.rand)).String() }

// SetPacing changes Options.Pacing at run time.
func (db *DB) SetPacing(d time.Duration) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.pacing = d
}

// Generation is the global counter: the stamp of the latest write.
func (db *DB) Generation() int64 {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.generation
}

func (db *DB) table(class string) (*table, error) {
	t, ok := db.tables[class]
	if !ok {
		return nil, Errorf("INTERNAL_ERROR", "no class "+class)
	}
	return t, nil
}

func (db *DB) row(class, ref string) (*table, *row, error) {
	t, err := db.table(class)
	if err != nil {
		return nil, nil, err
	}
	r, ok := t.rows[ref]
	if !ok {
		return nil, nil, Errorf("HANDLE_INVALID", class, ref)
	}
	return t, r, nil
}

func (db *DB) column(t *table, field string) (int, error) {
	i, ok := t.class.index[field]
	if !ok {
		return 0, Errorf("INTERNAL_ERROR", "missing column", t.class.Name, field)
	}
	return i, nil
}

// Create adds a row and returns its ref. Fields left out get their defaults; uuid is drawn when it is missing or empty. Unknown fields, derived fields and
// wrong types are refused: INTERNAL_ERROR, FIELD_TYPE_ERROR, or INVALID_VALUE for a value that an enumeration does not have.
func (db *DB) Create(class string, fields map[string]any) (string, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, err := db.table(class)
	if err != nil {
		return "", err
	}
	values := make([]any, len(t.class.Fields))
	for i := range t.class.Fields {
		values[i] = t.class.Fields[i].Default
		if t.class.Fields[i].Derived {
			values[i] = &refSet{}
		}
	}
	for name, v := range fields {
		i, err := db.column(t, name)
		if err != nil {
			return "", err
		}
		if values[i], err = db.check(t.class, i, v); err != nil {
			return "", err
		}
	}
	r := &row{ref: "OpaqueRef:" + db.newUUID(), values: values}
	if r.uuid, _ = values[t.class.index["uuid"]].(string); r.uuid == "" {
		r.uuid = db.newUUID()
		values[t.class.index["uuid"]] = r.uuid
	}
	if t.byUUID[r.uuid] != nil {
		return "", Errorf("INTERNAL_ERROR", "duplicate uuid", class, r.uuid)
	}
	db.insert(t, r)
	return r.ref, nil
}

func (db *DB) insert(t *table, r *row) {
	g := db.bump(t)
	r.created, r.modified = g, g
	t.rows[r.ref], t.byUUID[r.uuid] = r, r
	r.birth, r.change = t.births.PushBack(r), t.changes.PushBack(r)
	for i := range t.class.Fields {
		if f := &t.class.Fields[i]; f.inverseClass != "" {
			db.link(f, r.values[i].(string), r.ref, g)
		}
	}
	db.wake()
}

// check turns a value into the canonical one for column i.
func (db *DB) check(c *Class, i int, v any) (any, error) {
	f := &c.Fields[i]
	if f.Derived {
		return nil, Errorf("INTERNAL_ERROR", "derived field", c.Name, f.Name)
	}
	out, err := f.Type.Coerce(f.Name, v)
	if err != nil {
		return nil, err
	}
	return out, db.checkEnum(f, out)
}

func (db *DB) checkEnum(f *Field, v any) error {
	t := f.Type
	var values []string
	switch x := v.(type) {
	case string:
		values = []string{x}
	case []string:
		t, values = *t.Elem, x
	case map[string]string:
		t, values = *t.Elem, slices.Sorted(maps.Values(x))
	}
	allowed := db.schema.enums[t.Enum]
	if t.Enum == "" || allowed == nil {
		return nil
	}
	for _, s := range values {
		if !allowed[s] && s != "" {
			return Errorf("INVALID_VALUE", f.Name, s)
		}
	}
	return nil
}

func (db *DB) bump(t *table) int64 {
	if t.class.messages {
		db.messageGen++
		return db.messageGen
	}
	db.generation++
	return db.generation
}

func (db *DB) touch(t *table, r *row, g int64) {
	r.modified = g
	t.changes.MoveToBack(r.change)
}

func (db *DB) link(f *Field, to, ref string, g int64) {
	db.relink(f, to, g, func(s *refSet) bool { return s.add(ref) })
}

func (db *DB) unlink(f *Field, to, ref string, g int64) {
	db.relink(f, to, g, func(s *refSet) bool { return s.remove(ref) })
}

func (db *DB) relink(f *Field, to string, g int64, change func(*refSet) bool) {
	t := db.tables[f.inverseClass]
	r, ok := t.rows[to]
	if !ok {
		return
	}
	if change(r.values[t.class.index[f.inverseField]].(*refSet)) {
		db.touch(t, r, g)
	}
}

func (db *DB) wake() {
	if db.changed != nil {
		close(db.changed)
		db.changed = nil
	}
}

// Set writes one field. Writing the value that is already there is no change: no generation, no event (upstream db_cache_impl.ml).
func (db *DB) Set(class, ref, field string, v any) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.set(class, ref, field, v)
}

func (db *DB) set(class, ref, field string, v any) error {
	t, r, err := db.row(class, ref)
	if err != nil {
		return err
	}
	i, err := db.column(t, field)
	if err != nil {
		return err
	}
	value, err := db.check(t.class, i, v)
	if err != nil {
		return err
	}
	db.write(t, r, i, value)
	return nil
}

func (db *DB) write(t *table, r *row, i int, value any) {
	old := r.values[i]
	if equal(old, value) {
		return
	}
	g := db.bump(t)
	r.values[i] = value
	f := &t.class.Fields[i]
	if f.inverseClass != "" {
		db.unlink(f, old.(string), r.ref, g)
		db.link(f, value.(string), r.ref, g)
	}
	if f.Name == "uuid" {
		delete(t.byUUID, r.uuid)
		r.uuid = value.(string)
		t.byUUID[r.uuid] = r
	}
	db.touch(t, r, g)
	db.wake()
}

// Update writes several fields in the order of their names, each with a generation of its own, as XAPI does: readers can see them half done, but no other
// writer comes between. It stops at the first error.
func (db *DB) Update(class, ref string, fields map[string]any) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if err := db.set(class, ref, name, fields[name]); err != nil {
			return err
		}
	}
	return nil
}

// AddToMap adds a key to a map field; a key that exists is MAP_DUPLICATE_KEY, even with the same value.
func (db *DB) AddToMap(class, ref, field, key string, v any) error {
	return db.editMap(class, ref, field, func(f *Field, m reflect.Value) (bool, error) {
		if m.MapIndex(reflect.ValueOf(key)).IsValid() {
			return false, Errorf("MAP_DUPLICATE_KEY", class, f.Name, ref, key)
		}
		e, err := f.Type.Elem.Coerce(f.Name, v)
		if err != nil {
			return false, err
		}
		m.SetMapIndex(reflect.ValueOf(key), reflect.ValueOf(e))
		return true, nil
	})
}

// RemoveFromMap removes a key from a map field; an absent key is no error and no change.
func (db *DB) RemoveFromMap(class, ref, field, key string) error {
	return db.editMap(class, ref, field, func(_ *Field, m reflect.Value) (bool, error) {
		m.SetMapIndex(reflect.ValueOf(key), reflect.Value{})
		return true, nil
	})
}

// PutInMap sets a key of a map field, whether it exists or not: what XAPI does inside for current_operations.
func (db *DB) PutInMap(class, ref, field, key string, v any) error {
	return db.editMap(class, ref, field, func(f *Field, m reflect.Value) (bool, error) {
		e, err := f.Type.Elem.Coerce(f.Name, v)
		if err != nil {
			return false, err
		}
		m.SetMapIndex(reflect.ValueOf(key), reflect.ValueOf(e))
		return true, nil
	})
}

// editMap gives edit a copy of the map, and writes it when edit says so.
func (db *DB) editMap(class, ref, field string, edit func(*Field, reflect.Value) (bool, error)) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, r, err := db.row(class, ref)
	if err != nil {
		return err
	}
	i, err := db.column(t, field)
	if err != nil {
		return err
	}
	f := &t.class.Fields[i]
	if f.Type.Kind != Map {
		return Errorf("INTERNAL_ERROR", "not a map", class, field)
	}
	old := reflect.ValueOf(r.values[i])
	m := reflect.MakeMapWithSize(old.Type(), old.Len()+1)
	for it := old.MapRange(); it.Next(); {
		m.SetMapIndex(it.Key(), it.Value())
	}
	changed, err := edit(f, m)
	if err != nil || !changed {
		return err
	}
	db.write(t, r, i, m.Interface())
	return nil
}

// AddToSet adds a member to a set field, RemoveFromSet removes it; both are no-ops when there is nothing to do.
func (db *DB) AddToSet(class, ref, field, member string) error {
	return db.editSet(class, ref, field, func(s []string) []string {
		if slices.Contains(s, member) {
			return s
		}
		return append(slices.Clone(s), member)
	})
}

// RemoveFromSet removes a member from a set field.
func (db *DB) RemoveFromSet(class, ref, field, member string) error {
	return db.editSet(class, ref, field, func(s []string) []string {
		return slices.DeleteFunc(slices.Clone(s), func(e string) bool { return e == member })
	})
}

func (db *DB) editSet(class, ref, field string, edit func([]string) []string) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, r, err := db.row(class, ref)
	if err != nil {
		return err
	}
	i, err := db.column(t, field)
	if err != nil {
		return err
	}
	old, ok := r.values[i].([]string)
	if !ok {
		return Errorf("INTERNAL_ERROR", "not a set of strings", class, field)
	}
	value, err := db.check(t.class, i, edit(old))
	if err != nil {
		return err
	}
	db.write(t, r, i, value)
	return nil
}

// Destroy removes a row and takes it out of the sets that list it. References from other rows stay, dangling, as in XAPI.
func (db *DB) Destroy(class, ref string) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, r, err := db.row(class, ref)
	if err != nil {
		return err
	}
	g := db.bump(t)
	for i := range t.class.Fields {
		if f := &t.class.Fields[i]; f.inverseClass != "" {
			db.unlink(f, r.values[i].(string), ref, g)
		}
	}
	t.drop(r)
	t.bury(tombstone{ref: ref, created: r.created, deleted: g}, db.tombLimit)
	db.wake()
	return nil
}

func (t *table) drop(r *row) {
	delete(t.rows, r.ref)
	delete(t.byUUID, r.uuid)
	t.births.Remove(r.birth)
	t.changes.Remove(r.change)
}

// bury keeps at most limit-1 tombstones; when it would hold more, only the newer half stays (upstream db_cache_types.ml, Table.remove).
func (t *table) bury(d tombstone, limit int) {
	if len(t.deleted)+1 >= limit {
		t.deleted = slices.Clone(t.deleted[len(t.deleted)-min(limit/2, len(t.deleted)):])
	}
	t.deleted = append(t.deleted, d)
}

// Refs lists the refs of a class, oldest first; nil for an unknown class.
func (db *DB) Refs(class string) []string {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, ok := db.tables[class]
	if !ok {
		return nil
	}
	out := make([]string, 0, len(t.rows))
	for e := t.births.Front(); e != nil; e = e.Next() {
		out = append(out, e.Value.(*row).ref)
	}
	return out
}

// Len is the number of rows of a class.
func (db *DB) Len(class string) int {
	db.mu.Lock()
	defer db.mu.Unlock()
	if t, ok := db.tables[class]; ok {
		return len(t.rows)
	}
	return 0
}

// ByUUID finds a row by uuid: UUID_INVALID when there is none.
func (db *DB) ByUUID(class, id string) (string, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, err := db.table(class)
	if err != nil {
		return "", err
	}
	r, ok := t.byUUID[id]
	if !ok {
		return "", Errorf("UUID_INVALID", class, id)
	}
	return r.ref, nil
}

// Record is an immutable copy of a row. Slices and maps in it are shared: read them only.
type Record struct {
	class  *Class
	ref    string
	values []any
}

// Ref is the row's reference.
func (r Record) Ref() string { return r.ref }

// Class is the row's class.
func (r Record) Class() *Class { return r.class }

// Get returns the value of a field, nil when the class has no such field.
func (r Record) Get(field string) any {
	i, ok := r.class.index[field]
	if !ok {
		return nil
	}
	return r.values[i]
}

// Each calls fn for each field in wire order.
func (r Record) Each(fn func(f *Field, v any)) {
	for i := range r.class.Fields {
		fn(&r.class.Fields[i], r.values[i])
	}
}

// Map returns the record as a map.
func (r Record) Map() map[string]any {
	m := make(map[string]any, len(r.values))
	for i := range r.class.Fields {
		m[r.class.Fields[i].Name] = r.values[i]
	}
	return m
}

func (t *table) record(r *row) Record {
	values := slices.Clone(r.values)
	if t.class.derived {
		for i, v := range values {
			if s, ok := v.(*refSet); ok {
				values[i] = s.slice()
			}
		}
	}
	return Record{class: t.class, ref: r.ref, values: values}
}

// Record reads a row: HANDLE_INVALID when there is none.
func (db *DB) Record(class, ref string) (Record, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, r, err := db.row(class, ref)
	if err != nil {
		return Record{}, err
	}
	return t.record(r), nil
}

// Records reads all rows of a class, oldest first.
func (db *DB) Records(class string) []Record {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, ok := db.tables[class]
	if !ok {
		return nil
	}
	out := make([]Record, 0, len(t.rows))
	for e := t.births.Front(); e != nil; e = e.Next() {
		out = append(out, t.record(e.Value.(*row)))
	}
	return out
}

// Get reads a row as a map.
func (db *DB) Get(class, ref string) (map[string]any, bool) {
	r, err := db.Record(class, ref)
	if err != nil {
		return nil, false
	}
	return r.Map(), true
}

// Field reads one field: HANDLE_INVALID for a missing row.
func (db *DB) Field(class, ref, field string) (any, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	t, r, err := db.row(class, ref)
	if err != nil {
		return nil, err
	}
	i, err := db.column(t, field)
	if err != nil {
		return nil, err
	}
	if s, ok := r.values[i].(*refSet); ok {
		return s.slice(), nil
	}
	return r.values[i], nil
}

// Value reads a field of a row that the caller knows to exist, as a T; the zero T when the row, the field or the type is not there.
func Value[T any](db *DB, class, ref, field string) T {
	v, err := db.Field(class, ref, field)
	if err != nil {
		var zero T
		return zero
	}
	t, _ := v.(T)
	return t
}

// Restart is what a restart of XAPI does to its database: sessions, tasks and other volatile rows vanish with no event, tombstones are forgotten, everything else and
// the generation stay. Blocked From calls return ErrRestarted.
func (db *DB) Restart() {
	db.mu.Lock()
	defer db.mu.Unlock()
	for _, c := range db.schema.Classes {
		db.tables[c.Name].deleted = nil
		if c.Volatile {
			db.forget(db.tables[c.Name])
		}
	}
	close(db.restarted)
	db.restarted = make(chan struct{})
}

// forget drops all rows of a class without tombstones, but takes them out of the sets that list them.
func (db *DB) forget(t *table) {
	for _, r := range t.rows {
		for i := range t.class.Fields {
			if f := &t.class.Fields[i]; f.inverseClass != "" {
				db.unlink(f, r.values[i].(string), r.ref, db.generation)
			}
		}
	}
	db.tables[t.class.Name] = newTable(t.class)
}

// Rollback lowers the generation by n, at least to 1: the database of a new coordinator that had not received the last n writes' stamps. The rows keep their
// values, their stamps are cut to the new generation, tombstones are gone. An old token then matches nothing until the counter has caught up.
func (db *DB) Rollback(n int64) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.generation = max(1, db.generation-n)
	for name, t := range db.tables {
		t.deleted = nil
		if name == "message" {
			continue
		}
		for _, r := range t.rows {
			r.created, r.modified = min(r.created, db.generation), min(r.modified, db.generation)
		}
	}
}
