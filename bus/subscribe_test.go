package bus

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

const subscriberPassword = "a long password"

// subscriberPool is one bus with a port for subscribers, alone, and the roots to verify it.
func subscriberPool(t *testing.T) (p *testPool, address string, roots *x509.CertPool) {
	t.Helper()
	p = newTestPool(t, 1)
	users := filepath.Join(p.dir, "users")
	if err := os.WriteFile(users, []byte("# who\nmonitor:"+subscriberPassword+"\nother:"+subscriberPassword+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	address = "127.0.0.1:" + p.port
	p.start(p.pool.Hosts[0], func(o *Options) { o.RouteListen, o.Subscribe = "", SubscribeOptions{Listen: address, Users: users} })
	pem, err := os.ReadFile(filepath.Join(p.dir, p.pool.Hosts[0].UUID, AuthorityFile))
	if err != nil {
		t.Fatal(err)
	}
	roots = x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		t.Fatal("the pool's authority is not readable")
	}
	return p, address, roots
}

// outside connects a program outside with nats.go.
func outside(t *testing.T, p *testPool, address string, roots *x509.CertPool, user, password string) (*nats.Conn, chan error, error) {
	t.Helper()
	refused := make(chan error, 10)
	nc, err := nats.Connect("tls://"+address, nats.UserInfo(user, password), nats.CustomInboxPrefix("_INBOX."+user), nats.Secure(&tls.Config{RootCAs: roots, ServerName: p.pool.Hosts[0].UUID}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			select {
			case refused <- err:
			default:
			}
		}))
	if err == nil {
		t.Cleanup(nc.Close)
	}
	return nc, refused, err
}

func TestSubscriber_ReadsEventsTablesStatusAndHistory(t *testing.T) {
	p, address, roots := subscriberPool(t)
	nc, _, err := outside(t, p, address, roots, "monitor", subscriberPassword)
	if err != nil {
		t.Fatal(err)
	}
	in := p.conn(p.pool.Hosts[0])
	events, err := nc.SubscribeSync(subject.Prefix + ".xapi.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	table, err := NewTable[int](in, XAPITable("vdi"), TableOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if _, err := table.Replace(map[string]int{"a": 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := table.Put("a", 2); err != nil {
		t.Fatal(err)
	}
	if m, err := events.NextMsg(patience); err != nil || string(m.Data) != "2" || m.Header.Get(HeaderType) != "io.xostor.xapi.vdi.put" {
		t.Errorf("event %+v, %v", m, err)
	}
	if m, err := nc.Request(subject.Prefix+".table.xapi.vdi.list", nil, patience); err != nil || !strings.Contains(string(m.Data), `{"key":"a","data":2}`) {
		t.Errorf("list %v, %v", m, err)
	}
	s, err := Serve(in, ServiceInfo{Agent: "x", Host: "h", HostName: "n", Version: "1.0.0"}, func() any { return "well" })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Stop() }()
	if err := in.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m, err := nc.Request(statusSubject, nil, patience); err != nil || !strings.Contains(string(m.Data), "well") {
		t.Errorf("status %v, %v", m, err)
	}
	if m, err := nc.Request("$JS.API.DIRECT.GET."+historyStream, []byte(`{"seq":1}`), patience); err != nil || m.Header.Get(HeaderType) != "io.xostor.xapi.vdi.put" {
		t.Errorf("history %v, %v", m, err)
	}
}

func TestSubscriber_WritesNothingAndSeesNobodysAnswers(t *testing.T) {
	p, address, roots := subscriberPool(t)
	in := p.conn(p.pool.Hosts[0])
	heard := make(chan string, 10)
	if _, err := in.Subscribe(func(m *Message) { heard <- m.Subject }, ">"); err != nil {
		t.Fatal(err)
	}
	if err := in.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		subject.Prefix + ".xapi.vdi.u", subject.Prefix + ".agent.gc.h.finding", subject.Prefix + ".table.xapi.vdi.state", "anything", "_INBOX.other.x",
		"$JS.API.STREAM.DELETE." + historyStream, "$JS.API.STREAM.PURGE." + historyStream, "$JS.API.STREAM.CREATE.x", "$JS.API.CONSUMER.CREATE." + historyStream,
		"$JS.API.STREAM.MSG.DELETE." + historyStream, "$JS.API.SERVER.REMOVE", "$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.x.RELOAD",
	} {
		nc, refused, err := outside(t, p, address, roots, "monitor", subscriberPassword)
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.Publish(s, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-refused:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("publish %s: %v", s, err)
			}
		case <-time.After(patience):
			t.Errorf("publish %s was not refused", s)
		}
	}
	for _, s := range []string{">", subject.Prefix + ".>", "$SYS.>", "_INBOX.>", "_INBOX.other.>", "$JS.>", statusSubject, subject.Prefix + ".table.xapi.vdi.list", "$SRV.>"} {
		nc, refused, err := outside(t, p, address, roots, "monitor", subscriberPassword)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := nc.SubscribeSync(s); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-refused:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("subscribe %s: %v", s, err)
			}
		case <-time.After(patience):
			t.Errorf("subscribe %s was not refused", s)
		}
	}
	if err := in.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case s := <-heard:
		t.Errorf("%s went through", s)
	default:
	}
}

func TestSubscriber_LogIn(t *testing.T) {
	p, address, roots := subscriberPool(t)
	for _, who := range [][2]string{{"monitor", "wrong password"}, {"nobody", subscriberPassword}, {"", ""}, {systemUser, subscriberPassword}, {systemUser, p.nodes[p.pool.Hosts[0].UUID].sysPassword}} {
		if nc, _, err := outside(t, p, address, roots, who[0], who[1]); err == nil {
			nc.Close()
			t.Errorf("%v was let in", who)
		}
	}
	if nc, err := nats.Connect("nats://" + address); err == nil {
		nc.Close()
		t.Error("a connection without TLS was let in")
	}
	if _, _, err := outside(t, p, address, x509.NewCertPool(), "monitor", subscriberPassword); err == nil {
		t.Error("a program that does not know the authority accepted the server")
	}
	// The local door beside the TLS port still needs neither.
	c, err := Dial(t.Context(), p.nodes[p.pool.Hosts[0].UUID].opts.Socket, "local")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestParseUsers(t *testing.T) {
	for _, bad := range []string{"", "#", "name", "name:", "name:short", "a.b:long enough password", "*:long enough password", "a b:long enough password", ":long enough password"} {
		if u, err := parseUsers([]byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, u)
		}
	}
	u, err := parseUsers([]byte("\n# x\n a:long:enough:password \nb:long enough password\n"))
	if err != nil || u["a"] != "long:enough:password" || u["b"] != "long enough password" {
		t.Errorf("%v, %v", u, err)
	}
	path := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(path, []byte("a:long enough password"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readUsers(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others may read: %v", err)
	}
}

func FuzzParseUsers(f *testing.F) {
	f.Add([]byte("a:long enough password\n#\n"))
	f.Add([]byte("\x00:\xff"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		users, err := parseUsers(raw)
		if err != nil {
			return
		}
		for name := range users {
			for _, s := range subscriberPermissions(name).Subscribe.Allow {
				if strings.HasPrefix(s, "_INBOX") && (strings.Count(s, ".") != 2 || strings.ContainsAny(strings.TrimSuffix(s, ">"), "*> ")) {
					t.Fatalf("user %q may read %q", name, s)
				}
			}
		}
	})
}
