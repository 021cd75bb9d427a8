package linstorface

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Kind names a fault. The names are what ParseFault takes.
type Kind string

// Faults of the face. A hung or offline satellite is not among them: the model has those (SetHung, SetNode).
const (
	Down          Kind = "down"           // the port refuses connections
	Slow          Kind = "slow"           // Delay before every answer
	DieMidBody    Kind = "die-mid-body"   // the connection ends after half of the body
	Redirect      Kind = "redirect"       // plain HTTP answers a redirect of /v1 to Location (a https base URL)
	HTML500       Kind = "html-500"       // a proxy's page instead of LINSTOR's answer
	TruncatedJSON Kind = "truncated-json" // a well-ended answer whose JSON stops half-way
	SSECut        Kind = "sse-cut"        // each event stream ends after Times events
	SSEDuplicate  Kind = "sse-duplicate"  // each event is sent twice
	BodyLost      Kind = "body-lost"      // the request is read and carried out, then the connection ends without answer
)

var kinds = []Kind{Down, Slow, DieMidBody, Redirect, HTML500, TruncatedJSON, SSECut, SSEDuplicate, BodyLost}

// Fault is one disturbance.
type Fault struct {
	Kind     Kind
	Path     string        // only calls whose path starts so; "" means all
	Times    int           // how many calls it disturbs; 0 means until Clear. For SSECut: events per stream
	Delay    time.Duration // Slow
	Location string        // Redirect
}

// ParseFault reads "kind" or "kind=value": slow=200ms, redirect=https://host:3371, sse-cut=3, others without a value.
func ParseFault(s string) (Fault, error) {
	name, value, _ := strings.Cut(s, "=")
	f := Fault{Kind: Kind(name)}
	if !slices.Contains(kinds, f.Kind) {
		return f, fmt.Errorf("parse fault %q: unknown name, have %v", s, kinds)
	}
	var err error
	switch f.Kind {
	case Slow:
		f.Delay, err = time.ParseDuration(value)
	case Redirect:
		f.Location = value
	case SSECut:
		_, err = fmt.Sscanf(value, "%d", &f.Times)
	default:
		if value != "" {
			err = fmt.Errorf("takes no value")
		}
	}
	if err != nil {
		return f, fmt.Errorf("parse fault %q: %w", s, err)
	}
	return f, nil
}

// Inject adds a fault. Several of one kind may be active, for different paths.
func (f *Face) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &fault)
	if fault.Kind == Down {
		f.cutLocked()
	}
}

// Clear ends all faults of the kinds, or every fault.
func (f *Face) Clear(kinds ...Kind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	had := slices.ContainsFunc(f.faults, func(x *Fault) bool { return x.Kind == Down })
	f.faults = slices.DeleteFunc(f.faults, func(x *Fault) bool { return len(kinds) == 0 || slices.Contains(kinds, x.Kind) })
	if had {
		f.cutLocked()
	}
}

// CutStreams ends all event streams that are open now.
func (f *Face) CutStreams() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cutLocked()
}

func (f *Face) cutLocked() {
	close(f.cut)
	f.cut = make(chan struct{})
}

func (f *Face) cutChannel() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cut
}

func (f *Face) faultSet(kind Kind) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.faults, func(x *Fault) bool { return x.Kind == kind })
}

// fault returns the active fault of a kind for a path and counts it down.
func (f *Face) fault(kind Kind, path string) *Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, x := range f.faults {
		if x.Kind != kind || !strings.HasPrefix(path, x.Path) {
			continue
		}
		if x.Times > 0 && kind != SSECut {
			x.Times--
			if x.Times == 0 {
				f.faults = slices.Delete(f.faults, i, i+1)
			}
		}
		return x
	}
	return nil
}

// disturb answers in LINSTOR's place where a fault says so.
func (f *Face) disturb(w http.ResponseWriter, r *http.Request) bool {
	path := r.URL.Path
	if x := f.fault(Redirect, path); x != nil && strings.HasPrefix(path, "/v1") {
		w.Header().Set("Location", strings.TrimSuffix(x.Location, "/")+r.URL.RequestURI())
		w.WriteHeader(http.StatusFound)
		return true
	}
	if f.fault(HTML500, path) != nil {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "<html><head><title>500 Internal Server Error</title></head><body>proxy error</body></html>")
		return true
	}
	if f.fault(BodyLost, path) != nil {
		f.mux.ServeHTTP(discard{http.Header{}}, r)
		panic(http.ErrAbortHandler)
	}
	return false
}

// discard swallows an answer that the client never gets.
type discard struct{ h http.Header }

func (d discard) Header() http.Header         { return d.h }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

// quiet keeps the aborts that faults cause out of the test output.
var quiet = log.New(io.Discard, "", 0)
