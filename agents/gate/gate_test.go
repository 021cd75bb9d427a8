package gate_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/gate"
)

// named is a gate that writes down when it is entered and left.
func named(name string, log *[]string, no error) agents.Gate { return recorder{name, log, no} }

type recorder struct {
	name string
	log  *[]string
	no   error
}

func (r recorder) Enter(ctx context.Context, _ agents.Action) (context.Context, func(error), error) {
	if r.no != nil {
		return nil, nil, r.no
	}
	*r.log = append(*r.log, "+"+r.name)
	return ctx, func(error) { *r.log = append(*r.log, "-"+r.name) }, nil
}

func TestChain_EntersInOrderAndLeavesInReverse(t *testing.T) {
	var log []string
	_, leave, err := gate.Chain{named("a", &log, nil), named("b", &log, nil)}.Enter(t.Context(), agents.Action{})
	if err != nil {
		t.Fatal(err)
	}
	leave(nil)
	if got := strings.Join(log, " "); got != "+a +b -b -a" {
		t.Errorf("got %s", got)
	}
}

func TestChain_RefusalLeavesWhatWasEntered(t *testing.T) {
	var log []string
	no := &agents.Refusal{Gate: "b", Why: "no"}
	_, _, err := gate.Chain{named("a", &log, nil), named("b", &log, no), named("c", &log, nil)}.Enter(t.Context(), agents.Action{})
	if !errors.Is(err, no) || strings.Join(log, " ") != "+a -a" {
		t.Errorf("err %v, log %v; want the refusal and a left again", err, log)
	}
}

func TestUpToAndObserveOnly(t *testing.T) {
	tests := []struct {
		gate agents.Gate
		risk agents.Risk
		ok   bool
	}{
		{gate.UpTo(agents.RiskAdd), agents.RiskObserve, true},
		{gate.UpTo(agents.RiskAdd), agents.RiskAdd, true},
		{gate.UpTo(agents.RiskAdd), agents.RiskRemove, false},
		{gate.ObserveOnly(), agents.RiskObserve, false},
	}
	for _, tt := range tests {
		_, _, err := tt.gate.Enter(t.Context(), agents.Action{Risk: tt.risk})
		if (err == nil) != tt.ok {
			t.Errorf("risk %s: %v, want permitted: %v", tt.risk, err, tt.ok)
		}
	}
}

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &gate.Breaker{Failures: 3, Pause: time.Minute}
		a, other := agents.Action{Verb: "set", Target: "sr1"}, agents.Action{Verb: "set", Target: "sr2"}
		try := func(a agents.Action, err error) bool {
			_, leave, no := b.Enter(t.Context(), a)
			if no == nil {
				leave(err)
			}
			return no == nil
		}
		boom := errors.New("boom")
		steps := []struct {
			after   time.Duration
			a       agents.Action
			err     error
			allowed bool
		}{
			{0, a, boom, true}, {0, a, boom, true}, {0, a, nil, true}, // a success forgets the failures
			{0, a, boom, true}, {0, a, boom, true}, {0, a, boom, true}, {0, a, boom, false},
			{0, other, nil, true},                                                                   // another target is not affected
			{59 * time.Second, a, nil, false}, {2 * time.Second, a, boom, true}, {0, a, nil, false}, // one failed try closes it again
			{61 * time.Second, a, nil, true}, {0, a, boom, true}, {0, a, nil, true},
		}
		for i, s := range steps {
			<-time.After(s.after)
			if got := try(s.a, s.err); got != s.allowed {
				t.Errorf("step %d: allowed %v, want %v", i, got, s.allowed)
			}
		}
	})
}
