package xapidb

import "strings"

// Error is an XAPI error: a code and string parameters, as ErrorDescription carries them.
type Error struct {
	Code   string
	Params []string
}

func (e *Error) Error() string { return e.Code + "[" + strings.Join(e.Params, "; ") + "]" }

// Errorf makes an *Error from a code such as HANDLE_INVALID and its parameters.
func Errorf(code string, params ...string) *Error { return &Error{Code: code, Params: params} }

// Is makes errors.Is match on the code alone: errors.Is(err, &Error{Code: "HANDLE_INVALID"}).
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && t.Params == nil
}
