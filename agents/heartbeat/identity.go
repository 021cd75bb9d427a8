package heartbeat

import "github.com/xostor-agents/xostor-agents/bus/poolcert"

// SecretPath is where XAPI keeps the pool secret on each host.
const SecretPath = poolcert.SecretPath

// Identity is this host in the pool's TLS.
type Identity = poolcert.Identity

// LoadIdentity makes the identity of host from the pool secret in the file at path.
func LoadIdentity(host, path string) (*Identity, error) { return poolcert.Load(host, path) }
