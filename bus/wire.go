package bus

import (
	"context"
	"errors"
)

// ErrNoResponder is what Wire.Request answers when nobody serves the subject.
var ErrNoResponder = errors.New("nobody serves this subject")

// Message is one message of a Wire. Whoever receives one must not change it: it may be shared.
type Message struct {
	Subject string
	Reply   string
	Header  Header
	Data    []byte
}

// Header is the part of a message's headers that the bus uses: one value per key. Keys are compared exactly, as NATS does.
type Header map[string]string

// Wire is the little of a message bus that tables and mirrors need. Conn is the real one.
//
// Promised: messages that one publisher sends through one Wire reach one subscription in their order, or not at all. Not
// promised: that they arrive. Tables and mirrors are built so that even order and single delivery need not hold.
type Wire interface {
	// Publish sends and forgets. An error means that the message is lost for everybody or for some; it never blocks
	// on a slow receiver.
	Publish(m *Message) error
	// Subscribe calls fn for each message on any of the subjects, one at a time, in the order of arrival across all of
	// them. The returned function ends the subscription; it may be called more than once and from fn.
	Subscribe(fn func(*Message), subjects ...string) (stop func(), err error)
	// Request sends m and waits for the first answer. ErrNoResponder when nobody serves the subject.
	Request(ctx context.Context, m *Message) (*Message, error)
	// MaxPayload is the greatest size in bytes of one message, headers included.
	MaxPayload() int
}
