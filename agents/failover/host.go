package failover

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd/child"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// hostDRBD is DRBD on this host: the watcher for what is, the tool for what to do.
type hostDRBD struct {
	*drbd.Watcher
	tool     *drbd.Tool
	resource string

	mu      sync.Mutex
	options drbd.Options
}

func (d *hostDRBD) Status(ctx context.Context) (*drbd.Resource, error) {
	return d.tool.Status(ctx, d.resource)
}
func (d *hostDRBD) Primary(ctx context.Context) error { return d.tool.Primary(ctx, d.resource) }
func (d *hostDRBD) Secondary(ctx context.Context, force bool) error {
	return d.tool.Secondary(ctx, d.resource, force)
}
func (d *hostDRBD) Connect(ctx context.Context, id int) error {
	return d.tool.Connect(ctx, d.resource, id)
}
func (d *hostDRBD) Adjust(ctx context.Context) error { return d.tool.Adjust(ctx, d.resource) }

// Options returns what the last reading brought: reading takes a process, which no pass has time for.
func (d *hostDRBD) Options() drbd.Options {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.options
}

const (
	optionsEvery = 30 * time.Second
	optionsRetry = time.Second
)

// readOptions keeps the options current until ctx ends.
func (d *hostDRBD) readOptions(ctx context.Context, changed func()) {
	for ctx.Err() == nil {
		o, err := d.tool.Options(ctx, d.resource)
		pause := optionsRetry // until the resource is up
		if err == nil {
			pause = optionsEvery
			d.mu.Lock()
			news := d.options != o
			d.options = o
			d.mu.Unlock()
			if news {
				changed()
			}
		}
		pauseFor(ctx, pause)
	}
}

func pauseFor(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// cachedUnits keeps the last state of each unit until systemd hints at a change: a pass must not spend milliseconds on what did not change.
type cachedUnits struct {
	*systemd.Units
	mu    sync.Mutex
	epoch int // a reading begun before the last hint is not kept
	known map[string]systemd.Unit
}

// dirty forgets all states.
func (c *cachedUnits) dirty() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	clear(c.known)
}

// State implements Units.
func (c *cachedUnits) State(ctx context.Context, name string) (systemd.Unit, error) {
	c.mu.Lock()
	u, ok := c.known[name]
	epoch := c.epoch
	c.mu.Unlock()
	if ok {
		return u, nil
	}
	u, err := c.Units.State(ctx, name)
	if err != nil {
		return u, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if epoch == c.epoch {
		if c.known == nil {
			c.known = map[string]systemd.Unit{}
		}
		c.known[name] = u
	}
	return u, nil
}

// Start implements Units.
func (c *cachedUnits) Start(ctx context.Context, unit string) error {
	defer c.dirty()
	return c.Units.Start(ctx, unit)
}

// Restart implements Units.
func (c *cachedUnits) Restart(ctx context.Context, unit string) error {
	defer c.dirty()
	return c.Units.Restart(ctx, unit)
}

// Stop implements Units.
func (c *cachedUnits) Stop(ctx context.Context, unit string, mode systemd.StopMode) error {
	defer c.dirty()
	return c.Units.Stop(ctx, unit, mode)
}

// hostMounts reads this mount namespace's table. It never touches a file below the mount point, which may hang.
type hostMounts struct {
	major    int // of DRBD devices
	children *child.Runner
}

// MajorDRBD is the block device major of DRBD (Linux devices.txt).
const MajorDRBD = 147

// Look implements Mounts.
func (m hostMounts) Look(mountPoint string, minor int) (Mount, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Mount{}, fmt.Errorf("read mount table: %w", err)
	}
	out := ParseMounts(text, mountPoint, fmt.Sprintf("%d:%d", m.major, minor))
	if !out.Ours && !out.Foreign { // a stat of a mounted directory may hang
		info, err := os.Lstat(mountPoint)
		out.NotDir = err != nil || !info.IsDir()
	}
	return out, nil
}

// ParseMounts reads a mountinfo table (proc(5)): what is on mountPoint, and where the device "major:minor" is.
func ParseMounts(text []byte, mountPoint, device string) Mount {
	out := Mount{Known: true}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 6 {
			continue
		}
		at := unescapeMount(f[4])
		dash := slices.Index(f, "-")
		readOnly := slices.Contains(strings.Split(f[5], ","), "ro")
		if dash > 0 && len(f) > dash+3 {
			// ext4 that fell back after errors says so in its own options: "ro", since Linux 6.14 "emergency_ro".
			own := strings.Split(f[dash+3], ",")
			readOnly = readOnly || slices.Contains(own, "ro") || slices.Contains(own, "emergency_ro")
		}
		switch {
		case at == mountPoint:
			// The last one is on top.
			out.Ours, out.Foreign, out.ReadOnly = f[2] == device, f[2] != device, readOnly && f[2] == device
		case f[2] == device:
			out.Elsewhere = append(out.Elsewhere, at)
		}
	}
	return out
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return regexp.MustCompile(`\\[0-7]{3}`).ReplaceAllStringFunc(s, func(o string) string {
		n, _ := strconv.ParseUint(o[1:], 8, 8) // three octal digits above 377 do not occur
		return string([]byte{byte(n)})
	})
}

const unmountTimeout = time.Second

// What children do on the database's filesystem, each the purpose of its calls.
const (
	purposeProbe  = "probe"
	purposeBackup = "backup"
)

// Unmount implements Mounts: umount runs in a child, because the call may never return. Our own children must not be what keeps the filesystem busy.
func (m hostMounts) Unmount(ctx context.Context, mountPoint string) error {
	m.children.Interrupt(purposeProbe, purposeBackup)
	ctx, cancel := context.WithTimeout(ctx, unmountTimeout)
	defer cancel()
	res, err := m.children.Run(ctx, "umount", "umount", mountPoint)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", mountPoint, err)
	}
	if res.Exit != 0 {
		return fmt.Errorf("unmount %s: exit code %d: %s", mountPoint, res.Exit, bytes.TrimSpace(res.Stderr))
	}
	return nil
}

const maxHolders = 8

// Holders implements Mounts: processes with the device or a file below the mount point open, or with the device in their own mount table.
func (m hostMounts) Holders(mountPoint string, minor int) (out []string) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	device := fmt.Sprintf("%d:%d", m.major, minor)
	self, _ := os.Readlink("/proc/self/ns/mnt")
	for _, dir := range dirs {
		why := ""
		if ns, err := os.Readlink(dir + "/ns/mnt"); err == nil && ns != self {
			if text, err := os.ReadFile(dir + "/mountinfo"); err == nil {
				if mt := ParseMounts(text, mountPoint, device); mt.Ours || len(mt.Elsewhere) > 0 {
					why = "in another mount namespace"
				}
			}
		}
		for _, link := range []string{"/cwd", "/root"} {
			if to, err := os.Readlink(dir + link); err == nil && below(to, mountPoint) {
				why = "works in " + to
			}
		}
		fds, _ := filepath.Glob(dir + "/fd/*")
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && (below(to, mountPoint) || to == fmt.Sprintf("/dev/drbd%d", minor)) {
				why = "has " + to + " open"
				break
			}
		}
		if why != "" {
			comm, _ := os.ReadFile(dir + "/comm")
			out = append(out, fmt.Sprintf("%s (pid %s, %s)", bytes.TrimSpace(comm), filepath.Base(dir), why))
			if len(out) == maxHolders {
				return out
			}
		}
	}
	return out
}

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// Paths are the files that the agent reads and writes on this host.
type Paths struct {
	ResDir     string // LINSTOR's .res files
	StateDir   string // this agent's own
	BackupDir  string // "": below StateDir
	ReactorCfg string // drbd-reactor's main configuration
	ReactorDir string // its snippets
}

// DefaultPaths returns XCP-ng's.
func DefaultPaths() Paths {
	return Paths{ResDir: "/var/lib/linstor.d", StateDir: "/var/lib/xostor/failover", ReactorCfg: "/etc/drbd-reactor.toml", ReactorDir: "/etc/drbd-reactor.d"}
}

func (p Paths) backups() string { return cmp.Or(p.BackupDir, filepath.Join(p.StateDir, "backups")) }

// hostFiles keeps what is on this host's disk. Files are read again when they changed.
type hostFiles struct {
	paths    Paths
	resource string
	children *child.Runner

	mu      sync.Mutex
	resKey  string // modification time and size of what res was made of
	res     ResFile
	reactAt time.Time
	reactor drbd.Tri
	held    []string
	heldOK  bool // held has been read
}

func (f *hostFiles) resPath() string  { return filepath.Join(f.paths.ResDir, f.resource+".res") }
func (f *hostFiles) copyPath() string { return filepath.Join(f.paths.StateDir, f.resource+".res") }

// ResFile implements Files.
func (f *hostFiles) ResFile() ResFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := fileKey(f.resPath()) + fileKey(f.copyPath())
	if key == f.resKey {
		return f.res
	}
	out := ResFile{Known: true}
	text, err := os.ReadFile(f.resPath())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		out.Why = ResMissing
	case err != nil:
		return ResFile{Why: err.Error()}
	default:
		out.Why = CheckRes(text, f.resource)
		out.Valid = out.Why == ""
	}
	if kept, err := os.ReadFile(f.copyPath()); err == nil {
		out.Copy = CheckRes(kept, f.resource) == ""
		out.Saved = out.Copy && bytes.Equal(kept, text)
	}
	f.resKey, f.res = key, out
	return out
}

func fileKey(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return "-|"
	}
	return info.ModTime().Format(time.RFC3339Nano) + "/" + strconv.FormatInt(info.Size(), 10) + "|"
}

var resName = regexp.MustCompile(`(?m)^\s*resource\s+"?([^"\s{]+)"?\s*\{`)

// CheckRes says what is wrong with a .res file, "" when nothing is. It looks for what a power loss does: an empty, zeroed or cut file.
func CheckRes(text []byte, resource string) string {
	if len(bytes.TrimSpace(text)) == 0 {
		return "empty"
	}
	if bytes.IndexByte(text, 0) >= 0 {
		return "zero bytes in it"
	}
	depth := 0
	inString := false
scan:
	for line := range strings.Lines(string(text)) {
		for _, r := range line {
			switch {
			case r == '"':
				inString = !inString
			case inString:
			case r == '#':
				continue scan // a comment
			case r == '{':
				depth++
			case r == '}':
				depth--
			}
		}
	}
	if depth != 0 || inString {
		return "cut off: braces or quotes do not match"
	}
	m := resName.FindSubmatch(text)
	if m == nil || string(m[1]) != resource {
		return "does not describe " + resource
	}
	if !strings.Contains(string(text), "disk") || !strings.Contains(string(text), "connection") && !strings.Contains(string(text), "on ") {
		return "has no disk or no hosts"
	}
	return ""
}

// SaveRes implements Files.
func (f *hostFiles) SaveRes() error {
	text, err := os.ReadFile(f.resPath())
	if err != nil {
		return fmt.Errorf("save .res file: %w", err)
	}
	if why := CheckRes(text, f.resource); why != "" {
		return fmt.Errorf("save .res file: it is not valid: %s", why)
	}
	if err := writeFile(f.copyPath(), text); err != nil {
		return fmt.Errorf("save .res file: %w", err)
	}
	return nil
}

// RestoreRes implements Files.
func (f *hostFiles) RestoreRes() error {
	text, err := os.ReadFile(f.copyPath())
	if err != nil {
		return fmt.Errorf("restore .res file: %w", err)
	}
	if err := writeFile(f.resPath(), text); err != nil {
		return fmt.Errorf("restore .res file: %w", err)
	}
	return nil
}

// writeFile replaces a file so that a power loss leaves the old or the new one, whole.
func writeFile(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone already when all went well
	_, err = tmp.Write(text)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

var resDisk = regexp.MustCompile(`(?m)^\s*disk\s+"?(/dev/[^";\s]+)"?\s*;`)

const activateTimeout = 15 * time.Second

// ActivateVolume implements Files: the storage driver does it at PBD plug, which needs XAPI, and we are earlier.
func (f *hostFiles) ActivateVolume(ctx context.Context) error {
	text, err := os.ReadFile(f.resPath())
	if err != nil {
		return fmt.Errorf("activate volume: %w", err)
	}
	// The .res file names every host's disk; only the one of this host exists in its volume group.
	m := resDisk.FindSubmatch(text)
	if m == nil {
		return nil // a diskless host
	}
	if _, err := os.Stat(string(m[1])); err == nil {
		return nil // active already, or no logical volume
	}
	ctx, cancel := context.WithTimeout(ctx, activateTimeout)
	defer cancel()
	res, err := f.children.Run(ctx, "lvchange", "lvchange", "-ay", string(m[1]))
	if err != nil {
		return fmt.Errorf("activate %s: %w", m[1], err)
	}
	if res.Exit != 0 {
		return fmt.Errorf("activate %s: exit code %d: %s", m[1], res.Exit, bytes.TrimSpace(res.Stderr))
	}
	return nil
}

const reactorEvery = 5 * time.Second

// Reactor implements Files.
func (f *hostFiles) Reactor() drbd.Tri {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.reactAt) < reactorEvery {
		return f.reactor
	}
	f.reactAt = time.Now()
	files, err := filepath.Glob(filepath.Join(f.paths.ReactorDir, "*.toml"))
	if err != nil {
		f.reactor = drbd.Unknown
		return f.reactor
	}
	f.reactor = drbd.No
	for _, file := range append(files, f.paths.ReactorCfg) {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		has, perr := hasPromoter(text, f.resource)
		switch {
		case err != nil || perr != nil:
			if f.reactor == drbd.No {
				f.reactor = drbd.Unknown // it might be in there
			}
		case has:
			f.reactor = drbd.Yes
			return f.reactor
		}
	}
	return f.reactor
}

// hasPromoter tells whether a configuration of drbd-reactor promotes the resource.
func hasPromoter(text []byte, resource string) (bool, error) {
	var cfg struct {
		Promoter []struct {
			Resources map[string]any `toml:"resources"`
		} `toml:"promoter"`
	}
	if _, err := toml.Decode(string(text), &cfg); err != nil {
		return false, fmt.Errorf("read drbd-reactor configuration: %w", err)
	}
	for _, p := range cfg.Promoter {
		if _, ok := p.Resources[resource]; ok {
			return true, nil
		}
	}
	return false, nil
}

// nextEpoch returns a number for this life of the agent that is higher than those of earlier ones, even when the clock was set back: peers refuse beats of
// an older life.
func (f *hostFiles) nextEpoch(now time.Time) (int64, error) {
	path := filepath.Join(f.paths.StateDir, "epoch")
	epoch := now.UnixNano()
	text, err := os.ReadFile(path)
	if err == nil {
		if old, perr := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64); perr == nil && old < math.MaxInt64 {
			epoch = max(epoch, old+1)
		}
	}
	if err := writeFile(path, strconv.AppendInt(nil, epoch, 10)); err != nil {
		return epoch, fmt.Errorf("keep epoch: %w", err)
	}
	return epoch, nil
}

func (f *hostFiles) heldPath() string { return filepath.Join(f.paths.StateDir, "held.json") }

// Held implements Files.
func (f *hostFiles) Held() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.heldOK {
		text, err := os.ReadFile(f.heldPath())
		if err == nil && json.Unmarshal(text, &f.held) != nil {
			f.held = nil // unreadable is as good as none: a connection too many is mended is better than none ever
		}
		f.heldOK = true
	}
	return slices.Clone(f.held)
}

// KeepHeld implements Files.
func (f *hostFiles) KeepHeld(peers []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	text, err := json.Marshal(peers)
	if err != nil {
		return fmt.Errorf("keep held connections: %w", err)
	}
	if err := writeFile(f.heldPath(), text); err != nil {
		return fmt.Errorf("keep held connections: %w", err)
	}
	f.held, f.heldOK = slices.Clone(peers), true
	return nil
}

// loadKnown and saveKnown keep the peers' last words on drbd-reactor.
func (f *hostFiles) loadKnown() map[string]string {
	var known map[string]string
	text, err := os.ReadFile(filepath.Join(f.paths.StateDir, "peers.json"))
	if err != nil || json.NewDecoder(bufio.NewReader(bytes.NewReader(text))).Decode(&known) != nil {
		return nil // nobody has said anything yet
	}
	return known
}

func (f *hostFiles) saveKnown(known map[string]string) error {
	text, err := json.Marshal(known)
	if err != nil {
		return fmt.Errorf("save peers: %w", err)
	}
	if err := writeFile(filepath.Join(f.paths.StateDir, "peers.json"), text); err != nil {
		return fmt.Errorf("save peers: %w", err)
	}
	return nil
}
