package linstor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"
)

// Stream is one of LINSTOR's two event streams.
type Stream string

const (
	// StreamPromotion tells changes of may_promote. The state of every DRBD resource comes first, and again whenever
	// anybody else subscribes.
	StreamPromotion Stream = "/v1/events/drbd/promotion"
	// StreamNodes tells administrative changes of nodes, not their connection status. There is no initial state.
	StreamNodes Stream = "/v1/events/nodes"
)

// Names of events.
const (
	EventMayPromote    = "may-promote-change"
	EventNodeCreate    = "node-create"
	EventNodeDelete    = "node-delete"
	EventNodeEvacuate  = "node-evacuate"
	EventNodeEvicted   = "node-evicted"
	EventNodeRestored  = "node-restored"
	EventNodeModified  = "node-modified"
	eventRefused       = "error" // The subscription failed; the server closes.
	promotionFromStart = "current"
)

const (
	streamMaxAge   = 10 * time.Minute // A dead connection and a quiet one look alike.
	streamBackoff  = 250 * time.Millisecond
	streamMaxDelay = 15 * time.Second
	streamSettled  = 10 * time.Second // A connection that lived this long resets the back-off.
)

// MayPromote is the payload of EventMayPromote.
type MayPromote struct {
	Resource   string `json:"resource_name"`
	Node       string `json:"node_name"`
	MayPromote *bool  `json:"may_promote"` // nil when unknown: the satellite was lost.
}

// Event is one event of a stream. It is a hint to look, no more: LINSTOR repeats events, sends them before it stores
// what they say, and forgets them when the connection breaks.
type Event struct {
	Name       string
	MayPromote *MayPromote // For EventMayPromote.
	Node       *Node       // For node events; the new node for EventNodeModified.
	OldNode    *Node       // For EventNodeModified. LINSTOR takes it after the change, so properties do not differ.
	Data       []byte      // JSON as it came, for names that are not known here.
}

// Handler hears a stream. Its functions are called one at a time and block the stream; any may be nil.
type Handler struct {
	// Connected is called for each connection, before its events. Whatever happened before it may have been missed:
	// read again.
	Connected func(controller string)
	// Event is called for every event, also repeated and unknown ones.
	Event func(Event)
	// Lost is called when a connection ended or could not be made, with the reason. A connection that was
	// given up because of its age is not reported; the next Connected is.
	Lost func(err error)
}

var (
	errStreamAge   = errors.New("event stream reached its maximum age")
	errStreamMoved = errors.New("another controller took over")
	errStreamEnded = errors.New("controller closed the event stream")
)

// Events subscribes to a stream and keeps it up, on whichever controller is current, until ctx ends; it returns
// ctx's error. Reconnects back off from 250 ms to 15 s with jitter.
func (c *Client) Events(ctx context.Context, stream Stream, h Handler) error {
	failures := 0
	for {
		start := time.Now()
		err := c.follow(ctx, stream, h)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(start) >= streamSettled {
			failures = 0
		}
		if errors.Is(err, errStreamAge) {
			continue
		}
		if h.Lost != nil {
			h.Lost(err)
		}
		delay := reconnectDelay(failures)
		failures++
		c.log.Debug("event stream lost", keyStream, string(stream), keyErr, err, keyDelay, delay)
		if !sleep(ctx, delay) {
			return ctx.Err()
		}
	}
}

// reconnectDelay is half fixed, half random, so that the agents of a pool do not return in step.
func reconnectDelay(failures int) time.Duration {
	ceiling := streamMaxDelay
	if failures < 6 {
		ceiling = min(ceiling, streamBackoff<<failures)
	}
	return ceiling/2 + rand.N(ceiling/2)
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// follow holds one connection until it ends, and says why.
func (c *Client) follow(ctx context.Context, stream Stream, h Handler) error {
	base, moved, err := c.current(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	age := time.AfterFunc(streamMaxAge-rand.N(streamMaxAge/10), func() { cancel(errStreamAge) })
	defer age.Stop()
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		select {
		case <-moved:
			cancel(errStreamMoved)
		case <-ctx.Done():
		}
	}()
	err = c.readStream(ctx, stream, base, h)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cancel(nil)
	<-watching
	return err
}

// readStream connects and dispatches. No deadline is put on the answer's header: the server may hold it back until
// there is an event. Age, keepalive and a controller change end a dead connection.
func (c *Client) readStream(ctx context.Context, stream Stream, base string, h Handler) error {
	r := &request{method: http.MethodGet, path: string(stream), header: http.Header{"Accept": {"text/event-stream"}}}
	if stream == StreamPromotion {
		r.header["Last-Event-ID"] = []string{promotionFromStart} // Set as written: Go would spell it Last-Event-Id.
	}
	resp, err := c.send(ctx, r, base)
	if err != nil {
		c.condemn(ctx, base)
		return fmt.Errorf("subscribe to %s: %w", stream, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		if resp.StatusCode == http.StatusServiceUnavailable {
			c.condemn(ctx, base)
		}
		return fmt.Errorf("subscribe to %s: %w", stream, c.refusal(resp, r.method, r.path, base))
	}
	if t := resp.Header.Get("Content-Type"); !strings.HasPrefix(t, "text/event-stream") {
		c.condemn(ctx, base)
		return fmt.Errorf("subscribe to %s: %w: content type %q", stream, ErrMalformed, oneLine(t))
	}
	if h.Connected != nil {
		h.Connected(base)
	}
	err = dispatch(ctx, resp.Body, h)
	if errors.Is(err, io.EOF) {
		err = errStreamEnded
	}
	c.condemn(ctx, base)
	return fmt.Errorf("read %s: %w", stream, err)
}

// condemn makes the next connection prove the controller again, unless we ended this one ourselves.
func (c *Client) condemn(ctx context.Context, base string) {
	if ctx.Err() == nil {
		c.forget(base)
	}
}

func dispatch(ctx context.Context, body io.Reader, h Handler) error {
	frames := newFrameReader(body)
	for {
		f, err := frames.next()
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		ev, err := parseEvent(f)
		if err != nil {
			return err
		}
		if h.Event != nil {
			h.Event(ev)
		}
	}
}

// parseEvent turns a frame into an event. A payload that cannot be read is an error: the caller reconnects, and the
// owner reads again, which is what the event would have made it do.
func parseEvent(f frame) (Event, error) {
	ev := Event{Name: f.name, Data: f.data}
	var err error
	switch f.name {
	case eventRefused:
		var entries []Entry
		if decodeEntries(bytes.NewReader(f.data), &entries) != nil || len(entries) == 0 {
			return Event{}, fmt.Errorf("subscription refused: %s", oneLine(string(f.data)))
		}
		return Event{}, fmt.Errorf("subscription refused: %s: %w", oneLine(entries[0].Message), entries[0].Code())
	case EventMayPromote:
		ev.MayPromote = new(MayPromote)
		err = json.Unmarshal(f.data, ev.MayPromote)
		if err == nil && (ev.MayPromote.Resource == "" || ev.MayPromote.Node == "") {
			err = errors.New("no resource or node name")
		}
	case EventNodeModified:
		var pair struct {
			Old *Node `json:"old_node"`
			New *Node `json:"new_node"`
		}
		err = json.Unmarshal(f.data, &pair)
		ev.OldNode, ev.Node = pair.Old, pair.New
	case EventNodeCreate, EventNodeDelete, EventNodeEvacuate, EventNodeEvicted, EventNodeRestored:
		var one struct {
			Node *Node `json:"node"`
		}
		err = json.Unmarshal(f.data, &one)
		ev.Node = one.Node
	default:
		return ev, nil
	}
	if err == nil && ev.MayPromote == nil && ev.Node == nil {
		err = errors.New("no node in it")
	}
	if err != nil {
		return Event{}, fmt.Errorf("%w: event %s: %w", ErrMalformed, oneLine(f.name), err)
	}
	return ev, nil
}
