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
	redial      = time.Second
)

// The names that systemd's D-Bus interface goes by, org.freedesktop.systemd1(5).
const (
	destination      = "org.freedesktop.systemd1"
	managerPath      = "/org/freedesktop/systemd1"
	unitFolder       = "/org/freedesktop/systemd1/unit"
	managerInterface = "org.freedesktop.systemd1.Manager"
	unitInterface    = "org.freedesktop.systemd1.Unit"
	serviceInterface = "org.freedesktop.systemd1.Service"
	properties       = "org.freedesktop.DBus.Properties"
	get              = properties + ".Get"
	getAll           = properties + ".GetAll"
	changed          = properties + ".PropertiesChanged"
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
	conn   *dbus.Conn    // one for calls and signals: on its private socket systemd writes every signal to every connection
	dialed chan struct{} // closed when the dial in flight ends
	closed bool
}

// Close drops the connection. Later calls fail.
func (u *Units) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	if u.conn != nil {
		_ = u.conn.Close() // calls under way end with an error of their own
		u.conn = nil
	}
}

// State reads a unit. A unit that does not exist has Load "not-found" and Active "inactive". Error: matches ErrUnreachable.
func (u *Units) State(ctx context.Context, name string) (Unit, error) {
	out := Unit{Name: name}
	err := u.call(ctx, func(ctx context.Context, c *dbus.Conn) error {
		var props map[string]dbus.Variant
		if err := unitObject(c, name).CallWithContext(ctx, getAll, 0, unitInterface).Store(&props); err != nil {
			return err
		}
		out.Load, out.Active, out.Sub = text(props["LoadState"]), text(props["ActiveState"]), text(props["SubState"])
		out.ActiveSince, out.InactiveSince = stamp(props["ActiveEnterTimestamp"]), stamp(props["InactiveEnterTimestamp"])
		out.BegunAt = stamp(props["InactiveExitTimestamp"])
		if job, ok := props["Job"].Value().([]any); ok && len(job) > 0 {
			out.Job, _ = job[0].(uint32)
		}
		if !strings.HasSuffix(name, ".service") || out.Load == "not-found" {
			return nil
		}
		return service(ctx, c, &out)
	})
	if err != nil {
		return Unit{}, fmt.Errorf("read unit %s: %w", name, err)
	}
	return out, nil
}

// service reads what only services have. GetAll would have systemd read the cgroup's files and write three hundred properties, most of what an idle agent
// allocated. A unit that is not loaded must not be read so: each Get would load and unload it, and all who listen would hear of it.
func service(ctx context.Context, c *dbus.Conn, u *Unit) error {
	var pid uint32
	var status int32
	wanted := []struct {
		name string
		into any
		call *dbus.Call
	}{{name: "MainPID", into: &pid}, {name: "ExecMainStatus", into: &status}, {name: "Result", into: &u.Result}}
	object := unitObject(c, u.Name)
	for i := range wanted {
		wanted[i].call = object.GoWithContext(ctx, get, 0, make(chan *dbus.Call, 1), serviceInterface, wanted[i].name)
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
	return u.job(ctx, "start", name, func(ctx context.Context, c *dbus.Conn) error { return u.queue(ctx, c, "StartUnit", name) })
}

// Restart queues a stop and a start: for units that count as active although what they did is gone.
func (u *Units) Restart(ctx context.Context, name string) error {
	return u.job(ctx, "restart", name, func(ctx context.Context, c *dbus.Conn) error { return u.queue(ctx, c, "RestartUnit", name) })
}

// queue resets a unit's failure, without which the start limit of earlier failures refuses, and queues a job. The job does not wait for the answer to the reset:
// systemd is slowest when much happens, and one connection keeps the order of two messages. What the reset says does not matter, for a unit
// that is not loaded cannot be reset and need not be; the job's own answer counts.
func (u *Units) queue(ctx context.Context, c *dbus.Conn, method, name string) error {
	reset := manager(c).GoWithContext(ctx, managerInterface+".ResetFailedUnit", 0, make(chan *dbus.Call, 1), name)
	job := manager(c).GoWithContext(ctx, managerInterface+"."+method, 0, make(chan *dbus.Call, 1), name, string(Replace))
	if u.Sent != nil {
		u.Sent(name)
	}
	<-reset.Done
	return (<-job.Done).Err
}

// Stop queues a stop. A unit that is not loaded is stopped already.
func (u *Units) Stop(ctx context.Context, name string, mode StopMode) error {
	return u.job(ctx, "stop", name, func(ctx context.Context, c *dbus.Conn) error {
		return ignoreNotLoaded(manager(c).CallWithContext(ctx, managerInterface+".StopUnit", 0, name, string(mode)).Err)
	})
}

// Kill sends a signal to every process of the unit's cgroup. No process, or no such unit: no error.
func (u *Units) Kill(ctx context.Context, name string, signal syscall.Signal) error {
	return u.job(ctx, "kill", name, func(ctx context.Context, c *dbus.Conn) error {
		err := kill(ctx, c, name, "all", signal)
		if e, ok := errors.AsType[dbus.Error](err); ok && (e.Name == "org.freedesktop.systemd1.NoSuchProcess" || e.Name == "org.freedesktop.DBus.Error.UnixProcessIdUnknown") {
			return nil
		}
		return err
	})
}

// SignalMain sends a signal to the unit's main process only.
func (u *Units) SignalMain(ctx context.Context, name string, signal syscall.Signal) error {
	return u.job(ctx, "signal", name, func(ctx context.Context, c *dbus.Conn) error { return kill(ctx, c, name, "main", signal) })
}

// kill sends a signal to who of the unit: all, main, control.
func kill(ctx context.Context, c *dbus.Conn, name, who string, signal syscall.Signal) error {
	return ignoreNotLoaded(manager(c).CallWithContext(ctx, managerInterface+".KillUnit", 0, name, who, int32(signal)).Err)
}

func (u *Units) job(ctx context.Context, verb, name string, f func(context.Context, *dbus.Conn) error) error {
	if err := u.call(ctx, f); err != nil {
		return fmt.Errorf("%s unit %s: %w", verb, name, err)
	}
	return nil
}

// Watch calls hint whenever one of the units may have changed, until ctx ends: after signals, after each reconnect, and every few seconds in any case.
// hint must not block.
func (u *Units) Watch(ctx context.Context, names []string, hint func()) {
	wanted := map[dbus.ObjectPath]bool{}
	for _, n := range names {
		wanted[unitPath(n)] = true
	}
	for ctx.Err() == nil {
		began := time.Now()
		u.watchOnce(ctx, wanted, hint)
		wait(ctx, redial-time.Since(began)) // what lasted for a while is replaced at once
	}
}

// watchOnce follows one connection until it breaks.
func (u *Units) watchOnce(ctx context.Context, wanted map[dbus.ObjectPath]bool, hint func()) {
	hint()
	dialing, cancel := u.bounded(ctx)
	conn, err := u.current(dialing)
	cancel()
	if err != nil {
		return
	}
	signals := make(chan *dbus.Signal, 16) // what does not fit waits in godbus
	conn.Signal(signals)
	defer conn.RemoveSignal(signals)
	subscribed := make(chan error, 1)
	subscribe := func() { subscribed <- u.subscribe(ctx, conn) }
	go subscribe()
	refused := false
	poll := time.NewTicker(watchPoll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-conn.Context().Done():
			return
		case err := <-subscribed:
			if _, refused = errors.AsType[dbus.Error](err); err != nil && !refused {
				if ctx.Err() == nil {
					u.drop(conn)
				}
				return
			}
			hint() // what changed until now was not told
		case <-poll.C:
			if refused { // a no says nothing against the connection, which calls use too
				refused = false
				go subscribe()
			}
			hint()
		case sig, open := <-signals:
			if !open {
				return
			}
			// Each change comes twice, for the unit and for its type.
			if sig.Name == changed && wanted[sig.Path] && len(sig.Body) > 0 && sig.Body[0] == unitInterface {
				hint()
			}
		}
	}
}

// subscribe asks systemd for signals. Doing it again on one connection leaves one more rule at a dbus-daemon and nothing else.
func (u *Units) subscribe(ctx context.Context, c *dbus.Conn) error {
	ctx, cancel := u.bounded(ctx)
	defer cancel()
	// Only a dbus-daemon wants it; on its private socket systemd sends everything, and refuses this call. Without it the watch polls.
	_ = c.AddMatchSignalContext(ctx, dbus.WithMatchInterface(properties), dbus.WithMatchMember("PropertiesChanged"), dbus.WithMatchPathNamespace(unitFolder), dbus.WithMatchArg(0, unitInterface))
	err := manager(c).CallWithContext(ctx, managerInterface+".Subscribe", 0).Err
	if e, ok := errors.AsType[dbus.Error](err); ok && e.Name == "org.freedesktop.systemd1.AlreadySubscribed" {
		return nil
	}
	return err
}

// bounded gives systemd its time to answer.
func (u *Units) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, cmp.Or(u.Timeout, callTimeout))
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
func (u *Units) call(caller context.Context, f func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := u.bounded(caller)
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
		if errors.Is(caller.Err(), context.Canceled) {
			return fmt.Errorf("%w: %w", ErrUnreachable, err) // the caller left, which says nothing of the connection
		}
		u.drop(conn)
		if ctx.Err() != nil || try > 0 {
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
	}
}

func (u *Units) drop(c *dbus.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn == c {
		u.conn = nil
	}
	_ = c.Close()
}

// current returns a living connection. One dial runs at a time; all callers wait for it, each no longer than its context, which must have an end.
func (u *Units) current(ctx context.Context) (*dbus.Conn, error) {
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
			_ = u.conn.Close()
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
	conn, err := u.dial(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.dialed = nil
	close(done)
	if err != nil {
		return nil, err
	}
	if u.closed {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: closed", ErrUnreachable)
	}
	u.conn = conn
	return conn, nil
}

func (u *Units) dial(ctx context.Context) (*dbus.Conn, error) {
	c, err := connect(ctx, cmp.Or(u.Private, PrivateSocket), false)
	if err == nil {
		return c, nil
	}
	c, busErr := connect(ctx, cmp.Or(u.Bus, SystemBus), true)
	if busErr == nil {
		return c, nil
	}
	return nil, fmt.Errorf("%w: %w", ErrUnreachable, errors.Join(err, busErr))
}

// connect opens one D-Bus connection. ctx bounds the opening and not its life. hello: through a dbus-daemon.
func connect(ctx context.Context, socket string, hello bool) (*dbus.Conn, error) {
	// The default handler starts a goroutine for each signal when a hundred are waiting, and reorders them.
	conn, err := dbus.Dial("unix:path="+socket, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	opened := context.AfterFunc(ctx, func() { _ = conn.Close() }) // authentication takes no context
	if err = conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err == nil && hello {
		err = conn.Hello()
	}
	if !opened() {
		err = ctx.Err()
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

func unitPath(name string) dbus.ObjectPath {
	return unitFolder + "/" + dbus.ObjectPath(sd.PathBusEscape(name))
}

func unitObject(c *dbus.Conn, name string) dbus.BusObject {
	return c.Object(destination, unitPath(name))
}

func manager(c *dbus.Conn) dbus.BusObject { return c.Object(destination, managerPath) }

func text(v dbus.Variant) string {
	s, _ := v.Value().(string)
	return s
}

// stamp turns systemd's microseconds since 1970 into a time.
func stamp(v dbus.Variant) time.Time {
	usec, _ := v.Value().(uint64)
	if usec == 0 {
		return time.Time{}
	}
	return time.UnixMicro(int64(usec))
}
