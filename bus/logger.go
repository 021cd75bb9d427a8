package bus

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	natsMessage = "nats server"
	natsText    = "text"
	sameMost    = 10 // Messages of one form in a minute; a port scan causes hundreds.
)

// natsLogger hands the server's messages to slog. The server formats them itself, so they travel as an attribute.
type natsLogger struct {
	log   *slog.Logger
	fatal chan string // The first fatal message.
	// broken hears that a store can no longer be written. The server tells that nowhere but in its log, and gives up the stream.
	broken func(text string)

	mu    sync.Mutex
	since time.Time
	seen  map[string]int // By format.
}

func newNATSLogger(log *slog.Logger, broken func(string)) *natsLogger {
	return &natsLogger{log: log, fatal: make(chan string, 1), broken: broken, seen: map[string]int{}}
}

// enough tells whether a message of this form was written often enough in this minute.
func (l *natsLogger) enough(format string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.since) >= time.Minute {
		l.since = now
		clear(l.seen)
	}
	l.seen[format]++
	return l.seen[format] > sameMost
}

// Noticef is start-up chatter for an operator of a message broker; nobody who runs a pool needs it.
func (l *natsLogger) Noticef(format string, v ...any) {
	l.log.Debug(natsMessage, natsText, fmt.Sprintf(format, v...))
}

// Warnf implements server.Logger.
func (l *natsLogger) Warnf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	for _, usual := range []string{"Waiting for routing", "has not established contact", "Metalayer blocking snapshot"} {
		if strings.Contains(text, usual) {
			l.log.Debug(natsMessage, natsText, text) // While a pool starts or changes; Condition tells when it lasts.
			return
		}
	}
	if !l.enough(format, time.Now()) {
		l.log.Warn(natsMessage, natsText, text)
	}
}

// Errorf implements server.Logger.
func (l *natsLogger) Errorf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	if strings.Contains(text, "critical write error") {
		l.broken(text)
	}
	level := slog.LevelError
	switch {
	case strings.Contains(text, "duplicate name"):
		level = slog.LevelDebug // The certificate told it before, with the address: see Bus.seen.
	case strings.HasSuffix(text, "handshake error: EOF"):
		level = slog.LevelDebug // Two hosts dial each other at once, and one of them hangs up.
	case strings.Contains(text, "trying to connect to route"):
		level = slog.LevelWarn // A host that is off is no error of the bus.
	}
	if !l.enough(format, time.Now()) {
		l.log.Log(context.Background(), level, natsMessage, natsText, text)
	}
}

// Fatalf does not end the process, as nats-server's own logger does: whoever started the server hears of it instead.
func (l *natsLogger) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.log.Error(natsMessage, natsText, text)
	select {
	case l.fatal <- text:
	default:
	}
}

// Debugf implements server.Logger.
func (l *natsLogger) Debugf(format string, v ...any) {
	l.log.Debug(natsMessage, natsText, fmt.Sprintf(format, v...))
}

// Tracef implements server.Logger.
func (l *natsLogger) Tracef(format string, v ...any) {
	l.log.Debug(natsMessage, natsText, fmt.Sprintf(format, v...))
}
