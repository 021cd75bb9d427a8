package failover

import (
	"regexp"
	"strings"
)

// resHost finds the sections of a .res file that describe one host: on "NAME" {.
var resHost = regexp.MustCompile(`(?m)^\s*on\s+"?([^"\s{]+)"?\s*\{`)

// NodeName is this host's name in LINSTOR and so in DRBD: the host of the .res file that bears the kernel's host name, in other letter case or with another
// domain if not the very same. The storage driver names nodes after the kernel's host name (SM drivers/linstorvolumemanager.py), so that is the answer
// when the file names no such host or two, and ok is false. No name is guessed from addresses: a wrong name would speak for another host.
func NodeName(res []byte, kernel string) (name string, ok bool) {
	var same []string
	for _, m := range resHost.FindAllSubmatch(res, -1) {
		host := string(m[1])
		if host == kernel {
			return host, true
		}
		if strings.EqualFold(firstLabel(host), firstLabel(kernel)) {
			same = append(same, host)
		}
	}
	if len(same) == 1 {
		return same[0], true
	}
	return kernel, false
}

func firstLabel(host string) string {
	label, _, _ := strings.Cut(host, ".")
	return label
}
