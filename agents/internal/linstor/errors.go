package linstor

import (
	"errors"
	"fmt"
	"strings"

	golinstor "github.com/LINBIT/golinstor"
)

// Code is a LINSTOR return code or a mask of one: the code proper in bits 0-14, the severity in bits 62-63.
// It is an error, so that errors.Is(err, linstor.FailInUse) asks an APIError for it. A Code without severity bits
// compares the number alone. Source: consts.json of linstor-common, through golinstor.
type Code uint64

// The return codes that the agents decide on.
const (
	FailInvalidVolumeSize     Code = golinstor.FailInvldVlmSize // From 1.33 on also "not enough free space" of a toggle.
	FailNotFoundNode          Code = golinstor.FailNotFoundNode
	FailNotFoundDefinition    Code = golinstor.FailNotFoundRscDfn
	FailNotFoundResource      Code = golinstor.FailNotFoundRsc
	FailNotFoundKV            Code = golinstor.FailNotFoundKvs
	FailNotFoundGroup         Code = golinstor.FailNotFoundRscGrp
	FailExistsResource        Code = golinstor.FailExistsRsc
	FailNotEnoughFreeSpace    Code = golinstor.FailNotEnoughFreeSpace
	FailInsufficientReplicas  Code = golinstor.FailInsufficientReplicaCount
	FailBusy                  Code = golinstor.FailRscBusy
	FailInsufficientPeerSlots Code = golinstor.FailInsufficientPeerSlots
	FailNotConnected          Code = golinstor.FailNotConnected
	FailNotEnoughNodes        Code = golinstor.FailNotEnoughNodes
	FailInUse                 Code = golinstor.FailInUse
	WarnNotConnected          Code = golinstor.WarnNotConnected   // 1002: stored, the satellite has not got it.
	WarnSatelliteNotUpdated   Code = golinstor.WarnStltNotUpdated // 1003: its full synchronisation failed.
	WarnAlreadyHasDisk        Code = golinstor.WarnRscAlreadyHasDisk
	WarnAlreadyDiskless       Code = golinstor.WarnRscAlreadyDiskless
	WarnNotFound              Code = golinstor.WarnNotFound // A delete of what is not there.
	InfoTieBreakerTakeover    Code = golinstor.InfoTieBreakerTakeover
	InfoNoop                  Code = golinstor.InfoNoop // 10007, shared with another meaning.
	InfoResourceAlreadyExists Code = golinstor.InfoRscAlreadyExists
)

const (
	severityBits  Code = golinstor.MaskBitsType
	severityError Code = golinstor.MaskError
	severityWarn  Code = golinstor.MaskWarn
	severityInfo  Code = golinstor.MaskInfo
	numberBits    Code = golinstor.MaskBitsCode
)

// Number is the code without severity, operation and object bits, for example 997.
func (c Code) Number() int { return int(c & numberBits) }

// Error makes a Code usable as a target of errors.Is.
func (c Code) Error() string { return fmt.Sprintf("linstor %s code %d", c.severity(), c.Number()) }

func (c Code) severity() string {
	switch c & severityBits {
	case severityError:
		return "error"
	case severityWarn:
		return "warning"
	case severityInfo:
		return "info"
	default:
		return "success"
	}
}

func (c Code) matches(want Code) bool {
	if c&numberBits != want&numberBits {
		return false
	}
	return want&severityBits == 0 || c&severityBits == want&severityBits
}

// Entry is one line of an answer: LINSTOR's ApiCallRc.
type Entry struct {
	RetCode        int64             `json:"ret_code"` // Negative for errors and warnings: the severity is in the top bits.
	Message        string            `json:"message"`
	Cause          string            `json:"cause"`
	Details        string            `json:"details"`
	Correction     string            `json:"correction"`
	ErrorReportIDs []string          `json:"error_report_ids"`
	ObjRefs        map[string]string `json:"obj_refs"`
	CreatedAt      string            `json:"created_at"` // ISO time with offset, newer controllers only.
}

// Code returns ret_code as a Code.
func (e Entry) Code() Code { return Code(uint64(e.RetCode)) }

// IsError says whether the entry reports a failure.
func (e Entry) IsError() bool { return e.Code()&severityBits == severityError }

// IsWarning says whether the entry is a warning, such as 1002 "stored, satellite not connected".
func (e Entry) IsWarning() bool { return e.Code()&severityBits == severityWarn }

// Sentinels for errors.Is.
var (
	// ErrNoController matches *NoControllerError: none of the configured addresses is a healthy controller.
	ErrNoController = errors.New("no linstor controller")
	// ErrNotFound matches an answer whose return code is 300-399: LINSTOR itself says that the object does not
	// exist. A bare 404 (a proxy, a path that this version lacks) does not match: unknown is not absent.
	ErrNotFound = errors.New("not found in linstor")
	// ErrExists matches an answer that says the object is there already, whatever its HTTP status.
	ErrExists = errors.New("exists in linstor")
	// ErrUncertain matches a mutation whose answer was lost: it may or may not have been carried out. It was not
	// sent again; read the object back before deciding.
	ErrUncertain = errors.New("outcome unknown")
	// ErrMalformed matches an answer that is not what LINSTOR sends: HTML, broken JSON, wrong types.
	ErrMalformed = errors.New("malformed answer")
	// ErrTooLarge matches an answer above Options.MaxResponseBytes.
	ErrTooLarge = errors.New("answer too large")
)

// APIError is a refusal by the controller. Decide on its codes with errors.Is(err, code), never on Status: LINSTOR
// answers 500 for "exists", "in use", "busy" and "no space" alike.
type APIError struct {
	Status       int // HTTP status; 200 when the body of a formal success carries an error entry.
	Entries      []Entry
	Method, Path string
	Controller   string // Base URL that answered.
	Text         string // First line of a body that is no list of entries (proxy, HTML), at most 160 bytes.
}

// Error is one line: the call, the status, and LINSTOR's first complaint.
func (e *APIError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %s answered %d", e.Method, e.Path, e.Controller, e.Status)
	if first, ok := e.first(); ok {
		fmt.Fprintf(&b, ": %s (%s %d)", oneLine(first.Message), first.Code().severity(), first.Code().Number())
		if first.Correction != "" {
			fmt.Fprintf(&b, "; %s", oneLine(first.Correction))
		}
	} else if e.Text != "" {
		fmt.Fprintf(&b, ", not a linstor answer: %q", e.Text)
	}
	return b.String()
}

// first is the first error entry, else the first entry of any kind: a warning thrown as an exception comes as 500
// without an error entry.
func (e *APIError) first() (Entry, bool) {
	for _, en := range e.Entries {
		if en.IsError() {
			return en, true
		}
	}
	if len(e.Entries) > 0 {
		return e.Entries[0], true
	}
	return Entry{}, false
}

// HasCode says whether any entry carries the code.
func (e *APIError) HasCode(c Code) bool { return hasCode(e.Entries, c) }

// Is matches a Code, ErrNotFound and ErrExists.
func (e *APIError) Is(target error) bool {
	if c, ok := target.(Code); ok { //nolint:errorlint // Is methods look at the target itself.
		return e.HasCode(c)
	}
	switch target {
	case ErrNotFound:
		return e.hasErrorBetween(300, 399)
	case ErrExists:
		return e.hasErrorBetween(500, 599) || e.HasCode(InfoResourceAlreadyExists)
	case ErrMalformed:
		return len(e.Entries) == 0 && e.Text != ""
	}
	return false
}

func (e *APIError) hasErrorBetween(lo, hi int) bool {
	for _, en := range e.Entries {
		if n := en.Code().Number(); en.IsError() && n >= lo && n <= hi {
			return true
		}
	}
	return false
}

func hasCode(entries []Entry, c Code) bool {
	for _, en := range entries {
		if en.Code().matches(c) {
			return true
		}
	}
	return false
}

// Attempt is one address that was tried and why it is not the controller.
type Attempt struct {
	Address string
	Err     error
}

// NoControllerError says which addresses were asked and what each of them answered.
type NoControllerError struct {
	Attempts []Attempt
	Hint     string // What an operator can do about it.
}

func (e *NoControllerError) Error() string {
	parts := make([]string, 0, len(e.Attempts))
	for _, a := range e.Attempts {
		parts = append(parts, fmt.Sprintf("%s: %v", a.Address, a.Err))
	}
	return fmt.Sprintf("find linstor controller: %s; %s", strings.Join(parts, "; "), e.Hint)
}

// Is matches ErrNoController.
func (e *NoControllerError) Is(target error) bool { return target == ErrNoController }

// Unwrap gives the errors of the single addresses.
func (e *NoControllerError) Unwrap() []error {
	errs := make([]error, 0, len(e.Attempts))
	for _, a := range e.Attempts {
		errs = append(errs, a.Err)
	}
	return errs
}

// oneLine folds white space and cuts to 160 bytes, so that an HTML page cannot fill a log.
func oneLine(s string) string {
	const limit = 160
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "?")), " ")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return s
}
