// Package knbd attaches sockets to the kernel's nbd client over generic netlink (drivers/block/nbd.c, nbd-netlink.h).
// Unlike the ioctl way a device outlives its sockets, so a restarted shim takes its device over.
package knbd

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// Commands and attributes of the family "nbd", version 1.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex       = 1
	attrSize        = 2
	attrBlock       = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDead        = 8

	sockItem = 1
	sockFD   = 1
)

// Device is what to attach.
type Device struct {
	Index       int           // Of /dev/nbdN; -1 lets the kernel choose at Connect.
	Size        uint64        // Bytes.
	Block       uint64        // Logical block size in bytes; xhad needs 512.
	Timeout     time.Duration // Whole seconds; how long the kernel waits for an answer before it ends a socket.
	DeadTimeout time.Duration // Whole seconds; how long it waits for a new socket when all are gone.
	ServerFlags uint64        // The export's transmission flags.
	Sockets     []int         // File descriptors past the handshake. Two, or old kernels end the device at the first time-out.
}

// Link sends one message to the kernel and returns its answers. The kernel is behind it, or a test.
type Link interface {
	Execute(command uint8, attributes []byte) ([][]byte, error)
}

// ErrNoKernel means that the kernel has no nbd client.
var ErrNoKernel = errors.New("kernel has no nbd netlink family; modprobe nbd")

// Dial opens the kernel's link.
func Dial() (Link, func() error, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, nil, fmt.Errorf("open generic netlink: %w", err)
	}
	f, err := c.GetFamily("nbd")
	if err != nil {
		c.Close()
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil, ErrNoKernel
		}
		return nil, nil, fmt.Errorf("find nbd family: %w", err)
	}
	return kernel{c, f}, c.Close, nil
}

type kernel struct {
	c *genetlink.Conn
	f genetlink.Family
}

func (k kernel) Execute(command uint8, attributes []byte) ([][]byte, error) {
	// CONNECT is answered with an index or an error. An acknowledgement would come besides, and be taken for the answer to the
	// next command; the other commands have no other answer.
	flags := netlink.Request
	if command != cmdConnect {
		flags |= netlink.Acknowledge
	}
	msgs, err := k.c.Execute(genetlink.Message{Header: genetlink.Header{Command: command, Version: k.f.Version}, Data: attributes}, k.f.ID, flags)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for _, m := range msgs {
		out = append(out, m.Data)
	}
	return out, nil
}

// encode makes the attributes of CONNECT and RECONFIGURE.
func encode(d Device) ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	if d.Index >= 0 {
		e.Uint32(attrIndex, uint32(d.Index))
	}
	e.Uint64(attrSize, d.Size)
	e.Uint64(attrBlock, d.Block)
	e.Uint64(attrTimeout, uint64(d.Timeout/time.Second))
	e.Uint64(attrDead, uint64(d.DeadTimeout/time.Second))
	e.Uint64(attrServerFlags, d.ServerFlags)
	e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range d.Sockets {
			list.Nested(sockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(sockFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
	return e.Encode()
}

// Connect attaches a new device and returns its index.
func Connect(l Link, d Device) (int, error) {
	data, err := encode(d)
	if err != nil {
		return 0, fmt.Errorf("encode nbd device: %w", err)
	}
	answers, err := l.Execute(cmdConnect, data)
	if err != nil {
		return 0, fmt.Errorf("connect nbd device: %w", err)
	}
	if d.Index >= 0 {
		return d.Index, nil
	}
	for _, a := range answers {
		dec, err := netlink.NewAttributeDecoder(a)
		if err != nil {
			continue
		}
		for dec.Next() {
			if dec.Type() == attrIndex {
				return int(dec.Uint32()), nil
			}
		}
	}
	return 0, errors.New("connect nbd device: kernel named no index")
}

// Reconfigure gives an existing device new sockets. The kernel fills only places of sockets that it knows to be dead, and
// says nothing if there are none.
func Reconfigure(l Link, d Device) error {
	data, err := encode(d)
	if err != nil {
		return fmt.Errorf("encode nbd device: %w", err)
	}
	if _, err := l.Execute(cmdReconfigure, data); err != nil {
		return fmt.Errorf("reconfigure nbd device: %w", err)
	}
	return nil
}

// Disconnect ends a device.
func Disconnect(l Link, index int) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	data, err := e.Encode()
	if err != nil {
		return fmt.Errorf("encode nbd index: %w", err)
	}
	if _, err := l.Execute(cmdDisconnect, data); err != nil {
		return fmt.Errorf("disconnect nbd device: %w", err)
	}
	return nil
}
