package xapi

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
)

// Where a dom0 keeps the two facts (ocaml/xapi-aux/pool_role.ml; xapi-project/xen-api scripts).
const (
	DefaultPoolConf  = "/etc/xensource/pool.conf"
	DefaultInventory = "/etc/xensource-inventory"
)

// Role is what a host is in its pool, by its own file. The file says what XAPI was started as; after a split it can be out of date, so
// whoever acts for the whole pool also asks whether pool.master agrees.
type Role string

// The roles of pool.conf. "slave" is the file's word for Supporter.
const (
	Coordinator Role = "coordinator"
	Supporter   Role = "supporter"
	Broken      Role = "broken" // Broken is a host whose XAPI gave up finding a role.
)

// HostFacts is what a host knows about itself without asking XAPI. It can be compared with == to see a change.
type HostFacts struct {
	Role        Role
	Coordinator string // Coordinator is the coordinator's address when the host is a supporter, IPv4 or IPv6 without brackets.
	HostUUID    string // HostUUID is the host's UUID in XAPI.
}

// HostFiles are the files that HostFacts are read from; empty paths mean the defaults.
type HostFiles struct{ PoolConf, Inventory string }

// Read reads the facts anew. The files are small and change only when XAPI restarts, so reading them before each use is cheap.
func (f HostFiles) Read() (HostFacts, error) {
	if f.PoolConf == "" {
		f.PoolConf = DefaultPoolConf
	}
	if f.Inventory == "" {
		f.Inventory = DefaultInventory
	}
	conf, err := readHostFile(f.PoolConf)
	if err != nil {
		return HostFacts{}, err
	}
	role, coordinator, err := ParsePoolConf(conf)
	if err != nil {
		return HostFacts{}, fmt.Errorf("read %s: %w", f.PoolConf, err)
	}
	inventory, err := readHostFile(f.Inventory)
	if err != nil {
		return HostFacts{}, err
	}
	uuid, err := ParseInventory(inventory)
	if err != nil {
		return HostFacts{}, fmt.Errorf("read %s: %w", f.Inventory, err)
	}
	return HostFacts{Role: role, Coordinator: coordinator, HostUUID: uuid}, nil
}

func readHostFile(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read host facts: %w (is this the dom0 of an XCP-ng host?)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("read host facts: %w", err)
	}
	return b, nil
}

// ParsePoolConf reads a pool.conf: "master", "slave:<address>" or "broken". The address is everything behind the first colon, because it may be
// IPv6.
func ParsePoolConf(conf []byte) (role Role, coordinator string, err error) {
	line := strings.TrimSpace(string(conf))
	switch line {
	case "master":
		return Coordinator, "", nil
	case "broken":
		return Broken, "", nil
	}
	address, ok := strings.CutPrefix(line, "slave:")
	if !ok {
		return "", "", fmt.Errorf("parse pool role %.40q: neither master, slave:<address> nor broken", line)
	}
	ip, err := netip.ParseAddr(address)
	if err != nil {
		return "", "", fmt.Errorf("parse coordinator address: %w", err)
	}
	return Supporter, ip.String(), nil
}

// ParseInventory finds INSTALLATION_UUID, the host's UUID, among lines of the form KEY='value'.
func ParseInventory(inventory []byte) (hostUUID string, err error) {
	for sc := bufio.NewScanner(bytes.NewReader(inventory)); sc.Scan(); {
		key, value, ok := strings.Cut(strings.TrimSpace(sc.Text()), "=")
		if !ok || key != "INSTALLATION_UUID" {
			continue
		}
		uuid := strings.Trim(value, `'"`)
		if uuid == "" || strings.ContainsAny(uuid, " \t'\"") {
			return "", fmt.Errorf("parse INSTALLATION_UUID %.60q: not a UUID", value)
		}
		return uuid, nil
	}
	return "", errors.New("parse inventory: no INSTALLATION_UUID")
}
