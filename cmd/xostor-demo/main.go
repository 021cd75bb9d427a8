// Command xostor-demo runs a whole XCP-ng pool with XOSTOR on this machine and lets the agents work on it. See DESIGN.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/xostor-agents/xostor-agents/integration/failover/realpool"
)

// Exit codes.
const (
	exitTrue  = 0 // every step came true
	exitFalse = 1 // something did not
	exitUsage = 2 // the call is wrong
)

const help = `xostor-demo shows the XOSTOR agents at work on a pool of three hosts, all on this machine.

The pool is a model with the wires of the real thing: each host has XAPI's socket and a LINSTOR controller's port.
The bus and the agent are the real program, as processes of their own. Nothing is installed; all is gone at the end.

Usage: xostor-demo [FLAGS]

  (no flag)        play all scenes, each under a minute; exit code 0 if every step came true
  --scene NAME     only this one:
    pool           disks are created, written, snapshotted, grown; a host is lost and comes back; LINSTOR's controller and
                   XAPI's coordinator move
    controller     LINSTOR's controller is killed, hangs, its host is cut off, it is moved, its host dies; needs root and the
                   Debian packages systemd, dbus, e2fsprogs
    heartbeat      HA's statefile: its owner is killed, hands over, freezes; the gap that each host's xhad sees, and its limit
  --stay           only the scene pool; afterwards keep the pool running, with commands to try, until Ctrl-C
  --chaos          kill and restart everything at random while disks change, then check all numbers
    --for 2m       how long
    --seed N       the same kills and changes again (printed at the start)
  --bench          measure: change to correct numbers in XAPI at 1000 volumes, cost when idle, first mirror of a large pool
    --changes 20   samples of each kind of change
    --quiet 3      samples of a guest that begins to write after a quiet time (100 s each)
  --xostor PATH    the program to show (default: xostor beside this one)
  --no-color       plain text; also without a terminal, and when NO_COLOR is set

Read a line of the story like this:

  12.4 s  sr-size     set-sr-size: LINSTOR and XAPI differ: used 3.06 GiB -> 4.06 GiB
   when   who         what it did, and why
`

// options are the flags.
type options struct {
	xostor, scene        string
	stay, chaos, bench   bool
	length               time.Duration
	seed                 uint64
	changes, quietGrowth int
	noColor              bool
}

func main() {
	realpool.Main(nil) // on the scene's hosts this program is also the stand-ins
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	o, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(out, help)
		return exitTrue
	case err != nil:
		fmt.Fprintf(errOut, "xostor-demo: %v; --help shows the flags\n", err)
		return exitUsage
	}
	t := newTimeline(out, !o.noColor)
	mode := playScenes
	switch {
	case o.stay:
		mode = story
	case o.chaos:
		mode = chaos
	case o.bench:
		mode = bench
	}
	if err := mode(ctx, o, t); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; every process was ended")
		}
		fmt.Fprintf(errOut, "\nxostor-demo: %v\n", err)
		return exitFalse
	}
	return exitTrue
}

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("xostor-demo", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&o.xostor, "xostor", "", "")
	fs.StringVar(&o.scene, "scene", "", "")
	fs.BoolVar(&o.stay, "stay", false, "")
	fs.BoolVar(&o.chaos, "chaos", false, "")
	fs.BoolVar(&o.bench, "bench", false, "")
	fs.DurationVar(&o.length, "for", 2*time.Minute, "")
	fs.Uint64Var(&o.seed, "seed", 0, "")
	fs.IntVar(&o.changes, "changes", 20, "")
	fs.IntVar(&o.quietGrowth, "quiet", 3, "")
	fs.BoolVar(&o.noColor, "no-color", false, "")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.scene != "" && !slices.ContainsFunc(scenes(), func(s scene) bool { return s.name == o.scene }) {
		return o, fmt.Errorf("there is no scene %q; there is %s", o.scene, sceneNames())
	}
	modes := 0
	for _, on := range []bool{o.scene != "", o.stay, o.chaos, o.bench} {
		if on {
			modes++
		}
	}
	if modes > 1 {
		return o, errors.New("--scene, --stay, --chaos and --bench exclude each other")
	}
	if o.length <= 0 || o.changes < 1 || o.quietGrowth < 0 {
		return o, errors.New("--for and --changes must be positive, --quiet not negative")
	}
	if o.seed == 0 {
		o.seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	if o.xostor == "" {
		self, err := os.Executable()
		if err != nil {
			return o, fmt.Errorf("find own folder: %w", err)
		}
		o.xostor = filepath.Join(filepath.Dir(self), "xostor")
	}
	if _, err := os.Stat(o.xostor); err != nil {
		return o, fmt.Errorf("find the program to show: %w; build it with make build, or give --xostor PATH", err)
	}
	return o, nil
}
