package bus

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

func TestKeptFilters_NeverOverlap(t *testing.T) {
	for pattern, want := range map[string][]string{
		"":                        nil,
		">":                       nil,
		"xostor.v1.>":             nil,
		"xostor.v1.*.vdi.u":       nil,
		"xostor.v1.agent.>":       {"xostor.v1.agent.>", "xostor.v1.late.agent.>"},
		"xostor.v1.xapi.vdi.some": {"xostor.v1.xapi.vdi.some", "xostor.v1.late.xapi.vdi.some"},
	} {
		if got := keptFilters(Subject(pattern)); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", pattern, got, want)
		}
	}
	live := string(subject.XAPI("vdi", "u"))
	if got := trueSubject(lateSubject(live)); got != live || trueSubject(live) != live {
		t.Errorf("%q became %q", live, got)
	}
}

func TestRecall_ForgetsByAgeAndSize(t *testing.T) {
	now := time.Now()
	message := func(id string, size int) *nats.Msg {
		m := &nats.Msg{Subject: "s", Header: nats.Header{}, Data: make([]byte, size)}
		m.Header.Set(HeaderSource, "/test")
		m.Header.Set(HeaderID, id)
		return m
	}
	ids := func(r *recall, now time.Time) (all []string) {
		for _, h := range r.between(now) {
			all = append(all, strings.TrimPrefix(h.key, "/test\x00"))
		}
		return all
	}
	var r recall
	r.add(now.Add(-2*lateFor), message("old", 1))
	r.add(now.Add(-time.Minute), message("a", lateBytes-10))
	r.add(now.Add(-50*time.Second), message("b", 10))
	r.add(now.Add(-lateInAir/2), message("in the air", 0))
	r.add(now.Add(-time.Minute), &nats.Msg{Subject: "s"}) // no event
	if got := ids(&r, now); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("recalled %v", got)
	}
	r.add(now.Add(-40*time.Second), message("c", 1))
	if got := ids(&r, now); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("recalled %v after too many bytes", got)
	}
	if r.bytes != 11 || len(r.heard) != 3 {
		t.Errorf("%d bytes in %d events", r.bytes, len(r.heard))
	}
	r.add(now.Add(-30*time.Second), message("huge", lateBytes+1))
	if got := ids(&r, now); len(got) != 0 || r.bytes != 0 {
		t.Errorf("recalled %v, %d bytes", got, r.bytes)
	}
}

// TestClusterHistory_HasWhatWasPublishedWhileItHadNoLeader stops each host in turn, so one of them led, while events are published all the time.
func TestClusterHistory_HasWhatWasPublishedWhileItHadNoLeader(t *testing.T) {
	p := newTestPool(t, 3)
	p.startAll(nil)
	h := p.pool.Hosts
	p.meshed(h...)
	p.keeps("3 copies", h...)
	keepsNew(t, p.conn(h[0]), p.conn(h[1]), "first")
	p.copied(h...)
	var ids []string
	for i, victim := range h {
		at := h[(i+1)%len(h)]
		c := p.conn(at)
		if err := p.nodes[victim.UUID].Close(); err != nil {
			t.Error(err)
		}
		tick := time.NewTicker(20 * time.Millisecond)
		eventually(t, patience, "a leader is there again", func() bool {
			id := fmt.Sprint(victim.UUID, " ", len(ids))
			ids = append(ids, id)
			publishEvent(t, c, id)
			<-tick.C
			return len(ids)%50 == 0 && has(t, c)
		})
		tick.Stop()
		told(t, c, ids...)
		p.start(victim, nil)
		p.meshed(h...)
		p.keeps("3 copies", h...)
	}
	var kept []Event
	eventually(t, patience, "all events are kept", func() bool { // A copy that has just come back may be read before it is complete.
		kept = nil
		err := Replay(t.Context(), p.conn(h[0]), time.Now().Add(-time.Hour), "xostor.v1.xapi.vdi.*", func(e Event) error {
			kept = append(kept, e)
			return nil
		})
		return err == nil && len(kept) >= len(ids)
	})
	for _, e := range kept {
		if e.Subject != subject.XAPI("vdi", "u") {
			t.Errorf("kept with subject %s", e.Subject)
		}
	}
}
