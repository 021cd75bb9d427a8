// Package feed publishes what XAPI and LINSTOR say on the bus, as tables that agents mirror.
//
// What it promises. One host of the pool publishes: the coordinator. Each table is fresh only while its source answers; when it does
// not, the table says so with the reason and keeps its last rows. A new coordinator begins with a new epoch, and mirrors list again.
//
// What it does not promise. Each intermediate state: XAPI's events are a diff, and LINSTOR is polled. The rows of two tables belong to
// nearly the same moment, never exactly: agents re-check before they act.
package feed
