package endtoend

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
)

// The demo tells its story to the end, in plain text when nobody looks on, and every step comes true.
func TestDemoTellsItsStory(t *testing.T) {
	t.Parallel()
	r := runProgram(t, time.Minute, demo, "--xostor", xostor, "--scene", "pool")
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

// The scene of the controller: each outage ends, on real systemd and real mounts, with the shipped agent.
func TestDemoShowsTheControllersOutages(t *testing.T) {
	t.Parallel()
	if why := realpool.Missing(); why != "" {
		if os.Getenv("XOSTOR_TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	r := runProgram(t, 10*time.Minute, demo, "--xostor", xostor, "--scene", "controller")
	if r.code != 0 || r.errOut != "" {
		t.Fatalf("code %d\n%s\n%s", r.code, r.out, r.errOut)
	}
	for _, want := range []string{"1. The controller's process is killed", "signal-controller: the controller hangs", "release: primary without quorum", "has let go", "xostor controller move", "All 5 steps came true"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("the story lacks %q:\n%s", want, r.out)
		}
	}
}

func TestDemoSurvivesChaos(t *testing.T) {
	t.Parallel()
	r := runProgram(t, time.Minute, demo, "--xostor", xostor, "--chaos", "--for", "8s", "--seed", "7")
	if r.code != 0 || !strings.Contains(r.out, "after the storm") {
		t.Fatalf("code %d\n%s\n%s", r.code, r.out, r.errOut)
	}
}
