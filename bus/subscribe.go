package bus

import (
	"bufio"
	"bytes"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// SubscribeOptions are the TLS port for programs outside.
type SubscribeOptions struct {
	// Listen is the address "host:port"; empty: no port.
	Listen string
	// Users is a file with one "name:password" a line, readable by root only. It is read at each log-in.
	Users string
	// Cert and Key are PEM files of the server's certificate. Empty: one derived from the pool secret; programs verify it with the pool's
	// authority, which the bus writes into its store folder.
	Cert, Key string
}

const systemUser = "xostor-system"

// gatekeeper decides who a connection is. Through the door and from this process comes only root. Everything else came through the port for subscribers.
type gatekeeper struct {
	users       string
	sysPassword string
	server      *server.Server
	log         *slog.Logger
}

// Check implements server.Authentication.
func (g *gatekeeper) Check(c server.ClientAuthentication) bool {
	name, password := c.GetOpts().Username, c.GetOpts().Password
	if a := c.RemoteAddress(); a == nil || a.Network() == "pipe" {
		if name == systemUser && same(password, g.sysPassword) {
			c.RegisterUser(&server.User{Username: systemUser, Account: g.server.SystemAccount()})
		}
		return true
	}
	users, err := readUsers(g.users)
	if err != nil {
		g.log.Warn("subscriber refused", "err", err)
		return false
	}
	want, known := users[name]
	if !same(password, want) || !known {
		g.log.Warn("subscriber refused", "user", name, "from", c.RemoteAddress().String())
		return false
	}
	c.RegisterUser(&server.User{Username: name, Permissions: subscriberPermissions(name)})
	return true
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// subscriberPermissions let a program read: events, the tables behind them, who answers and how agents are, and the history message by message. It can
// write nothing and sees nobody else's answers.
func subscriberPermissions(user string) *server.Permissions {
	p := subject.Prefix
	return &server.Permissions{
		Publish: &server.SubjectPermission{Allow: []string{
			p + ".table.*.*.list", p + ".table.*.*.list.*", statusSubject,
			"$SRV.PING", "$SRV.PING.>", "$SRV.INFO", "$SRV.INFO.>", "$SRV.STATS", "$SRV.STATS.>",
			"$JS.API.STREAM.INFO." + historyStream, "$JS.API.DIRECT.GET." + historyStream, "$JS.API.DIRECT.GET." + historyStream + ".>",
		}},
		// Not the list and status subjects: who subscribes there looks like somebody who answers.
		Subscribe: &server.SubjectPermission{Allow: []string{
			p + ".xapi.>", p + ".linstor.>", p + ".drbd.>", p + ".agent.>", p + ".table.*.*.state", "_INBOX." + user + ".>",
		}},
	}
}

// readUsers reads the file of subscribers. Empty lines and lines with # are comments.
func readUsers(path string) (map[string]string, error) {
	if path == "" {
		return nil, errors.New("no file with subscribers is configured")
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read subscribers: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read subscribers: others may read %s: chmod 600 %s", path, path)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read subscribers: %w", err)
	}
	return parseUsers(raw)
}

func parseUsers(raw []byte) (map[string]string, error) {
	users := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, password, ok := strings.Cut(line, ":")
		if !ok || name != subject.Token(name) || strings.ContainsAny(name, "*>$") || len(password) < 12 {
			return nil, fmt.Errorf("read subscribers: line %d: want name:password, a name without dots, blanks and wildcards, and 12 characters or more of password", n)
		}
		users[name] = password
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read subscribers: %w", err)
	}
	if len(users) == 0 {
		return nil, errors.New("read subscribers: there are none")
	}
	return users, nil
}

// subscribeOff says why the port cannot be opened; "" when it can. The caller holds the lock.
func (b *Bus) subscribeOff() string {
	if _, err := readUsers(b.opts.Subscribe.Users); err != nil {
		return err.Error()
	}
	if b.opts.Subscribe.Cert != "" {
		if _, err := tls.LoadX509KeyPair(b.opts.Subscribe.Cert, b.opts.Subscribe.Key); err != nil {
			return "read certificate: " + err.Error()
		}
		return ""
	}
	if b.identity == nil {
		return "no certificate is configured, and the pool secret is not there: " + b.noSecret
	}
	return ""
}

// subscribeOptions open the port.
func (b *Bus) subscribeOptions(so *server.Options) {
	so.DontListen = false
	so.Host, so.Port, _ = splitListen("subscribe address", b.opts.Subscribe.Listen) // Start checked it.
	so.TLSTimeout, so.AuthTimeout = 5, 5
	if b.opts.Subscribe.Cert == "" {
		b.mu.Lock()
		so.TLSConfig = b.identity.Public()
		b.mu.Unlock()
		return
	}
	so.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(b.opts.Subscribe.Cert, b.opts.Subscribe.Key) // Read anew: certificates are renewed.
		return &c, err
	}}
}
