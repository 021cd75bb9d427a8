package realpool

import (
	"io"
	"net"
	"sync"
)

// drbdsetup is the stand-in. Whoever has the file locked is Primary; the owner's record tells its name. A host's cut links
// are files. When a majority has cut its links to the Primary, the file's content moves to a new file under the same name,
// which others can lock, and the old owner loses the right to write until it has closed the old file: its I/O fails, as on
// DRBD without quorum. Nothing of the owner is in flight then, because it is stopped.
const drbdsetup = `#!/bin/sh
cd "$POOL" || exit 20
node() { echo $((${1#n} - 1)); }
primary() {
	grep -q ":$(stat -c %i disk) " /proc/locks || return 0
	dd if=disk bs=1 skip=266272 count=64 2>/dev/null | tr -d '\000'
}
forgive() {
	for f in evicted-*; do
		[ -e "$f" ] || continue
		read -r pid < "$f"
		ls -l "/proc/$pid/fd" 2>/dev/null | grep -q deleted && continue
		prlimit --pid "$pid" --fsize=unlimited: 2>/dev/null
		rm -f "$f"
	done
}
case $1 in
show)
	cat policy.json ;;
status)
	forgive
	quorum=true; [ -e "noquorum-$SELF" ] && quorum=false
	owner=$(primary)
	printf '[{"name":"r","devices":[{"volume":0,"disk-state":"UpToDate","quorum":%s}],"connections":[' $quorum
	i=1; comma=
	while [ $i -le "$HOSTS" ]; do
		peer=n$i; i=$((i + 1))
		[ "$peer" = "$SELF" ] && continue
		state=Connected; role=Secondary
		[ "$peer" = "$owner" ] && role=Primary
		if [ -e "cut-$SELF-$peer" ]; then state=StandAlone; role=Unknown; fi
		printf '%s{"peer-node-id":%d,"name":"%s","connection-state":"%s","peer-role":"%s","peer_devices":[{"peer-disk-state":"UpToDate"}]}' "$comma" "$(node $peer)" $peer $state $role
		comma=,
	done
	echo ']}]' ;;
disconnect)
	peer=n$(($3 + 1))
	exec 9>evict.lock; flock 9
	: > "cut-$SELF-$peer"
	[ "$(primary)" = "$peer" ] || exit 0
	cuts=0; for f in cut-*-"$peer"; do [ -e "$f" ] && cuts=$((cuts + 1)); done
	if [ $((2 * (HOSTS - cuts))) -le "$HOSTS" ]; then
		read -r pid < "pid-$peer"
		prlimit --pid "$pid" --fsize=0: || exit 10
		cp disk disk.new && ln disk disk.old && mv disk.new disk && : > disk.old && rm disk.old
		cp "pid-$peer" evicted.new && mv evicted.new "evicted-$peer"
	fi ;;
connect)
	rm -f "cut-$SELF-n$(($3 + 1))"; forgive ;;
*)
	exit 20 ;;
esac
`

// link relays a host's address on the storage network to its listener until it is cut: then it takes connections and
// bytes and passes nothing on, as a network that loses all packets.
type link struct {
	l  net.Listener
	to string
	wg sync.WaitGroup

	mu     sync.Mutex
	down   chan struct{} // Closed by cut.
	up     chan struct{} // Closed by mend, and by close.
	closed bool
	conns  map[net.Conn]struct{}
}

func newLink(to string) (*link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &link{l: l, to: to, down: make(chan struct{}), up: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	close(k.up)
	k.wg.Go(k.accept)
	return k, nil
}

func (k *link) addr() string { return k.l.Addr().String() }

func (k *link) cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.up = make(chan struct{})
	close(k.down)
}

// mend lets packets through again. Connections from before the cut are reset, as they will be after a long one.
func (k *link) mend() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for c := range k.conns {
		c.Close()
	}
	k.down = make(chan struct{})
	close(k.up)
}

func (k *link) close() {
	k.l.Close()
	k.mu.Lock()
	k.closed = true
	for c := range k.conns {
		c.Close()
	}
	select {
	case <-k.up:
	default:
		close(k.up)
	}
	k.mu.Unlock()
	k.wg.Wait()
}

func (k *link) accept() {
	for {
		c, err := k.l.Accept()
		if err != nil {
			return
		}
		k.wg.Go(func() { k.relay(c) })
	}
}

// hold keeps a connection until the end of relay.
func (k *link) hold(c net.Conn) (down, up chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		c.Close()
	}
	k.conns[c] = struct{}{}
	return k.down, k.up
}

func (k *link) drop(c net.Conn) {
	c.Close()
	k.mu.Lock()
	delete(k.conns, c)
	k.mu.Unlock()
}

func (k *link) relay(near net.Conn) {
	defer k.drop(near)
	down, up := k.hold(near)
	<-up
	far, err := net.Dial("tcp", k.to)
	if err != nil {
		return
	}
	defer k.drop(far)
	k.hold(far)
	var wg sync.WaitGroup
	pass := func(to, from net.Conn) {
		_, _ = io.Copy(cuttable{to, down, k}, from) // A broken connection is closed to the other side.
		to.Close()
		from.Close()
	}
	wg.Go(func() { pass(far, near) })
	wg.Go(func() { pass(near, far) })
	wg.Wait()
}

// cuttable loses what is written to it while the link is cut.
type cuttable struct {
	net.Conn
	down chan struct{}
	k    *link
}

func (c cuttable) Write(p []byte) (int, error) {
	select {
	case <-c.down:
		return len(p), nil
	default:
		return c.Conn.Write(p)
	}
}
