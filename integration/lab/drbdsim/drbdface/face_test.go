package drbdface

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

func TestCall_LineAndParseCallAreInverse(t *testing.T) {
	field := rapid.StringMatching(`[a-z0-9 =:{}".-]*`)
	rapid.Check(t, func(t *rapid.T) {
		want := Call{field.Draw(t, "node"), field.Draw(t, "program"), rapid.SliceOf(field).Draw(t, "args")}
		got, ok := ParseCall(want.Line())
		if !ok || got.Node != want.Node || got.Program != want.Program || !slices.Equal(got.Args, want.Args) {
			t.Fatalf("got %q, %v; want %q", got, ok, want)
		}
	})
	if c, ok := ParseCall("h1\n"); ok {
		t.Errorf("got %q from half a call", c)
	}
}

func TestAnswer_PrintsAndReturnsTheExitCode(t *testing.T) {
	for _, c := range []struct {
		text, out, errOut string
		code              int
	}{
		{"\x000\n", "", "", 0},
		{"a\nb\n\x0010\n", "a\nb\n", "", 10},
		{"r: State change failed: (-2) Need access to UpToDate data\n\x0017\n", "", "r: State change failed: (-2) Need access to UpToDate data\n", 17},
		{"a\nhal", "a\n", "", 20},
		{"", "", "", 20},
	} {
		for _, r := range []io.Reader{strings.NewReader(c.text), iotest.OneByteReader(strings.NewReader(c.text)), iotest.DataErrReader(strings.NewReader(c.text))} {
			var out, errOut bytes.Buffer
			if code := answer(r, &out, &errOut); code != c.code || out.String() != c.out || errOut.String() != c.errOut {
				t.Errorf("%q: code %d, %q, %q", c.text, code, out.String(), errOut.String())
			}
		}
	}
}
