package linstorface

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// maxBody bounds a request body; LINSTOR's server takes 2 MiB and more, none of its calls needs it.
const maxBody = 4 << 20

func (f *Face) routes() {
	f.endpoints(func(pattern string, h http.HandlerFunc) { f.mux.HandleFunc(pattern, h) })
	for _, p := range notBuilt {
		f.mux.HandleFunc(p, f.notImplemented)
	}
	f.mux.HandleFunc("/", f.unknown)
}

// cost says what a call would cost a real controller.
func (f *Face) cost(r *http.Request) Cost {
	_, pattern := f.mux.Handler(r)
	switch {
	case pattern == "GET /v1/view/storage-pools", strings.HasPrefix(pattern, "GET ") && strings.Contains(pattern, "/storage-pools"):
		if r.URL.Query().Get("cached") == "true" {
			return Mem
		}
		return Sat
	case satReads[pattern]:
		return Sat
	case strings.HasPrefix(pattern, "GET "), memWrites[pattern], pattern == "/":
		return Mem
	}
	return Sat
}

// satReads are the reads that ask satellites; all other GETs are answered from memory (but see storage pools).
var satReads = map[string]bool{
	"GET /v1/view/resources": true, "GET /v1/resource-groups/{group}/query-max-volume-size": true,
	"GET /v1/physical-storage": true, "GET /v1/physical-storage/{$}": true, "GET /v1/error-reports": true, "GET /v1/error-reports/{$}": true,
	"GET /v1/resource-definitions/{rd}/resources/{node}/volumes":      true,
	"GET /v1/resource-definitions/{rd}/resources/{node}/volumes/{nr}": true,
}

// memWrites are the writes that end in the controller's database.
var memWrites = map[string]bool{
	"PUT /v1/key-value-store/{instance}": true, "DELETE /v1/key-value-store/{instance}": true,
	"POST /v1/resource-groups": true, "PUT /v1/resource-groups/{group}": true, "DELETE /v1/resource-groups/{group}": true,
	"POST /v1/resource-definitions": true, "POST /v1/storage-pool-definitions": true,
	"POST /v1/resource-groups/{group}/volume-groups": true, "DELETE /v1/resource-groups/{group}/volume-groups/{nr}": true,
	"PUT /v1/resource-groups/{group}/volume-groups/{nr}": true,
}

// notImplemented answers an endpoint that LINSTOR has and the stand-in has not: never a 404, which would be a lie.
func (f *Face) notImplemented(w http.ResponseWriter, r *http.Request) {
	f.send(w, r, http.StatusNotImplemented, linstorsim.Reply{linstorsim.ErrorEntry(linstorsim.CodeUnknown,
		"The stand-in does not implement "+r.Method+" "+r.URL.Path)})
}

// unknown answers what no endpoint matched: 405 when the path exists with another method, else 404, both with a list.
func (f *Face) unknown(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	for _, m := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch, http.MethodOptions} {
		probe := r.Clone(r.Context())
		probe.Method = m
		if _, pattern := f.mux.Handler(probe); pattern != "/" {
			f.send(w, r, http.StatusMethodNotAllowed, linstorsim.Reply{linstorsim.ErrorEntry(linstorsim.CodeUnknown,
				"Method '"+r.Method+"' not allowed on path '/"+path+"'.")})
			return
		}
	}
	f.send(w, r, http.StatusNotFound, linstorsim.Reply{linstorsim.ErrorEntry(linstorsim.CodeUnknown, "Path '/"+path+"' not found on server.")})
}

// notBuilt are real endpoints (from LINSTOR's OpenAPI document) that the stand-in does not play.
var notBuilt = []string{
	"POST /v1/actions/snapshot/multi", "POST /v1/nodes/ebs", "GET /v1/nodes/{node}/config", "PUT /v1/nodes/{node}/config",
	"POST /v1/resource-definitions/{rd}/clone", "GET /v1/resource-definitions/{rd}/clone/{clone}",
	"POST /v1/resource-definitions/{rd}/files/{file}", "DELETE /v1/resource-definitions/{rd}/files/{file}",
	"PUT /v1/resource-definitions/{rd}/volume-definitions/{nr}/encryption-passphrase",
	"PUT /v1/resource-definitions/{rd}/resources/{node}/volumes/{nr}",
	"POST /v1/resource-definitions/{rd}/snapshot-restore-resource/{snapshot}",
	"POST /v1/resource-definitions/{rd}/snapshot-restore-volume-definition/{snapshot}",
	"POST /v1/resource-definitions/{rd}/snapshot-rollback/{snapshot}",
	"PUT /v1/resource-definitions/{rd}/snapshots/{snapshot}",
	"POST /v1/resource-groups/{group}/adjust", "POST /v1/resource-groups/adjustall",
	"PUT /v1/controller/config", "POST /v1/controller/backup/db", "POST /v1/controller/database/export",
	"PUT /v1/resource-definitions/{rd}/drbd-proxy", "POST /v1/resource-definitions/{rd}/drbd-proxy/enable/{a}/{b}",
	"POST /v1/resource-definitions/{rd}/drbd-proxy/disable/{a}/{b}",
	"GET /v1/encryption/passphrase", "POST /v1/encryption/passphrase", "PUT /v1/encryption/passphrase", "PATCH /v1/encryption/passphrase",
	"GET /v1/view/schedules-by-resource", "GET /v1/view/schedules-by-resource/{rd}", "GET /v1/view/backup/queue",
	"GET /v1/physical-storage/{node}", "POST /v1/physical-storage/{node}", "GET /v1/sos-report", "GET /v1/sos-report/download",
	"GET /v1/remotes/{remote}/backups", "POST /v1/remotes/{remote}/backups",
	"DELETE /v1/remotes/{remote}/backups", "POST /v1/remotes/{remote}/backups/{verb}",
	"PUT /v1/remotes/{remote}/backups/schedule/{schedule}/{verb}", "DELETE /v1/remotes/{remote}/backups/schedule/{schedule}/delete", "DELETE /v1/remotes", "PUT /v1/remotes/s3/{remote}",
	"POST /v1/remotes/s3", "POST /v1/remotes/linstor", "PUT /v1/remotes/linstor/{remote}", "POST /v1/remotes/ebs",
	"PUT /v1/remotes/ebs/{remote}", "GET /v1/schedules", "POST /v1/schedules", "PUT /v1/schedules/{schedule}",
	"DELETE /v1/schedules/{schedule}", "GET /v1/files", "GET /v1/files/{file}", "PUT /v1/files/{file}", "DELETE /v1/files/{file}",
	"GET /v1/files/{file}/check/{node}", "GET /v1/space-report", "POST /v1/nodes/exec/drbd-reactorctl/{verb}",
	"GET /v1/storage-pool-definitions/properties/info", "GET /v1/nodes/properties/info",
	"GET /v1/nodes/{node}/storage-pools/properties/info", "GET /v1/resource-definitions/properties/info",
	"GET /v1/resource-definitions/{rd}/volume-definitions/properties/info",
	"GET /v1/resource-definitions/{rd}/resources/properties/info",
	"GET /v1/resource-definitions/{rd}/resources/{node}/volumes/properties/info",
	"GET /v1/resource-definitions/{rd}/resource-connections/properties/info", "GET /v1/resource-groups/properties/info",
	"GET /v1/resource-groups/{group}/volume-groups/properties/info", "GET /v1/controller/properties/info",
	"GET /v1/controller/properties/info/all", "GET /v1/resource-definitions/{rd}/drbd-proxy/properties/info",
}

// body reads a request's JSON into v. LINSTOR refuses properties that it does not know. An empty body is an empty object.
func (f *Face) body(w http.ResponseWriter, r *http.Request, v any) bool {
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if raw = bytes.TrimSpace(raw); err == nil && len(raw) > 0 {
		err = decode(raw, v)
	}
	if err == nil {
		return true
	}
	e := linstorsim.ErrorEntry(0, "Unable to parse input json.")
	e.Code = parseError
	e.Details = err.Error()
	f.send(w, r, http.StatusBadRequest, linstorsim.Reply{e})
	return false
}

// decode is strict about names and, like LINSTOR's Jackson, takes numbers and booleans that come as strings: the linstor
// command sends its place count so.
func decode(raw []byte, v any) error {
	const maxCoerced = 64
	for range maxCoerced {
		dec := json.NewDecoder(bytes.NewReader(raw))
		dec.DisallowUnknownFields()
		err := dec.Decode(v)
		if err == nil && dec.More() {
			return errors.New("trailing data")
		}
		var wrong *json.UnmarshalTypeError
		if !errors.As(err, &wrong) {
			return err
		}
		if raw = unquoted(raw, wrong); raw == nil {
			return err
		}
	}
	return errors.New("too many numbers that are strings")
}

var scalar = regexp.MustCompile(`"(-?[0-9]+(?:\.[0-9]+)?|true|false)"$`)

// unquoted returns raw with the quotes around the offending scalar removed, or nil when it is none.
func unquoted(raw []byte, wrong *json.UnmarshalTypeError) []byte {
	at := int(wrong.Offset)
	if wrong.Value != "string" || at > len(raw) {
		return nil
	}
	m := scalar.FindSubmatchIndex(raw[:at])
	if m == nil {
		return nil
	}
	return slices.Concat(raw[:m[0]], raw[m[2]:m[3]], raw[at:])
}

// parseError is API_CALL_PARSE_ERROR of linstor-common's constants.
const parseError = -0x3000000000000003

// number reads a number from the path; LINSTOR answers 404 when it is none.
func (f *Face) number(w http.ResponseWriter, r *http.Request, name string) (int, bool) {
	n, err := strconv.Atoi(r.PathValue(name))
	if err != nil {
		f.unknown(w, r)
	}
	return n, err == nil
}

// reached waits for the satellites that a call has to ask (none means all) and reports whether the client is still there.
func (f *Face) reached(r *http.Request, nodes ...string) bool {
	return f.sim.WaitSatellites(r.Context(), nodes...) == nil
}

// mutate carries a change out, then waits for the satellites as LINSTOR does: the change is stored even when the client
// gives up waiting.
func (f *Face) mutate(w http.ResponseWriter, r *http.Request, success int, rc linstorsim.Reply, nodes ...string) {
	if f.cost(r) == Sat && !f.reached(r, nodes...) {
		panic(http.ErrAbortHandler)
	}
	f.reply(w, r, success, rc)
}

// page cuts a list by limit and offset; offset only counts with a limit.
func page[T any](r *http.Request, list []T) []T {
	limit, _ := strconv.Atoi(r.URL.Query().Get("limit"))
	offset, _ := strconv.Atoi(r.URL.Query().Get("offset"))
	if limit <= 0 {
		return list
	}
	offset = min(max(offset, 0), len(list))
	return list[offset:min(offset+limit, len(list))]
}

// one answers a single object, or LINSTOR's not-found list.
func one[T any](f *Face, w http.ResponseWriter, r *http.Request, list []T, code int, what string) {
	if len(list) == 0 {
		f.reply(w, r, http.StatusOK, linstorsim.Reply{linstorsim.ErrorEntry(code, what+" not found.")})
		return
	}
	f.send(w, r, http.StatusOK, list[0])
}

func queryBool(r *http.Request, name string) bool {
	return strings.EqualFold(r.URL.Query().Get(name), "true")
}
