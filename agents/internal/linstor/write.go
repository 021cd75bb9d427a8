package linstor

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
)

// Reply is the answer to a mutation that LINSTOR accepted. "Accepted" is not "done": look at Undelivered.
type Reply struct{ Entries []Entry }

// HasCode says whether any entry carries the code; a bare number such as 1002 matches any severity.
func (r Reply) HasCode(c Code) bool { return hasCode(r.Entries, c) }

// Warnings returns the warnings of an accepted call.
func (r Reply) Warnings() []Entry {
	var list []Entry
	for _, e := range r.Entries {
		if e.IsWarning() {
			list = append(list, e)
		}
	}
	return list
}

// Undelivered says that the change is stored but a satellite has not got it: it is not connected (1002), or its last
// full synchronisation failed (1003) and nothing reaches it until it is reconnected.
func (r Reply) Undelivered() bool {
	return r.HasCode(WarnNotConnected) || r.HasCode(WarnSatelliteNotUpdated)
}

// PropChange changes properties. Set wins over nothing: LINSTOR applies all of it or refuses.
type PropChange struct {
	Set              map[string]string `json:"override_props,omitempty"`
	Delete           []string          `json:"delete_props,omitempty"`
	DeleteNamespaces []string          `json:"delete_namespaces,omitempty"`
}

// change sends body, nil for none, as JSON.
func (c *Client) change(ctx context.Context, method, p string, query url.Values, body any) (Reply, error) {
	r := &request{method: method, path: p, query: query, satellites: true}
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return Reply{}, fmt.Errorf("%s %s: encode body: %w", method, p, err)
		}
		r.body = raw
	}
	return c.mutate(ctx, r)
}

func resourcePath(resource, node string, more ...string) string {
	return path(append([]string{"resource-definitions", resource, "resources", node}, more...)...)
}

// AddDisk makes the diskless resource on node diskful, in pool unless that is "". It returns when the satellites have
// applied it, long before the data is there. Errors: FailBusy (up to 1.33: a toggle is pending), FailInvalidVolumeSize
// or FailNotEnoughFreeSpace, ErrNotFound. WarnAlreadyHasDisk comes as a warning.
func (c *Client) AddDisk(ctx context.Context, resource, node, pool string) (Reply, error) {
	p := resourcePath(resource, node, "toggle-disk", "diskful")
	if pool != "" {
		p += "/" + url.PathEscape(pool)
	}
	return c.change(ctx, http.MethodPut, p, nil, nil)
}

// RemoveDisk makes the diskful resource on node diskless: its data there is gone. Errors: FailInUse,
// FailInsufficientReplicas, FailBusy, ErrNotFound.
func (c *Client) RemoveDisk(ctx context.Context, resource, node string) (Reply, error) {
	return c.change(ctx, http.MethodPut, resourcePath(resource, node, "toggle-disk", "diskless"), nil, nil)
}

// MakeAvailable makes the resource usable on node, with a disk when diskful. It is idempotent: it clears DELETE,
// activates, toggles, or turns a tie-breaker into a plain diskless.
func (c *Client) MakeAvailable(ctx context.Context, resource, node string, diskful bool) (Reply, error) {
	body := struct {
		Diskful bool `json:"diskful"`
	}{diskful}
	return c.change(ctx, http.MethodPost, resourcePath(resource, node, "make-available"), nil, body)
}

// NewResource says how CreateResource deploys a definition on a node.
type NewResource struct {
	Flags        []string          // For example FlagDRBDDiskless.
	Props        map[string]string // For example StorPoolName.
	CopyAllSnaps bool
}

// CreateResource deploys a definition on a node. "Is there already" is ErrExists, whether LINSTOR says it as a 500 or
// as an info in a 201.
func (c *Client) CreateResource(ctx context.Context, resource, node string, n NewResource) (Reply, error) {
	type wireNew struct {
		Name  string            `json:"name"`
		Node  string            `json:"node_name"`
		Flags []string          `json:"flags,omitempty"`
		Props map[string]string `json:"props,omitempty"`
	}
	body := struct {
		Resource     wireNew `json:"resource"`
		CopyAllSnaps bool    `json:"copy_all_snaps,omitempty"`
	}{wireNew{resource, node, n.Flags, n.Props}, n.CopyAllSnaps}
	p := resourcePath(resource, node)
	reply, err := c.change(ctx, http.MethodPost, p, nil, body)
	if err == nil && reply.HasCode(InfoResourceAlreadyExists) {
		base, _ := c.known()
		return reply, &APIError{
			Status: http.StatusCreated, Entries: reply.Entries, Method: http.MethodPost, Path: p, Controller: base,
		}
	}
	return reply, err
}

// DeleteResource removes the resource from node. LINSTOR accepts it for a node that is offline even when the resource is
// Primary there: require an online node and a known InUse of false before calling. LINSTOR may keep the resource as
// tie-breaker (InfoTieBreakerTakeover); keepTieBreaker forces that. A missing resource is WarnNotFound, no error.
func (c *Client) DeleteResource(ctx context.Context, resource, node string, keepTieBreaker bool) (Reply, error) {
	query := url.Values{"keep_tiebreaker": {strconv.FormatBool(keepTieBreaker)}}
	return c.change(ctx, http.MethodDelete, resourcePath(resource, node), query, nil)
}

// ModifyDefinition changes properties of a resource definition.
func (c *Client) ModifyDefinition(ctx context.Context, definition string, change PropChange) (Reply, error) {
	return c.change(ctx, http.MethodPut, path("resource-definitions", definition), nil, change)
}

// ModifyResource changes properties of a resource on a node.
func (c *Client) ModifyResource(ctx context.Context, resource, node string, change PropChange) (Reply, error) {
	return c.change(ctx, http.MethodPut, resourcePath(resource, node), nil, change)
}

// ModifyNode changes properties of a node, such as PrefNic.
func (c *Client) ModifyNode(ctx context.Context, node string, change PropChange) (Reply, error) {
	return c.change(ctx, http.MethodPut, path("nodes", node), nil, change)
}

// ModifyController changes properties of the controller.
func (c *Client) ModifyController(ctx context.Context, change PropChange) (Reply, error) {
	return c.change(ctx, http.MethodPost, "/v1/controller/properties", nil, change)
}

// KVModify merges change into an instance of the key-value store and creates it when needed. There is no
// compare-and-swap: two writers must be kept apart by other means. SM owns the instances named xcp-sr-….
func (c *Client) KVModify(ctx context.Context, instance string, change PropChange) (Reply, error) {
	return c.change(ctx, http.MethodPut, path("key-value-store", instance), nil, change)
}
