// Package subject names what travels on the bus. It has no imports beyond the standard library, so that the core and
// small programs can speak of subjects without linking a NATS client.
//
// Subjects are versioned and have fixed depth:
//
//	xostor.v1.xapi.<class>.<uuid>
//	xostor.v1.linstor.<kind>.<name>[.<node>]
//	xostor.v1.drbd.<host>.<resource>
//	xostor.v1.agent.<agent>.<host>.<action|finding|status>
package subject

import "strings"

// Subject is a NATS subject or subject pattern ("*" one token, ">" the rest).
type Subject string

// Prefix is the first two tokens of every subject of this version.
const Prefix = "xostor.v1"

// XAPI is the subject of changes of one XAPI object. Class is lower case as in event.from ("vdi", "host_metrics").
// Class or uuid may be "*".
func XAPI(class, uuid string) Subject { return join("xapi", class, uuid) }

// LINSTOR is the subject of changes of one LINSTOR object. Kinds are "node", "pool", "resource", "definition", "group",
// "kv" and "controller". Node is empty for objects that are not on a node; pass ">" as name for all of a kind.
func LINSTOR(kind, name, node string) Subject {
	if node == "" {
		return join("linstor", kind, name)
	}
	return join("linstor", kind, name, node)
}

// DRBD is the subject of DRBD state changes of one resource as one host sees it.
func DRBD(host, resource string) Subject { return join("drbd", host, resource) }

// Agent is the subject of what an agent on a host did (action), found (finding) or is (status).
func Agent(agent, host, what string) Subject { return join("agent", agent, host, what) }

// Matches tells whether the subject s is covered by the pattern p.
func (p Subject) Matches(s Subject) bool {
	pt, st := strings.Split(string(p), "."), strings.Split(string(s), ".")
	for i, t := range pt {
		if t == ">" {
			return len(st) > i
		}
		if i >= len(st) || (t != "*" && t != st[i]) {
			return false
		}
	}
	return len(pt) == len(st)
}

func join(tokens ...string) Subject {
	var b strings.Builder
	b.WriteString(Prefix)
	for _, t := range tokens {
		b.WriteByte('.')
		b.WriteString(Token(t))
	}
	return Subject(b.String())
}

// Token makes any name usable as one subject token: dots, blanks and control characters become "_", because NATS gives them a
// meaning. Wildcards stay. The object's true name travels in the event's body, never only in its subject.
func Token(name string) string {
	if name == "" {
		return "_"
	}
	if name == "*" || name == ">" {
		return name
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r == '.' || r == '*' || r == '>' || r == 0x7f {
			return '_'
		}
		return r
	}, name)
}
