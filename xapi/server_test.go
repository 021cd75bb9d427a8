package xapi

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// server is a small XAPI that writes both wires the way XAPI does (section numbers are those of the wire reference) and keeps its
// objects with row stamps, so that event.from has XAPI's semantics: a diff, bounded tombstones, counts.
type server struct {
	mu       sync.Mutex
	changed  chan struct{} // changed is closed and replaced on each write and each lost session.
	gen      uint64
	next     int // next numbers refs and uuids.
	tables   map[string]*table
	sessions map[string]map[string]any
	originOf map[string]string
	logins   int
	logouts  int
	used     map[string]bool // used are the sessions that some call was made with.
	calls    []string
	tombs    int // tombs is how many deletions a table remembers.

	slaveOf  string            // slaveOf makes every call fail with HOST_IS_SLAVE.
	refuse   map[string]string // refuse makes a method fail with a code.
	before   func(method string)
	between  func() // between runs after a range of events was taken and before its snapshots are.
	mangle   func(method string, reply []byte) []byte
	hang     map[string]bool // hang makes a method never answer.
	abort    map[string]bool // abort makes a method's next reply break off half way.
	handlers map[string]func(args []any) (any, *refusal)
}

type table struct {
	rows map[string]*dbRow
	dead []tombstone
}

type dbRow struct {
	record            map[string]any
	created, modified uint64
}

type tombstone struct {
	ref                string
	created, destroyed uint64
}

type refusal []string

func newServer() *server {
	s := &server{
		changed: make(chan struct{}), tables: map[string]*table{}, sessions: map[string]map[string]any{}, originOf: map[string]string{},
		used: map[string]bool{},
		gen:  1000, tombs: 256, refuse: map[string]string{}, hang: map[string]bool{}, abort: map[string]bool{},
		handlers: map[string]func(args []any) (any, *refusal){},
	}
	for _, class := range []string{"pool", "host", "SR", "VDI", "VM", "task", "message"} {
		s.tables[class] = &table{rows: map[string]*dbRow{}}
	}
	s.create("pool", map[string]any{"name_label": "pool", "master": "OpaqueRef:h1"})
	return s
}

func (s *server) create(class string, fields map[string]any) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.createLocked(class, fields)
}

func (s *server) createLocked(class string, fields map[string]any) string {
	s.next++
	ref := fmt.Sprintf("OpaqueRef:%s-%d", strings.ToLower(class), s.next)
	record := map[string]any{"uuid": fmt.Sprintf("uuid-%d", s.next)}
	maps.Copy(record, fields)
	s.gen++
	s.tables[class].rows[ref] = &dbRow{record: record, created: s.gen, modified: s.gen}
	s.wake()
	return ref
}

// set writes a field; writing what is there already makes no event.
func (s *server) set(class, ref, field string, value any) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.setLocked(class, ref, field, value)
}

func (s *server) setLocked(class, ref, field string, value any) bool {
	r, ok := s.tables[class].rows[ref]
	if !ok {
		return false
	}
	if fmt.Sprint(r.record[field]) == fmt.Sprint(value) {
		return true
	}
	record := maps.Clone(r.record)
	record[field] = value
	s.gen++
	r.record, r.modified = record, s.gen
	s.wake()
	return true
}

func (s *server) destroy(class, ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.destroyLocked(class, ref)
}

func (s *server) destroyLocked(class, ref string) {
	t := s.tables[class]
	r, ok := t.rows[ref]
	if !ok {
		return
	}
	s.gen++
	delete(t.rows, ref)
	t.dead = append(t.dead, tombstone{ref, r.created, s.gen})
	// As XAPI does: the list may grow to twice its size less one before the older half is cut (Table.remove, db_cache_types.ml).
	if len(t.dead) >= 2*s.tombs {
		t.dead = slices.Clone(t.dead[len(t.dead)-s.tombs:])
	}
	s.wake()
}

func (s *server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// refs lists a class in a fixed order.
func (s *server) refs(class string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.tables[class].rows))
}

func (s *server) dropSessions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions = map[string]map[string]any{}
	s.wake()
}

// restart forgets what XAPI keeps in memory only: sessions, tombstones and tasks.
func (s *server) restart() {
	s.dropSessions()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tables {
		t.dead = nil
	}
	s.tables["task"].rows = map[string]*dbRow{}
	s.wake()
}

// replica is an older copy of the database, which another coordinator starts from.
type replica struct {
	gen    uint64
	tables map[string]map[string]dbRow
}

func (s *server) replicate() replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := replica{gen: s.gen, tables: map[string]map[string]dbRow{}}
	for class, t := range s.tables {
		rows := map[string]dbRow{}
		for ref, row := range t.rows {
			rows[ref] = *row
		}
		r.tables[class] = rows
	}
	return r
}

func (s *server) failover(r replica) {
	s.mu.Lock()
	s.gen = r.gen
	for class, rows := range r.tables {
		t := &table{rows: map[string]*dbRow{}}
		for ref, row := range rows {
			t.rows[ref] = &row
		}
		s.tables[class] = t
	}
	s.mu.Unlock()
	s.restart()
}

// renumber gives every object a new ref and keeps its uuid, as a restore of the database does.
func (s *server) renumber(class string) {
	s.mu.Lock()
	rows := map[string]*dbRow{}
	for _, r := range s.tables[class].rows {
		s.next++
		rows[fmt.Sprintf("OpaqueRef:%s-%d", strings.ToLower(class), s.next)] = r
	}
	s.tables[class].rows = rows
	s.mu.Unlock()
	s.restart()
}

// contents renders a class as get_all_records does.
func (s *server) contents(class string) map[Ref]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[Ref]string{}
	for ref, r := range s.tables[class].rows {
		out[Ref(ref)] = string(appendJSON(nil, r.record))
	}
	return out
}

func (s *server) callCount(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.calls {
		if c == method {
			n++
		}
	}
	return n
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if len(body) > MaxRequest {
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
		return
	}
	isJSON := r.URL.Path == "/jsonrpc"
	var method string
	var args []any
	if isJSON {
		method, args, err = readJSONCall(body)
	} else {
		method, args, err = readXMLCall(body)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if s.before != nil {
		s.before(method)
	}
	s.mu.Lock()
	s.calls = append(s.calls, method)
	hang, abort := s.hang[method], s.abort[method]
	delete(s.hang, method)
	delete(s.abort, method)
	s.mu.Unlock()
	if hang {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	result, refused := s.dispatch(r, method, args)
	var reply []byte
	if isJSON {
		w.Header().Set("Content-Type", "application/json")
		reply = jsonReply(result, refused)
	} else {
		w.Header().Set("Content-Type", "text/xml")
		reply = xmlReply(result, refused)
	}
	s.mu.Lock()
	mangle := s.mangle
	s.mu.Unlock()
	if mangle != nil {
		reply = mangle(method, reply)
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(reply)))
	if abort {
		_, _ = w.Write(reply[:len(reply)/2])
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(reply)
}

func (s *server) dispatch(r *http.Request, method string, args []any) (any, *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slaveOf != "" {
		return nil, &refusal{"HOST_IS_SLAVE", s.slaveOf}
	}
	if code, ok := s.refuse[method]; ok {
		return nil, &refusal{code, "why", ""}
	}
	if method == "session.login_with_password" {
		s.logins++
		ref := fmt.Sprintf("OpaqueRef:session-%d", s.logins)
		s.sessions[ref] = map[string]any{}
		s.originOf[ref] = args[3].(string)
		return ref, nil
	}
	if len(args) == 0 {
		return nil, &refusal{"MESSAGE_PARAMETER_COUNT_MISMATCH", method, "1", "0"}
	}
	session, _ := args[0].(string)
	other, ok := s.sessions[session]
	if !ok {
		return nil, &refusal{"SESSION_INVALID", session}
	}
	s.used[session] = true
	class, verb, _ := strings.Cut(method, ".")
	args = args[1:]
	if h := s.handlers[method]; h != nil {
		return h(args)
	}
	switch method {
	case "session.logout":
		s.logouts++
		delete(s.sessions, session)
		s.wake()
		return "", nil
	case "session.get_this_host":
		return "OpaqueRef:h1", nil
	case "session.add_to_other_config":
		key := args[1].(string)
		if _, ok := other[key]; ok {
			return nil, &refusal{"MAP_DUPLICATE_KEY", "session", "other_config", session, key}
		}
		other[key] = args[2]
		return "", nil
	case "session.remove_from_other_config":
		delete(other, args[1].(string))
		return "", nil
	case "SR.set_physical_size", "SR.set_physical_utilisation", "SR.set_virtual_allocation":
		return s.storageWrite(other, args[0].(string), "SR", args[0].(string), strings.TrimPrefix(verb, "set_"), args[1])
	case "VDI.set_physical_utilisation":
		vdi := args[0].(string)
		row := s.tables["VDI"].rows[vdi]
		if row == nil {
			return nil, &refusal{"HANDLE_INVALID", "VDI", vdi}
		}
		return s.storageWrite(other, row.record["SR"].(string), "VDI", vdi, "physical_utilisation", args[1])
	case "event.inject":
		t, ok := s.tables[args[0].(string)]
		if !ok || t.rows[args[1].(string)] == nil {
			return nil, &refusal{"HANDLE_INVALID", args[0].(string), args[1].(string)}
		}
		s.gen += 2
		t.rows[args[1].(string)].modified = s.gen
		s.wake()
		return token(s.gen - 1), nil
	case "event.from":
		return s.eventFrom(r, session, args)
	}
	return s.read(class, verb, method, args)
}

func (s *server) read(class, verb, method string, args []any) (any, *refusal) {
	t, ok := s.tables[class]
	if !ok {
		return nil, &refusal{"MESSAGE_METHOD_UNKNOWN", method}
	}
	switch verb {
	case "get_all":
		all := []any{}
		for _, ref := range slices.Sorted(maps.Keys(t.rows)) {
			all = append(all, ref)
		}
		return all, nil
	case "get_all_records", "get_all_records_where":
		all := map[string]any{}
		for ref, row := range t.rows {
			all[ref] = row.record
		}
		return all, nil
	case "get_record":
		row, ok := t.rows[args[0].(string)]
		if !ok {
			return nil, &refusal{"HANDLE_INVALID", class, args[0].(string)}
		}
		return row.record, nil
	case "get_by_uuid":
		for ref, row := range t.rows {
			if row.record["uuid"] == args[0] {
				return ref, nil
			}
		}
		return nil, &refusal{"UUID_INVALID", class, args[0].(string)}
	}
	return nil, &refusal{"MESSAGE_METHOD_UNKNOWN", method}
}

// storageWrite holds storage fields to _sm_session, as Sm.assert_session_has_internal_sr_access does.
func (s *server) storageWrite(other map[string]any, sr, class, ref, field string, value any) (any, *refusal) {
	if other[smKey] != sr {
		return nil, &refusal{"PERMISSION_DENIED", "SR access"}
	}
	text, ok := value.(string) // Clients send integers as text over XML-RPC.
	if !ok {
		return nil, &refusal{"FIELD_TYPE_ERROR", field}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return nil, &refusal{"FIELD_TYPE_ERROR", field}
	}
	if !s.setLocked(class, ref, field, n) {
		return nil, &refusal{"HANDLE_INVALID", class, ref}
	}
	return "", nil
}

func token(gen uint64) string { return fmt.Sprintf("%020d,%020d", gen, 0) }

func (s *server) eventFrom(r *http.Request, session string, args []any) (any, *refusal) {
	var classes []string
	for _, c := range args[0].([]any) {
		classes = append(classes, strings.ToLower(c.(string)))
	}
	since, err := generation(args[1].(string))
	if err != nil {
		return nil, &refusal{"EVENT_FROM_TOKEN_PARSE_FAILURE", args[1].(string)}
	}
	timer := time.NewTimer(time.Duration(args[2].(float64) * float64(time.Second)))
	defer timer.Stop()
	for expired := args[2].(float64) == 0; ; {
		if _, ok := s.sessions[session]; !ok {
			return nil, &refusal{"SESSION_INVALID", session}
		}
		if events, any := s.eventRange(classes, since); any || expired {
			return s.finish(events, since), nil
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-timer.C:
			expired = true
		case <-r.Context().Done():
			expired = true
		}
		s.mu.Lock()
	}
}

// pending is an event without its snapshot yet.
type pendingEvent struct{ class, op, ref string }

func (s *server) eventRange(classes []string, since uint64) (adds []pendingEvent, any bool) {
	var mods, dels []pendingEvent
	for class, t := range s.tables {
		name := strings.ToLower(class)
		if !slices.Contains(classes, name) {
			continue
		}
		for ref, row := range t.rows {
			switch {
			case row.created > since:
				adds = append(adds, pendingEvent{class, "add", ref})
			case row.modified > since:
				mods = append(mods, pendingEvent{class, "mod", ref})
			}
		}
		for _, d := range t.dead {
			if d.destroyed > since && d.created <= since {
				dels = append(dels, pendingEvent{class, "del", d.ref})
			}
		}
	}
	adds = append(append(adds, mods...), dels...)
	return adds, len(adds) > 0
}

func (s *server) finish(events []pendingEvent, since uint64) any {
	counts := map[string]any{}
	for class, t := range s.tables {
		counts[strings.ToLower(class)] = count(len(t.rows))
	}
	counts["message"] = count(0)
	last := max(s.gen, since)
	if len(events) == 0 {
		last = since
	}
	if s.between != nil {
		s.between()
	}
	list := []any{}
	for _, e := range events {
		ev := map[string]any{"id": "1", "timestamp": "0.0", "class": strings.ToLower(e.class), "operation": e.op, "ref": e.ref}
		if e.op != "del" {
			row, ok := s.tables[e.class].rows[e.ref]
			if !ok {
				continue // Gone by now: XAPI leaves the event out.
			}
			ev["snapshot"] = row.record
		}
		list = append(list, ev)
	}
	return map[string]any{"events": list, "valid_ref_counts": counts, "token": token(last)}
}

// count is a number that the XML wire writes as <i4>, the one place where XAPI does.
type count int

// datetime is text that the XML wire writes as dateTime.iso8601.
type datetime string

func readJSONCall(body []byte) (string, []any, error) {
	var call struct {
		Version string `json:"jsonrpc"`
		Method  string `json:"method"`
		Params  []any  `json:"params"`
		ID      any    `json:"id"`
	}
	if err := json.Unmarshal(body, &call); err != nil || call.Version != "2.0" || call.ID == nil {
		return "", nil, fmt.Errorf("bad call: %w", err)
	}
	return call.Method, call.Params, nil
}

type xmlValue struct {
	Text   string    `xml:",chardata"`
	String *string   `xml:"string"`
	Double *float64  `xml:"double"`
	Bool   *string   `xml:"boolean"`
	Date   *string   `xml:"dateTime.iso8601"`
	Array  *xmlArray `xml:"array"`
	Struct *xmlMap   `xml:"struct"`
}

type xmlArray struct {
	Values []xmlValue `xml:"data>value"`
}

type xmlMap struct {
	Members []struct {
		Name  string   `xml:"name"`
		Value xmlValue `xml:"value"`
	} `xml:"member"`
}

func (v xmlValue) plain() any {
	switch {
	case v.String != nil:
		return *v.String
	case v.Double != nil:
		return *v.Double
	case v.Bool != nil:
		return *v.Bool == "1"
	case v.Date != nil:
		return *v.Date
	case v.Array != nil:
		out := []any{}
		for _, e := range v.Array.Values {
			out = append(out, e.plain())
		}
		return out
	case v.Struct != nil:
		out := map[string]any{}
		for _, m := range v.Struct.Members {
			out[m.Name] = m.Value.plain()
		}
		return out
	}
	return v.Text
}

func readXMLCall(body []byte) (string, []any, error) {
	var call struct {
		XMLName xml.Name `xml:"methodCall"`
		Method  string   `xml:"methodName"`
		Params  []struct {
			Value *xmlValue `xml:"value"`
		} `xml:"params>param"`
	}
	if err := xml.Unmarshal(body, &call); err != nil {
		return "", nil, err
	}
	var args []any
	for _, p := range call.Params {
		if p.Value == nil {
			return "", nil, fmt.Errorf("empty param")
		}
		args = append(args, p.Value.plain())
	}
	return call.Method, args, nil
}

func jsonReply(result any, refused *refusal) []byte {
	if refused == nil {
		return append(appendJSON([]byte(`{"jsonrpc":"2.0","result":`), result), `,"id":1}`...)
	}
	params := []any{}
	for _, p := range (*refused)[1:] {
		params = append(params, p)
	}
	e := map[string]any{"code": 1, "message": (*refused)[0], "data": params}
	return append(appendJSON([]byte(`{"jsonrpc":"2.0","error":`), e), `,"id":1}`...)
}

// appendJSON prints as XAPI's yojson does: floats without a form in JSON come as bare words (section 1.3). Keys are sorted so that equal
// records print alike.
func appendJSON(b []byte, v any) []byte {
	switch v := v.(type) {
	case map[string]any:
		b = append(b, '{')
		for i, k := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendJSON(b, k)
			b = appendJSON(append(b, ':'), v[k])
		}
		return append(b, '}')
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendJSON(b, e)
		}
		return append(b, ']')
	case float64:
		switch {
		case math.IsNaN(v):
			return append(b, "NaN"...)
		case math.IsInf(v, 1):
			return append(b, "Infinity"...)
		case math.IsInf(v, -1):
			return append(b, "-Infinity"...)
		}
	}
	out, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return append(b, out...)
}

func xmlReply(result any, refused *refusal) []byte {
	var b strings.Builder
	b.WriteString(`<?xml version="1.0"?><methodResponse><params><param>`)
	if refused == nil {
		writeXML(&b, map[string]any{"Status": "Success", "Value": result})
	} else {
		list := []any{}
		for _, p := range *refused {
			list = append(list, p)
		}
		writeXML(&b, map[string]any{"Status": "Failure", "ErrorDescription": list})
	}
	b.WriteString(`</param></params></methodResponse>`)
	return []byte(b.String())
}

var xmlEscaper = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;")

// writeXML prints as XAPI's ocaml-rpc does: text and integers bare, empty text as an empty value, member names as they are (section 1.2).
func writeXML(b *strings.Builder, v any) {
	b.WriteString("<value>")
	switch v := v.(type) {
	case string:
		b.WriteString(xmlEscaper.Replace(v))
	case int64:
		b.WriteString(strconv.FormatInt(v, 10))
	case int:
		b.WriteString(strconv.Itoa(v))
	case count:
		fmt.Fprintf(b, "<i4>%d</i4>", v)
	case datetime:
		fmt.Fprintf(b, "<dateTime.iso8601>%s</dateTime.iso8601>", string(v))
	case bool:
		if v {
			b.WriteString("<boolean>1</boolean>")
		} else {
			b.WriteString("<boolean>0</boolean>")
		}
	case float64:
		switch {
		case math.IsNaN(v):
			b.WriteString("<double>nan</double>")
		case math.IsInf(v, 0):
			b.WriteString(strings.ToLower(fmt.Sprintf("<double>%g</double>", v)))
		default:
			fmt.Fprintf(b, "<double>%.16g</double>", v)
		}
	case []any:
		b.WriteString("<array><data>")
		for _, e := range v {
			writeXML(b, e)
		}
		b.WriteString("</data></array>")
	case map[string]any:
		b.WriteString("<struct>")
		for _, k := range slices.Sorted(maps.Keys(v)) {
			b.WriteString("<member><name>" + k + "</name>")
			writeXML(b, v[k])
			b.WriteString("</member>")
		}
		b.WriteString("</struct>")
	default:
		panic(fmt.Sprintf("no wire form for %T", v))
	}
	b.WriteString("</value>")
}

// pipeNet is a network of in-memory pipes to one HTTP server, so that tests run in virtual time.
type pipeNet struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once

	mu   sync.Mutex
	open map[net.Conn]bool
	down bool
}

func newPipeNet() *pipeNet {
	return &pipeNet{conns: make(chan net.Conn), done: make(chan struct{}), open: map[net.Conn]bool{}}
}

func (p *pipeNet) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipeNet) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipeNet) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (p *pipeNet) dial() (net.Conn, error) {
	p.mu.Lock()
	down := p.down
	p.mu.Unlock()
	if down {
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: fmt.Errorf("pipe is down")}
	}
	near, far := net.Pipe()
	select {
	case p.conns <- far:
	case <-p.done:
		return nil, net.ErrClosed
	}
	p.mu.Lock()
	p.open[far] = true
	p.mu.Unlock()
	return near, nil
}

// cut breaks all connections.
func (p *pipeNet) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		c.Close()
	}
	clear(p.open)
}

func (p *pipeNet) setDown(down bool) {
	p.mu.Lock()
	p.down = down
	p.mu.Unlock()
}
