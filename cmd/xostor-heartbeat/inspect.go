package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// dump explains a statefile in a file or on a device, an attached /dev/nbdN for example.
func dump(args []string, out io.Writer) error {
	if len(args) != 1 || args[0] == "--help" || args[0] == "-h" {
		return fmt.Errorf("%w: dump FILE|DEVICE", errUsage)
	}
	f, err := os.Open(args[0])
	if errors.Is(err, syscall.EMEDIUMTYPE) {
		return fmt.Errorf("open statefile: %w: this host's DRBD is Secondary; dump the /dev/nbdN of the front instead", err)
	}
	if err != nil {
		return fmt.Errorf("open statefile: %w", err)
	}
	defer f.Close()
	image := make([]byte, statefile.Size+512)
	n, err := io.ReadFull(f, image)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read statefile: %w", err)
	}
	if err := statefile.Explain(out, image[:n]); err != nil {
		return err
	}
	if r, ok := heartbeat.ParseRecord(image[statefile.Size:]); ok && n == len(image) {
		state := "in use"
		if r.Clean {
			state = "closed in order"
		}
		fmt.Fprintf(out, "owner's record: host %s, epoch %d, %d probes, %s\n", r.Owner, r.Epoch, r.Counter, state)
	}
	return nil
}

// ask sends a line to each daemon of this host, or to one export's.
func ask(runDir, line string, each func(heartbeat.Report) error) error {
	paths, _ := filepath.Glob(filepath.Join(runDir, "*.sock"))
	if len(paths) == 0 {
		return fmt.Errorf("no daemon runs on this host (no socket in %s)", runDir)
	}
	for _, path := range paths {
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			return fmt.Errorf("ask daemon: %w", err)
		}
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		var r heartbeat.Report
		_, err = fmt.Fprintln(conn, line)
		if err == nil {
			err = json.NewDecoder(conn).Decode(&r)
		}
		conn.Close()
		if err != nil {
			return fmt.Errorf("ask daemon: %w", err)
		}
		if err := each(r); err != nil {
			return err
		}
	}
	return nil
}

func status(args []string, out io.Writer) error {
	s := settings{}
	f := s.flags("status")
	asJSON := f.Bool("json", false, "print JSON, one object per daemon")
	if err := parse(f, args); err != nil {
		return err
	}
	return ask(s.runDir, "status", func(r heartbeat.Report) error {
		if *asJSON {
			return json.NewEncoder(out).Encode(r)
		}
		r.Print(out, time.Now())
		return nil
	})
}

func handover(args []string) error {
	s := settings{}
	f := s.flags("handover")
	if err := parse(f, args); err != nil {
		return err
	}
	return ask(s.runDir, "handover "+f.Arg(0), func(heartbeat.Report) error { return nil })
}
