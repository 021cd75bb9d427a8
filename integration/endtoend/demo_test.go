package endtoend

import (
	"strings"
	"testing"
	"time"
)

// The demo tells its story to the end, in plain text when nobody looks on, and every step comes true.
func TestDemoTellsItsStory(t *testing.T) {
	t.Parallel()
	r := runProgram(t, time.Minute, demo, "--xostor", xostor)
	if r.code != 0 || r.errOut != "" {
		t.Fatalf("code %d\n%s\n%s", r.code, r.out, r.errOut)
	}
	for _, want := range []string{"1. A disk", "set-sr-size", "partial-view", "WRONG", "wrong-numbers", "9. XAPI's coordinator", "All 9 steps came true"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("the story lacks %q:\n%s", want, r.out)
		}
	}
	if strings.Contains(r.out, "\x1b") {
		t.Error("colours without a terminal")
	}
}

func TestDemoSurvivesChaos(t *testing.T) {
	t.Parallel()
	r := runProgram(t, time.Minute, demo, "--xostor", xostor, "--chaos", "--for", "8s", "--seed", "7")
	if r.code != 0 || !strings.Contains(r.out, "after the storm") {
		t.Fatalf("code %d\n%s\n%s", r.code, r.out, r.errOut)
	}
}
