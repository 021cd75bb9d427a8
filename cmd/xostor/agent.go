package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/agents/srsize"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// restAfterPass leaves half of the time to others when wakes come without end.
const restAfterPass = 1

// openSRSize opens what sr-size stands on, and its configuration with direct reads.
func openSRSize(c *call, name string) (*dom0.Dom0, srsize.Config, error) {
	if c.args[0] != srsize.Name {
		return nil, srsize.Config{}, &usageError{fmt.Sprintf("there is no agent %q; there are %s and %s", c.args[0], srsize.Name, failover.Name)}
	}
	d, err := dom0.Open(c.config, name, c.log)
	if err != nil {
		return nil, srsize.Config{}, err
	}
	return d, srsize.Config{
		HostUUID: d.Facts.HostUUID, Coordinator: d.Coordinator, Storage: d.LINSTOR, Log: c.log,
		Records: srsize.XAPIRecords{Client: d.XAPI}, Writer: srsize.XAPIWriter{Client: d.XAPI},
		Grace: time.Duration(c.config.Agents.SRSize.Grace),
	}, nil
}

func runAgent(ctx context.Context, c *call) error {
	if c.args[0] == failover.Name {
		return runFailover(ctx, c)
	}
	d, cfg, err := openSRSize(c, c.args[0])
	if err != nil {
		return err
	}
	defer d.Close()
	mirrors, err := srsize.NewMirrors(d.Bus)
	if err != nil {
		return err
	}
	defer mirrors.Close()
	cfg.Records, cfg.Storage, cfg.Direct, cfg.StateFile = mirrors.Records(cfg.Records), mirrors.Storage(cfg.Storage), cfg.Storage, d.StateFile(srsize.Name)
	a := srsize.New(cfg)
	conf := c.config.Agents.SRSize
	o := d.Options(a.Name(), conf.Mode, time.Duration(conf.Resync))
	o.Rest = restAfterPass
	stop, err := d.Serve(a.Name(), semver(version), o.Board)
	if err != nil {
		return err
	}
	defer stop()
	c.log.Info("agent started", agents.KeyAgent, a.Name(), agents.KeyHost, d.Facts.HostUUID, "mode", conf.Mode)
	if err := systemd.Ready("mode " + conf.Mode); err != nil {
		c.log.Warn("tell systemd", agents.KeyErr, err)
	}
	go stayLean(ctx, c.log.Debug)
	err = agents.Run(ctx, a, o)
	_ = systemd.Stopping() // systemd sees the exit anyway
	c.log.Info("agent stopped", agents.KeyAgent, a.Name())
	return err
}

func runPlan(ctx context.Context, c *call) error {
	if c.args[0] == failover.Name {
		return planFailover(ctx, c)
	}
	d, cfg, err := openSRSize(c, "plan")
	if err != nil {
		return err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(ctx, agents.DefaultOptions().PassTimeout)
	defer cancel()
	ok, why, err := d.Coordinator(ctx)
	if err != nil {
		return err
	}
	if !ok && !c.json {
		fmt.Fprintln(c.out, "This host would do nothing: "+why+". Run it on the coordinator.")
		return nil
	}
	plan, err := agents.Look(ctx, srsize.New(cfg))
	if err != nil {
		return err
	}
	return showPlan(c, plan, "", "Nothing to do: XAPI shows what LINSTOR has, or it is not known well enough to write.")
}

// showPlan prints a plan. intro comes first, none instead of actions when there are none; programs get neither.
func showPlan(c *call, plan agents.Plan, intro, none string) error {
	if c.json {
		return json.NewEncoder(c.out).Encode(plan)
	}
	if intro != "" {
		fmt.Fprintln(c.out, intro)
	}
	printPlan(c, plan, none)
	return nil
}

func printPlan(c *call, p agents.Plan, none string) {
	if len(p.Actions) == 0 {
		fmt.Fprintln(c.out, none)
	}
	for _, act := range p.Actions {
		fmt.Fprintf(c.out, "would %s %s (risk %s)\n  why   %s\n", act.Verb, act.Target, act.Risk, act.Why)
		for _, n := range act.Needs {
			fmt.Fprintf(c.out, "  needs %s: %s is %s\n", n.Of, n.Fact, n.Is)
		}
		for _, k := range sortedKeys(act.Args) {
			fmt.Fprintf(c.out, "  set   %s = %s\n", k, act.Args[k])
		}
	}
	printFindings(c, p.Findings)
}

// semver makes a version acceptable to NATS micro services, which want three numbers.
func semver(v string) string {
	v = strings.TrimPrefix(v, "v")
	if strings.Count(strings.SplitN(v, "-", 2)[0], ".") != 2 {
		return "0.0.0"
	}
	return v
}
