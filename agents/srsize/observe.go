package srsize

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/xostor-agents/xostor-agents/agents/internal/linstor"
	"github.com/xostor-agents/xostor-agents/agents/internal/sm"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// SRRecord is an SR of type linstor as XAPI shows it, with its PBDs and VDIs.
type SRRecord struct {
	UUID, Name string
	Sizes      Sizes
	PBDs       []PBDRecord
	VDIs       []VDI
}

// PBDRecord is the plug of an SR on one host.
type PBDRecord struct {
	UUID     string
	HostUUID string
	Group    string // device-config group-name
	Attached bool
}

// Records gives the SRs of type linstor. The records may be some milliseconds old; each write is checked again.
type Records interface {
	LinstorSRs(ctx context.Context) ([]SRRecord, error)
}

// Storage is what this agent reads from LINSTOR; *linstor.Client is one.
type Storage interface {
	Nodes(ctx context.Context) ([]linstor.Node, error)
	StoragePools(ctx context.Context, q linstor.PoolQuery) ([]linstor.StoragePool, error)
	ResourceView(ctx context.Context, q linstor.ViewQuery) ([]linstor.Resource, error)
	Group(ctx context.Context, name string) (linstor.Group, error)
	KV(ctx context.Context, instance string) (map[string]string, error)
}

// XAPIRecords reads the SRs from XAPI itself.
type XAPIRecords struct{ Client *xapi.Client }

// LinstorSRs implements Records with one query for the SRs and hosts, and two for each SR.
func (x XAPIRecords) LinstorSRs(ctx context.Context) ([]SRRecord, error) {
	// Only the fields that matter are decoded: an SR's list of VDIs can be 0.3 MB.
	type srFields struct {
		UUID        string   `json:"uuid"`
		Name        string   `json:"name_label"`
		Virtual     xapi.Int `json:"virtual_allocation"`
		Utilisation xapi.Int `json:"physical_utilisation"`
		Physical    xapi.Int `json:"physical_size"`
	}
	type hostFields struct {
		UUID string `json:"uuid"`
	}
	type vdiFields struct {
		UUID        string   `json:"uuid"`
		Virtual     xapi.Int `json:"virtual_size"`
		Utilisation xapi.Int `json:"physical_utilisation"`
		Managed     bool     `json:"managed"`
	}
	srs, err := xapi.GetAllRecordsWhere[srFields](ctx, x.Client, "SR", `field "type"="`+sm.SRType+`"`)
	if err != nil || len(srs) == 0 {
		return nil, err
	}
	hosts, err := xapi.GetAllRecords[hostFields](ctx, x.Client, "host")
	if err != nil {
		return nil, err
	}
	var out []SRRecord
	for ref, sr := range srs {
		of, err := xapi.Field("SR", string(ref))
		if err != nil {
			return nil, err
		}
		pbds, err := xapi.GetAllRecordsWhere[xapi.PBD](ctx, x.Client, "PBD", of)
		if err != nil {
			return nil, err
		}
		vdis, err := xapi.GetAllRecordsWhere[vdiFields](ctx, x.Client, "VDI", of)
		if err != nil {
			return nil, err
		}
		rec := SRRecord{UUID: sr.UUID, Name: sr.Name,
			Sizes: Sizes{Physical: int64(sr.Physical), Utilisation: int64(sr.Utilisation), Virtual: int64(sr.Virtual)}}
		for _, p := range pbds {
			rec.PBDs = append(rec.PBDs, PBDRecord{UUID: p.UUID, HostUUID: hosts[p.Host].UUID, Group: p.DeviceConfig["group-name"], Attached: p.CurrentlyAttached})
		}
		for vref, v := range vdis {
			rec.VDIs = append(rec.VDIs, VDI{UUID: v.UUID, Ref: string(vref), Virtual: int64(v.Virtual), Utilisation: int64(v.Utilisation), Managed: v.Managed})
		}
		out = append(out, rec)
	}
	return out, nil
}

// Observe implements agents.Agent. LINSTOR being away is part of the snapshot; XAPI being away is an error.
func (a *Agent) Observe(ctx context.Context) (Snapshot, error) {
	s := Snapshot{Here: a.cfg.HostUUID, GracePeriod: a.cfg.Grace, UpdateSpacing: a.cfg.UpdateSpacing, SMSessionWhy: a.refused}
	s.NoSMSession = a.refused != ""
	coordinator, _, err := a.cfg.Coordinator(ctx)
	if err != nil {
		return s, fmt.Errorf("find out who is coordinator: %w", err)
	}
	if !coordinator {
		return s, nil
	}
	s.Coordinator = true
	records, err := a.cfg.Records.LinstorSRs(ctx)
	if err != nil {
		return s, fmt.Errorf("read SRs from XAPI: %w", err)
	}
	slices.SortFunc(records, func(a, b SRRecord) int { return cmp.Compare(a.UUID, b.UUID) })
	for _, r := range records {
		s.SRs = append(s.SRs, a.shown(r))
	}
	now := time.Now()
	if a.recall(now, s.SRs) {
		a.others = now
	}
	if err := a.readStorage(ctx, now, s.SRs); err != nil {
		if ctx.Err() != nil {
			return s, ctx.Err()
		}
		s.LINSTORError, s.LINSTORFix = explain(err)
	}
	now = time.Now()
	for i := range s.SRs {
		a.remember(now, s.LINSTORError == "", &s.SRs[i])
	}
	a.save(now)
	return s, nil
}

// shown turns XAPI's records into the snapshot of one SR.
func (a *Agent) shown(r SRRecord) SR {
	sr := SR{UUID: r.UUID, Name: r.Name, Shown: r.Sizes, VDIs: slices.Clone(r.VDIs)}
	slices.SortFunc(sr.VDIs, func(a, b VDI) int { return cmp.Compare(a.UUID, b.UUID) })
	for _, p := range r.PBDs {
		if !slices.Contains(sr.Groups, p.Group) {
			sr.Groups = append(sr.Groups, p.Group)
		}
		if p.HostUUID == a.cfg.HostUUID {
			sr.PBDHere, sr.PluggedHere = p.UUID, p.Attached
		}
	}
	slices.Sort(sr.Groups)
	return sr
}

// readStorage reads what LINSTOR has, from the mirrors if they will do. When somebody else changed a size a moment ago, most likely SM with numbers it had just read, a
// copy from before would undo that: then LINSTOR itself is asked, and again before anything else is written until the copies must have caught up.
func (a *Agent) readStorage(ctx context.Context, now time.Time, srs []SR) error {
	if now.Equal(a.others) {
		return observeStorage(ctx, a.cfg.Direct, srs)
	}
	err := observeStorage(ctx, a.cfg.Storage, srs)
	if err == nil && now.Sub(a.others) < mirrorLag && slices.ContainsFunc(srs, differs) {
		err = observeStorage(ctx, a.cfg.Direct, srs)
	}
	return err
}

// differs tells whether XAPI shows something else than LINSTOR has.
func differs(sr SR) bool {
	if _, no := unusable(Snapshot{}, sr); no || len(partial(sr)) > 0 {
		return false
	}
	want, vdis, err := truth(sr)
	return err == nil && (want != sr.Shown || len(vdis) > 0)
}

// observeStorage reads what LINSTOR has for the SRs that name one group. The reads run side by side, because most of their time is the controller's.
func observeStorage(ctx context.Context, storage Storage, srs []SR) error {
	g, ctx := errgroup.WithContext(ctx)
	var status map[string]string // node -> connection status
	nodes := make(chan struct{})
	g.Go(func() error {
		defer close(nodes)
		list, err := storage.Nodes(ctx)
		status = make(map[string]string, len(list))
		for _, n := range list {
			status[n.Name] = n.ConnectionStatus
		}
		return err
	})
	for i := range srs {
		sr := &srs[i]
		group := groupOf(*sr)
		if !sr.PluggedHere || group == "" || sr.Groups[0] == "" {
			continue
		}
		sr.Stored = Stored{}
		g.Go(func() error { return readGroup(ctx, storage, group, &sr.Stored) })
		g.Go(func() error { return readVolumes(ctx, storage, group, &sr.Stored) })
		g.Go(func() error { return readReplicas(ctx, storage, group, &sr.Stored) })
		g.Go(func() error {
			pools, err := readPools(ctx, storage, group)
			<-nodes
			for i := range pools {
				pools[i].NodeStatus = status[pools[i].Node]
			}
			sr.Stored.Pools = pools
			return err
		})
	}
	return g.Wait()
}

func readGroup(ctx context.Context, storage Storage, group string, st *Stored) error {
	g, err := storage.Group(ctx, group)
	if errors.Is(err, linstor.ErrNotFound) {
		return nil // a finding, not an error
	}
	st.GroupFound = err == nil
	if g.SelectFilter.PlaceCount != nil {
		st.Redundancy = int(*g.SelectFilter.PlaceCount)
	}
	return err
}

// readVolumes reads which resource holds which VDI.
func readVolumes(ctx context.Context, storage Storage, group string, st *Stored) error {
	kv, err := storage.KV(ctx, group)
	if errors.Is(err, linstor.ErrNotFound) {
		return nil // an SR without any volume has no instance yet
	}
	volumes, problems := sm.ParseVolumes(kv)
	st.VolumeOf = make(map[string]string, len(volumes))
	for uuid, v := range volumes {
		if v.Existence == sm.Exists && v.Resource != "" {
			st.VolumeOf[uuid] = v.Resource
		}
	}
	for _, p := range problems {
		st.Odd = append(st.Odd, p.String())
	}
	return err
}

// readPools asks the satellites, as the driver does, not the controller's cache, which can be 180 s old.
func readPools(ctx context.Context, storage Storage, group string) ([]Pool, error) {
	list, err := storage.StoragePools(ctx, linstor.PoolQuery{Pools: []string{group}})
	var pools []Pool
	for _, p := range list {
		if p.Diskless || p.Provider == linstor.ProviderDiskless || !strings.EqualFold(p.Name, group) {
			continue
		}
		pools = append(pools, Pool{Node: p.Node, Thin: strings.HasSuffix(p.Provider, "_THIN"), TotalKiB: p.TotalKiB, FreeKiB: p.FreeKiB})
	}
	slices.SortFunc(pools, func(a, b Pool) int { return cmp.Compare(a.Node, b.Node) })
	return pools, err
}

func readReplicas(ctx context.Context, storage Storage, group string, st *Stored) error {
	view, err := storage.ResourceView(ctx, linstor.ViewQuery{Pools: []string{group}})
	for _, r := range view {
		for _, v := range r.Volumes {
			if strings.EqualFold(v.Pool, group) {
				st.Replicas = append(st.Replicas, sm.Replica{Resource: r.Name, Volume: v.Number, Node: r.Node, AllocatedKiB: v.AllocatedKiB})
			}
		}
	}
	slices.SortFunc(st.Replicas, func(a, b sm.Replica) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Node, b.Node))
	})
	return err
}

// explain gives the operator one line and the next step.
func explain(err error) (text, fix string) {
	text, _, _ = strings.Cut(err.Error(), "\n")
	fix = "drbdadm status xcp-persistent-database, then systemctl status linstor-controller on the host that is Primary"
	if none, ok := errors.AsType[*linstor.NoControllerError](err); ok && none.Hint != "" {
		fix = none.Hint
	}
	return text, fix
}
