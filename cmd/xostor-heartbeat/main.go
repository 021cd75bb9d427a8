// Command xostor-heartbeat gives this host's xhad the HA statefile that one host of the pool has open. It stands in for
// http-disk-server and nbd-http-server under their own names, and runs both in one process as "run".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

var version = "dev"

const usage = `xostor-heartbeat: the HA statefile for every host of an XOSTOR pool

  xostor-heartbeat run --resource NAME     front and owner in one process; needs no LINSTOR controller
  xostor-heartbeat status [--json]         owner, latencies, how close to the time-outs, last writes
  xostor-heartbeat handover [HOST]         give the ownership to HOST, or to anyone, before maintenance
  xostor-heartbeat detach [RESOURCE]       disconnect the kernel device that a stopped daemon left, if nobody has it open
  xostor-heartbeat dump [FILE|DEVICE]      decode and explain the statefile (of this host's daemon, or in a file)
  xostor-heartbeat version

Under the names that XCP-ng's SM starts (as argv[0] or first argument):

  http-disk-server --disk DEVICE --ip ADDRESS --port PORT [-v]
  nbd-http-server --socket-path PATH --nbd-name NAME --urls URL,... --device-size BYTES [-v]

"xostor-heartbeat COMMAND --help" lists a command's options.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err := dispatch(ctx, os.Args)
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, err)
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "xostor-heartbeat:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("wrong usage")

func dispatch(ctx context.Context, argv []string) error {
	name, args := filepath.Base(argv[0]), argv[1:]
	if name != "http-disk-server" && name != "nbd-http-server" {
		if len(args) == 0 {
			return fmt.Errorf("%w: no command", errUsage)
		}
		name, args = args[0], args[1:]
	}
	switch name {
	case "http-disk-server":
		return runDiskServer(ctx, args)
	case "nbd-http-server":
		return runNBDServer(ctx, args)
	case "run":
		return runBoth(ctx, args)
	case "status":
		return status(args, os.Stdout)
	case "handover":
		return handover(args)
	case "detach":
		return detach(args, os.Stdout)
	case "dump":
		return dump(args, os.Stdout)
	case "version":
		fmt.Println("xostor-heartbeat", version)
		return nil
	case "help", "--help", "-h":
		fmt.Print(usage)
		return nil
	default:
		return fmt.Errorf("%w: unknown command %q", errUsage, name)
	}
}

func newLog(verbose bool) *slog.Logger {
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// mclOnfault locks pages as they are touched; without it thread stacks and the heap's reserve would be locked, too.
const mclOnfault = 4

// lockMemory keeps the daemon from waiting for a stalled root disk. A heap that small is collected early and often.
func lockMemory(log *slog.Logger) {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(24 << 20)
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | mclOnfault); err != nil {
		log.Warn("memory is not locked", "err", err)
	}
}
