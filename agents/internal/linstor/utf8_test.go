package linstor

import (
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

func TestUTF8Check_AgreesWithTheLibraryHoweverTheStreamIsCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// Pieces of real characters and stray bytes, so that valid and invalid streams are both common.
		var text []byte
		for range rapid.IntRange(0, 12).Draw(t, "pieces") {
			text = append(text, rapid.SampledFrom([]string{"a", "ä", "€", "𝄞", "\xff", "\xc3", "\xe2\x82", "\x82", "\xf0\x9d"}).Draw(t, "piece")...)
		}
		var u utf8Check
		for rest := text; len(rest) > 0; {
			n := rapid.IntRange(1, len(rest)).Draw(t, "cut")
			u.add(rest[:n])
			rest = rest[n:]
		}
		if got, want := u.valid(), utf8.Valid(text); got != want {
			t.Fatalf("%q: valid %v, want %v", text, got, want)
		}
	})
}
