package main

import (
	"encoding/json"
	"errors"
	"io"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
)

// dump explains the statefile: of this host's daemon, or in a file or on a device.
func dump(args []string, out io.Writer) error {
	s := settings{}
	f := s.flags("dump")
	asJSON := f.Bool("json", false, "print JSON")
	if err := parse(f, args); err != nil {
		return err
	}
	image, err := heartbeat.Image(s.runDir, f.Arg(0))
	if err != nil {
		return err
	}
	if *asJSON {
		return heartbeat.ExplainJSON(out, image)
	}
	return heartbeat.Explain(out, image)
}

var errUnwell = errors.New("somebody has to act; see above")

func status(args []string, out io.Writer) error {
	s := settings{}
	f := s.flags("status")
	asJSON := f.Bool("json", false, "print JSON, one object per daemon")
	if err := parse(f, args); err != nil {
		return err
	}
	reports, err := heartbeat.Ask(s.runDir, "status")
	unwell := false
	for _, r := range reports {
		unwell = unwell || r.Unwell()
		if !*asJSON {
			r.Print(out, time.Now())
		} else if err := json.NewEncoder(out).Encode(r); err != nil {
			return err
		}
	}
	if err == nil && unwell {
		err = errUnwell
	}
	return err
}

func handover(args []string) error {
	s := settings{}
	f := s.flags("handover")
	if err := parse(f, args); err != nil {
		return err
	}
	_, err := heartbeat.Ask(s.runDir, "handover "+f.Arg(0))
	return err
}
