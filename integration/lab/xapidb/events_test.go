package xapidb_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// poll is From with timeout 0.
func poll(t testing.TB, db *xapidb.DB, token string, classes ...string) xapidb.Batch {
	t.Helper()
	b, err := db.From(context.Background(), classes, token, 0)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// brief renders events as "class operation name", where name tells the test's objects apart.
func brief(b xapidb.Batch, names map[string]string) []string {
	out := make([]string, 0, len(b.Events))
	for _, e := range b.Events {
		out = append(out, e.Class+" "+e.Operation+" "+cmp.Or(names[e.Ref], "?"))
	}
	slices.Sort(out)
	return out
}

// The list is that of upstream's test_event.ml and quicktest_event.ml: what a reply contains after a change.
func TestBatchAfterChanges(t *testing.T) {
	type world struct {
		db          *xapidb.DB
		h1, h2      string
		sr, vm, vdi string
		vbd, other  string
	}
	every := []string{"*"}
	for _, c := range []struct {
		name    string
		classes func(world) []string
		act     func(t *testing.T, w *world)
		want    []string
	}{
		{"nothing", nil, func(*testing.T, *world) {}, []string{}},
		{"add", nil, func(t *testing.T, w *world) { w.other = mustCreate(t, w.db, "VM", nil) }, []string{"vm add new"}},
		{"add and many writes are one add", nil, func(t *testing.T, w *world) {
			w.other = mustCreate(t, w.db, "VM", nil)
			must(t, w.db.Set("VM", w.other, "name_label", "x"))
			must(t, w.db.Set("VM", w.other, "name_label", "y"))
		}, []string{"vm add new"}},
		{"many writes are one mod", nil, func(t *testing.T, w *world) {
			must(t, w.db.Set("VM", w.vm, "name_label", "x"))
			must(t, w.db.Set("VM", w.vm, "name_label", "y"))
		}, []string{"vm mod vm"}},
		{"a write of the same value is nothing", nil, func(t *testing.T, w *world) { must(t, w.db.Set("VM", w.vm, "name_label", "")) }, []string{}},
		{"created and destroyed is nothing", nil, func(t *testing.T, w *world) {
			must(t, w.db.Destroy("VM", mustCreate(t, w.db, "VM", nil)))
		}, []string{}},
		{"VBD create is one vbd, one vm and one vdi event", nil, func(t *testing.T, w *world) {
			w.other = mustCreate(t, w.db, "VBD", map[string]any{"VM": w.vm, "VDI": w.vdi})
		}, []string{"vbd add new", "vdi mod vdi", "vm mod vm"}},
		{"VBD destroy is one vbd, one vm and one vdi event", nil, func(t *testing.T, w *world) { must(t, w.db.Destroy("VBD", w.vbd)) },
			[]string{"vbd del vbd", "vdi mod vdi", "vm mod vm"}},
		{"VDI create touches its SR", nil, func(t *testing.T, w *world) { w.other = mustCreate(t, w.db, "VDI", map[string]any{"SR": w.sr}) },
			[]string{"sr mod sr", "vdi add new"}},
		{"a VDI's size does not touch its SR", nil, func(t *testing.T, w *world) { must(t, w.db.Set("VDI", w.vdi, "physical_utilisation", 1)) },
			[]string{"vdi mod vdi"}},
		{"a VM that moves touches both hosts", nil, func(t *testing.T, w *world) { must(t, w.db.Set("VM", w.vm, "resident_on", w.h2)) },
			[]string{"host mod h1", "host mod h2", "vm mod vm"}},
		{"PBD touches SR and host", nil, func(t *testing.T, w *world) {
			w.other = mustCreate(t, w.db, "PBD", map[string]any{"SR": w.sr, "host": w.h1})
		}, []string{"host mod h1", "pbd add new", "sr mod sr"}},
		{"secrets and sessions have no events", nil, func(t *testing.T, w *world) {
			mustCreate(t, w.db, "secret", nil)
			mustCreate(t, w.db, "session", nil)
		}, []string{}},
		{"other classes are not sent", func(world) []string { return []string{"VM"} }, func(t *testing.T, w *world) { must(t, w.db.Destroy("VBD", w.vbd)) },
			[]string{"vm mod vm"}},
		{"unknown classes never match", func(world) []string { return []string{"nosuch", "vm"} }, func(t *testing.T, w *world) { must(t, w.db.Destroy("VBD", w.vbd)) },
			[]string{"vm mod vm"}},
		{"one object only", func(w world) []string { return []string{"vm/" + w.vm} }, func(t *testing.T, w *world) {
			mustCreate(t, w.db, "VM", nil)
			must(t, w.db.Set("VM", w.vm, "name_label", "x"))
		}, []string{"vm mod vm"}},
		{"one object, others change", func(w world) []string { return []string{"vm/" + w.vm} }, func(t *testing.T, w *world) { mustCreate(t, w.db, "VM", nil) }, []string{}},
		{"one object is destroyed", func(w world) []string { return []string{"vbd/" + w.vbd} }, func(t *testing.T, w *world) { must(t, w.db.Destroy("VBD", w.vbd)) },
			[]string{"vbd del vbd"}},
		{"message", nil, func(t *testing.T, w *world) { w.other = mustCreate(t, w.db, "message", nil) }, []string{"message add new"}},
		{"no stale message", nil, func(t *testing.T, w *world) { must(t, w.db.Destroy("message", mustCreate(t, w.db, "message", nil))) }, []string{}},
		{"inject", nil, func(t *testing.T, w *world) {
			_, err := w.db.Inject("VM", w.vm)
			must(t, err)
		}, []string{"vm mod vm"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := world{db: newDB(t, xapidb.Options{})}
			w.h1, w.h2, w.sr = mustCreate(t, w.db, "host", nil), mustCreate(t, w.db, "host", nil), mustCreate(t, w.db, "SR", nil)
			w.vm = mustCreate(t, w.db, "VM", map[string]any{"resident_on": w.h1})
			w.vdi = mustCreate(t, w.db, "VDI", map[string]any{"SR": w.sr})
			w.vbd = mustCreate(t, w.db, "VBD", map[string]any{"VM": w.vm, "VDI": w.vdi})
			classes := every
			if c.classes != nil {
				classes = c.classes(w)
			}
			token := poll(t, w.db, "", every...).Token
			c.act(t, &w)
			b := poll(t, w.db, token, classes...)
			names := map[string]string{w.h1: "h1", w.h2: "h2", w.sr: "sr", w.vm: "vm", w.vdi: "vdi", w.vbd: "vbd", w.other: "new"}
			if diff := gocmp.Diff(c.want, brief(b, names)); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			if len(c.want) == 0 && b.Token != token {
				t.Errorf("an empty reply moved the token from %s to %s", token, b.Token)
			}
			if again := poll(t, w.db, b.Token, classes...); len(again.Events) != 0 {
				t.Errorf("the next reply repeats %v", brief(again, names))
			}
		})
	}
}

func TestBatchShape(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	vm := mustCreate(t, db, "VM", nil)
	mustCreate(t, db, "secret", nil)
	mustCreate(t, db, "message", nil)
	b := poll(t, db, "", "vm", "message")
	if b.Token != "00000000000000000002,00000000000000000001" {
		t.Errorf("token %s", b.Token)
	}
	for class, n := range map[string]int{"vm": 1, "secret": 1, "message": 0, "vm_metrics": 0} {
		if got, ok := b.ValidRefCounts[class]; !ok || got != n {
			t.Errorf("valid_ref_counts[%s] = %d, %v; want %d", class, got, ok, n)
		}
	}
	if e := b.Events[1]; e.ID != 2 || e.Class != "vm" || e.Ref != vm || e.Snapshot.Get("power_state") != "Halted" {
		t.Errorf("event %+v", e)
	}
	if got := []string{b.Events[0].Class, b.Events[1].Class}; !slices.Equal(got, []string{"message", "vm"}) {
		t.Errorf("order %v, want messages first", got)
	}
	for _, bad := range []string{"x", "1", "1,", ",", "1,2,3", "1.5,0"} {
		_, err := db.From(context.Background(), nil, bad, 0)
		wantCode(t, err, "EVENT_FROM_TOKEN_PARSE_FAILURE", bad)
	}
	_, err := db.Inject("vm", vm)
	wantCode(t, err, "HANDLE_INVALID", "vm", vm)
}

func TestInjectGivesATokenJustBelow(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	vm, other := mustCreate(t, db, "VM", nil), mustCreate(t, db, "VM", nil)
	before := db.Generation()
	token, err := db.Inject("VM", vm)
	must(t, err)
	if db.Generation() != before+2 {
		t.Errorf("inject moved the generation by %d, want 2", db.Generation()-before)
	}
	if got := brief(poll(t, db, token, "*"), map[string]string{vm: "vm", other: "other"}); !slices.Equal(got, []string{"vm mod vm"}) {
		t.Errorf("events %v", got)
	}
}

func TestFromBlocks(t *testing.T) {
	type reply struct {
		b   xapidb.Batch
		err error
		at  time.Duration
	}
	for _, c := range []struct {
		name    string
		pacing  time.Duration
		classes []string
		timeout time.Duration
		act     func(db *xapidb.DB, vm string, cancel context.CancelCauseFunc)
		events  int
		at      time.Duration
		err     error
	}{
		{name: "timeout", classes: []string{"vm"}, timeout: time.Second, act: func(*xapidb.DB, string, context.CancelCauseFunc) {}, at: time.Second},
		{name: "no classes", timeout: time.Second, act: func(db *xapidb.DB, vm string, _ context.CancelCauseFunc) { _ = db.Destroy("VM", vm) }, at: time.Second},
		{name: "write", classes: []string{"vm"}, timeout: time.Minute, act: func(db *xapidb.DB, vm string, _ context.CancelCauseFunc) { _ = db.Destroy("VM", vm) }, events: 1, at: 200 * time.Millisecond},
		{name: "paced write", pacing: 50 * time.Millisecond, classes: []string{"vm"}, timeout: time.Minute,
			act: func(db *xapidb.DB, vm string, _ context.CancelCauseFunc) { _ = db.Destroy("VM", vm) }, events: 1, at: 250 * time.Millisecond},
		{name: "write of another class", classes: []string{"vm"}, timeout: time.Second, act: func(db *xapidb.DB, _ string, _ context.CancelCauseFunc) { _, _ = db.Create("SR", nil) }, at: time.Second},
		{name: "cancel", classes: []string{"vm"}, timeout: time.Minute, act: func(_ *xapidb.DB, _ string, cancel context.CancelCauseFunc) { cancel(errLogout) }, at: 200 * time.Millisecond, err: errLogout},
		{name: "restart", classes: []string{"vm"}, timeout: time.Minute, act: func(db *xapidb.DB, _ string, _ context.CancelCauseFunc) { db.Restart() }, at: 200 * time.Millisecond, err: xapidb.ErrRestarted},
		{name: "negative timeout is a day", classes: []string{"vm"}, timeout: -1, act: func(*xapidb.DB, string, context.CancelCauseFunc) {}, at: 24 * time.Hour},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := newDB(t, xapidb.Options{Pacing: c.pacing})
				vm := mustCreate(t, db, "VM", nil)
				token := poll(t, db, "", "*").Token
				ctx, cancel := context.WithCancelCause(t.Context())
				start := time.Now()
				replies := make(chan reply, 3)
				for range 3 { // Parallel calls do not disturb each other.
					go func() {
						b, err := db.From(ctx, c.classes, token, c.timeout)
						replies <- reply{b, err, time.Since(start)}
					}()
				}
				<-time.After(200 * time.Millisecond)
				c.act(db, vm, cancel)
				for range 3 {
					r := <-replies
					if !errors.Is(r.err, c.err) || len(r.b.Events) != c.events || r.at != c.at {
						t.Errorf("%d events after %v, error %v; want %d after %v, error %v", len(r.b.Events), r.at, r.err, c.events, c.at, c.err)
					}
					if c.err == nil && c.events == 0 && r.b.Token != token {
						t.Errorf("token moved from %s to %s", token, r.b.Token)
					}
				}
				cancel(nil)
			})
		})
	}
}

var errLogout = errors.New("logged out")

func TestTombstonesAreForgottenSilently(t *testing.T) {
	for _, c := range []struct{ limit, deletions, reported int }{
		{8, 6, 6}, {8, 7, 7}, {8, 8, 5}, {8, 10, 7}, {8, 11, 5}, {0, 511, 511}, {0, 512, 257}, {0, 766, 511}, {0, 767, 257},
	} {
		t.Run(fmt.Sprint(c.limit, "/", c.deletions), func(t *testing.T) {
			db := newDB(t, xapidb.Options{TombstoneLimit: c.limit})
			var refs []string
			for range c.deletions {
				refs = append(refs, mustCreate(t, db, "VDI", nil))
			}
			token := poll(t, db, "", "vdi").Token
			for _, r := range refs {
				must(t, db.Destroy("VDI", r))
			}
			b := poll(t, db, token, "vdi")
			if len(b.Events) != c.reported {
				t.Errorf("%d deletions reported, want %d", len(b.Events), c.reported)
			}
			if b.ValidRefCounts["vdi"] != 0 {
				t.Errorf("valid_ref_counts says %d", b.ValidRefCounts["vdi"])
			}
		})
	}
}

func TestRestartKeepsRowsAndGeneration(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	vm := mustCreate(t, db, "VM", nil)
	gone := mustCreate(t, db, "VM", nil)
	mustCreate(t, db, "task", nil)
	mustCreate(t, db, "session", nil)
	token := poll(t, db, "", "*").Token
	must(t, db.Destroy("VM", gone))
	before := db.Generation()
	db.Restart()
	if db.Generation() != before || db.Len("VM") != 1 || db.Len("task") != 0 || db.Len("session") != 0 {
		t.Errorf("after restart: generation %d, was %d; %d VMs, %d tasks, %d sessions", db.Generation(), before, db.Len("VM"), db.Len("task"), db.Len("session"))
	}
	b := poll(t, db, token, "*")
	if len(b.Events) != 0 || b.ValidRefCounts["task"] != 0 || b.ValidRefCounts["vm"] != 1 {
		t.Errorf("an old token sees %v, counts %v", b.Events, b.ValidRefCounts)
	}
	must(t, db.Set("VM", vm, "name_label", "x"))
	if got := brief(poll(t, db, token, "*"), map[string]string{vm: "vm"}); !slices.Equal(got, []string{"vm mod vm"}) {
		t.Errorf("events after restart %v", got)
	}
}

func TestRollbackHidesChangesFromOldTokens(t *testing.T) {
	db := newDB(t, xapidb.Options{})
	vm := mustCreate(t, db, "VM", nil)
	for i := range 20 {
		must(t, db.Set("VM", vm, "memory_target", i+1))
	}
	token := poll(t, db, "", "*").Token
	db.Rollback(10)
	must(t, db.Set("VM", vm, "name_label", "x"))
	if b := poll(t, db, token, "*"); len(b.Events) != 0 || b.Token != token {
		t.Errorf("an old token sees %v", b.Events)
	}
	if b := poll(t, db, "", "*"); len(b.Events) != 1 || b.Token >= token {
		t.Errorf("a fresh call sees %d events and token %s, old token %s", len(b.Events), b.Token, token)
	}
	for i := range 10 {
		must(t, db.Set("VM", vm, "memory_target", 100+i))
	}
	if b := poll(t, db, token, "*"); len(b.Events) != 1 {
		t.Errorf("caught up, but an old token sees %v", b.Events)
	}
}

// dump renders the rows of a class, so that two states can be compared.
func dump(db *xapidb.DB, class string) map[string]string {
	rows := map[string]string{}
	for _, r := range db.Records(class) {
		rows[r.Ref()] = render(r)
	}
	return rows
}

func render(r xapidb.Record) string {
	var b strings.Builder
	r.Each(func(f *xapidb.Field, v any) {
		if set, ok := v.([]string); ok { // Sets have no order.
			v = slices.Sorted(slices.Values(set))
		}
		fmt.Fprintln(&b, f.Name, v)
	})
	return b.String()
}

// After any changes, one batch turns the state at its token into the state now, says nothing else, and says nothing twice.
func TestBatchIsTheDifferenceOfTwoStates(t *testing.T) {
	classes := []string{"VM", "VDI", "VBD", "SR", "host"}
	rapid.Check(t, func(t *rapid.T) {
		db := xapidb.New(xapidb.Options{Rand: xapidb.SeededRand(rapid.Uint64().Draw(t, "seed"))})
		w := actor{t: t, db: db}
		w.some(rapid.IntRange(0, 30).Draw(t, "before"))
		for range 3 {
			first, err := db.From(context.Background(), classes, "", 0)
			if err != nil {
				t.Fatal(err)
			}
			old := map[string]map[string]string{}
			for _, c := range classes {
				old[c] = dump(db, c)
			}
			w.some(rapid.IntRange(0, 30).Draw(t, "between"))
			b, err := db.From(context.Background(), classes, first.Token, 0)
			if err != nil {
				t.Fatal(err)
			}
			checkDifference(t, db, classes, old, b)
		}
	})
}

func checkDifference(t *rapid.T, db *xapidb.DB, classes []string, old map[string]map[string]string, b xapidb.Batch) {
	seen := map[string]bool{}
	for _, c := range classes {
		state := old[c]
		for _, e := range b.Events {
			if e.Class != strings.ToLower(c) {
				continue
			}
			// A "del" may name an object that the consumer never saw: born and gone between two tokens, when the later token ends before the death. So it is upstream.
			_, known := state[e.Ref]
			if seen[e.Ref] || known && e.Operation == "add" || !known && e.Operation == "mod" {
				t.Errorf("%s %s of an object that was known: %v, seen: %v", e.Class, e.Operation, known, seen[e.Ref])
			}
			seen[e.Ref] = true
			if e.Operation == "del" {
				delete(state, e.Ref)
			} else {
				state[e.Ref] = render(*e.Snapshot)
			}
		}
		now := dump(db, c)
		if diff := gocmp.Diff(now, state); diff != "" {
			t.Errorf("%s after the batch (-database +consumer):\n%s", c, diff)
		}
		if b.ValidRefCounts[strings.ToLower(c)] != len(now) {
			t.Errorf("valid_ref_counts[%s] = %d, want %d", c, b.ValidRefCounts[strings.ToLower(c)], len(now))
		}
	}
}

// actor makes random changes.
type actor struct {
	t  *rapid.T
	db *xapidb.DB
}

func (a *actor) some(n int) {
	for range n {
		a.step()
	}
}

func (a *actor) pick(class string) string {
	return rapid.SampledFrom(append(a.db.Refs(class), xapidb.NullRef)).Draw(a.t, class)
}

func (a *actor) step() {
	class := rapid.SampledFrom([]string{"VM", "VDI", "VBD", "SR", "host"}).Draw(a.t, "class")
	ref := a.pick(class)
	var err error
	switch rapid.IntRange(0, 9).Draw(a.t, "what") {
	case 0, 1, 2:
		_, err = a.db.Create(class, a.fields(class))
	case 3, 4, 5:
		if ref != xapidb.NullRef {
			err = a.db.Update(class, ref, a.fields(class))
		}
	case 6:
		if ref != xapidb.NullRef {
			err = a.db.PutInMap(class, ref, "other_config", "k", rapid.StringN(0, 1, 1).Draw(a.t, "value"))
		}
	case 7:
		if ref != xapidb.NullRef {
			_, err = a.db.Inject(class, ref)
		}
	default:
		if ref != xapidb.NullRef {
			err = a.db.Destroy(class, ref)
		}
	}
	if err != nil {
		a.t.Fatal(err)
	}
}

func (a *actor) fields(class string) map[string]any {
	switch class {
	case "VM":
		return map[string]any{"resident_on": a.pick("host"), "name_label": rapid.SampledFrom([]string{"", "a"}).Draw(a.t, "name")}
	case "VDI":
		return map[string]any{"SR": a.pick("SR"), "snapshot_of": a.pick("VDI")}
	case "VBD":
		return map[string]any{"VM": a.pick("VM"), "VDI": a.pick("VDI")}
	}
	return map[string]any{}
}

// fill makes the objects of a pool of 64 hosts with 2,000 VMs, about 27,000 in all, all disks on one SR.
func fill(t testing.TB) (*xapidb.DB, []string) {
	db := xapidb.New(xapidb.Options{Rand: xapidb.SeededRand(1)})
	p, err := db.SeedPool(xapidb.Seed{Hosts: 64, NICs: 4})
	must(t, err)
	sr := mustCreate(t, db, "SR", map[string]any{"type": "linstor"})
	var vdis []string
	for n := range 2000 {
		vm := mustCreate(t, db, "VM", map[string]any{"resident_on": p.Hosts[n%64], "power_state": "Running", "metrics": mustCreate(t, db, "VM_metrics", nil)})
		for range 3 {
			vdi := mustCreate(t, db, "VDI", map[string]any{"SR": sr})
			mustCreate(t, db, "VBD", map[string]any{"VM": vm, "VDI": vdi, "metrics": mustCreate(t, db, "VBD_metrics", nil)})
			vdis = append(vdis, vdi)
		}
		mustCreate(t, db, "VIF", map[string]any{"VM": vm, "network": p.Networks[n%4]})
	}
	return db, vdis
}

func BenchmarkFillLargePool(b *testing.B) {
	for b.Loop() {
		fill(b)
	}
}

func BenchmarkFirstBatchLargePool(b *testing.B) {
	db, _ := fill(b)
	b.ReportAllocs()
	for b.Loop() {
		poll(b, db, "", "*")
	}
}

func BenchmarkOneChangeLargePool(b *testing.B) {
	db, vdis := fill(b)
	token := poll(b, db, "", "*").Token
	n := 0
	b.ReportAllocs()
	for b.Loop() {
		n++
		must(b, db.Set("VDI", vdis[n%len(vdis)], "physical_utilisation", n))
		token = poll(b, db, token, "vdi", "sr", "vm").Token
	}
}
