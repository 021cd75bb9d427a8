package bus

import "crypto/sha256"

// nodeID is how the group that keeps the history names the server with that name (nats-server, getHash in server/events.go). It is needed for hosts that are
// not there: the group forgets their names when it is restarted, not their ids.
func nodeID(name string) string {
	const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	sum := sha256.Sum256([]byte(name))
	id := make([]byte, 8)
	for i := range id {
		id[i] = digits[int(sum[i])%len(digits)]
	}
	return string(id)
}
