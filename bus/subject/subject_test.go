package subject

import (
	"strings"
	"testing"
	"unicode"
)

func TestSubjects(t *testing.T) {
	for _, tc := range []struct {
		got  Subject
		want string
	}{
		{XAPI("vdi", "3f0c"), "xostor.v1.xapi.vdi.3f0c"},
		{XAPI("host_metrics", "*"), "xostor.v1.xapi.host_metrics.*"},
		{LINSTOR("node", "h1", ""), "xostor.v1.linstor.node.h1"},
		{LINSTOR("resource", "xcp-volume-1", "h1.lan"), "xostor.v1.linstor.resource.xcp-volume-1.h1_lan"},
		{LINSTOR("pool", ">", ""), "xostor.v1.linstor.pool.>"},
		{DRBD("h1", "r1"), "xostor.v1.drbd.h1.r1"},
		{Agent("sr-size", "h1", "finding"), "xostor.v1.agent.sr-size.h1.finding"},
		{XAPI("vdi", ""), "xostor.v1.xapi.vdi._"},
		{DRBD("a b", "c*>\n"), "xostor.v1.drbd.a_b.c___"},
	} {
		if string(tc.got) != tc.want {
			t.Errorf("subject %s, want %s", tc.got, tc.want)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		pattern, subject Subject
		want             bool
	}{
		{"a.b", "a.b", true},
		{"a.b", "a.c", false},
		{"a.b", "a.b.c", false},
		{"a.b.c", "a.b", false},
		{"a.*", "a.b", true},
		{"a.*", "a.b.c", false},
		{"a.*.c", "a.b.c", true},
		{"a.>", "a.b.c", true},
		{"a.>", "a", false},
		{">", "a", true},
		{"*", "a.b", false},
	} {
		if got := tc.pattern.Matches(tc.subject); got != tc.want {
			t.Errorf("%s matches %s: %t, want %t", tc.pattern, tc.subject, got, tc.want)
		}
	}
}

// FuzzToken: any name becomes one token that NATS accepts and that its own kind's pattern covers.
func FuzzToken(f *testing.F) {
	for _, seed := range []string{"", "*", ">", "h1.lan", "a b", "\x00\x7f", "größe", "\xff\xfe", "a.*.>"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		token := Token(name)
		if token == "" || strings.ContainsAny(token, ". \t\r\n") || strings.ContainsFunc(token, unicode.IsControl) && !strings.ContainsFunc(name, isHighControl) {
			t.Fatalf("token of %q is %q", name, token)
		}
		if name != "*" && name != ">" && strings.ContainsAny(token, "*>") {
			t.Fatalf("token of %q is a wildcard: %q", name, token)
		}
		if s := XAPI("vdi", name); !XAPI("vdi", "*").Matches(s) || !Subject(Prefix+".>").Matches(s) {
			t.Fatalf("the patterns of its kind do not cover %s", s)
		}
	})
}

// isHighControl tells control characters above ASCII, which NATS takes as any other byte.
func isHighControl(r rune) bool { return r >= 0x80 && unicode.IsControl(r) }
