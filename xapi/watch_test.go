package xapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// mirror is the consumer's copy. It holds Watch to its word: no change of what it does not have, nothing twice, no class
// before its Reset.
type mirror struct {
	mu     sync.Mutex
	copies map[string]map[Ref]mirrored
	faults []string
	resets map[string]int
	fresh  bool
	news   int // news counts changes.
	turns  int // turns counts Fresh.
	reason string
	tell   chan struct{} // tell is closed at the next Fresh or Stale.
}

type mirrored struct{ uuid, record string }

func newMirror() *mirror {
	return &mirror{copies: map[string]map[Ref]mirrored{}, resets: map[string]int{}, tell: make(chan struct{})}
}

func (m *mirror) fault(format string, args ...any) {
	m.faults = append(m.faults, fmt.Sprintf(format, args...))
}

func (m *mirror) Reset(class string, all map[Ref]json.RawMessage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.resets[class]++; m.resets[class] > 1 {
		m.fault("%s was reset again", class)
	}
	m.copies[class] = map[Ref]mirrored{}
	for ref, raw := range all {
		uuid, _ := recordUUID(raw)
		m.copies[class][ref] = mirrored{uuid, string(raw)}
	}
}

func (m *mirror) Apply(batch []Change) {
	m.mu.Lock()
	defer m.mu.Unlock()
	uuids := map[string]bool{}
	dels := true
	for _, c := range batch {
		m.news++
		have, known := m.copies[c.Class][c.Ref]
		switch {
		case m.resets[c.Class] == 0:
			m.fault("change of %s before its reset", c.Class)
		case c.Op == Add && known, c.Op != Add && !known:
			m.fault("%s of %s, known %v", c.Op, c.Ref, known)
		case c.Op == Del && (have.uuid != c.UUID || c.Record != nil):
			m.fault("del of %s with uuid %s", c.Ref, c.UUID)
		case c.Op == Del && !dels:
			m.fault("del of %s behind an add or mod", c.Ref)
		case c.Op == Mod && have.record == string(c.Record):
			m.fault("mod of %s changes nothing", c.Ref)
		case c.Op != Del && uuids[c.Class+c.UUID]:
			m.fault("two live states of %s in one batch", c.UUID)
		}
		if c.Op == Del {
			delete(m.copies[c.Class], c.Ref)
			continue
		}
		dels = false
		uuids[c.Class+c.UUID] = true
		m.copies[c.Class][c.Ref] = mirrored{c.UUID, string(c.Record)}
	}
}

func (m *mirror) Stale(reason string) { m.turn(false, reason) }
func (m *mirror) Fresh()              { m.turn(true, "") }

func (m *mirror) turn(fresh bool, reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fresh {
		m.turns++
	}
	m.fresh, m.reason = fresh, reason
	close(m.tell)
	m.tell = make(chan struct{})
}

func (m *mirror) isFresh() (bool, string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fresh, m.reason
}

// differs compares the copy with the server's contents.
func (m *mirror) differs(s *server, classes []string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.faults) > 0 {
		return strings.Join(m.faults, "; ")
	}
	for _, class := range classes {
		want, got := s.contents(class), m.copies[strings.ToLower(class)]
		for ref, r := range want {
			if got[ref].record != r {
				return fmt.Sprintf("%s %s: have %q, want %q", class, ref, got[ref].record, r)
			}
		}
		for ref := range got {
			if _, ok := want[ref]; !ok {
				return fmt.Sprintf("%s %s should be gone", class, ref)
			}
		}
	}
	return ""
}

// rig is a server behind pipes, a client and a running watch, all in one synctest bubble.
type rig struct {
	*server
	net    *pipeNet
	client *Client
	mirror *mirror
	stop   func() error
}

var watched = []string{"pool", "SR", "VDI", "VM", "task"}

func newRig(s *server, classes ...string) (*rig, error) {
	r := &rig{server: s, net: newPipeNet(), mirror: newMirror()}
	if len(classes) == 0 {
		classes = watched
	}
	web := &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)}
	served := make(chan error, 1)
	go func() { served <- web.Serve(r.net) }()
	client, err := New(Config{
		Originator: "test", Log: slog.New(slog.DiscardHandler),
		Dial: func(context.Context, string, string) (net.Conn, error) { return r.net.dial() },
	})
	if err != nil {
		return nil, err
	}
	r.client = client
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Watch(ctx, client, WatchConfig{Classes: classes, Handler: r.mirror}) }()
	r.stop = func() error {
		cancel()
		werr := <-ended
		if errors.Is(werr, context.Canceled) {
			werr = nil
		}
		cerr := client.Close(context.Background())
		_ = web.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			cerr = errors.Join(cerr, err)
		}
		return errors.Join(werr, cerr)
	}
	return r, nil
}

func (r *rig) wait(d time.Duration) { sleep(context.Background(), d) }

// step is one thing that happens to the pool or to the wire between it and us.
type step struct {
	kind  string
	class string
	n     int
	after time.Duration
}

var kinds = []string{
	"create", "create", "create", "modify", "modify", "modify", "destroy", "destroy", "same", "flicker", "cut", "down", "restart",
	"replicate", "failover", "sessions", "burst", "swap", "race", "truncate", "html", "hang", "garbage", "renumber", "renew", "refuse",
}

func drawStep(t *rapid.T) step {
	return step{
		kind:  rapid.SampledFrom(kinds).Draw(t, "kind"),
		class: rapid.SampledFrom([]string{"SR", "VDI", "VM", "task"}).Draw(t, "class"),
		n:     rapid.IntRange(0, 20).Draw(t, "n"),
		after: time.Duration(rapid.SampledFrom([]int{0, 1, 20, 90, 110, 700, 5000, 45000}).Draw(t, "after")) * time.Millisecond,
	}
}

// play does one step.
func (r *rig) play(st step, old *replica) {
	refs := r.refs(st.class)
	pick := ""
	if len(refs) > 0 {
		pick = refs[st.n%len(refs)]
	}
	switch st.kind {
	case "create":
		r.create(st.class, map[string]any{"name_label": fmt.Sprint("new", st.n), "size": int64(st.n)})
	case "modify":
		r.set(st.class, pick, "name_label", fmt.Sprint("changed", st.n, r.gen))
	case "same":
		r.set(st.class, pick, "uuid", r.uuidOf(st.class, pick))
	case "destroy":
		r.destroy(st.class, pick)
	case "flicker":
		r.destroy(st.class, r.create(st.class, nil))
	case "burst":
		for range st.n {
			r.create(st.class, nil)
		}
		for _, ref := range refs {
			r.destroy(st.class, ref)
		}
	case "swap": // As many made as lost, so that only the order of things can tell.
		r.destroy(st.class, pick)
		r.create(st.class, nil)
	case "cut":
		r.net.cut()
	case "down":
		r.net.setDown(true)
		r.net.cut()
		r.wait(time.Duration(st.n) * time.Second)
		r.net.setDown(false)
	case "restart":
		r.restart()
		r.net.cut()
	case "replicate":
		*old = r.replicate()
	case "failover":
		r.failover(*old)
		r.net.cut()
	case "sessions":
		r.dropSessions()
	case "renew": // Another call of the daemon finds the session dead first and renews it.
		r.dropSessions()
		_, _ = r.client.ThisHost(context.Background())
	case "renumber":
		r.renumber(st.class)
		*old = r.replicate()
	case "race":
		r.mu.Lock()
		r.between = func() {
			r.between = nil
			r.createLocked(st.class, nil)
			r.destroyLocked(st.class, pick)
		}
		r.mu.Unlock()
	case "truncate":
		r.mu.Lock()
		r.abort[[]string{"event.from", "VDI.get_all_records", "event.inject", "session.login_with_password"}[st.n%4]] = true
		r.mu.Unlock()
	case "hang":
		r.mu.Lock()
		r.hang["event.from"] = true
		r.mu.Unlock()
	case "refuse":
		code := []string{"EVENTS_LOST", "INTERNAL_ERROR", "HOST_STILL_BOOTING", "EVENT_FROM_TOKEN_PARSE_FAILURE"}[st.n%4]
		r.mu.Lock()
		r.server.refuse["event.from"] = code
		r.mu.Unlock()
		r.wait(time.Second)
		r.mu.Lock()
		delete(r.server.refuse, "event.from")
		r.mu.Unlock()
	case "html", "garbage":
		r.spoilNext(st)
	}
}

func (r *rig) uuidOf(class, ref string) any {
	r.mu.Lock()
	defer r.mu.Unlock()
	if row := r.tables[class].rows[ref]; row != nil {
		return row.record["uuid"]
	}
	return nil
}

// spoilNext makes the next event.from reply HTML, or puts events into it that make no sense.
func (r *rig) spoilNext(st step) {
	junk := []string{
		`{"class":"martian","operation":"add","ref":"OpaqueRef:x","snapshot":{"uuid":"u"}}`, `7`, `null`,
		`{"class":"` + strings.ToLower(st.class) + `","operation":"explode","ref":"OpaqueRef:x"}`,
		`{"class":"` + strings.ToLower(st.class) + `","operation":"mod","ref":"OpaqueRef:x","snapshot":[]}`,
		`{"class":"` + strings.ToLower(st.class) + `","operation":"del","ref":""}`,
		`{"class":"` + strings.ToLower(st.class) + `","operation":"del","ref":"OpaqueRef:never"}`,
	}[st.n%7]
	r.mu.Lock()
	defer r.mu.Unlock()
	var once sync.Once
	r.mangle = func(method string, reply []byte) []byte {
		if method != "event.from" {
			return reply
		}
		once.Do(func() {
			if st.kind == "html" {
				reply = []byte("<!DOCTYPE html><html><body>502 Bad Gateway</body></html>")
				return
			}
			text := strings.Replace(string(reply), `"events":[{`, `"events":[`+junk+`,{`, 1)
			reply = []byte(strings.Replace(text, `"events":[]`, `"events":[`+junk+`]`, 1))
		})
		return reply
	}
}

// TestWatchConverges plays any schedule of changes, lost deletions, broken connections, restarts, fail-overs and nonsense, and finds
// the consumer's copy equal to the server's once things are quiet.
func TestWatchConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.Custom(drawStep), 1, 40).Draw(rt, "steps")
		tombs := rapid.IntRange(1, 4).Draw(rt, "tombstones")
		var problem string
		synctest.Test(t, func(t *testing.T) {
			s := newServer()
			s.tombs = tombs
			for i := range 6 {
				s.create([]string{"SR", "VDI", "VM"}[i%3], nil)
			}
			r, err := newRig(s)
			if err != nil {
				t.Fatal(err)
			}
			old := s.replicate()
			for _, st := range steps {
				r.play(st, &old)
				r.wait(st.after)
			}
			// Two long polls and the longest pause: the most that can pass until a fault is noticed and mended.
			r.wait(3 * time.Minute)
			synctest.Wait()
			problem = r.mirror.differs(s, watched)
			if fresh, reason := r.mirror.isFresh(); problem == "" && !fresh {
				problem = "copy is not fresh: " + reason
			}
			if err := r.stop(); err != nil && problem == "" {
				problem = err.Error()
			}
			if left := s.sessionsLeft(); problem == "" && left > 0 {
				problem = fmt.Sprintf("%d sessions left behind", left)
			}
		})
		if problem != "" {
			rt.Fatal(problem)
		}
	})
}

// sessionsLeft counts the sessions that were not logged out. A session that nothing was ever called with is one whose log-in lost its reply on
// the way: nobody can log that out.
func (s *server) sessionsLeft() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for ref := range s.sessions {
		if s.used[ref] {
			n++
		}
	}
	return n
}

func inBubble(t *testing.T, s *server, classes []string, test func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r, err := newRig(s, classes...)
		if err != nil {
			t.Fatal(err)
		}
		test(r)
		if problem := r.mirror.differs(s, nil); problem != "" {
			t.Error(problem)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		if left := s.sessionsLeft(); left > 0 {
			t.Errorf("%d sessions left behind", left)
		}
	})
}

func TestWatchDeliversAChangeWithinThePause(t *testing.T) {
	s := newServer()
	vm := s.create("VM", map[string]any{"name_label": "a"})
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		if fresh, _ := r.mirror.isFresh(); !fresh {
			t.Fatal("not fresh after the first poll")
		}
		s.set("VM", vm, "name_label", "b")
		r.wait(DefaultWatchPause)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
		polls := s.callCount("event.from")
		r.wait(10 * time.Minute)
		if got := s.callCount("event.from") - polls; got > 25 {
			t.Errorf("%d polls in ten quiet minutes; want one per 30 s", got)
		}
	})
}

func TestWatchNoticesLostDeletions(t *testing.T) {
	s := newServer()
	s.tombs = 4
	var refs []string
	for range 40 {
		refs = append(refs, s.create("VDI", nil))
	}
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		r.net.setDown(true)
		r.net.cut()
		for _, ref := range refs[:30] {
			s.destroy("VDI", ref)
		}
		r.wait(time.Second)
		r.net.setDown(false)
		r.wait(time.Minute)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
		if n := s.callCount("VM.get_all_records"); n != 1 {
			t.Errorf("VM was read %d times; only VDI had lost deletions", n)
		}
	})
}

// TestWatchSurvivesRenewalBySomebodyElse: another coordinator takes over from an older copy of the database, and another call renews the session
// before the watch notices. With the new session the old token would be valid, match nothing, and the counts would agree.
func TestWatchSurvivesRenewalBySomebodyElse(t *testing.T) {
	s := newServer()
	vm := s.create("VM", map[string]any{"name_label": "a"})
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		old := s.replicate()
		s.set("VM", vm, "name_label", "b")
		r.wait(DefaultWatchPause / 2) // The watch has taken the event and pauses: no call of its own can see what follows.
		s.failover(old)
		if _, err := r.client.ThisHost(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.wait(time.Minute)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
	})
}

func TestWatchGivesUpOnAHalfOpenConnection(t *testing.T) {
	s := newServer()
	vm := s.create("VM", nil)
	s.hang["event.from"] = true
	inBubble(t, s, nil, func(r *rig) {
		r.wait(pollMargin + time.Second)
		s.set("VM", vm, "name_label", "late")
		r.wait(time.Second)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
	})
}

func TestWatchDoesNotLoopOnACountThatNeverAgrees(t *testing.T) {
	s := newServer()
	s.mangle = func(method string, reply []byte) []byte {
		if method != "event.from" {
			return reply
		}
		return []byte(strings.Replace(string(reply), `"vdi":0`, `"vdi":3`, 1))
	}
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Hour)
		if n := s.callCount("VDI.get_all_records"); n < 5 || n > 30 {
			t.Errorf("VDI was read %d times in an hour", n)
		}
		if fresh, reason := r.mirror.isFresh(); !fresh {
			t.Errorf("not fresh: %s", reason)
		}
	})
}

func TestWatchIsPatientWhenEventsAreRefused(t *testing.T) {
	s := newServer()
	s.refuse["event.from"] = "INTERNAL_ERROR"
	inBubble(t, s, nil, func(r *rig) {
		r.wait(10 * time.Minute)
		if n := s.callCount("VM.get_all_records"); n < 10 || n > 50 {
			t.Errorf("everything was read %d times in ten minutes", n)
		}
	})
}

// TestWatchReadsAllAgainWhenAReplyIsTooLarge: after a long absence the events may not fit a reply; asking again would fail for ever.
func TestWatchReadsAllAgainWhenAReplyIsTooLarge(t *testing.T) {
	s := newServer()
	vm := s.create("VM", map[string]any{"name_label": "a"})
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		s.mu.Lock()
		s.mangle = func(method string, reply []byte) []byte {
			if method == "event.from" && strings.Contains(string(reply), `"vm","id"`) {
				return append(reply, strings.Repeat(" ", 1<<20)...)
			}
			return reply
		}
		s.mu.Unlock()
		r.client.cfg.MaxReply = 1 << 19
		s.set("VM", vm, "name_label", "b")
		r.wait(time.Minute)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
		if fresh, reason := r.mirror.isFresh(); !fresh {
			t.Errorf("not fresh: %s", reason)
		}
	})
}

func TestCallsDoNotWaitBehindTheLongPoll(t *testing.T) {
	s := newServer()
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		start := time.Now()
		if _, err := r.client.ThisHost(context.Background()); err != nil || time.Since(start) != 0 {
			t.Errorf("call took %s beside a long poll: %v", time.Since(start), err)
		}
	})
}

func TestWatchResyncsWhenTheTokenRunsBackwards(t *testing.T) {
	s := newServer()
	vm := s.create("VM", nil)
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		s.mu.Lock()
		var once sync.Once
		s.mangle = func(method string, reply []byte) []byte {
			if method == "event.from" {
				once.Do(func() {
					var whole map[string]map[string]any
					_ = json.Unmarshal([]byte(strings.Replace(string(reply), `"id":1,"jsonrpc":"2.0",`, "", 1)), &whole)
					reply = []byte(`{"jsonrpc":"2.0","result":{"events":[],"valid_ref_counts":{},"token":"` + token(5) + `"},"id":1}`)
				})
			}
			return reply
		}
		s.mu.Unlock()
		s.set("VM", vm, "name_label", "b")
		r.wait(time.Minute)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
		if n := s.callCount("event.inject"); n != 2 {
			t.Errorf("%d tokens were made; want one at the start and one after running backwards", n)
		}
		if n := r.mirror.turns; n != 2 {
			t.Errorf("fresh was said %d times", n)
		}
	})
}

func TestWatchReadsAgainAfterAnUnreadableEvent(t *testing.T) {
	s := newServer()
	vm := s.create("VM", map[string]any{"name_label": "a"})
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		s.mu.Lock()
		s.mangle = func(method string, reply []byte) []byte {
			if method != "event.from" {
				return reply
			}
			return []byte(strings.Replace(string(reply), `"snapshot":{"name_label":"b"`, `"snap":{"name_label":"b"`, 1))
		}
		s.mu.Unlock()
		s.set("VM", vm, "name_label", "b")
		r.wait(time.Second)
		if p := r.mirror.differs(s, watched); p != "" {
			t.Error(p)
		}
	})
}

func TestWatchLeavesOutAClassXAPIDoesNotKnow(t *testing.T) {
	s := newServer()
	s.create("VM", nil)
	inBubble(t, s, []string{"vm", "VM", "Martian"}, func(r *rig) {
		r.wait(time.Minute)
		if p := r.mirror.differs(s, []string{"VM"}); p != "" {
			t.Error(p)
		}
		if fresh, reason := r.mirror.isFresh(); !fresh {
			t.Errorf("not fresh: %s", reason)
		}
		if _, ok := r.mirror.resets["martian"]; ok {
			t.Error("unknown class was delivered")
		}
	})
}

func TestWatchFollowsMessagesWithoutCounts(t *testing.T) {
	s := newServer()
	m := s.create("message", map[string]any{"name": "A"})
	inBubble(t, s, []string{"message"}, func(r *rig) {
		r.wait(time.Second)
		s.create("message", map[string]any{"name": "B"})
		s.destroy("message", m)
		r.wait(time.Hour)
		if p := r.mirror.differs(s, []string{"message"}); p != "" {
			t.Error(p)
		}
		if n := s.callCount("message.get_all_records"); n != 1 {
			t.Errorf("messages were read %d times; their count proves nothing", n)
		}
	})
}

func TestWatchSaysStaleOnceAndWhy(t *testing.T) {
	s := newServer()
	inBubble(t, s, nil, func(r *rig) {
		r.wait(time.Second)
		r.net.setDown(true)
		r.net.cut()
		r.wait(10 * time.Minute)
		fresh, reason := r.mirror.isFresh()
		if fresh || !strings.Contains(reason, "event.from") {
			t.Errorf("fresh %v, reason %q", fresh, reason)
		}
		r.net.setDown(false)
		r.wait(time.Minute)
		if fresh, reason := r.mirror.isFresh(); !fresh || r.mirror.turns != 2 {
			t.Errorf("fresh %v after %d turns: %s", fresh, r.mirror.turns, reason)
		}
		if n := s.callCount("VM.get_all_records"); n != 1 {
			t.Errorf("everything was read again after a broken connection: %d times", n)
		}
	})
}

func TestWatchEndsWhenTheClientIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer()
		r, err := newRig(s)
		if err != nil {
			t.Fatal(err)
		}
		r.wait(time.Second)
		if err := r.client.Close(context.Background()); err != nil {
			t.Error(err)
		}
		r.wait(time.Minute)
		if err := r.stop(); !errors.Is(err, ErrClosed) {
			t.Errorf("watch ended with %v; want ErrClosed", err)
		}
	})
}

func TestWatchRefusesBadSettings(t *testing.T) {
	c, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]WatchConfig{
		"no handler": {Classes: []string{"VM"}},
		"no classes": {Handler: newMirror()},
		"bad class":  {Classes: []string{"VM/OpaqueRef:x"}, Handler: newMirror()},
	} {
		if err := Watch(context.Background(), c, cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// FuzzDigest feeds event.from replies of any form to the part that reads them.
func FuzzDigest(f *testing.F) {
	f.Add([]byte(`{"events":[{"class":"vm","operation":"add","ref":"OpaqueRef:a","snapshot":{"uuid":"u"}}],"token":"1,0"}`))
	f.Add([]byte(`{"events":[{"class":"vm","operation":"del","ref":"OpaqueRef:a"},{"class":"VM","operation":"mod"},7,null]}`))
	f.Add([]byte(`{"events":[{"class":7}],"valid_ref_counts":[]}`))
	c, err := New(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var reply eventsReply
		if json.Unmarshal(in, &reply) != nil {
			return
		}
		m := newMirror()
		w, err := newWatcher(c, WatchConfig{Classes: []string{"VM"}, Handler: m})
		if err != nil {
			t.Fatal(err)
		}
		w.classes[0].rows, w.classes[0].loaded = map[Ref]row{}, true
		m.Reset("vm", nil)
		_, _ = generation(reply.Token)
		for range 2 { // Twice: repetitions must change nothing.
			w.apply(w.digest(reply.Events))
		}
		if len(m.faults) > 0 && !slices.ContainsFunc(m.faults, func(s string) bool { return strings.HasPrefix(s, "two live states") }) {
			t.Fatal(m.faults)
		}
		if !maps.Equal(rowRefs(w), mirrorRefs(m)) {
			t.Fatal("kept rows and delivered copy differ")
		}
	})
}

func rowRefs(w *watcher) map[Ref]string {
	out := map[Ref]string{}
	for ref, r := range w.classes[0].rows {
		out[ref] = r.uuid
	}
	return out
}

func mirrorRefs(m *mirror) map[Ref]string {
	out := map[Ref]string{}
	for ref, r := range m.copies["vm"] {
		out[ref] = r.uuid
	}
	return out
}
