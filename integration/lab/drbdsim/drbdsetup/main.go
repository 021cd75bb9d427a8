// Command drbdsetup stands in for drbd-utils: it passes its arguments to the model behind DRBDSIM_SOCKET, as the host DRBDSIM_NODE. Called by the name
// drbdadm it is that. Only what the agents use is answered: events2, status, show, primary, secondary, connect, adjust.
package main

import (
	"os"
	"path/filepath"

	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim"
)

func main() {
	os.Exit(drbdsim.Face(filepath.Base(os.Args[0]), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
