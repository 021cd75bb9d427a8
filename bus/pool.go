package bus

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// Host is one host of the pool.
type Host struct {
	UUID string `json:"uuid"`
	Name string `json:"name"`
	// Address is the management address, IPv4 or IPv6 without brackets, as XAPI's host.address.
	Address string `json:"address"`
}

// Pool is who belongs to the pool.
type Pool struct {
	UUID  string `json:"uuid"`
	Hosts []Host `json:"hosts"`
}

// sorted is the pool with its hosts in the order of their uuids and without those that have no uuid, so that two lists can be compared.
func (p Pool) sorted() Pool {
	p.Hosts = slices.DeleteFunc(slices.Clone(p.Hosts), func(h Host) bool { return h.UUID == "" })
	slices.SortStableFunc(p.Hosts, func(a, b Host) int { return cmp.Compare(a.UUID, b.UUID) })
	return p
}

func (p Pool) equal(q Pool) bool { return p.UUID == q.UUID && slices.Equal(p.Hosts, q.Hosts) }

// Has tells whether a host belongs to the pool.
func (p Pool) Has(uuid string) bool {
	return slices.ContainsFunc(p.Hosts, func(h Host) bool { return h.UUID == uuid })
}

// poolFile is the cache in the store folder: the bus starts before XAPI and without it.
const poolFile = "pool.json"

// readPool returns the pool as last known; the zero Pool when nothing was kept. A file that cannot be read as a pool counts as nothing: XAPI has the truth.
func readPool(dir string) (Pool, error) {
	raw, err := os.ReadFile(filepath.Join(dir, poolFile))
	if dir == "" || errors.Is(err, fs.ErrNotExist) {
		return Pool{}, nil
	}
	if err != nil {
		return Pool{}, fmt.Errorf("read kept pool: %w", err)
	}
	var p Pool
	if err := json.Unmarshal(raw, &p); err != nil {
		return Pool{}, fmt.Errorf("read kept pool: %w", err)
	}
	return p.sorted(), nil
}

// KeptPool is the pool as the bus of this host last knew it, for those who need it while the bus and XAPI are away. dir is the bus's store folder. The zero
// Pool: nothing was kept.
func KeptPool(dir string) (Pool, error) { return readPool(dir) }

// keepPool writes the cache so that a crash leaves the old file or the new one.
func keepPool(dir string, p Pool) error {
	if dir == "" {
		return nil
	}
	raw, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return fmt.Errorf("keep pool: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("keep pool: %w", err)
	}
	next := filepath.Join(dir, poolFile+".new")
	if err := os.WriteFile(next, raw, 0o600); err != nil {
		return fmt.Errorf("keep pool: %w", err)
	}
	if err := os.Rename(next, filepath.Join(dir, poolFile)); err != nil {
		return fmt.Errorf("keep pool: %w", err)
	}
	return nil
}

// shape is how the server runs: what plan wants, and what is.
type shape struct {
	// cluster is the cluster's name; "" means alone, without a port for routes.
	cluster string
	// routes are the other hosts' route addresses, host:port, sorted.
	routes []string
	// self is the own route address when the pool knows one.
	self string
	// subscribe opens the port for subscribers.
	subscribe bool
	// why says why the bus is alone; "" when it is not, or when that needs no word.
	why string
}

// restart tells whether a running server cannot become the other shape by reloading.
func (s shape) restart(o shape) bool { return s.cluster != o.cluster || s.subscribe != o.subscribe }

// plan decides how the server should run. It is pure. NoSecret says why there is no pool certificate; "" when there is one.
func plan(o Options, p Pool, noSecret string) shape {
	var s shape
	for _, h := range p.Hosts {
		if h.UUID == o.ServerName {
			continue
		}
		if addr := routeAddress(h.Address, o.RouteListen); addr != "" {
			s.routes = append(s.routes, addr)
		}
	}
	slices.Sort(s.routes)
	s.routes = slices.Compact(s.routes)
	for _, h := range p.Hosts {
		if h.UUID == o.ServerName {
			s.self = routeAddress(h.Address, o.RouteListen)
		}
	}
	switch {
	case o.RouteListen == "":
		return shape{}
	case len(s.routes) == 0:
		return shape{}
	case p.UUID == "":
		return shape{why: "the pool's uuid is not known yet"}
	case noSecret != "":
		return shape{why: noSecret}
	}
	s.cluster = p.UUID
	return s
}

// routeAddress joins a host's address with the port on which the pool's buses listen. "" when the address is none.
func routeAddress(address, listen string) string {
	ip, err := netip.ParseAddr(address)
	if err != nil {
		return ""
	}
	_, port, err := net.SplitHostPort(listen)
	if err != nil {
		return ""
	}
	return net.JoinHostPort(ip.String(), port)
}

// routeURLs are the addresses in the form that nats-server wants. They are sorted: a reload sorts the old ones in place while the server reads them.
func routeURLs(addresses ...string) []*url.URL {
	urls := make([]*url.URL, 0, len(addresses))
	for _, a := range addresses {
		if a != "" {
			urls = append(urls, &url.URL{Scheme: "nats-route", Host: a})
		}
	}
	slices.SortFunc(urls, func(a, b *url.URL) int { return cmp.Compare(a.String(), b.String()) })
	return urls
}

// splitListen reads "host:port" or ":port".
func splitListen(key, listen string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(listen)
	if err == nil {
		port, err = strconv.Atoi(text)
	}
	if err != nil || port < 1 || port > 65535 {
		return "", 0, fmt.Errorf("start bus: %s %q is not an address such as \":6222\" or \"10.0.0.1:6222\"", key, listen)
	}
	if host == "" {
		host = anyAddress()
	}
	return host, port, nil
}

// anyAddress listens on both families where the kernel has both.
func anyAddress() string {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return "0.0.0.0"
	}
	_ = l.Close() // It was only asked for.
	return "::"
}
