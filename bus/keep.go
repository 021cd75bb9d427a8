package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"
)

const (
	historyLook   = 15 * time.Second // Between two looks at the history of a cluster when all is well.
	pausedAfter   = 30 * time.Second // A cluster needs some 10 s to find its leaders; less is no news.
	streamTimeout = 3 * time.Second
	silentAfter   = 10 * time.Second // A host of the group that was not heard for this long and has no route is not there.
	manyHosts     = 3                // From here on the history has this many copies.
)

// HistoryOff says why there is no history; "" when there is one.
func (b *Bus) HistoryOff() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.historyOff == "" && b.opts.StoreDir != "" && b.server != nil && !b.server.JetStreamEnabled() {
		return withFreeSpace("the server switched it off, see its log", b.opts.StoreDir)
	}
	return b.historyOff
}

// HistoryPaused says why the cluster keeps no history at present; "" while it does, and when there is none at all.
func (b *Bus) HistoryPaused() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.historyPaused
}

// withFreeSpace adds the free space in dir to the reason why there is no history: the server's own words do not always say that the disk is full.
func withFreeSpace(off, dir string) string {
	var st unix.Statfs_t
	if off == "" || unix.Statfs(dir, &st) != nil {
		return off
	}
	return fmt.Sprintf("%s (%d MiB free in %s)", off, st.Bavail*uint64(st.Bsize)>>20, dir)
}

// setHistory notes why there is no history.
func (b *Bus) setHistory(off string) {
	off = withFreeSpace(off, b.opts.StoreDir)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.historyOff = off
}

// copies is how many copies a pool's history has. Two hosts have no majority when one is missing, so a second copy would only add a way to stop.
func copies(hosts int) int {
	if hosts >= manyHosts {
		return manyHosts
	}
	return 1
}

// tendHistory looks after the history of a cluster. One host does what is to be done: the leader of the group that the hosts form.
func (b *Bus) tendHistory(ctx context.Context, now time.Time) {
	b.mu.Lock()
	s, w, pool, live, replicas := b.server, b.shape, b.pool, b.live, b.replicas
	due := now.Sub(b.looked) >= historyLook || b.replicas != copies(len(b.pool.Hosts)) || b.historyPaused != ""
	b.mu.Unlock()
	if s == nil || w.cluster == "" || !due || b.HistoryOff() != "" {
		return
	}
	why, got, again := b.lookAtHistory(ctx, s, pool, live, replicas)
	if ctx.Err() != nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.looked = now
	if again {
		b.looked = time.Time{}
	}
	if why == "" {
		if b.historyPaused != "" {
			b.opts.Log.Info("history goes on")
		}
		b.replicas, b.historyPaused, b.pausedAt = got, "", time.Time{}
		return
	}
	if b.pausedAt.IsZero() {
		b.pausedAt = now
	}
	if b.historyPaused == "" && now.Sub(b.pausedAt) >= pausedAfter {
		b.opts.Log.Warn("history is paused", "reason", why)
	}
	if b.historyPaused != "" || now.Sub(b.pausedAt) >= pausedAfter {
		b.historyPaused = why
	}
}

// lookAtHistory returns the number of copies of the history, or why nothing is kept, and whether the next look should not wait.
func (b *Bus) lookAtHistory(ctx context.Context, s *server.Server, pool Pool, live bool, replicas int) (why string, got int, again bool) {
	info, err := s.Jsz(nil)
	if err != nil || info.Meta == nil {
		return "its group of hosts has not been formed yet", 0, false
	}
	meta := info.Meta
	if meta.Leader == "" {
		return fmt.Sprintf("%d of the %d hosts that keep it are needed, and fewer are there", meta.QuorumNeeded, meta.Size), 0, false
	}
	nc, err := nats.Connect("", nats.InProcessServer(s))
	if err != nil {
		return "the server does not answer: " + err.Error(), 0, false
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	if s.JetStreamIsLeader() {
		if live {
			again = b.dismiss(ctx, s, meta, pool)
		}
		if want := copies(min(len(pool.Hosts), len(meta.Replicas)+1)); replicas != want {
			if _, err := ensureStream(ctx, nc, b.opts.History, want); err != nil {
				b.opts.Log.Debug("make history", "copies", want, "err", err)
			}
		}
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return err.Error(), 0, again
	}
	stream, err := js.Stream(ctx, historyStream)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return "it has not been made yet", 0, again
	case err != nil:
		return "the hosts that hold its copies are not there", 0, again
	}
	cached := stream.CachedInfo()
	if cached.Cluster == nil || cached.Cluster.Leader == "" {
		return "too few of the hosts that hold its copies are there", 0, again
	}
	return "", cached.Config.Replicas, again
}

// dismiss removes hosts that left the pool from the group that keeps the history: they would count for its majority for ever. It reports whether some are
// still to be removed.
func (b *Bus) dismiss(ctx context.Context, s *server.Server, meta *server.MetaClusterInfo, pool Pool) (left bool) {
	members := []string{s.NodeName()}
	for _, h := range pool.Hosts {
		members = append(members, nodeID(h.UUID))
	}
	var here []string
	for _, name := range connected(s) {
		here = append(here, nodeID(name))
	}
	for _, p := range meta.Replicas {
		if slices.Contains(members, p.Peer) {
			continue
		}
		// A host that is there is one that joins, and our list is a moment behind, or one that is about to leave. The server itself calls a host that died
		// without a word offline only after minutes.
		there := slices.Contains(here, p.Peer) || !p.Offline && p.Active > 0 && p.Active < silentAfter
		if left || there {
			left = true // After a refusal too the next look goes on: the group takes one change at a time.
			continue
		}
		err := b.removePeer(ctx, s, p.Peer)
		b.opts.Log.Info("host left the pool, taking it out of the history's group", "host", p.Name, "err", err)
		left = err != nil
	}
	return left
}

func (b *Bus) removePeer(ctx context.Context, s *server.Server, peer string) error {
	nc, err := nats.Connect("", nats.InProcessServer(s), nats.UserInfo(systemUser, b.sysPassword))
	if err != nil {
		return fmt.Errorf("connect to system account: %w", err)
	}
	defer nc.Close()
	body, err := json.Marshal(server.JSApiMetaServerRemoveRequest{Peer: peer})
	if err != nil {
		return fmt.Errorf("encode removal: %w", err)
	}
	m, err := nc.RequestWithContext(ctx, server.JSApiRemoveServer, body)
	if err != nil {
		return fmt.Errorf("remove host from history: %w", err)
	}
	var answer server.JSApiMetaServerRemoveResponse
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fmt.Errorf("remove host from history: %w", err)
	}
	if answer.Error != nil {
		return fmt.Errorf("remove host from history: %s", answer.Error.Description)
	}
	return nil
}
