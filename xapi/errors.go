package xapi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"syscall"
	"time"
)

// Codes of XAPI that this package itself acts on (ocaml/idl/datamodel_errors.ml).
const (
	codeSessionInvalid   = "SESSION_INVALID"
	codeHostIsSlave      = "HOST_IS_SLAVE"
	codeMapDuplicateKey  = "MAP_DUPLICATE_KEY"
	codePermissionDenied = "PERMISSION_DENIED"
	codeRBACDenied       = "RBAC_PERMISSION_DENIED"
	codeMethodUnknown    = "MESSAGE_METHOD_UNKNOWN"
	codeMessageRemoved   = "MESSAGE_REMOVED"
)

var (
	// ErrClosed is returned by every call on a Client after Close.
	ErrClosed = errors.New("xapi client is closed")
	// ErrNoSMSession is matched by the error of a storage setter when XAPI refuses this session the right to write the
	// sizes of an SR or VDI. Nothing can be done about it by trying again; SRUpdate is the sanctioned way.
	ErrNoSMSession = errors.New("xapi refuses storage writes from this session")
	// ErrRequestTooLarge is matched when a request is over MaxRequest, which XAPI would refuse.
	ErrRequestTooLarge = errors.New("request is over XAPI's size limit")
)

// Error is XAPI's refusal of a call.
type Error struct {
	Code   string   // Code is XAPI's error code, such as HANDLE_INVALID.
	Params []string // Params are the code's parameters in XAPI's order; their meaning depends on the code.
	Method string   // Method is the call that failed, such as SR.update.
}

// Error gives method, code and parameters in one line.
func (e *Error) Error() string {
	if len(e.Params) == 0 {
		return fmt.Sprintf("call %s: %s", e.Method, e.Code)
	}
	return fmt.Sprintf("call %s: %s [%s]", e.Method, e.Code, strings.Join(e.Params, "; "))
}

// IsCode tells whether err is, or wraps, an *Error with one of the codes.
func IsCode(err error, codes ...string) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range codes {
		if e.Code == c {
			return true
		}
	}
	return false
}

// TransportError tells that no valid answer came back: the socket is missing, the connection broke, the deadline passed, or
// what answered is not XAPI. The call may have been carried out all the same.
type TransportError struct {
	Method string // Method is the call that was made.
	Target string // Target is the socket path or host:port that was called.
	Hint   string // Hint tells the operator what to check; empty when there is nothing to say.
	Err    error  // Err is the cause.

	answered bool // answered tells that a whole reply came, which could not be used.
}

// Error gives method, target, cause and hint in one line.
func (e *TransportError) Error() string {
	s := fmt.Sprintf("call %s on %s: %v", e.Method, e.Target, e.Err)
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Unwrap gives the cause.
func (e *TransportError) Unwrap() error { return e.Err }

// hintedError carries a hint from the place that knows it to the TransportError that shows it.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() }
func (e *hintedError) Unwrap() error { return e.err }

const (
	hintNotRunning = "is xapi running? systemctl status xapi"
	hintNotXAPI    = "check that the address is XAPI's own and no proxy or web page stands in front of it"
)

// hintFor finds what an operator should check for an error of the transport.
func hintFor(err error, unix bool, limit time.Duration) string {
	var hinted *hintedError
	var unknownCA x509.UnknownAuthorityError
	var wrongName x509.HostnameError
	var dns *net.DNSError
	switch {
	case errors.As(err, &hinted):
		return hinted.hint
	case errors.Is(err, context.Canceled):
		return ""
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("no answer within %s; %s", limit, hintNotRunning)
	case unix && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
		return hintNotRunning
	case errors.Is(err, fs.ErrPermission):
		return "XAPI's socket is for root only: run as root"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "is the host up and is port 443 open to this machine?"
	case errors.As(err, &dns):
		return "check the host name in the URL"
	case errors.As(err, &unknownCA), errors.As(err, &wrongName):
		return "XCP-ng's certificate is self-signed by default: pass its CA in the TLS settings"
	}
	return ""
}
