package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Options tells a client what to ask of a server.
type Options struct {
	// Name is the export; "" is the server's default.
	Name string
	// TLS is used when set; a server without TLS is then an error.
	TLS *tls.Config
	// Structured asks for structured replies, which simple servers may refuse.
	Structured bool
}

// ErrTimeout is a request without an answer in its time. Whether it was or will be done is unknown.
var ErrTimeout = errors.New("nbd request timed out")

// ErrClosed is a request on a connection that has ended. Whether a request that was under way was done is unknown.
var ErrClosed = errors.New("nbd connection closed")

const clientSlots = 16

// call is one request under way.
type call struct {
	kind   uint16
	off    uint64
	dst    []byte // Where a READ's data goes.
	got    int    // Bytes of it so far.
	failed Error
	gen    uint32
	live   atomic.Bool
	done   chan error
	timer  *time.Timer
}

// Client is one connection to an export. Its methods may be called from many goroutines; at most 16 requests are under
// way, more wait. The buffers given to it need no alignment.
type Client struct {
	conn net.Conn
	info Info
	free chan uint16
	call [clientSlots]call

	send    sync.Mutex // Guards out and writes to conn.
	out     []byte
	closing atomic.Bool
	ended   chan struct{}
	err     error // Why the connection ended; read after ended is closed.
}

// Connect negotiates on conn, which it owns from then on. ctx bounds the handshake only. A server's refusal is a
// *Refusal; what is not NBD wraps ErrProtocol.
func Connect(ctx context.Context, conn net.Conn, o Options) (*Client, error) {
	noDelay(conn)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	n := &negotiation{conn: conn, r: bufio.NewReaderSize(conn, readerBuffer)}
	info, err := n.open(ctx, o)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		n.conn.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return nil, fmt.Errorf("open nbd export: %w", err)
	}
	return newClient(n.conn, n.r, info), nil
}

// Names asks the server on conn for its exports, then closes conn.
func Names(ctx context.Context, conn net.Conn, secure *tls.Config) ([]string, error) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	n := &negotiation{conn: conn, r: bufio.NewReaderSize(conn, readerBuffer)}
	if err := n.start(ctx, secure); err != nil {
		return nil, err
	}
	if err := n.ask(optList, nil); err != nil {
		return nil, err
	}
	var names []string
	for range 4096 {
		kind, data, err := n.reply(optList)
		switch {
		case err != nil:
			return nil, err
		case kind == repAck:
			_ = n.ask(optAbort, nil)
			return names, nil
		case kind != repServer || len(data) < 4 || int64(binary.BigEndian.Uint32(data)) > int64(len(data)-4):
			return nil, violated("answer to LIST")
		}
		names = append(names, string(data[4:4+binary.BigEndian.Uint32(data)]))
	}
	return nil, violated("endless LIST")
}

// negotiation is a client's handshake.
type negotiation struct {
	conn net.Conn
	r    *bufio.Reader
}

func (n *negotiation) open(ctx context.Context, o Options) (Info, error) {
	if len(o.Name) > maxName {
		return Info{}, fmt.Errorf("export name of %d bytes: %w", len(o.Name), EINVAL)
	}
	if err := n.start(ctx, o.TLS); err != nil {
		return Info{}, err
	}
	if o.Structured {
		if err := n.ask(optStructuredReply, nil); err != nil {
			return Info{}, err
		}
		// A refusal is fine: replies stay simple, and the reader takes both.
		if _, _, err := n.reply(optStructuredReply); err != nil && !errors.As(err, new(*Refusal)) {
			return Info{}, err
		}
	}
	data := binary.BigEndian.AppendUint32(nil, uint32(len(o.Name)))
	data = append(data, o.Name...)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, infoBlockSize)
	if err := n.ask(optGo, data); err != nil {
		return Info{}, err
	}
	return n.readInfo()
}

// readInfo reads the answers to GO until its end.
func (n *negotiation) readInfo() (Info, error) {
	var info Info
	told := false
	for range maxOptions {
		kind, data, err := n.reply(optGo)
		if err != nil {
			return Info{}, err
		}
		if kind == repAck {
			if !told {
				return Info{}, violated("GO without the export's size")
			}
			return info.normal(), nil
		}
		if kind != repInfo || len(data) < 2 {
			return Info{}, violated("answer %d to GO", kind)
		}
		switch binary.BigEndian.Uint16(data) {
		case infoExport:
			if len(data) != 12 {
				return Info{}, violated("size of INFO_EXPORT")
			}
			info.Size, info.Flags, told = binary.BigEndian.Uint64(data[2:]), binary.BigEndian.Uint16(data[10:]), true
		case infoBlockSize:
			if len(data) != 14 {
				return Info{}, violated("size of INFO_BLOCK_SIZE")
			}
			info.MinBlock = binary.BigEndian.Uint32(data[2:])
			info.Preferred = binary.BigEndian.Uint32(data[6:])
			info.MaxBlock = binary.BigEndian.Uint32(data[10:])
		}
	}
	return Info{}, violated("endless GO")
}

// start reads the greeting, answers it and starts TLS.
func (n *negotiation) start(ctx context.Context, secure *tls.Config) error {
	var b [18]byte
	if _, err := io.ReadFull(n.r, b[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicGreeting || binary.BigEndian.Uint64(b[8:]) != magicOption {
		return violated("greeting")
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if flags&flagFixedNewstyle == 0 {
		return violated("server without fixed newstyle")
	}
	answer := binary.BigEndian.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes)))
	if _, err := n.conn.Write(answer); err != nil {
		return fmt.Errorf("send client flags: %w", err)
	}
	if secure == nil {
		return nil
	}
	if err := n.ask(optStartTLS, nil); err != nil {
		return err
	}
	if _, _, err := n.reply(optStartTLS); err != nil {
		return err
	}
	if n.r.Buffered() != 0 {
		return violated("bytes in clear behind STARTTLS")
	}
	conn := tls.Client(n.conn, secure)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	n.conn, n.r = conn, bufio.NewReaderSize(conn, readerBuffer)
	return nil
}

func (n *negotiation) ask(opt uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := n.conn.Write(append(b, data...)); err != nil {
		return fmt.Errorf("send option: %w", err)
	}
	return nil
}

// reply reads one reply to opt. An error type is returned as *Refusal.
func (n *negotiation) reply(opt uint32) (kind uint32, data []byte, err error) {
	var b [20]byte
	if _, err := io.ReadFull(n.r, b[:]); err != nil {
		return 0, nil, fmt.Errorf("read option reply: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicReply || binary.BigEndian.Uint32(b[8:]) != opt {
		return 0, nil, violated("option reply")
	}
	kind = binary.BigEndian.Uint32(b[12:])
	size := binary.BigEndian.Uint32(b[16:])
	if size > maxOption {
		return 0, nil, violated("option reply of %d bytes", size)
	}
	data = make([]byte, size)
	if _, err := io.ReadFull(n.r, data); err != nil {
		return 0, nil, fmt.Errorf("read option reply: %w", err)
	}
	if kind&repErrBit != 0 {
		return kind, data, &Refusal{Code: RefusalCode(kind), Message: string(data)}
	}
	return kind, data, nil
}

func newClient(conn net.Conn, r *bufio.Reader, info Info) *Client {
	c := &Client{conn: conn, info: info, free: make(chan uint16, clientSlots), ended: make(chan struct{}),
		out: make([]byte, requestLen+smallBuffer)}
	for i := range clientSlots {
		c.call[i].done = make(chan error, 1)
		c.call[i].timer = time.NewTimer(time.Hour)
		c.call[i].timer.Stop()
		c.free <- uint16(i)
	}
	go c.receive(r)
	return c
}

// Info describes the export.
func (c *Client) Info() Info { return c.info }

// Ended is closed when the connection has ended, whoever ended it.
func (c *Client) Ended() <-chan struct{} { return c.ended }

// Read fills p from off within timeout. The server's error is an Error; ErrTimeout and ErrClosed end the connection.
func (c *Client) Read(p []byte, off int64, timeout time.Duration) error {
	return c.do(cmdRead, 0, p, nil, uint64(off), uint32(len(p)), timeout)
}

// Write stores p at off within timeout; fua asks for stable storage before the answer.
func (c *Client) Write(p []byte, off int64, fua bool, timeout time.Duration) error {
	return c.do(cmdWrite, fuaFlag(fua), nil, p, uint64(off), uint32(len(p)), timeout)
}

// Zero makes n bytes at off read as zeroes.
func (c *Client) Zero(off, n int64, fua bool, timeout time.Duration) error {
	return c.do(cmdWriteZeroes, fuaFlag(fua), nil, nil, uint64(off), uint32(n), timeout)
}

// Flush makes what was answered before stable.
func (c *Client) Flush(timeout time.Duration) error {
	return c.do(cmdFlush, 0, nil, nil, 0, 0, timeout)
}

func fuaFlag(fua bool) uint16 {
	if fua {
		return cmdFlagFUA
	}
	return 0
}

// Disconnect tells the server that the client leaves and closes the connection. Requests under way fail.
func (c *Client) Disconnect() {
	if !c.closing.Load() {
		_ = c.transmit(request{kind: cmdDisc}, nil, time.Second)
	}
	c.Close()
}

// Close ends the connection at once and waits until no buffer of a request is in use.
func (c *Client) Close() {
	c.closing.Store(true)
	c.conn.Close()
	<-c.ended
}

func (c *Client) do(kind, flags uint16, dst, src []byte, off uint64, n uint32, timeout time.Duration) error {
	if n > MaxPayload && kind != cmdWriteZeroes {
		return fmt.Errorf("nbd request of %d bytes: %w", n, EINVAL)
	}
	var slot uint16
	select {
	case slot = <-c.free:
	case <-c.ended:
		return c.why()
	}
	defer func() { c.free <- slot }()
	k := &c.call[slot]
	k.kind, k.off, k.dst, k.got, k.failed = kind, off, dst, 0, 0
	k.gen++
	k.live.Store(true)
	k.timer.Reset(timeout)
	defer k.timer.Stop()
	q := request{flags: flags, kind: kind, cookie: uint64(k.gen)<<16 | uint64(slot), off: off, n: n}
	if err := c.transmit(q, src, timeout); err != nil {
		c.Close()
	}
	timedOut := false
	select {
	case err := <-k.done:
		return err
	case <-k.timer.C:
		timedOut = true
		c.Close() // The receiver has stopped when it returns, so dst is the caller's again.
	case <-c.ended:
	}
	select {
	case err := <-k.done: // It was answered in the same moment.
		return err
	default:
	}
	k.live.Store(false)
	if timedOut && !errors.Is(c.why(), ErrProtocol) {
		return ErrTimeout
	}
	return c.why()
}

func (c *Client) why() error {
	<-c.ended
	return c.err
}

// transmit writes a request and its data in one piece if it is small.
func (c *Client) transmit(q request, src []byte, timeout time.Duration) error {
	c.send.Lock()
	defer c.send.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(timeout))
	b := c.out[:requestLen]
	binary.BigEndian.PutUint32(b, magicRequest)
	binary.BigEndian.PutUint16(b[4:], q.flags)
	binary.BigEndian.PutUint16(b[6:], q.kind)
	binary.BigEndian.PutUint64(b[8:], q.cookie)
	binary.BigEndian.PutUint64(b[16:], q.off)
	binary.BigEndian.PutUint32(b[24:], q.n)
	if len(src) <= smallBuffer {
		b = append(b, src...)
		src = nil
	}
	if _, err := c.conn.Write(b); err != nil {
		return err
	}
	if src == nil {
		return nil
	}
	_, err := c.conn.Write(src)
	return err
}

// receive reads replies until the connection ends.
func (c *Client) receive(r *bufio.Reader) {
	err := c.replies(r)
	c.conn.Close()
	if !errors.Is(err, ErrProtocol) {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.err = err
	close(c.ended)
}

func (c *Client) replies(r *bufio.Reader) error {
	head := make([]byte, chunkLen+8)
	for {
		if _, err := io.ReadFull(r, head[:simpleLen]); err != nil {
			return err
		}
		var err error
		switch m := binary.BigEndian.Uint32(head); m {
		case magicSimple:
			err = c.simple(r, head)
		case magicStructured:
			err = c.chunk(r, head)
		default:
			err = violated("reply magic %#x", m)
		}
		if err != nil {
			return err
		}
	}
}

// find returns the call that a cookie names.
func (c *Client) find(cookie uint64) (*call, error) {
	slot := cookie & 0xffff
	if slot >= clientSlots {
		return nil, violated("unknown cookie %#x", cookie)
	}
	k := &c.call[slot]
	if !k.live.Load() || uint64(k.gen) != cookie>>16 {
		return nil, violated("unknown cookie %#x", cookie)
	}
	return k, nil
}

func (k *call) finish(err error) {
	k.live.Store(false)
	k.done <- err
}

func (c *Client) simple(r *bufio.Reader, head []byte) error {
	k, err := c.find(binary.BigEndian.Uint64(head[8:]))
	if err != nil {
		return err
	}
	if e := Error(binary.BigEndian.Uint32(head[4:])); e != 0 {
		k.finish(e)
		return nil
	}
	if _, err := io.ReadFull(r, k.dst); err != nil {
		return err
	}
	k.finish(nil)
	return nil
}

// chunk reads one chunk of a structured reply. Only a READ may get data, and exactly as much as it asked for.
func (c *Client) chunk(r *bufio.Reader, head []byte) error {
	if _, err := io.ReadFull(r, head[simpleLen:chunkLen]); err != nil {
		return err
	}
	flags, kind := binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:])
	n := binary.BigEndian.Uint32(head[16:])
	k, err := c.find(binary.BigEndian.Uint64(head[8:]))
	if err != nil {
		return err
	}
	switch {
	case kind == chunkNone && n == 0 && flags&chunkDone != 0:
	case kind == chunkOffsetData && n > 8:
		err = k.data(r, head[chunkLen:chunkLen+8], n-8)
	case kind == chunkOffsetHole && n == 12:
		err = k.hole(r, head[chunkLen:chunkLen+8])
	case kind&chunkErrorBit != 0 && n >= 6 && n <= maxOption:
		err = k.fail(r, head[chunkLen:chunkLen+6], n)
	default:
		err = violated("chunk type %d of %d bytes", kind, n)
	}
	if err != nil || flags&chunkDone == 0 {
		return err
	}
	switch {
	case k.failed != 0:
		k.finish(k.failed)
	case k.got != len(k.dst):
		return violated("%d of %d bytes answered", k.got, len(k.dst))
	default:
		k.finish(nil)
	}
	return nil
}

// part returns the part of the call's buffer that n bytes at the offset in head are.
func (k *call) part(head []byte, n uint64) ([]byte, error) {
	off := binary.BigEndian.Uint64(head)
	if off < k.off || n > uint64(len(k.dst)) || off-k.off > uint64(len(k.dst))-n || k.got+int(n) > len(k.dst) {
		return nil, violated("data outside of the request")
	}
	k.got += int(n)
	return k.dst[off-k.off:][:n], nil
}

func (k *call) data(r *bufio.Reader, head []byte, n uint32) error {
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	p, err := k.part(head, uint64(n))
	if err != nil {
		return err
	}
	_, err = io.ReadFull(r, p)
	return err
}

func (k *call) hole(r *bufio.Reader, head []byte) error {
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	p, err := k.part(head, uint64(binary.BigEndian.Uint32(size[:])))
	clear(p)
	return err
}

func (k *call) fail(r *bufio.Reader, head []byte, n uint32) error {
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	if e := Error(binary.BigEndian.Uint32(head)); e != 0 {
		k.failed = e
	} else {
		return violated("error chunk without an error")
	}
	return discard(r, int64(n)-6)
}
