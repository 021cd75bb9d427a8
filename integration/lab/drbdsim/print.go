package drbdsim

import (
	"fmt"
	"slices"
	"strings"
)

// Listen calls hear with every group of lines that events2 would print on this host from now on, after the dump of what is, until stop is called.
func (n *Node) Listen(hear func(lines []string)) (stop func()) {
	n.emit() // the others hear changes, not a dump
	l := &listener{hear}
	n.listeners = append(n.listeners, l)
	n.printed, n.order = n.render()
	var lines []string
	for _, key := range n.order {
		lines = append(lines, "exists "+key+n.printed[key])
	}
	hear(append(lines, "exists -"))
	return func() { n.listeners = slices.DeleteFunc(n.listeners, func(x *listener) bool { return x == l }) }
}

// listener is one running events2.
type listener struct{ hear func(lines []string) }

// Deaf ends every Listen, as a killed drbdsetup does.
func (n *Node) Deaf() { n.listeners = nil }

func yn(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func role(primary bool) string {
	if primary {
		return "Primary"
	}
	return "Secondary"
}

// mayPromote is drbd-utils' compute_promotion_info on this host's view.
func (n *Node) mayPromote() (string, int) {
	count := 0
	known := n.primary
	if n.disk == "UpToDate" {
		count++
	}
	for _, k := range n.conns {
		if k.state == "Connected" {
			known = known || k.primary
			if k.disk == "UpToDate" {
				count++
			}
		}
	}
	score := count
	switch n.disk {
	case "UpToDate":
		score += 10100
	case "Consistent", "Outdated":
		score += 10000
	}
	// A Consistent disk does not count as stable data, whoever else has some.
	may := yn(n.quorum && !known && !n.failIO && count > 0 && n.disk != "Consistent")
	if n.flap != "" {
		may = n.flap
	}
	if !n.quorum {
		score = 0
	}
	return may, score
}

// render writes every object with all its keys, and their order.
func (n *Node) render() (map[string]string, []string) {
	out := map[string]string{}
	var order []string
	if !n.up {
		return out, nil
	}
	put := func(key, format string, args ...any) {
		out[key] = fmt.Sprintf(format, args...)
		order = append(order, key)
	}
	name := n.c.Resource
	susp := "no"
	if n.suspended {
		susp = "quorum"
	}
	may, score := n.mayPromote()
	put("resource name:"+name, " role:%s suspended:%s force-io-failures:%s may_promote:%s promotion_score:%d", role(n.primary), susp, yn(n.failIO), may, score)
	for _, k := range n.conns {
		seen := "Unknown"
		if k.state == "Connected" {
			seen = role(k.primary)
		}
		put(fmt.Sprintf("connection name:%s peer-node-id:%d conn-name:%s", name, k.peer.ID, k.peer.Name), " connection:%s role:%s", k.state, seen)
	}
	backing, client := "none", "yes"
	if n.Diskful {
		client = "no"
		if n.disk != "Diskless" {
			backing = "/dev/linstor_group/" + name + "_00000"
		}
	}
	put(fmt.Sprintf("device name:%s volume:0", name), " minor:%d backing_dev:%s disk:%s client:%s open:%s quorum:%s", n.Minor, backing, n.disk, client, yn(len(n.holders) > 0), yn(n.quorum))
	for _, k := range n.conns {
		client := yn(!k.peer.Diskful && k.state == "Connected")
		put(fmt.Sprintf("peer-device name:%s peer-node-id:%d conn-name:%s volume:0", name, k.peer.ID, k.peer.Name), " replication:%s peer-disk:%s peer-client:%s resync-suspended:no", k.repl, k.disk, client)
	}
	for _, k := range n.conns {
		put(fmt.Sprintf("path name:%s peer-node-id:%d conn-name:%s local:ipv4:%s:7000 peer:ipv4:%s:7000", name, k.peer.ID, k.peer.Name, n.Address(), k.peer.Address()), " established:%s", yn(k.state == "Connected" || k.linked))
	}
	return out, order
}

// Address is the host's address on the storage network.
func (n *Node) Address() string { return fmt.Sprintf("%s.%d", n.c.Network, n.ID+1) }

// emit prints the objects that changed, as one group.
func (n *Node) emit() {
	if len(n.listeners) == 0 {
		return
	}
	now, order := n.render()
	var lines []string
	for i := len(n.order) - 1; i >= 0; i-- {
		if _, still := now[n.order[i]]; !still {
			lines = append(lines, "destroy "+n.order[i])
		}
	}
	for _, key := range order {
		old, had := n.printed[key]
		switch {
		case !had:
			lines = append(lines, "create "+key+now[key])
		case old != now[key]:
			lines = append(lines, "change "+key+now[key])
		}
	}
	n.printed, n.order = now, order
	if len(lines) > 0 {
		for _, l := range slices.Clone(n.listeners) {
			l.hear(lines)
		}
	}
}

// StatusJSON is what `drbdsetup status --json` prints.
func (n *Node) StatusJSON() string {
	if !n.up {
		return "[]\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `[{"name":%q,"node-id":%d,"role":%q,"suspended":%t,"suspended-user":false,"suspended-no-data":false,"suspended-fencing":false,"suspended-quorum":%t,"force-io-failures":%t,`,
		n.c.Resource, n.ID, role(n.primary), n.suspended, n.suspended, n.failIO)
	fmt.Fprintf(&b, `"devices":[{"volume":0,"minor":%d,"disk-state":%q,"client":%t,"open":%t,"quorum":%t,"size":1048576}],"connections":[`, n.Minor, n.disk, !n.Diskful, len(n.holders) > 0, n.quorum)
	for i, k := range n.conns {
		if i > 0 {
			b.WriteString(",")
		}
		seen := "Unknown"
		if k.state == "Connected" {
			seen = role(k.primary)
		}
		fmt.Fprintf(&b, `{"peer-node-id":%d,"name":%q,"connection-state":%q,"peer-role":%q,"peer_devices":[{"volume":0,"replication-state":%q,"peer-disk-state":%q,"peer-client":%t,"resync-suspended":"no"}]}`,
			k.peer.ID, k.peer.Name, k.state, seen, k.repl, k.disk, !k.peer.Diskful && k.state == "Connected")
	}
	b.WriteString("]}]\n")
	return b.String()
}

// ShowJSON is what `drbdsetup show --show-defaults --json` prints.
func (n *Node) ShowJSON() string {
	var conns []string
	for _, k := range n.conns {
		conns = append(conns, fmt.Sprintf(`{"_peer_node_id":%d,"net":{"_name":%q,"rr-conflict":%q,"fencing":"dont-care"}}`, k.peer.ID, k.peer.Name, n.c.RRConflict))
	}
	return fmt.Sprintf(`[{"resource":%q,"options":{"quorum":%q,"on-no-quorum":%q,"auto-promote":%t,"on-suspended-primary-outdated":%q,"on-no-data-accessible":"io-error"},"_this_host":{"node-id":%d},"connections":[%s]}]`+"\n",
		n.c.Resource, n.c.Quorum, n.c.OnNoQuorum, n.c.AutoPromote, n.c.OnSuspended, n.ID, strings.Join(conns, ","))
}
