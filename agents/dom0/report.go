package dom0

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/gate"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// The kinds of event that agents publish; the third from last token of the subject is the agent's name.
const (
	TypeAction  = "io.xostor.agent.action"  // body: agents.Record
	TypeFinding = "io.xostor.agent.finding" // body: FindingEvent
	TypeStatus  = "io.xostor.agent.status"  // body: agents.Status
)

// FindingEvent says that a finding was raised or is gone.
type FindingEvent struct {
	Raised  bool           `json:"raised"`
	Finding agents.Finding `json:"finding"`
}

// reporter publishes what an agent did. A bus that is away loses it: the journal has it too.
type reporter struct {
	d     *Dom0
	agent string
	last  agents.Status // that was published
	at    time.Time
}

const statusEvery = 30 * time.Second // a status without news

func (r *reporter) publish(what, kind, about string, body any) {
	data, err := json.Marshal(body)
	if err == nil {
		err = bus.PublishEvent(r.d.Bus, bus.Event{
			Source: "/xostor/" + r.d.Facts.HostUUID + "/" + r.agent, Type: kind, Key: about,
			Subject: subject.Agent(r.agent, r.d.Facts.HostUUID, what), Data: data,
		})
	}
	if err != nil {
		r.d.Log.Debug("event not published", agents.KeyErr, err)
	}
}

// Action implements agents.Reporter.
func (r *reporter) Action(rec agents.Record) { r.publish("action", TypeAction, rec.Action.Target, rec) }

// Finding implements agents.Reporter.
func (r *reporter) Finding(f agents.Finding, raised bool) {
	r.publish("finding", TypeFinding, f.Subject, FindingEvent{Raised: raised, Finding: f})
}

// Status implements agents.Reporter. A status without news is published now and then only: most passes see nothing new, and events are kept.
func (r *reporter) Status(s agents.Status) {
	news := s.State != r.last.State || s.LastError != r.last.LastError || len(s.Records) > 0 || len(s.Findings) != len(r.last.Findings)
	if news || time.Since(r.at) >= statusEvery {
		r.last, r.at = s, time.Now()
		r.publish("status", TypeStatus, r.agent, s)
	}
}

// Options are the options of an agent's loop on this host: wakes and reports over the bus, the systemd watchdog, the coordinator gate, and a breaker. Mode "observe" refuses all actions.
func (d *Dom0) Options(agent, mode string, resync time.Duration) agents.Options {
	o := agents.Options{
		Host: d.Facts.HostUUID, Listen: d.listen, Report: &reporter{d: d, agent: agent}, Board: &agents.Board{}, Log: d.Log,
		Resync: resync, Splay: 200 * time.Millisecond,
		Gate: gate.Chain{&gate.Breaker{Failures: 5, Pause: 5 * time.Minute}, d.CoordinatorGate()},
		Alive: func() {
			if err := systemd.Alive(); err != nil {
				d.Log.Warn("feed the watchdog", agents.KeyErr, err)
			}
		},
	}
	if mode == "observe" {
		o.Gate = gate.ObserveOnly()
	}
	if w := systemd.WatchdogInterval(); w > 0 {
		o.MaxQuiet = w / 3
		o.PassTimeout = min(agents.DefaultOptions().PassTimeout, w/2)
	}
	return o
}

// Connected is the subject of the wake when the bus is there again. What happened meanwhile was not heard.
const Connected = subject.Subject(subject.Prefix + ".connected")

// listen subscribes to the wakes; the subscription survives the bus's absence, whose end is a wake.
func (d *Dom0) listen(ctx context.Context, subjects []subject.Subject, wake func(subject.Subject)) error {
	patterns := make([]string, len(subjects))
	for i, s := range subjects {
		patterns[i] = string(s)
	}
	defer d.Bus.OnConnect(func() { wake(Connected) })()
	stop, err := d.Bus.Subscribe(func(m *bus.Message) { wake(subject.Subject(m.Subject)) }, patterns...)
	if err != nil {
		return err
	}
	<-ctx.Done()
	stop()
	return nil
}

// Serve makes the agent answer for its status on the bus as soon as the bus is there, and returns the function that ends it.
func (d *Dom0) Serve(agent, version string, board *agents.Board) (stop func(), err error) {
	s, err := bus.Serve(d.Bus, bus.ServiceInfo{Agent: agent, Host: d.Facts.HostUUID, HostName: d.Name, Version: version, Description: "XOSTOR agent " + agent},
		func() any { return board.Status() })
	if err != nil {
		return nil, err
	}
	return func() {
		if err := s.Stop(); err != nil && !errors.Is(err, context.Canceled) {
			d.Log.Debug("stop answering on the bus", agents.KeyErr, err)
		}
	}, nil
}

// StateFile is where an agent keeps what survives a restart.
func (d *Dom0) StateFile(agent string) string {
	return filepath.Join(d.Config.Agents.StateDir, agent+".json")
}
