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
	"slices"
	"sync"
	"time"
)

// Peer is who is at the other end of a connection.
type Peer struct {
	Conn net.Conn // The connection as accepted, below TLS. Not to be read or written.
	// Name is the common name of the client's certificate, which has been verified; "" without TLS.
	Name string
}

// Exports is what a server serves. Its methods may be called from many goroutines.
type Exports interface {
	// List names the exports.
	List(p Peer) []string
	// Stat describes an export without opening it. A *Refusal is sent as it is, any other error as Unknown.
	Stat(name string, p Peer) (Info, error)
	// Open starts a session on an export. It may wait until ctx, which ends with the connection. Errors as with Stat.
	Open(ctx context.Context, name string, p Peer) (Session, error)
}

// Session is one client's use of one export. The server calls its methods one at a time. Buffers are aligned to Align;
// offsets and lengths are in bytes, multiples of the block size, inside the export and never 0. An Error or an errno of
// the protocol is sent as it is, any other error as EIO.
type Session interface {
	// Info is called once, before the first request.
	Info() Info
	// Read fills p from off.
	Read(p []byte, off int64) error
	// Write stores p at off; with fua it is on stable storage when Write returns.
	Write(p []byte, off int64, fua bool) error
	// Zero makes n bytes at off read as zeroes.
	Zero(off, n int64, fua bool) error
	// Flush makes what was written before stable.
	Flush() error
	// Close ends the session. It is called once.
	Close()
}

// Server answers NBD clients. The zero value of each optional field means the default.
type Server struct {
	Exports Exports
	// TLS is required of every client when set; nil serves in clear.
	TLS *tls.Config
	// HandshakeTimeout bounds everything before the first request: default 10 s.
	HandshakeTimeout time.Duration
	// IdleTimeout is how long a client may send no request; 0 is for ever (the kernel's keepalive finds dead hosts).
	IdleTimeout time.Duration
	// TransferTimeout bounds the rest of a request that has begun, and its reply: default 10 s.
	TransferTimeout time.Duration
	// MaxConns is how many connections are served at once; more are closed at once: default 256.
	MaxConns int

	once    sync.Once
	large   chan []byte
	slots   chan struct{}
	running sync.WaitGroup
}

func (s *Server) init() {
	s.once.Do(func() {
		if s.HandshakeTimeout == 0 {
			s.HandshakeTimeout = 10 * time.Second
		}
		if s.TransferTimeout == 0 {
			s.TransferTimeout = 10 * time.Second
		}
		if s.MaxConns == 0 {
			s.MaxConns = 256
		}
		s.large = make(chan []byte, largeIdleBufs)
		s.slots = make(chan struct{}, s.MaxConns)
	})
}

// Serve accepts connections until ctx ends or l fails, and returns after every connection has ended. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	ctx, cancel := context.WithCancel(ctx)
	defer s.running.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			l.Close()
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept nbd client: %w", err)
		}
		select {
		case s.slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		s.running.Add(1)
		go func() {
			defer s.running.Done()
			defer func() { <-s.slots }()
			_ = s.ServeConn(ctx, conn) // How a client ended is its own affair; the session was closed.
		}()
	}
}

// ServeConn serves one client on conn until it leaves, errs or ctx ends, and closes conn. A client that left in good
// order is no error.
func (s *Server) ServeConn(ctx context.Context, conn net.Conn) error {
	s.init()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	noDelay(conn)
	h := &handshake{server: s, peer: Peer{Conn: conn}, conn: conn, r: bufio.NewReaderSize(conn, readerBuffer)}
	_ = conn.SetDeadline(time.Now().Add(s.HandshakeTimeout))
	session, err := h.run(ctx)
	if err != nil || session == nil {
		return err
	}
	defer session.Close()
	_ = conn.SetDeadline(time.Time{})
	return s.transmit(h.conn, h.r, session, h.structured)
}

// Transmit serves requests on conn without any handshake, as a socket needs that is handed to the kernel's client. It
// closes conn and session.
func (s *Server) Transmit(ctx context.Context, conn net.Conn, session Session) error {
	s.init()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer session.Close()
	return s.transmit(conn, bufio.NewReaderSize(conn, readerBuffer), session, false)
}

func noDelay(conn net.Conn) {
	if t, ok := conn.(*net.TCPConn); ok {
		_ = t.SetNoDelay(true) // Go's default, stated because latency depends on it.
		_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3})
	}
}

// handshake is the state of one negotiation.
type handshake struct {
	server     *Server
	peer       Peer
	conn       net.Conn // TLS after STARTTLS.
	r          *bufio.Reader
	noZeroes   bool
	secured    bool
	structured bool
	scratch    [20]byte
}

// run negotiates until a session is open. A nil session without an error is a client that said ABORT.
func (h *handshake) run(ctx context.Context) (Session, error) {
	greeting := make([]byte, 0, 18)
	greeting = binary.BigEndian.AppendUint64(greeting, magicGreeting)
	greeting = binary.BigEndian.AppendUint64(greeting, magicOption)
	greeting = binary.BigEndian.AppendUint16(greeting, flagFixedNewstyle|flagNoZeroes)
	if _, err := h.conn.Write(greeting); err != nil {
		return nil, fmt.Errorf("send greeting: %w", err)
	}
	if _, err := io.ReadFull(h.r, h.scratch[:4]); err != nil {
		return nil, fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(h.scratch[:4])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return nil, violated("client flags %#x", flags)
	}
	h.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		opt, data, big, err := h.next()
		if err != nil {
			return nil, err
		}
		if big {
			if err := h.reply(opt, repTooBig, nil); err != nil {
				return nil, err
			}
			continue
		}
		session, done, err := h.option(ctx, opt, data)
		if err != nil || done {
			return session, err
		}
	}
	return nil, violated("more than %d options", maxOptions)
}

// next reads one option; big says that its data was too long and has been read off.
func (h *handshake) next() (opt uint32, data []byte, big bool, err error) {
	if _, err := io.ReadFull(h.r, h.scratch[:16]); err != nil {
		return 0, nil, false, fmt.Errorf("read option: %w", err)
	}
	if m := binary.BigEndian.Uint64(h.scratch[:8]); m != magicOption {
		return 0, nil, false, violated("option magic %#x", m)
	}
	opt = binary.BigEndian.Uint32(h.scratch[8:12])
	n := binary.BigEndian.Uint32(h.scratch[12:16])
	if n > maxDrain {
		return 0, nil, false, violated("option %d of %d bytes", opt, n)
	}
	if n > maxOption {
		return opt, nil, true, discard(h.r, int64(n))
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return 0, nil, false, fmt.Errorf("read option data: %w", err)
	}
	return opt, data, false, nil
}

// option answers one option; done ends the handshake.
func (h *handshake) option(ctx context.Context, opt uint32, data []byte) (s Session, done bool, err error) {
	if h.server.TLS != nil && !h.secured {
		switch opt {
		case optStartTLS, optAbort:
		case optExportName:
			return nil, true, violated("EXPORT_NAME without TLS")
		default:
			return nil, false, h.reply(opt, repTLSReqd, []byte("this server needs TLS"))
		}
	}
	switch opt {
	case optExportName:
		s, err = h.exportName(ctx, string(data))
		return s, true, err
	case optAbort:
		_ = h.reply(opt, repAck, nil) // The client may have closed without reading it.
		return nil, true, nil
	case optList:
		return nil, false, h.list(data)
	case optStartTLS:
		return nil, false, h.startTLS(ctx, data)
	case optInfo, optGo:
		s, err = h.infoOrGo(ctx, opt, data)
		return s, s != nil, err
	case optStructuredReply:
		if len(data) != 0 {
			return nil, false, h.reply(opt, repInvalid, []byte("no data expected"))
		}
		h.structured = true
		return nil, false, h.reply(opt, repAck, nil)
	default:
		return nil, false, h.reply(opt, repUnsup, nil)
	}
}

// reply sends one option reply.
func (h *handshake) reply(opt, kind uint32, data []byte) error {
	if len(data) > maxName {
		data = data[:maxName]
	}
	b := make([]byte, 0, 20+len(data))
	b = binary.BigEndian.AppendUint64(b, magicReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := h.conn.Write(append(b, data...)); err != nil {
		return fmt.Errorf("send option reply: %w", err)
	}
	return nil
}

func (h *handshake) refuse(opt uint32, err error) error {
	var r *Refusal
	if errors.As(err, &r) {
		return h.reply(opt, uint32(r.Code), []byte(r.Message))
	}
	return h.reply(opt, repUnknown, []byte(err.Error()))
}

// exportName answers the oldest way to open an export. It knows no refusal: the connection is closed.
func (h *handshake) exportName(ctx context.Context, name string) (Session, error) {
	s, err := h.server.Exports.Open(ctx, name, h.peer)
	if err != nil {
		return nil, fmt.Errorf("open export: %w", err)
	}
	i := s.Info().normal()
	b := make([]byte, 0, 134)
	b = binary.BigEndian.AppendUint64(b, i.Size)
	b = binary.BigEndian.AppendUint16(b, i.Flags)
	if !h.noZeroes {
		b = b[:134]
	}
	if _, err := h.conn.Write(b); err != nil {
		s.Close()
		return nil, fmt.Errorf("send export: %w", err)
	}
	return s, nil
}

func (h *handshake) list(data []byte) error {
	if len(data) != 0 {
		return h.reply(optList, repInvalid, []byte("LIST takes no data"))
	}
	for _, name := range h.server.Exports.List(h.peer) {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		if err := h.reply(optList, repServer, append(b, name...)); err != nil {
			return err
		}
	}
	return h.reply(optList, repAck, nil)
}

func (h *handshake) startTLS(ctx context.Context, data []byte) error {
	switch {
	case len(data) != 0:
		return h.reply(optStartTLS, repInvalid, []byte("STARTTLS takes no data"))
	case h.server.TLS == nil:
		return h.reply(optStartTLS, repPolicy, []byte("this server has no TLS"))
	case h.secured:
		return h.reply(optStartTLS, repInvalid, []byte("TLS is on"))
	}
	if h.r.Buffered() != 0 {
		return violated("bytes in clear behind STARTTLS")
	}
	if err := h.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	secure := tls.Server(h.conn, h.server.TLS)
	if err := secure.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	if certs := secure.ConnectionState().PeerCertificates; len(certs) > 0 {
		h.peer.Name = certs[0].Subject.CommonName
	}
	h.conn, h.r, h.secured = secure, bufio.NewReaderSize(secure, readerBuffer), true
	h.structured = false // What was negotiated in clear is forgotten.
	return nil
}

// parseInfo takes the data of INFO and GO apart.
func parseInfo(data []byte) (name string, wants []uint16, ok bool) {
	if len(data) < 6 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if n > maxName || int64(n) > int64(len(data))-6 {
		return "", nil, false
	}
	name, data = string(data[4:4+n]), data[4+n:]
	count := int(binary.BigEndian.Uint16(data))
	if len(data) != 2+2*count {
		return "", nil, false
	}
	for i := range count {
		wants = append(wants, binary.BigEndian.Uint16(data[2+2*i:]))
	}
	return name, wants, true
}

// infoOrGo answers INFO and GO. Only GO returns a session. The block size is always told: a client that did not ask may
// ignore it, and one that ignores it gets EINVAL for what does not fit.
func (h *handshake) infoOrGo(ctx context.Context, opt uint32, data []byte) (Session, error) {
	name, _, ok := parseInfo(data)
	if !ok {
		return nil, h.reply(opt, repInvalid, []byte("malformed"))
	}
	var session Session
	var i Info
	var err error
	if opt == optGo {
		if session, err = h.server.Exports.Open(ctx, name, h.peer); err == nil {
			i = session.Info()
		}
	} else {
		i, err = h.server.Exports.Stat(name, h.peer)
	}
	if err != nil {
		return nil, h.refuse(opt, err)
	}
	if err := h.describe(opt, i.normal()); err != nil {
		if session != nil {
			session.Close()
		}
		return nil, err
	}
	return session, nil
}

func (h *handshake) describe(opt uint32, i Info) error {
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, i.Size)
	b = binary.BigEndian.AppendUint16(b, i.Flags)
	if err := h.reply(opt, repInfo, b); err != nil {
		return err
	}
	b = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	for _, v := range []uint32{i.MinBlock, i.Preferred, i.MaxBlock} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	if err := h.reply(opt, repInfo, b); err != nil {
		return err
	}
	return h.reply(opt, repAck, nil)
}

// Single serves one session under one name to one client after the other; handy for tests and tools.
type Single struct {
	Name    string
	Session Session
}

// List names the one export.
func (o Single) List(Peer) []string { return []string{o.Name} }

// Stat describes the export.
func (o Single) Stat(name string, _ Peer) (Info, error) {
	if !slices.Contains([]string{o.Name, ""}, name) {
		return Info{}, &Refusal{Code: Unknown, Message: "no such export"}
	}
	return o.Session.Info(), nil
}

// Open returns the session; the empty name is the default export.
func (o Single) Open(_ context.Context, name string, p Peer) (Session, error) {
	if _, err := o.Stat(name, p); err != nil {
		return nil, err
	}
	return o.Session, nil
}
