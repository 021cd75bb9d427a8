package failover

import (
	"bytes"
	"sync"
	"time"
)

// keyKept is how long the key before a change is still used: XAPI brings a new pool secret to the hosts one after the other, and one that is down gets
// it when it comes back.
const keyKept = 10 * time.Minute

// keyring is the key in use and, for a while after a change, the one before. Meanwhile everything is sealed with both, so that hosts which learn of a new
// secret at different times go on hearing each other.
type keyring struct {
	mu    sync.Mutex
	now   []byte
	old   []byte
	until time.Time // of old
}

func newKeyring(key []byte) *keyring { return &keyring{now: key} }

// use takes a key into use and tells whether it is another one.
func (k *keyring) use(now time.Time, key []byte) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if bytes.Equal(k.now, key) {
		return false
	}
	k.old, k.now, k.until = k.now, key, now.Add(keyKept)
	return true
}

// all returns the keys that are good now, the one in use first.
func (k *keyring) all(now time.Time) [][]byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.old != nil && now.Before(k.until) {
		return [][]byte{k.now, k.old}
	}
	return [][]byte{k.now}
}
