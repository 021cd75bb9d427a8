package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	reconnectBuffer = 1 << 20 // Bytes published while the bus is away; more is lost, and tables notice.
	pendingMessages = 8192    // Of one subscription; more is lost, and mirrors notice.
	firstReconnect  = 100 * time.Millisecond
	lastReconnect   = 5 * time.Second
	dialPatience    = 3 * time.Second // A server is replaced within half a second.
)

// AwayError says that the bus cannot be reached.
type AwayError struct {
	Socket string
	Hint   string // What an operator should do.
	Err    error
}

func (e *AwayError) Error() string {
	return fmt.Sprintf("connect to bus %s: %v (%s)", e.Socket, e.Err, e.Hint)
}

// Unwrap returns the cause.
func (e *AwayError) Unwrap() error { return e.Err }

// Conn is a connection to the bus. It reconnects for ever; subscriptions survive that. It is a Wire.
type Conn struct {
	nc   *nats.Conn
	name string
}

var _ Wire = (*Conn)(nil)

func newConn(nc *nats.Conn, name string) *Conn { return &Conn{nc: nc, name: name} }

// Dial connects to the bus of this host. It fails with *AwayError when the bus is not there now; one that is just replacing its server, because the pool
// changed, is waited for. Name shows up in the server's list of connections.
func Dial(ctx context.Context, socket, name string) (*Conn, error) {
	patience := time.After(dialPatience)
	for {
		nc, err := nats.Connect(dialURL, dialOptions(ctx, socket, name)...)
		if err == nil {
			return newConn(nc, name), nil
		}
		if !hungUp(err) {
			return nil, away(socket, err)
		}
		select {
		case <-ctx.Done():
			return nil, away(socket, err)
		case <-patience:
			return nil, away(socket, err)
		case <-time.After(firstReconnect):
		}
	}
}

// hungUp tells that somebody took the connection and ended it: the door is there, the server behind it is not yet.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, nats.ErrConnectionClosed)
}

// DialLazy is Dial for agents, which are right without the bus: it never waits. While the bus is away it tries again in the
// background with growing pauses; Connected tells. It fails only on a programming error.
func DialLazy(socket, name string) (*Conn, error) {
	nc, err := nats.Connect(dialURL, append(dialOptions(context.Background(), socket, name), nats.RetryOnFailedConnect(true))...)
	if err != nil {
		return nil, away(socket, err)
	}
	return newConn(nc, name), nil
}

// dialURL names no real address: the dialer knows only the socket.
const dialURL = "nats://127.0.0.1:4222"

func dialOptions(ctx context.Context, socket, name string) []nats.Option {
	return []nats.Option{
		nats.Name(name),
		nats.SetCustomDialer(&unixDialer{socket: socket, first: ctx}),
		nats.SkipHostLookup(),
		nats.IgnoreDiscoveredServers(),
		nats.MaxReconnects(-1),
		nats.CustomReconnectDelay(reconnectDelay),
		nats.ReconnectBufSize(reconnectBuffer),
		nats.PingInterval(30 * time.Second),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			slog.Debug("bus connection", "subject", subject, "err", err)
		}),
	}
}

// reconnectDelay grows from 0.1 s to 5 s, each with up to as much again on top, so that all agents of a host do not come
// back in one instant.
func reconnectDelay(attempts int) time.Duration {
	d := min(lastReconnect, firstReconnect<<min(attempts, 10))
	return d + rand.N(d)
}

// unixDialer connects to the local door. The context of Dial bounds the first attempt only; later ones are the library's.
type unixDialer struct {
	socket string
	mu     sync.Mutex
	first  context.Context
}

// Dial implements nats.CustomDialer.
func (d *unixDialer) Dial(_, _ string) (net.Conn, error) {
	d.mu.Lock()
	ctx := d.first
	d.first = context.Background()
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var nd net.Dialer
	return nd.DialContext(ctx, "unix", d.socket)
}

func away(socket string, err error) error {
	e := &AwayError{Socket: socket, Err: err, Hint: "look at: systemctl status xostor-bus"}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Hint = "the bus does not run on this host: systemctl start xostor-bus"
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Hint = "the bus died and left its socket: systemctl restart xostor-bus"
	case errors.Is(err, fs.ErrPermission):
		e.Hint = "only root may use the bus"
	}
	return e
}

// Connected tells whether the bus can be reached now.
func (c *Conn) Connected() bool { return c.nc.IsConnected() }

// OnConnect calls fn each time the connection stands (again) and the server knows its subscriptions, until stop is called: what was published before is
// lost to them.
func (c *Conn) OnConnect(fn func()) (stop func()) {
	changed := c.nc.StatusChanged(nats.CONNECTED)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-ctx.Done():
				return
			case _, open := <-changed:
				if !open {
					return
				}
				if c.Flush(ctx) == nil { // else it is gone again, and will come again
					fn()
				}
			}
		}
	}()
	return func() {
		cancel()
		c.nc.RemoveStatusListener(changed)
		<-ended
	}
}

// Flush waits until the server has everything that was published, at most 5 s.
func (c *Conn) Flush(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := c.nc.FlushWithContext(ctx); err != nil {
		return fmt.Errorf("flush bus: %w", err)
	}
	return nil
}

// Close ends the connection and all its subscriptions. What is still buffered is sent when the bus is there.
func (c *Conn) Close() {
	if c.nc.IsConnected() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = c.nc.FlushWithContext(ctx) // The last words are best effort.
	}
	c.nc.Close()
}

// Publish implements Wire.
func (c *Conn) Publish(m *Message) error {
	if err := c.nc.PublishMsg(toNATS(m)); err != nil {
		return fmt.Errorf("publish %s: %w", m.Subject, err)
	}
	return nil
}

// Subscribe implements Wire. A subscriber that falls more than 8192 messages behind loses messages.
func (c *Conn) Subscribe(fn func(*Message), subjects ...string) (stop func(), err error) {
	// One channel for all subjects: subscriptions with callbacks of their own would not keep the order between them.
	pending, done := make(chan *nats.Msg, pendingMessages), make(chan struct{})
	var subs []*nats.Subscription
	var once sync.Once
	stop = func() {
		once.Do(func() {
			for _, s := range subs {
				_ = s.Unsubscribe() // Fails only when the connection is closed, and then there is none.
			}
			close(done)
		})
	}
	for _, subject := range subjects {
		s, err := c.nc.ChanSubscribe(subject, pending)
		if err != nil {
			stop()
			return nil, fmt.Errorf("subscribe %s: %w", subject, err)
		}
		subs = append(subs, s)
	}
	closed := c.nc.StatusChanged(nats.CLOSED)
	go func() {
		defer c.nc.RemoveStatusListener(closed)
		for {
			select {
			case <-done:
				return
			case <-closed:
				return
			case m := <-pending:
				fn(fromNATS(m))
			}
		}
	}()
	return stop, nil
}

// Request implements Wire.
func (c *Conn) Request(ctx context.Context, m *Message) (*Message, error) {
	reply, err := c.nc.RequestMsgWithContext(ctx, toNATS(m))
	if errors.Is(err, nats.ErrNoResponders) {
		return nil, fmt.Errorf("request %s: %w", m.Subject, ErrNoResponder)
	}
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", m.Subject, err)
	}
	return fromNATS(reply), nil
}

// MaxPayload implements Wire. Before the first connection it is the server's default.
func (c *Conn) MaxPayload() int {
	if n := c.nc.MaxPayload(); n > 0 {
		return int(n)
	}
	return 1 << 20
}

func toNATS(m *Message) *nats.Msg {
	out := &nats.Msg{Subject: m.Subject, Reply: m.Reply, Data: m.Data}
	if len(m.Header) > 0 {
		out.Header = make(nats.Header, len(m.Header))
		values := make([]string, 0, len(m.Header))
		for k, v := range m.Header {
			values = append(values, v)
			out.Header[k] = values[len(values)-1:]
		}
	}
	return out
}

func fromNATS(m *nats.Msg) *Message {
	out := &Message{Subject: m.Subject, Reply: m.Reply, Data: m.Data}
	if len(m.Header) > 0 {
		out.Header = make(Header, len(m.Header))
		for k, v := range m.Header {
			if len(v) > 0 {
				out.Header[k] = v[0]
			}
		}
	}
	return out
}

// PublishEvent sends an event; missing ID and Time are filled in.
func PublishEvent(w Wire, e Event) error {
	m, err := e.Message()
	if err != nil {
		return err
	}
	return w.Publish(m)
}

// SubscribeEvents calls fn for each event whose subject the pattern covers, one at a time. Messages that are no CloudEvents
// are passed to bad when it is not nil.
func SubscribeEvents(w Wire, pattern Subject, fn func(Event), bad func(*Message, error)) (stop func(), err error) {
	return w.Subscribe(func(m *Message) {
		e, err := EventOf(m)
		if err != nil {
			if bad != nil {
				bad(m, err)
			}
			return
		}
		fn(e)
	}, string(pattern))
}
