package linstor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
)

// get reads one JSON value of type T.
func get[T any](ctx context.Context, c *Client, r *request) (T, error) {
	var v T
	r.method = http.MethodGet
	err := c.read(ctx, r, func(body io.Reader) error {
		v = *new(T) // A second attempt must not see what the first one left.
		return decodeJSON(&v)(body)
	})
	if err != nil {
		return *new(T), err
	}
	return v, nil
}

// Version asks the controller for its version. Several behaviours change at 1.34.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return get[Version](ctx, c, &request{path: "/v1/controller/version"})
}

// Nodes lists the nodes: the only source of connection_status.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	return get[[]Node](ctx, c, &request{path: "/v1/nodes"})
}

type wirePool struct {
	Name              string            `json:"storage_pool_name"`
	Node              string            `json:"node_name"`
	Provider          string            `json:"provider_kind"`
	Props             map[string]string `json:"props"`
	FreeKiB           *int64            `json:"free_capacity"`
	TotalKiB          *int64            `json:"total_capacity"`
	FreeSpaceManager  string            `json:"free_space_mgr_name"`
	UUID              string            `json:"uuid"`
	SupportsSnapshots bool              `json:"supports_snapshots"`
	Reports           []Entry           `json:"reports"`
}

// StoragePools lists the storage pools with their capacities in KiB.
func (c *Client) StoragePools(ctx context.Context, q PoolQuery) ([]StoragePool, error) {
	query := url.Values{"nodes": q.Nodes, "storage_pools": q.Pools}
	if q.Cached {
		query.Set("cached", "true")
	}
	wire, err := get[[]wirePool](ctx, c, &request{path: "/v1/view/storage-pools", query: query, satellites: !q.Cached})
	if err != nil {
		return nil, err
	}
	pools := make([]StoragePool, len(wire))
	for i, w := range wire {
		pools[i] = w.pool()
	}
	return pools, nil
}

func (w wirePool) pool() StoragePool {
	p := StoragePool{
		Name: w.Name, Node: w.Node, Provider: w.Provider, Props: w.Props, UUID: w.UUID, Reports: w.Reports,
		SupportsSnapshots: w.SupportsSnapshots, FreeSpaceManager: w.FreeSpaceManager,
		Diskless: w.Provider == ProviderDiskless,
	}
	p.FreeKiB, p.TotalKiB = realCapacity(w.FreeKiB, p.Diskless), realCapacity(w.TotalKiB, p.Diskless)
	return p
}

// realCapacity drops the 2^63-1 that stands for "no limit": added up, it would overflow.
func realCapacity(kib *int64, diskless bool) *int64 {
	if diskless || kib == nil || *kib == math.MaxInt64 {
		return nil
	}
	return kib
}

// ResourceView lists resources with their volumes. Every online satellite with a thin pool is asked; a resource without
// volumes is left out by LINSTOR. Filter by Resources when watching one.
func (c *Client) ResourceView(ctx context.Context, q ViewQuery) ([]Resource, error) {
	var list []Resource
	err := c.EachResource(ctx, q, func() { list = nil }, func(r Resource) { list = append(list, r) })
	if err != nil {
		return nil, err
	}
	return slices.Clip(list), nil
}

// EachResource is ResourceView for large pools: it calls each for one resource after the other, so that nobody has to hold all of them. When the answer
// breaks off and another controller is asked, begin is called again and what came before counts for nothing; after an error too.
func (c *Client) EachResource(ctx context.Context, q ViewQuery, begin func(), each func(Resource)) error {
	query := url.Values{"resources": q.Resources, "nodes": q.Nodes, "storage_pools": q.Pools}
	r := &request{method: http.MethodGet, path: "/v1/view/resources", query: query, satellites: true}
	return c.read(ctx, r, func(body io.Reader) error {
		begin()
		return decodeEach(body, each)
	})
}

// Resources lists where a definition is deployed: flags, in_use and DRBD connections from controller memory, no volumes.
// It is the cheapest poll of one volume. Errors: ErrNotFound.
func (c *Client) Resources(ctx context.Context, definition string) ([]Resource, error) {
	var list []Resource
	r := &request{method: http.MethodGet, path: path("resource-definitions", definition, "resources")}
	err := c.read(ctx, r, func(body io.Reader) error {
		list = nil
		return decodeEach(body, func(r Resource) { list = append(list, r) })
	})
	if err != nil {
		return nil, err
	}
	return slices.Clip(list), nil
}

// Definitions lists the resource definitions, with the sizes of their volumes when asked for.
func (c *Client) Definitions(ctx context.Context, withVolumes bool) ([]Definition, error) {
	query := url.Values{"with_volume_definitions": {strconv.FormatBool(withVolumes)}}
	return get[[]Definition](ctx, c, &request{path: "/v1/resource-definitions", query: query})
}

// Groups lists the resource groups.
func (c *Client) Groups(ctx context.Context) ([]Group, error) {
	return get[[]Group](ctx, c, &request{path: "/v1/resource-groups"})
}

// Group reads one resource group. Errors: ErrNotFound.
func (c *Client) Group(ctx context.Context, name string) (Group, error) {
	return get[Group](ctx, c, &request{path: path("resource-groups", name)})
}

// KV reads one instance of the key-value store, keys without leading slash. A missing instance gives ErrNotFound,
// one without keys an empty map.
func (c *Client) KV(ctx context.Context, instance string) (map[string]string, error) {
	type wireKV struct {
		Name  string            `json:"name"`
		Props map[string]string `json:"props"`
	}
	r := &request{path: path("key-value-store", instance)}
	list, err := get[[]wireKV](ctx, c, r)
	if err != nil {
		return nil, err
	}
	switch {
	case len(list) == 0:
		return nil, fmt.Errorf("read key-value store %s: %w", instance, ErrNotFound)
	case len(list) > 1:
		return nil, fmt.Errorf("read key-value store %s: %w: %d instances in the answer", instance, ErrMalformed, len(list))
	case list[0].Props == nil:
		return map[string]string{}, nil // Empty maps are absent on the wire.
	}
	return list[0].Props, nil
}

// StatKind names what Stats counts.
type StatKind string

// What LINSTOR counts.
const (
	StatNodes               StatKind = "nodes"
	StatResourceGroups      StatKind = "resource-groups"
	StatResourceDefinitions StatKind = "resource-definitions"
	StatResources           StatKind = "resources"
	StatStoragePools        StatKind = "storage-pools"
	StatErrorReports        StatKind = "error-reports"
)

// Stats counts objects: a few bytes, so a change of the count can be noticed cheaply.
func (c *Client) Stats(ctx context.Context, kind StatKind) (int64, error) {
	type wireCount struct {
		Count *int64 `json:"count"`
	}
	p := path("stats", string(kind))
	w, err := get[wireCount](ctx, c, &request{path: p})
	if err != nil {
		return 0, err
	}
	if w.Count == nil {
		return 0, fmt.Errorf("GET %s: %w: no count", p, ErrMalformed)
	}
	return *w.Count, nil
}

// SyncStatus says whether all volumes of all diskful replicas are UpToDate. It stays false while an unrelated replica
// is offline. Errors: ErrNotFound.
func (c *Client) SyncStatus(ctx context.Context, definition string) (bool, error) {
	type wireSync struct {
		Synced *bool `json:"synced_on_all"`
	}
	p := path("resource-definitions", definition, "sync-status")
	w, err := get[wireSync](ctx, c, &request{path: p})
	if err != nil {
		return false, err
	}
	if w.Synced == nil {
		return false, fmt.Errorf("GET %s: %w: no synced_on_all", p, ErrMalformed)
	}
	return *w.Synced, nil
}

// ControllerProperties reads the properties of the controller.
func (c *Client) ControllerProperties(ctx context.Context) (map[string]string, error) {
	return get[map[string]string](ctx, c, &request{path: "/v1/controller/properties"})
}

// QueryMaxVolumeSize asks which pools could take a new volume of the group, and how large it may be (KiB).
func (c *Client) QueryMaxVolumeSize(ctx context.Context, group string) ([]Candidate, error) {
	type wireSizes struct {
		Candidates []Candidate `json:"candidates"`
	}
	w, err := get[wireSizes](ctx, c, &request{
		path: path("resource-groups", group, "query-max-volume-size"), satellites: true,
	})
	return w.Candidates, err
}

// QuerySizeInfo asks LINSTOR how much room the group has. LINSTOR answers 200 whatever happens; without figures its
// reports become an *APIError.
func (c *Client) QuerySizeInfo(ctx context.Context, group string) (SpaceInfo, error) {
	type wireInfo struct {
		Space   *SpaceInfo `json:"space_info"`
		Reports []Entry    `json:"reports"`
	}
	r := &request{
		method: http.MethodPost, path: path("resource-groups", group, "query-size-info"),
		body: []byte("{}"), satellites: true,
	}
	var w wireInfo
	err := c.read(ctx, r, func(body io.Reader) error { // A POST that changes nothing: safe to repeat.
		w = wireInfo{}
		return decodeJSON(&w)(body)
	})
	if err != nil {
		return SpaceInfo{}, err
	}
	if w.Space == nil {
		base, _ := c.known()
		return SpaceInfo{}, &APIError{
			Status: http.StatusOK, Entries: w.Reports, Method: r.method, Path: r.path, Controller: base,
		}
	}
	w.Space.Reports = w.Reports
	return *w.Space, nil
}

// errNotArray refuses an object where a list was promised.
var errNotArray = errors.New("not a JSON array")

// eachElement decodes a JSON array element by element: the whole answer is never in memory.
func eachElement(body io.Reader, decode func(*json.Decoder) error) error {
	dec := json.NewDecoder(body)
	if t, err := dec.Token(); err != nil {
		return err
	} else if t != json.Delim('[') {
		return errNotArray
	}
	for dec.More() {
		if err := decode(dec); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil {
		return err
	}
	return onlySpaceLeft(dec.Buffered())
}
