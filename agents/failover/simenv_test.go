package failover_test

import (
	"os"
	"strconv"
	"testing"
)

// schedulesFromEnv is the number of schedules: XOSTOR_SIM_SCHEDULES, else the fixed subset.
func schedulesFromEnv(t *testing.T) int {
	t.Helper()
	text := os.Getenv("XOSTOR_SIM_SCHEDULES")
	if text == "" {
		if raceEnabled {
			return 100
		}
		return 1000
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("XOSTOR_SIM_SCHEDULES=%q is no number of schedules", text)
	}
	return n
}
