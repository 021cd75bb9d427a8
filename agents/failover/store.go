package failover

import (
	"archive/zip"
	"bufio"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// Store keeps backups of the controller's database in a folder on this host's own disk: each a zip with a JSON file beside it. Safe for concurrent use.
type Store struct {
	Dir string
	mu  sync.Mutex
}

var backupName = regexp.MustCompile(`^linstor-[0-9]{8}T[0-9]{6}Z(-version)?\.zip$`)

// List returns what is kept, newest first. Files that do not belong are not listed.
func (s *Store) List() ([]Backup, error) {
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list backups: %w", err)
	}
	var out []Backup
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !backupName.MatchString(name) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(s.Dir, e.Name()))
		var b Backup
		if err != nil || json.Unmarshal(text, &b) != nil || b.Name != name {
			continue
		}
		if info, err := os.Stat(filepath.Join(s.Dir, name)); err != nil || info.Size() != b.Size {
			continue
		}
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b Backup) int { return cmp.Or(b.Taken.Compare(a.Taken), cmp.Compare(b.Name, a.Name)) })
	return out, nil
}

// ErrBackupBad says that a file is no usable backup.
var ErrBackupBad = errors.New("not a usable backup")

// VerifyZip reads a zip through: every entry's checksum is compared, and the database must be in it.
func VerifyZip(path string) error {
	z, err := zip.OpenReader(path)
	if err != nil {
		return fmt.Errorf("open backup: %w: %w", ErrBackupBad, err)
	}
	defer z.Close()
	found := false
	for _, f := range z.File {
		found = found || strings.HasSuffix(f.Name, ".mv.db") && f.UncompressedSize64 > 0
		r, err := f.Open()
		if err == nil {
			_, err = io.Copy(io.Discard, r)
			err = errors.Join(err, r.Close())
		}
		if err != nil {
			return fmt.Errorf("read %s in backup: %w: %w", f.Name, ErrBackupBad, err)
		}
	}
	if !found {
		return fmt.Errorf("read backup: no database in it: %w", ErrBackupBad)
	}
	return nil
}

// Take copies a zip into the store and verifies it there. A backup under half the size of the last one is refused: a database does not shrink like that
// by itself. The source is left in place.
func (s *Store) Take(source string, taken time.Time, why string) (Backup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in, err := os.Open(source)
	if err != nil {
		return Backup{}, fmt.Errorf("take backup: %w", err)
	}
	defer in.Close()
	b := Backup{Name: "linstor-" + taken.UTC().Format("20060102T150405Z") + ".zip", Taken: taken.UTC().Truncate(time.Second), Why: why}
	if why == whyVersion {
		b.Name = strings.TrimSuffix(b.Name, ".zip") + "-version.zip"
	}
	have, err := s.List()
	if err != nil {
		return Backup{}, err
	}
	return s.receive(b, in, func(got Backup) error {
		if len(have) > 0 && got.Size < have[0].Size/2 {
			return fmt.Errorf("%d bytes, the last one had %d: %w", got.Size, have[0].Size, ErrBackupBad)
		}
		return nil
	})
}

// receive writes a backup from a stream, verifies it, and only then makes it visible.
func (s *Store) receive(b Backup, in io.Reader, accept func(Backup) error) (Backup, error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return Backup{}, fmt.Errorf("keep backup: %w", err)
	}
	tmp, err := os.CreateTemp(s.Dir, ".incoming-*")
	if err != nil {
		return Backup{}, fmt.Errorf("keep backup: %w", err)
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // renamed already when all went well
	sum := sha256.New()
	b.Size, err = io.Copy(io.MultiWriter(tmp, sum), in)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return Backup{}, fmt.Errorf("keep backup: %w", err)
	}
	b.SHA256 = hex.EncodeToString(sum.Sum(nil))
	if err := errors.Join(VerifyZip(tmp.Name()), accept(b)); err != nil {
		return Backup{}, fmt.Errorf("keep backup %s: %w", b.Name, err)
	}
	if err := os.Rename(tmp.Name(), filepath.Join(s.Dir, b.Name)); err != nil {
		return Backup{}, fmt.Errorf("keep backup: %w", err)
	}
	text, err := json.Marshal(b)
	if err == nil {
		err = writeFile(filepath.Join(s.Dir, b.Name+".json"), text)
	}
	if err != nil {
		return Backup{}, fmt.Errorf("keep backup: %w", err)
	}
	return b, nil
}

// Check reads a kept backup again and compares it with its checksum.
func (s *Store) Check(b Backup) error {
	f, err := os.Open(filepath.Join(s.Dir, b.Name))
	if err != nil {
		return fmt.Errorf("check backup: %w", err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return fmt.Errorf("check backup: %w", err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != b.SHA256 {
		return fmt.Errorf("check backup %s: sha256 is %s, was %s: %w", b.Name, got, b.SHA256, ErrBackupBad)
	}
	return VerifyZip(f.Name())
}

// Prune removes what need not be kept.
func (s *Store) Prune(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	have, err := s.List()
	if err != nil {
		return err
	}
	for _, b := range Prune(now, have) {
		// The description goes first: a zip alone is not listed, a description alone neither.
		err = errors.Join(err, os.Remove(filepath.Join(s.Dir, b.Name+".json")), os.Remove(filepath.Join(s.Dir, b.Name)))
	}
	parts, _ := filepath.Glob(filepath.Join(s.Dir, ".incoming-*")) // the pattern is well formed
	for _, path := range parts {
		// Of an agent that was killed; what is being written now is younger.
		if info, serr := os.Stat(path); serr == nil && now.Sub(info.ModTime()).Abs() > time.Hour {
			err = errors.Join(err, os.Remove(path))
		}
	}
	if err != nil {
		return fmt.Errorf("prune backups: %w", err)
	}
	return nil
}

// --- fetching from another host

const (
	fetchTimeout = time.Minute
	requestLimit = 256 // bytes
)

func requestMAC(key []byte, name string) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("get " + name))
	return hex.EncodeToString(m.Sum(nil))
}

// Serve gives backups to the other hosts of the pool until the listener is closed. A request is one line: the name and its HMAC under one of the keys, which are
// those of the beats.
func (s *Store) Serve(l net.Listener, keys func() [][]byte) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, 4)
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close() // too many at once: the next look of the other side tries again
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(fetchTimeout))
			s.serveOne(c, keys())
		})
	}
}

func (s *Store) serveOne(c net.Conn, keys [][]byte) {
	line, err := bufio.NewReader(io.LimitReader(c, requestLimit)).ReadString('\n')
	name, mac, ok := strings.Cut(strings.TrimSpace(line), " ")
	asked := func(key []byte) bool { return hmac.Equal([]byte(mac), []byte(requestMAC(key, name))) }
	if err != nil || !ok || !backupName.MatchString(name) || !slices.ContainsFunc(keys, asked) {
		return
	}
	f, err := os.Open(filepath.Join(s.Dir, name))
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = io.Copy(c, f) // the other side compares the checksum
}

// Fetch gets a backup from another host, and keeps it when it is what the other host's beat promised.
func (s *Store) Fetch(ctx context.Context, address string, key []byte, want Backup) error {
	if !backupName.MatchString(want.Name) {
		return fmt.Errorf("fetch backup %q: %w", want.Name, ErrBackupBad)
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("fetch backup: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	if _, err := fmt.Fprintf(c, "%s %s\n", want.Name, requestMAC(key, want.Name)); err != nil {
		return fmt.Errorf("fetch backup: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err = s.receive(Backup{Name: want.Name, Taken: want.Taken, Why: want.Why}, io.LimitReader(c, want.Size+1), func(got Backup) error {
		if got.Size != want.Size || got.SHA256 != want.SHA256 {
			return fmt.Errorf("size or checksum differ: %w", ErrBackupBad)
		}
		return nil
	})
	return err
}
