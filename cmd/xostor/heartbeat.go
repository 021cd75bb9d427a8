package main

import (
	"context"
	"encoding/json"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
)

// heartbeatRunDir is where this host's heartbeat daemons are; tests have their own.
var heartbeatRunDir = heartbeat.RunDir

// runHeartbeat asks this host's heartbeat daemons over their own sockets: it works without the bus, as they do.
func runHeartbeat(_ context.Context, c *call) error {
	switch c.args[0] {
	case "status":
		return heartbeatStatus(c)
	case "dump":
		image, err := heartbeat.Image(heartbeatRunDir, "")
		if err != nil {
			return err
		}
		if c.json {
			return heartbeat.ExplainJSON(c.out, image)
		}
		return heartbeat.Explain(c.out, image)
	default:
		return &usageError{`heartbeat knows status and dump, not "` + c.args[0] + `"; ` + "`xostor help heartbeat` shows how it is called"}
	}
}

func heartbeatStatus(c *call) error {
	reports, err := heartbeat.Ask(heartbeatRunDir, "status")
	if c.json && len(reports) > 0 {
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		if err := enc.Encode(reports); err != nil {
			return err
		}
	}
	unwell := false
	for _, r := range reports {
		unwell = unwell || r.Unwell()
		if !c.json {
			r.Print(c.out, time.Now())
		}
	}
	if err == nil && unwell {
		return errQuiet // The report says all.
	}
	return err
}
