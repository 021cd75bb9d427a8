package failover

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// The verbs of this agent's actions.
const (
	VerbRelease    = "release"          // kill the controller, demote by force, unmount, verify
	VerbYield      = "yield"            // the same politely, in favour of another host
	VerbPromote    = "promote"          // drbdsetup primary; with Args["probe"] against a Primary that seems dead
	VerbCheckPeers = "check-peers"      // drbdsetup primary while Primary: DRBD asks all peers now
	VerbMount      = "start-mount"      // start the mount unit
	VerbStart      = "start-controller" // start the controller unit
	VerbSignal     = "signal-controller"
	VerbConnect    = "connect"  // take a StandAlone connection back up
	VerbBringUp    = "bring-up" // activate the volume, adjust
	VerbRestoreRes = "restore-res"
	VerbSaveRes    = "save-res"
	VerbKeepHeld   = "keep-held" // keep on disk which connections were taken down by hand
)

// decider carries one decision. Its methods are the steps of DESIGN.md.
type decider struct {
	agents.Plan
	now time.Time
	s   *Snapshot
	m   *Memory
}

// Decide is pure: the plan follows from the time and the snapshot alone.
func Decide(now time.Time, s Snapshot) agents.Plan {
	d := &decider{now: now, s: &s, m: &s.Memory}
	d.findFacts()
	if d.release() || d.boot() {
		return d.Plan
	}
	switch {
	case s.owns():
		d.checkPeers()
		if s.Mode == Guard {
			d.guardOwner()
		} else {
			d.owner()
		}
	case s.Mode == Owner:
		d.promote()
	}
	d.repair()
	d.keepFacts()
	return d.Plan
}

func (d *decider) add(verb string, risk agents.Risk, args map[string]string, why string, needs ...agents.Need) {
	d.Add(agents.Action{Verb: verb, Target: d.s.Names.Resource, On: d.s.Self, Args: args, Risk: risk, Why: why, Needs: needs})
}

func (d *decider) find(code string, sev agents.Severity, text, fix string) {
	d.Find(agents.Finding{Code: code, Subject: "resource/" + d.s.Names.Resource, Severity: sev, Text: text, Fix: fix})
}

// startGrace is how long an agent may need after its start to see DRBD's events and to hear the other hosts.
const startGrace = 3 * time.Second

// findSettled is find for what is so at each start for a moment: it would be raised and cleared for nothing.
func (d *decider) findSettled(code string, sev agents.Severity, text, fix string) {
	if left := d.m.Began.Add(startGrace).Sub(d.now); left > 0 {
		d.RecheckIn(left)
		return
	}
	d.find(code, sev, text, fix)
}

// due tells whether something tried before may be tried again, and rechecks when it may. Pauses double from min to max.
func (d *decider) due(key string, least, most time.Duration) bool {
	a, ok := d.m.Asked[key]
	if !ok {
		return true
	}
	pause := min(least<<min(max(a.N-1, 0), 20), most)
	if left := pause - d.now.Sub(a.Last); left > 0 {
		d.RecheckIn(left)
		return false
	}
	return true
}

// --- 1. release

const (
	pollRelease = 50 * time.Millisecond
	pollYield   = 500 * time.Millisecond
)

// release decides whether this host must let go, and tells whether it does. Nothing else is done meanwhile.
func (d *decider) release() bool {
	why, how := d.mustRelease()
	if why == "" {
		return false
	}
	verb, args := VerbYield, map[string]string(nil)
	switch how {
	case byForce:
		verb = VerbRelease
	case handingOver:
		args = map[string]string{"hand-over": "yes"}
	case politely:
	}
	d.add(verb, agents.RiskMove, args, why)
	if how != byForce && !d.s.Controller.Down() {
		d.RecheckIn(pollYield) // its end is a change of the unit, and wakes us
	} else {
		d.RecheckIn(pollRelease)
	}
	if !d.m.Releasing.IsZero() && d.now.Sub(d.m.Releasing) > d.s.Policy.HoldersAfter {
		text := "the database is not released after " + d.now.Sub(d.m.Releasing).Round(time.Second).String()
		fix := "find what holds the device: grep " + d.s.Names.MountPoint + " /proc/*/mountinfo; fuser -vm " + d.s.Names.MountPoint
		if a := d.m.Asked["demote"]; a.Err != "" {
			text += "; DRBD refuses the demotion: " + a.Err
			fix = "drbdadm secondary --force " + d.s.Names.Resource + "; dmesg | grep drbd"
		}
		if len(d.s.Holders) > 0 {
			text += "; held by " + strings.Join(d.s.Holders, ", ")
			fix = "end these processes, or leave their mount namespaces"
		}
		d.find("release-stuck", agents.Critical, text, fix)
	}
	return true
}

// letGo is how a host lets go of the database.
type letGo int

const (
	byForce     letGo = iota // without a quorum nothing that is written now lasts
	politely                 // there is time for the controller to end by itself
	handingOver              // politely, and not for a target: whoever is fit
)

// mustRelease returns why this host must let go of the database, "" when it need not, and how.
func (d *decider) mustRelease() (why string, how letGo) {
	s, r := d.s, d.s.Res
	if !s.Known {
		return "", byForce // a view that was never had proves nothing
	}
	if r == nil {
		// The resource is gone below a mounted filesystem or a running controller: only possible by force.
		return "", byForce
	}
	if !d.m.NoQuorum.IsZero() {
		grace := s.Policy.SuspendGrace
		if r.SuspendedQuorum() != drbd.Yes {
			grace = 0 // io-error: the filesystem has failed already
		}
		if left := grace - d.now.Sub(d.m.NoQuorum); left > 0 {
			d.RecheckIn(left)
			return "", byForce
		}
		return "primary without quorum", byForce
	}
	if r.ForceIOFailure == drbd.Yes {
		return "demoted by force while held", byForce
	}
	if r.Role == drbd.Secondary && (s.Mount.Known && !s.Mount.Clear() || s.UnitsKnown && s.Mount.Ours && s.Controller.Running()) {
		if s.Mode == Guard && s.Target.Job != 0 {
			d.RecheckIn(pollRelease) // the reactor's own chain is starting or stopping
			return "", byForce
		}
		return "secondary, but the database is still mounted", byForce
	}
	if s.Mode != Owner || r.Role != drbd.Primary {
		return "", byForce
	}
	switch {
	case s.Move != nil && s.Move.From == s.Self && s.Move.To != s.Self && s.Move.Age < s.Policy.MoveHold:
		return "moving to " + s.Move.To, politely
	case !d.m.Yielding.IsZero():
		return "letting another host have it", politely
	}
	return d.handOver(), handingOver
}

// handOver says why another host should try, "" when none should: the controller cannot run here, or it failed here too often, and somebody alive is fit and
// has failed less. Hosts that are all wrong about themselves must not pass it round and round, so once is enough for a while.
func (d *decider) handOver() string {
	s := d.s
	if !d.m.HandOver.IsZero() && d.now.Sub(d.m.HandOver) < s.Policy.PenaltyMax || !s.owns() || !s.UnitsKnown || !s.Mount.Known {
		return ""
	}
	if s.Mount.Ours && s.Mount.ReadOnly {
		return "the database's filesystem is read-only" // mounting it anew may help here too
	}
	if !s.Controller.Down() || d.betterHost() == "" {
		return ""
	}
	if f := d.cannotRun(); f.Code != "" && len(s.Mount.Elsewhere) == 0 { // a device that is mounted elsewhere too cannot be demoted
		return "the controller cannot run here: " + f.Text
	}
	if n, _ := d.m.failed(); n >= s.Policy.MaxFailures {
		return fmt.Sprintf("starting it failed here %d times", n)
	}
	return ""
}

// cannotRun says what on this host keeps the controller from running, whoever else could run it. No Code: nothing.
func (d *decider) cannotRun() (f agents.Finding) {
	s := d.s
	missing := func(u systemd.Unit) bool { return u.Load != "loaded" } // not-found, masked, bad-setting, error
	switch {
	case s.Mount.NotDir:
		f.Code, f.Text, f.Fix = "mount-point-missing", s.Names.MountPoint+" is no directory", "ls -ld "+s.Names.MountPoint+"; mkdir -p "+s.Names.MountPoint
	case s.Mount.Foreign:
		f.Code, f.Text, f.Fix = "mount-point-taken", "something else is mounted on "+s.Names.MountPoint, "findmnt "+s.Names.MountPoint+"; unmount it"
	case len(s.Mount.Elsewhere) > 0 && !s.Mount.Ours:
		f.Code, f.Text, f.Fix = "device-mounted-elsewhere", "the database is mounted on "+strings.Join(s.Mount.Elsewhere, ", "), "unmount it there"
	case missing(s.MountUnit) && !s.Mount.Ours:
		f.Code, f.Text, f.Fix = "mount-unit-missing", s.Names.MountUnit+" is "+s.MountUnit.Load, "systemctl cat "+s.Names.MountUnit+"; systemctl unmask "+s.Names.MountUnit
	case missing(s.Controller):
		f.Code, f.Text, f.Fix = "controller-unit-missing", s.Names.Controller+" is "+s.Controller.Load, "systemctl cat "+s.Names.Controller+"; systemctl unmask "+s.Names.Controller
	}
	return f
}

// betterHost returns a living host that could own the database and has failed less often than this one.
func (d *decider) betterHost() string {
	for i := range d.s.Peers {
		p := &d.s.Peers[i]
		c := d.s.Res.Connection(p.Name)
		if d.s.alive(d.now, p) && p.Says.Mode == Owner && p.Says.Usable && p.Says.Failures < d.s.Policy.MaxFailures && c != nil && c.State == drbd.Connected {
			return p.Name
		}
	}
	return ""
}

// --- 2. and 3. the owner

func (d *decider) owner() {
	s := d.s
	if s.Mode != Owner {
		if s.UnitsKnown && s.Mount.Ours && d.m.StartedJVM {
			d.supervise() // it ran here already: keeping it alive promotes nothing
		}
		return
	}
	if !s.UnitsKnown || !s.Mount.Known {
		d.find("systemd-unreachable", agents.Critical, "systemd or mountinfo cannot be read: the controller cannot be started", "systemctl status; journalctl -b _PID=1")
		d.RecheckIn(time.Second)
		return
	}
	if !s.Mount.Ours {
		d.mount()
		return
	}
	if s.Mount.ReadOnly {
		return // it was let go of lately, and mounting it again did not help
	}
	d.supervise()
}

func (d *decider) mount() {
	s := d.s
	if len(d.m.MountFailures) >= 2 {
		d.find("mount-fails", agents.Critical, "the database does not mount here; all replicas have the same bytes, so another host helps only when the cause is this host", "systemctl status "+s.Names.MountUnit+"; journalctl -k | grep EXT4")
	}
	switch {
	case s.Controller.Running():
		// A controller without the mount would make a fresh, empty database on the root disk (linstor.md 4.2).
		d.add(VerbSignal, agents.RiskMove, map[string]string{"signal": "KILL", "stop": "yes"}, "the controller runs without the database's filesystem")
		d.RecheckIn(pollRelease)
	case s.MountUnit.Job != 0 || s.MountUnit.Active == "activating":
		d.RecheckIn(pollRelease)
	case d.cannotRun().Code != "": // findFacts tells
	case d.due("mount", s.Policy.RetryUnit, time.Minute):
		d.add(VerbMount, agents.RiskAdd, nil, "this host owns the database")
		d.RecheckIn(pollRelease)
	}
}

// guardOwner acts beside drbd-reactor on the host that owns. It starts nothing but a controller whose chain stands.
func (d *decider) guardOwner() {
	s := d.s
	if !s.UnitsKnown || !s.Mount.Known {
		return
	}
	if s.Target.Active != "active" || s.Target.Job != 0 || !s.Mount.Ours {
		return // the reactor, or an administrator, is starting or stopping the chain
	}
	d.supervise()
}

// supervise keeps the controller running and healthy on a host that owns and has mounted the database.
func (d *decider) supervise() {
	s, c := d.s, &d.s.Controller
	if n := len(d.m.Failures); n >= s.Policy.MaxFailures && c.Active != "active" {
		d.find("database-does-not-open", agents.Critical, fmt.Sprintf("the controller failed %d times and no other host does better", n),
			"journalctl -u "+s.Names.Controller+"; xostor controller backups; xostor controller restore --plan")
	}
	switch {
	case c.Active == "activating":
		if since := d.m.Asked["start"].Last; !since.IsZero() && d.now.Sub(since) > s.Policy.StartTime && c.Sub != "auto-restart" {
			d.add(VerbSignal, agents.RiskMove, map[string]string{"signal": "KILL"}, "the controller has been starting for too long")
		}
		d.RecheckIn(time.Second)
	case c.Active == "active":
		d.hung()
	case c.Down() && c.Load != "loaded":
		if f := d.cannotRun(); s.Mode != Owner { // an owner's is found already
			d.find(f.Code, agents.Critical, f.Text, f.Fix)
		}
	case c.Down():
		d.start()
	default: // deactivating, or a job is pending
		d.RecheckIn(pollRelease)
		d.killHung()
		// An agent that was restarted meanwhile does not know that it was hung; its unit alone would wait for 90 s.
		if age := d.now.Sub(d.m.Stopping); len(d.Actions) == 0 && !d.m.Stopping.IsZero() && age > s.Policy.StopTime {
			d.add(VerbSignal, agents.RiskAdd, map[string]string{"signal": "KILL"}, "the controller does not stop")
		}
	}
}

// start starts a controller that is down. The first restart is immediate.
func (d *decider) start() {
	if !d.oldGone() {
		return
	}
	n := len(d.m.Failures)
	if n > 0 {
		pause := time.Duration(0)
		if n > 1 {
			pause = min(d.s.Policy.RestartBackoff<<min(n-2, 20), d.s.Policy.PenaltyMax)
		}
		if left := pause - d.now.Sub(d.m.Failures[n-1]); left > 0 {
			d.RecheckIn(left)
			return
		}
	}
	if !d.due("start", d.s.Policy.RetryUnit, d.s.Policy.RetryUnit) && !d.fellSinceStart() {
		return
	}
	why := "this host owns the database"
	if n > 0 {
		why = "the controller went down: " + d.s.Controller.Result
	}
	d.add(VerbStart, agents.RiskAdd, nil, why)
	d.RecheckIn(pollRelease)
}

// fellSinceStart tells whether the controller ran and fell after the last start was asked for, so that there is no need to wait whether it has an effect.
func (d *decider) fellSinceStart() bool {
	n := len(d.m.Failures)
	return n > 0 && d.m.Failures[n-1].After(d.m.Asked["start"].Last)
}

// oldGone tells whether the former owner's controller is gone, as far as it can be known, or was waited for long enough. Two controllers on one
// cluster id throw each other out at the satellites (controller-failover.md 5.4).
func (d *decider) oldGone() bool {
	m, s := d.m, d.s
	if m.PrimaryWas == "" || m.PrimaryWas == s.Self || m.PrimaryEnd.IsZero() {
		return true
	}
	p := s.peer(m.PrimaryWas)
	if !s.answers(d.now, p) || s.alive(d.now, p) && p.Heard.After(m.PrimaryEnd) && p.Says.JVM == JVMDown {
		return true
	}
	if left := s.Policy.ConfirmOld - d.now.Sub(m.PrimaryEnd); left > 0 {
		d.find("waiting-for-former-owner", agents.Info, m.PrimaryWas+" is alive and has not said yet that its controller is gone", "")
		d.RecheckIn(min(left, 200*time.Millisecond))
		return false
	}
	return true
}

// sick says why the controller counts as hung, or "".
func (d *decider) sick() string {
	h, n := d.s.Health, d.s.Policy.HungFailures
	switch {
	case h.Internal.Fails >= n:
		return "its database has closed itself: " + h.Internal.Err
	case h.REST.Fails >= n && h.List.Fails >= 1:
		return "REST does not answer: " + h.REST.Err
	case h.Disk.Fails >= n && !h.DiskFull:
		return "the database's filesystem cannot be written: " + h.Disk.Err
	}
	return ""
}

func (d *decider) hung() {
	if d.s.Health.DiskFull {
		d.find("database-filesystem-full", agents.Critical, "hardly any space is left on the database's filesystem", "ls -lt "+d.s.Names.MountPoint+"; remove old backups there")
	}
	why := d.sick()
	if why == "" {
		if !d.m.Hung.IsZero() {
			d.killHung() // it was told to go; half-dead it must not stay
		}
		return
	}
	d.find("controller-hung", agents.Critical, "the controller hangs: "+why, "it is restarted; its thread dump is in journalctl -u "+d.s.Names.Controller)
	if d.m.Hung.IsZero() {
		d.add(VerbSignal, agents.RiskAdd, map[string]string{"signal": "QUIT"}, "the controller hangs: "+why)
		d.RecheckIn(d.s.Policy.QuitToTerm)
		return
	}
	d.killHung()
}

// killHung goes on with a controller that was taken for hung: SIGTERM, then SIGKILL.
func (d *decider) killHung() {
	if d.m.Hung.IsZero() {
		return
	}
	p := d.s.Policy
	age := d.now.Sub(d.m.Hung)
	switch {
	case age < p.QuitToTerm:
		d.RecheckIn(p.QuitToTerm - age)
	case d.m.Asked["TERM"].Last.Before(d.m.Hung):
		d.add(VerbSignal, agents.RiskAdd, map[string]string{"signal": "TERM"}, "the controller hangs")
		d.RecheckIn(p.TermToKill)
	case age < p.QuitToTerm+p.TermToKill:
		d.RecheckIn(p.QuitToTerm + p.TermToKill - age)
	default:
		d.add(VerbSignal, agents.RiskAdd, map[string]string{"signal": "KILL"}, "the controller hangs and ignores SIGTERM")
		d.RecheckIn(pollRelease)
	}
}

// checkPeers makes DRBD ask its peers when this owner seems to be cut off, or somebody else says to own: a busy owner notices a cut only after ten
// seconds by itself (drbd-lab.md 1.4).
func (d *decider) checkPeers() {
	s := d.s
	if s.Mode != Owner {
		return
	}
	why := ""
	if s.isolated(d.now) {
		why = "no host is heard on the storage network any more"
	}
	for i := range s.Peers {
		if p := &s.Peers[i]; s.alive(d.now, p) && p.Says.Owner {
			why = p.Name + " says that it owns the database"
		}
	}
	if why != "" && d.due("check", s.Policy.ProbeBackoff, s.Policy.ProbeMax) {
		d.add(VerbCheckPeers, agents.RiskMove, nil, why, agents.Need{Of: "resource/" + s.Names.Resource, Fact: "role", Is: string(drbd.Primary)})
		d.RecheckIn(pollRelease)
	}
}

// isolated tells whether every connected peer, of which one at least was heard before, is silent on the storage network.
func (s *Snapshot) isolated(now time.Time) bool {
	heardBefore := false
	for _, c := range s.Res.Connections {
		if c.State != drbd.Connected {
			continue
		}
		p := s.peer(c.Name)
		if p == nil || p.Storage.IsZero() || now.Sub(p.Storage) < s.Policy.SuspectAfter || !p.Kernel.IsZero() && now.Sub(p.Kernel) < s.Policy.SuspectAfter {
			return false
		}
		heardBefore = true
	}
	return heardBefore
}

// --- 4. promotion

func (d *decider) promote() {
	s, r := d.s, d.s.Res
	if r == nil || !s.Known || !s.Fresh || r.Role != drbd.Secondary || !s.quorumOn() {
		return
	}
	if !s.UnitsKnown || !s.Mount.Known {
		return // what is mounted and runs here must be known first
	}
	if why := d.unfit(); why != "" {
		return
	}
	need := agents.Need{Of: "resource/" + s.Names.Resource, Fact: "role", Is: string(drbd.Secondary)}
	if !d.m.MayPromote.IsZero() {
		if d.promoteDelayed(d.m.MayPromote) && d.due("promote", 200*time.Millisecond, 2*time.Second) {
			d.add(VerbPromote, agents.RiskMove, nil, "nobody owns the database and this host may", need)
			d.RecheckIn(pollRelease)
		}
		return
	}
	if suspect, since := d.suspect(); suspect != "" && d.promoteDelayed(since) && d.due("probe", s.Policy.ProbeBackoff, s.Policy.ProbeMax) {
		d.add(VerbPromote, agents.RiskMove, map[string]string{"probe": suspect},
			fmt.Sprintf("%s is silent for %s and every host that is heard agrees", suspect, s.Policy.SuspectAfter), need)
		d.RecheckIn(pollRelease)
	}
}

// unfit says why this host cannot take the database, or "".
func (d *decider) unfit() string {
	s := d.s
	switch f := d.cannotRun(); {
	case f.Code != "":
		return f.Text
	case s.Move != nil && s.Move.To != s.Self && s.Move.Age < s.Policy.MoveHold:
		d.RecheckIn(s.Policy.MoveHold - s.Move.Age)
		return "held for " + s.Move.To
	}
	return ""
}

// promoteDelayed tells whether this host's turn has come, counted from since.
func (d *decider) promoteDelayed(since time.Time) bool {
	s := d.s
	wait := time.Duration(d.rank()) * s.Policy.RankStep
	if s.Res.LocalUpToDate() != drbd.Yes {
		wait += s.Policy.DisklessDelay
	}
	if s.Move != nil && s.Move.To == s.Self && s.Move.Age < s.Policy.MoveHold {
		wait = 0
	}
	if s.Move != nil && s.Move.Age >= s.Policy.MoveHold {
		// A hold has just ended: everybody's turn is counted from there, so that the former owner is first.
		if ended := d.now.Add(s.Policy.MoveHold - s.Move.Age); ended.After(since) {
			since = ended
		}
	}
	left := wait - d.now.Sub(since)
	if n, last := d.m.failed(); n > 0 && d.rank() > 0 {
		penalty := min(time.Second<<min(n, 20), s.Policy.PenaltyMax)
		left = max(left, penalty-d.now.Sub(last))
	}
	if left > 0 {
		d.RecheckIn(left)
		return false
	}
	return true
}

// rank counts the living hosts that should try before this one: fewer failures first, then the target's former owner, then the lower node id.
func (d *decider) rank() (n int) {
	s := d.s
	key := func(name string, failures, id int) [3]int {
		former := 1
		if s.Move != nil && s.Move.From == name {
			former = 0
		}
		return [3]int{failures, former, id}
	}
	failures, _ := d.m.failed()
	mine := key(s.Self, failures, s.NodeID)
	for i := range s.Peers {
		p := &s.Peers[i]
		c := s.Res.Connection(p.Name)
		if !s.alive(d.now, p) || p.Says.Mode != Owner || !p.Says.Usable || c == nil || c.State != drbd.Connected {
			continue // one that DRBD does not reach is cut off, and will not be first
		}
		theirs := key(p.Name, p.Says.Failures, p.Says.NodeID)
		if slices.Compare(theirs[:], mine[:]) < 0 {
			n++
		}
	}
	return n
}

// suspect returns the Primary that is dead beyond reasonable doubt though DRBD still shows it connected, and since when. A probe takes the resource
// from an owner that is merely frozen (drbd-lab.md 1.3), so: silent on every path, its kernel too, somebody else is heard, and all who are heard agree.
func (d *decider) suspect() (string, time.Time) {
	s := d.s
	if !dataInReachWithout(s.Res, s.Res.PrimaryPeer()) {
		return "", time.Time{}
	}
	name := s.Res.PrimaryPeer()
	p := s.peer(name)
	if name == "" || p == nil || p.Heard.IsZero() {
		return "", time.Time{} // its agent never spoke: silence means nothing
	}
	last := p.Heard
	if p.Kernel.After(last) {
		last = p.Kernel
	}
	if left := s.Policy.SuspectAfter - d.now.Sub(last); left > 0 {
		d.RecheckIn(left)
		return "", time.Time{}
	}
	witnesses := 0
	for i := range s.Peers {
		w := &s.Peers[i]
		if w.Name == name || !s.alive(d.now, w) {
			continue
		}
		if !slices.Contains(w.Says.Silent, name) {
			d.RecheckIn(pollRelease)
			return "", time.Time{}
		}
		witnesses++
	}
	if witnesses == 0 {
		d.RecheckIn(pollRelease)
		return "", time.Time{}
	}
	return name, last.Add(s.Policy.SuspectAfter)
}

// dataInReachWithout tells whether there is good data when one peer is gone.
func dataInReachWithout(r *drbd.Resource, gone string) bool {
	if gone == "" {
		return false
	}
	c := r.Clone()
	c.Connections = slices.DeleteFunc(c.Connections, func(c drbd.Connection) bool { return c.Name == gone })
	return dataInReach(c)
}

// --- 5. repair

const repairTries = 6 // after that many the cause is not a late demotion

func (d *decider) repair() {
	s := d.s
	if s.Res == nil || !s.Fresh {
		return
	}
	released := s.Res.Role == drbd.Secondary && s.Res.ForceIOFailure != drbd.Yes && s.Mount.Clear()
	for _, c := range s.Res.Connections {
		key := "connect/" + c.Name
		if c.State != drbd.StandAlone {
			continue
		}
		if slices.Contains(d.m.Held, c.Name) {
			d.find("held-by-hand", agents.Warning, "the connection to "+c.Name+" was taken down by hand and is left alone", "when the work is done, on both hosts: drbdadm connect "+s.Names.Resource)
			continue
		}
		if !released && !s.owns() {
			continue
		}
		if p := s.peer(c.Name); s.alive(d.now, p) && p.Says.Role == string(drbd.Primary) && (s.owns() || !p.Says.Owner) {
			d.RecheckIn(s.Policy.RepairBackoff)
			continue // the other end still clings to it: the reconnect would be refused, and refused ones disturb the healthy side
		}
		if a := d.m.Asked[key]; a.N >= repairTries {
			d.find("stand-alone", agents.Critical, "the connection to "+c.Name+" stays StandAlone: DRBD refuses it, perhaps a split brain",
				"compare both sides with `drbdadm status` and `dmesg`; only a person may discard one side's data")
		}
		if d.due(key, s.Policy.RepairBackoff, time.Minute) {
			d.add(VerbConnect, agents.RiskAdd, map[string]string{"peer": c.Name, "node-id": strconv.Itoa(c.PeerNodeID)}, "the connection to "+c.Name+" is StandAlone and this side is clean")
			d.RecheckIn(s.Policy.RepairBackoff)
		}
	}
}

// --- 6. boot and the .res file

// boot brings the resource up when it is not, and tells whether there is nothing else to do.
func (d *decider) boot() bool {
	s := d.s
	if !s.Known || !s.Fresh {
		return false
	}
	absent := s.Res == nil
	detached := !absent && !d.m.Attached && slices.ContainsFunc(s.Res.Devices, func(v drbd.Device) bool {
		return v.Disk == drbd.Diskless && v.Client == drbd.No && v.Backing == "none"
	})
	if !absent && !detached {
		return false
	}
	if a := d.m.Asked["bring-up"]; a.N >= 2 && a.Err != "" {
		d.find("resource-not-up", agents.Critical, "the resource does not come up: "+strings.ReplaceAll(a.Err, "\n", "; "), "lvs; lvchange -ay the volume that "+s.Names.Resource+".res names; drbdadm adjust "+s.Names.Resource)
	}
	switch {
	case s.File.Known && !s.File.Valid && s.File.Copy:
		if d.due("restore", s.Policy.BootBackoff, time.Minute) {
			d.add(VerbRestoreRes, agents.RiskAdd, nil, "the .res file is not valid: "+s.File.Why)
			d.RecheckIn(pollRelease)
		}
	case s.File.Known && !s.File.Valid:
		if s.Reactor == drbd.Yes || s.File.Why != ResMissing {
			d.find("res-file-invalid", agents.Critical, "the resource's .res file is not usable and no copy is kept: "+s.File.Why, "copy it from another host of the pool: /var/lib/linstor.d/"+s.Names.Resource+".res")
		}
	case s.File.Known && d.due("bring-up", s.Policy.BootBackoff, time.Minute):
		d.add(VerbBringUp, agents.RiskAdd, nil, "the resource is not up on this host")
		d.RecheckIn(time.Second)
	}
	return absent
}

func (d *decider) keepFacts() {
	if d.m.HeldRead && !slices.Equal(d.m.Held, d.s.Kept) && d.due("held", time.Second, time.Minute) {
		d.add(VerbKeepHeld, agents.RiskObserve, nil, "an agent that starts later cannot see who took a connection down")
	}
	if f := d.s.File; f.Known && f.Valid && !f.Saved && d.due("save", time.Second, time.Minute) {
		d.add(VerbSaveRes, agents.RiskObserve, nil, "the .res file changed: its last good copy is kept for boots after a power loss")
	}
}

// --- findings that need no action

func (d *decider) findFacts() {
	s := d.s
	if !s.Known {
		d.find("drbd-unknown", agents.Critical, "DRBD cannot be read: "+s.DRBDErr, "modprobe drbd; drbdsetup status "+s.Names.Resource)
		d.RecheckIn(time.Second)
		return
	}
	if !s.Fresh {
		d.findSettled("drbd-events-lost", agents.Warning, "the events stream is down: "+s.DRBDErr, "drbdsetup events2 --now "+s.Names.Resource)
		d.RecheckIn(200 * time.Millisecond)
	}
	if s.BackupTrouble != "" {
		d.find("backup-failed", agents.Warning, "the last backup of the database failed: "+s.BackupTrouble, "xostor controller backups; df "+s.Names.MountPoint)
	}
	if s.Res == nil {
		return
	}
	if f := d.cannotRun(); f.Code != "" && s.Mode == Owner && s.UnitsKnown && s.Mount.Known {
		sev := agents.Warning
		if s.owns() {
			sev = agents.Critical
		}
		d.find(f.Code, sev, f.Text, f.Fix)
	}
	if s.Mode == Owner && s.owns() && s.Mount.Ours && s.Mount.ReadOnly {
		d.find("database-read-only", agents.Critical, "the database's filesystem has turned read-only after errors", "dmesg | grep EXT4; it is released and mounted again here or elsewhere")
	}
	if s.Mode == Observe {
		d.findSettled("mode-unknown", agents.Warning, "nobody is promoted by this agent: "+s.ModeWhy, "start xostor-failover on every host of the pool, or set agents.failover.mode")
	}
	if s.Options.Quorum == "off" {
		d.find("quorum-off", agents.Critical, "the database is not protected by quorum", "linstor resource-definition set-property "+s.Names.Resource+" DrbdOptions/Resource/quorum majority")
	}
	if s.Mode == Guard && s.Options.OnNoQuorum == "suspend-io" {
		// A suspended write is completed with success on forced demotion, and lost (drbd-lab.md 3.2).
		d.find("suspend-io", agents.Info, "writes frozen by a loss of quorum are acknowledged and then lost when this host is demoted", "linstor resource-definition set-property "+s.Names.Resource+" DrbdOptions/Resource/on-no-quorum io-error")
	}
	if s.Mode == Owner && s.Options.OnNoQuorum == "suspend-io" {
		d.find("suspend-io", agents.Warning, "owner mode wants on-no-quorum io-error: frozen writes are acknowledged and then lost when this host is demoted", "linstor resource-definition set-property "+s.Names.Resource+" DrbdOptions/Resource/on-no-quorum io-error")
	}
	if s.Options.RRConflict == "disconnect" {
		d.find("rr-conflict", agents.Info, "a healed partition leaves connections StandAlone until an agent reconnects them", "linstor resource-definition set-property "+s.Names.Resource+" DrbdOptions/Net/rr-conflict retry-connect")
	}
	if missing := waitingFor(s); missing != "" {
		d.find("no-quorum", agents.Critical, missing, "start these hosts, or repair their storage network")
	}
}

// waitingFor says which voters are missing when there is no quorum, or "".
func waitingFor(s *Snapshot) string {
	if s.Res == nil || s.Res.Quorum() != drbd.No {
		return ""
	}
	voters, here := 0, 0
	if !diskless(s.Res) {
		voters, here = 1, 1
	}
	var missing []string
	for _, c := range s.Res.Connections {
		if slices.ContainsFunc(c.PeerDevices, func(p drbd.PeerDevice) bool { return p.Client == drbd.Yes }) {
			continue
		}
		voters++
		if c.State == drbd.Connected {
			here++
		} else {
			missing = append(missing, c.Name)
		}
	}
	if len(missing) == 0 {
		return fmt.Sprintf("no quorum, though %d of %d voters are connected", here, voters)
	}
	return fmt.Sprintf("%d of %d voters, waiting for host %s", here, voters, strings.Join(missing, ", "))
}
