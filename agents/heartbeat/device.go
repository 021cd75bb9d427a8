package heartbeat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
)

// Device is the opened device. Its methods may be called from many goroutines, with aligned buffers. A nil error means
// that the device acknowledged the whole length.
type Device interface {
	Size() int64 // Bytes, fixed at the open.
	Read(p []byte, off int64) error
	Write(p []byte, off int64) error
	Flush() error
	Close() error
}

// ErrHeld is an open that failed because another host holds the device, or because there is no quorum.
var ErrHeld = errors.New("device is held by another host or has no quorum")

// ErrTooSmall is a device without room for the statefile.
var ErrTooSmall = errors.New("device is smaller than the statefile's 266240 bytes")

const drbdMajor = 147

// blockDevice is a DRBD device, or for labs any other block device or file. O_DIRECT goes around the page cache.
type blockDevice struct {
	f     *os.File
	fd    int
	size  int64
	block int64      // Logical block size in bytes.
	wide  sync.Mutex // Serialises read-modify-write on devices with large blocks.
	buf   []byte     // One block; nil if blocks are 512 bytes.
}

// refusals are DRBD's answers to an open that may be given at another time: another Primary or no quorum; a forced demotion
// whose last holder is still there; in use; a change of state under way elsewhere (seen when several hosts ask at once).
var refusals = []syscall.Errno{syscall.EROFS, syscall.ENOTRECOVERABLE, syscall.EBUSY, syscall.EAGAIN}

// OpenDevice opens path for the owner. On DRBD the open asks for promotion: it takes up to about 1.5 s, and ErrHeld says
// that it was refused. DRBD excludes other hosts and other openers here by itself; files and other devices are
// locked with flock instead. least is the smallest size accepted, in bytes.
func OpenDevice(path string, least int64) (Device, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		if slices.ContainsFunc(refusals, func(no syscall.Errno) bool { return errors.Is(err, no) }) {
			return nil, fmt.Errorf("%w: %w", ErrHeld, err)
		}
		return nil, fmt.Errorf("open device: %w", err)
	}
	d := &blockDevice{f: f, fd: int(f.Fd()), block: 512}
	if err := d.inspect(least); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

func (d *blockDevice) inspect(least int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return fmt.Errorf("stat device: %w", err)
	}
	isBlock := st.Mode&unix.S_IFMT == unix.S_IFBLK
	if !isBlock || unix.Major(st.Rdev) != drbdMajor {
		if err := unix.Flock(d.fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("%w: %w", ErrHeld, err)
		}
	}
	d.size = st.Size
	if isBlock {
		block, err := unix.IoctlGetInt(d.fd, unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("read block size: %w", err)
		}
		var size uint64
		if _, _, no := syscall.Syscall(syscall.SYS_IOCTL, uintptr(d.fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); no != 0 {
			return fmt.Errorf("read size of device: %w", no)
		}
		d.block, d.size = int64(block), int64(size)
	}
	if d.block > 512 {
		d.buf = nbd.AlignedBuffer(int(d.block))
	}
	d.size -= d.size % max(d.block, 512)
	if d.size < least {
		return fmt.Errorf("%w: %d bytes", ErrTooSmall, d.size)
	}
	return nil
}

func (d *blockDevice) Size() int64 { return d.size }

// full does preads or pwrites until p is done. A short result is not an error by itself; one of nothing is.
func full(p []byte, off int64, call func(int, []byte, int64) (int, error), fd int) error {
	for len(p) > 0 {
		n, err := call(fd, p, off)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return err
		case n <= 0:
			return io.ErrUnexpectedEOF
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (d *blockDevice) Read(p []byte, off int64) error {
	if d.buf == nil || off%d.block == 0 && int64(len(p))%d.block == 0 {
		return full(p, off, syscall.Pread, d.fd)
	}
	d.wide.Lock()
	defer d.wide.Unlock()
	return d.eachBlock(p, off, func(part, block []byte, _ int64) error { copy(part, block); return nil })
}

func (d *blockDevice) Write(p []byte, off int64) error {
	if d.buf == nil {
		return full(p, off, syscall.Pwrite, d.fd)
	}
	d.wide.Lock()
	defer d.wide.Unlock()
	if off%d.block == 0 && int64(len(p))%d.block == 0 {
		return full(p, off, syscall.Pwrite, d.fd)
	}
	return d.eachBlock(p, off, func(part, block []byte, at int64) error {
		copy(block, part)
		return full(d.buf, at, syscall.Pwrite, d.fd)
	})
}

// eachBlock reads each block that p touches and gives do the matching parts of p and of the block.
func (d *blockDevice) eachBlock(p []byte, off int64, do func(part, block []byte, at int64) error) error {
	for len(p) > 0 {
		at := off - off%d.block
		if err := full(d.buf, at, syscall.Pread, d.fd); err != nil {
			return err
		}
		n := min(int64(len(p)), d.block-(off-at))
		if err := do(p[:n], d.buf[off-at:off-at+n], at); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (d *blockDevice) Flush() error { return syscall.Fdatasync(d.fd) }
func (d *blockDevice) Close() error { return d.f.Close() }

// Record is what an owner leaves on the device, behind the statefile.
type Record struct {
	Owner   string `json:"owner"`   // Host uuid, at most 64 bytes.
	Epoch   uint64 `json:"epoch"`   // One more with each ownership.
	Counter uint64 `json:"counter"` // One more with each probe.
	Clean   bool   `json:"clean"`   // Closed in order: nobody answers reads for this epoch any more.
}

const (
	recordOffset = statefile.Size
	recordLen    = 512
	recordMagic  = 0x31626864736f7861 // "axosdhb1".
)

// put stores the record in p, recordLen bytes.
func (r Record) put(p []byte) {
	clear(p[:recordLen])
	binary.LittleEndian.PutUint64(p, recordMagic)
	binary.LittleEndian.PutUint64(p[8:], r.Epoch)
	binary.LittleEndian.PutUint64(p[16:], r.Counter)
	if r.Clean {
		p[24] = 1
	}
	p[25] = byte(copy(p[32:96], r.Owner))
}

// ParseRecord reads a record; false if there is none.
func ParseRecord(p []byte) (Record, bool) {
	if len(p) < recordLen || binary.LittleEndian.Uint64(p) != recordMagic || p[25] > 64 || p[24] > 1 {
		return Record{}, false
	}
	return Record{Owner: string(p[32 : 32+int(p[25])]), Epoch: binary.LittleEndian.Uint64(p[8:]), Counter: binary.LittleEndian.Uint64(p[16:]), Clean: p[24] == 1}, true
}
