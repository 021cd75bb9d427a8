package systemd_test

import (
	"net"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/systemd"
)

// socket is a NOTIFY_SOCKET that this process's notifications go to.
func socket(t *testing.T) *net.UnixConn {
	t.Helper()
	addr := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "n"), Net: "unixgram"}
	c, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	t.Setenv("NOTIFY_SOCKET", addr.Name)
	return c
}

func TestNotify(t *testing.T) {
	tests := []struct {
		name string
		call func() error
		want string
	}{
		{"ready", func() error { return systemd.Ready("follows 1 SR\nMAINPID=1") }, "READY=1\nSTATUS=follows 1 SR MAINPID=1"},
		{"alive", systemd.Alive, "WATCHDOG=1"},
		{"stopping", systemd.Stopping, "STOPPING=1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := socket(t)
			if err := tt.call(); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 200)
			n, err := c.Read(b)
			if err != nil || string(b[:n]) != tt.want {
				t.Errorf("systemd got %q, %v; want %q", b[:n], err, tt.want)
			}
		})
	}
}

func TestNotify_OutsideSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := systemd.Ready("x"); err != nil {
		t.Errorf("outside systemd: %v, want no error", err)
	}
	t.Setenv("NOTIFY_SOCKET", "/nonexistent/socket")
	if err := systemd.Alive(); err == nil {
		t.Error("a socket that is gone must be reported")
	}
}

func TestWatchdogInterval(t *testing.T) {
	tests := []struct {
		usec, pid string
		want      time.Duration
	}{
		{"30000000", "", 30 * time.Second}, {"", "", 0}, {"nonsense", "", 0}, {"30000000", "1", 0}, {"0", "", 0},
	}
	for _, tt := range tests {
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		if got := systemd.WatchdogInterval(); got != tt.want {
			t.Errorf("WATCHDOG_USEC=%q WATCHDOG_PID=%q: %s, want %s", tt.usec, strconv.Quote(tt.pid), got, tt.want)
		}
	}
}
