// Package poolcert derives mutual TLS for the hosts of a pool from the pool secret.
//
// Promised: the same secret gives the same authority on every host at every time; only holders of the secret, or of the
// one before it while a rotation is under way, can connect in either direction. Not promised: that one host of the pool
// cannot pose as another; each of them holds the secret.
package poolcert

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// SecretPath is where XAPI keeps the pool secret on each host.
const SecretPath = "/etc/xensource/ptoken"

// PoolName is a DNS name in every leaf of a pool, for clients that do not know which host they reach.
const PoolName = "member.pool.xostor"

// ErrShortSecret is a secret that is not one: XAPI's has over 100 characters.
var ErrShortSecret = errors.New("pool secret is shorter than 16 characters")

// The validity is fixed so that no clock matters and the authority is the same everywhere.
var (
	notBefore = time.Unix(0, 0).UTC()
	notAfter  = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
)

// Authority is a pool's certificate authority.
type Authority struct {
	key  ed25519.PrivateKey
	cert *x509.Certificate
}

// NewAuthority derives the authority from the pool secret. White space around the secret does not count.
func NewAuthority(secret string) (*Authority, error) {
	secret = strings.TrimSpace(secret)
	if len(secret) < 16 {
		return nil, ErrShortSecret
	}
	seed, err := hkdf.Key(sha256.New, []byte(secret), nil, "xostor pool authority v1", ed25519.SeedSize)
	if err != nil {
		return nil, fmt.Errorf("derive authority: %w", err)
	}
	a := &Authority{key: ed25519.NewKeyFromSeed(seed)}
	a.cert, err = a.sign(a, a.template())
	if err != nil {
		return nil, err
	}
	return a, nil
}

// ID names the authority: equal on hosts with the same secret. It tells nothing about the secret.
func (a *Authority) ID() string {
	sum := sha256.Sum256(a.public())
	return hex.EncodeToString(sum[:8])
}

func (a *Authority) public() ed25519.PublicKey { return a.key.Public().(ed25519.PublicKey) }

func (a *Authority) template() *x509.Certificate {
	sum := sha256.Sum256(a.public())
	return &x509.Certificate{SerialNumber: new(big.Int).SetBytes(sum[:16]), Subject: pkix.Name{CommonName: "xostor pool " + a.ID()},
		NotBefore: notBefore, NotAfter: notAfter, IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, SubjectKeyId: sum[:20]}
}

// sign makes a certificate for the authority subject.
func (a *Authority) sign(subject *Authority, template *x509.Certificate) (*x509.Certificate, error) {
	parent := a.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, subject.public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	return x509.ParseCertificate(der)
}

// leaf makes a certificate with a fresh key for host.
func (a *Authority) leaf(host string) (tls.Certificate, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make leaf key: %w", err)
	}
	serial := make([]byte, 16)
	_, _ = rand.Read(serial) // Never fails.
	template := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: host},
		DNSNames: []string{host, PoolName}, NotBefore: notBefore, NotAfter: notAfter, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign leaf: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, nil
}

// Identity is this host in the pool's TLS. It may be used from many goroutines.
type Identity struct {
	host string

	mu    sync.RWMutex
	now   *Authority
	old   *Authority // The one before, nil if none.
	leaf  tls.Certificate
	roots *x509.CertPool
}

// NewIdentity makes the identity of host (its uuid) from the pool secret.
func NewIdentity(host, secret string) (*Identity, error) {
	i := &Identity{host: host}
	if host == "" || strings.ContainsAny(host, " /*\n") {
		return nil, fmt.Errorf("host name %q is not fit for a certificate", host)
	}
	return i, i.Use(secret)
}

// Load makes the identity of host from the secret in a file, SecretPath on a dom0.
func Load(host, path string) (*Identity, error) {
	secret, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read pool secret: %w", err)
	}
	return NewIdentity(host, string(secret))
}

// Use takes a secret into use for new connections; the one before stays trusted until the next change. The secret in use
// changes nothing.
func (i *Identity) Use(secret string) error {
	a, err := NewAuthority(secret)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.now != nil && i.now.ID() == a.ID() {
		return nil
	}
	leaf, err := a.leaf(i.host)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	if i.now != nil {
		roots.AddCert(i.now.cert)
		bridge, err := i.now.sign(a, a.template())
		if err != nil {
			return err
		}
		leaf.Certificate = append(leaf.Certificate, bridge.Raw)
	}
	i.old, i.now, i.leaf, i.roots = i.now, a, leaf, roots
	return nil
}

// Reload uses the secret in the file at path if it has changed. On an error the identity keeps what it has.
func (i *Identity) Reload(path string) error {
	secret, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read pool secret: %w", err)
	}
	return i.Use(string(secret))
}

// Forget drops the authority before the one in use: whoever only knows the old secret is refused from now on. It tells whether there was one.
func (i *Identity) Forget() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.old == nil {
		return false
	}
	i.old, i.roots = nil, x509.NewCertPool()
	i.roots.AddCert(i.now.cert)
	// The bridge from the old authority stays in the leaf's chain: a host that was away meanwhile may still need it.
	return true
}

// Authorities names the authority in use and, if there is one, the one before.
func (i *Identity) Authorities() []string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.old == nil {
		return []string{i.now.ID()}
	}
	return []string{i.now.ID(), i.old.ID()}
}

// Client is the configuration to connect to host (its uuid), or to any member with PoolName. Make one per connection:
// it does not follow a rotation.
func (i *Identity) Client(host string) *tls.Config {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return &tls.Config{MinVersion: tls.VersionTLS13, ServerName: host, RootCAs: i.roots, Certificates: []tls.Certificate{i.leaf}}
}

// Server is the configuration to be connected to. It follows rotations.
func (i *Identity) Server() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			i.mu.RLock()
			defer i.mu.RUnlock()
			return &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert,
				ClientCAs: i.roots, Certificates: []tls.Certificate{i.leaf}, SessionTicketsDisabled: true}, nil
		}}
}

// Seen is told of each connection whose certificate was found good: the name in it (a host's uuid), where it comes from (nil when this side dialled) and
// whether it is this identity's own leaf. An error refuses the connection.
type Seen func(name string, from net.Addr, own bool) error

// Peer is the configuration for servers that both dial and accept with one configuration, as NATS routes do. Accepting follows rotations;
// for dialling make a new one when Authorities changes. seen may be nil.
func (i *Identity) Peer(seen Seen) *tls.Config {
	i.mu.RLock()
	defer i.mu.RUnlock()
	leaf := i.leaf
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: PoolName, RootCAs: i.roots, Certificates: []tls.Certificate{leaf}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: i.roots,
		VerifyConnection: i.verify(seen, nil),
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			i.mu.RLock()
			defer i.mu.RUnlock()
			return &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: i.roots,
				Certificates: []tls.Certificate{i.leaf}, SessionTicketsDisabled: true, VerifyConnection: i.verify(seen, hello.Conn.RemoteAddr())}, nil
		},
	}
}

func (i *Identity) verify(seen Seen, from net.Addr) func(tls.ConnectionState) error {
	if seen == nil {
		return nil
	}
	return func(s tls.ConnectionState) error {
		peer := s.PeerCertificates[0]
		i.mu.RLock()
		own := bytes.Equal(peer.Raw, i.leaf.Certificate[0])
		i.mu.RUnlock()
		return seen(peer.Subject.CommonName, from, own)
	}
}

// Public is the configuration of a port for programs outside the pool: they verify this host against AuthorityPEM and show no certificate. It follows
// rotations.
func (i *Identity) Public() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		i.mu.RLock()
		defer i.mu.RUnlock()
		leaf := i.leaf
		return &leaf, nil
	}}
}

// AuthorityPEM is the certificate of the authority in use, for programs that verify hosts of this pool. It is no secret.
func (i *Identity) AuthorityPEM() []byte {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.now.cert.Raw})
}

// WritePEM stores the authority's certificate and a fresh leaf as ca-cert.pem, client-cert.pem and client-key.pem in
// dir, the names that NBD tools (GnuTLS) look for, so that a host can be examined by hand.
func (i *Identity) WritePEM(dir string) error {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return writePEM(dir, i.now.cert.Raw, i.leaf)
}
