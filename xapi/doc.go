// Package xapi speaks to XAPI, the toolstack of an XCP-ng pool: calls, records and the event stream.
//
// What it promises:
//
//   - Every call has a deadline, honours its context, and names its method in every error. An answer of XAPI that says no is
//     an *Error with XAPI's code; anything that kept an answer from arriving is a *TransportError with a hint for the operator.
//   - One session per Client, logged in on first use, renewed once when XAPI has forgotten it, logged out by Close.
//   - Watch delivers a copy of the chosen classes that converges to the server's whatever is lost on the way. It promises
//     no order between objects, may repeat a state, and skips states that were overwritten before they were read
//     (event.from is a diff, not a log).
//
// What it does not promise: a call that ended in a TransportError may or may not have been carried out.
//
// Bulk reads and events use JSON-RPC 2.0 on /jsonrpc; control calls use XML-RPC on / through the codec of kolo/xmlrpc
// behind a normaliser. Both wires carry the same session. The sources of what is said here about XAPI are the
// xapi-project/xen-api repository; the file is named where a fact is used.
package xapi
