package heartbeat

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// The numbers of the reference (xha-nbd.md, section 5.2).
func TestTimingFollowsXhad(t *testing.T) {
	for _, c := range []struct {
		timeout              time.Duration
		suspect, hold, evict time.Duration
		kernel               time.Duration
		findings             int
	}{
		{60 * sec, 3 * sec, 17 * sec, 10 * sec, 19 * sec, 0},
		{20 * sec, 2 * sec, 6 * sec, 3500 * time.Millisecond, 8 * sec, 0},
		{10 * sec, sec, 3 * sec, 2500 * time.Millisecond, 5 * sec, 1},
	} {
		got, findings := DeriveTiming(statefile.Derive(c.timeout))
		if got.Suspect != c.suspect || got.Hold != c.hold || got.Evict != c.evict || got.KernelTimeout() != c.kernel || len(findings) != c.findings {
			t.Errorf("T=%v: %+v, findings %v", c.timeout, got, findings)
		}
	}
	_, findings := DeriveTiming(statefile.Derive(10 * sec))
	if len(findings) == 1 && (!strings.Contains(findings[0].Text, "4s") || !strings.Contains(findings[0].Text, "5s")) {
		t.Errorf("the warning lacks its numbers: %s", findings[0].Text)
	}
}

// Whatever xhad is told, the rules between the times hold.
func TestTimingRules(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		x := statefile.Derive(time.Duration(rapid.IntRange(10, 600).Draw(r, "T")) * sec)
		got, _ := DeriveTiming(x)
		switch {
		case got.Settle <= got.Lease:
			r.Fatal("a new owner answers while the old one's lease runs")
		case got.KernelTimeout() <= got.Hold || got.KernelDead() <= got.KernelTimeout():
			r.Fatal("the kernel gives up while we hold")
		case got.Evict <= got.Suspect || got.Attempt > got.Suspect:
			r.Fatalf("%+v", got)
		case x.StateFileTimeout >= 20*sec && got.Hold >= x.Tolerated():
			r.Fatal("requests are held longer than xhad tolerates")
		}
	})
}

// The pauses between asks: none is so long that it delays a failover, nor so short that a large pool drowns in handshakes.
func TestAskAgain(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		tm, _ := DeriveTiming(statefile.Derive(time.Duration(rapid.IntRange(10, 600).Draw(r, "T")) * sec))
		hosts := rapid.IntRange(1, 64).Draw(r, "hosts")
		outage := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(r, "outage"))
		jitter := rapid.Float64Range(0, 1).Draw(r, "jitter")
		got, slow := tm.AskAgain(hosts, outage, jitter), tm.AskAgain(hosts, outage, 0)
		switch {
		case got > slow || got < slow/2:
			r.Fatalf("%v with jitter %v, %v without", got, jitter, slow)
		case slow > max(tm.Settle, outage/20) || slow > sec:
			r.Fatalf("%v later than need be after %v", slow, outage)
		case hosts == 64 && got < 100*time.Millisecond, hosts <= 3 && outage < sec && slow > 50*time.Millisecond:
			r.Fatalf("%d hosts: %v", hosts, got)
		case tm.AskAgain(hosts, time.Hour, 0) != sec:
			r.Fatal("nobody owns for an hour, and hosts ask all the time")
		}
	})
}

func TestDecideCandidate(t *testing.T) {
	tm, _ := DeriveTiming(statefile.Derive(60 * sec))
	now := time.Unix(10000, 0)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	peers := func(a, b Answer, at time.Duration) []Peer {
		return []Peer{{Host: "n1", Answer: a, At: ago(at), Diskful: true}, {Host: "n3", Answer: b, At: ago(at), Diskful: true}}
	}
	base := func(mod func(v *View)) View {
		v := View{Self: "n2", Diskful: true, Peers: peers(Silent, NotOwner, time.Second), LostAt: ago(2 * sec), Owner: "n1", Heard: ago(2 * sec), Cut: map[string]time.Time{}}
		mod(&v)
		return v
	}
	for _, c := range []struct {
		name string
		view View
		want Step
	}{
		{"served", base(func(v *View) { v.Served = true; v.Heard = ago(time.Hour) }), Step{}},
		{"silent for 2 s: too early", base(func(v *View) {}), Step{Recheck: sec, Why: "owner silent"}},
		{"silent for 3 s, first in rank", base(func(v *View) { v.Heard = ago(3 * sec) }), Step{Open: true, Why: "owner silent"}},
		{"an open is under way", base(func(v *View) { v.Heard = ago(9 * sec); v.Opening = true }), Step{}},
		{"opened a moment ago", base(func(v *View) { v.Heard = ago(5 * sec); v.Opened = ago(400 * time.Millisecond); v.Held = true }),
			Step{Recheck: 600 * time.Millisecond, Why: "owner silent"}},
		{"owner refuses connections, all others say no: founded when the last said so", base(func(v *View) { v.Peers = peers(Refused, NotOwner, 0) }),
			Step{Open: true, Why: "no host serves"}},
		{"owner says no, another host has not answered", base(func(v *View) { v.Peers = peers(NotOwner, Silent, 0) }),
			Step{Recheck: 300 * time.Millisecond, Why: "the owner says that it is none"}},
		{"answers from before the outage count for nothing", base(func(v *View) { v.Peers = peers(Refused, NotOwner, 5*sec) }), Step{Recheck: sec, Why: "owner silent"}},
		{"second in rank", base(func(v *View) { v.Self = "n4"; v.Peers = peers(Refused, NotOwner, 0) }), Step{Recheck: 300 * time.Millisecond, Why: "no host serves"}},
		{"diskless comes after diskful", base(func(v *View) { v.Diskful = false; v.Peers = peers(Refused, NotOwner, 0) }),
			Step{Recheck: 300 * time.Millisecond, Why: "no host serves"}},
		{"the named successor is first", base(func(v *View) { v.Self, v.Successor = "n4", "n4"; v.Peers = peers(Refused, NotOwner, 0) }), Step{Open: true, Why: "named by the owner that left"}},
		{"another host was named: it gets its time", base(func(v *View) { v.Successor, v.LostAt = "n3", ago(0); v.Peers = peers(NotOwner, NotOwner, 0) }),
			Step{Recheck: 3*sec + 300*time.Millisecond, Why: "no host serves"}},
		{"it has not answered yet", base(func(v *View) {
			v.Successor, v.LostAt = "n3", ago(sec)
			v.Peers = peers(NotOwner, NotOwner, sec)
			v.Peers[1].At = ago(2 * sec)
		}),
			Step{Recheck: 2 * sec, Why: "the owner says that it is none"}},
		{"it tries in vain: the wait does not begin anew", base(func(v *View) { v.Successor, v.LostAt = "n3", ago(4*sec); v.Peers = peers(NotOwner, NotOwner, 0) }),
			Step{Recheck: 300 * time.Millisecond, Why: "no host serves"}},
		{"handed back a moment after it was handed over", base(func(v *View) { v.LeftAt, v.Successor = ago(3*sec), "n2"; v.Peers = peers(NotOwner, NotOwner, 0) }),
			Step{Open: true, Why: "named by the owner that left"}},
		{"the named host waits for nobody's answer", base(func(v *View) { v.Successor = "n2"; v.Peers = peers(NotOwner, Silent, 0) }),
			Step{Open: true, Why: "named by the owner that left"}},
		{"and no more", base(func(v *View) { v.Successor = "n3"; v.LostAt = ago(4 * sec); v.Peers = peers(NotOwner, NotOwner, 3*sec) }),
			Step{Open: true, Why: "no host serves"}},
		{"the named host refuses: nobody waits for it", base(func(v *View) { v.Successor, v.LostAt = "n3", ago(0); v.Peers = peers(NotOwner, Refused, 0) }),
			Step{Open: true, Why: "no host serves"}},
		{"the named host has been the owner meanwhile", base(func(v *View) { v.Successor, v.LostAt = "n1", ago(0); v.Peers = peers(NotOwner, NotOwner, 0) }),
			Step{Open: true, Why: "no host serves"}},
		{"after handing over, others first", base(func(v *View) { v.Owner, v.LeftAt = "n2", ago(0); v.Peers = peers(NotOwner, NotOwner, 0) }),
			Step{Recheck: 300*time.Millisecond + 3*sec, Why: "no host serves"}},
		{"barred by policy", base(func(v *View) { v.Heard = ago(5 * sec); v.Barred = "suspend-io" }), Step{Why: "suspend-io"}},
		{"frozen owner is evicted", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(10*sec), ago(9*sec), ago(sec), true, "n1"
		}),
			Step{Cut: "n1", Why: "owner silent although its kernel answers"}},
		{"a host that was heard while it opened is not evicted as silent from before", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(20*sec), ago(19*sec), ago(400*time.Millisecond), true, "n1"
			v.Peers = peers(Silent, NotOwner, sec)
			v.Peers[0].Heard = ago(9 * sec)
		}), Step{Recheck: 600 * time.Millisecond, Why: "owner silent"}},
		{"a host that still opens is not evicted", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(20*sec), ago(19*sec), ago(400*time.Millisecond), true, "n1"
			v.Peers = peers(Opening, NotOwner, 9*sec)
			v.Peers[0].Heard = ago(9 * sec)
		}), Step{Recheck: 600 * time.Millisecond, Why: "owner silent"}},
		{"a host that opens for ever is evicted", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(20*sec), ago(19*sec), ago(400*time.Millisecond), true, "n1"
			v.Peers = peers(Opening, NotOwner, 10*sec)
			v.Peers[0].Heard = ago(10 * sec)
		}), Step{Cut: "n1", Why: "owner silent although its kernel answers"}},
		{"another host opens: it gets its time", base(func(v *View) {
			v.Heard = ago(4 * sec)
			v.Peers = peers(Silent, Opening, sec)
		}), Step{Recheck: 2 * sec, Why: "owner silent"}},
		{"one that has just begun to open does not keep this host away for longer", base(func(v *View) {
			v.Self, v.Heard = "n0", ago(6*sec)
			v.Peers = peers(Silent, Opening, 0)
		}), Step{Open: true, Why: "owner silent"}},
		{"evicted while it was frozen, and learns both at once: others first", base(func(v *View) {
			v.Owner, v.Heard, v.LostAt, v.LeftAt = "n2", ago(15*sec), ago(15*sec), now
			v.Peers = peers(NotOwner, Silent, sec)
		}), Step{Recheck: 3*sec + 300*time.Millisecond, Why: "the owner says that it is none"}},
		{"a host that became Primary a moment ago is no frozen owner", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(20*sec), ago(19*sec), ago(400*time.Millisecond), true, "n3"
			v.Peers, v.PrimarySince = peers(Silent, Silent, 19*sec), ago(9*sec)
		}), Step{Recheck: 600 * time.Millisecond, Why: "owner silent"}},
		{"no eviction before its time", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(9*sec), ago(8*sec), ago(400*time.Millisecond), true, "n1"
		}),
			Step{Recheck: 600 * time.Millisecond, Why: "owner silent"}},
		{"no eviction unless drbd shows a Primary: it may be quorum that is missing", base(func(v *View) { v.Heard, v.Opened, v.Held = ago(20*sec), ago(400*time.Millisecond), true }),
			Step{Recheck: 600 * time.Millisecond, Why: "owner silent"}},
		{"no eviction of a host whose daemon answers: something else holds its device", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(20*sec), ago(20*sec), ago(400*time.Millisecond), true, "n1"
			v.Peers = peers(NotOwner, NotOwner, sec)
		}), Step{Recheck: 600 * time.Millisecond, Why: "no host serves"}},
		{"evicted once only, and asked for again soon: it falls when the next host cuts its link", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(11*sec), ago(10*sec), ago(100*time.Millisecond), true, "n1"
			v.Cut["n1"] = ago(sec)
		}), Step{Recheck: 200 * time.Millisecond, Why: "owner silent"}},
		{"the cut failed: cut again, the majority may need it", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held, v.Primary = ago(11*sec), ago(10*sec), ago(100*time.Millisecond), true, "n1"
			v.Cut["n1"], v.Uncut = ago(sec), map[string]bool{"n1": true}
		}), Step{Cut: "n1", Why: "owner silent although its kernel answers"}},
		{"the cut failed, or so it seemed, and the host answers: restore the link", base(func(v *View) {
			v.Served = true
			v.Cut["n1"], v.Uncut = ago(5*sec), map[string]bool{"n1": true}
			v.Peers = peers(NotOwner, NotOwner, sec)
		}), Step{Join: "n1", Why: "the host whose link was cut answers again"}},
		{"evicted just now: open without waiting", base(func(v *View) {
			v.Heard, v.LostAt, v.Opened, v.Held = ago(11*sec), ago(10*sec), ago(400*time.Millisecond), true
			v.Cut["n1"] = ago(100 * time.Millisecond)
		}), Step{Open: true, Why: "owner silent"}},
		{"the evicted host answers: restore the link, even while served", base(func(v *View) {
			v.Served = true
			v.Cut["n1"] = ago(5 * sec)
			v.Peers = peers(NotOwner, NotOwner, sec)
		}), Step{Join: "n1", Why: "the host whose link was cut answers again"}},
		{"the evicted host says that it serves, and another one does: it has not noticed yet, and drbd would refuse it", base(func(v *View) {
			v.Served, v.Owner, v.Heard = true, "n3", now
			v.Cut["n1"] = ago(5 * sec)
			v.Peers = peers(Serves, NotOwner, sec)
		}), Step{}},
		{"the host whose link was cut goes on serving this one: there was no majority", base(func(v *View) {
			v.Served, v.Owner, v.Heard = true, "n1", now
			v.Cut["n1"] = ago(5 * sec)
			v.Peers = peers(Serves, NotOwner, sec)
		}), Step{Join: "n1", Why: "the host whose link was cut answers again"}},
	} {
		if d := cmp.Diff(c.want, DecideCandidate(now, tm, c.view)); d != "" {
			t.Errorf("%s: (-want +got)\n%s", c.name, d)
		}
	}
}

// A repeated answer must not move a rank's turn away for ever.
func TestRepeatedAnswersKeepTheirTime(t *testing.T) {
	tm, _ := DeriveTiming(statefile.Derive(60 * sec))
	now := time.Unix(10000, 0)
	v := View{Self: "n9", LostAt: now, Owner: "n1", Heard: now, Peers: []Peer{{Host: "n1"}, {Host: "n2"}}}
	for range 100 {
		now = now.Add(25 * time.Millisecond)
		v.Note(now, "n1", Refused)
		v.Note(now, "n2", NotOwner)
		if DecideCandidate(now, tm, v).Open {
			if d := now.Sub(v.LostAt); d > 400*time.Millisecond {
				t.Errorf("second in rank opens after %v", d)
			}
			return
		}
	}
	t.Error("second in rank never opens")
}

func TestOwnerOrdersRequests(t *testing.T) {
	tm, _ := DeriveTiming(statefile.Derive(60 * sec))
	now := time.Unix(10000, 0)
	o := NewOwner(now, tm, false)
	if o.ServesIn(now) != tm.Settle || NewOwner(now, tm, true).ServesIn(now) != 0 {
		t.Error("settling")
	}
	s1, s2 := Session{"boot", 1}, Session{"boot", 2}
	o.Hello("a", s1)
	o.Hello("b", s1)
	write := &Request{Host: "a", Session: s1, Off: 4096, Len: 1024, Write: true}
	o.Enter(write)
	if v := o.Try(write); v != Run {
		t.Fatalf("write: %v", v)
	}
	read := &Request{Host: "b", Session: s1, Off: 4096, Len: 1024}
	o.Enter(read)
	if v := o.Try(read); v != Wait {
		t.Errorf("a read of what is being written: %v, want Wait", v)
	}
	if !o.Hello("a", s2) || o.Hello("a", s1) {
		t.Error("sessions are not ordered")
	}
	again := &Request{Host: "a", Session: s2, Off: 4096, Len: 1024, Write: true}
	o.Enter(again)
	if v := o.Try(again); v != Wait {
		t.Errorf("the newer session's write while the older one's is at the device: %v, want Wait", v)
	}
	late := &Request{Host: "a", Session: s1, Off: 4096, Len: 1024, Write: true}
	o.Enter(late)
	if v := o.Try(late); v != Stale {
		t.Errorf("the older session's queued write: %v, want Stale", v)
	}
	o.End(write)
	if o.Try(read) != Run || o.Try(again) != Wait {
		t.Error("after the write, the read comes first and the next write after it")
	}
	o.End(read)
	if o.Try(again) != Run {
		t.Error("the queued write never runs")
	}
	o.Leave()
	last := &Request{Host: "b", Session: s1, Off: 0, Len: 512}
	o.Enter(last)
	if o.Try(last) != Leaving || o.Idle() || o.Hello("c", s1) {
		t.Error("a left owner works on")
	}
	o.End(again)
	if !o.Idle() {
		t.Error("not idle after the last request")
	}
}

func TestOwnersDataIsCurrentOnlyUnderAFreshWrite(t *testing.T) {
	tm, _ := DeriveTiming(statefile.Derive(60 * sec))
	now := time.Unix(10000, 0)
	o := NewOwner(now, tm, true)
	if o.Current(now) {
		t.Error("current before any write")
	}
	o.Wrote(now)
	if !o.Current(now.Add(tm.Lease)) || o.Current(now.Add(tm.Lease+1)) {
		t.Error("lease")
	}
	o.Wrote(now.Add(-sec))
	if !o.Current(now.Add(tm.Lease)) {
		t.Error("an older write took the lease back")
	}
	o.Leave()
	if o.Current(now) {
		t.Error("current after leaving")
	}
}

// The budget is one per outage: a failing cycle must not multiply it.
func TestFrontBudget(t *testing.T) {
	tm, _ := DeriveTiming(statefile.Derive(60 * sec))
	now := time.Unix(10000, 0)
	f := NewFront(now, tm, 0)
	f.Answered()
	if until, ok := f.Until(now, now); !ok || until != now.Add(tm.Hold) {
		t.Error("no outage")
	}
	f.Lost(now)
	f.Lost(now.Add(5 * sec))
	later := now.Add(tm.Hold - sec)
	if until, ok := f.Until(later, later); !ok || until != now.Add(tm.Hold) {
		t.Errorf("a late request waits until %v", until.Sub(now))
	}
	if _, ok := f.Until(now.Add(tm.Hold), now.Add(tm.Hold)); ok {
		t.Error("the budget is spent, and a request waits")
	}
	f.Answered()
	if _, ok := f.Until(now.Add(tm.Hold), now.Add(tm.Hold)); !ok {
		t.Error("the outage has ended")
	}
}

func TestWhatMayBeRepeated(t *testing.T) {
	for _, c := range []struct {
		off, n int64
		want   bool
	}{{4096, 1024, true}, {4096 * 64, 4096, true}, {0, 512, false}, {3584, 1024, false}, {4096, 8192, false}, {0, 131072, false}, {266240, 1024, false}, {4096 * 3, 4096, true}} {
		if got := Repeatable(c.off, c.n); got != c.want {
			t.Errorf("write of %d at %d: %v", c.n, c.off, got)
		}
	}
	tm, _ := DeriveTiming(statefile.Derive(60 * sec))
	now := time.Unix(10000, 0)
	f := NewFront(now, tm, tm.KernelTimeout())
	if f.TakesShared(now.Add(tm.KernelTimeout())) || !f.TakesShared(now.Add(tm.KernelTimeout()+sec)) || !NewFront(now, tm, 0).TakesShared(now) {
		t.Error("after a takeover, shared writes may be repetitions until the kernel's time-out has passed")
	}
}

func TestDeviceRules(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, statefile.Size-512), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDevice(path, statefile.Size); !errors.Is(err, ErrTooSmall) {
		t.Errorf("small device: %v", err)
	}
	if err := os.Truncate(path, 4<<20); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDevice(path, statefile.Size)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDevice(path, statefile.Size); !errors.Is(err, ErrHeld) {
		t.Errorf("second open: %v", err)
	}
	p := nbd.AlignedBuffer(1024)
	if err := d.Read(p, 4<<20); err == nil {
		t.Error("a read past the end returned nothing and no error")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// A device with blocks of 4 KiB: xhad's 512 and 1024 bytes are read-modify-write.
	d, err = OpenDevice(path, statefile.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	wide := d.(*blockDevice)
	wide.block, wide.buf = 4096, nbd.AlignedBuffer(4096)
	mirror := make([]byte, 1<<20)
	rapid.Check(t, func(r *rapid.T) {
		off := 512 * int64(rapid.IntRange(0, 1000).Draw(r, "sector"))
		buf := nbd.AlignedBuffer(512 * rapid.IntRange(1, 20).Draw(r, "sectors"))
		for i := range buf {
			buf[i] = byte(i) ^ rapid.Byte().Draw(r, "x")
			if i > 8 {
				break
			}
		}
		if err := d.Write(buf, off); err != nil {
			r.Fatal(err)
		}
		copy(mirror[off:], buf)
		got := nbd.AlignedBuffer(64 << 10)
		if err := d.Read(got, 0); err != nil {
			r.Fatal(err)
		}
		if d := cmp.Diff(mirror[:len(got)], got); d != "" {
			r.Fatal("read-modify-write lost data")
		}
	})
}

func TestRecord(t *testing.T) {
	p := make([]byte, recordLen)
	want := Record{Owner: "n1", Epoch: 7, Counter: 9, Clean: true}
	want.put(p)
	if got, ok := ParseRecord(p); !ok || got != want {
		t.Errorf("%+v %v", got, ok)
	}
	if _, ok := ParseRecord(make([]byte, recordLen)); ok {
		t.Error("zeroes are a record")
	}
}

const resText = `# This file was generated by linstor
resource "xcp-persistent-ha-statefile"
{
    options
    {
        on-no-quorum io-error;
        quorum majority;
    }
    on "xcp-1"
    {
        volume 0
        {
            device minor 1003;
        }
        node-id    0;
    }
    on "xcp-2"
    {
        node-id    1;
    }
    connection
    {
        host "xcp-1" address ipv4 10.9.0.1:7003;
        host "xcp-2" address ipv6 [fd00::2]:7003;
    }
}`

func TestReadRes(t *testing.T) {
	r, err := ReadRes(strings.NewReader(resText))
	want := Res{Hosts: map[string]string{"xcp-1": "10.9.0.1", "xcp-2": "fd00::2"}}
	if d := cmp.Diff(want, r); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
	if _, err := ReadRes(strings.NewReader("on n1 {\n}\non n2 {\n}\nconnection { host n1 address 10.0.0.1:7; host n2 address 10.0.0.2:7; }")); err == nil {
		t.Error("hosts without an address were accepted")
	}
	if _, err := ReadRes(strings.NewReader("resource x {}")); err == nil {
		t.Error("a file without hosts was accepted")
	}
}

func FuzzReadRes(f *testing.F) {
	f.Add(resText)
	f.Fuzz(func(t *testing.T, s string) {
		if r, err := ReadRes(strings.NewReader(s)); err == nil && len(r.Hosts) == 0 {
			t.Error("no hosts, no error")
		}
	})
}

func TestDRBDCommands(t *testing.T) {
	status := `[{"name":"r0","node-id":0,"role":"Secondary","devices":[{"volume":0,"disk-state":"UpToDate","quorum":true}],"connections":[
{"peer-node-id":1,"name":"n2","connection-state":"Connected","peer-role":"Primary","peer_devices":[{"peer-disk-state":"UpToDate"}]},
{"peer-node-id":2,"name":"n3","connection-state":"Connecting","peer-role":"Unknown","peer_devices":[{"peer-disk-state":"DUnknown"}]}]}]`
	var calls []string
	r := DRBDResource{Name: "r0", Run: func(_ context.Context, name string, args ...string) ([]byte, error) {
		calls = append(calls, name+" "+strings.Join(args, " "))
		return []byte(status), nil
	}}
	st, err := r.State(t.Context())
	yes := true
	if d := cmp.Diff(ResourceState{Diskful: true, Disk: DiskUpToDate, Quorum: &yes, Primary: "n2", Peers: map[string]PeerDisk{"n2": DiskUpToDate, "n3": "DUnknown"}}, st); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
	if err := errors.Join(r.Join(t.Context(), "n2"), r.Cut(t.Context(), "n2")); err != nil { // It need not be joined.
		t.Error(err)
	}
	status = strings.Replace(status, `"connection-state":"Connected"`, `"connection-state":"StandAlone"`, 1)
	if err := errors.Join(r.Cut(t.Context(), "n2"), r.Join(t.Context(), "n2")); err != nil { // Nor be cut again.
		t.Error(err)
	}
	if r.Cut(t.Context(), "n9") == nil {
		t.Error("cut a link to an unknown host")
	}
	calls = slices.DeleteFunc(calls, func(c string) bool { return strings.Contains(c, "status") })
	if want := []string{"drbdsetup disconnect r0 1 --force", "drbdsetup connect r0 1"}; !slices.Equal(calls, want) {
		t.Errorf("calls %q, want %q", calls, want)
	}
}

func FuzzSessionName(f *testing.F) {
	f.Add("statefile@n1/boot/12")
	f.Add("statefile")
	f.Fuzz(func(t *testing.T, name string) {
		export, host, s, err := parseSessionName(name)
		if err == nil && host != "" && sessionName(export, host, s) != name && !strings.Contains(name, "/0") && !strings.Contains(name, "+") {
			t.Errorf("%q parses as %q %q %v", name, export, host, s)
		}
	})
}
