// Package xapidb is an in-memory XAPI database for tests and demonstrations: the classes, fields and relations of XCP-ng 8.3, with the event semantics of the real
// database (generation stamps, bounded tombstones, diffs instead of a log). See DESIGN.md.
//
// Values in and out are plain Go: string (also enumerations and refs), bool, int64, float64, time.Time (UTC, whole seconds), []string, []int64, map[string]string,
// map[string]int64, map[string]float64, map[string][]string. Create and Set also take int for int64, numeric strings for numbers, and []any or map[string]any.
package xapidb
