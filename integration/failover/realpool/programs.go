package realpool

import (
	"archive/zip"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdface"
	"github.com/xostor-agents/xostor-agents/systemd"
)

// EnvProgram names the program that the executable of a test, or of the demo, is on a host: "agent" or "controller".
const EnvProgram = "XOSTOR_LAB_PROGRAM"

const (
	programAgent      = "agent"
	programController = "controller"
)

func isFace(name string) bool { return slices.Contains([]string{"drbdsetup", "drbdadm"}, name) }

// Main must be called first by every executable that makes a pool: it is also the programs that run on the hosts. Called by the name drbdsetup or drbdadm it is
// their stand-in, and with EnvProgram=controller linstor-controller's; then it does not return. agent, if not nil, is run for EnvProgram=agent.
//
// The controller's stand-in writes to its database all the time, serves REST on ADDRESS, and does what the file MODE says: "500" answers like one
// whose H2 has closed itself; "slow" starts after two seconds; "fail" does not start; "backup-hangs" writes a part of each backup and then nothing more.
func Main(agent func() error) {
	if name := filepath.Base(os.Args[0]); isFace(name) {
		os.Exit(drbdface.Main(name, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	var err error
	switch program := os.Getenv(EnvProgram); {
	case program == programController:
		err = controller()
	case program == programAgent && agent != nil:
		err = agent()
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func controller() error {
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
	block := make([]byte, 4096)
	if _, err := db.WriteAt(block, 0); err != nil { // a controller that is up has written its schema
		return err
	}
	var broken atomic.Bool
	go func() {
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
		if mode() == "backup-hangs" {
			_, _ = f.WriteString("PK") // what becomes of it does not matter
			<-r.Context().Done()
			return
		}
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
