package failover_test

import (
	"archive/zip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/agents/failover"
	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// The test binary is also the programs that run on the hosts: under the name of drbd-utils their stand-ins, else by this variable.
const envProgram = "XOSTOR_TEST_PROGRAM"

func TestMain(m *testing.M) {
	switch name := filepath.Base(os.Args[0]); name {
	case "drbdsetup", "drbdadm":
		os.Exit(drbdsim.Face(name, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	var err error
	switch os.Getenv(envProgram) {
	case "":
		os.Exit(m.Run())
	case "agent":
		err = agentMain()
	case "controller":
		err = controllerMain()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// agentConfig is what the harness tells an agent.
type agentConfig struct {
	Self       string
	Names      failover.Names
	Policy     failover.Policy
	Paths      failover.Paths
	Controller string
	Socket     string
	Listen     string
	Port       int
	Major      int
	Drbdsetup  string
	Drbdadm    string
	ProbeEvery time.Duration
}

func agentMain() error {
	var c agentConfig
	if err := json.Unmarshal([]byte(os.Getenv("XOSTOR_TEST_CONFIG")), &c); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := failover.NewService(failover.ServiceConfig{Self: c.Self, Key: failover.BeatKey([]byte("test")), Names: c.Names, Policy: c.Policy, Paths: c.Paths, Controller: c.Controller,
		Socket: c.Socket, Listen: c.Listen, Port: c.Port, Major: c.Major, Drbdsetup: c.Drbdsetup, Drbdadm: c.Drbdadm, ProbeEvery: c.ProbeEvery, BackupLook: 200 * time.Millisecond, Log: log})
	if err != nil {
		return err
	}
	return s.Run(ctx, agents.Options{Log: log})
}

// controllerMain stands in for linstor-controller: it writes to its database all the time, serves REST on ADDRESS, and does what the file MODE says:
// "500" answers like one whose H2 has closed itself; "slow" starts after two seconds; "fail" does not start.
func controllerMain() error {
	dir, address, modeFile := os.Getenv("DIR"), os.Getenv("ADDRESS"), os.Getenv("MODE")
	mode := func() string {
		b, err := os.ReadFile(modeFile)
		if errors.Is(err, os.ErrNotExist) {
			return ""
		}
		return string(b)
	}
	switch mode() {
	case "fail":
		return errors.New("the database does not open")
	case "slow":
		t := time.NewTimer(2 * time.Second)
		<-t.C
	}
	db, err := os.OpenFile(filepath.Join(dir, "linstordb.mv.db"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer db.Close()
	var broken atomic.Bool
	go func() {
		block := make([]byte, 4096)
		for range time.Tick(20 * time.Millisecond) {
			_, err := db.WriteAt(block, 0)
			if err = errors.Join(err, db.Sync()); err != nil {
				broken.Store(true) // closed for good, as H2 does after an I/O error
			}
		}
	}()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		if broken.Load() || mode() == "500" {
			http.Error(w, "The database has been closed", http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /v1/nodes", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "[]") })
	mux.HandleFunc("POST /v1/controller/backup/db", func(w http.ResponseWriter, r *http.Request) {
		var q struct {
			Name string `json:"backup_name"`
		}
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f, err := os.Create(filepath.Join(dir, filepath.Base(q.Name)+".zip"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer f.Close()
		z := zip.NewWriter(f)
		e, err := z.Create("linstordb.mv.db")
		if err == nil {
			_, err = e.Write(make([]byte, 4096))
		}
		if err = errors.Join(err, z.Close()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	if err := systemd.Ready("up"); err != nil {
		return err
	}
	return http.Serve(l, mux)
}
