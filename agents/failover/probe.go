package failover

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
)

// Timings of the probes (controller-failover.md 5.7).
const (
	probeEvery    = 10 * time.Second
	probeDeadline = 5 * time.Second
	listEvery     = 30 * time.Second
	listDeadline  = 10 * time.Second
)

// prober probes the controller of this host over REST, and the database's filesystem by a child that writes to it.
type prober struct {
	base     string // of the controller, such as http://127.0.0.1:3370
	http     *http.Client
	file     string // written and synced on the database's filesystem
	children *child.Runner
	every    time.Duration
	changed  func()

	mu     sync.Mutex
	pid    int
	health Health
	wake   chan struct{} // another process runs now

	listing bool           // a list call is in flight
	calls   sync.WaitGroup // list calls
}

func newProber(base, mountPoint string, children *child.Runner, every time.Duration, changed func()) *prober {
	return &prober{base: strings.TrimRight(base, "/"), file: mountPoint + "/.xostor-probe", children: children, every: every, changed: changed, wake: make(chan struct{}, 1),
		http: &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext, DisableKeepAlives: true}}}
}

// Health implements Prober.
func (p *prober) Health(pid int) Health {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid != pid {
		p.pid, p.health = pid, Health{}
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
	return p.health
}

func (p *prober) current() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid
}

// run probes while a controller runs, until ctx ends.
func (p *prober) run(ctx context.Context) {
	defer p.calls.Wait()
	var listed time.Time
	for ctx.Err() == nil {
		if pid := p.current(); pid != 0 {
			if p.probe(ctx, pid) || time.Since(listed) >= listEvery {
				listed = time.Now()
				p.list(ctx, pid)
			}
		}
		t := time.NewTimer(p.every)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-p.wake:
		}
		t.Stop()
	}
}

// list makes the list call beside the rounds: it has a longer deadline, and the others must not wait for it.
func (p *prober) list(ctx context.Context, pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listing {
		return
	}
	p.listing = true
	p.calls.Go(func() {
		err := p.get(ctx, listDeadline, "/v1/nodes", nil)
		p.mu.Lock()
		p.listing = false
		if p.pid == pid && ctx.Err() == nil {
			p.health.List.note(err)
		}
		p.mu.Unlock()
		p.changed()
	})
}

// probe makes one round, all kinds at once, and keeps the outcome if the same process still runs. It tells whether REST does not answer.
func (p *prober) probe(ctx context.Context, pid int) (silent bool) {
	var wg sync.WaitGroup
	var rest, internal, disk error
	wg.Go(func() { rest, internal = p.probeHealth(ctx) })
	wg.Go(func() { disk = p.probeDisk(ctx) })
	wg.Wait()
	p.mu.Lock()
	if p.pid != pid || ctx.Err() != nil {
		p.mu.Unlock()
		return false
	}
	old := p.health
	h := &p.health
	h.REST.note(rest)
	h.Internal.note(internal)
	h.DiskFull = errors.Is(disk, syscall.ENOSPC)
	if h.DiskFull {
		disk = nil
	}
	h.Disk.note(disk)
	if rest == nil && internal == nil {
		h.GoodAt = time.Now()
	}
	silent = h.REST.Fails > 0
	news := old.REST.Fails != h.REST.Fails || old.Internal.Fails != h.Internal.Fails || old.Disk.Fails != h.Disk.Fails || old.DiskFull != h.DiskFull
	p.mu.Unlock()
	if news {
		p.changed()
	}
	return silent
}

func (p *Probe) note(err error) {
	if err == nil {
		*p = Probe{}
		return
	}
	p.Fails++
	p.Err = err.Error()
}

// statusError is an answer that is not 200.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return fmt.Sprintf("HTTP %d: %s", e.code, e.text) }

// probeHealth tells no answer from an answer of 500, which needs a restart (linstor-server#419).
func (p *prober) probeHealth(ctx context.Context) (rest, internal error) {
	err := p.get(ctx, probeDeadline, "/health", nil)
	if s, ok := errors.AsType[*statusError](err); ok {
		if s.code >= 500 {
			return nil, s
		}
		return nil, nil // it answers; a 401 or 404 is no illness
	}
	return err, nil
}

func (p *prober) get(ctx context.Context, limit time.Duration, path string, into any) error {
	return p.call(ctx, limit, http.MethodGet, path, nil, into)
}

const maxAnswer = 8 << 20 // bytes

func (p *prober) call(ctx context.Context, limit time.Duration, method, path string, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		content = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, p.base+path, content)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("User-Agent", "xostor-failover")
	resp, err := p.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode >= 300 {
		return &statusError{resp.StatusCode, strings.TrimSpace(string(text[:min(len(text), 200)]))}
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// leastFree is the free space in bytes under which the filesystem counts as full. The database needs some to grow, and to be compacted.
const leastFree = 1 << 20

// probeDisk writes and syncs a small file in a child, and looks for room in another. One that hangs is left behind, and the next probe fails at once until it is
// gone. Error: matches ENOSPC when there is no room.
func (p *prober) probeDisk(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeDeadline)
	defer cancel()
	write := func(conv string) error {
		_, err := p.child(ctx, "dd", "if=/dev/zero", "of="+p.file, "bs=512", "count=1", "conv="+conv, "status=none")
		return err
	}
	err := write("fsync,nocreat")
	if errors.Is(err, syscall.ENOENT) { // The first time on this filesystem; or it has just been unmounted, and nothing must be left in the folder below.
		if _, err = p.child(ctx, "mountpoint", "-q", filepath.Dir(p.file)); err == nil {
			err = write("fsync")
		}
	}
	if err != nil {
		return err
	}
	// The file's own block is enough for the file, so its success says nothing of room.
	text, err := p.child(ctx, "stat", "--file-system", "--format=%f %S", p.file)
	if err != nil {
		return err
	}
	var blocks, size uint64
	if _, err := fmt.Sscan(text, &blocks, &size); err == nil && blocks*size < leastFree {
		return fmt.Errorf("%d bytes are free: %w", blocks*size, syscall.ENOSPC)
	}
	return nil
}

func (p *prober) child(ctx context.Context, argv ...string) (string, error) {
	res, err := p.children.Run(ctx, purposeProbe, argv...)
	if err != nil {
		return "", err
	}
	if res.Exit != 0 {
		text := string(bytes.TrimSpace(res.Stderr))
		for _, known := range []syscall.Errno{syscall.ENOSPC, syscall.ENOENT} {
			if strings.Contains(strings.ToLower(text), known.Error()) {
				return "", fmt.Errorf("write %s: %w", p.file, known)
			}
		}
		return "", fmt.Errorf("write %s: %s", p.file, cmp.Or(text, argv[0]+" failed"))
	}
	return string(res.Stdout), nil
}
