package xapiface

import (
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// methodsText lists the signatures of the methods that are not generated from the data model, one per line: "Class.method name:type name:type=default", with an exclamation mark
// after the name of those that take no session. Names, types and order are those of upstream's datamodel. A method is served once it has a behaviour.
//
//go:embed methods.txt
var methodsText string

// method is one entry of the dispatch table.
type method struct {
	name     string
	class    string
	params   []param
	session  bool
	effect   bool // has side effects beyond the database: runs under a task
	hidden   bool // not listed
	getter   bool // cannot be called with Async.
	anywhere bool // served by every host in every state, over TCP too: emergency calls
	guard    func(*Call) error
	fn       Handler
}

type param struct {
	name     string
	typ      xapidb.Type
	def      any
	optional bool
	anything bool          // any value: decoded by the handler
	record   *xapidb.Class // a constructor's struct
}

func (m *method) mandatory() int {
	n := 0
	for _, p := range m.params {
		if !p.optional {
			n++
		}
	}
	return n
}

// parseSignature reads one line of methodsText.
func parseSignature(line string) (*method, error) {
	words := strings.Fields(line)
	if len(words) == 0 {
		return nil, fmt.Errorf("parse signature: empty")
	}
	name := strings.TrimSuffix(words[0], "!")
	class, _, ok := strings.Cut(name, ".")
	if !ok {
		return nil, fmt.Errorf("parse signature %q: no class", line)
	}
	m := &method{name: name, class: class, session: name == words[0]}
	for _, w := range words[1:] {
		p, err := parseParam(w)
		if err != nil {
			return nil, fmt.Errorf("parse signature %q: %w", line, err)
		}
		m.params = append(m.params, p)
	}
	return m, nil
}

func parseParam(w string) (param, error) {
	name, rest, ok := strings.Cut(w, ":")
	if !ok {
		return param{}, fmt.Errorf("parameter %q has no type", w)
	}
	text, def, optional := strings.Cut(rest, "=")
	typ, err := xapidb.ParseType(text)
	if err != nil {
		return param{}, err
	}
	p := param{name: name, typ: typ, optional: optional}
	p.def, err = xapidb.ParseValue(typ, def)
	return p, err
}

// buildMethods makes the dispatch table: what is generated from the data model, the listed signatures, and the built-in behaviours.
func (f *Face) buildMethods() map[string]*method {
	table := map[string]*method{}
	for _, c := range f.db.Schema().Classes {
		for _, m := range generated(c) {
			table[m.name] = m
		}
	}
	for _, line := range strings.Split(strings.TrimSpace(methodsText), "\n") {
		m, err := parseSignature(line)
		if err != nil {
			panic(err)
		}
		if old := table[m.name]; old == nil {
			table[m.name] = m
		}
	}
	for name, b := range builtins(f) {
		m := table[name]
		if m == nil {
			panic("xapiface: built-in method without a signature: " + name)
		}
		m.fn, m.effect = b.fn, b.effect
	}
	for name, guard := range guards() {
		table[name].guard = guard
	}
	for _, name := range emergencyCalls {
		table[name].anywhere = true
	}
	return table
}

// emergencyCalls are served by a supporter itself, whatever state it is in (upstream datamodel.ml, emergency_calls). The plain login is not among them over TCP: there it fails with
// HOST_IS_SLAVE.
var emergencyCalls = []string{
	"session.slave_local_login_with_password", "session.local_logout", "host.is_in_emergency_mode", "system.listMethods",
	"pool.emergency_transition_to_master", "pool.emergency_reset_master",
}

// run does one call: names, admission, parameters, session, guard, then the behaviour, under a task where XAPI has one.
func (f *Face) run(ctx context.Context, r request) (any, error) {
	name, async := strings.CutPrefix(r.method, "Async.")
	if !async {
		name, async = strings.CutPrefix(r.method, "Async_")
	}
	m, ok := f.method(name)
	if !ok || async && m.getter {
		return nil, xapidb.Errorf("MESSAGE_METHOD_UNKNOWN", name)
	}
	raw, session, err := m.split(r.params)
	if err != nil {
		return nil, err
	}
	if err := f.admit(r, &m); err != nil {
		return nil, err
	}
	if m.session {
		if err := f.checkSession(session, r.host, m.anywhere); err != nil {
			return nil, err
		}
	}
	c := &Call{
		Face: f, DB: f.db, Method: m.name, Host: r.host, Session: session, Task: xapidb.NullRef, Async: async, Local: r.local, UserAgent: r.userAgent,
		params: m.params,
	}
	if c.args, err = f.decode(&m, raw); err != nil {
		return nil, err
	}
	if m.guard != nil {
		if err := m.guard(c); err != nil {
			return nil, err
		}
	}
	if !async && !m.effect {
		return m.fn(ctx, c)
	}
	return f.underTask(ctx, c, m.fn)
}

// split separates the session from the other parameters and checks their number. The expected number is that of the mandatory ones, and the session counts in neither (upstream
// gen_server.ml).
func (m *method) split(params []any) (rest []any, session string, err error) {
	got := len(params)
	if m.session {
		got--
	}
	need := m.mandatory()
	if got < need || got > len(m.params) && need == len(m.params) {
		return nil, "", xapidb.Errorf("MESSAGE_PARAMETER_COUNT_MISMATCH", m.name, strconv.Itoa(need), strconv.Itoa(got))
	}
	if !m.session {
		return params, "", nil
	}
	session, ok := params[0].(string)
	if !ok {
		return nil, "", xapidb.Errorf("SESSION_INVALID", fmt.Sprint(params[0]))
	}
	return params[1:], session, nil
}

// decode turns wire values into canonical ones and checks that refs exist.
func (f *Face) decode(m *method, raw []any) ([]any, error) {
	args := make([]any, len(m.params))
	for i, p := range m.params {
		if i >= len(raw) {
			args[i] = p.def
			continue
		}
		var err error
		switch {
		case p.anything:
			args[i] = raw[i]
		case p.record != nil:
			args[i], err = decodeStruct(p.record, raw[i])
		default:
			args[i], err = p.typ.Coerce(p.name, raw[i])
		}
		if err == nil && p.typ.Kind == xapidb.Ref && p.record == nil && !p.anything {
			err = f.checkHandle(p.typ.Class, args[i].(string), i == 0)
		}
		if err != nil {
			return nil, err
		}
	}
	return args, nil
}

func (f *Face) checkHandle(class, ref string, self bool) error {
	if ref == xapidb.NullRef && !self {
		return nil
	}
	if _, known := f.db.Schema().Class(class); !known {
		return xapidb.Errorf("HANDLE_INVALID", class, ref)
	}
	_, err := f.db.Field(class, ref, "uuid")
	return err
}

// decodeStruct reads a generated constructor's struct: known constructor fields are decoded, others ignored, and a missing field that has no default is FIELD_TYPE_ERROR.
func decodeStruct(c *xapidb.Class, v any) (any, error) {
	in, ok := v.(map[string]any)
	if !ok {
		return nil, xapidb.Errorf("FIELD_TYPE_ERROR", "__structure")
	}
	out := map[string]any{}
	for i := range c.Fields {
		fd := &c.Fields[i]
		given, ok := in[fd.Name]
		if !ok || fd.Qualifier == xapidb.DynamicRO {
			if fd.Required && fd.Qualifier != xapidb.DynamicRO && !fd.Derived {
				return nil, xapidb.Errorf("FIELD_TYPE_ERROR", fd.Name)
			}
			continue
		}
		value, err := fd.Type.Coerce(fd.Name, given)
		if err != nil {
			return nil, err
		}
		out[fd.Name] = value
	}
	return out, nil
}

// admit applies the state and role of the host that took the call.
func (f *Face) admit(r request, m *method) error {
	if x, ok := f.strike(r.host, m.name, Fail); ok {
		return xapidb.Errorf(x.Code, x.Params...)
	}
	if m.anywhere {
		return nil
	}
	if x, ok := f.strike(r.host, m.name, Emergency); ok {
		return xapidb.Errorf(x.Code, x.Params...)
	}
	coordinator := f.Coordinator()
	if r.host == coordinator || coordinator == xapidb.NullRef || !m.session && m.class == "system" {
		return nil
	}
	if !r.local {
		return xapidb.Errorf("HOST_IS_SLAVE", xapidb.Value[string](f.db, "host", coordinator, "address"))
	}
	if f.down(coordinator) {
		return xapidb.Errorf("CANNOT_CONTACT_HOST", coordinator)
	}
	return nil
}

// down says whether a host's XAPI refuses connections, so that a supporter cannot forward to it.
func (f *Face) down(host string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range f.faults[host] {
		if x.Kind == Refuse {
			return true
		}
	}
	return false
}
