package failover

import (
	"archive/zip"
	"bytes"
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

	mu  sync.Mutex
	err string
}

// Trouble says what went wrong with the last backup, "" when nothing did.
func (k *keeper) Trouble() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
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
		if len(have) == 0 || time.Since(have[0].Taken) >= backupEvery {
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

// take makes one backup through the controller's API and moves it off the database's filesystem, or takes one that the storage driver made lately.
func (k *keeper) take(ctx context.Context) error {
	now := time.Now()
	path, ours, err := k.recent(ctx)
	if err != nil {
		return err
	}
	if path == "" {
		name := "xostor-" + now.UTC().Format("20060102T150405Z")
		if err := k.prober.call(ctx, copyTimeout, http.MethodPost, "/v1/controller/backup/db", map[string]string{"backup_name": name}, nil); err != nil {
			return fmt.Errorf("ask controller for a backup: %w", err)
		}
		if path, ours, err = k.recent(ctx); err != nil {
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
	if ours {
		// The filesystem has one GiB: what we asked for does not stay, whatever became of the copy.
		err = errors.Join(err, k.child(ctx, "rm", "-f", "--", path))
	}
	if err != nil {
		return err
	}
	k.log.Info("backup taken", "name", b.Name, "bytes", b.Size)
	return nil
}

// recent finds the newest zip of the last hour on the database's filesystem. ours: this agent asked for it.
func (k *keeper) recent(ctx context.Context) (path string, ours bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	res, err := k.children.Run(ctx, "backup", "find", k.names.MountPoint, "-xdev", "-maxdepth", "2", "-type", "f", "-name", "*.zip", "-mmin", "-60", "-printf", `%T@ %p\n`)
	if err != nil {
		return "", false, fmt.Errorf("look for backups: %w", err)
	}
	newest := 0.0
	for line := range strings.Lines(string(res.Stdout)) {
		at, p, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		t, perr := strconv.ParseFloat(at, 64)
		if ok && perr == nil && t > newest {
			newest, path = t, p
		}
	}
	return path, strings.HasPrefix(filepath.Base(path), "xostor-"), nil
}

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
	res, err := k.children.Run(ctx, "backup", argv...)
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

// beforeStart keeps a copy of the database before a controller of another version opens it. The controller is down, so the files are at rest.
func (k *keeper) beforeStart(ctx context.Context) error {
	version := k.installed()
	record := filepath.Join(k.state, "version")
	old, err := os.ReadFile(record)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read last version: %w", err)
	}
	if version == "" || string(old) == version {
		return nil
	}
	if len(old) > 0 {
		if err := k.takeOffline(ctx); err != nil {
			return err
		}
	}
	return writeFile(record, []byte(version))
}

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

// serve answers the other hosts until ctx ends.
func (k *keeper) serve(ctx context.Context, l net.Listener) {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	k.store.Serve(l, func() [][]byte { return k.keys.all(time.Now()) })
}
