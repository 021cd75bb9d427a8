package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/dom0"
	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/bus/subject"
	"github.com/xostor-agents/xostor-agents/integration/lab"
)

const (
	gib = int64(1) << 30
	mib = int64(1) << 20
)

// site is a served pool with its processes.
type site struct {
	pool    *lab.Pool
	dir     string
	bin     string
	names   map[string]string // host uuid -> name
	daemons []*daemon
	conns   []*bus.Conn
	log     eventLog
}

// daemon is one process of one host.
type daemon struct {
	*lab.Daemon
	host, kind string // kind "bus" or "sr-size"
}

func (d *daemon) String() string { return d.kind + " on " + d.host }

// said is something that an agent told on the bus.
type said struct {
	host   string // name
	record agents.Record
	found  agents.Finding
	raised bool // the finding is new; false with a finding: it is gone
}

func (s said) action() bool { return s.record.Outcome != "" }

// eventLog keeps what agents said.
type eventLog struct {
	mu      sync.Mutex
	list    []said
	changed chan struct{}
	hear    func(said)
}

func (l *eventLog) add(s said) {
	l.mu.Lock()
	l.list = append(l.list, s)
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	hear := l.hear
	l.mu.Unlock()
	if hear != nil {
		hear(s)
	}
}

// since returns what was said after the first n, and a channel that is closed at the next word.
func (l *eventLog) since(n int) ([]said, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return append([]said(nil), l.list[n:]...), l.changed
}

func (l *eventLog) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.list)
}

// await waits until one of the things said after the first n matches.
func (l *eventLog) await(ctx context.Context, n int, match func(said) bool) error {
	for {
		list, changed := l.since(n)
		for _, s := range list {
			if match(s) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

// openSite makes a folder and serves the pool that make returns in it.
func openSite(bin string, make func(dir string) (*lab.Pool, error)) (*site, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "xostor-demo")
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir, bin: bin, names: map[string]string{}}
	if s.pool, err = make(dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	for _, h := range s.pool.Hosts() {
		s.names[h.UUID] = h.Name
	}
	if _, err := s.pool.Serve(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// startHost runs bus and agent of a host, and listens to what agents say there.
func (s *site) startHost(ctx context.Context, host string) error {
	config, err := s.pool.WriteConfig(host, "\n[agents.sr-size]\ngrace = \"1s\"\n")
	if err != nil {
		return err
	}
	if err := s.start(host, "bus", "bus", "--config", config); err != nil {
		return err
	}
	conn, err := bus.Dial(ctx, filepath.Join(filepath.Dir(config), "bus.sock"), "xostor-demo")
	if err != nil {
		return err
	}
	s.conns = append(s.conns, conn)
	if _, err := bus.SubscribeEvents(conn, subject.Agent("*", "*", "*"), s.hear, nil); err != nil {
		return err
	}
	return s.start(host, "sr-size", "agent", "sr-size", "--config", config)
}

func (s *site) start(host, kind string, args ...string) error {
	d, err := lab.StartDaemon(lab.DaemonOptions{Bin: s.bin, Args: args, Restart: 200 * time.Millisecond, Notify: filepath.Join(s.dir, host, kind+".notify")})
	if err != nil {
		return err
	}
	s.daemons = append(s.daemons, &daemon{d, host, kind})
	return nil
}

// hear decodes an agent's event.
func (s *site) hear(e bus.Event) {
	uuid, _, _ := strings.Cut(strings.TrimPrefix(e.Source, "/xostor/"), "/")
	w := said{host: s.names[uuid]}
	switch e.Type {
	case dom0.TypeAction:
		if json.Unmarshal(e.Data, &w.record) != nil {
			return
		}
	case dom0.TypeFinding:
		var f dom0.FindingEvent
		if json.Unmarshal(e.Data, &f) != nil {
			return
		}
		w.found, w.raised = f.Finding, f.Raised
	default:
		return
	}
	s.log.add(w)
}

// close ends every process by its id, the pool, and removes the folder.
func (s *site) close() error {
	var errs []error
	for _, c := range s.conns {
		c.Close()
	}
	var all sync.WaitGroup
	failed := make(chan error, len(s.daemons))
	for _, d := range s.daemons {
		all.Go(func() {
			if err := d.Stop(); err != nil {
				failed <- fmt.Errorf("end %s: %w", d, err)
			}
		})
	}
	all.Wait()
	close(failed)
	for err := range failed {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, s.pool.Close(), os.RemoveAll(s.dir))...)
}

// lastWords are the last lines of every agent's log, for a failure.
func (s *site) lastWords() string {
	var b strings.Builder
	for _, d := range s.daemons {
		lines := strings.Split(strings.TrimSpace(d.Output()), "\n")
		fmt.Fprintf(&b, "\n%s said last:\n  %s\n", d, strings.Join(lines[max(0, len(lines)-6):], "\n  "))
	}
	return b.String()
}

// trueWithin waits until XAPI shows the truth, and says how long that took.
func (s *site) trueWithin(ctx context.Context, limit time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	begin := time.Now()
	err := s.pool.AwaitShown(ctx)
	return time.Since(begin), err
}
