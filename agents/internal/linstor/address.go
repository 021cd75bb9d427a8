package linstor

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

const (
	portPlain = "3370" // DFLT_CTRL_PORT_PLAIN of linstor-common.
	portTLS   = "3371" // DFLT_CTRL_PORT_SSL of linstor-common.
)

// parseAddress turns one configured controller address into a base URL without path, for example
// "http://10.0.0.1:3370". Accepted: host, host:port, IPv6 with or without brackets, and the schemes http, https,
// linstor and linstor+ssl.
func parseAddress(s string) (string, error) {
	raw := strings.TrimSpace(s)
	scheme, port := "http", portPlain
	if name, rest, found := strings.Cut(raw, "://"); found {
		switch strings.ToLower(name) {
		case "http", "linstor":
		case "https", "linstor+ssl":
			scheme, port = "https", portTLS
		default:
			return "", fmt.Errorf("parse controller address %q: unknown scheme %q, use http, https, linstor or linstor+ssl", s, name)
		}
		raw = strings.TrimSuffix(rest, "/")
	}
	if ip := net.ParseIP(raw); ip != nil && strings.Contains(raw, ":") {
		raw = "[" + raw + "]"
	}
	u, err := url.Parse(scheme + "://" + raw)
	if err != nil {
		return "", fmt.Errorf("parse controller address %q: %w", s, errors.Unwrap(err))
	}
	if u.Hostname() == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("parse controller address %q: give only a host, or host:port, with an optional scheme", s)
	}
	if u.Port() != "" {
		port = u.Port()
	}
	return scheme + "://" + net.JoinHostPort(u.Hostname(), port), nil
}
