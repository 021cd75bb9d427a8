package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/xostor-agents/xostor-agents/bus"
	"github.com/xostor-agents/xostor-agents/xapi"
)

// Classes are the XAPI classes that are published unless XAPIOptions says otherwise: what the agents read, without the
// classes that churn (task, message, the metrics of VMs and guests, console).
func Classes() []string {
	return []string{"pool", "host", "host_metrics", "sr", "pbd", "vdi", "vbd", "vm", "pif", "pif_metrics", "network"}
}

// XAPIWatch calls h for the chosen classes (lower case) until ctx ends, one call at a time, and reconnects by itself. When it
// returns nevertheless, the feed calls it again after a pause. WatchXAPI makes one of a client.
type XAPIWatch func(ctx context.Context, classes []string, h xapi.Handler) error

// WatchXAPI watches with the client.
func WatchXAPI(c *xapi.Client) XAPIWatch {
	return func(ctx context.Context, classes []string, h xapi.Handler) error {
		return xapi.Watch(ctx, c, xapi.WatchConfig{Classes: classes, Handler: h})
	}
}

// XAPIChange is told to XAPIOptions.OnChange.
type XAPIChange struct {
	Class, UUID    string
	Added, Deleted bool
}

// XAPIOptions say what the XAPI feed does.
type XAPIOptions struct {
	Wire  bus.Wire  // Required.
	Watch XAPIWatch // Required.
	// Coordinator: the feed publishes only while it holds. Required.
	Coordinator Fact
	// Host is this host's uuid; it becomes part of the events' source.
	Host string
	// Classes default to Classes().
	Classes []string
	// OnChange hears of each change that was published, after Reset only of those that differ. It must not block. May be nil.
	OnChange func(XAPIChange)
	// Log defaults to slog.Default().
	Log *slog.Logger
}

// XAPI publishes one table per class, bus.XAPITable(class), keyed by uuid. References stay in the records as XAPI gives them;
// fields listed in DESIGN.md are left out.
type XAPI struct{ opts XAPIOptions }

// NewXAPI prepares the feed. It panics when a required option is missing, which is a programming error.
func NewXAPI(o XAPIOptions) *XAPI {
	if o.Wire == nil || o.Watch == nil || o.Coordinator.Holds == nil {
		panic("feed.NewXAPI: Wire, Watch and Coordinator are required")
	}
	if len(o.Classes) == 0 {
		o.Classes = Classes()
	}
	if o.OnChange == nil {
		o.OnChange = func(XAPIChange) {}
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &XAPI{opts: o}
}

// Run publishes until ctx ends.
func (f *XAPI) Run(ctx context.Context) { f.opts.Coordinator.during(ctx, f.session) }

// session publishes while this host is the coordinator. Its tables, and with them their epoch, live as long as it does.
func (f *XAPI) session(ctx context.Context) {
	h := &xapiHandler{opts: f.opts, classes: map[string]*xapiClass{}}
	defer h.close()
	for _, class := range f.opts.Classes {
		t, err := bus.NewTable[json.RawMessage](f.opts.Wire, bus.XAPITable(class), bus.TableOptions{Source: source(f.opts.Host), Log: f.opts.Log})
		if err != nil {
			f.opts.Log.Warn("publish XAPI", "err", err)
			return
		}
		h.classes[class] = &xapiClass{name: class, table: t, broken: map[string]error{}}
	}
	f.opts.Log.Info("publishing XAPI", "host", f.opts.Host)
	for failures := 0; ctx.Err() == nil; failures++ {
		h.heard = false
		err := f.opts.Watch(ctx, f.opts.Classes, h)
		if ctx.Err() != nil {
			break
		}
		h.Stale(fmt.Sprintf("XAPI is not watched: %v", err))
		f.opts.Log.Warn("watch XAPI", "err", err)
		if h.heard {
			failures = 0
		}
		pause(ctx, retryIn(failures))
	}
	f.opts.Log.Info("no longer publishing XAPI", "host", f.opts.Host)
}

func source(host string) string { return "/xostor/" + host + "/feed" }

// xapiHandler fills the tables of one session. Watch calls it from one goroutine.
type xapiHandler struct {
	opts    XAPIOptions
	classes map[string]*xapiClass
	heard   bool // Something came from XAPI.
}

// xapiClass is one table and why it may not be believed.
type xapiClass struct {
	name   string
	table  *bus.Table[json.RawMessage]
	away   string           // XAPI cannot be heard.
	broken map[string]error // By uuid: objects that could not be published.
}

func (h *xapiHandler) close() {
	for _, c := range h.classes {
		c.table.Close()
	}
}

// Reset implements xapi.Handler.
func (h *xapiHandler) Reset(class string, all map[xapi.Ref]json.RawMessage) {
	c, ok := h.classes[class]
	if !ok {
		return
	}
	h.heard = true
	clear(c.broken)
	rows := make(map[string]json.RawMessage, len(all))
	for ref, record := range all {
		uuid, err := member(record, "uuid")
		if err != nil || uuid == "" {
			c.broken[string(ref)] = errNoUUID
			continue
		}
		row, err := row(class, ref, record)
		if err != nil {
			c.broken[uuid] = err
			continue
		}
		rows[uuid] = row
	}
	diff, err := c.table.Replace(rows)
	var refused *bus.RowsError
	if errors.As(err, &refused) {
		maps.Copy(c.broken, refused.Rows)
	}
	c.away = ""
	c.judge()
	h.opts.Log.Debug("read XAPI class", "class", class, "added", diff.Added, "changed", diff.Changed, "deleted", diff.Deleted)
}

// Apply implements xapi.Handler.
func (h *xapiHandler) Apply(batch []xapi.Change) {
	h.heard = true
	for _, change := range batch {
		if c, ok := h.classes[change.Class]; ok {
			h.apply(c, change)
		}
	}
}

func (h *xapiHandler) apply(c *xapiClass, change xapi.Change) {
	if change.Op == xapi.Del {
		c.note(change.UUID, nil)
		if c.table.Delete(change.UUID) {
			h.opts.OnChange(XAPIChange{Class: c.name, UUID: change.UUID, Deleted: true})
		}
		return
	}
	_, had := c.table.Get(change.UUID)
	changed := false
	row, err := row(c.name, change.Ref, change.Record)
	if err == nil {
		changed, err = c.table.Put(change.UUID, row)
	}
	c.note(change.UUID, err)
	if changed {
		h.opts.OnChange(XAPIChange{Class: c.name, UUID: change.UUID, Added: !had})
	}
}

// Stale implements xapi.Handler.
func (h *xapiHandler) Stale(reason string) {
	for _, c := range h.classes {
		c.away = reason
		c.judge()
	}
}

// Fresh implements xapi.Handler.
func (h *xapiHandler) Fresh() {
	for _, c := range h.classes {
		c.away = ""
		c.judge()
	}
}

// note remembers whether an object could be published.
func (c *xapiClass) note(uuid string, err error) {
	_, was := c.broken[uuid]
	if err == nil && !was {
		return
	}
	if err == nil {
		delete(c.broken, uuid)
	} else {
		c.broken[uuid] = err
	}
	c.judge()
}

// judge tells the table's freshness: a table that lacks one of its objects must not look fresh.
func (c *xapiClass) judge() {
	switch {
	case c.away != "":
		c.table.SetStale(c.away)
	case len(c.broken) > 0:
		first := slices.Min(slices.Collect(maps.Keys(c.broken)))
		c.table.SetStale(fmt.Sprintf("cannot publish %s %s: %v", c.name, first, c.broken[first]))
	default:
		c.table.SetFresh()
	}
}
