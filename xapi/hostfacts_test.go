package xapi

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParsePoolConf(t *testing.T) {
	for in, want := range map[string]struct {
		role    Role
		address string
	}{
		"master":              {Coordinator, ""},
		"master\n":            {Coordinator, ""},
		"broken":              {Broken, ""},
		"slave:10.0.0.11\n":   {Supporter, "10.0.0.11"},
		"slave:fd00::1":       {Supporter, "fd00::1"},
		"slave:fe80::1%xapi0": {Supporter, "fe80::1%xapi0"},
	} {
		role, address, err := ParsePoolConf([]byte(in))
		if err != nil || role != want.role || address != want.address {
			t.Errorf("%q: %v %v %v", in, role, address, err)
		}
	}
	for _, in := range []string{"", "Master", "slave", "slave:", "slave:host", "slave:10.0.0.1 x", "master slave:10.0.0.1"} {
		if role, _, err := ParsePoolConf([]byte(in)); err == nil {
			t.Errorf("%q is taken for %s", in, role)
		}
	}
}

func TestParseInventory(t *testing.T) {
	for in, want := range map[string]string{
		"A='x'\nINSTALLATION_UUID='3a5f'\nCONTROL_DOMAIN_UUID='9'\n": "3a5f",
		`INSTALLATION_UUID="3a5f"`:                                   "3a5f",
		"INSTALLATION_UUID=3a5f\r\n":                                 "3a5f",
	} {
		if got, err := ParseInventory([]byte(in)); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "INSTALLATION_UUID=''", "XINSTALLATION_UUID='a'", "INSTALLATION_UUID='a b'", "INSTALLATION_UUID"} {
		if got, err := ParseInventory([]byte(in)); err == nil {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestHostFilesSeeAChange(t *testing.T) {
	dir := t.TempDir()
	f := HostFiles{PoolConf: filepath.Join(dir, "pool.conf"), Inventory: filepath.Join(dir, "inventory")}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Read(); err == nil || !strings.Contains(err.Error(), "dom0") {
		t.Errorf("no files: %v", err)
	}
	write(f.PoolConf, "slave:fd00::1")
	write(f.Inventory, "INSTALLATION_UUID='u'\n")
	before, err := f.Read()
	if err != nil || before != (HostFacts{Supporter, "fd00::1", "u"}) {
		t.Errorf("%+v, %v", before, err)
	}
	write(f.PoolConf, "master")
	after, err := f.Read()
	if err != nil || after == before || after != (HostFacts{Coordinator, "", "u"}) {
		t.Errorf("%+v, %v", after, err)
	}
	write(f.PoolConf, "???")
	if _, err := f.Read(); err == nil || !strings.Contains(err.Error(), "pool.conf") {
		t.Errorf("bad file: %v", err)
	}
}

func FuzzHostFiles(f *testing.F) {
	f.Add([]byte("slave:fd00::1\n"))
	f.Add([]byte("INSTALLATION_UUID='3a5f'\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		role, address, err := ParsePoolConf(in)
		if _, bad := netip.ParseAddr(address); err == nil && (role == Supporter) != (bad == nil) {
			t.Fatalf("%q: %s %q", in, role, address)
		}
		if uuid, err := ParseInventory(in); err == nil && (uuid == "" || strings.ContainsAny(uuid, " '\"\n")) {
			t.Fatalf("%q: uuid %q", in, uuid)
		}
	})
}
