package xapiface

import (
	"slices"
	"time"
)

// FaultKind is a way in which a host's XAPI misbehaves.
type FaultKind uint8

// The kinds of fault.
const (
	Refuse    FaultKind = iota + 1 // the listeners are closed: connection refused, or no such socket
	Reset                          // the connection is reset instead of an answer
	HTML                           // status 502 and an HTML page, as a proxy gives
	Truncate                       // the answer ends in its middle
	Slow                           // the answer comes Delay later
	Emergency                      // calls other than the emergency ones fail with Code
	Fail                           // calls fail with Code and Params
)

// Fault is a misbehaviour of one host. With Methods it strikes only those; with Count it ends after that many strikes. Neither applies to Refuse.
type Fault struct {
	Kind    FaultKind
	Delay   time.Duration // Slow
	Code    string        // Emergency, Fail; default HOST_STILL_BOOTING
	Params  []string
	Methods []string
	Count   int
}

func (x *Fault) strikes(method string) bool {
	return len(x.Methods) == 0 || slices.Contains(x.Methods, method)
}

// SetFault adds a fault to a host (a host ref).
func (f *Face) SetFault(host string, x Fault) {
	if x.Code == "" {
		x.Code = "HOST_STILL_BOOTING"
	}
	f.mu.Lock()
	f.faults[host] = append(f.faults[host], &x)
	f.mu.Unlock()
	if x.Kind == Refuse {
		for _, e := range f.of(host) {
			e.suspend()
		}
	}
}

// ClearFaults ends all faults of a host. The error is the one of listening again on the addresses that Refuse had closed.
func (f *Face) ClearFaults(host string) error {
	f.mu.Lock()
	delete(f.faults, host)
	f.mu.Unlock()
	for _, e := range f.of(host) {
		if err := e.resume(); err != nil {
			return err
		}
	}
	return nil
}

func (f *Face) of(host string) []*Endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*Endpoint
	for _, e := range f.endpoints {
		if e.host == host {
			out = append(out, e)
		}
	}
	return out
}

// strike returns the first fault of a host that applies to a method and is of one of the kinds, and counts it.
func (f *Face) strike(host, method string, kinds ...FaultKind) (Fault, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, x := range f.faults[host] {
		if !slices.Contains(kinds, x.Kind) || !x.strikes(method) {
			continue
		}
		if x.Count > 0 {
			if x.Count--; x.Count == 0 {
				f.faults[host] = slices.Delete(f.faults[host], i, i+1)
			}
		}
		return *x, true
	}
	return Fault{}, false
}
