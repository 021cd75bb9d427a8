package knbd

import (
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
)

type fakeKernel struct {
	command uint8
	data    []byte
	answer  []byte
	err     error
}

func (f *fakeKernel) Execute(command uint8, data []byte) ([][]byte, error) {
	f.command, f.data = command, data
	return [][]byte{f.answer}, f.err
}

// The bytes are those that nbd-netlink.h and lib/nlattr.c ask for, written out by hand (little-endian host).
func TestEncoding(t *testing.T) {
	k := &fakeKernel{}
	d := Device{Index: 3, Size: 4 << 20, Block: 512, Timeout: 19 * time.Second, DeadTimeout: 24 * time.Second, ServerFlags: 0x10d, Sockets: []int{7, 8}}
	if err := Reconfigure(k, d); err != nil {
		t.Fatal(err)
	}
	want := "0800010003000000" + "0c0002000000400000000000" + "0c0003000002000000000000" + "0c0004001300000000000000" + "0c0008001800000000000000" +
		"0c0005000d01000000000000" + "1c000780" + "0c000180" + "0800010007000000" + "0c000180" + "0800010008000000"
	if got := hex.EncodeToString(k.data); got != want || k.command != cmdReconfigure {
		t.Errorf("command %d\n got %s\nwant %s", k.command, got, want)
	}
}

func TestConnectLearnsTheIndex(t *testing.T) {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, 11)
	answer, _ := e.Encode()
	k := &fakeKernel{answer: answer}
	if n, err := Connect(k, Device{Index: -1, Block: 512}); err != nil || n != 11 || k.command != cmdConnect {
		t.Errorf("index %d, %v", n, err)
	}
	k.answer = nil
	if _, err := Connect(k, Device{Index: -1}); err == nil {
		t.Error("no index was accepted")
	}
	k.err = errors.New("busy")
	if _, err := Connect(k, Device{Index: 2}); err == nil || Disconnect(k, 2) == nil || Reconfigure(k, Device{}) == nil {
		t.Error("the kernel's error was lost")
	}
}

func TestNoKernel(t *testing.T) {
	l, done, err := Dial()
	if err == nil {
		if err := done(); err != nil {
			t.Error(err)
		}
		t.Skip("this kernel has nbd; covered by its own test")
	}
	if l != nil || !errors.Is(err, ErrNoKernel) {
		t.Logf("dial: %v", err)
	}
}
