package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/xostor-agents/xostor-agents/integration/lab"
)

// The scene is played with the real program, and every step comes true; nothing of it is left behind.
func TestHeartbeatScene(t *testing.T) {
	dir := t.TempDir()
	o := options{xostor: filepath.Join(dir, "xostor")}
	var out bytes.Buffer
	if err := heartbeatScene(t.Context(), o, newTimeline(&out, false)); !errors.Is(err, errCannot) || !strings.Contains(err.Error(), "make build") {
		t.Errorf("without the program: %v", err)
	}
	if err := lab.Build(dir+"/", "github.com/xostor-agents/xostor-agents/cmd/xostor-heartbeat"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", t.TempDir())
	if err := heartbeatScene(t.Context(), o, newTimeline(&out, false)); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{"stand-ins", "1. The owner's process is killed", "2. An administrator moves", "3. The owner freezes", "requests failed, no slot went back", "how close each time-out came", "All 3 steps came true"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the scene lacks %q:\n%s", want, &out)
		}
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
