package lab

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

// HostDown cuts a host's power. Its VMs stay "Running" in XAPI, as without HA; host_metrics.live turns false after Options.DeadAfter.
func (p *Pool) HostDown(name string) {
	h := p.Host(name)
	p.mu.Lock()
	if p.down[name] {
		p.mu.Unlock()
		return
	}
	p.satellites() // what its replicas hold now is what they hold until it is back
	p.down[name] = true
	p.linstor.SetHost(name, false)
	if p.controller == name {
		p.linstor.SetController(linstorsim.Controller{Phase: linstorsim.Down})
	}
	p.dying[name] = p.clock.AfterFunc(p.o.DeadAfter, func() { p.setLive(h, false) })
	p.mu.Unlock()
	p.xapi.SetFault(h.Ref, xapiface.Fault{Kind: xapiface.Refuse})
	_ = p.syncPorts() // Only opening a port can fail, and this closes one.
}

// setLive is what the coordinator notes about a host; without a coordinator nobody notes anything.
func (p *Pool) setLive(h Host, live bool) {
	if !live && (!p.isDown(h.Name) || p.isDown(p.Coordinator().Name)) {
		return
	}
	_ = p.db.Set("host_metrics", xapidb.Value[string](p.db, "host", h.Ref, "metrics"), "live", live) // The row exists as long as the host.
}

func (p *Pool) isDown(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.down[name]
}

// HostUp boots a host that was down: its VMs are found halted and its marks on disks are removed, as by resetvdis at the attach of the SR.
func (p *Pool) HostUp(name string) error {
	h := p.Host(name)
	p.mu.Lock()
	if !p.down[name] {
		p.mu.Unlock()
		return nil
	}
	delete(p.down, name)
	p.dying[name]()
	delete(p.dying, name)
	p.linstor.SetHost(name, true)
	if p.controller == name {
		p.linstor.SetController(linstorsim.Controller{Phase: linstorsim.Up})
	}
	err := p.forgetGuests(h)
	p.mu.Unlock()
	p.setLive(h, true)
	return errors.Join(err, p.xapi.ClearFaults(h.Ref), p.syncPorts())
}

func (p *Pool) forgetGuests(h Host) error {
	for _, uuid := range p.VMs() {
		g, err := p.guest(uuid)
		if err != nil {
			return err
		}
		if g.host == h.Name {
			if err := p.halt(g); err != nil {
				return err
			}
		}
	}
	for _, d := range p.disks {
		if d.holders[h.Name] > 0 {
			delete(d.holders, h.Name)
			if err := p.db.RemoveFromMap("VDI", d.ref, "sm_config", "host_"+h.Ref); err != nil {
				return err
			}
		}
	}
	return nil
}

// MoveCoordinator makes another host XAPI's coordinator, as pool-emergency-transition-to-master and recovery do: every host's pool.conf first, then pool.master; all sessions are lost.
func (p *Pool) MoveCoordinator(name string) error {
	h := p.Host(name)
	if err := p.writeRoles(h); err != nil {
		return err
	}
	return p.xapi.SetCoordinator(h.Ref)
}

// RestartXAPI restarts the toolstack on all hosts: sessions, tasks and memory of deletions are lost, connections cut.
func (p *Pool) RestartXAPI() { p.xapi.Restart() }

// XAPIDown stops the toolstack of all hosts that run, XAPIUp starts it again.
func (p *Pool) XAPIDown() { p.faultXAPI(xapiface.Fault{Kind: xapiface.Refuse}) }

// XAPIUp ends XAPIDown, XAPIHTML and every other fault of XAPI on hosts that run.
func (p *Pool) XAPIUp() error {
	var errs []error
	for _, h := range p.hosts {
		if !p.isDown(h.Name) {
			errs = append(errs, p.xapi.ClearFaults(h.Ref))
		}
	}
	return errors.Join(errs...)
}

// XAPIHTML makes XAPI answer 502 with a page, as a proxy before a dead daemon does, until XAPIUp.
func (p *Pool) XAPIHTML() { p.faultXAPI(xapiface.Fault{Kind: xapiface.HTML}) }

// XAPITruncated makes every answer of XAPI end in its middle, until XAPIUp.
func (p *Pool) XAPITruncated() { p.faultXAPI(xapiface.Fault{Kind: xapiface.Truncate}) }

func (p *Pool) faultXAPI(x xapiface.Fault) {
	for _, h := range p.hosts {
		p.xapi.SetFault(h.Ref, x)
	}
}

// Controller is the host that runs LINSTOR's controller.
func (p *Pool) Controller() Host {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.Host(p.controller)
}

// ControllerDown stops the controller: nothing listens. ControllerUp starts it where it was.
func (p *Pool) ControllerDown() {
	p.setPhase(linstorsim.Down)
	_ = p.syncPorts() // Closing ports does not fail.
}

// ControllerUp starts the controller.
func (p *Pool) ControllerUp() error {
	p.setPhase(linstorsim.Up)
	return p.syncPorts()
}

func (p *Pool) setPhase(phase linstorsim.Phase) {
	c := p.linstor.Controller()
	c.Phase = phase
	p.linstor.SetController(c)
}

// ControllerSlow makes the controller take d longer for each answer; 0 ends it.
func (p *Pool) ControllerSlow(d time.Duration) {
	c := p.linstor.Controller()
	c.Delay = d
	p.linstor.SetController(c)
}

// MoveController stops the controller and starts it on another host, which must run.
func (p *Pool) MoveController(name string) error {
	h := p.Host(name)
	if p.isDown(name) {
		return fmt.Errorf("move controller: host %s is down", name)
	}
	p.ControllerDown()
	p.mu.Lock()
	p.setInUse(databaseVolume, p.controller, false)
	p.controller = h.Name
	p.setInUse(databaseVolume, p.controller, true)
	p.mu.Unlock()
	return p.ControllerUp()
}

// ControllerAnswer is a way in which the controller misbehaves.
type ControllerAnswer string

// The misbehaviours of a controller that listens.
const (
	Good      ControllerAnswer = ""          // as it should
	Hung      ControllerAnswer = "hung"      // takes requests and never answers
	HTMLError ControllerAnswer = "html"      // 500 with a page
	Truncated ControllerAnswer = "truncated" // answers end in their middle
	Garbage   ControllerAnswer = "garbage"   // JSON strings with bytes that are no UTF-8
)

// SetControllerAnswer makes the controller misbehave towards its clients on the wire, until it is set back to Good.
func (p *Pool) SetControllerAnswer(a ControllerAnswer) {
	p.mu.Lock()
	s := p.serving
	p.mu.Unlock()
	if s != nil {
		s.answer(a)
	}
}

// SatelliteOffline cuts the controller's connection to a host's satellite; the host lives. SatelliteOnline mends it.
func (p *Pool) SatelliteOffline(host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.satellites()
	p.linstor.SetNode(p.Host(host).Name, linstorsim.StatusOffline)
}

// SatelliteOnline mends SatelliteOffline.
func (p *Pool) SatelliteOnline(host string) {
	p.linstor.SetNode(p.Host(host).Name, linstorsim.StatusOnline)
}

// SatelliteHung makes a satellite take requests and never answer; calls of clients that ask it block.
func (p *Pool) SatelliteHung(host string, hung bool) { p.linstor.SetHung(p.Host(host).Name, hung) }

// NegativeSize makes the replica of a VDI on its first host tell -1 KiB as its allocated size; RightSize ends it.
func (p *Pool) NegativeSize(vdi string) error { return p.lie(vdi, true) }

// RightSize ends NegativeSize.
func (p *Pool) RightSize(vdi string) error { return p.lie(vdi, false) }

func (p *Pool) lie(vdi string, on bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, err := p.disk(vdi)
	if err != nil {
		return err
	}
	p.satellites()
	for _, r := range p.view(d.resource) {
		if slices.Contains(r.Flags, "DRBD_DISKLESS") {
			continue
		}
		k := replica{r.Name, r.NodeName}
		if on {
			p.lying[k] = true
			wrong := int64(-1)
			p.linstor.SetReported(r.Name, r.NodeName, &wrong)
		} else {
			delete(p.lying, k)
			p.linstor.SetReported(r.Name, r.NodeName, nil)
		}
		return nil
	}
	return fmt.Errorf("find a replica of %s: none", vdi)
}

// SetRedundancy changes the place count of the SR's resource group; 0 is what makes SM divide by zero.
func (p *Pool) SetRedundancy(n int) error {
	return p.linstor.ModifyGroup(p.group, nil, &linstorsim.SelectFilter{PlaceCount: &n}, nil, linstorsim.PropsChange{}).Err()
}

// SetGroupName writes device_config:group-name of a host's PBD; "" removes the key.
func (p *Pool) SetGroupName(host, groupName string) error {
	pbd := p.Host(host).PBD
	if groupName == "" {
		return p.db.RemoveFromMap("PBD", pbd, "device_config", "group-name")
	}
	return p.db.PutInMap("PBD", pbd, "device_config", "group-name", groupName)
}

// fault is one named fault.
type fault struct {
	args string // for people
	run  func(p *Pool, args []string) error
}

func plain(f func(*Pool)) fault {
	return fault{run: func(p *Pool, _ []string) error { f(p); return nil }}
}

func plainErr(f func(*Pool) error) fault {
	return fault{run: func(p *Pool, _ []string) error { return f(p) }}
}

func onHost(f func(*Pool, string) error) fault {
	return fault{args: "HOST", run: func(p *Pool, a []string) error { return f(p, a[0]) }}
}

func onVDI(f func(*Pool, string) error) fault {
	return fault{args: "VDI", run: func(p *Pool, a []string) error { return f(p, a[0]) }}
}

// faults by name.
var faults = map[string]fault{
	"host-down":        onHost(func(p *Pool, h string) error { p.HostDown(h); return nil }),
	"host-up":          onHost((*Pool).HostUp),
	"coordinator-move": onHost((*Pool).MoveCoordinator),
	"xapi-restart":     plain((*Pool).RestartXAPI),
	"xapi-down":        plain((*Pool).XAPIDown),
	"xapi-html":        plain((*Pool).XAPIHTML),
	"xapi-truncated":   plain((*Pool).XAPITruncated),
	"xapi-up":          plainErr((*Pool).XAPIUp),
	"controller-down":  plain((*Pool).ControllerDown),
	"controller-up":    plainErr((*Pool).ControllerUp),
	"controller-move":  onHost((*Pool).MoveController),
	"controller-slow": {args: "DURATION", run: func(p *Pool, a []string) error {
		d, err := time.ParseDuration(a[0])
		if err != nil {
			return fmt.Errorf("read duration: %w", err)
		}
		p.ControllerSlow(d)
		return nil
	}},
	"controller-answer": {args: "hung|html|truncated|garbage|good", run: func(p *Pool, a []string) error {
		p.SetControllerAnswer(ControllerAnswer(strings.TrimSuffix(a[0], "good")))
		return nil
	}},
	"satellite-offline": onHost(func(p *Pool, h string) error { p.SatelliteOffline(h); return nil }),
	"satellite-online":  onHost(func(p *Pool, h string) error { p.SatelliteOnline(h); return nil }),
	"satellite-hung":    onHost(func(p *Pool, h string) error { p.SatelliteHung(h, true); return nil }),
	"satellite-answers": onHost(func(p *Pool, h string) error { p.SatelliteHung(h, false); return nil }),
	"negative-size":     onVDI((*Pool).NegativeSize),
	"right-size":        onVDI((*Pool).RightSize),
	"redundancy": {args: "N", run: func(p *Pool, a []string) error {
		n, err := strconv.Atoi(a[0])
		if err != nil {
			return fmt.Errorf("read redundancy: %w", err)
		}
		return p.SetRedundancy(n)
	}},
	"group-missing": plainErr(func(p *Pool) error {
		var errs []error
		for _, h := range p.hosts {
			errs = append(errs, p.SetGroupName(h.Name, "missing/group"))
		}
		return errors.Join(errs...)
	}),
	"two-groups": plainErr(func(p *Pool) error { return p.SetGroupName(p.hosts[len(p.hosts)-1].Name, "another/group") }),
	"no-group": plainErr(func(p *Pool) error {
		var errs []error
		for _, h := range p.hosts {
			errs = append(errs, p.SetGroupName(h.Name, ""))
		}
		return errors.Join(errs...)
	}),
	"groups-right": plainErr(func(p *Pool) error {
		var errs []error
		for _, h := range p.hosts {
			errs = append(errs, p.SetGroupName(h.Name, p.o.GroupName))
		}
		return errors.Join(errs...)
	}),
}

// Faults lists the names of all faults, each with its argument, sorted.
func Faults() []string {
	var names []string
	for _, n := range slices.Sorted(maps.Keys(faults)) {
		names = append(names, strings.TrimSpace(n+" "+faults[n].args))
	}
	return names
}

// Fault brings a fault about, or ends one, by its name in Faults.
func (p *Pool) Fault(name string, args ...string) error {
	f, ok := faults[name]
	if !ok {
		return fmt.Errorf("find fault %q: there are %s", name, strings.Join(Faults(), ", "))
	}
	if want := len(strings.Fields(f.args)); len(args) != want {
		return fmt.Errorf("fault %s takes %d arguments (%s), got %d", name, want, f.args, len(args))
	}
	if f.args == "HOST" && !slices.ContainsFunc(p.hosts, func(h Host) bool { return h.Name == args[0] }) {
		return fmt.Errorf("fault %s: no host %q", name, args[0])
	}
	return f.run(p, args)
}
