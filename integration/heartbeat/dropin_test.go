package heartbeat

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat/nbd"
	"github.com/xostor-agents/xostor-agents/agents/heartbeat/statefile"
	"github.com/xostor-agents/xostor-agents/integration/heartbeat/realpool"
)

// dom0 is a host as SM sees it: its own host name, and folders of its own under the paths that dom0 has. Three of them
// share this machine's loopback network.
type dom0 struct {
	t    *testing.T
	p    *pool
	name string
	ip   string // Management address.
}

// inside prepares the mounts and then becomes the program, so that its process id is the program's.
const inside = `set -e
hostname "$SELF"
mount --make-rprivate /
mount -t tmpfs none /run; mount -t tmpfs none /var/lib; mkdir /var/lib/linstor.d
cp "$POOL"/*.res /var/lib/linstor.d/
mount -t tmpfs none /etc; mkdir /etc/xensource; cp "$POOL/ptoken" "$POOL/xhad.conf" /etc/xensource/
exec "$@"`

// launch runs a program in a process group of its own, as SM does, with its output in a file, and returns a way to end it as
// SM does.
func (d *dom0) launch(argv ...string) (stop func()) {
	d.t.Helper()
	cmd := exec.Command("unshare", append([]string{"--mount", "--uts", "sh", "-c", inside, "sh"}, argv...)...)
	cmd.Env = append(os.Environ(), "PATH="+d.p.Dir+":"+os.Getenv("PATH"), "POOL="+d.p.Dir, "SELF="+d.name, "HOSTS=3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	f, err := os.CreateTemp(d.p.Dir, "out-"+d.name+"-"+argv[0]+"-")
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	stop = func() {
		select {
		case <-ended: // Its number may be another's by now.
			return
		default:
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) // It may end by itself in this moment.
		<-ended
	}
	d.t.Cleanup(stop)
	return stop
}

// says waits for a line of a program's output.
func (d *dom0) says(prefix, line string) {
	d.t.Helper()
	d.p.until(d.name+" does not say "+line, func() error {
		names, _ := filepath.Glob(filepath.Join(d.p.Dir, prefix+"*"))
		var all []byte
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			all = append(all, text...)
		}
		if !bytes.Contains(all, []byte(line)) {
			return errors.New(string(all))
		}
		return nil
	})
}

// SM starts two programs by name for each of its two volumes, with these options (LinstorSR.py), waits for their lines, and
// ends them by their process groups. No LINSTOR controller is there: who the hosts are is in the resource's file.
func TestInThePlaceOfSMsPrograms(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, "root is needed for hosts with folders of their own")
	}
	t.Parallel()
	p := files(t, realpool.Options{Timeout: 60 * time.Second, DRBD: true})
	// SM's own ports, on addresses of loopback that nobody else uses.
	ports := map[string]string{realpool.Resource: "8076", "xcp-persistent-redo-log": "8077"}
	network := fmt.Sprintf("127.%d.%d", 32+rand.IntN(32), rand.IntN(256))
	volumes := map[string]int64{realpool.Resource: 4 << 20, "xcp-persistent-redo-log": 256 << 20}
	for name, size := range volumes {
		var res strings.Builder
		fmt.Fprintf(&res, "resource %q {\n  options { on-no-quorum io-error; quorum majority; }\n  connection {\n", name)
		for i := range 3 {
			fmt.Fprintf(&res, "    host \"n%d\" address ipv4 %s.%d:7000;\n", i+1, network, 10+i)
		}
		fmt.Fprint(&res, "  }\n}\n")
		dir := filepath.Join(p.Dir, "by-res", name)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(p.Dir, name+".res"), []byte(res.String()), 0o600)); err != nil {
			t.Fatal(err)
		}
		disk := p.Disk
		if name != realpool.Resource {
			disk = filepath.Join(p.Dir, "redo")
			if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, size)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(disk, filepath.Join(dir, "0")); err != nil {
			t.Fatal(err)
		}
	}
	policy := `[{"resource":"xcp-persistent-ha-statefile","options":{"quorum":"majority","on-no-quorum":"io-error"}},{"resource":"xcp-persistent-redo-log","options":{"quorum":"majority","on-no-quorum":"io-error"}}]`
	if err := os.WriteFile(filepath.Join(p.Dir, "policy.json"), []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"http-disk-server", "nbd-http-server"} {
		if err := os.Symlink(build(t), filepath.Join(p.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	var hosts []*dom0
	for i := range 3 {
		hosts = append(hosts, &dom0{t: t, p: p, name: fmt.Sprintf("n%d", i+1), ip: fmt.Sprintf("%s.%d", network, 20+i)})
	}
	stops := map[string]func(){}
	clients := map[string]*nbd.Client{}
	for name, size := range volumes {
		var urls []string
		for _, h := range hosts {
			urls = append(urls, "http://"+h.ip+":"+ports[name])
		}
		for _, h := range hosts {
			// SM may start the front first or last; here before any owner on the first host.
			socket := filepath.Join(p.Dir, h.name+name[15:]+".socket")
			stops["front"+h.name+name] = h.launch("nbd-http-server", "--socket-path", socket, "--nbd-name", name, "--urls", strings.Join(urls, ","),
				"--device-size", fmt.Sprint(size), "--kernel", "") // The last one only because this machine's kernel may have no nbd.
			stops["owner"+h.name+name] = h.launch("http-disk-server", "--disk", filepath.Join(p.Dir, "by-res", name, "0"), "--ip", h.ip, "--port", ports[name])
			h.says("out-"+h.name+"-http-disk", "Server ready!\n")
			var c *nbd.Client
			p.until("no front of "+h.name, func() error {
				conn, err := net.Dial("unix", socket)
				if err == nil {
					c, err = nbd.Connect(t.Context(), conn, nbd.Options{Name: name})
				}
				return err
			})
			clients[h.name+name] = c
			t.Cleanup(c.Close)
		}
	}
	// Writes of one host are read by the others, over the storage network's addresses.
	for name, size := range volumes {
		data := bytes.Repeat([]byte{byte(len(name))}, 1024)
		off := statefile.Offset(1)
		if name != realpool.Resource {
			data, off = bytes.Repeat([]byte{0x5a}, 1<<20), size-(1<<20) // To the very end, where an idle owner rewrites what is there.
		}
		p.until(name+" takes no write", func() error { return clients["n2"+name].Write(data, off, true, time.Minute) })
		for _, h := range hosts {
			got := make([]byte, len(data))
			p.until(name+" is not read by "+h.name, func() error { return clients[h.name+name].Read(got, off, time.Minute) })
			if !bytes.Equal(got, data) {
				t.Errorf("%s: %s reads something else", name, h.name)
			}
		}
	}
	// SM ends a host's programs by their process groups; another host takes over and nothing is lost. Whoever owns is among them.
	for _, gone := range hosts[:2] {
		for name := range volumes {
			stops["owner"+gone.name+name]()
		}
		for name := range volumes {
			off := statefile.Offset(1)
			if name != realpool.Resource {
				off = 256<<20 - 1024
			}
			got := make([]byte, 1024)
			p.until(name+" is lost with "+gone.name, func() error { return clients["n3"+name].Read(got, off, time.Minute) })
			if got[0] == 0 {
				t.Errorf("%s: data is gone with %s", name, gone.name)
			}
		}
	}
	// Without the kernel's client, SM's exact call fails and says why.
	if _, err := os.Stat("/sys/module/nbd"); errors.Is(err, os.ErrNotExist) {
		stops["frontn3"+realpool.Resource]()
		hosts[2].launch("nbd-http-server", "--socket-path", p.Dir+"/n3.socket", "--nbd-name", realpool.Resource, "--urls", "http://"+hosts[0].ip+":8076", "--device-size", "4194304")
		hosts[2].says("out-n3-nbd-http", "nbd")
	}
}
