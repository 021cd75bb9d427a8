package bus_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/bustest"
)

var testSpec = bus.XAPITable("vdi")

func newTestTable(t testing.TB, w bus.Wire) *bus.Table[int] {
	t.Helper()
	table, err := bus.NewTable[int](w, testSpec, bus.TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func newTestMirror(t testing.TB, w bus.Wire) *bus.Mirror[int] {
	t.Helper()
	m, err := bus.NewMirror(w, testSpec, bus.MirrorOptions[int]{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// run is one schedule of trouble: publishers that write, die and return, and a wire that misbehaves.
type run struct {
	wire    *bustest.Wire
	rng     *rand.Rand
	mirrors []*bus.Mirror[int]
	table   *bus.Table[int] // nil while no feed runs.
	want    map[string]int
	history map[string]map[string]int // Contents by "epoch/sequence".
	trouble atomic.Bool
	loss    float64
	delay   time.Duration
}

func (r *run) fate(*bus.Message) []time.Duration {
	if !r.trouble.Load() {
		return []time.Duration{0}
	}
	if r.rng.Float64() < r.loss {
		return nil
	}
	out := []time.Duration{time.Duration(r.rng.Int64N(int64(r.delay) + 1))}
	if r.rng.Float64() < 0.1 {
		out = append(out, time.Duration(r.rng.Int64N(int64(r.delay)+1)))
	}
	return out
}

// write does one thing to the table and remembers what it held at that sequence.
func (r *run) write(t *rapid.T) {
	if r.table == nil {
		return
	}
	key := fmt.Sprintf("k%d", rapid.IntRange(0, 5).Draw(t, "key"))
	switch rapid.IntRange(0, 9).Draw(t, "write") {
	case 0, 1:
		r.table.Delete(key)
		delete(r.want, key)
	case 2:
		all := map[string]int{key: rapid.IntRange(0, 3).Draw(t, "value")}
		// A Replace publishes several changes; what is between them is remembered by its parts.
		for k := range r.want {
			if k != key && rapid.Bool().Draw(t, "keep") {
				all[k] = r.want[k]
			}
		}
		r.replace(all)
	default:
		v := rapid.IntRange(0, 3).Draw(t, "value")
		if _, err := r.table.Put(key, v); err != nil {
			t.Fatal(err)
		}
		r.want[key] = v
	}
	r.remember()
}

func (r *run) replace(all map[string]int) {
	if _, err := r.table.Replace(all); err != nil {
		panic(err)
	}
	r.want = maps.Clone(all)
}

func (r *run) remember() {
	epoch, seq := r.table.At()
	r.history[fmt.Sprintf("%d/%d", epoch, seq)] = maps.Clone(r.want)
}

func (r *run) start(t *rapid.T) {
	if r.table != nil {
		return
	}
	table, err := bus.NewTable[int](r.wire, testSpec, bus.TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.table = table
	r.replace(r.want)
	r.remember()
}

func (r *run) kill(crash bool) {
	if r.table != nil {
		if crash {
			r.wire.Cut(true)
			defer r.wire.Cut(false)
		}
		r.table.Close()
		r.table = nil
	}
}

// check: a mirror that says Fresh holds exactly what the publisher had at the sequence that it names.
func (r *run) check(t *rapid.T) {
	for i, m := range r.mirrors {
		got, f := m.Snapshot()
		if !f.Fresh {
			if f.Reason == "" {
				t.Fatalf("mirror %d is stale without a reason", i)
			}
			continue
		}
		want, known := r.history[fmt.Sprintf("%d/%d", f.Epoch, f.Seq)]
		if known && !maps.Equal(got, want) {
			t.Fatalf("mirror %d is fresh at %d/%d and holds %v, the table held %v", i, f.Epoch, f.Seq, got, want)
		}
	}
}

// TestMirrorIsNeverFreshAndWrong: whatever is lost, doubled, reordered, delayed, cut or restarted, mirrors are right or stale, and
// once the trouble is over they are fresh and equal when a feed runs, and stale when none does.
func TestMirrorIsNeverFreshAndWrong(outer *testing.T) {
	rapid.Check(outer, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		inBubble(outer, func(bubble *testing.T) {
			r := &run{
				wire: bustest.NewWire(bubble), rng: rand.New(rand.NewPCG(seed, 1)), want: map[string]int{}, history: map[string]map[string]int{},
				loss:  rapid.Float64Range(0, 0.5).Draw(t, "loss"),
				delay: time.Duration(rapid.Int64Range(0, int64(5*time.Second)).Draw(t, "delay")),
			}
			r.trouble.Store(true)
			r.wire.Fate, r.wire.Max = r.fate, 5<<10
			defer r.kill(false)
			r.start(t)
			for range rapid.IntRange(1, 2).Draw(t, "mirrors") {
				m, err := bus.NewMirror(r.wire, testSpec, bus.MirrorOptions[int]{})
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				r.mirrors = append(r.mirrors, m)
			}
			r.play(t)
			r.settle(t)
		})
	})
}

func (r *run) play(t *rapid.T) {
	for range rapid.IntRange(0, 60).Draw(t, "steps") {
		switch rapid.IntRange(0, 19).Draw(t, "step") {
		case 0:
			r.kill(rapid.Bool().Draw(t, "crash"))
		case 1:
			r.start(t)
		case 2:
			r.wire.Cut(true)
		case 3:
			r.wire.Cut(false)
		case 4:
			if r.table != nil {
				r.table.SetStale("source is away")
				r.remember()
			}
		case 5:
			if r.table != nil {
				r.table.SetFresh()
				r.remember()
			}
		case 6, 7, 8, 9:
			time.Sleep(time.Duration(rapid.Int64Range(0, int64(8*time.Second)).Draw(t, "pause")))
			synctest.Wait()
		default:
			r.write(t)
		}
		r.check(t)
	}
}

func (r *run) settle(t *rapid.T) {
	r.trouble.Store(false)
	r.wire.Cut(false)
	if r.table != nil {
		r.table.SetFresh()
		r.remember()
	}
	time.Sleep(2 * time.Minute)
	synctest.Wait()
	r.check(t)
	for i, m := range r.mirrors {
		got, f := m.Snapshot()
		switch {
		case r.table == nil && f.Fresh:
			t.Fatalf("mirror %d is fresh although no feed runs", i)
		case r.table != nil && !f.Fresh:
			t.Fatalf("mirror %d is stale after the trouble: %+v", i, f)
		case r.table != nil && !maps.Equal(got, r.want):
			t.Fatalf("mirror %d is fresh and holds %v, not %v", i, got, r.want)
		}
	}
}

// inBubble runs fn in virtual time and hands on its panic, which is how rapid hears of a failure.
func inBubble(t *testing.T, fn func(t *testing.T)) {
	var failed any
	synctest.Test(t, func(t *testing.T) {
		defer func() { failed = recover() }()
		fn(t)
	})
	if failed != nil {
		panic(failed)
	}
}

func TestMirrorBecomesStaleWhenThePublisherDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		table := newTestTable(t, w)
		if _, err := table.Replace(map[string]int{"a": 1}); err != nil {
			t.Fatal(err)
		}
		m := newTestMirror(t, w)
		defer m.Close()
		if err := m.WaitFresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.Cut(true) // As a crash: no last word.
		died := time.Now()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if f := m.Freshness(); !f.Fresh {
			t.Fatalf("stale before three signs of life were missed: %+v", f)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		f := m.Freshness()
		if f.Fresh || f.Since.Sub(died) > 6*time.Second || !strings.Contains(f.Reason, "no sign of life") {
			t.Fatalf("after the publisher's death: %+v, %s later", f, f.Since.Sub(died))
		}
		if v, ok := m.Get("a"); !ok || v != 1 {
			t.Fatal("a stale mirror forgot its last contents")
		}
		w.Cut(false)
		if err := m.WaitFresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		table.Close()
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if f := m.Freshness(); f.Fresh || !strings.Contains(f.Reason, "was stopped") {
			t.Fatalf("after an orderly stop: %+v", f)
		}
	})
}

func TestMirrorTellsThePublishersDoubts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		table, m := newTestTable(t, w), newTestMirror(t, w)
		defer table.Close()
		defer m.Close()
		time.Sleep(time.Second)
		synctest.Wait()
		if f := m.Freshness(); f.Fresh || !strings.Contains(f.Reason, "not filled yet") {
			t.Fatalf("before the table was filled: %+v", f)
		}
		if _, err := table.Replace(map[string]int{"a": 1}); err != nil {
			t.Fatal(err)
		}
		if err := m.WaitFresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		table.SetStale("controller is away")
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if f := m.Freshness(); f.Fresh || f.Reason != "the publisher says: controller is away" {
			t.Fatalf("while the source is away: %+v", f)
		}
		table.SetFresh()
		if err := m.WaitFresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestMirrorIsStaleWhileOneValueCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		table := newTestTable(t, w)
		defer table.Close()
		if _, err := table.Replace(map[string]int{"a": 1, "b": 13}); err != nil {
			t.Fatal(err)
		}
		m, err := bus.NewMirror(w, testSpec, bus.MirrorOptions[int]{Project: func(_ string, raw json.RawMessage) (v int, keep bool, err error) {
			if err := json.Unmarshal(raw, &v); err != nil {
				return 0, false, err
			}
			if v == 13 {
				return 0, false, errors.New("unlucky")
			}
			return v, v < 100, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		time.Sleep(time.Second)
		synctest.Wait()
		if f := m.Freshness(); f.Fresh || f.Reason != "cannot read xapi.vdi b: unlucky" {
			t.Fatalf("with an unreadable value: %+v", f)
		}
		if _, err := table.Put("b", 200); err != nil {
			t.Fatal(err)
		}
		if err := m.WaitFresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, _ := m.Snapshot(); !maps.Equal(got, map[string]int{"a": 1}) {
			t.Fatalf("a projection that keeps values below 100 holds %v", got)
		}
	})
}

func TestListIsOfOneSequenceWhileChangesGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		table, err := bus.NewTable[string](w, testSpec, bus.TableOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer table.Close()
		all := map[string]string{}
		for i := range 40 {
			all[fmt.Sprintf("key-%02d", i)] = strings.Repeat("x", 20<<10)
		}
		if _, err := table.Replace(all); err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		ask := func(body string) *bus.Message {
			reply := askList(t, w, body)
			var rows []struct{ Key, Data string }
			if err := json.Unmarshal(reply.Data, &rows); err != nil {
				t.Fatal(err)
			}
			for _, row := range rows {
				got[row.Key] = row.Data
			}
			return reply
		}
		first := ask("")
		pages, err := strconv.Atoi(first.Header[bus.HeaderPages])
		if err != nil || pages < 5 {
			t.Fatalf("the list has %d pages: %v", pages, err)
		}
		for page := 1; page < pages; page++ {
			// Every change between two pages must stay out of the list.
			if _, err := table.Put(fmt.Sprintf("key-%02d", 39-page), "changed"); err != nil {
				t.Fatal(err)
			}
			table.Delete(fmt.Sprintf("key-%02d", page))
			reply := ask(fmt.Sprintf(`{"list":%q,"page":%d}`, first.Header[bus.HeaderList], page))
			if reply.Header[bus.HeaderSequence] != first.Header[bus.HeaderSequence] || len(reply.Data) > 160<<10 {
				t.Fatalf("page %d is of sequence %s, with %d bytes", page, reply.Header[bus.HeaderSequence], len(reply.Data))
			}
		}
		if refused := askList(t, w, `{"list":"999","page":1}`); !strings.HasSuffix(refused.Header[bus.HeaderType], ".refused") {
			t.Fatalf("a page of a list that is gone: %v", refused.Header)
		}
		if !maps.Equal(got, all) {
			t.Fatal("the list is not what the table held when it began")
		}
	})
}

func askList(t *testing.T, w bus.Wire, body string) *bus.Message {
	t.Helper()
	reply, err := w.Request(t.Context(), &bus.Message{Subject: "xostor.v1.table.xapi.vdi.list", Data: []byte(body)})
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

func newTestMirrorOf[T any](t testing.TB, w bus.Wire) *bus.Mirror[T] {
	t.Helper()
	m, err := bus.NewMirror(w, testSpec, bus.MirrorOptions[T]{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestTablePublishesOnlyWhatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		table := newTestTable(t, w)
		defer table.Close()
		var got []string
		stop, err := w.Subscribe(func(m *bus.Message) {
			got = append(got, m.Header[bus.HeaderType]+" "+m.Header[bus.HeaderSubject]+" "+string(m.Data))
		}, string(testSpec.Pattern))
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		if _, err := table.Replace(map[string]int{"a": 1, "b": 2, "c": 3}); err != nil {
			t.Fatal(err)
		}
		if changed, err := table.Put("a", 1); changed || err != nil {
			t.Fatalf("writing the same value: %t, %v", changed, err)
		}
		table.Delete("nothing")
		d, err := table.Replace(map[string]int{"a": 1, "b": 5, "d": 4})
		if err != nil || d != (bus.Diff{Added: 1, Changed: 1, Deleted: 1}) {
			t.Fatalf("replace: %+v, %v", d, err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		want := []string{"io.xostor.xapi.vdi.delete c ", "io.xostor.xapi.vdi.put b 5", "io.xostor.xapi.vdi.put d 4"}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("published %q, want %q", got, want)
		}
	})
}

func TestTableRefusesWhatDoesNotFit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		table, err := bus.NewTable[string](w, testSpec, bus.TableOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer table.Close()
		m := newTestMirrorOf[string](t, w)
		defer m.Close()
		if _, err := table.Replace(map[string]string{"a": "small", "b": "small"}); err != nil {
			t.Fatal(err)
		}
		large := strings.Repeat("x", w.MaxPayload())
		if _, err := table.Put("a", large); !errors.Is(err, bus.ErrTooLarge) {
			t.Fatalf("put: %v", err)
		}
		_, err = table.Replace(map[string]string{"a": large, "b": "new"})
		var rows *bus.RowsError
		if !errors.As(err, &rows) || !errors.Is(err, bus.ErrTooLarge) || len(rows.Rows) != 1 {
			t.Fatalf("replace: %v", err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		got, f := m.Snapshot()
		if f.Fresh || got["a"] != "small" || got["b"] != "new" {
			t.Fatalf("the mirror holds %v and says %+v", got, f)
		}
	})
}

func TestChangesDuringAListNeedNoSecondList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		lists := 0
		w.Fate = func(m *bus.Message) []time.Duration {
			if strings.HasPrefix(m.Subject, "xostor.v1.table.xapi.vdi.list") {
				lists++
			}
			if strings.HasPrefix(m.Subject, "_INBOX") {
				return []time.Duration{time.Second} // Much happens before a page arrives.
			}
			return []time.Duration{0}
		}
		table := newTestTable(t, w)
		defer table.Close()
		if _, err := table.Replace(map[string]int{"a": 1}); err != nil {
			t.Fatal(err)
		}
		m := newTestMirror(t, w)
		defer m.Close()
		for i := range 50 {
			time.Sleep(19 * time.Millisecond)
			if _, err := table.Put("b", i); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.WaitFresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, f := m.Snapshot(); lists != 1 || got["b"] != 49 {
			t.Fatalf("after %d lists the mirror holds %v at %d", lists, got, f.Seq)
		}
	})
}

func TestMirrorFollowsTheYoungerOfTwoPublishers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := bustest.NewWire(t)
		old := newTestTable(t, w)
		if _, err := old.Replace(map[string]int{"a": 1}); err != nil {
			t.Fatal(err)
		}
		m := newTestMirror(t, w)
		defer m.Close()
		time.Sleep(time.Second)
		young := newTestTable(t, w)
		if _, err := young.Replace(map[string]int{"a": 2}); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			time.Sleep(time.Second)
			synctest.Wait()
			if v, _ := m.Get("a"); v != 2 || !m.Freshness().Fresh {
				t.Fatalf("with two publishers the mirror holds %d, %+v", v, m.Freshness())
			}
		}
		young.Close()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if v, _ := m.Get("a"); v != 1 || !m.Freshness().Fresh {
			t.Fatalf("after the younger's end the mirror holds %d, %+v", v, m.Freshness())
		}
		old.Close()
	})
}
