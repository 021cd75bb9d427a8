//go:build race

package nbd

// The race detector allocates on its own account.
const raceEnabled = true
