package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"testing"
	"time"
)

// scripted is a connection that reads from a fixed input and swallows what is written.
type scripted struct {
	net.Conn
	in *bytes.Reader
}

func (s scripted) Read(p []byte) (int, error)       { return s.in.Read(p) }
func (s scripted) Write(p []byte) (int, error)      { return len(p), nil }
func (s scripted) Close() error                     { return nil }
func (s scripted) SetDeadline(time.Time) error      { return nil }
func (s scripted) SetReadDeadline(time.Time) error  { return nil }
func (s scripted) SetWriteDeadline(time.Time) error { return nil }

func words(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		if s, ok := p.(string); ok {
			b.WriteString(s)
		} else {
			_ = binary.Write(&b, binary.BigEndian, p)
		}
	}
	return b.Bytes()
}

// The session behind the server checks that it never gets a request outside of the export.
func FuzzServer(f *testing.F) {
	open := words(uint32(3), magicOption, optGo, uint32(6), uint32(0), uint16(0))
	f.Add(open)
	f.Add(words(uint32(1), magicOption, optExportName, uint32(0)))
	f.Add(words(uint32(3), magicOption, optList, uint32(0), magicOption, optStartTLS, uint32(0), magicOption, uint32(9), uint32(3), "abc"))
	f.Add(append(bytes.Clone(open), words(magicRequest, uint16(1), cmdWrite, uint64(1), uint64(512), uint32(512), string(make([]byte, 512)),
		magicRequest, uint16(0), cmdRead, uint64(2), uint64(0), uint32(4096), magicRequest, uint16(0), cmdWriteZeroes, uint64(3), uint64(0), uint32(1024),
		magicRequest, uint16(0), cmdDisc, uint64(4), uint64(0), uint32(0))...))
	f.Add(append(words(uint32(3), magicOption, optStructuredReply, uint32(0)), append(open[4:], words(magicRequest, uint16(0), cmdRead, uint64(2), uint64(1<<63), uint32(512))...)...))
	f.Fuzz(func(t *testing.T, in []byte) {
		m := newMemory(t, 64<<10)
		_ = (&Server{Exports: Single{"", m}}).ServeConn(context.Background(), scripted{in: bytes.NewReader(in)})
		if m.closed > 1 {
			t.Errorf("session closed %d times", m.closed)
		}
	})
}

// A hostile server must not make the client's handshake panic or hang.
func FuzzClientHandshake(f *testing.F) {
	f.Add(hello())
	f.Add(words(magicGreeting, magicOption, uint16(3), magicReply, optGo, repUnknown, uint32(2), "no"))
	f.Add(words(magicGreeting, magicOption, uint16(1), magicReply, optGo, repInfo, uint32(14), infoBlockSize, uint32(1), uint32(2), uint32(3)))
	f.Fuzz(func(t *testing.T, in []byte) {
		if c, err := Connect(t.Context(), scripted{in: bytes.NewReader(in)}, Options{}); err == nil {
			c.Close()
		}
	})
}

func hello() []byte {
	return words(magicGreeting, magicOption, uint16(3), magicReply, optGo, repInfo, uint32(12), infoExport, uint64(1<<20), uint16(1),
		magicReply, optGo, repAck, uint32(0))
}

// answering is a server that greets and then answers the first request with a fixed input.
type answering struct {
	scripted
	greeting *bytes.Reader
	asked    chan struct{} // Gets a value for each write of the client: flags, GO, request.
}

func (a answering) Write(p []byte) (int, error) { a.asked <- struct{}{}; return len(p), nil }

func (a answering) Read(p []byte) (int, error) {
	if a.greeting.Len() > 0 {
		return a.greeting.Read(p)
	}
	if len(a.asked) < 3 {
		for range 3 {
			<-a.asked
		}
		for range 3 {
			a.asked <- struct{}{}
		}
	}
	return a.in.Read(p)
}

// A hostile server must not make the client panic, hang, or write outside of the request's buffer.
func FuzzClientReplies(f *testing.F) {
	cookie := uint64(1) << 16
	f.Add(words(magicSimple, uint32(0), cookie, string(make([]byte, 512))))
	f.Add(words(magicSimple, uint32(5), cookie))
	f.Add(words(magicStructured, chunkDone, chunkOffsetData, cookie, uint32(8+512), uint64(512), string(make([]byte, 512))))
	f.Add(words(magicStructured, uint16(0), chunkOffsetHole, cookie, uint32(12), uint64(768), uint32(256),
		magicStructured, chunkDone, chunkError, cookie, uint32(6), uint32(5), uint16(0)))
	f.Fuzz(func(t *testing.T, in []byte) {
		conn := answering{scripted{in: bytes.NewReader(in)}, bytes.NewReader(hello()), make(chan struct{}, 8)}
		c, err := Connect(t.Context(), conn, Options{})
		if err != nil {
			t.Fatal(err)
		}
		guarded := make([]byte, 512+64)
		for i := range guarded[512:] {
			guarded[512+i] = 0xAA
		}
		_ = c.Read(guarded[:512:512], 512, time.Minute)
		c.Close()
		if !bytes.Equal(guarded[512:], bytes.Repeat([]byte{0xAA}, 64)) {
			t.Error("the client wrote behind its buffer")
		}
	})
}
