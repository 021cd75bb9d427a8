// Package nbd is a server and a client of the Network Block Device protocol (doc/proto.md of the NBD project), in the
// subset that the HA statefile needs: fixed newstyle handshake, TLS, simple and structured replies, and READ, WRITE,
// FLUSH, WRITE_ZEROES and DISC with FUA.
//
// Promised: a request is answered only after the session behind the export answered; requests of one connection run in
// their order, one at a time; a connection that stalls delays no other. Not promised: any order between connections.
package nbd

import (
	"errors"
	"fmt"
	"io"
	"syscall"
)

// Magic numbers of the wire (doc/proto.md).
const (
	magicGreeting   uint64 = 0x4e42444d41474943 // "NBDMAGIC".
	magicOption     uint64 = 0x49484156454F5054 // "IHAVEOPT".
	magicReply      uint64 = 0x0003e889045565a9
	magicRequest    uint32 = 0x25609513
	magicSimple     uint32 = 0x67446698
	magicStructured uint32 = 0x668e33ef
)

// Handshake flags, of the server and of the client.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options a client may send.
const (
	optExportName      uint32 = 1
	optAbort           uint32 = 2
	optList            uint32 = 3
	optStartTLS        uint32 = 5
	optInfo            uint32 = 6
	optGo              uint32 = 7
	optStructuredReply uint32 = 8
)

// Types of an option's reply.
const (
	repAck     uint32 = 1
	repServer  uint32 = 2
	repInfo    uint32 = 3
	repErrBit  uint32 = 1 << 31
	repUnsup          = repErrBit | 1
	repPolicy         = repErrBit | 2
	repInvalid        = repErrBit | 3
	repTLSReqd        = repErrBit | 5
	repUnknown        = repErrBit | 6
	repShut           = repErrBit | 7
	repTooBig         = repErrBit | 9

	infoExport    uint16 = 0
	infoBlockSize uint16 = 3
)

// Transmission flags of an export.
const (
	FlagHasFlags    uint16 = 1 << 0
	FlagReadOnly    uint16 = 1 << 1
	FlagFlush       uint16 = 1 << 2
	FlagFUA         uint16 = 1 << 3
	FlagWriteZeroes uint16 = 1 << 6
	FlagMultiConn   uint16 = 1 << 8
)

// Commands and their flags.
const (
	cmdRead        uint16 = 0
	cmdWrite       uint16 = 1
	cmdDisc        uint16 = 2
	cmdFlush       uint16 = 3
	cmdWriteZeroes uint16 = 6

	cmdFlagFUA    uint16 = 1 << 0
	cmdFlagNoHole uint16 = 1 << 1
)

// Types of a structured reply's chunk.
const (
	chunkDone       uint16 = 1 << 0
	chunkNone       uint16 = 0
	chunkOffsetData uint16 = 1
	chunkOffsetHole uint16 = 2
	chunkErrorBit   uint16 = 1 << 15
	chunkError             = chunkErrorBit | 1
	chunkErrorOff          = chunkErrorBit | 2
)

// Limits of doc/proto.md and our own.
const (
	// MaxPayload is the largest read or write, in bytes; the protocol's default limit, which a server should not go under.
	MaxPayload = 32 << 20
	maxName    = 4096     // Bytes in an export's name.
	maxOption  = 64 << 10 // An option's data is kept up to this, read off up to maxDrain.
	maxDrain   = 1 << 20
	maxOptions = 256 // In one handshake.
	// Align is the alignment in bytes of every buffer given to a Session, enough for O_DIRECT.
	Align = 4096

	requestLen    = 28
	simpleLen     = 16
	chunkLen      = 20
	smallBuffer   = 16 << 10
	largeBuffer   = 256 << 10
	readerBuffer  = 8 << 10
	largeIdleBufs = 4 // Large buffers kept for reuse.
)

// Error is an error number of the protocol, as a request's answer carries it.
type Error uint32

// The protocol's errors. Their values are Linux errno values on purpose.
const (
	EPERM     Error = 1
	EIO       Error = 5
	ENOMEM    Error = 12
	EINVAL    Error = 22
	ENOSPC    Error = 28
	EOVERFLOW Error = 75
	ENOTSUP   Error = 95
	ESHUTDOWN Error = 108
)

// Error names the number as errno does.
func (e Error) Error() string { return "nbd: " + syscall.Errno(e).Error() }

// wireError maps what a Session returned to what may be sent: errno values of the protocol as they are, all else EIO.
func wireError(err error) Error {
	if err == nil {
		return 0
	}
	var own Error
	if errors.As(err, &own) {
		return own
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		switch e := Error(no); e {
		case EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN:
			return e
		}
	}
	return EIO
}

// Refusal is why a server does not open an export, or why it did not open ours. It crosses the wire.
type Refusal struct {
	Code    RefusalCode
	Message string // For people, or a hint to a peer of ours. At most 4096 bytes are sent.
}

// RefusalCode is an error type of the handshake.
type RefusalCode uint32

// The refusals that have a meaning for us.
const (
	Unsupported RefusalCode = RefusalCode(repUnsup)
	Policy      RefusalCode = RefusalCode(repPolicy)
	Invalid     RefusalCode = RefusalCode(repInvalid)
	TLSRequired RefusalCode = RefusalCode(repTLSReqd)
	Unknown     RefusalCode = RefusalCode(repUnknown)
	Shutdown    RefusalCode = RefusalCode(repShut)
	TooBig      RefusalCode = RefusalCode(repTooBig)
)

// String names the code as doc/proto.md does.
func (c RefusalCode) String() string {
	switch c {
	case Unsupported:
		return "unsupported"
	case Policy:
		return "policy"
	case Invalid:
		return "invalid"
	case TLSRequired:
		return "tls-required"
	case Unknown:
		return "unknown-export"
	case Shutdown:
		return "shutting-down"
	case TooBig:
		return "too-big"
	default:
		return fmt.Sprintf("error-%#x", uint32(c))
	}
}

// Error says what the server refused and why.
func (r *Refusal) Error() string {
	if r.Message == "" {
		return "nbd server refuses: " + r.Code.String()
	}
	return "nbd server refuses: " + r.Code.String() + ": " + r.Message
}

// ErrProtocol is wrapped by every error that means the other side broke the protocol.
var ErrProtocol = errors.New("nbd protocol violated")

func violated(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}

// Info is what a client learns of an export.
type Info struct {
	Size      uint64 // Bytes.
	Flags     uint16 // Transmission flags; FlagHasFlags is always sent.
	MinBlock  uint32 // Smallest request and alignment in bytes, a power of two up to 64 KiB; 0 means 1.
	Preferred uint32 // Bytes; 0 means 4096.
	MaxBlock  uint32 // Bytes; 0 means MaxPayload.
}

func (i Info) normal() Info {
	i.Flags |= FlagHasFlags
	if i.MinBlock == 0 {
		i.MinBlock = 1
	}
	if i.Preferred == 0 {
		i.Preferred = 4096
	}
	if i.MaxBlock == 0 {
		i.MaxBlock = MaxPayload
	}
	return i
}

// discard reads n bytes off r.
func discard(r io.Reader, n int64) error {
	_, err := io.CopyN(io.Discard, r, n)
	return err
}
