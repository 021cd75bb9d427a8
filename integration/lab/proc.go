package lab

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ProcNumber is the first number behind a key, colon included, in /proc/<pid>/<file>: memory in KiB in status and smaps_rollup (proc(5)). It ends the test
// when there is none. tb is a testing.TB, whose package the demo does without.
func ProcNumber(tb interface {
	Helper()
	Fatalf(format string, args ...any)
}, pid int, file, key string) int {
	tb.Helper()
	name := fmt.Sprintf("/proc/%d/%s", pid, file)
	text, err := os.ReadFile(name)
	if err != nil {
		tb.Fatalf("read a figure of a process: %v", err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == key {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				tb.Fatalf("%s: %q: %v", name, line, err)
			}
			return n
		}
	}
	tb.Fatalf("%s has no %s", name, key)
	return 0
}
