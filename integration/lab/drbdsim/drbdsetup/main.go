// Command drbdsetup stands in for drbd-utils: it passes its arguments to the model behind DRBDSIM_SOCKET, as the host DRBDSIM_NODE. Called by the name
// drbdadm it is that. Only what the agents use is answered: events2, status, show, primary, secondary, connect, adjust.
package main

import (
	"os"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/drbdsim/drbdface"
)

func main() {
	os.Exit(drbdface.Main(os.Args[0][strings.LastIndexByte(os.Args[0], '/')+1:], os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
