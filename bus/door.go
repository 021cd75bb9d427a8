package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrDoorTaken says that another live bus answers on the socket.
var ErrDoorTaken = errors.New("another bus answers there")

// doorListener is the socket of the local door together with the lock that proves that it is ours.
type doorListener struct {
	*net.UnixListener
	path string
	lock *os.File
}

// claimDoor makes the socket. It refuses when a live server answers there or the path is something else than a socket,
// and removes a stale one. A lock file beside it settles who comes first when two start at once.
//
// The mode is set on the socket before it is bound: Linux gives the file the mode of the socket's inode, so there is no
// moment at which the umask decides who may enter (net/unix/af_unix.c, unix_bind_bsd).
func claimDoor(path string) (_ *doorListener, err error) {
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open bus door: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("open bus door %s: %w", path, ErrDoorTaken)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("open bus door: %w", err)
	}
	return &doorListener{UnixListener: l.(*net.UnixListener), path: path, lock: lock}, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open bus door: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("open bus door %s: the path is no socket; remove it or configure another path", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		return errors.Join(fmt.Errorf("open bus door %s: %w", path, ErrDoorTaken), c.Close())
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale bus door: %w", err)
	}
	return nil
}

// release closes the socket, which removes it from the file system, and gives up the lock. The lock file stays: removing it would
// let a third process lock a different file of the same name.
func (l *doorListener) release() error {
	return errors.Join(l.UnixListener.Close(), l.lock.Close())
}

// door bridges connections of the local socket to the server's in-process connections.
type door struct {
	listener *doorListener
	dial     func() (net.Conn, error)
	log      *slog.Logger
	wg       sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

func openDoor(l *doorListener, dial func() (net.Conn, error), log *slog.Logger) *door {
	d := &door{listener: l, dial: dial, log: log, conns: map[net.Conn]struct{}{}}
	d.wg.Go(d.accept)
	return d
}

func (d *door) accept() {
	for {
		outside, err := d.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of file descriptors, most likely. Going on at once would spin.
			d.log.Warn("accept on bus door", "err", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		inside, err := d.dial()
		if err != nil {
			d.log.Warn("bridge bus door", "err", err)
			_ = outside.Close() // Nothing was sent; the client tries again.
			continue
		}
		if !d.track(outside, inside) {
			return
		}
		d.wg.Go(func() { d.copy(inside, outside) })
		d.wg.Go(func() { d.copy(outside, inside) })
	}
}

// track remembers both ends for close. It closes them itself and says no when the door is closed already.
func (d *door) track(conns ...net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range conns {
		if d.closed {
			_ = c.Close() // The door closes; the client sees the end of its connection.
			continue
		}
		d.conns[c] = struct{}{}
	}
	return !d.closed
}

// copy moves bytes one way. When one way ends both connections end: NATS has no half-closed connections.
func (d *door) copy(dst, src net.Conn) {
	_, err := io.Copy(dst, src)
	if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
		d.log.Debug("bus door connection ended", "err", err)
	}
	for _, c := range []net.Conn{dst, src} {
		_ = c.Close() // Closing twice is fine here; there is nobody to tell.
		d.mu.Lock()
		delete(d.conns, c)
		d.mu.Unlock()
	}
}

func (d *door) close() error {
	err := d.listener.release()
	d.mu.Lock()
	d.closed = true
	for c := range d.conns {
		_ = c.Close() // The copying goroutines see it and end.
	}
	d.mu.Unlock()
	d.wg.Wait()
	return err
}
