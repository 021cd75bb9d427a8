package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab"
)

func TestCalls(t *testing.T) {
	for _, args := range [][]string{{"--nonsense"}, {"--stay", "--chaos"}, {"--bench", "--chaos"}, {"--for", "-1s"}, {"--changes", "0"}, {"extra"}, {"--xostor", "/nonexistent"}} {
		var out, errOut bytes.Buffer
		if code := run(t.Context(), args, &out, &errOut); code != exitUsage {
			t.Errorf("%v: code %d, want %d", args, code, exitUsage)
		}
		if lines := strings.Count(errOut.String(), "\n"); lines != 1 || !strings.Contains(errOut.String(), "--help") {
			t.Errorf("%v: %q, want one line that names --help", args, errOut.String())
		}
	}
	var out, errOut bytes.Buffer
	if code := run(t.Context(), []string{"--help"}, &out, &errOut); code != exitTrue || out.String() != help || errOut.Len() > 0 {
		t.Errorf("--help: code %d, stderr %q", code, errOut.String())
	}
	for _, flag := range []string{"--stay", "--chaos", "--for", "--seed", "--bench", "--changes", "--quiet", "--xostor", "--no-color"} {
		if !strings.Contains(help, flag) {
			t.Errorf("the help does not tell of %s", flag)
		}
	}
}

// Without a terminal there are no terminal sequences, and each fact is one line of aligned columns.
func TestTimelineIsPlainText(t *testing.T) {
	var out bytes.Buffer
	line := newTimeline(&out, true)
	line.begin()
	line.line(right, "XAPI", "used %s\n-> %s", "1", "2")
	line.note("because")
	lines := strings.Split(strings.TrimRight(out.String(), "\n"), "\n")
	if len(lines) != 4 || strings.Contains(out.String(), "\x1b") {
		t.Fatalf("printed %q", out.String())
	}
	if a, b, c := strings.Index(lines[1], "WHAT"), strings.Index(lines[2], "used"), strings.Index(lines[3], "because"); a != b || b != c {
		t.Errorf("columns at %d, %d, %d:\n%s", a, b, c, out.String())
	}
	if !strings.HasSuffix(lines[2], "used 1 -> 2") {
		t.Errorf("line %q", lines[2])
	}
}

func TestDifference(t *testing.T) {
	a := lab.Sizes{Physical: gib, Utilisation: 2 * gib, Virtual: 3 * gib}
	b := a
	b.Utilisation = 4 * gib
	if got := difference(a, b); got != "used 2.00 GiB -> 4.00 GiB" {
		t.Errorf("difference = %q", got)
	}
	if got := difference(a, a); !strings.HasPrefix(got, "unchanged") {
		t.Errorf("no difference = %q", got)
	}
}

func TestQuantile(t *testing.T) {
	var d []time.Duration
	for i := range 100 {
		d = append(d, time.Duration(i+1))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 50, 0.9: 90, 0.99: 99, 1: 100} {
		if got := quantile(d, q); got != want {
			t.Errorf("quantile(%v) = %d, want %d", q, got, want)
		}
	}
	if got := quantile(d[:1], 0.99); got != 1 {
		t.Errorf("quantile of one = %d", got)
	}
}

func TestParseCPU(t *testing.T) {
	got, err := parseCPU("4711 (a name) with) S 1 4711 4711 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 9 0 100 1 2")
	if err != nil || got != 3*time.Second {
		t.Errorf("parseCPU = %v, %v; want 3 s", got, err)
	}
	for _, bad := range []string{"", "1 (x) S 1", "1 (x) S 1 2 3 4 5 6 7 8 9 10 a b", "no parenthesis"} {
		if _, err := parseCPU(bad); err == nil {
			t.Errorf("parseCPU(%q) succeeded", bad)
		}
	}
}

func TestParseMemory(t *testing.T) {
	got, err := parseMemory("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
	if err != nil || got != (memory{resident: 1 << 20, peak: 2 << 20}) {
		t.Errorf("parseMemory = %+v, %v", got, err)
	}
	for _, bad := range []string{"", "VmRSS:\tlots kB\n"} {
		if _, err := parseMemory(bad); err == nil {
			t.Errorf("parseMemory(%q) succeeded", bad)
		}
	}
}

func FuzzParseCPU(f *testing.F) {
	f.Add("4711 (a name) with) S 1 4711 4711 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 9 0 100 1 2")
	f.Add(")")
	f.Fuzz(func(t *testing.T, s string) { _, _ = parseCPU(s) })
}

func FuzzParseMemory(f *testing.F) {
	f.Add("VmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
	f.Fuzz(func(t *testing.T, s string) { _, _ = parseMemory(s) })
}
