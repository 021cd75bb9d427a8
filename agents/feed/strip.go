package feed

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/xostor-agents/xostor-agents/xapi"
)

// dropped are the fields that are not published, by class. Reasons: allowed_operations is recomputed by XAPI at each
// operation on any neighbour and would make most of the traffic, and nobody may rely on it; the lists of an SR's VDIs and of
// a network's VIFs are large, are sent again with each change of the object, and can be had from the other side (VDI.SR, VIF.network);
// xenstore_data and external_auth_configuration may hold passwords, and programs outside may subscribe; the rest is large or
// constant and no storage decision reads it.
var dropped = map[string][]string{
	"sr":      {"VDIs", "blobs", "allowed_operations"},
	"vdi":     {"VBDs", "crash_dumps", "allowed_operations"},
	"vbd":     {"allowed_operations", "metrics", "runtime_properties", "qos_supported_algorithms"},
	"network": {"VIFs", "blobs", "allowed_operations"},
	"host": {
		"allowed_operations", "blobs", "capabilities", "certificates", "chipset_info", "cpu_info", "crashdumps", "features", "guest_VCPUs_params",
		"external_auth_configuration", "host_CPUs", "license_params", "logging", "patches", "PCIs", "PGPUs", "PUSBs", "supported_bootloaders", "updates",
	},
	"vm": {
		"allowed_operations", "attached_PCIs", "bios_strings", "blobs", "consoles", "crash_dumps", "HVM_boot_params", "last_boot_CPU_flags",
		"last_booted_record", "recommendations", "snapshot_info", "snapshot_metadata", "VCPUs_params", "VGPUs", "VTPMs", "VUSBs", "NVRAM",
		"xenstore_data",
	},
	"pif":  {"capabilities", "properties"},
	"pool": {"allowed_operations", "blobs", "client_certificate_auth_name", "cpu_info", "guest_agent_config", "recommendations", "redo_log_vdi", "repositories", "restrictions"},
}

var (
	errNotRecord = errors.New("not a JSON object")
	errNoUUID    = errors.New("the record has no uuid")
)

// row makes of a record what is published. Its first member is the object's own ref, which XAPI keeps outside the record: without it nobody could tell
// which row another row's ref means.
func row(class string, ref xapi.Ref, record json.RawMessage) (json.RawMessage, error) {
	out, err := strip(record, dropped[class])
	if err != nil {
		return nil, err
	}
	if class == "pbd" {
		if out, err = redact(out, "device_config"); err != nil {
			return nil, err
		}
	}
	own, err := json.Marshal(ref)
	if err != nil {
		return nil, fmt.Errorf("encode ref: %w", err)
	}
	rest := out[1:] // behind the opening brace
	if len(rest) > 1 {
		own = append(own, ',')
	}
	return slices.Concat(json.RawMessage(`{"ref":`), own, rest), nil
}

// redact leaves the members with confidential names out of the object that is the named member: a PBD of another
// storage type carries its server's password there.
func redact(record json.RawMessage, name string) (json.RawMessage, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(record, &all); err != nil {
		return nil, fmt.Errorf("redact record: %w", err)
	}
	var inner map[string]json.RawMessage
	if raw, ok := all[name]; ok {
		if err := json.Unmarshal(raw, &inner); err != nil {
			return nil, fmt.Errorf("redact %s: %w", name, err)
		}
	}
	before := len(inner)
	maps.DeleteFunc(inner, func(key string, _ json.RawMessage) bool { return confidential(key) })
	if len(inner) == before {
		return record, nil
	}
	raw, err := json.Marshal(inner)
	if err != nil {
		return nil, fmt.Errorf("redact %s: %w", name, err)
	}
	all[name] = raw
	out, err := json.Marshal(all)
	if err != nil {
		return nil, fmt.Errorf("redact record: %w", err)
	}
	return out, nil
}

// strip copies a JSON object without the named members at its top level. The order of the others and their spelling stay,
// only white space between members goes. The input must be valid JSON (decoders made it); what is not an object is errNotRecord.
func strip(record json.RawMessage, drop []string) (json.RawMessage, error) {
	out := make(json.RawMessage, 0, len(record))
	out = append(out, '{')
	err := members(record, func(name, value []byte) bool {
		if !isAny(name[1:len(name)-1], drop) {
			if len(out) > 1 {
				out = append(out, ',')
			}
			out = append(append(append(out, name...), ':'), value...)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	return append(out, '}'), nil
}

// member is the text member of that name; "" when there is none.
func member(record json.RawMessage, want string) (text string, err error) {
	var bad error
	err = members(record, func(name, value []byte) bool {
		if string(name[1:len(name)-1]) != want {
			return true
		}
		bad = json.Unmarshal(value, &text)
		return false
	})
	return text, errors.Join(err, bad)
}

// members calls fn with each member's name, quoted, and value until fn says no.
func members(record json.RawMessage, fn func(name, value []byte) bool) error {
	s := scanner{in: record}
	s.blank()
	if !s.take('{') {
		return errNotRecord
	}
	for {
		s.blank()
		if s.take('}') {
			return nil
		}
		s.take(',')
		s.blank()
		name := s.value()
		s.blank()
		if len(name) < 2 || name[0] != '"' || !s.take(':') {
			return fmt.Errorf("read record at byte %d: %w", s.at, errNotRecord)
		}
		s.blank()
		value := s.value()
		if len(value) == 0 {
			return fmt.Errorf("read record at byte %d: %w", s.at, errNotRecord)
		}
		if !fn(name, value) {
			return nil
		}
	}
}

func isAny(name []byte, list []string) bool {
	for _, s := range list {
		if string(name) == s {
			return true
		}
	}
	return false
}

// scanner cuts valid JSON into values.
type scanner struct {
	in []byte
	at int
}

func (s *scanner) blank() {
	for s.at < len(s.in) && (s.in[s.at] == ' ' || s.in[s.at] == '\n' || s.in[s.at] == '\t' || s.in[s.at] == '\r') {
		s.at++
	}
}

func (s *scanner) take(c byte) bool {
	if s.at < len(s.in) && s.in[s.at] == c {
		s.at++
		return true
	}
	return false
}

// value is the value that begins here; empty when there is none.
func (s *scanner) value() []byte {
	start, depth := s.at, 0
	for s.at < len(s.in) {
		switch c := s.in[s.at]; c {
		case '"':
			s.text()
		case '{', '[':
			depth++
			s.at++
		case '}', ']', ',', ':', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return s.in[start:s.at]
			}
			if c == '}' || c == ']' {
				depth--
			}
			s.at++
		default:
			s.at++
			continue // Numbers and words end at the next delimiter.
		}
		if depth == 0 {
			return s.in[start:s.at]
		}
	}
	return s.in[start:s.at]
}

// text skips a string.
func (s *scanner) text() {
	for s.at++; s.at < len(s.in); s.at++ {
		switch s.in[s.at] {
		case '\\':
			s.at++
		case '"':
			s.at++
			return
		}
	}
	s.at = len(s.in)
}
