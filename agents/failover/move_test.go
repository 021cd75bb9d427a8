package failover

import (
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
)

// The others hold for the target of a move until it has been owner once. Afterwards it may die, and nobody waits for the rest of the hold.
func TestRemember_AMoveIsOverWhenItsTargetOwns(t *testing.T) {
	move := &Move{ID: "m1", From: "h1", To: "h2"}
	see := func(self string, role drbd.Role, peer drbd.Role) Memory {
		s := Snapshot{Self: self, Known: true, Fresh: true, Policy: DefaultPolicy(), Move: move, Options: drbd.Options{Quorum: "majority"}}
		s.Res = &drbd.Resource{Role: role, Devices: []drbd.Device{{Quorum: drbd.Yes, Disk: drbd.UpToDate}}, Connections: []drbd.Connection{{Name: "h2", Role: peer, State: drbd.Connected}}}
		return remember(time.Now(), Memory{}, &s)
	}
	if m := see("h3", drbd.Secondary, drbd.Secondary); m.MoveDone != "" {
		t.Error("over although nobody owns")
	}
	if m := see("h1", drbd.Primary, drbd.Secondary); m.MoveDone != "" {
		t.Error("over although the former owner still owns")
	}
	if m := see("h3", drbd.Secondary, drbd.Primary); m.MoveDone != "m1" {
		t.Error("not over although the target is Primary, as a third host sees")
	}
	if m := see("h2", drbd.Primary, drbd.Secondary); m.MoveDone != "m1" {
		t.Error("not over although the target owns, as it sees itself")
	}
}
