package linstorsim

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
)

// choice is a pool that an autoplacement may use, the best one of its node.
type choice struct {
	node *node
	pool *pool
}

// candidates lists the pools that the filter allows for sizeKiB of gross space, the best first: most free space by the
// controller's memory, then fewest resources, then name.
func (c *Cluster) candidates(rd *definition, f SelectFilter, needKiB int64) []choice {
	ratio := float64(DefaultOversubscription)
	if f.Overprovision != nil {
		ratio = *f.Overprovision
	}
	var out []choice
	for _, n := range sorted(c.nodes) {
		if !c.placeable(n) || !nameIn(f.NodeNameList, n.name) || rd != nil && rd.rsc[key(n.name)] != nil && !rd.rsc[key(n.name)].tieBreaker() {
			continue
		}
		if c.hostsUnwanted(n, f) {
			continue
		}
		var best *pool
		for _, p := range sorted(n.pools) {
			if c.poolAllowed(p, f) && p.room(ratio) >= needKiB && (best == nil || p.cached.free > best.cached.free) {
				best = p
			}
		}
		if best != nil {
			out = append(out, choice{n, best})
		}
	}
	slices.SortStableFunc(out, func(a, b choice) int {
		return cmp.Or(cmp.Compare(b.pool.cached.free, a.pool.cached.free), cmp.Compare(len(a.node.resources), len(b.node.resources)))
	})
	return out
}

func (c *Cluster) poolAllowed(p *pool, f SelectFilter) bool {
	return !p.diskless() && nameIn(f.StoragePoolList, p.name) && nameIn(f.ProviderList, p.kind) &&
		p.cached != nil && !strings.EqualFold(p.props["AutoplaceTarget"], "false")
}

func (c *Cluster) hostsUnwanted(n *node, f SelectFilter) bool {
	if len(f.NotPlaceWithRsc) == 0 && f.NotPlaceWithRscRegex == "" {
		return false
	}
	re, err := regexp.Compile("(?i)" + f.NotPlaceWithRscRegex)
	for _, r := range n.resources {
		if len(f.NotPlaceWithRsc) > 0 && nameIn(f.NotPlaceWithRsc, r.rd.name) ||
			f.NotPlaceWithRscRegex != "" && err == nil && re.MatchString(r.rd.name) {
			return true
		}
	}
	return false
}

// choose takes count of the candidates so that the replica rules hold together with the nodes already used. It is
// greedy from the best on, one start after the other.
func choose(cands []choice, used []*node, f SelectFilter, count int) []choice {
	for start := range cands {
		picked := slices.Clone(used)
		var out []choice
		for _, ch := range slices.Concat(cands[start:], cands[:start]) {
			if len(out) < count && fitsRules(append(slices.Clone(picked), ch.node), f) {
				picked = append(picked, ch.node)
				out = append(out, ch)
			}
		}
		if len(out) == count {
			return out
		}
	}
	return nil
}

// fitsRules checks replicas_on_same (key or key=value) and replicas_on_different (key) over node properties. LINSTOR's clients
// write the keys with or without their "Aux/" namespace.
func fitsRules(nodes []*node, f SelectFilter) bool {
	value := func(n *node, k string) string {
		if v, ok := n.props[k]; ok {
			return v
		}
		return n.props["Aux/"+k]
	}
	for _, rule := range f.ReplicasOnSame {
		k, want, exact := strings.Cut(rule, "=")
		for _, n := range nodes {
			if !exact {
				want = value(nodes[0], k)
			}
			if value(n, k) != want {
				return false
			}
		}
	}
	for _, rule := range f.ReplicasOnDifferent {
		seen := map[string]bool{}
		for _, n := range nodes {
			v := value(n, rule)
			if v != "" && seen[v] {
				return false
			}
			seen[v] = true
		}
	}
	return true
}

func placeCount(f SelectFilter) int {
	if f.PlaceCount == nil {
		return 2
	}
	return *f.PlaceCount
}

// Autoplace places a definition by its group's filter with filter laid over it.
func (c *Cluster) Autoplace(resource string, filter SelectFilter) Reply {
	defer c.lock(true)()
	rd := c.rds[key(resource)]
	if rd == nil {
		return c.noDefinition(resource, opCreate|objRsc)
	}
	return c.autoplace(rd, mergeFilter(rd.group.filter, filter))
}

func (c *Cluster) autoplace(rd *definition, f SelectFilter) Reply {
	const op = opCreate | objRsc
	var used []*node
	for _, r := range rd.places() {
		if r.keeps() {
			used = append(used, r.node)
		}
	}
	want := placeCount(f) - len(used)
	if f.AdditionalPlaceCount != nil && *f.AdditionalPlaceCount > 0 {
		want = *f.AdditionalPlaceCount
	}
	if want < 0 || placeCount(f) < 1 {
		return c.fail(CodeInvalidPlaceCount, op, "The resource '%s' was already deployed on %d nodes; place count %d is lower.", rd.name, len(used), placeCount(f))
	}
	defer c.settle(rd)
	if want == 0 {
		return append(Reply{c.warn(1006, op, "The resource '%s' was already deployed on %d nodes.", rd.name, len(used))}, c.manageTieBreaker(rd)...)
	}
	picked := choose(c.candidates(rd, f, rd.totalGross()), used, f, want)
	if picked == nil {
		r := c.fail(CodeNotEnoughNodes, op, "Not enough available nodes")
		r[0].Details = "Not enough nodes fulfilling the auto-place criteria of resource '" + rd.name + "'."
		return r
	}
	if len(used)+len(picked)-1 > rd.peerSlots {
		return c.fail(CodePeerSlots, op, "Resource '%s' has %d peer slots; insufficient for %d replicas.", rd.name, rd.peerSlots, len(used)+len(picked))
	}
	var out Reply
	for _, ch := range picked {
		if r := rd.rsc[key(ch.node.name)]; r != nil {
			r.flags = rscDrbdDiskless
			out = append(out, c.toggleQuietly(r, ch.pool.name)...)
			continue
		}
		c.addPlace(rd, ch.node, 0, ch.pool.name, nil)
		out = append(out, c.done(opCreate, objRsc, map[string]string{"RscDfn": rd.name, "Node": ch.node.name},
			"Resource '%s' successfully autoplaced on node '%s' in pool '%s'.", rd.name, ch.node.name, ch.pool.name))
	}
	if f.DisklessOnRemaining != nil && *f.DisklessOnRemaining {
		out = append(out, c.disklessOnRemaining(rd)...)
	}
	return append(out, c.manageTieBreaker(rd)...)
}

// toggleQuietly gives a former tie-breaker a disk without looking after the tie-breaker: the caller does.
func (c *Cluster) toggleQuietly(r *resource, poolName string) Reply {
	r.flags |= rscAddRequested
	r.wantPool = poolName
	return c.progress(r)
}

func (c *Cluster) disklessOnRemaining(rd *definition) Reply {
	var out Reply
	for _, n := range sorted(c.nodes) {
		if rd.rsc[key(n.name)] == nil && c.placeable(n) && len(rd.rsc) <= rd.peerSlots {
			c.addPlace(rd, n, rscDrbdDiskless, "", nil)
			out = append(out, c.done(opCreate, objRsc, nil, "Diskless resource '%s' created on node '%s'.", rd.name, n.name))
		}
	}
	return out
}

// QuerySizeInfo answers query-size-info of a group. On failure the info is nil and the reply says why; LINSTOR sends it
// with HTTP 200.
func (c *Cluster) QuerySizeInfo(groupName string, over SelectFilter) (*SpaceInfo, Reply) {
	defer c.lock(false)()
	g := c.groups[key(groupName)]
	if g == nil {
		return nil, c.noGroup(groupName, objRscGrp)
	}
	c.refreshThin()
	f := mergeFilter(g.filter, over)
	count := placeCount(f)
	cands := c.candidates(nil, f, 0)
	info := &SpaceInfo{DefaultRatio: DefaultOversubscription}
	var free, total []int64
	for _, ch := range cands {
		free, total = append(free, ch.pool.cached.free), append(total, ch.pool.cached.total)
	}
	info.Available, info.Capacity = fill(free, count), fill(total, count)
	if picked := choose(cands, nil, f, count); picked != nil {
		for _, ch := range picked {
			info.NextSpawn = append(info.NextSpawn, SpawnTarget{ch.node.name, ch.pool.name, DefaultOversubscription})
		}
		info.MaxVolume = c.maxVolume(cands, count)
	}
	return info, nil
}

func (c *Cluster) refreshThin() {
	for _, n := range c.nodes {
		for _, p := range n.pools {
			if p.thin() {
				c.refresh(p)
			}
		}
	}
}

// fill is how much replicated data pools of these sizes take with count replicas on different nodes, filling the
// largest pools first: the largest s with sum(min(pool, s)) >= count x s.
func fill(sizes []int64, count int) int64 {
	if len(sizes) < count || count < 1 {
		return 0
	}
	var lo, hi int64
	for _, s := range sizes {
		hi += s
	}
	hi /= int64(count)
	for lo < hi {
		mid := lo + (hi-lo+1)/2
		var sum int64
		for _, s := range sizes {
			sum += min(s, mid)
		}
		if sum/int64(count) >= mid {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return lo
}

// maxVolume is the largest volume that count of the candidates can each take.
func (c *Cluster) maxVolume(cands []choice, count int) int64 {
	var room []int64
	for _, ch := range cands {
		room = append(room, ch.pool.room(DefaultOversubscription))
	}
	slices.SortFunc(room, func(a, b int64) int { return cmp.Compare(b, a) })
	if count < 1 || len(room) < count {
		return 0
	}
	gross := room[count-1]
	rd := definition{peerSlots: DefaultPeerSlots}
	return max(gross-rd.metaKiB(gross)-extentKiB, 0) / 4 * 4
}

// QueryMaxVolumeSize answers query-max-volume-size: for each pool name the largest volume; groupName "" uses the filter
// alone.
func (c *Cluster) QueryMaxVolumeSize(groupName string, over SelectFilter) ([]Candidate, Reply) {
	defer c.lock(false)()
	var f SelectFilter
	if groupName != "" {
		g := c.groups[key(groupName)]
		if g == nil {
			return nil, c.noGroup(groupName, objRscGrp)
		}
		f = g.filter
	}
	c.refreshThin()
	f = mergeFilter(f, over)
	out := []Candidate{}
	for _, d := range sorted(c.poolDfn) {
		if !nameIn(f.StoragePoolList, d.name) {
			continue
		}
		one := f
		one.StoragePoolList = []string{d.name}
		cands := c.candidates(nil, one, 0)
		size := c.maxVolume(cands, placeCount(f))
		if size == 0 {
			continue
		}
		cand := Candidate{StoragePool: d.name, MaxVolumeKiB: size, AllThin: true}
		for _, ch := range cands[:placeCount(f)] {
			cand.NodeNames = append(cand.NodeNames, ch.node.name)
			cand.AllThin = cand.AllThin && ch.pool.thin()
		}
		out = append(out, cand)
	}
	return out, nil
}
