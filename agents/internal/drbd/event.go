package drbd

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Verb says what happened to an object.
type Verb string

// The verbs of `drbdsetup events2` (drbd-utils user/v9/drbdsetup_events2.c).
const (
	Exists   Verb = "exists"
	Create   Verb = "create"
	Change   Verb = "change"
	Destroy  Verb = "destroy"
	Rename   Verb = "rename"
	Call     Verb = "call"
	Response Verb = "response"
)

// Event is one line of `drbdsetup events2`, split but not interpreted.
type Event struct {
	Time   string // as printed with --timestamps, else ""
	Verb   Verb
	Object string // "resource", "device", "connection", "peer-device", "path", "helper"; "-" ends the initial dump
	Fields []Field
}

// Field is one key:value of a line. The value may contain colons.
type Field struct{ Key, Value string }

// ErrSkipped says that events were lost or printed out of order, so that the merged state may be wrong: only a new dump is the truth.
var ErrSkipped = errors.New("events were skipped or out of order")

// ErrSyntax says that a line is no event: cut off, garbled, or not from events2.
var ErrSyntax = errors.New("not an events2 line")

// Get returns the value of a key.
func (e *Event) Get(key string) (string, bool) {
	for _, f := range e.Fields {
		if f.Key == key {
			return f.Value, true
		}
	}
	return "", false
}

// Skipped returns N of a line "- skipped N", else 0. The manual does not mention it; drbd-utils 9.22 prints it when the kernel's sequence numbers jump.
// In the recordings of busy nodes it comes as 1, -2, 1: two events changed places, and the older one was printed last.
func (e *Event) Skipped() int {
	if e.Verb != "-" || e.Object != "skipped" {
		return 0
	}
	v, _ := e.Get("count")
	n, _ := strconv.Atoi(v) // Parse has seen to it
	return n
}

// EndOfDump tells whether the line is "exists -", which ends the initial dump.
func (e *Event) EndOfDump() bool { return e.Verb == Exists && e.Object == "-" }

// Parse reads one line without its newline into e, reusing e's memory; the strings share the line's. Verbs and objects that are not known are no
// error: a newer drbd-utils may have them. Error: matches ErrSyntax.
func (e *Event) Parse(line string) error {
	e.Time, e.Verb, e.Object, e.Fields = "", "", "", e.Fields[:0]
	word, rest := nextWord(line)
	if word != "" && word[0] >= '0' && word[0] <= '9' {
		e.Time = word
		word, rest = nextWord(rest)
	}
	e.Verb = Verb(word)
	e.Object, rest = nextWord(rest)
	if e.Verb == "-" && e.Object == "skipped" {
		count := strings.TrimSpace(rest)
		if n, err := strconv.Atoi(count); err != nil || n == 0 {
			return syntax("no count of skipped events", line)
		}
		e.Fields = append(e.Fields, Field{"count", count})
		return nil
	}
	if !lowercase(word) || e.Object != "-" && !lowercase(e.Object) {
		return syntax("no verb and object", line)
	}
	for {
		if word, rest = nextWord(rest); word == "" {
			break
		}
		key, value, ok := strings.Cut(word, ":")
		if !ok || key == "" {
			return syntax("a word without a key", line)
		}
		if _, twice := e.Get(key); twice {
			return syntax("a key twice", line) // two lines run into one
		}
		e.Fields = append(e.Fields, Field{key, value})
	}
	if len(e.Fields) == 0 && !e.EndOfDump() {
		return syntax("no keys", line)
	}
	return nil
}

func syntax(what, line string) error {
	return fmt.Errorf("parse %.120q: %s: %w", line, what, ErrSyntax)
}

func nextWord(s string) (word, rest string) {
	s = strings.TrimLeft(s, " ")
	if i := strings.IndexByte(s, ' '); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

// lowercase tells whether s is a word as events2 uses for verbs and objects.
func lowercase(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c != '-' || i == 0) {
			return false
		}
	}
	return s != ""
}
