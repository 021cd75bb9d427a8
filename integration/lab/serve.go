package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorface"
	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
	"github.com/xostor-agents/xostor-agents/integration/lab/xapiface"
)

// HostFaces are the paths that make a process believe that it runs on a host.
type HostFaces struct {
	Host      Host
	Socket    string // XAPI's unix socket
	PoolConf  string // "master" or "slave:<address>"
	Inventory string // INSTALLATION_UUID and more
}

// serving is what Serve started.
type serving struct {
	hosts   []HostFaces
	linstor *linstorface.Face
	ports   map[string]*port // by host name
	stop    context.CancelFunc
	stepped sync.WaitGroup

	mu     sync.Mutex
	hung   chan struct{} // closed when the controller answers again; nil while it does
	broken bool          // answers carry bytes that are no UTF-8
}

// port is where a host's LINSTOR controller listens while it runs there.
type port struct {
	addr    string
	handler http.Handler
	server  *http.Server
	done    chan struct{}
}

// stepEvery is how often the model of LINSTOR is moved to the present: resyncs and its periodic tasks.
const stepEvery = 250 * time.Millisecond

// Serve starts the faces: per host a folder with XAPI's socket, pool.conf and xensource-inventory, and a port for LINSTOR's controller, of which one listens. Options.Dir must be set.
func (p *Pool) Serve() ([]HostFaces, error) {
	if p.o.Dir == "" {
		return nil, errors.New("serve pool: Options.Dir is not set")
	}
	p.mu.Lock()
	started := p.serving != nil
	p.mu.Unlock()
	if started {
		return p.Faces(), nil
	}
	if err := p.prepareCluster(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &serving{linstor: linstorface.New(p.linstor), ports: map[string]*port{}, stop: cancel}
	for _, h := range p.hosts {
		hf, err := p.serveHost(h)
		if err == nil {
			s.ports[h.Name], err = reservePort(s.handler())
		}
		if err != nil {
			cancel()
			return nil, fmt.Errorf("serve host %s: %w", h.Name, err)
		}
		s.hosts = append(s.hosts, hf)
	}
	s.stepped.Go(func() { p.step(ctx) })
	p.mu.Lock()
	p.serving = s
	p.mu.Unlock()
	if err := p.writeRoles(p.Coordinator()); err != nil {
		return nil, err
	}
	return p.Faces(), p.syncPorts()
}

func (p *Pool) serveHost(h Host) (HostFaces, error) {
	dir := filepath.Join(p.o.Dir, h.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return HostFaces{}, err
	}
	hf := HostFaces{Host: h, Socket: filepath.Join(dir, "xapi.sock"), PoolConf: filepath.Join(dir, "pool.conf"), Inventory: filepath.Join(dir, "xensource-inventory")}
	inventory := fmt.Sprintf("PRODUCT_BRAND='XCP-ng'\nPRODUCT_VERSION='8.3.0'\nCONTROL_DOMAIN_UUID='%s'\nINSTALLATION_UUID='%s'\nMANAGEMENT_INTERFACE='xenbr0'\n", h.Dom0, h.UUID)
	if err := os.WriteFile(hf.Inventory, []byte(inventory), 0o600); err != nil {
		return HostFaces{}, err
	}
	_, err := p.xapi.ServeUnix(hf.Socket, h.Ref)
	return hf, err
}

// step moves LINSTOR's model along with the clock.
func (p *Pool) step(ctx context.Context) {
	tick := time.NewTicker(stepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			p.linstor.Step()
		}
	}
}

// Faces lists what Serve made, in host order; nil before.
func (p *Pool) Faces() []HostFaces {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.serving == nil {
		return nil
	}
	return append([]HostFaces(nil), p.serving.hosts...)
}

// FacesOf is the entry of Faces for a host.
func (p *Pool) FacesOf(host string) HostFaces {
	for _, hf := range p.Faces() {
		if hf.Host.Name == host {
			return hf
		}
	}
	panic("lab: no faces of host " + host)
}

// Controllers lists the addresses (host:port) at which a LINSTOR controller may listen, in host order.
func (p *Pool) Controllers() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var addrs []string
	if p.serving != nil {
		for _, h := range p.hosts {
			addrs = append(addrs, p.serving.ports[h.Name].addr)
		}
	}
	return addrs
}

// LINSTORFace is the REST face with its record of calls; nil before Serve.
func (p *Pool) LINSTORFace() *linstorface.Face {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.serving == nil {
		return nil
	}
	return p.serving.linstor
}

// writeRoles writes every host's pool.conf for this coordinator.
func (p *Pool) writeRoles(coordinator Host) error {
	for _, hf := range p.Faces() {
		role := "slave:" + coordinator.Addr
		if hf.Host.Ref == coordinator.Ref {
			role = "master"
		}
		// XAPI replaces the file, so a reader sees the old or the new role and nothing between.
		tmp := hf.PoolConf + ".new"
		if err := os.WriteFile(tmp, []byte(role), 0o600); err != nil {
			return fmt.Errorf("write role of %s: %w", hf.Host.Name, err)
		}
		if err := os.Rename(tmp, hf.PoolConf); err != nil {
			return fmt.Errorf("write role of %s: %w", hf.Host.Name, err)
		}
	}
	return nil
}

// syncPorts opens the port of the host that runs the controller, while it runs, and closes all others.
func (p *Pool) syncPorts() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.serving == nil {
		return nil
	}
	up := p.linstor.Controller().Phase == linstorsim.Up
	for name, pt := range p.serving.ports {
		if !up || name != p.controller || p.down[name] {
			pt.close()
		}
	}
	if up && !p.down[p.controller] {
		return p.serving.ports[p.controller].open()
	}
	return nil
}

// reservePort finds a free address. It is not kept while the controller runs elsewhere, so that connecting is refused as on a real host.
func reservePort(h http.Handler) (*port, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return &port{addr: l.Addr().String(), handler: h}, l.Close()
}

func (pt *port) open() error {
	if pt.server != nil {
		return nil
	}
	l, err := net.Listen("tcp", pt.addr)
	if err != nil {
		return fmt.Errorf("open controller port: %w", err)
	}
	server, done := &http.Server{Handler: pt.handler, ReadHeaderTimeout: 10 * time.Second}, make(chan struct{})
	pt.server, pt.done = server, done
	go func() {
		defer close(done)
		_ = server.Serve(l) // Ends with ErrServerClosed.
	}()
	return nil
}

func (pt *port) close() {
	if pt.server == nil {
		return
	}
	_ = pt.server.Close() // Connections in use are cut, as by the death of the controller.
	<-pt.done
	pt.server = nil
}

// handler is the LINSTOR face behind the misbehaviours that the face does not have itself.
func (s *serving) handler() http.Handler {
	face := s.linstor.Handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		hung, broken := s.hung, s.broken
		s.mu.Unlock()
		if hung != nil {
			select {
			case <-hung:
			case <-r.Context().Done():
			}
			return
		}
		if !broken || strings.HasPrefix(r.URL.Path, "/v1/events") {
			face.ServeHTTP(w, r)
			return
		}
		answerGarbage(face, w, r)
	})
}

// answerGarbage puts a byte that no UTF-8 has into every volume's name.
func answerGarbage(face http.Handler, w http.ResponseWriter, r *http.Request) {
	r.Header.Del("Accept-Encoding")
	rec := httptest.NewRecorder()
	face.ServeHTTP(rec, r)
	body := bytes.ReplaceAll(rec.Body.Bytes(), []byte("xcp-volume-"), []byte("xcp-\xff\xfeolume-"))
	w.Header().Set("Content-Type", rec.Header().Get("Content-Type"))
	w.WriteHeader(rec.Code)
	_, _ = w.Write(body) // A client that is gone needs no answer.
}

func (s *serving) answer(a ControllerAnswer) {
	s.linstor.Clear(linstorface.HTML500, linstorface.TruncatedJSON)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hung != nil {
		close(s.hung)
		s.hung = nil
	}
	s.broken = a == Garbage
	switch a {
	case Hung:
		s.hung = make(chan struct{})
	case HTMLError:
		s.linstor.Inject(linstorface.Fault{Kind: linstorface.HTML500})
	case Truncated:
		s.linstor.Inject(linstorface.Fault{Kind: linstorface.TruncatedJSON})
	}
}

func closeAll(s *serving, xapi *xapiface.Face) error {
	if s == nil {
		return xapi.Close()
	}
	s.stop()
	s.answer(Good)
	for _, pt := range s.ports {
		pt.close()
	}
	s.stepped.Wait()
	return errors.Join(s.linstor.Close(), xapi.Close())
}
