package drbd_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"pgregory.net/rapid"
)

func apply(t *testing.T, lines string) *drbd.State {
	t.Helper()
	var st drbd.State
	var ev drbd.Event
	for line := range strings.Lines(lines) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if err := ev.Parse(line); err != nil {
			t.Fatal(err)
		}
		if err := st.Apply(&ev); err != nil {
			t.Fatal(err)
		}
	}
	return &st
}

// show writes a state on one line: what a decision could use of it.
func show(st *drbd.State) string {
	var names []string
	for n := range st.Resources {
		names = append(names, n)
	}
	slices.Sort(names)
	s := ""
	for _, n := range names {
		r := st.Resources[n]
		s += fmt.Sprintf("%s[%s may:%s", r.Name, r.Role, r.MayPromote)
		for _, d := range r.Devices {
			s += fmt.Sprintf(" v%d:%s:q-%s", d.Volume, d.Disk, d.Quorum)
		}
		for _, c := range r.Connections {
			s += fmt.Sprintf(" %d:%s:%s:%s", c.PeerNodeID, c.Name, c.State, c.Role)
			for _, d := range c.PeerDevices {
				s += fmt.Sprintf("/v%d:%s:%s:%s", d.Volume, d.Disk, d.Replication, d.Done)
			}
			for _, p := range c.Paths {
				s += fmt.Sprintf("/path:%s", p.Established)
			}
		}
		s += "]"
	}
	return s
}

// The situations that drbd-utils' own events2 tests are named after (tests/v9/events2-*), as our own cases at the level of the printed text.
func TestState_Situations(t *testing.T) {
	tests := []struct{ name, lines, want string }{
		{"all-create-change", `exists -
			create resource name:a role:Secondary suspended:no may_promote:no promotion_score:0
			create device name:a volume:0 minor:7 disk:Diskless client:no quorum:no
			create connection name:a peer-node-id:1 conn-name:p connection:StandAlone role:Unknown
			create peer-device name:a peer-node-id:1 conn-name:p volume:0 replication:Off peer-disk:DUnknown
			create path name:a peer-node-id:1 conn-name:p local:ipv4:10.0.0.1:7000 peer:ipv4:10.0.0.2:7000 established:no
			change resource name:a role:Primary
			change device name:a volume:0 disk:UpToDate quorum:yes
			change connection name:a peer-node-id:1 conn-name:p connection:Connected role:Secondary
			change peer-device name:a peer-node-id:1 conn-name:p volume:0 replication:Established peer-disk:UpToDate
			change path name:a peer-node-id:1 conn-name:p local:ipv4:10.0.0.1:7000 peer:ipv4:10.0.0.2:7000 established:yes`,
			"a[Primary may:no v0:UpToDate:q-yes 1:p:Connected:Secondary/v0:UpToDate:Established:/path:yes]"},
		{"all-create-destroy", `exists -
			create resource name:a role:Secondary may_promote:no
			create device name:a volume:0 disk:Diskless
			create connection name:a peer-node-id:1 conn-name:p connection:StandAlone role:Unknown
			create peer-device name:a peer-node-id:1 conn-name:p volume:0 peer-disk:DUnknown
			create path name:a peer-node-id:1 conn-name:p local:l peer:r established:no
			destroy path name:a peer-node-id:1 conn-name:p local:l peer:r
			destroy peer-device name:a peer-node-id:1 conn-name:p volume:0
			destroy connection name:a peer-node-id:1 conn-name:p
			destroy device name:a volume:0
			destroy resource name:a`, ""},
		{"all-create-helper", `exists -
			create resource name:a role:Secondary may_promote:no
			call helper name:a volume:0 minor:7 helper:before-attach
			response helper name:a volume:0 minor:7 helper:before-attach status:0
			call helper name:a peer-node-id:1 conn-name:p local:l peer:r helper:disconnected`, "a[Secondary may:no]"},
		{"change-before-exists", `change resource name:a role:Primary may_promote:no
			exists resource name:a role:Primary suspended:no may_promote:no promotion_score:1
			exists -`, "a[Primary may:no]"},
		{"create-before-exists", `create resource name:a role:Secondary may_promote:no
			exists resource name:a role:Secondary may_promote:no
			create device name:a volume:0 disk:Diskless quorum:no
			exists device name:a volume:0 disk:Diskless quorum:no
			exists -`, "a[Secondary may:no v0:Diskless:q-no]"},
		{"destroy-before-exists", `destroy resource name:a
			destroy device name:b volume:0
			destroy connection name:b peer-node-id:1 conn-name:p
			destroy peer-device name:b peer-node-id:1 conn-name:p volume:0
			exists resource name:c role:Secondary may_promote:no
			exists -`, "c[Secondary may:no]"},
		{"device-create-destroy", `exists resource name:a role:Secondary may_promote:yes
			exists -
			create device name:a volume:1 minor:8 disk:Diskless quorum:no
			change device name:a volume:1 disk:UpToDate quorum:yes
			destroy device name:a volume:1`, "a[Secondary may:yes]"},
		{"exists-before-create", `exists resource name:a role:Primary may_promote:no
			exists -
			create resource name:a role:Secondary may_promote:no`, "a[Secondary may:no]"},
		{"first-out-of-order", `exists device name:a volume:0 disk:UpToDate quorum:yes
			exists resource name:a role:Secondary may_promote:yes
			exists -`, "a[Secondary may:yes v0:UpToDate:q-yes]"},
		{"out-of-order", `exists -
			create peer-device name:a peer-node-id:1 conn-name:p volume:0 peer-disk:UpToDate replication:Established
			create connection name:a peer-node-id:1 conn-name:p connection:Connected role:Secondary
			create resource name:a role:Secondary may_promote:no`, "a[Secondary may:no 1:p:Connected:Secondary/v0:UpToDate:Established:]"},
		{"may-promote-peer-data", `exists resource name:a role:Secondary may_promote:no
			exists device name:a volume:0 disk:Inconsistent quorum:yes
			exists connection name:a peer-node-id:1 conn-name:p connection:Connected role:Secondary
			exists peer-device name:a peer-node-id:1 conn-name:p volume:0 peer-disk:Inconsistent replication:Established
			exists -
			change resource name:a may_promote:yes promotion_score:1
			change peer-device name:a peer-node-id:1 conn-name:p volume:0 peer-disk:UpToDate`,
			"a[Secondary may:yes v0:Inconsistent:q-yes 1:p:Connected:Secondary/v0:UpToDate:Established:]"},
		{"may-promote-peer-role", `exists resource name:a role:Secondary may_promote:yes
			exists connection name:a peer-node-id:1 conn-name:p connection:Connected role:Secondary
			exists -
			change resource name:a may_promote:no
			change connection name:a peer-node-id:1 conn-name:p role:Primary`, "a[Secondary may:no 1:p:Connected:Primary]"},
		{"may-promote-quorum", `exists resource name:a role:Secondary may_promote:yes
			exists device name:a volume:0 disk:UpToDate quorum:yes
			exists -
			change resource name:a may_promote:no
			change device name:a volume:0 quorum:no`, "a[Secondary may:no v0:UpToDate:q-no]"},
		{"no-resources", `exists -`, ""},
		{"promotion-score-devices", `exists resource name:a role:Secondary may_promote:yes promotion_score:10101
			exists device name:a volume:0 disk:UpToDate quorum:yes
			exists device name:a volume:1 disk:Outdated quorum:yes
			exists -`, "a[Secondary may:yes v0:UpToDate:q-yes v1:Outdated:q-yes]"},
		{"promotion-score-inconsistent", `exists resource name:a role:Secondary may_promote:yes promotion_score:1
			exists device name:a volume:0 disk:Inconsistent quorum:yes
			exists -`, "a[Secondary may:yes v0:Inconsistent:q-yes]"},
		{"resource-create-destroy", `exists -
			create resource name:a role:Secondary may_promote:no
			destroy resource name:a
			create resource name:a role:Secondary`, "a[Secondary may:unknown]"},
		{"resource-exists", `exists resource name:a role:Secondary suspended:no force-io-failures:no may_promote:no promotion_score:0
			exists -`, "a[Secondary may:no]"},
		{"sync", `exists resource name:a role:Primary may_promote:no
			exists connection name:a peer-node-id:1 conn-name:p connection:Connected role:Secondary
			exists peer-device name:a peer-node-id:1 conn-name:p volume:0 replication:SyncSource peer-disk:Inconsistent done:0.00
			exists -
			change peer-device name:a peer-node-id:1 conn-name:p volume:0 done:75.00 eta:nan
			change peer-device name:a peer-node-id:1 conn-name:p volume:0 replication:Established peer-disk:UpToDate`,
			"a[Primary may:no 1:p:Connected:Secondary/v0:UpToDate:Established:]"},
		{"rename", `exists resource name:a role:Secondary may_promote:no
			exists -
			rename resource name:a new_name:b
			change resource name:b role:Primary`, "b[Primary may:no]"},
		{"unknown keys, objects and verbs", `exists resource name:a role:Secondary may_promote:no new-key:x:y
			exists gadget name:a volume:0
			observe resource name:a role:Primary
			exists -`, "a[Secondary may:no]"},
		{"keys in any order", `exists resource may_promote:yes role:Secondary name:a
			exists -`, "a[Secondary may:yes]"},
		{"a connection whose name has dots", `exists connection conn-name:xcp1.example.org name:a connection:Connected role:Primary peer-node-id:3
			exists -`, "a[ may:unknown 3:xcp1.example.org:Connected:Primary]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := apply(t, tt.lines)
			if got := show(st); got != tt.want {
				t.Errorf("state\n got %s\nwant %s", got, tt.want)
			}
			if !st.Complete {
				t.Error("the end of the dump was not seen")
			}
		})
	}
}

func TestParse_BadLines(t *testing.T) {
	for _, line := range []string{"exists", "exists resource", "exists resource name", "exists resource name:a role", "change device name:a volume:0 disk:UpTo change device name:a",
		"2026-01-01T00:00:00 exists", "- skipped", "- skipped x", "EXISTS resource name:a", "exists resource :a", "\x00\xff"} {
		var ev drbd.Event
		if err := ev.Parse(line); !errors.Is(err, drbd.ErrSyntax) {
			t.Errorf("%q: error %v, want one matching ErrSyntax", line, err)
		}
	}
	for _, line := range []string{"change device name:a disk:UpToDate", "change device name:a volume:x", "change device volume:0", "change connection name:a", "rename resource name:a"} {
		var ev drbd.Event
		var st drbd.State
		if err := ev.Parse(line); err != nil {
			t.Fatal(err)
		}
		if err := st.Apply(&ev); !errors.Is(err, drbd.ErrSyntax) || len(st.Resources) != 0 {
			t.Errorf("%q: error %v, state %s; want an error matching ErrSyntax and no state", line, err, show(&st))
		}
	}
}

// Splitting one event into partial ones, key by key, leads to the same state: merging loses nothing.
func TestState_PartialChangesMerge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := map[string][]string{"disk": {"UpToDate", "Consistent", "Outdated"}, "quorum": {"yes", "no"}, "open": {"yes", "no"}, "minor": {"1", "2"}, "size": {"5", "0"}}
		var whole, split drbd.State
		var ev drbd.Event
		for range rapid.IntRange(1, 20).Draw(t, "events") {
			line := "change device name:a volume:0"
			for _, key := range []string{"disk", "quorum", "open", "minor", "size"} {
				if rapid.Bool().Draw(t, key) {
					f := " " + key + ":" + rapid.SampledFrom(values[key]).Draw(t, "value")
					line += f
					if ev.Parse("change device name:a volume:0"+f) != nil || split.Apply(&ev) != nil {
						t.Fatal("bad line")
					}
				}
			}
			if ev.Parse(line) != nil || whole.Apply(&ev) != nil || ev.Parse("change device name:a volume:0") != nil || split.Apply(&ev) != nil {
				t.Fatal("bad line")
			}
		}
		if d := cmp.Diff(whole, split); d != "" {
			t.Fatalf("merged differently:\n%s", d)
		}
	})
}

// A group of lines that was written at once shows one view, the one at its end.
func TestReadEvents_GroupIsOneView(t *testing.T) {
	r, w := io.Pipe()
	views := make(chan string, 10)
	done := make(chan error, 1)
	go func() {
		done <- drbd.ReadEvents(r, "a", func(r *drbd.Resource) {
			if r == nil {
				views <- "none"
				return
			}
			views <- fmt.Sprintf("%s %s", r.Role, r.Quorum())
		})
	}()
	steps := []struct{ write, want string }{
		{"exists resource name:a role:Primary may_promote:no\nexists device name:a volume:0 quorum:yes\nexists -\n", "Primary yes"},
		{"change resource name:a role:Secondary\nchange device name:a volume:0 quorum:no\n", "Secondary no"},
		{"destroy device name:a volume:0\ndestroy resource name:a\n", "none"},
	}
	for _, s := range steps {
		if _, err := io.WriteString(w, s.write); err != nil {
			t.Fatal(err)
		}
		if got := <-views; got != s.want {
			t.Errorf("view %q, want %q", got, s.want)
		}
	}
	_, _ = io.WriteString(w, "- skipped 1\n")
	if err := <-done; !errors.Is(err, drbd.ErrSkipped) {
		t.Errorf("ended with %v, want ErrSkipped", err)
	}
	if len(views) != 0 {
		t.Errorf("%d views too many", len(views))
	}
}

func TestReadEvents_LineTooLong(t *testing.T) {
	err := drbd.ReadEvents(strings.NewReader("exists resource name:"+strings.Repeat("x", 1<<17)+"\n"), "a", func(*drbd.Resource) {})
	if !errors.Is(err, drbd.ErrSyntax) {
		t.Errorf("got %v, want ErrSyntax", err)
	}
}

func FuzzReadEvents(f *testing.F) {
	f.Add("exists resource name:a role:Primary may_promote:no\nexists device name:a volume:0 quorum:yes\nexists -\nchange resource name:a role:Secondary\n")
	f.Add("exists -\ncreate path name:a peer-node-id:1 conn-name:p local:ipv4:1.2.3.4:7000 peer:ipv6:[::1]:7000 established:yes\nrename resource name:a new_name:b\n")
	f.Add("- skipped -2\n")
	f.Add("2026-11-21T00:10:01.832943+00:00 exists -\nchange resource name:a suspended:no\x00\n\n# c\n")
	f.Fuzz(func(t *testing.T, text string) {
		_ = drbd.ReadEvents(strings.NewReader(text), "a", func(r *drbd.Resource) {
			if r == nil {
				return
			}
			if r.Name != "a" {
				t.Errorf("shown resource %q", r.Name)
			}
			if r.Owner() == drbd.Yes && (r.Role != drbd.Primary || r.Quorum() != drbd.Yes) {
				t.Errorf("owner without role and quorum: %+v", r)
			}
			if !slices.IsSortedFunc(r.Devices, func(a, b drbd.Device) int { return a.Volume - b.Volume }) {
				t.Error("devices out of order")
			}
		})
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add(`[{"name":"a","role":"Primary","suspended":true,"suspended-quorum":true,"devices":[{"volume":0,"quorum":false}],"connections":[{"peer-node-id":1,"name":"p","connection-state":"Connected","paths":[{"this_host":{"address":"::1","port":1,"family":"ipv6"}}]}]}]`)
	f.Add(`[{"name":"a"}]`)
	f.Fuzz(func(t *testing.T, text string) {
		list, err := drbd.ParseStatus([]byte(text))
		for _, r := range list {
			if err == nil && r.Name == "" {
				t.Error("a resource without name")
			}
		}
	})
}

func BenchmarkParse(b *testing.B) {
	const line = "change peer-device name:xcp-persistent-database peer-node-id:0 conn-name:xcp1 volume:0 replication:Established peer-disk:UpToDate peer-client:no resync-suspended:no"
	var ev drbd.Event
	var st drbd.State
	b.ReportAllocs()
	for b.Loop() {
		if ev.Parse(line) != nil || st.Apply(&ev) != nil {
			b.Fatal("bad line")
		}
	}
}
