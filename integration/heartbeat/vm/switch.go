package vm

import (
	"errors"
	"fmt"
	"net"
	"sync"
)

// Switch joins the network cards of machines, over datagrams on this host's loopback. Every frame goes to all others.
type Switch struct {
	ports []*net.UDPConn // One by machine.
	local []int          // Where the machine's emulator listens.

	mu  sync.Mutex
	cut map[[2]int]bool // Frames from the first to the second are dropped.
}

// NewSwitch makes a switch for n machines.
func NewSwitch(n int) (*Switch, error) {
	s := &Switch{cut: map[[2]int]bool{}}
	for range n {
		port, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("make switch: %w", err)
		}
		_ = port.SetReadBuffer(4 << 20) // The default is enough for small bursts.
		s.ports = append(s.ports, port)
		// A port that was free a moment ago stands for the emulator's, which wants to be told.
		free, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("make switch: %w", err)
		}
		s.local = append(s.local, free.LocalAddr().(*net.UDPAddr).Port)
		free.Close()
	}
	for i := range n {
		go s.forward(i)
	}
	return s, nil
}

// Netdev is the configuration of machine i's network card.
func (s *Switch) Netdev(i int) string {
	return fmt.Sprintf("dgram,local.type=inet,local.host=127.0.0.1,local.port=%d,remote.type=inet,remote.host=127.0.0.1,remote.port=%d", s.local[i], s.ports[i].LocalAddr().(*net.UDPAddr).Port)
}

// MAC is the address of machine i's network card.
func (s *Switch) MAC(i int) string { return fmt.Sprintf("52:54:00:77:00:%02x", i+1) }

func (s *Switch) forward(from int) {
	frame := make([]byte, 1<<16)
	for {
		n, err := s.ports[from].Read(frame)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // The emulator at the other end is not there, or not any more.
		}
		for to, port := range s.ports {
			s.mu.Lock()
			drop := to == from || s.cut[[2]int{from, to}]
			s.mu.Unlock()
			if !drop {
				_, _ = port.WriteToUDP(frame[:n], &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: s.local[to]}) // A network may lose frames.
			}
		}
	}
}

// Cut drops all frames between machine i and the others, until the returned function is called.
func (s *Switch) Cut(i int) (heal func()) {
	var others []int
	for j := range s.ports {
		if j != i {
			others = append(others, j)
		}
	}
	return s.CutBetween(i, others...)
}

// CutBetween drops all frames between machine i and the given ones, until the returned function is called.
func (s *Switch) CutBetween(i int, others ...int) (heal func()) {
	set := func(cut bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, j := range others {
			s.cut[[2]int{i, j}], s.cut[[2]int{j, i}] = cut, cut
		}
	}
	set(true)
	return func() { set(false) }
}

// Close ends the switch.
func (s *Switch) Close() {
	for _, p := range s.ports {
		p.Close()
	}
}
