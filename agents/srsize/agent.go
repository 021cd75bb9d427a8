// Package srsize keeps XAPI's sizes of XOSTOR SRs equal to what LINSTOR has. See DESIGN.md for the numbers, the conditions under which it acts and
// what it does when something fails.
package srsize

import (
	"context"
	"log/slog"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/bus/subject"
)

// Name is the agent's name.
const Name = "sr-size"

// Defaults of Config.
const (
	DefaultGrace         = 5 * time.Second
	DefaultUpdateSpacing = time.Minute
)

// Config is what the agent stands on.
type Config struct {
	HostUUID string // of this host
	// Coordinator tells whether this host is the pool's coordinator by its own files and by XAPI, and if not, why not.
	Coordinator   func(ctx context.Context) (ok bool, why string, err error)
	Records       Records
	Writer        Writer
	Storage       Storage       // may lag behind LINSTOR by the feed's polling
	Direct        Storage       // LINSTOR itself, asked when what XAPI shows is newer than Storage may be; nil: Storage
	StateFile     string        // where trend and last good values are kept; "" for nowhere
	Grace         time.Duration // how long a partial view is no finding; 0: DefaultGrace
	UpdateSpacing time.Duration // least time between two SR.update; 0: DefaultUpdateSpacing
	Log           *slog.Logger
}

// Agent is the SR size-updater. Its methods are called by agents.Run, one at a time.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	memory  map[string]*memory // by SR uuid
	vdis    map[string]*vdi    // by VDI uuid: those of the last look
	others  time.Time          // when somebody else was last seen to change a size
	refused string             // why XAPI refused the session key for sizes; "" if it did not
	savedAt time.Time
}

// New makes the agent. It acts on SRs of type linstor when this host is coordinator, the SR's PBD is plugged here, all its PBDs name one group,
// and LINSTOR shows the whole of it; then it writes to XAPI what differs.
func New(cfg Config) *Agent {
	if cfg.Grace <= 0 {
		cfg.Grace = DefaultGrace
	}
	if cfg.UpdateSpacing <= 0 {
		cfg.UpdateSpacing = DefaultUpdateSpacing
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Direct == nil {
		cfg.Direct = cfg.Storage
	}
	a := &Agent{cfg: cfg, log: cfg.Log.With(agents.KeyAgent, Name), memory: map[string]*memory{}, vdis: map[string]*vdi{}}
	a.load()
	return a
}

// Name implements agents.Agent.
func (a *Agent) Name() string { return Name }

// Wakes implements agents.Agent.
func (a *Agent) Wakes() []subject.Subject {
	return []subject.Subject{
		subject.XAPI("sr", "*"), subject.XAPI("vdi", "*"), subject.XAPI("pbd", "*"), subject.XAPI("pool", "*"),
		subject.LINSTOR("node", ">", ""), subject.LINSTOR("pool", ">", ""), subject.LINSTOR("resource", ">", ""), subject.LINSTOR("definition", ">", ""),
	}
}

// Decide implements agents.Agent.
func (a *Agent) Decide(now time.Time, s Snapshot) agents.Plan { return decide(now, s) }
