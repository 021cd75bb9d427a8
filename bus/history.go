package bus

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

const (
	historyStream  = "XOSTOR"
	historyTimeout = 5 * time.Second
	storeFolder    = "jetstream" // The server's own name for its folder in StoreDir.
	asidePrefix    = "jetstream.broken-"
	poolPrefix     = "pool-" // Of the folder of a cluster's history; the pool's uuid follows.
	openingFile    = "opening"
	openingTries   = 2
)

// ErrNoHistory says that the bus keeps no history.
var ErrNoHistory = errors.New("the bus keeps no history: set its store folder, or look at the free space there")

// ErrHistoryPaused says that the hosts that keep the history are not enough at present. Live events are not affected.
var ErrHistoryPaused = errors.New("history is paused: too few of the hosts that keep it are there; live events go on (xostor events --follow)")

// HistoryLimits bound the history; the first one reached drops the oldest events.
type HistoryLimits struct {
	// MaxAge defaults to 7 days.
	MaxAge time.Duration
	// MaxBytes on disk defaults to 256 MiB.
	MaxBytes int64
}

func (l HistoryLimits) withDefaults() HistoryLimits {
	if l.MaxAge <= 0 {
		l.MaxAge = 7 * 24 * time.Hour
	}
	if l.MaxBytes <= 0 {
		l.MaxBytes = 256 << 20
	}
	return l
}

// historySubjects are what is worth keeping: no lists, no signs of life.
func historySubjects() []string {
	var s []string
	for _, family := range []string{"xapi", "linstor", "drbd", "agent"} {
		s = append(s, subject.Prefix+"."+family+".>")
	}
	return s
}

// storeDir is where the history of a shape is kept. What is kept alone and what a cluster keeps cannot be read by the other, and a cluster's belongs to
// one pool.
func (b *Bus) storeDir(w shape) string {
	if w.cluster == "" {
		return b.opts.StoreDir
	}
	return filepath.Join(b.opts.StoreDir, poolPrefix+w.cluster)
}

// startServer starts the server with history if that can be had, else without: the live path never waits for a disk.
func (b *Bus) startServer(ctx context.Context, w shape) (*server.Server, error) {
	if b.opts.StoreDir == "" {
		return b.startBare(ctx, w, "no store folder is configured")
	}
	if w.cluster != "" {
		dropOtherPools(b.opts.StoreDir, w.cluster)
	}
	s, err := b.startWithHistory(ctx, w)
	if err == nil {
		return s, nil
	}
	dir := b.storeDir(w)
	b.opts.Log.Warn("history cannot be opened, moving it aside", "dir", dir, "err", err)
	if err := moveAside(dir, time.Now()); err != nil {
		return b.startBare(ctx, w, err.Error())
	}
	if s, err = b.startWithHistory(ctx, w); err != nil {
		return b.startBare(ctx, w, err.Error())
	}
	return s, nil
}

func (b *Bus) startBare(ctx context.Context, w shape, why string) (*server.Server, error) {
	b.setHistory(why)
	if b.opts.StoreDir != "" {
		b.opts.Log.Error("the bus runs without history", "dir", b.opts.StoreDir, "reason", why)
	}
	return b.runServer(ctx, b.serverOptions(w))
}

// dropOtherPools removes what this host kept as a member of other pools: its events must not be told as those of this pool.
func dropOtherPools(dir, pool string) {
	folders, _ := filepath.Glob(filepath.Join(dir, poolPrefix+"*")) // The pattern is good.
	for _, f := range folders {
		if filepath.Base(f) != poolPrefix+pool {
			_ = os.RemoveAll(f) // What stays takes space, no more.
		}
	}
}

// historyOptions switch the history on, unless this run of the server has none.
func (b *Bus) historyOptions(so *server.Options, w shape) {
	b.mu.Lock()
	off := b.historyOff != "" || b.opts.StoreDir == ""
	b.mu.Unlock()
	if off {
		return
	}
	so.JetStream = true
	so.StoreDir = b.storeDir(w)
	so.JetStreamMaxMemory = 1 << 20 // Nothing uses memory streams; 0 would mean "three quarters of the host's".
	so.JetStreamMaxStore = b.opts.History.MaxBytes + b.opts.History.MaxBytes/4
}

// startWithHistory fails when the history cannot be had in good order; then no server is left running. In a cluster the stream itself comes later: it needs
// other hosts.
func (b *Bus) startWithHistory(ctx context.Context, w shape) (*server.Server, error) {
	dir := b.storeDir(w)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open history: %w", err)
	}
	if err := beginOpening(dir); err != nil {
		return nil, err
	}
	b.setHistory("") // A first attempt may have left its reason.
	so := b.serverOptions(w)
	b.historyOptions(so, w)
	// A new cluster expects as many hosts as it has routes before it counts a majority, so this host has to be among them.
	if w.cluster != "" {
		so.Routes = routeURLs(append(slices.Clone(w.routes), w.self)...)
	}
	s, err := b.runServer(ctx, so)
	if err != nil {
		return nil, err
	}
	switch {
	case w.cluster == "":
		err = b.openAlone(ctx, s)
	case w.self != "":
		so := b.serverOptions(w)
		b.historyOptions(so, w)
		err = s.ReloadOptions(so)
	}
	if err != nil {
		return nil, errors.Join(err, stopServer(s))
	}
	if err := endOpening(dir); err != nil {
		// At worst a good history is moved aside after some restarts. That is no reason to run without one now.
		b.opts.Log.Warn("mark history as opened", "err", err)
	}
	return s, nil
}

// openAlone makes the stream of a bus without a cluster and reads the end of it to see that it can be read.
func (b *Bus) openAlone(ctx context.Context, s *server.Server) error {
	nc, err := nats.Connect("", nats.InProcessServer(s))
	if err != nil {
		return fmt.Errorf("open history: %w", err)
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(ctx, historyTimeout)
	defer cancel()
	stream, err := ensureStream(ctx, nc, b.opts.History, 1)
	if err != nil {
		return err
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("open history: %w", err)
	}
	if info.State.Msgs == 0 {
		return nil
	}
	if _, err := stream.GetMsg(ctx, info.State.LastSeq); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return fmt.Errorf("read end of history: %w", err)
	}
	return nil
}

// ensureStream makes the stream or brings its limits and its number of copies up to date.
func ensureStream(ctx context.Context, nc *nats.Conn, limits HistoryLimits, replicas int) (jetstream.Stream, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open history: %w", err)
	}
	stream, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: historyStream, Subjects: append(historySubjects(), lateFamily+">"), Storage: jetstream.FileStorage, Replicas: replicas,
		MaxAge: limits.MaxAge, MaxBytes: limits.MaxBytes, Discard: jetstream.DiscardOld, NoAck: true, AllowDirect: true,
		// Events carry no NATS message id, so there is nothing to remember for deduplication.
		Duplicates: 100 * time.Millisecond,
	})
	if err != nil {
		return nil, fmt.Errorf("open history: %w", err)
	}
	return stream, nil
}

// beginOpening counts starts that did not come to their end. A store that kills the server while it is opened would otherwise
// do so at each restart.
func beginOpening(dir string) error {
	path := filepath.Join(dir, openingFile)
	tries := 0
	if raw, err := os.ReadFile(path); err == nil {
		tries, _ = strconv.Atoi(strings.TrimSpace(string(raw))) // Unreadable counts as none.
	}
	if tries >= openingTries {
		return fmt.Errorf("open history: the bus died %d times while opening it", tries)
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(tries+1)), 0o600); err != nil {
		return fmt.Errorf("open history: %w", err)
	}
	return nil
}

func endOpening(dir string) error {
	if err := os.Remove(filepath.Join(dir, openingFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open history: %w", err)
	}
	return nil
}

// moveAside renames the store folder, so that somebody can look at it, and removes the one moved aside before.
func moveAside(dir string, now time.Time) error {
	old, err := filepath.Glob(filepath.Join(dir, asidePrefix+"*"))
	if err != nil {
		return fmt.Errorf("find old history: %w", err)
	}
	for _, path := range old {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove old history: %w", err)
		}
	}
	err = os.Rename(filepath.Join(dir, storeFolder), filepath.Join(dir, asidePrefix+now.UTC().Format("20060102T150405")))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("move history aside: %w", err)
	}
	return endOpening(dir)
}

// Replay calls fn for each event of the history since then whose subject the pattern covers ("" for all), in the order in which they were kept, and
// returns after the last one that was there when it began. That is the order of publishing but for what was published while the history had no leader: it
// comes a little later, with its own time. Replay stops at fn's first error and returns it. ErrNoHistory when the bus keeps none, ErrHistoryPaused when
// too few hosts are there.
func Replay(ctx context.Context, c *Conn, since time.Time, pattern Subject, fn func(Event) error) error {
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &since, FilterSubjects: keptFilters(pattern)}
	return eachKept(ctx, c.nc, cfg, func(m jetstream.Msg) error {
		if pattern != "" && !pattern.Matches(Subject(trueSubject(m.Subject()))) {
			return nil
		}
		return replayOne(m, fn)
	})
}

// keptFilters are the subjects on which events of a pattern are kept; nil for all. Two filters of one consumer must not overlap, so a pattern that leaves the family
// open, and with it what is kept late, is sorted out on our side.
func keptFilters(pattern Subject) []string {
	rest, ours := strings.CutPrefix(string(pattern), subject.Prefix+".")
	family, _, _ := strings.Cut(rest, ".")
	if !ours || family == "*" || family == ">" {
		return nil
	}
	return []string{string(pattern), lateSubject(string(pattern))}
}

// eachKept calls fn for each message of the history that cfg selects and that was there when it began, in the order of keeping. It returns fn's first error
// as it is.
func eachKept(ctx context.Context, nc *nats.Conn, cfg jetstream.OrderedConsumerConfig, fn func(jetstream.Msg) error) error {
	js, err := jetstream.New(nc)
	if err != nil {
		return historyError(err)
	}
	cfg.MaxResetAttempts = 1 // Each fetch makes the consumer anew; without a limit it is tried for ever when the leader has gone, whatever ctx says.
	consumer, err := js.OrderedConsumer(ctx, historyStream, cfg)
	if err != nil {
		return historyError(err)
	}
	for left := consumer.CachedInfo().NumPending; left > 0; {
		batch, err := consumer.FetchNoWait(int(min(left, 500)))
		if err != nil {
			return historyError(err)
		}
		got := uint64(0)
		for m := range batch.Messages() {
			got++
			if err := fn(m); err != nil {
				return err
			}
		}
		if err := batch.Error(); err != nil {
			return historyError(err)
		}
		if got == 0 {
			// The limits dropped what was left, or nobody answered: that must not pass for the end.
			info, err := consumer.Info(ctx)
			if err != nil {
				return historyError(err)
			}
			if info.NumPending > 0 {
				return historyError(nats.ErrTimeout)
			}
			return nil
		}
		left -= min(left, got)
		if err := ctx.Err(); err != nil {
			return historyError(err)
		}
	}
	return nil
}

func replayOne(m jetstream.Msg, fn func(Event) error) error {
	h := make(Header, len(m.Headers()))
	for k, v := range m.Headers() {
		if len(v) > 0 {
			h[k] = v[0]
		}
	}
	e, err := EventOf(&Message{Subject: trueSubject(m.Subject()), Header: h, Data: m.Data()})
	if errors.Is(err, ErrNotEvent) {
		return nil // Somebody published something else on our subjects; it is no event of ours.
	}
	return fn(e)
}

func historyError(err error) error {
	api, isAPI := errors.AsType[*jetstream.APIError](err)
	// 503 is "JetStream system temporarily unavailable": no leader, for want of a majority.
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) || isAPI && api.Code == 503 && !errors.Is(err, jetstream.ErrJetStreamNotEnabled) {
		return fmt.Errorf("replay history: %w", ErrHistoryPaused)
	}
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, nats.ErrNoResponders) {
		return fmt.Errorf("replay history: %w", ErrNoHistory)
	}
	return fmt.Errorf("replay history: %w", err)
}
