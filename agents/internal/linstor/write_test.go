package linstor_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	golinstor "github.com/LINBIT/golinstor"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
)

// entry is an ApiCallRc in JSON, with LINSTOR's operation and object bits set as the real server does.
func entry(code uint64, message string) string {
	return fmt.Sprintf(`{"ret_code":%d,"message":%q,"created_at":"2026-11-21T00:00:00+00:00","obj_refs":{"Node":"n"}}`,
		int64(code|golinstor.MaskMod|golinstor.MaskRsc), message)
}

func entries(list ...string) string { return "[" + strings.Join(list, ",") + "]" }

func TestMutations_OnTheWire(t *testing.T) {
	change := linstor.PropChange{Set: map[string]string{"Aux/a": "1"}, Delete: []string{"b"}, DeleteNamespaces: []string{"c"}}
	const changeJSON = `{"override_props":{"Aux/a":"1"},"delete_props":["b"],"delete_namespaces":["c"]}`
	type call func(context.Context, *linstor.Client) (linstor.Reply, error)
	for name, tc := range map[string]struct {
		call        call
		method, uri string
		body        string
	}{
		"add disk": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.AddDisk(ctx, "r", "n", "")
		},
			"PUT", "/v1/resource-definitions/r/resources/n/toggle-disk/diskful", ""},
		"add disk in a pool": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.AddDisk(ctx, "r 1", "n", "pool?")
		}, "PUT", "/v1/resource-definitions/r%201/resources/n/toggle-disk/diskful/pool%3F", ""},
		"remove disk": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.RemoveDisk(ctx, "r", "n")
		},
			"PUT", "/v1/resource-definitions/r/resources/n/toggle-disk/diskless", ""},
		"make available": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.MakeAvailable(ctx, "r", "n", false)
		}, "POST", "/v1/resource-definitions/r/resources/n/make-available", `{"diskful":false}`},
		"create": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.CreateResource(ctx, "r", "n", linstor.NewResource{
				Flags: []string{linstor.FlagDRBDDiskless}, Props: map[string]string{"StorPoolName": "p"}, CopyAllSnaps: true,
			})
		}, "POST", "/v1/resource-definitions/r/resources/n",
			`{"resource":{"name":"r","node_name":"n","flags":["DRBD_DISKLESS"],"props":{"StorPoolName":"p"}},"copy_all_snaps":true}`},
		"delete": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.DeleteResource(ctx, "r", "n", false)
		}, "DELETE", "/v1/resource-definitions/r/resources/n?keep_tiebreaker=false", ""},
		"delete, keep tie-breaker": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.DeleteResource(ctx, "r", "n", true)
		}, "DELETE", "/v1/resource-definitions/r/resources/n?keep_tiebreaker=true", ""},
		"modify definition": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.ModifyDefinition(ctx, "r", change)
		}, "PUT", "/v1/resource-definitions/r", changeJSON},
		"modify resource": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.ModifyResource(ctx, "r", "n", change)
		}, "PUT", "/v1/resource-definitions/r/resources/n", changeJSON},
		"modify node": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.ModifyNode(ctx, "n", change)
		},
			"PUT", "/v1/nodes/n", changeJSON},
		"modify controller": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.ModifyController(ctx, change)
		}, "POST", "/v1/controller/properties", changeJSON},
		"modify key-value store": {func(ctx context.Context, c *linstor.Client) (linstor.Reply, error) {
			return c.KVModify(ctx, "xostor", linstor.PropChange{Delete: []string{"k"}})
		}, "PUT", "/v1/key-value-store/xostor", `{"delete_props":["k"]}`},
	} {
		t.Run(name, func(t *testing.T) {
			c, s := single(t, map[string]http.HandlerFunc{tc.method + " /": answer(200, entries(entry(golinstor.Modified, "done")))})
			reply, err := tc.call(t.Context(), c)
			if err != nil || len(reply.Entries) != 1 || len(reply.Warnings()) != 0 || reply.Undelivered() {
				t.Fatalf("got %+v, %v", reply, err)
			}
			want := seen{tc.method, tc.uri, tc.body, "xostor-test", ""}
			if got := s.seen(); len(got) != 1 || got[0] != want {
				t.Errorf("sent %+v, want %+v", got, want)
			}
			validateRequest(t, tc.method, tc.uri, tc.body)
		})
	}
}

func TestReply_WarningsOfASuccessAreVisible(t *testing.T) {
	put := "PUT /v1/resource-definitions/r/resources/n/toggle-disk/diskful"
	for name, tc := range map[string]struct {
		body        string
		warnings    int
		undelivered bool
		has         []linstor.Code
	}{
		"stored, satellite not connected": {entries(entry(golinstor.Modified, "ok"), entry(golinstor.WarnNotConnected, "No active connection")), 1, true,
			[]linstor.Code{1002, linstor.WarnNotConnected, 3}},
		"full sync failed there": {entries(entry(golinstor.WarnStltNotUpdated, "x")), 1, true, []linstor.Code{1003}},
		"has a disk already":     {entries(entry(golinstor.WarnRscAlreadyHasDisk, "x")), 1, false, []linstor.Code{linstor.WarnAlreadyHasDisk}},
		"retry, 1.34":            {entries(entry(golinstor.InfoNoop, "x")), 0, false, []linstor.Code{10007}},
		"tie-breaker takes over": {entries(entry(golinstor.InfoTieBreakerTakeover, "x")), 0, false, []linstor.Code{linstor.InfoTieBreakerTakeover}},
		"no body":                {"", 0, false, nil},
		"one object":             {entry(golinstor.WarnNotConnected, "x"), 1, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := single(t, map[string]http.HandlerFunc{put: answer(200, tc.body)})
			reply, err := c.AddDisk(t.Context(), "r", "n", "")
			if err != nil || len(reply.Warnings()) != tc.warnings || reply.Undelivered() != tc.undelivered {
				t.Errorf("got %+v, %v", reply, err)
			}
			for _, code := range tc.has {
				if !reply.HasCode(code) {
					t.Errorf("%v is not seen", code)
				}
			}
			if reply.HasCode(997) || reply.HasCode(linstor.Code(1002)|linstor.FailInUse) {
				t.Error("a code is seen that is not there")
			}
		})
	}
}

// LINSTOR answers 500 for all of these: only the return code tells them apart.
func TestErrors_DecideOnTheCode(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		code   uint64
		is     []error
		isNot  []error
	}{
		"in use":                      {500, golinstor.FailInUse, []error{linstor.FailInUse, linstor.Code(997)}, []error{linstor.ErrExists, linstor.FailBusy}},
		"busy":                        {500, golinstor.FailRscBusy, []error{linstor.FailBusy}, []error{linstor.FailInUse}},
		"last replica":                {500, golinstor.FailInsufficientReplicaCount, []error{linstor.FailInsufficientReplicas}, nil},
		"peer slots":                  {500, golinstor.FailInsufficientPeerSlots, []error{linstor.FailInsufficientPeerSlots}, nil},
		"no space":                    {500, golinstor.FailNotEnoughFreeSpace, []error{linstor.FailNotEnoughFreeSpace}, nil},
		"no space 1.33":               {500, golinstor.FailInvldVlmSize, []error{linstor.FailInvalidVolumeSize}, nil},
		"not connected":               {500, golinstor.FailNotConnected, []error{linstor.FailNotConnected}, []error{linstor.WarnNotConnected}},
		"no nodes":                    {500, golinstor.FailNotEnoughNodes, []error{linstor.FailNotEnoughNodes}, nil},
		"no node":                     {404, golinstor.FailNotFoundNode, []error{linstor.ErrNotFound, linstor.FailNotFoundNode}, []error{linstor.ErrExists}},
		"no resource":                 {404, golinstor.FailNotFoundRsc, []error{linstor.ErrNotFound, linstor.FailNotFoundResource}, nil},
		"exists":                      {500, golinstor.FailExistsRsc, []error{linstor.ErrExists, linstor.FailExistsResource}, []error{linstor.ErrNotFound}},
		"exists, info":                {201, golinstor.InfoRscAlreadyExists, []error{linstor.ErrExists, linstor.InfoResourceAlreadyExists}, nil},
		"error in a 200, not trusted": {200, golinstor.FailInUse, []error{linstor.FailInUse}, nil},
		"warning as 500":              {500, golinstor.WarnRscAlreadyDiskless, []error{linstor.WarnAlreadyDiskless}, []error{linstor.ErrNotFound, linstor.ErrExists}},
		"denied":                      {403, golinstor.FailAccDeniedRsc, nil, []error{linstor.ErrNotFound, linstor.ErrUncertain}},
	} {
		t.Run(name, func(t *testing.T) {
			body := entries(entry(golinstor.WarnNotFound, "first comes a warning"), entry(tc.code, "then the reason"))
			c, s := single(t, map[string]http.HandlerFunc{"POST /v1/resource-definitions/r/resources/n": answer(tc.status, body)})
			reply, err := c.CreateResource(t.Context(), "r", "n", linstor.NewResource{})
			var api *linstor.APIError
			if !errors.As(err, &api) || api.Status != tc.status || len(api.Entries) != 2 {
				t.Fatalf("got %+v, %v", reply, err)
			}
			for _, want := range tc.is {
				if !errors.Is(err, want) {
					t.Errorf("is not %v: %v", want, err)
				}
			}
			for _, not := range tc.isNot {
				if errors.Is(err, not) {
					t.Errorf("is %v: %v", not, err)
				}
			}
			if len(s.seen()) != 1 {
				t.Errorf("sent %d times", len(s.seen()))
			}
		})
	}
}

func TestDeleteResource_MissingIsAWarning(t *testing.T) {
	c, _ := single(t, map[string]http.HandlerFunc{
		"DELETE /v1/resource-definitions/r/resources/n": answer(200, entries(entry(golinstor.WarnNotFound, "not found"))),
	})
	reply, err := c.DeleteResource(t.Context(), "r", "n", false)
	if err != nil || !reply.HasCode(linstor.WarnNotFound) {
		t.Errorf("got %+v, %v", reply, err)
	}
}

func TestCode_Text(t *testing.T) {
	for code, want := range map[linstor.Code]string{
		linstor.FailInUse:                       "linstor error code 997",
		linstor.WarnNotConnected:                "linstor warning code 1002",
		linstor.InfoNoop:                        "linstor info code 10007",
		linstor.Code(golinstor.Created | 1<<24): "linstor success code 1",
	} {
		if code.Error() != want {
			t.Errorf("got %q, want %q", code.Error(), want)
		}
	}
}
