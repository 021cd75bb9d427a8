package failover

import (
	"archive/zip"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
)

const (
	backupEvery  = time.Hour
	keeperEvery  = time.Minute
	copyTimeout  = 30 * time.Second
	backupCopies = 2 // hosts besides the active one that keep each backup
)

// keeper takes backups on the active host and fetches them on two others.
type keeper struct {
	store    *Store
	prober   *prober
	names    Names
	state    string // directory of the agent's state
	jars     string // glob of the controller's installed files, to notice another version
	last     func() Snapshot
	say      func([]Backup)
	address  func(host string) string // where a host serves backups
	keys     *keyring
	children *child.Runner
	every    time.Duration // between two looks
	log      *slog.Logger

	changed func() // makes the agent look

	mu      sync.Mutex
	err     string
	ctx     context.Context // of Run; nil: not running, nothing is begun
	copying bool            // the database is being copied before another version opens it
	tried   string          // the version that this was last done for, well or not
	verErr  string          // what went wrong with it
	work    sync.WaitGroup
}

// Trouble says what went wrong with the last backup, "" when nothing did.
func (k *keeper) Trouble() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return cmp.Or(k.err, k.verErr)
}

// run looks now and then until ctx ends.
func (k *keeper) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := k.look(ctx)
		k.mu.Lock()
		k.err = ""
		if err != nil {
			k.err = err.Error()
		}
		k.mu.Unlock()
		if err != nil {
			k.log.Warn("backup failed", agents.KeyErr, err)
		}
		pauseFor(ctx, k.every)
	}
}

func (k *keeper) look(ctx context.Context) error {
	s := k.last()
	have, err := k.store.List()
	if err != nil {
		return err
	}
	if s.owns() && s.Mount.Ours && s.Controller.Active == "active" && s.Health.REST.Fails == 0 && !s.Health.GoodAt.IsZero() {
		if due(time.Now(), have) {
			err = k.take(ctx)
		}
	} else if !s.owns() {
		err = k.fetch(ctx, &s, have)
	}
	err = errors.Join(err, k.store.Prune(time.Now()))
	if have, lerr := k.store.List(); lerr == nil {
		k.say(have[:min(len(have), 1)])
	}
	return err
}

// due tells whether it is time for a backup. Those from the future were taken while the clock was wrong, and count for nothing.
func due(now time.Time, have []Backup) bool {
	for _, b := range have { // newest first
		if !b.Taken.After(now) {
			return now.Sub(b.Taken) >= backupEvery
		}
	}
	return true
}

// take makes one backup through the controller's API and moves it off the database's filesystem, or takes one that the storage driver made lately.
func (k *keeper) take(ctx context.Context) (err error) {
	now := time.Now()
	path, ours, err := k.find(ctx)
	// The filesystem has one GiB: what we asked for does not stay, whatever becomes of the copy, and nothing of an agent that was killed meanwhile.
	defer func() {
		if len(ours) > 0 {
			err = errors.Join(err, k.child(ctx, append([]string{"rm", "-f", "--"}, ours...)...))
		}
	}()
	if err != nil {
		return err
	}
	if path == "" {
		name := "xostor-" + now.UTC().Format("20060102T150405Z")
		ours = append(ours, filepath.Join(k.names.MountPoint, name+".zip"))
		if err := k.prober.call(ctx, copyTimeout, http.MethodPost, "/v1/controller/backup/db", map[string]string{"backup_name": name}, nil); err != nil {
			return fmt.Errorf("ask controller for a backup: %w", err)
		}
		var found []string
		path, found, err = k.find(ctx)
		ours = append(ours, found...)
		if err != nil {
			return err
		}
		if path == "" {
			return fmt.Errorf("ask controller for a backup: it answered, but no file appeared below %s", k.names.MountPoint)
		}
	}
	local := filepath.Join(k.state, "incoming.zip")
	defer func() { _ = os.Remove(local) }() // it may not have come to that
	if err := k.copyOff(ctx, path, local); err != nil {
		return err
	}
	b, err := k.store.Take(local, now, whyHourly)
	if err != nil {
		return err
	}
	k.log.Info("backup taken", "name", b.Name, "bytes", b.Size)
	return nil
}

// find looks for zips on the database's filesystem: the newest of the last hour, and all that this agent asked for.
func (k *keeper) find(ctx context.Context) (newest string, ours []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	res, err := k.children.Run(ctx, purposeBackup, "find", k.names.MountPoint, "-xdev", "-maxdepth", "2", "-type", "f", "-name", "*.zip", "-printf", `%T@ %p\n`)
	if err != nil {
		return "", nil, fmt.Errorf("look for backups: %w", err)
	}
	now, best := float64(time.Now().UnixNano())/1e9, 0.0
	for line := range strings.Lines(string(res.Stdout)) {
		at, path, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		t, perr := strconv.ParseFloat(at, 64)
		if !ok || perr != nil {
			continue
		}
		if strings.HasPrefix(filepath.Base(path), "xostor-") {
			ours = append(ours, path)
		}
		if t > best && t <= now+clockSlack.Seconds() && now-t < backupEvery.Seconds() {
			best, newest = t, path
		}
	}
	return newest, ours, nil
}

// clockSlack is how far in the future the time of a file may be without the clock being wrong.
const clockSlack = time.Minute

// copyOff copies from the database's filesystem in a child, which may hang there.
func (k *keeper) copyOff(ctx context.Context, from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return fmt.Errorf("copy backup: %w", err)
	}
	return k.child(ctx, "cp", "--", from, to)
}

func (k *keeper) child(ctx context.Context, argv ...string) error {
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	res, err := k.children.Run(ctx, purposeBackup, argv...)
	if err != nil {
		return fmt.Errorf("%s: %w", argv[0], err)
	}
	if res.Exit != 0 {
		return fmt.Errorf("%s: %s", argv[0], bytes.TrimSpace(res.Stderr))
	}
	return nil
}

// fetch gets the newest backup of each host that this one is to keep copies for.
func (k *keeper) fetch(ctx context.Context, s *Snapshot, have []Backup) (err error) {
	if !k.keepsCopies(s) {
		return nil
	}
	for _, p := range s.Peers {
		for _, b := range p.Says.Backups {
			if !p.Says.Owner || slices.ContainsFunc(have, func(h Backup) bool { return h.Name == b.Name }) {
				continue
			}
			to := k.address(p.Name)
			if to == "" {
				continue
			}
			err = errors.Join(err, k.store.Fetch(ctx, to, k.keys.all(time.Now())[0], b))
		}
	}
	return err
}

// keepsCopies tells whether this host is one of the first two, by name, of those alive that do not own.
func (k *keeper) keepsCopies(s *Snapshot) bool {
	before := 0
	for i := range s.Peers {
		p := &s.Peers[i]
		if s.alive(time.Now(), p) && !p.Says.Owner && p.Name < s.Self {
			before++
		}
	}
	return before < backupCopies
}

// prepared tells whether the database is saved from a controller of another version, and begins to save it if not. The controller is down meanwhile, so the
// files are at rest. It must not block: whoever asks must see a loss of quorum within milliseconds.
func (k *keeper) prepared() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ctx == nil {
		return true
	}
	if k.copying {
		return false
	}
	version := k.installed()
	if version == "" || version == k.tried {
		return true
	}
	old, err := os.ReadFile(k.record())
	switch {
	case err == nil && string(old) == version:
		return true
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		k.verErr, k.tried = fmt.Sprintf("read last version: %v", err), version
		return true
	}
	k.copying, k.tried = len(old) > 0, version
	ctx, first := k.ctx, len(old) == 0
	k.work.Go(func() {
		var err error
		if !first {
			err = k.takeOffline(ctx)
		}
		if err == nil {
			err = writeFile(k.record(), []byte(version))
		}
		k.copied(err)
		if err != nil {
			k.log.Warn("database not saved before another version opens it", agents.KeyErr, err)
		}
	})
	return !k.copying
}

// copied notes that the database is not read any more.
func (k *keeper) copied(err error) {
	k.mu.Lock()
	was := k.copying
	k.copying, k.verErr = false, ""
	if err != nil {
		k.verErr = err.Error()
	}
	if errors.Is(err, child.ErrInterrupted) {
		k.tried = "" // the filesystem was needed; the next start tries again
	}
	k.mu.Unlock()
	if was {
		k.changed()
	}
}

func (k *keeper) record() string { return filepath.Join(k.state, "version") }

// installed identifies the installed controller by its files' names and sizes.
func (k *keeper) installed() string {
	files, err := filepath.Glob(k.jars)
	if err != nil || len(files) == 0 {
		return ""
	}
	sum := sha256.New()
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			_, _ = fmt.Fprintf(sum, "%s %d\n", filepath.Base(f), info.Size()) // a hash takes everything
		}
	}
	return hex.EncodeToString(sum.Sum(nil))
}

func (k *keeper) takeOffline(ctx context.Context) error {
	const db = "linstordb.mv.db"
	local := filepath.Join(k.state, db)
	defer func() { _ = os.Remove(local) }()
	if err := k.copyOff(ctx, filepath.Join(k.names.MountPoint, db), local); err != nil {
		return err
	}
	k.copied(nil) // the rest needs only the copy
	packed := local + ".zip"
	defer func() { _ = os.Remove(packed) }()
	if err := zipFile(packed, local, db); err != nil {
		return err
	}
	_, err := k.store.Take(packed, time.Now(), whyVersion)
	return err
}

func zipFile(to, from, name string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("pack backup: %w", err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return fmt.Errorf("pack backup: %w", err)
	}
	z := zip.NewWriter(out)
	w, err := z.Create(name)
	if err == nil {
		_, err = io.Copy(w, in)
	}
	if err = errors.Join(err, z.Close(), out.Close()); err != nil {
		return fmt.Errorf("pack backup: %w", err)
	}
	return nil
}

// begin lets prepared do its work until ctx ends; wait for k.work then.
func (k *keeper) begin(ctx context.Context) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ctx = ctx
}

// serve answers the other hosts until ctx ends.
func (k *keeper) serve(ctx context.Context, l net.Listener) {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	k.store.Serve(l, func() [][]byte { return k.keys.all(time.Now()) })
}
