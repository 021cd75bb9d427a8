package xapiface

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// Options configures a Face. DB is required.
type Options struct {
	DB       *xapidb.DB
	Password string       // root's password over TCP; default "xostor"
	Calls    int          // how many calls are remembered; default 10000, negative for none
	Logger   *slog.Logger // default: nothing is logged

	// SessionLimit is the number of sessions one originator may have; default 500, as upstream (db_gc_util.ml). Over it the least recently active is destroyed at the
	// next login; sessions with no originator have a limit of four fifths of it (400).
	SessionLimit int
}

// Face serves one pool. Each endpoint belongs to one host of it. All methods are safe for concurrent use.
type Face struct {
	db       *xapidb.DB
	password string
	log      *slog.Logger
	limit    int
	methods  map[string]*method
	base     context.Context // ends with Close
	stop     context.CancelFunc
	running  sync.WaitGroup // asynchronous calls
	calls    callRecord

	mu        sync.Mutex
	endpoints []*Endpoint
	faults    map[string][]*Fault // by host ref
	sessions  map[string]*session
	tasks     map[string]context.CancelCauseFunc
	queues    map[string]*eventQueue // event.register, by session
	closed    bool
}

// New makes a face over a database. Endpoints are added by ServeUnix and ServeTCP; Do works without any.
func New(o Options) *Face {
	f := &Face{
		db: o.DB, password: o.Password, log: o.Logger, limit: o.SessionLimit,
		faults: map[string][]*Fault{}, sessions: map[string]*session{}, tasks: map[string]context.CancelCauseFunc{}, queues: map[string]*eventQueue{},
	}
	if f.password == "" {
		f.password = "xostor"
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.limit == 0 {
		f.limit = 500
	}
	f.calls.limit = o.Calls
	if f.calls.limit == 0 {
		f.calls.limit = 10000
	}
	f.base, f.stop = context.WithCancel(context.Background())
	f.methods = f.buildMethods()
	return f
}

// DB is the database behind the face.
func (f *Face) DB() *xapidb.DB { return f.db }

// Handler does one call. Its result is a value of the kinds that xapidb documents, a xapidb.Record, []any or map[string]any; nil means void. An *xapidb.Error goes to the caller
// as it is, any other error as INTERNAL_ERROR.
type Handler func(ctx context.Context, c *Call) (any, error)

// Call is one call as a Handler sees it.
type Call struct {
	Face      *Face
	DB        *xapidb.DB
	Method    string // canonical name, without Async.
	Host      string // ref of the host whose endpoint took the call, the coordinator for Do with no host
	Session   string // session ref, empty for calls that need none
	Task      string // the task of this call, NullRef for calls that have none
	Async     bool
	Local     bool   // came over the unix socket
	UserAgent string // of the HTTP client

	args   []any
	params []param
}

// NArg is the number of arguments after the session, defaults included.
func (c *Call) NArg() int { return len(c.args) }

// Arg returns argument i (from 0, after the session) as its canonical Go value.
func (c *Call) Arg(i int) any { return c.args[i] }

// Str returns a string, enumeration or ref argument.
func (c *Call) Str(i int) string { return argument[string](c, i) }

// Int returns an int argument.
func (c *Call) Int(i int) int64 { return argument[int64](c, i) }

// Float returns a float argument.
func (c *Call) Float(i int) float64 { return argument[float64](c, i) }

// Bool returns a bool argument.
func (c *Call) Bool(i int) bool { return argument[bool](c, i) }

// Time returns a datetime argument.
func (c *Call) Time(i int) time.Time { return argument[time.Time](c, i) }

// Set returns an argument that is a set of strings or refs.
func (c *Call) Set(i int) []string { return argument[[]string](c, i) }

// Map returns an argument that is a map of string to string or ref.
func (c *Call) Map(i int) map[string]string { return argument[map[string]string](c, i) }

// Struct returns the argument of a generated constructor: field names to decoded values.
func (c *Call) Struct(i int) map[string]any { return argument[map[string]any](c, i) }

func argument[T any](c *Call, i int) T {
	v, ok := c.args[i].(T)
	if !ok {
		panic(fmt.Sprintf("xapiface: argument %d of %s is a %T", i, c.Method, c.args[i]))
	}
	return v
}

// Begin marks an operation in the object's current_operations under the call's task, and returns how to end it. It fails with OTHER_OPERATION_IN_PROGRESS
// [class; ref; operation; task] while another operation is marked.
func (c *Call) Begin(class, ref, op string) (end func(), err error) {
	c.Face.mu.Lock()
	defer c.Face.mu.Unlock()
	current, err := c.DB.Field(class, ref, "current_operations")
	if err != nil {
		return nil, err
	}
	for task, busy := range current.(map[string]string) {
		return nil, xapidb.Errorf("OTHER_OPERATION_IN_PROGRESS", class, ref, busy, task)
	}
	if err := c.DB.AddToMap(class, ref, "current_operations", c.Task, op); err != nil {
		return nil, err
	}
	return func() {
		// The object may be gone by the end of its operation, as after a destroy.
		_ = c.DB.RemoveFromMap(class, ref, "current_operations", c.Task)
	}, nil
}

// Progress writes the progress (0 to 1) of the call's task.
func (c *Call) Progress(p float64) {
	if c.Task != xapidb.NullRef {
		_ = c.DB.Set("task", c.Task, "progress", p) // The task may have been destroyed by its owner.
	}
}

// Handle gives a method a behaviour, in place of the built-in one if there is one. The signature is the one of XAPI's data model; a method that it does not have
// makes Handle panic: use Declare for those.
func (f *Face) Handle(name string, fn Handler) {
	m := f.methods[name]
	if m == nil {
		panic("xapiface: Handle of unknown method " + name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	m.fn, m.effect, m.getter = fn, true, false
}

// Declare adds a method that the built-in signatures lack, as "Class.method name:type name:type=default"; types are those of xapidb.ParseType. An exclamation mark after the
// method's name means that it takes no session.
func (f *Face) Declare(signature string, fn Handler) error {
	m, err := parseSignature(signature)
	if err != nil {
		return err
	}
	m.fn, m.effect = fn, true
	f.mu.Lock()
	defer f.mu.Unlock()
	f.methods[m.name] = m
	return nil
}

// method finds a method that has a behaviour, as it is now: Handle may change it later.
func (f *Face) method(name string) (method, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.methods[name]
	if m == nil {
		if class, rest, ok := f.underscored(name); ok {
			m = f.methods[class+"."+rest]
		}
	}
	if m == nil || m.fn == nil {
		return method{}, false
	}
	return *m, true
}

// underscored splits Class_method, which Python clients use for names such as event.from. The longest class name wins, as class names contain underscores too.
func (f *Face) underscored(name string) (class, rest string, ok bool) {
	for _, c := range append([]string{"event", "system"}, f.classNames()...) {
		if strings.HasPrefix(name, c+"_") && len(c) > len(class) && f.methods[c+"."+name[len(c)+1:]] != nil {
			class, rest, ok = c, name[len(c)+1:], true
		}
	}
	return class, rest, ok
}

func (f *Face) classNames() []string {
	names := make([]string, 0, len(f.db.Schema().Classes))
	for _, c := range f.db.Schema().Classes {
		names = append(names, c.Name)
	}
	return names
}

// Methods lists what system.listMethods answers: the methods that have a behaviour, sorted.
func (f *Face) Methods() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for name, m := range f.methods {
		if m.fn != nil && !m.hidden {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// request is a decoded call of either protocol.
type request struct {
	method    string
	params    []any
	host      string // ref
	local     bool   // unix socket or Do
	transport string
	userAgent string
}

// Do calls a method inside the process, as root over the unix socket of host (a host ref, or "" for the coordinator) would. Params include the session first. This is the
// way in for simulations under virtual time.
func (f *Face) Do(ctx context.Context, host, name string, params ...any) (any, error) {
	if host == "" {
		host = f.Coordinator()
	}
	return f.serve(ctx, request{method: name, params: params, host: host, local: true, transport: "direct"})
}

// Login opens a root session on the coordinator inside the process.
func (f *Face) Login(originator string) (string, error) {
	v, err := f.Do(f.base, "", "session.login_with_password", "root", "", "1.1", originator)
	if err != nil {
		return "", err
	}
	return v.(string), nil
}

// serve records and runs one call.
func (f *Face) serve(ctx context.Context, r request) (any, error) {
	started, forgot := f.db.Now(), f.calls.begin()
	v, err := f.run(ctx, r)
	code := ""
	if err != nil {
		code = asError(err).Code
	}
	f.calls.add(forgot, CallRecord{Time: started, Host: r.host, Transport: r.transport, Method: r.method, Params: r.params, Error: code, UserAgent: r.userAgent})
	return v, err
}

// asError turns any error into the one that goes over the wire.
func asError(err error) *xapidb.Error {
	var e *xapidb.Error
	if errors.As(err, &e) {
		return e
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return xapidb.Errorf("INTERNAL_ERROR", "timeout")
	}
	return xapidb.Errorf("INTERNAL_ERROR", err.Error())
}

// Coordinator is the ref of the pool's coordinator, NullRef without a pool.
func (f *Face) Coordinator() string {
	for _, p := range f.db.Refs("pool") {
		return xapidb.Value[string](f.db, "pool", p, "master")
	}
	return xapidb.NullRef
}

// SetCoordinator makes another host the coordinator: pool.master is written, every session and task is gone and every connection is cut, because a change of role restarts
// XAPI. A failover that lost writes is SetCoordinator after DB().Rollback.
func (f *Face) SetCoordinator(host string) error {
	for _, p := range f.db.Refs("pool") {
		if err := f.db.Set("pool", p, "master", host); err != nil {
			return err
		}
	}
	f.Restart()
	return nil
}

// Restart is a restart of XAPI on every host: connections are cut, sessions, tasks and tombstones are gone, the rest of the database and its generation stay.
func (f *Face) Restart() {
	f.mu.Lock()
	for ref, s := range f.sessions {
		s.cancel(xapidb.Errorf("SESSION_INVALID", ref))
	}
	for _, cancel := range f.tasks {
		cancel(xapidb.ErrRestarted)
	}
	f.sessions, f.tasks = map[string]*session{}, map[string]context.CancelCauseFunc{}
	f.queues = map[string]*eventQueue{}
	endpoints := slices.Clone(f.endpoints)
	f.mu.Unlock()
	f.db.Restart()
	for _, e := range endpoints {
		e.dropConnections()
	}
}

// Close ends all endpoints and asynchronous calls and waits for them.
func (f *Face) Close() error {
	f.mu.Lock()
	f.closed = true
	endpoints := slices.Clone(f.endpoints)
	f.mu.Unlock()
	f.stop()
	var errs []error
	for _, e := range endpoints {
		errs = append(errs, e.Close())
	}
	f.running.Wait()
	return errors.Join(errs...)
}
