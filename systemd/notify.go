// Package systemd speaks sd_notify for our daemons, and reads and changes units over D-Bus. The notifications are no-ops when the process was not started
// by systemd. Unit control uses only calls that systemd 219 has, and never waits for systemd without a limit. See DESIGN.md.
package systemd

import (
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Ready tells that the daemon can work (Type=notify). The text is shown by systemctl status.
func Ready(status string) error { return notify(daemon.SdNotifyReady + "\nSTATUS=" + oneLine(status)) }

// Alive feeds the watchdog. Call it after finished work only.
func Alive() error { return notify(daemon.SdNotifyWatchdog) }

// Stopping tells that the daemon is on its way out, so that the stop time-out counts and not the watchdog.
func Stopping() error { return notify(daemon.SdNotifyStopping) }

// WatchdogInterval is the unit's WatchdogSec for this process, 0 when there is none.
func WatchdogInterval() time.Duration {
	d, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return 0 // an unreadable WATCHDOG_USEC is not ours: systemd sets it well-formed
	}
	return d
}

func notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// oneLine keeps a status from adding fields of its own: sd_notify separates fields by newlines.
func oneLine(s string) string {
	out := []rune(s)
	for i, r := range out {
		if r < ' ' {
			out[i] = ' '
		}
	}
	return string(out)
}
