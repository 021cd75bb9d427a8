package linstorface

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/routers"
)

// undocumented are paths that LINSTOR's server has and its OpenAPI document has not.
var undocumented = map[string]string{
	"GET /health":                    "served beside /v1",
	"GET /metrics":                   "served beside /v1",
	"GET /v1/physical-storage/":      "golinstor's trailing slash",
	"GET /v1/error-reports/":         "golinstor's trailing slash",
	"GET /v1/resource-definitions/":  "golinstor's trailing slash",
	"GET /v1/nope":                   "the tests' own unknown path",
	"PATCH /v1/nodes":                "the tests' own wrong method",
	"GET /v1/space-report":           "missing from the document",
	"GET /v1/resource-definitions/x": "path parameter object, see single objects",
}

// undocumentedPrefix are families of paths that the document lacks: reading one object by name is documented only for some
// kinds, evict and the unified toggle-disk (1.34) not at all. A property key in a path has unescaped slashes, which the
// document's {key} cannot match.
func undocumentedPrefix(r *http.Request) bool {
	p := r.URL.Path
	return r.Method == http.MethodGet || strings.HasSuffix(p, "/evict") || strings.HasSuffix(p, "/toggle-disk") ||
		strings.HasPrefix(p, "/v1/controller/properties/")
}

// statusDocumented: the document declares 200 for most operations, though creates answer 201, and declares errors as one
// ApiCallRc although the server sends a list. Undeclared statuses are checked by the tests that cause them.
func statusDocumented(route *routers.Route, status int) bool {
	if status >= 400 {
		return false
	}
	return route.Operation.Responses.Value(strconv.Itoa(status)) != nil
}

// adaptDocument lays LINSTOR's known deviations from its own document over the document. Each is a fact about the real
// server, not about the stand-in.
func adaptDocument(doc *openapi3.T) {
	doc.Servers = nil // the document names an example host
	schemas := doc.Components.Schemas

	// Node.type is sent in upper case; the document writes it capitalised.
	schemas["Node"].Value.Properties["type"].Value.Enum = []any{"CONTROLLER", "SATELLITE", "COMBINED", "AUXILIARY"}
	// connection_status lacks two values that the server sends.
	status := schemas["Node"].Value.Properties["connection_status"].Value
	if len(status.Enum) == 11 {
		status.Enum = append(status.Enum, "MISSING_EXT_TOOLS", "DUPLICATE_UNAME")
	}
	// The layer data of volumes is declared oneOf seven objects without required fields: every body matches all of
	// them, so oneOf can never hold. anyOf is what is meant.
	for _, name := range []string{"VolumeLayer", "ResourceDefinitionLayer", "VolumeDefinitionLayer"} {
		data := schemas[name].Value.Properties["data"]
		if data != nil && data.Value != nil && len(data.Value.OneOf) > 0 {
			data.Value.AnyOf, data.Value.OneOf = data.Value.OneOf, nil
		}
	}
	// Declared as lists, sent as one object: the remotes (recorded trace 010) and one resource connection.
	for _, path := range []string{"/v1/remotes", "/v1/resource-definitions/{resource}/resource-connections/{node_a}/{node_b}"} {
		content := doc.Paths.Value(path).Get.Responses.Value("200").Value.Content["application/json"]
		if items := content.Schema.Value.Items; items != nil {
			content.Schema = items
		}
	}
	// Lists declare limit with a maximum of 50 that the server does not enforce; requests are not validated here.
}
