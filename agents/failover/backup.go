package failover

import (
	"cmp"
	"slices"
	"time"
)

// Backup is one copy of the controller's database.
type Backup struct {
	Name   string    `json:"name"` // file name, such as "linstor-20260102T150405Z.zip"
	Taken  time.Time `json:"taken"`
	Size   int64     `json:"size"` // bytes
	SHA256 string    `json:"sha256"`
	Why    string    `json:"why"` // "hourly" or "version"
}

// What is kept of the backups.
const (
	KeepHourly  = 24
	KeepDaily   = 14
	KeepVersion = 5 // those made before a change of the controller's version
)

// Prune returns the backups that may go: not among the newest of each of the last 24 hours that have one, nor of each of the last 14 days that have one, nor
// among the five newest made before a change of version. What is newer than now stays: the clock is wrong, not the backup. The input is not changed.
func Prune(now time.Time, have []Backup) (drop []Backup) {
	list := slices.Clone(have)
	slices.SortFunc(list, func(a, b Backup) int { return cmp.Or(b.Taken.Compare(a.Taken), cmp.Compare(b.Name, a.Name)) })
	hours, days, versions := map[string]bool{}, map[string]bool{}, 0
	take := func(slots map[string]bool, slot string, most int) bool {
		if slots[slot] || len(slots) >= most {
			return false
		}
		slots[slot] = true
		return true
	}
	for _, b := range list {
		if b.Taken.After(now) {
			continue
		}
		if b.Why == whyVersion {
			if versions++; versions <= KeepVersion {
				continue
			}
		}
		at := b.Taken.UTC()
		hourly := take(hours, at.Format("2006-01-02T15"), KeepHourly)
		daily := take(days, at.Format("2006-01-02"), KeepDaily)
		if !hourly && !daily {
			drop = append(drop, b)
		}
	}
	return drop
}

const (
	whyHourly  = "hourly"
	whyVersion = "version"
)

// RestorePlan prints the steps by which a person restores a backup. It does nothing by itself.
func RestorePlan(n Names, b Backup, dir, owner string) []string {
	return []string{
		"on every host:  systemctl stop xostor-failover    # and drbd-reactor where it runs: nobody may start the controller meanwhile",
		"on " + owner + ":  systemctl stop " + n.Controller,
		"on " + owner + ":  drbdadm status " + n.Resource + "    # must say role:Primary and quorum:yes; else: drbdadm primary " + n.Resource,
		"on " + owner + ":  mountpoint " + n.MountPoint + " || systemctl start " + n.MountUnit,
		"on " + owner + ":  echo '" + b.SHA256 + "  " + dir + "/" + b.Name + "' | sha256sum -c",
		"on " + owner + ":  mv " + n.MountPoint + "/linstordb.mv.db " + n.MountPoint + "/linstordb.mv.db.broken",
		"on " + owner + ":  unzip -o " + dir + "/" + b.Name + " -d " + n.MountPoint,
		"on " + owner + ":  systemctl start " + n.Controller + " && curl -fsS http://127.0.0.1:3370/health",
		"on " + owner + ":  linstor node list && linstor resource list    # objects made after " + b.Taken.UTC().Format(time.RFC3339) + " are missing from the database: compare with drbdadm status",
		"on every host:  systemctl start xostor-failover    # and drbd-reactor where it ran",
	}
}
