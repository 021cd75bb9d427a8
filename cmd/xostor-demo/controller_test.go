package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAction(t *testing.T) {
	for line, want := range map[string]string{
		`time=x level=INFO msg=action agent=failover outcome=done verb=release target=db on=h1 why="primary without quorum" took=1ms err=""` + "\n": "release: primary without quorum",
		`level=INFO msg=action outcome=done verb=signal-controller why="it says \"no\""`:                                                            `signal-controller: it says "no"`,
		`level=ERROR msg=action outcome=failed verb=release why="primary without quorum"`:                                                           "",
		`level=INFO msg=action outcome=done verb=save-res why="the .res file changed"`:                                                              "",
		`level=INFO msg="finding raised" outcome=done verb=x why=y`:                                                                                 "",
		"": "",
	} {
		if got := action(line); got != want {
			t.Errorf("action(%q) = %q, want %q", line, got, want)
		}
	}
}

func TestClient_LongestGap(t *testing.T) {
	start := time.Now()
	c := &client{}
	for _, ms := range []int{0, 500, 520, 540, 900, 910, 930} { // 500 ms before what counts, then 360 ms
		c.good = append(c.good, answer{start.Add(time.Duration(ms) * time.Millisecond), "h1"})
	}
	if got := c.longestGap(start.Add(530 * time.Millisecond)); got != 360*time.Millisecond {
		t.Errorf("longest gap %s", got)
	}
	if got := (&client{}).longestGap(start); got != 0 {
		t.Errorf("without answers %s", got)
	}
	if !c.answeredSince("h1", start.Add(920*time.Millisecond)) || c.answeredSince("h1", start.Add(time.Second)) || c.answeredSince("h2", start) {
		t.Error("answeredSince is wrong")
	}
}

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0 ms", 61600 * time.Microsecond: "62 ms", 949 * time.Millisecond: "949 ms", 950 * time.Millisecond: "0.9 s", 2140 * time.Millisecond: "2.1 s"} {
		if got := seconds(d); got != want {
			t.Errorf("seconds(%s) = %q, want %q", d, got, want)
		}
	}
}

// However a scene ends, its cleanups run, last first, after its context has ended.
func TestOnStage_CleansUp(t *testing.T) {
	for name, tt := range map[string]struct {
		f    func(*stage) error
		want string // of the error; "" none
	}{
		"well":        {func(*stage) error { return nil }, ""},
		"an error":    {func(*stage) error { return errors.New("no") }, "no"},
		"fatal":       {func(s *stage) error { s.Logf("last %s", "words"); s.Fatalf("not %d", 1); return nil }, "not 1\nlast words"},
		"a panic":     {func(*stage) error { panic("oh") }, "panic: oh"},
		"fatal twice": {func(s *stage) error { s.Cleanup(func() { s.Fatal("second") }); s.Fatal("first"); return nil }, "first"},
	} {
		t.Run(name, func(t *testing.T) {
			var order []string
			err := onStage(t.Context(), func(s *stage) error {
				for _, what := range []string{"folder", "loop", "host"} {
					s.Cleanup(func() {
						if s.Context().Err() == nil {
							t.Error("cleaning up before the context has ended")
						}
						order = append(order, what)
					})
				}
				return tt.f(s)
			})
			if text := ""; err != nil && err.Error() != tt.want || err == nil && tt.want != text {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if !slices.Equal(order, []string{"host", "loop", "folder"}) {
				t.Errorf("cleaned up %v", order)
			}
		})
	}
}

// Ctrl-C ends what waits.
func TestOnStage_IsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cleaned := false
	err := onStage(ctx, func(s *stage) error {
		s.Cleanup(func() { cleaned = true })
		cancel()
		<-s.Context().Done()
		s.Fatal("ended while waiting")
		return nil
	})
	if !cleaned || err == nil || !strings.Contains(err.Error(), "ended while waiting") {
		t.Errorf("cleaned %v, %v", cleaned, err)
	}
}
