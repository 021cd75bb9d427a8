package srsize

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// memory is what the agent remembers of one SR between passes.
type memory struct {
	past    Past
	shown   seen[Sizes]
	settled *int64            // physical_size at which XAPI last agreed with us
	filling map[string]string // node -> severity raised at the last look
}

// vdi is what the agent remembers of one VDI.
type vdi struct {
	ref   string
	shown seen[int64]
}

const (
	// writeLag is how long the mirror of XAPI may still show the value from before our own write.
	writeLag = 2 * time.Second
	// mirrorLag is how long the mirror of LINSTOR may still show what was before somebody else's write to XAPI.
	mirrorLag = 5 * time.Second
)

// seen is a value in XAPI that both we and others write.
type seen[T comparable] struct {
	value  T // that XAPI has, as far as we know
	before T // our last write
	wrote  time.Time
	known  bool
}

// look takes what XAPI, or a mirror of it, shows. It gives what to believe, whether somebody else changed it since the last look, and whether that is a guess: what
// looks like a mirror that lags could be somebody who wrote the old value again.
func (s *seen[T]) look(now time.Time, shown T) (believed T, others, guess bool) {
	if s.known && shown == s.value {
		return s.value, false, false
	}
	if s.known && shown == s.before && now.Sub(s.wrote) < writeLag {
		return s.value, false, true
	}
	s.value, s.known, s.wrote = shown, true, time.Time{}
	return shown, true, false
}

// write notes our own write.
func (s *seen[T]) write(now time.Time, v T) { s.before, s.value, s.wrote = s.value, v, now }

// recall compares what XAPI shows with what was seen and written before, puts what to believe into the snapshot, and tells whether somebody else wrote.
func (a *Agent) recall(now time.Time, srs []SR) (others bool) {
	vdis := make(map[string]*vdi, len(a.vdis))
	for i := range srs {
		sr := &srs[i]
		m := a.memory[sr.UUID]
		if m == nil {
			m = &memory{filling: map[string]string{}}
			a.memory[sr.UUID] = m
		}
		var other, guess bool
		sr.Shown, other, guess = m.shown.look(now, sr.Shown)
		others, sr.Guessed = others || other, guess
		for j := range sr.VDIs {
			v := &sr.VDIs[j]
			d := a.vdis[v.UUID]
			if d == nil {
				d = &vdi{}
			}
			d.ref, vdis[v.UUID] = v.Ref, d
			v.Utilisation, other, guess = d.shown.look(now, v.Utilisation)
			others, sr.Guessed = others || other, sr.Guessed || guess
		}
	}
	a.vdis = vdis
	return others
}

// saved is the state file: what is worth keeping over a restart. It is a convenience; nothing breaks without it.
type saved struct {
	SRs map[string]savedSR `json:"srs"`
}

type savedSR struct {
	Good  *Sizes   `json:"last_good,omitempty"`
	Trend []Sample `json:"trend"`
}

// remember brings the memory of an SR up to date with what was just seen and puts it into the snapshot. storageRead says that LINSTOR answered.
func (a *Agent) remember(now time.Time, storageRead bool, sr *SR) {
	m := a.memory[sr.UUID]
	for i := range sr.Stored.Pools {
		sr.Stored.Pools[i].WasFilling = m.filling[sr.Stored.Pools[i].Node]
		m.filling[sr.Stored.Pools[i].Node] = string(filling(sr.Stored.Pools[i]))
	}
	s := Snapshot{Here: a.cfg.HostUUID}
	if !storageRead {
		s.LINSTORError = "away"
	}
	if _, no := unusable(s, *sr); !no {
		m.learn(now, *sr)
	}
	sr.Past = m.past
}

func (m *memory) learn(now time.Time, sr SR) {
	if len(partial(sr)) > 0 {
		if m.past.PartialSince.IsZero() {
			m.past.PartialSince = now
		}
		return
	}
	m.past.PartialSince = time.Time{}
	want, _, err := truth(sr)
	if err != nil {
		return
	}
	shown := sr.Shown.Physical
	if m.settled != nil && shown != *m.settled && shown != want.Physical && m.past.Good != nil && *m.settled == m.past.Good.Physical {
		m.past.Overwritten = now
	}
	if shown == want.Physical {
		m.settled = &shown
	}
	m.past.Good = &want
	m.past.Trend = addSample(m.past.Trend, now, want.Utilisation)
}

// load reads the state file. A missing or broken one is an empty one: only the trend is lost.
func (a *Agent) load() {
	if a.cfg.StateFile == "" {
		return
	}
	b, err := os.ReadFile(a.cfg.StateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var st saved
	if err == nil {
		err = json.Unmarshal(b, &st)
	}
	if err != nil {
		a.log.Warn("state file not readable, the trend starts anew", "path", a.cfg.StateFile, "err", err)
		return
	}
	for uuid, s := range st.SRs {
		a.memory[uuid] = &memory{past: Past{Good: s.Good, Trend: s.Trend}, filling: map[string]string{}}
	}
}

// save writes the state file when a sample is due. A full disk costs the trend, nothing else.
func (a *Agent) save(now time.Time) {
	if a.cfg.StateFile == "" || now.Sub(a.savedAt) < sampleEvery {
		return
	}
	a.savedAt = now
	st := saved{SRs: map[string]savedSR{}}
	for uuid, m := range a.memory {
		st.SRs[uuid] = savedSR{Good: m.past.Good, Trend: m.past.Trend}
	}
	b, err := json.Marshal(st)
	if err == nil {
		err = replaceFile(a.cfg.StateFile, b)
	}
	if err != nil {
		a.log.Warn("state file not written, the trend will be lost at a restart", "path", a.cfg.StateFile, "err", err)
	}
}

// replaceFile writes a file so that a reader, also one after a crash, sees the old or the new content and never a part.
func replaceFile(path string, b []byte) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}
