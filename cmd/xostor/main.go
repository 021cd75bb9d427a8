// Command xostor is the bus, the agents and the tools of the XOSTOR sidecars in one binary. `xostor help` lists what it does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/xostor-agents/xostor-agents/agents/dom0"
)

// Exit codes.
const (
	exitOK    = 0
	exitError = 1 // it did not work out; the message says why
	exitUsage = 2 // the call or the configuration is wrong; trying again will not help
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // dom0 has little memory, and our processes little to collect
	}
	processors(1)
	runtime.MemProfileRate = 0 // nobody asks for profiles
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// processors is how many of them the program uses at once, unless the environment says. One is enough at rest and takes a third less of its time than two,
// because threads look for each other's work after every wake-up, and less memory; Go's default is all of dom0's.
func processors(n int) {
	n = min(n, runtime.NumCPU())
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) != n {
		runtime.GOMAXPROCS(n)
	}
}

// command is one thing that xostor does.
type command struct {
	name  string
	args  string // shown in the usage line
	short string
	long  string
	run   func(ctx context.Context, c *call) error
}

// call is one invocation of a command.
type call struct {
	args        []string // what is left behind the flags
	config      dom0.Config
	json        bool
	follow      bool
	since       string
	subject     string
	plan        bool
	out, errOut io.Writer
	log         *slog.Logger
}

// usageError is a call that can never work.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// anyArgs is the args of a command that looks at them itself.
const anyArgs = "..."

func commands() []command {
	return []command{
		{"bus", "", "run this host's bus and its feeds",
			"Runs the embedded NATS server behind a unix socket, connected to those of the pool's other hosts by mutual TLS with certificates derived from the pool secret and, while this host is the pool's coordinator, publishes changes of XAPI and LINSTOR on it.\nUnit: xostor-bus.service. Ends on SIGTERM within 5 seconds.", runBus},
		{"agent", "NAME", "run one agent", "Runs an agent until SIGTERM. Agents are right without the bus; with it they are fast. It may run on every host.\n\nAgents:\n  sr-size   keeps XAPI's sizes of XOSTOR SRs equal to what LINSTOR has; only the coordinator's writes\n  failover  keeps exactly one healthy LINSTOR controller, on a host that holds its database with quorum; needs neither XAPI nor LINSTOR nor the bus, and is to run on every host\nUnits: xostor-sr-size.service, xostor-failover.service.", runAgent},
		{"status", "", "show every agent of the pool", "Asks all agents of all hosts on the bus how they are: state, last pass, last action, findings with the next step, and how long the answer took (LAG).\nA host of the pool that does not answer within a second is shown as such.\nExit code 0 when all are healthy, 1 when one is failing or a host does not answer.", runStatus},
		{"plan", "NAME", "show what an agent would do now, without doing it", "Looks at the live pool with the agent's own code and prints its actions with their reasons, and its findings. Nothing is written.", runPlan},
		{"events", "", "print what happens in the pool", "Prints events from the bus, one line each, or with --json one JSON object each (CloudEvents 1.0).\n  --since 2h      begin with the history of the last two hours\n  --follow        go on with live events (the default without --since)\n  --subject S     only these subjects, such as 'xostor.v1.xapi.vdi.*' or 'xostor.v1.agent.>'", runEvents},
		{"controller", "...", "show and move the LINSTOR controller, list backups of its database", "Asks the failover agent of this host, so it works without XAPI, LINSTOR and the bus.\n  controller status                   who runs the controller, why, since when, and what is missing\n  controller move [HOST]              hand it to another host, the best one if none is named; checked first, and taken back when it does not work\n  controller backups                  the backups on this host, each read through again\n  controller restore --plan [BACKUP]  print the steps to restore the newest good backup, or the named one; does nothing\nHOST is a LINSTOR node name. Exit code 0 when it worked out, 1 when not, with the reason.", runController},
		{"heartbeat", "VERB", "show HA's statefile on this host: status or dump", "status: who owns the statefile and since when, this host's requests and their times, how close each of xhad's time-outs came, each host's last write, and findings with the next step. Exit code 1 while somebody has to act.\ndump: reads the statefile through this host's daemon and explains it: pool, master, and each host's slot.\nBoth need root on a host where HA is enabled, and neither bus nor XAPI. xostor-heartbeat has the same, and can dump a file.", runHeartbeat},
		{"version", "", "print the version", "Prints the version and what it was built with.", runVersion},
	}
}

func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	err := dispatch(ctx, args, out, errOut)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.Is(err, errQuiet):
		return exitError
	}
	fmt.Fprintln(errOut, "xostor: "+err.Error())
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[*dom0.ConfigError](err); ok {
		return exitUsage
	}
	return exitError
}

// errQuiet ends with exitError after the command has said all there is to say.
var errQuiet = errors.New("quiet")

func dispatch(ctx context.Context, args []string, out, errOut io.Writer) error {
	if len(args) == 0 || slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		if len(args) > 1 {
			return dispatch(ctx, []string{args[1], "--help"}, out, errOut)
		}
		usage(out)
		return nil
	}
	if args[0] == "--version" {
		args[0] = "version"
	}
	i := slices.IndexFunc(commands(), func(c command) bool { return c.name == args[0] })
	if i < 0 {
		return &usageError{fmt.Sprintf("there is no command %q; `xostor help` lists them", args[0])}
	}
	cmd := commands()[i]
	c := &call{out: out, errOut: errOut}
	fs := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	file := fs.String("config", "", "configuration file (default "+dom0.DefaultConfigFile+", which may be missing)")
	level := fs.String("log-level", defaultLevel(cmd.name), "debug, info, warn or error")
	fs.BoolVar(&c.json, "json", false, "print JSON")
	if cmd.name == "controller" {
		fs.BoolVar(&c.plan, "plan", false, "with restore: print the steps (compulsory; restoring is for people)")
	}
	if cmd.name == "events" {
		fs.BoolVar(&c.follow, "follow", false, "go on with live events")
		fs.StringVar(&c.since, "since", "", "begin with the history of this time span, such as 2h")
		fs.StringVar(&c.subject, "subject", "", "subject pattern (default all events)")
	}
	rest, err := parse(fs, args[1:])
	if errors.Is(err, flag.ErrHelp) {
		commandUsage(out, cmd, fs)
		return nil
	}
	if err != nil {
		return &usageError{fmt.Sprintf("%s: %v; `xostor help %s` shows the flags", cmd.name, err, cmd.name)}
	}
	if want := len(strings.Fields(cmd.args)); cmd.args != anyArgs && len(rest) != want {
		return &usageError{fmt.Sprintf("%s takes %d arguments, got %d; `xostor help %s` shows how it is called", cmd.name, want, len(rest), cmd.name)}
	}
	c.args = rest
	var lv slog.Level
	if err := lv.UnmarshalText([]byte(*level)); err != nil {
		return &usageError{fmt.Sprintf("%s: --log-level %q is none of debug, info, warn, error", cmd.name, *level)}
	}
	c.log = slog.New(slog.NewTextHandler(errOut, &slog.HandlerOptions{Level: lv}))
	if cmd.name == "version" {
		return cmd.run(ctx, c)
	}
	if c.config, err = dom0.LoadConfig(*file); err != nil {
		return err
	}
	return cmd.run(ctx, c)
}

// defaultLevel keeps tools silent about what their clients do; daemons say it.
func defaultLevel(command string) string {
	if command == "bus" || command == "agent" {
		return "info"
	}
	return "warn"
}

// parse lets flags stand before and behind the arguments.
func parse(fs *flag.FlagSet, args []string) (rest []string, err error) {
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		if fs.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, fs.Arg(0))
		args = fs.Args()[1:]
	}
}

func usage(w io.Writer) {
	fmt.Fprint(w, `xostor keeps an XCP-ng pool's XOSTOR storage in order: small agents on each host, one per concern.

Usage: xostor COMMAND [ARGUMENTS] [FLAGS]

`)
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-14s %s\n", strings.TrimSpace(c.name+" "+c.args), c.short)
	}
	fmt.Fprintf(w, `
  --config FILE  configuration; every key is optional (default %s)
  --json         machine-readable output

Start here, on any host of the pool:
  xostor status              how the agents are, and what they found
  xostor plan sr-size        what would be corrected now, and why
  xostor events --follow     what happens in the pool, live
  xostor controller status   which host runs LINSTOR's controller, and why

xostor help COMMAND tells more of a command.
`, dom0.DefaultConfigFile)
}

func commandUsage(w io.Writer, c command, fs *flag.FlagSet) {
	fmt.Fprintf(w, "Usage: xostor %s [FLAGS]\n\n%s\n\nFlags:\n", strings.TrimSpace(c.name+" "+c.args), c.long)
	fs.VisitAll(func(f *flag.Flag) { fmt.Fprintf(w, "  --%-12s %s\n", f.Name, f.Usage) })
}
