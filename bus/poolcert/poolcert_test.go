package poolcert

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	secretA = "5f1a7d3e-aaaa/0b6e2c1d-bbbb/c0ffee00-cccc"
	secretB = "11111111-dddd/22222222-eeee/33333333-ffff"
	secretC = "44444444-dddd/55555555-eeee/66666666-ffff"

	pinnedID = "b668f8588159f776" // Of secretA.
)

func identity(t *testing.T, host string, secrets ...string) *Identity {
	t.Helper()
	i, err := NewIdentity(host, secrets[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets[1:] {
		if err := i.Use(s); err != nil {
			t.Fatal(err)
		}
	}
	return i
}

// shake connects client to server and returns both sides' errors and the client's name as the server saw it.
func shake(t *testing.T, client, server *tls.Config) (name string, clientErr, serverErr error) {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	deadline := time.Now().Add(20 * time.Second)
	_ = near.SetDeadline(deadline)
	_ = far.SetDeadline(deadline)
	done := make(chan error, 1)
	go func() {
		defer far.Close()
		s := tls.Server(far, server)
		err := s.Handshake()
		if err == nil {
			name = s.ConnectionState().PeerCertificates[0].Subject.CommonName
			_, err = s.Write([]byte("x"))
		}
		done <- err
	}()
	c := tls.Client(near, client)
	if clientErr = c.Handshake(); clientErr == nil {
		// In TLS 1.3 a refused client certificate shows at the first read.
		_, clientErr = c.Read(make([]byte, 1))
	}
	near.Close()
	serverErr = <-done
	return name, clientErr, serverErr
}

func TestSameSecretSameAuthority(t *testing.T) {
	a, err := NewAuthority(secretA)
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewAuthority("  " + secretA + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.cert.Raw, b.cert.Raw) {
		t.Error("two hosts derive different authorities from one secret")
	}
	// Pinned: a change of the derivation cuts every pool in two during an update.
	if a.ID() != pinnedID {
		t.Errorf("ID = %s, want %s", a.ID(), pinnedID)
	}
	if c, _ := NewAuthority(secretB); c.ID() == a.ID() {
		t.Error("different secrets give one authority")
	}
}

func TestOnlyMembersConnect(t *testing.T) {
	a, b, stranger := identity(t, "host-a", secretA), identity(t, "host-b", secretA), identity(t, "host-a", secretB)
	if name, ce, se := shake(t, a.Client("host-b"), b.Server()); ce != nil || se != nil || name != "host-a" {
		t.Errorf("members: %v, %v, name %q", ce, se, name)
	}
	if _, ce, se := shake(t, a.Client(PoolName), b.Server()); ce != nil || se != nil {
		t.Errorf("by pool name: %v, %v", ce, se)
	}
	if _, ce, _ := shake(t, a.Client("host-c"), b.Server()); ce == nil {
		t.Error("a client accepted another host than it asked for")
	}
	if _, ce, _ := shake(t, stranger.Client("host-b"), b.Server()); ce == nil {
		t.Error("a client accepted a server of another pool")
	}
	blind := stranger.Client("host-b")
	blind.InsecureSkipVerify = true
	if _, ce, se := shake(t, blind, b.Server()); ce == nil || se == nil {
		t.Errorf("a server accepted a client of another pool: %v, %v", ce, se)
	}
	blind.Certificates = nil
	if _, ce, se := shake(t, blind, b.Server()); ce == nil || se == nil {
		t.Errorf("a server accepted a client without a certificate: %v, %v", ce, se)
	}
}

func TestClocksDoNotMatter(t *testing.T) {
	a, b := identity(t, "host-a", secretA), identity(t, "host-b", secretA)
	for _, wrong := range []time.Duration{-20 * 365 * 24 * time.Hour, -72 * time.Hour, 72 * time.Hour, 50 * 365 * 24 * time.Hour} {
		client := a.Client("host-b")
		client.Time = func() time.Time { return time.Now().Add(wrong) }
		if _, ce, se := shake(t, client, b.Server()); ce != nil || se != nil {
			t.Errorf("clock wrong by %v: %v, %v", wrong, ce, se)
		}
	}
}

func TestRotation(t *testing.T) {
	before, during, after := identity(t, "old", secretA), identity(t, "both", secretA, secretB), identity(t, "new", secretB)
	server := before.Server()
	for _, c := range []struct {
		name   string
		client *tls.Config
		server *tls.Config
		ok     bool
	}{
		{"rotated client, server not yet", during.Client("old"), server, true},
		{"client not yet, rotated server", before.Client("both"), during.Server(), true},
		{"rotated client, fresh server", during.Client("new"), after.Server(), true},
		{"fresh client, rotated server", after.Client("both"), during.Server(), true},
		{"fresh client, old server", after.Client("old"), server, false},
		{"rotated twice, old server", identity(t, "x", secretA, secretB, secretC).Client("old"), server, false},
	} {
		_, ce, se := shake(t, c.client, c.server)
		if (ce == nil && se == nil) != c.ok {
			t.Errorf("%s: %v, %v", c.name, ce, se)
		}
	}
	if err := before.Use(secretB); err != nil {
		t.Fatal(err)
	}
	if _, ce, se := shake(t, after.Client("old"), server); ce != nil || se != nil {
		t.Errorf("a running server does not follow the rotation: %v, %v", ce, se)
	}
}

func TestForget_EndsTheOldSecretsTrust(t *testing.T) {
	before, rotated := identity(t, "old", secretA), identity(t, "both", secretA, secretB)
	if !rotated.Forget() || rotated.Forget() {
		t.Error("forget once, and once only")
	}
	if _, ce, se := shake(t, before.Client("both"), rotated.Server()); ce == nil && se == nil {
		t.Error("the old secret is still good after Forget")
	}
	if _, ce, se := shake(t, identity(t, "x", secretB).Client("both"), rotated.Server()); ce != nil || se != nil {
		t.Errorf("the new secret: %v, %v", ce, se)
	}
}

func TestPeer_TellsWhoConnects(t *testing.T) {
	type seen struct {
		name string
		own  bool
	}
	var got []seen
	note := func(name string, _ net.Addr, own bool) error {
		got = append(got, seen{name, own})
		return nil
	}
	a, twin := identity(t, "host-a", secretA), identity(t, "host-a", secretA)
	if _, ce, se := shake(t, twin.Peer(nil), a.Peer(note)); ce != nil || se != nil {
		t.Fatalf("%v, %v", ce, se)
	}
	if _, ce, se := shake(t, a.Peer(nil), a.Peer(note)); ce != nil || se != nil {
		t.Fatalf("%v, %v", ce, se)
	}
	if _, ce, se := shake(t, a.Peer(note), identity(t, "host-b", secretA).Peer(nil)); ce != nil || se != nil {
		t.Fatalf("%v, %v", ce, se)
	}
	want := []seen{{"host-a", false}, {"host-a", true}, {"host-b", false}}
	if !slices.Equal(got, want) {
		t.Errorf("seen %v, want %v", got, want)
	}
	refuse := func(string, net.Addr, bool) error { return errors.New("no") }
	if _, ce, se := shake(t, twin.Peer(nil), a.Peer(refuse)); ce == nil && se == nil {
		t.Error("a connection that Seen refused was made")
	}
	stranger := identity(t, "host-b", secretB).Peer(nil)
	stranger.InsecureSkipVerify = true
	if _, ce, se := shake(t, stranger, a.Peer(note)); ce == nil || se == nil {
		t.Errorf("another pool's peer: %v, %v", ce, se)
	}
}

func TestPublic_NeedsNoClientCertificate(t *testing.T) {
	a := identity(t, "host-a", secretA)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(a.AuthorityPEM()) {
		t.Fatal("the authority is not readable")
	}
	done := make(chan error, 1)
	near, far := net.Pipe()
	defer near.Close()
	go func() {
		defer far.Close()
		done <- tls.Server(far, a.Public()).Handshake()
	}()
	if err := tls.Client(near, &tls.Config{RootCAs: roots, ServerName: "host-a"}).Handshake(); err != nil {
		t.Error(err)
	}
	near.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzNewAuthority(f *testing.F) {
	f.Add(secretA)
	f.Add("")
	f.Add("\x00\xff0123456789abcdef")
	f.Fuzz(func(t *testing.T, secret string) {
		a, err := NewAuthority(secret)
		if err != nil {
			if !errors.Is(err, ErrShortSecret) {
				t.Fatal(err)
			}
			return
		}
		b, err := NewAuthority(secret)
		if err != nil || !bytes.Equal(a.cert.Raw, b.cert.Raw) {
			t.Fatalf("not deterministic: %v", err)
		}
	})
}

func TestBadSecrets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ptoken")
	if _, err := Load("h", path); err == nil {
		t.Error("a missing file was accepted")
	}
	if err := os.WriteFile(path, []byte(secretA+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	i, err := Load("h", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", " \n", "short"} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := i.Reload(path); !errors.Is(err, ErrShortSecret) {
			t.Errorf("secret %q: %v", bad, err)
		}
	}
	if _, ce, se := shake(t, i.Client("g"), identity(t, "g", secretA).Server()); ce != nil || se != nil {
		t.Errorf("after a bad reload: %v, %v", ce, se)
	}
	if _, err := NewIdentity("a b", secretA); err == nil {
		t.Error("a host name with a space was accepted")
	}
	if got := strings.Join(i.Authorities(), " "); got != pinnedID {
		t.Errorf("authorities = %s", got)
	}
}
