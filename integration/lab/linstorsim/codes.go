package linstorsim

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// The bits of a LINSTOR return code (linstor-common consts.json): severity in bits 62-63, operation in 24-25,
// object in 18-22, code in 0-14. They are written out here, not taken from golinstor, so that golinstor stays an
// independent witness in the tests.
const (
	maskError = -0x4000000000000000
	maskWarn  = -0x8000000000000000
	maskInfo  = 0x4000000000000000

	opCreate = 0x1000000
	opModify = 0x2000000
	opDelete = 0x3000000

	objNode     = 0x3C0000
	objRscDfn   = 0x380000
	objRsc      = 0x340000
	objVlmDfn   = 0x300000
	objVlm      = 0x2C0000
	objNodeConn = 0x280000
	objRscConn  = 0x240000
	objNetIf    = 0x1C0000
	objPoolDfn  = 0x180000
	objPool     = 0x140000
	objCtrl     = 0x100000
	objSnapshot = 0xC0000
	objKVS      = 0x400000
	objRscGrp   = 0x440000
	objVlmGrp   = 0x480000

	codeMask = 0x7FFF
)

// Codes of ApiCallRc entries that the model answers with (the low 15 bits of ret_code).
const (
	CodeCreated  = 1
	CodeDeleted  = 2
	CodeModified = 3

	CodeInvalidNodeName   = 200
	CodeInvalidRscName    = 202
	CodeInvalidVolumeNr   = 205
	CodeInvalidVolumeSize = 206
	CodeInvalidNetName    = 209
	CodeInvalidNetAddr    = 210
	CodeInvalidPoolName   = 208
	CodeInvalidProp       = 213
	CodeInvalidPlaceCount = 219
	CodeNodeInUse         = 233
	CodeInvalidSnapName   = 218

	CodeNodeNotFound     = 300
	CodeRscDfnNotFound   = 301
	CodeRscNotFound      = 302
	CodeVlmDfnNotFound   = 303
	CodeVlmNotFound      = 304
	CodeNetIfNotFound    = 305
	CodePoolDfnNotFound  = 309
	CodePoolNotFound     = 310
	CodeSnapshotNotFound = 315
	CodeKVSNotFound      = 316
	CodeRscGrpNotFound   = 317
	CodeVlmGrpNotFound   = 318

	CodeNodeExists     = 500
	CodeRscDfnExists   = 501
	CodeRscExists      = 502
	CodeVlmDfnExists   = 503
	CodeNetIfExists    = 505
	CodePoolDfnExists  = 509
	CodePoolExists     = 510
	CodeSnapshotExists = 514
	CodeRscGrpExists   = 522
	CodeVlmGrpExists   = 523

	CodeNotEnoughFreeSpace  = 980
	CodeLayerUnsupported    = 988
	CodeReplicaCount        = 991
	CodeBusy                = 992
	CodePeerSlots           = 993
	CodeSnapshotUnsupported = 994
	CodeNotConnected        = 995
	CodeNotEnoughNodes      = 996
	CodeInUse               = 997
	CodeUnknown             = 998

	CodeWarnNotConnected    = 1002
	CodeWarnAlreadyDiskful  = 1007
	CodeWarnAlreadyDiskless = 1008
	CodeWarnNoTieBreaker    = 1013
	CodeWarnNotEvacuating   = 1020
	CodeWarnNotFound        = 3000
	CodeWarnNoEffect        = 3001

	CodeInfoTieBreakerCreated  = 10003
	CodeInfoTieBreakerDeleting = 10004
	CodeInfoPropSet            = 10002
	CodeInfoTieBreakerTakeover = 10006
	CodeInfoNoop               = 10007
	CodeInfoRscExists          = 10008
)

// Entry is one ApiCallRc. Code is the whole int64 as it goes over the wire: errors and warnings are negative.
type Entry struct {
	Code       int64             `json:"ret_code"`
	Message    string            `json:"message"`
	Cause      string            `json:"cause,omitempty"`
	Details    string            `json:"details,omitempty"`
	Correction string            `json:"correction,omitempty"`
	Reports    []string          `json:"error_report_ids,omitempty"`
	Refs       map[string]string `json:"obj_refs,omitempty"`
	CreatedAt  string            `json:"created_at,omitempty"`
}

// Number is the code without severity, operation and object: 997, 1002, ...
func (e Entry) Number() int { return int(e.Code & codeMask) }

// IsError tells an error (severity bits 11) from warnings, infos and successes.
func (e Entry) IsError() bool { return uint64(e.Code)>>62 == 3 }

// IsWarning tells a warning (severity bits 10).
func (e Entry) IsWarning() bool { return uint64(e.Code)>>62 == 2 }

// Reply is the list of entries that a LINSTOR mutation answers.
type Reply []Entry

// Failed tells whether any entry is an error.
func (r Reply) Failed() bool {
	for _, e := range r {
		if e.IsError() {
			return true
		}
	}
	return false
}

// Has tells whether an entry carries the number, whatever its severity.
func (r Reply) Has(number int) bool {
	for _, e := range r {
		if e.Number() == number {
			return true
		}
	}
	return false
}

// Err is nil when no entry is an error, else a *ReplyError.
func (r Reply) Err() error {
	if !r.Failed() {
		return nil
	}
	return &ReplyError{Reply: r}
}

// ReplyError is a refused mutation.
type ReplyError struct{ Reply Reply }

func (e *ReplyError) Error() string {
	var parts []string
	for _, entry := range e.Reply {
		if entry.IsError() {
			parts = append(parts, fmt.Sprintf("%d: %s", entry.Number(), entry.Message))
		}
	}
	return "linstor: " + strings.Join(parts, "; ")
}

// IsCode tells whether err is a refusal with the number.
func IsCode(err error, number int) bool {
	var re *ReplyError
	return errors.As(err, &re) && re.Reply.Has(number)
}

func (c *Cluster) entry(code int64, refs map[string]string, format string, args ...any) Entry {
	return Entry{Code: code, Message: fmt.Sprintf(format, args...), Refs: refs, CreatedAt: c.now().Format(time.RFC3339Nano)}
}

func (c *Cluster) done(op, obj int64, refs map[string]string, format string, args ...any) Entry {
	code := map[int64]int64{opCreate: CodeCreated, opModify: CodeModified, opDelete: CodeDeleted}[op]
	return c.entry(op|obj|code, refs, format, args...)
}

func (c *Cluster) fail(number, opObj int64, format string, args ...any) Reply {
	return Reply{c.entry(maskError|opObj|number, nil, format, args...)}
}

func (c *Cluster) warn(number, opObj int64, format string, args ...any) Entry {
	return c.entry(maskWarn|opObj|number, nil, format, args...)
}

func (c *Cluster) info(number, opObj int64, format string, args ...any) Entry {
	return c.entry(maskInfo|opObj|number, nil, format, args...)
}

// notConnected is the warning that comes with HTTP 200 when a change was stored but a satellite did not get it.
func (c *Cluster) notConnected(n *node) Entry {
	e := c.warn(CodeWarnNotConnected, 0, "No active connection to satellite '%s'", n.name)
	e.Details = "The controller is trying to (re-) establish a connection to the satellite. " +
		"The controller stored the changes and as soon the satellite is connected, it will receive this update."
	return e
}
