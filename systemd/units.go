package systemd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// Where systemd listens.
const (
	PrivateSocket = "/run/systemd/private"
	SystemBus     = "/run/dbus/system_bus_socket"
)

const (
	callTimeout = 2 * time.Second
	watchPoll   = 3 * time.Second // re-read although no signal came
	aliveCheck  = time.Second     // go-systemd does not tell that a connection broke
)

// ErrUnreachable says that systemd could not be asked. Nothing is known about the unit then.
var ErrUnreachable = errors.New("systemd does not answer")

// Unit is the state of one unit at one moment.
type Unit struct {
	Name   string `json:"name"`
	Load   string `json:"load"`   // loaded, not-found, masked, error
	Active string `json:"active"` // active, reloading, inactive, failed, activating, deactivating
	Sub    string `json:"sub"`
	Job    uint32 `json:"job,omitempty"` // a job is queued or runs; 0: none
	// ActiveSince and InactiveSince are the times of the last change into and out of activity; zero: never.
	ActiveSince   time.Time `json:"active_since"`
	InactiveSince time.Time `json:"inactive_since"`
	BegunAt       time.Time `json:"begun_at"`           // when it last began to start; zero: never
	MainPID       int       `json:"main_pid,omitempty"` // services only
	Result        string    `json:"result,omitempty"`   // services only: success, exit-code, signal, core-dump, watchdog, timeout, start-limit…
	ExitStatus    int       `json:"exit_status,omitempty"`
}

// Running tells whether the unit is up or on its way there.
func (u Unit) Running() bool {
	return u.Active == "active" || u.Active == "reloading" || u.Active == "activating"
}

// Down tells whether nothing of the unit is left: inactive or failed, and no job pending.
func (u Unit) Down() bool { return (u.Active == "inactive" || u.Active == "failed") && u.Job == 0 }

// StopMode says what may cancel a stop.
type StopMode string

// The modes of Stop.
const (
	Replace      StopMode = "replace"
	Irreversibly StopMode = "replace-irreversibly" // no queued or later start cancels it
)

// Units reads and changes units. It connects when first used and again after a break. Its methods may be called concurrently; none waits longer than
// two seconds for systemd, and none waits for a job to end. Zero fields get the defaults. Close it.
type Units struct {
	Private string // systemd's private socket; PrivateSocket
	Bus     string // the system bus's socket, used when the private one cannot be; SystemBus
	// Timeout is how long systemd may take to answer one call; 2 s.
	Timeout time.Duration
	// Sent hears when the message that starts or restarts a unit has been written, before systemd has answered: for measurements. Nil: nobody.
	Sent func(unit string)

	mu     sync.Mutex
	conn   *link
	dialed chan struct{} // closed when the dial in flight ends
	closed bool
}

// link is one connection to systemd.
type link struct {
	*sd.Conn
	calls *dbus.Conn // the part of it that calls go over
}

// Close drops the connection. Later calls fail.
func (u *Units) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
}

// State reads a unit. A unit that does not exist has Load "not-found" and Active "inactive". Error: matches ErrUnreachable.
func (u *Units) State(ctx context.Context, name string) (Unit, error) {
	out := Unit{Name: name}
	err := u.call(ctx, func(ctx context.Context, c *link) error {
		props, err := c.GetUnitPropertiesContext(ctx, name)
		if err != nil {
			return err
		}
		out.Load, out.Active, out.Sub = text(props["LoadState"]), text(props["ActiveState"]), text(props["SubState"])
		out.ActiveSince, out.InactiveSince = stamp(props["ActiveEnterTimestamp"]), stamp(props["InactiveEnterTimestamp"])
		out.BegunAt = stamp(props["InactiveExitTimestamp"])
		if job, ok := props["Job"].([]any); ok && len(job) > 0 {
			out.Job, _ = job[0].(uint32)
		}
		if !strings.HasSuffix(name, ".service") || out.Load == "not-found" {
			return nil
		}
		return c.service(ctx, &out)
	})
	if err != nil {
		return Unit{}, fmt.Errorf("read unit %s: %w", name, err)
	}
	return out, nil
}

// service reads what only services have. GetAll would have systemd read the cgroup's files and write three hundred properties, most of what an idle agent
// allocated. A unit that is not loaded must not be read so: each Get would load and unload it, and all who listen would hear of it.
func (c *link) service(ctx context.Context, u *Unit) error {
	var pid uint32
	var status int32
	wanted := []struct {
		name string
		into any
		call *dbus.Call
	}{{name: "MainPID", into: &pid}, {name: "ExecMainStatus", into: &status}, {name: "Result", into: &u.Result}}
	object := c.calls.Object("org.freedesktop.systemd1", dbus.ObjectPath("/org/freedesktop/systemd1/unit/"+sd.PathBusEscape(u.Name)))
	for i := range wanted {
		wanted[i].call = object.GoWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, make(chan *dbus.Call, 1), "org.freedesktop.systemd1.Service", wanted[i].name)
	}
	for _, w := range wanted {
		var v dbus.Variant
		if err := (<-w.call.Done).Store(&v); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		if err := v.Store(w.into); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	u.MainPID, u.ExitStatus = int(pid), int(status)
	return nil
}

// Start queues a start, after clearing a failure and its start limit. It returns when the job is queued.
func (u *Units) Start(ctx context.Context, name string) error {
	return u.job(ctx, "start", name, func(ctx context.Context, c *link) error { return u.queue(ctx, c, "StartUnit", name) })
}

// Restart queues a stop and a start: for units that count as active although what they did is gone.
func (u *Units) Restart(ctx context.Context, name string) error {
	return u.job(ctx, "restart", name, func(ctx context.Context, c *link) error { return u.queue(ctx, c, "RestartUnit", name) })
}

// queue resets a unit's failure, without which the start limit of earlier failures refuses, and queues a job. The job does not wait for the answer to the reset:
// systemd is slowest when much happens, and one connection keeps the order of two messages. What the reset says does not matter, for a unit
// that is not loaded cannot be reset and need not be; the job's own answer counts.
func (u *Units) queue(ctx context.Context, c *link, method, name string) error {
	manager := c.calls.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	reset := manager.GoWithContext(ctx, "org.freedesktop.systemd1.Manager.ResetFailedUnit", 0, make(chan *dbus.Call, 1), name)
	job := manager.GoWithContext(ctx, "org.freedesktop.systemd1.Manager."+method, 0, make(chan *dbus.Call, 1), name, string(Replace))
	if u.Sent != nil {
		u.Sent(name)
	}
	<-reset.Done
	return (<-job.Done).Err
}

// Stop queues a stop. A unit that is not loaded is stopped already.
func (u *Units) Stop(ctx context.Context, name string, mode StopMode) error {
	return u.job(ctx, "stop", name, func(ctx context.Context, c *link) error {
		_, err := c.StopUnitContext(ctx, name, string(mode), nil)
		return ignoreNotLoaded(err)
	})
}

// Kill sends a signal to every process of the unit's cgroup. No process, or no such unit: no error.
func (u *Units) Kill(ctx context.Context, name string, signal syscall.Signal) error {
	return u.job(ctx, "kill", name, func(ctx context.Context, c *link) error {
		err := c.KillUnitWithTarget(ctx, name, sd.All, int32(signal))
		if e, ok := errors.AsType[dbus.Error](err); ok && (e.Name == "org.freedesktop.systemd1.NoSuchProcess" || e.Name == "org.freedesktop.DBus.Error.UnixProcessIdUnknown") {
			return nil
		}
		return ignoreNotLoaded(err)
	})
}

// SignalMain sends a signal to the unit's main process only.
func (u *Units) SignalMain(ctx context.Context, name string, signal syscall.Signal) error {
	return u.job(ctx, "signal", name, func(ctx context.Context, c *link) error {
		return ignoreNotLoaded(c.KillUnitWithTarget(ctx, name, sd.Main, int32(signal)))
	})
}

func (u *Units) job(ctx context.Context, verb, name string, f func(context.Context, *link) error) error {
	if err := u.call(ctx, f); err != nil {
		return fmt.Errorf("%s unit %s: %w", verb, name, err)
	}
	return nil
}

// Watch calls hint whenever one of the units may have changed, until ctx ends: after signals, after each reconnect, and every few seconds in any case.
// hint must not block.
func (u *Units) Watch(ctx context.Context, names []string, hint func()) {
	for ctx.Err() == nil {
		u.watchOnce(ctx, names, hint)
		wait(ctx, aliveCheck)
	}
}

// watchOnce follows one connection until it breaks.
func (u *Units) watchOnce(ctx context.Context, names []string, hint func()) {
	hint()
	conn, err := u.dialTimed(ctx)
	if err != nil {
		return
	}
	defer conn.Close()
	updates, overflow := make(chan *sd.PropertiesUpdate, 256), make(chan error, 1)
	conn.SetPropertiesSubscriber(updates, overflow)
	subscribed := make(chan error, 1)
	go func() { subscribed <- conn.Subscribe() }() // it takes no context; closing the connection ends it
	wanted := map[string]bool{}
	for _, n := range names {
		wanted[n] = true
	}
	alive, poll := time.NewTicker(aliveCheck), time.NewTicker(watchPoll)
	defer alive.Stop()
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-alive.C:
			if !conn.Connected() {
				return
			}
		case err := <-subscribed:
			if err != nil {
				return // dialled again in a second
			}
			hint() // what changed until now was not told
		case <-poll.C:
			hint()
		case err := <-overflow:
			if err != nil {
				hint()
			}
		case up := <-updates:
			if wanted[up.UnitName] {
				hint()
			}
		}
	}
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// call runs f on the connection, and once more on a new one when the old one turns out to be broken before f did anything.
func (u *Units) call(ctx context.Context, f func(context.Context, *link) error) error {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(u.Timeout, callTimeout))
	defer cancel()
	for try := 0; ; try++ {
		conn, err := u.current(ctx)
		if err != nil {
			return err
		}
		err = f(ctx, conn)
		if err == nil {
			return nil
		}
		if _, answered := errors.AsType[dbus.Error](err); answered {
			return err // systemd said no; the connection is fine
		}
		u.drop(conn)
		if ctx.Err() != nil || try > 0 {
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
	}
}

func (u *Units) drop(c *link) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn == c {
		u.conn = nil
	}
	c.Close()
}

// current returns a living connection. One dial runs at a time; all callers wait for it, each no longer than its context.
func (u *Units) current(ctx context.Context) (*link, error) {
	for {
		u.mu.Lock()
		switch {
		case u.closed:
			u.mu.Unlock()
			return nil, fmt.Errorf("%w: closed", ErrUnreachable)
		case u.conn != nil && u.conn.Connected():
			defer u.mu.Unlock()
			return u.conn, nil
		case u.conn != nil:
			u.conn.Close()
			u.conn = nil
		}
		busy := u.dialed
		if busy == nil {
			break
		}
		u.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, ctx.Err())
		}
	}
	done := make(chan struct{})
	u.dialed = done
	u.mu.Unlock()
	conn, err := u.dialTimed(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.dialed = nil
	close(done)
	if err != nil {
		return nil, err
	}
	if u.closed {
		conn.Close()
		return nil, fmt.Errorf("%w: closed", ErrUnreachable)
	}
	u.conn = conn
	return conn, nil
}

// dialTimed connects, but does not wait longer than ctx or Timeout: go-systemd's own set-up makes calls without a time-out.
func (u *Units) dialTimed(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(u.Timeout, callTimeout))
	defer cancel()
	type dialed struct {
		conn *link
		err  error
	}
	out := make(chan dialed, 1)
	go func() {
		conn, err := u.dial()
		out <- dialed{conn, err}
	}()
	select {
	case d := <-out:
		if d.err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, d.err)
		}
		return d.conn, nil
	case <-ctx.Done():
		go func() { // nobody wants it any more
			if d := <-out; d.err == nil {
				d.conn.Close()
			}
		}()
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, ctx.Err())
	}
}

func (u *Units) dial() (*link, error) {
	c, err := dialAt(cmp.Or(u.Private, PrivateSocket), false)
	if err == nil {
		return c, nil
	}
	c, busErr := dialAt(cmp.Or(u.Bus, SystemBus), true)
	if busErr == nil {
		return c, nil
	}
	return nil, errors.Join(err, busErr)
}

func dialAt(socket string, hello bool) (*link, error) {
	var out link
	var err error
	out.Conn, err = sd.NewConnection(func() (*dbus.Conn, error) {
		c, err := connect(socket, hello)
		out.calls = cmp.Or(out.calls, c) // go-systemd asks for two: the first is for calls, the second for signals
		return c, err
	})
	if err != nil {
		return nil, err
	}
	return &out, nil
}

// connect opens one D-Bus connection whose life no context ends. hello: through a dbus-daemon.
func connect(socket string, hello bool) (*dbus.Conn, error) {
	// The default handler starts a goroutine for each signal when a hundred are waiting, and reorders them.
	conn, err := dbus.Dial("unix:path="+socket, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	if err = conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err == nil && hello {
		err = conn.Hello()
	}
	if err != nil {
		_ = conn.Close() // it is of no use; the error above says why
		return nil, fmt.Errorf("authenticate at %s: %w", socket, err)
	}
	return conn, nil
}

func notLoaded(err error) bool {
	e, ok := errors.AsType[dbus.Error](err)
	return ok && e.Name == "org.freedesktop.systemd1.NoSuchUnit"
}

func ignoreNotLoaded(err error) error {
	if notLoaded(err) {
		return nil
	}
	return err
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

// stamp turns systemd's microseconds since 1970 into a time.
func stamp(v any) time.Time {
	usec, _ := v.(uint64)
	if usec == 0 {
		return time.Time{}
	}
	return time.UnixMicro(int64(usec))
}
