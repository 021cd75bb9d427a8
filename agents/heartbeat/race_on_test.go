//go:build race

package heartbeat

// The race detector makes the simulation ten times slower.
const raceEnabled = true
