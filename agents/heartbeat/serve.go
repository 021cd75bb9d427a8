package heartbeat

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
)

// ownership carries the requests of one Owner to the device.
type ownership struct {
	export string
	dev    Device
	size   int64
	t      Timing

	mu     sync.Mutex
	change *sync.Cond // Something that a waiting request waits for.
	o      *Owner
	conns  map[net.Conn]struct{}
	hosts  map[string]HostWrites
	why    error

	probing sync.Mutex // One probe at a time.
	probe   Request
	record  Record
	page    []byte
	hasRoom bool // For the record behind the statefile.
	ended   chan struct{}
}

// HostWrites is what an owner saw of a host's writes.
type HostWrites struct {
	Last       time.Time     `json:"last"`
	LongestGap time.Duration `json:"longest_gap_ns"` // Between the starts of two writes to this owner.
	Writes     uint64        `json:"writes"`
}

// begin takes a freshly opened device into ownership by host self.
func begin(dev Device, t Timing, self, export string, statefileKind bool) (*ownership, error) {
	opened := time.Now()
	w := &ownership{export: export, dev: dev, size: dev.Size(), t: t, conns: map[net.Conn]struct{}{}, hosts: map[string]HostWrites{},
		page: nbd.AlignedBuffer(4096), ended: make(chan struct{})}
	w.change = sync.NewCond(&w.mu)
	w.hasRoom = statefileKind && w.size >= recordOffset+4096
	clean := false
	if w.hasRoom {
		if err := dev.Read(w.page[:recordLen], recordOffset); err != nil {
			return nil, fmt.Errorf("read owner's record: %w", err)
		}
		if r, ok := ParseRecord(w.page); ok {
			clean, w.record.Epoch = r.Clean, r.Epoch
		}
		w.record = Record{Owner: self, Epoch: w.record.Epoch + 1}
		w.probe = Request{Off: recordOffset, Len: recordLen, Write: true}
	} else {
		w.probe = Request{Off: w.size - 4096, Len: 4096, Write: true}
	}
	w.o = NewOwner(opened, t, clean)
	if err := w.vouch(time.Now()); err != nil {
		return nil, err
	}
	return w, nil
}

// vouch makes sure that a replicated write has been acknowledged that started after at.
func (w *ownership) vouch(at time.Time) error {
	w.probing.Lock()
	defer w.probing.Unlock()
	w.mu.Lock()
	fresh := !w.o.vouched.Before(at)
	w.mu.Unlock()
	if fresh {
		return nil
	}
	return w.writeProbe()
}

// writeProbe writes the record, or rewrites the device's last 4 KiB with what is there. The caller holds probing.
func (w *ownership) writeProbe() error {
	if err := w.enter(&w.probe); err != nil {
		return err
	}
	start := time.Now()
	var err error
	if w.hasRoom {
		w.record.Counter++
		w.record.put(w.page)
		err = w.dev.Write(w.page[:recordLen], recordOffset)
	} else if err = w.dev.Read(w.page, w.probe.Off); err == nil {
		err = w.dev.Write(w.page, w.probe.Off)
	}
	return w.finish(&w.probe, start, err)
}

// enter waits until the request may go to the device.
func (w *ownership) enter(r *Request) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.o.Enter(r)
	for {
		switch w.o.Try(r) {
		case Run:
			return nil
		case Wait:
			w.change.Wait()
		case Stale:
			w.change.Broadcast()
			return errStale
		default:
			return nbd.ESHUTDOWN
		}
	}
}

var errStale = errors.New("host has a newer session")

// finish ends a request at the device. Any device error ends the ownership: DRBD has lost its quorum, or the disk is gone.
func (w *ownership) finish(r *Request, start time.Time, err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.o.End(r)
	w.change.Broadcast()
	if err != nil {
		w.leaveLocked(fmt.Errorf("device failed: %w", err))
		return nbd.EIO
	}
	if r.Write {
		w.o.Wrote(start)
		if r.Host != "" {
			h := w.hosts[r.Host]
			if h.Writes > 0 {
				h.LongestGap = max(h.LongestGap, start.Sub(h.Last))
			}
			h.Last, h.Writes = start, h.Writes+1
			w.hosts[r.Host] = h
		}
	}
	return nil
}

// leaveLocked ends the ownership at once and closes the device when nothing is at it any more.
func (w *ownership) leaveLocked(why error) {
	if w.o.Left() {
		return
	}
	w.why = why
	w.o.Leave()
	for c := range w.conns {
		c.Close()
	}
	w.change.Broadcast()
	go w.close()
}

func (w *ownership) close() {
	w.mu.Lock()
	for !w.o.Idle() {
		w.change.Wait()
	}
	w.mu.Unlock()
	w.dev.Close()
	close(w.ended)
}

// handOver lets requests end, marks the record clean and closes the device before clients are told. If the device does
// not answer within limit it is left without the mark.
func (w *ownership) handOver(limit time.Duration) {
	w.mu.Lock()
	if w.o.Left() {
		w.mu.Unlock()
		<-w.ended
		return
	}
	w.o.Leave()
	w.why = errors.New("handed over")
	w.change.Broadcast()
	timer := time.AfterFunc(limit, func() { w.change.Broadcast() })
	deadline := time.Now().Add(limit)
	for !w.o.Idle() && time.Now().Before(deadline) {
		w.change.Wait()
	}
	timer.Stop()
	idle := w.o.Idle()
	w.mu.Unlock()
	if idle && w.hasRoom {
		w.probing.Lock()
		w.record.Clean = true
		w.record.put(w.page)
		_ = w.dev.Write(w.page[:recordLen], recordOffset) // Without the mark the next owner waits a moment.
		w.probing.Unlock()
	}
	if idle {
		w.dev.Close()
		close(w.ended)
	} else {
		go w.close()
	}
	w.mu.Lock()
	for c := range w.conns {
		c.Close()
	}
	w.mu.Unlock()
}

// keep probes while nothing else is written, until the ownership ends.
func (w *ownership) keep(ctx context.Context) {
	for {
		w.mu.Lock()
		wait := w.o.ProbeIn(time.Now())
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-w.ended:
			return
		case <-time.After(wait):
		}
		if w.vouch(time.Now().Add(-w.t.Probe)) != nil {
			return
		}
	}
}

// ownerSession is one host's connection to the owner.
type ownerSession struct {
	w    *ownership
	conn net.Conn
	req  Request
	read bool // A client that is no host of the pool only reads.
}

func (s *ownerSession) Info() nbd.Info {
	i := nbd.Info{Size: uint64(s.w.size), MinBlock: 512, Preferred: 4096, Flags: nbd.FlagFlush | nbd.FlagFUA | nbd.FlagWriteZeroes | nbd.FlagMultiConn}
	if s.read {
		i.Flags |= nbd.FlagReadOnly
	}
	return i
}

func (s *ownerSession) prepare(off, n int64, write bool) error {
	s.req.Off, s.req.Len, s.req.Write = off, n, write
	err := s.w.enter(&s.req)
	switch {
	case errors.Is(err, errStale):
		s.conn.Close()
	case err != nil:
		<-s.w.ended // Told before the device is closed, a candidate would open it in vain and wait for its next turn.
	}
	return err
}

// Read answers only what was current: see Owner.Current.
func (s *ownerSession) Read(p []byte, off int64) error {
	if err := s.prepare(off, int64(len(p)), false); err != nil {
		return err
	}
	err := s.w.dev.Read(p, off)
	at := time.Now()
	if err := s.w.finish(&s.req, at, err); err != nil {
		return err
	}
	s.w.mu.Lock()
	current := s.w.o.Current(at)
	s.w.mu.Unlock()
	if !current && s.w.vouch(at) != nil {
		return nbd.ESHUTDOWN
	}
	return nil
}

func (s *ownerSession) Write(p []byte, off int64, fua bool) error {
	if err := s.prepare(off, int64(len(p)), true); err != nil {
		return err
	}
	start := time.Now()
	err := s.w.dev.Write(p, off)
	if err == nil && fua {
		err = s.w.dev.Flush()
	}
	return s.w.finish(&s.req, start, err)
}

var zeroes = nbd.AlignedBuffer(64 << 10)

func (s *ownerSession) Zero(off, n int64, fua bool) error {
	for n > 0 {
		piece := min(n, int64(len(zeroes)))
		if err := s.Write(zeroes[:piece], off, fua); err != nil {
			return err
		}
		off, n = off+piece, n-piece
	}
	return nil
}

func (s *ownerSession) Flush() error {
	// Writes went around every cache of this host; DRBD's disks honour a flush.
	if err := s.prepare(0, 0, false); err != nil {
		return err
	}
	err := s.w.dev.Flush()
	return s.w.finish(&s.req, time.Now(), err)
}

func (s *ownerSession) Close() {
	s.w.mu.Lock()
	delete(s.w.conns, s.conn)
	s.w.mu.Unlock()
}

// clients are the hosts that have had a session, by name.
func (w *ownership) clients() (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for host := range w.o.sessions {
		if bare, _, _ := strings.Cut(host, "~"); !strings.Contains(bare, "#") { // A client without a host has its address.
			names = append(names, bare)
		}
	}
	return names
}

// sessionName is the export's name as fronts send it: export@host/boot/count.
func sessionName(export, host string, s Session) string {
	return export + "@" + host + "/" + s.Boot + "/" + strconv.FormatUint(s.Count, 10)
}

// parseSessionName takes the name apart; a name without "@" is a client that is no host.
func parseSessionName(name string) (export, host string, s Session, err error) {
	export, rest, ok := strings.Cut(name, "@")
	if !ok {
		return name, "", Session{}, nil
	}
	part := strings.Split(rest, "/")
	if len(part) != 3 || part[0] == "" || part[1] == "" || len(name) > 512 {
		return "", "", Session{}, errors.New("malformed session name")
	}
	count, err := strconv.ParseUint(part[2], 10, 64)
	return export, part[0], Session{Boot: part[1], Count: count}, err
}

// accept opens a session for a client of the owner.
func (w *ownership) accept(ctx context.Context, host string, s Session, conn net.Conn) (nbd.Session, error) {
	w.mu.Lock()
	wait := w.o.ServesIn(time.Now())
	w.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(wait):
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	anonymous := host == ""
	if anonymous {
		host = conn.RemoteAddr().String() + "#" + strconv.FormatInt(time.Now().UnixNano(), 36)
		s = Session{Boot: "anonymous"}
	}
	if w.o.Left() {
		w.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-w.ended:
		}
		w.mu.Lock()
	}
	if !w.o.Hello(host, s) {
		return nil, &nbd.Refusal{Code: nbd.Shutdown, Message: "this owner leaves, or the host has a newer session"}
	}
	w.change.Broadcast()
	w.conns[conn] = struct{}{}
	return &ownerSession{w: w, conn: conn, req: Request{Host: host, Session: s}, read: anonymous}, nil
}

// sinceBoot is the time since boot in nanoseconds: the order of a boot's sessions, on whatever wall clock.
func sinceBoot() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return uint64(time.Now().UnixNano())
	}
	return uint64(ts.Nano())
}
