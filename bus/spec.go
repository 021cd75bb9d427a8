package bus

import (
	"strings"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// Subject is subject.Subject, so that users of this package need one import.
type Subject = subject.Subject

// Spec names one table of the bus and says on which subjects its changes travel. Publisher and mirrors use the same one.
type Spec struct {
	// Name is unique in the pool and a valid part of a subject, for example "xapi.vdi".
	Name string
	// Pattern covers the subjects of all keys.
	Pattern Subject
	// Subject is the subject of one key's changes.
	Subject func(key string) Subject
}

// XAPITable is the table of one XAPI class ("vdi", "host_metrics"), keyed by uuid.
func XAPITable(class string) Spec {
	class = strings.ToLower(class)
	return Spec{
		Name:    "xapi." + class,
		Pattern: subject.XAPI(class, "*"),
		Subject: func(uuid string) Subject { return subject.XAPI(class, uuid) },
	}
}

// LINSTORTable is the table of one LINSTOR kind ("node", "pool", "resource", "definition"). Its keys are "name" or
// "name/node"; LINSTOR's own names contain no slash.
func LINSTORTable(kind string) Spec {
	return Spec{
		Name:    "linstor." + kind,
		Pattern: subject.LINSTOR(kind, ">", ""),
		Subject: func(key string) Subject {
			name, node, _ := strings.Cut(key, "/")
			return subject.LINSTOR(kind, name, node)
		},
	}
}

// DRBDTable is the table of DRBD's resources as one host (its uuid) sees them, keyed by resource.
func DRBDTable(host string) Spec {
	return Spec{
		Name:    "drbd." + subject.Token(host),
		Pattern: subject.DRBD(host, "*"),
		Subject: func(resource string) Subject { return subject.DRBD(host, resource) },
	}
}

// control is the subject of a table's signs of life and state changes.
func (s Spec) control() string { return subject.Prefix + ".table." + s.Name + ".state" }

// list is the subject on which the publisher with this epoch answers list requests; epoch 0 asks any publisher.
func (s Spec) list(epoch uint64) string {
	base := subject.Prefix + ".table." + s.Name + ".list"
	if epoch == 0 {
		return base
	}
	return base + "." + formatEpoch(epoch)
}
