package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
	"unsafe"
)

// request is one request's header.
type request struct {
	flags  uint16
	kind   uint16
	cookie uint64
	off    uint64
	n      uint32
}

// transmission is one connection past its handshake.
type transmission struct {
	server     *Server
	conn       net.Conn
	r          *bufio.Reader
	session    Session
	info       Info
	structured bool
	small      []byte // A page for headers, of which the end is used, then smallBuffer bytes of data.
	header     [requestLen]byte
	// armed is when a deadline was last set. Setting one costs more than the rest of the bookkeeping, so a deadline is
	// moved only when it is a tenth of itself old.
	readArmed, writeArmed time.Time
}

// aligned returns a buffer of n bytes whose first byte is aligned to Align.
func aligned(n int) []byte {
	b := make([]byte, n+Align)
	skip := (Align - int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))%Align)) % Align
	return b[skip : skip+n : skip+n]
}

// AlignedBuffer returns n bytes of which the first is aligned to Align.
func AlignedBuffer(n int) []byte { return aligned(n) }

// transmit serves requests until the client leaves.
func (s *Server) transmit(conn net.Conn, r *bufio.Reader, session Session, structured bool) error {
	t := &transmission{server: s, conn: conn, r: r, session: session, info: session.Info().normal(),
		structured: structured, small: aligned(Align + smallBuffer)}
	for {
		req, err := t.next()
		switch {
		case errors.Is(err, io.EOF):
			return nil // A client may close without DISC between two requests.
		case err != nil:
			return err
		case req.kind == cmdDisc:
			return nil
		}
		if err := t.serve(req); err != nil {
			return err
		}
	}
}

// next reads a request's header.
func (t *transmission) next() (request, error) {
	if t.server.IdleTimeout > 0 && t.r.Buffered() == 0 {
		if now := time.Now(); now.Sub(t.readArmed) > t.server.IdleTimeout/10 {
			t.readArmed = now
			_ = t.conn.SetReadDeadline(now.Add(t.server.IdleTimeout))
		}
	}
	if _, err := io.ReadFull(t.r, t.header[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return request{}, io.EOF
		}
		return request{}, fmt.Errorf("read request: %w", err)
	}
	if m := binary.BigEndian.Uint32(t.header[:]); m != magicRequest {
		return request{}, violated("request magic %#x", m)
	}
	return request{
		flags:  binary.BigEndian.Uint16(t.header[4:]),
		kind:   binary.BigEndian.Uint16(t.header[6:]),
		cookie: binary.BigEndian.Uint64(t.header[8:]),
		off:    binary.BigEndian.Uint64(t.header[16:]),
		n:      binary.BigEndian.Uint32(t.header[24:]),
	}, nil
}

// serve answers one request. An error ends the connection.
func (t *transmission) serve(q request) error {
	switch q.kind {
	case cmdRead:
		return t.read(q)
	case cmdWrite:
		return t.write(q)
	case cmdFlush:
		if q.flags&^cmdFlagFUA != 0 {
			return t.answer(q, EINVAL)
		}
		return t.answer(q, wireError(t.session.Flush()))
	case cmdWriteZeroes:
		e := t.check(q, cmdFlagFUA|cmdFlagNoHole, true)
		if e == 0 {
			e = wireError(t.session.Zero(int64(q.off), int64(q.n), q.flags&cmdFlagFUA != 0))
		}
		return t.answer(q, e)
	default:
		return t.answer(q, EINVAL)
	}
}

// check judges a request that names a range.
func (t *transmission) check(q request, flags uint16, writes bool) Error {
	switch {
	case q.flags&^flags != 0:
		return EINVAL
	case writes && t.info.Flags&FlagReadOnly != 0:
		return EPERM
	case q.n == 0 || q.off%uint64(t.info.MinBlock) != 0 || q.n%t.info.MinBlock != 0:
		return EINVAL
	case q.off > t.info.Size || uint64(q.n) > t.info.Size-q.off:
		if writes {
			return ENOSPC
		}
		return EINVAL
	case q.kind != cmdWriteZeroes && q.n > MaxPayload:
		return EINVAL
	}
	return 0
}

// borrow returns a buffer for a request of n bytes: a page for headers and then data. Large ones go back by giveBack.
func (t *transmission) borrow(n uint32) []byte {
	if n <= smallBuffer {
		return t.small
	}
	select {
	case b := <-t.server.large:
		return b
	default:
		return aligned(Align + largeBuffer) // Never wait for another connection's buffer.
	}
}

func (t *transmission) giveBack(b []byte) {
	if len(b) == len(t.small) {
		return
	}
	select {
	case t.server.large <- b:
	default:
	}
}

func (t *transmission) read(q request) error {
	if e := t.check(q, cmdFlagFUA, false); e != 0 {
		return t.answer(q, e)
	}
	buf := t.borrow(q.n)
	defer t.giveBack(buf)
	room := uint32(len(buf) - Align)
	for done := uint32(0); done < q.n; {
		n := min(room, q.n-done)
		if err := t.session.Read(buf[Align:Align+n], int64(q.off)+int64(done)); err != nil {
			if done > 0 && !t.structured {
				return fmt.Errorf("read past the first piece: %w", err) // The header has promised data.
			}
			return t.answer(q, wireError(err))
		}
		head := t.dataHeader(buf[:Align], q, done, n)
		if err := t.send(buf[Align-head : Align+n]); err != nil {
			return err
		}
		done += n
	}
	return nil
}

// dataHeader puts the header of a piece of data at the end of page and returns its length; 0 for the later pieces of a
// simple reply.
func (t *transmission) dataHeader(page []byte, q request, done, n uint32) int {
	if !t.structured {
		if done > 0 {
			return 0
		}
		putSimple(page[Align-simpleLen:], 0, q.cookie)
		return simpleLen
	}
	const length = chunkLen + 8
	flags := uint16(0)
	if done+n == q.n {
		flags = chunkDone
	}
	b := page[Align-length:]
	putChunk(b, flags, chunkOffsetData, q.cookie, n+8)
	binary.BigEndian.PutUint64(b[chunkLen:], q.off+uint64(done))
	return length
}

func putSimple(b []byte, e Error, cookie uint64) {
	binary.BigEndian.PutUint32(b, magicSimple)
	binary.BigEndian.PutUint32(b[4:], uint32(e))
	binary.BigEndian.PutUint64(b[8:], cookie)
}

func putChunk(b []byte, flags, kind uint16, cookie uint64, n uint32) {
	binary.BigEndian.PutUint32(b, magicStructured)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], n)
}

func (t *transmission) write(q request) error {
	if e := t.check(q, cmdFlagFUA, true); e != 0 {
		if q.n > 2*MaxPayload {
			return violated("write of %d bytes", q.n)
		}
		if err := t.payload(nil, int64(q.n)); err != nil {
			return err
		}
		return t.answer(q, e)
	}
	buf := t.borrow(q.n)
	defer t.giveBack(buf)
	room := uint32(len(buf) - Align)
	for done := uint32(0); done < q.n; {
		piece := buf[Align : Align+min(room, q.n-done)]
		if err := t.payload(piece, 0); err != nil {
			return err
		}
		err := t.session.Write(piece, int64(q.off)+int64(done), q.flags&cmdFlagFUA != 0)
		done += uint32(len(piece))
		if err != nil {
			if err := t.payload(nil, int64(q.n-done)); err != nil {
				return err
			}
			return t.answer(q, wireError(err))
		}
	}
	return t.answer(q, 0)
}

// payload fills p from the connection, or reads skip bytes off, within the transfer's time.
func (t *transmission) payload(p []byte, skip int64) error {
	if t.r.Buffered() < len(p) || skip > 0 {
		now := time.Now()
		_ = t.conn.SetReadDeadline(now.Add(t.server.TransferTimeout))
		t.readArmed = time.Time{}
		defer func() {
			if t.server.IdleTimeout == 0 {
				_ = t.conn.SetReadDeadline(time.Time{})
			}
		}()
	}
	if _, err := io.ReadFull(t.r, p); err != nil {
		return fmt.Errorf("read payload: %w", err)
	}
	if skip == 0 {
		return nil
	}
	if err := discard(t.r, skip); err != nil {
		return fmt.Errorf("read payload off: %w", err)
	}
	return nil
}

// answer sends a reply without data. In structured mode a READ gets a chunk, everything else may stay simple.
func (t *transmission) answer(q request, e Error) error {
	page := t.small[:Align]
	if !t.structured || q.kind != cmdRead {
		putSimple(page, e, q.cookie)
		return t.send(page[:simpleLen])
	}
	putChunk(page, chunkDone, chunkError, q.cookie, 6)
	binary.BigEndian.PutUint32(page[chunkLen:], uint32(e))
	binary.BigEndian.PutUint16(page[chunkLen+4:], 0)
	return t.send(page[:chunkLen+6])
}

func (t *transmission) send(b []byte) error {
	if now := time.Now(); now.Sub(t.writeArmed) > t.server.TransferTimeout/10 {
		t.writeArmed = now
		_ = t.conn.SetWriteDeadline(now.Add(t.server.TransferTimeout))
	}
	if _, err := t.conn.Write(b); err != nil {
		return fmt.Errorf("send reply: %w", err)
	}
	return nil
}
