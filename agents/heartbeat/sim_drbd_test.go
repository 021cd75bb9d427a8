package heartbeat

import (
	"time"
)

// simDRBD models what drbd-lab.md measured of one resource: auto-promotion by open, quorum over the diskful nodes,
// on-no-quorum=io-error, late detection of cuts, peers dropped by a promotion, forced disconnect. Every disk holds a
// prefix of the writes of one generation; a promotion starts a new one.
type simDRBD struct {
	s       *sim
	diskful int // Nodes 0..diskful-1 have a disk and a vote.
	nodes   []*simNode
	phys    [][]bool // The replication network carries packets.
	gen     int
}

type simNode struct {
	up      bool
	frozen  bool // Its kernel.
	primary bool
	conn    []bool // It believes to be connected.
	cut     []bool // Disconnected by command, stays so until joined.
	broken  bool   // Its I/O fails.
	ver     simVersion
	disk    map[int]simCell
	pending []*simWrite
	life    int
}

type simVersion struct{ gen, n int }

func (v simVersion) less(o simVersion) bool { return v.gen < o.gen || v.gen == o.gen && v.n < o.n }

// simCell is the content of a register.
type simCell struct {
	id   uint64 // Unique per write by a client; 0 is never written.
	data []byte
}

type simWrite struct {
	reg    int
	cell   simCell
	ver    simVersion
	acks   []bool
	done   func(ok bool)
	closed bool
}

func newSimDRBD(s *sim, n int) *simDRBD {
	d := &simDRBD{s: s, diskful: min(n, 3)}
	for i := range n {
		node := &simNode{up: true, conn: make([]bool, n), cut: make([]bool, n), disk: map[int]simCell{}}
		row := make([]bool, n)
		for j := range n {
			row[j], node.conn[j] = true, i != j
		}
		d.nodes, d.phys = append(d.nodes, node), append(d.phys, row)
	}
	s.every(500*time.Millisecond, d.reconnect)
	return d
}

func (d *simDRBD) quorum(i int) bool {
	votes := 0
	for j := range d.diskful {
		if j == i || d.nodes[i].conn[j] {
			votes++
		}
	}
	return 2*votes > d.diskful
}

// responds says whether j's kernel answers a ping of i now.
func (d *simDRBD) responds(i, j int) bool {
	return d.nodes[j].up && !d.nodes[j].frozen && d.phys[i][j] && d.nodes[j].conn[i]
}

// drop makes i forget j, and j forget i as soon as it can hear of it.
func (d *simDRBD) drop(i, j int) {
	n := d.nodes[i]
	if !n.conn[j] {
		return
	}
	n.conn[j] = false
	d.settleWrites(i)
	d.s.after(10*time.Millisecond, func() { d.hear(j, i) })
}

// hear lets i learn that j dropped it.
func (d *simDRBD) hear(i, j int) {
	n := d.nodes[i]
	switch {
	case !n.up || !n.conn[j] || d.nodes[j].conn[i]:
	case n.frozen || !d.phys[i][j]:
		d.s.after(200*time.Millisecond, func() { d.hear(i, j) })
	default:
		n.conn[j] = false
		d.settleWrites(i)
	}
}

// setPhys ends or restores the replication network between a and b.
func (d *simDRBD) setPhys(a, b int, ok bool) {
	if d.phys[a][b] == ok {
		return
	}
	d.phys[a][b], d.phys[b][a] = ok, ok
	if ok {
		return
	}
	for _, p := range [][2]int{{a, b}, {b, a}} {
		i, j := p[0], p[1]
		wait := 500*time.Millisecond + d.s.upTo(10*time.Second)
		if d.nodes[i].primary {
			wait = 10600 * time.Millisecond // A busy owner is the last to notice.
		}
		d.s.after(wait, func() {
			if !d.responds(i, j) && d.nodes[i].up {
				d.drop(i, j)
			}
		})
	}
}

// settleWrites completes or fails i's writes after a connection was lost or an acknowledgement came.
func (d *simDRBD) settleWrites(i int) {
	n := d.nodes[i]
	if !n.primary {
		return
	}
	q := d.quorum(i)
	for len(n.pending) > 0 {
		w := n.pending[0]
		ok := q
		for j := range d.diskful {
			if q && (j == i || n.conn[j]) && !w.acks[j] {
				return // Completion is in order.
			}
		}
		n.pending = n.pending[1:]
		w.closed = true
		w.done(ok)
	}
}

// open is an O_NONBLOCK open for writing: done gets whether the node is Primary now.
func (d *simDRBD) open(i int, done func(ok bool)) {
	life := d.nodes[i].life
	end := func(after time.Duration, then func() bool) {
		d.s.after(after, func() {
			if d.nodes[i].life == life && d.nodes[i].up {
				done(then())
			}
		})
	}
	no := func() bool { return false }
	if d.nodes[i].primary {
		end(0, no)
		return
	}
	slow := d.dropSilent(i)
	if d.otherPrimary(i) {
		end(520*time.Millisecond, no)
		return
	}
	wait := 10*time.Millisecond + d.s.upTo(5*time.Millisecond)
	if slow {
		wait = 1100*time.Millisecond + d.s.upTo(300*time.Millisecond)
	}
	end(wait, func() bool {
		d.dropSilent(i)
		if d.otherPrimary(i) || !d.quorum(i) || d.nodes[i].primary {
			return false
		}
		return d.promote(i)
	})
}

// dropSilent makes i, and the peers that it asks, drop every peer whose kernel does not answer.
func (d *simDRBD) dropSilent(i int) bool {
	slow := false
	for _, a := range append([]int{i}, d.connected(i)...) {
		for j := range d.nodes {
			if d.nodes[a].conn[j] && !d.responds(a, j) && (a == i || d.responds(i, a)) {
				d.drop(a, j)
				slow = true
			}
		}
	}
	return slow
}

func (d *simDRBD) connected(i int) []int {
	var out []int
	for j := range d.nodes {
		if d.nodes[i].conn[j] && d.responds(i, j) {
			out = append(out, j)
		}
	}
	return out
}

// otherPrimary says whether i or a peer of it sees another Primary.
func (d *simDRBD) otherPrimary(i int) bool {
	for _, a := range append([]int{i}, d.connected(i)...) {
		for j, n := range d.nodes {
			if n.primary && j != i && (a == j || d.nodes[a].conn[j] && d.responds(a, j)) {
				return true
			}
		}
	}
	return false
}

func (d *simDRBD) promote(i int) bool {
	best := -1
	votes := 0
	for j := range d.diskful {
		if j == i || d.nodes[i].conn[j] && d.responds(i, j) {
			votes++
			if best < 0 || d.nodes[best].ver.less(d.nodes[j].ver) {
				best = j
			}
		}
	}
	if 2*votes <= d.diskful {
		return false
	}
	d.gen++
	for j := range d.diskful {
		if j == i || d.nodes[i].conn[j] {
			d.copyDisk(best, j, simVersion{d.gen, 0})
		}
	}
	n := d.nodes[i]
	n.primary, n.ver, n.pending = true, simVersion{d.gen, 0}, nil
	return true
}

func (d *simDRBD) copyDisk(from, to int, ver simVersion) {
	if from != to {
		fresh := make(map[int]simCell, len(d.nodes[from].disk))
		for k, v := range d.nodes[from].disk {
			fresh[k] = v
		}
		d.nodes[to].disk = fresh
	}
	d.nodes[to].ver = ver
}

// write submits a write at primary i; done is called once, unless the node dies.
func (d *simDRBD) write(i, reg int, cell simCell, done func(ok bool)) {
	n := d.nodes[i]
	if !n.primary || n.broken || !d.quorum(i) {
		d.s.after(0, func() { done(false) })
		return
	}
	n.ver.n++
	w := &simWrite{reg: reg, cell: cell, ver: n.ver, acks: make([]bool, len(d.nodes)), done: done}
	n.pending = append(n.pending, w)
	for j := range d.diskful {
		if j == i {
			n.disk[reg] = cell
			w.acks[j] = true
		} else if n.conn[j] {
			d.replicate(i, j, w, n.life)
		}
	}
	d.s.after(200*time.Microsecond, func() {
		if n.life != 0 || n.up {
			d.settleWrites(i)
		}
	})
}

// replicate carries w from i to j, again and again while the network or j's kernel does not take it.
func (d *simDRBD) replicate(i, j int, w *simWrite, life int) {
	d.s.after(300*time.Microsecond, func() {
		p, n := d.nodes[j], d.nodes[i]
		switch {
		case !n.up || n.life != life || !n.conn[j] || !p.conn[i] || !p.up:
		case p.frozen || !d.phys[i][j] || p.ver.gen == w.ver.gen && p.ver.n+1 < w.ver.n:
			d.s.after(5*time.Millisecond, func() { d.replicate(i, j, w, life) })
		case p.ver.gen != w.ver.gen:
		default:
			if p.ver.n < w.ver.n { // Else a resync brought it already.
				p.disk[w.reg], p.ver = w.cell, w.ver
			}
			d.s.after(300*time.Microsecond, func() { d.ack(i, j, w, life) })
		}
	})
}

func (d *simDRBD) ack(i, j int, w *simWrite, life int) {
	n := d.nodes[i]
	switch {
	case !n.up || n.life != life || w.closed || !n.conn[j]:
	case n.frozen || !d.phys[i][j]:
		d.s.after(5*time.Millisecond, func() { d.ack(i, j, w, life) })
	default:
		w.acks[j] = true
		d.settleWrites(i)
	}
}

// read reads at primary i: from the own disk, or over the network.
func (d *simDRBD) read(i, reg int, done func(simCell, bool)) {
	n := d.nodes[i]
	life := n.life
	d.s.after(200*time.Microsecond, func() {
		if n.life != life || !n.up {
			return
		}
		if !n.primary || n.broken || !d.quorum(i) {
			done(simCell{}, false)
			return
		}
		if i < d.diskful {
			done(n.disk[reg], true)
			return
		}
		for j := range d.diskful {
			if n.conn[j] && d.responds(i, j) && d.nodes[j].ver.gen == n.ver.gen {
				cell := d.nodes[j].disk[reg]
				d.s.after(300*time.Microsecond, func() { done(cell, true) })
				return
			}
		}
		d.s.after(50*time.Millisecond, func() { d.read(i, reg, done) })
	})
}

// close demotes i, whose I/O has ended.
func (d *simDRBD) close(i int) { d.nodes[i].primary, d.nodes[i].pending = false, nil }

// kill ends host i's kernel.
func (d *simDRBD) kill(i int) {
	n := d.nodes[i]
	n.up, n.primary, n.pending, n.frozen = false, false, nil, false
	n.life++
	clear(n.conn)
	for j := range d.nodes {
		if d.nodes[j].conn[i] {
			d.s.after(500*time.Millisecond+d.s.upTo(10*time.Second), func() {
				if !d.responds(j, i) {
					d.drop(j, i)
				}
			})
		}
	}
}

// reconnect connects whoever can and may, and brings their data together.
func (d *simDRBD) reconnect() {
	for i, a := range d.nodes {
		for j := range i {
			b := d.nodes[j]
			if a.conn[j] && b.conn[i] || !a.up || !b.up || a.frozen || b.frozen || !d.phys[i][j] || a.cut[j] || b.cut[i] || a.conn[j] != b.conn[i] {
				continue // Or one side has not heard of the loss yet.
			}
			if d.refuses(i, j) || d.refuses(j, i) {
				continue // "I shall become SyncTarget, but I am primary": until it closes.
			}
			a.conn[j], b.conn[i] = true, true
			d.resync(i, j)
			d.catchUp(i, j)
			d.catchUp(j, i)
		}
	}
}

// refuses says whether Primary i must not connect to j, which has newer data or another Primary.
func (d *simDRBD) refuses(i, j int) bool {
	if !d.nodes[i].primary {
		return false
	}
	if d.nodes[j].primary || j < d.diskful && d.nodes[j].ver.gen > d.nodes[i].ver.gen {
		return true
	}
	for p, n := range d.nodes {
		if p != i && n.primary && d.nodes[j].conn[p] {
			return true
		}
	}
	if i < d.diskful || j >= d.diskful || d.nodes[j].ver.gen == d.nodes[i].ver.gen {
		return false
	}
	// A diskless Primary can bring j up to date only from another disk.
	for _, k := range d.connected(i) {
		if k < d.diskful && d.nodes[k].ver.gen == d.nodes[i].ver.gen {
			return false
		}
	}
	return true
}

// catchUp sends Primary i's open writes to j.
func (d *simDRBD) catchUp(i, j int) {
	if !d.nodes[i].primary || j >= d.diskful {
		return
	}
	for _, w := range d.nodes[i].pending {
		d.replicate(i, j, w, d.nodes[i].life)
	}
}

// resync brings the disks of i and j, which have just connected, up to date: from the newest data that they can reach.
func (d *simDRBD) resync(i, j int) {
	from := []int{i, j}
	for p, n := range d.nodes {
		if n.primary && (d.joined(p, i) || d.joined(p, j)) {
			from = append(append(from, p), d.connected(p)...)
		}
	}
	best := -1
	for _, k := range from {
		if k < d.diskful && (best < 0 || d.nodes[best].ver.less(d.nodes[k].ver)) {
			best = k
		}
	}
	if best < 0 {
		return
	}
	late := []int{i, j}
	for p, n := range d.nodes { // A disk that had connected to a diskless Primary before any newer one is behind, too.
		if n.primary && n.ver.gen == d.nodes[best].ver.gen && (d.joined(p, i) || d.joined(p, j)) {
			late = append(late, d.connected(p)...)
		}
	}
	for _, k := range late {
		if k < d.diskful && d.nodes[k].ver.less(d.nodes[best].ver) {
			d.copyDisk(best, k, d.nodes[best].ver)
		}
	}
}

func (d *simDRBD) joined(p, k int) bool {
	return p == k || d.nodes[p].conn[k] && d.nodes[k].conn[p]
}
