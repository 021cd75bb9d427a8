package lab

import (
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// addresses gives the hosts loopback addresses that other pools on this machine do not use; nil outside a cluster.
func (o Options) addresses() (list []string) {
	if !o.Cluster {
		return nil
	}
	pid := os.Getpid()
	for n := range o.Hosts {
		list = append(list, fmt.Sprintf("127.%d.%d.%d", 64+pid/250%128, 1+pid%250, 11+n))
	}
	return list
}

// secretFile is the pool secret's file, which each host of a real pool has as /etc/xensource/ptoken.
func (p *Pool) secretFile() string { return filepath.Join(p.o.Dir, "ptoken") }

// prepareCluster writes the pool secret and finds a port for the routes. All hosts use the same port, as on real hosts; their addresses differ.
func (p *Pool) prepareCluster() error {
	if !p.o.Cluster {
		return nil
	}
	secret := rand.Text() + rand.Text()
	if err := os.WriteFile(p.secretFile(), []byte(secret), 0o600); err != nil {
		return err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(p.hosts[0].Addr, "0"))
	if err != nil {
		return fmt.Errorf("find a port for the buses' routes: %w", err)
	}
	_, p.routePort, err = net.SplitHostPort(l.Addr().String())
	if cerr := l.Close(); err == nil {
		err = cerr
	}
	return err
}
