// Package xapiface is the HTTP face of a stand-in XAPI: it serves a xapidb.DB to clients of any make, over unix sockets and TCP, as XML-RPC and as JSON-RPC 1.0 and
// 2.0, in the dialect of the real daemon. See DESIGN.md.
package xapiface
