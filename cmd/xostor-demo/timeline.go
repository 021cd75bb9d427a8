package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// tone is how a line looks on a terminal.
type tone string

// The tones, as terminal sequences.
const (
	plain   tone = ""
	heading tone = "\x1b[1m"
	dim     tone = "\x1b[2m"
	right   tone = "\x1b[32m"
	warning tone = "\x1b[33m"
	wrong   tone = "\x1b[31m"
	agent   tone = "\x1b[36m"

	toneEnd = "\x1b[0m"
)

// timeline prints what happens, one line per fact. It is safe for concurrent use.
type timeline struct {
	mu    sync.Mutex
	out   io.Writer
	color bool
	start time.Time
}

func newTimeline(out io.Writer, color bool) *timeline {
	f, file := out.(*os.File)
	if color && file {
		info, err := f.Stat()
		color = err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == ""
	}
	return &timeline{out: out, color: color && file, start: time.Now()}
}

// begin prints the heading of the columns and starts the clock.
func (t *timeline) begin() {
	t.start = time.Now()
	t.text(heading, fmt.Sprintf("\n%8s  %-10s %s", "TIME", "WHO", "WHAT"))
}

// line prints one fact.
func (t *timeline) line(k tone, who, format string, args ...any) {
	elapsed := time.Since(t.start).Seconds()
	t.text(k, fmt.Sprintf("%6.1f s  %-10s %s", elapsed, who, oneLine(fmt.Sprintf(format, args...))))
}

// note explains the line before it.
func (t *timeline) note(format string, args ...any) {
	t.text(dim, fmt.Sprintf("%8s  %-10s %s", "", "", fmt.Sprintf(format, args...)))
}

// text prints a line as it is.
func (t *timeline) text(k tone, s string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.color && k != plain {
		s = string(k) + s + toneEnd
	}
	fmt.Fprintln(t.out, s)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
