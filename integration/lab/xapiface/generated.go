package xapiface

import (
	"context"

	"github.com/xostor-agents/xostor-agents/integration/lab/xapidb"
)

// constructors are the classes whose generated create takes one struct, and whose destroy takes the object.
var constructors = map[string]bool{"VM": true, "VBD": true, "VIF": true, "PBD": true, "VDI": true, "network": true, "secret": true}

// generated makes the methods that XAPI generates from its data model for one class.
func generated(c *xapidb.Class) []*method {
	g := generator{class: c}
	g.add("get_all", getAll)
	g.add("get_all_records", getAllRecords)
	g.add("get_all_records_where", getAllRecordsWhere, g.text("expr"))
	g.add("get_all_where", getAllWhere, g.text("expr")).hidden = true
	g.add("get_record", getRecord, g.self())
	g.add("get_by_uuid", getByUUID, g.text("uuid"))
	if _, ok := c.Field("name_label"); ok {
		g.add("get_by_name_label", getByNameLabel, g.text("label"))
	}
	for _, fd := range c.Fields {
		g.field(fd)
	}
	if constructors[c.Name] {
		g.add("create", create, param{name: "record", record: c}).getter = false
		g.add("destroy", destroy, g.self()).getter = false
	}
	return g.methods
}

type generator struct {
	class   *xapidb.Class
	methods []*method
}

func (g *generator) self() param {
	return param{name: "self", typ: xapidb.Type{Kind: xapidb.Ref, Class: g.class.Name}}
}

func (g *generator) text(name string) param { return param{name: name} }

func (g *generator) add(name string, fn func(*xapidb.Class, *Call) (any, error), params ...param) *method {
	class := g.class
	m := &method{name: class.Name + "." + name, class: class.Name, params: params, session: true, getter: true}
	m.fn = func(_ context.Context, c *Call) (any, error) { return fn(class, c) }
	g.methods = append(g.methods, m)
	return m
}

func (g *generator) field(fd xapidb.Field) {
	name := fd.Name
	g.add("get_"+name, func(class *xapidb.Class, c *Call) (any, error) {
		return c.DB.Field(class.Name, c.Str(0), name)
	}, g.self())
	if !fd.Setter || fd.Derived {
		return
	}
	g.add("set_"+name, func(class *xapidb.Class, c *Call) (any, error) {
		return nil, c.DB.Set(class.Name, c.Str(0), name, c.Arg(1))
	}, g.self(), param{name: "value", typ: fd.Type})
	switch fd.Type.Kind {
	case xapidb.Map:
		g.add("add_to_"+name, func(class *xapidb.Class, c *Call) (any, error) {
			return nil, c.DB.AddToMap(class.Name, c.Str(0), name, c.Str(1), c.Arg(2))
		}, g.self(), g.text("key"), param{name: "value", typ: *fd.Type.Elem})
		g.add("remove_from_"+name, func(class *xapidb.Class, c *Call) (any, error) {
			return nil, c.DB.RemoveFromMap(class.Name, c.Str(0), name, c.Str(1))
		}, g.self(), g.text("key"))
	case xapidb.Set:
		if fd.Type.Elem.Kind != xapidb.String && fd.Type.Elem.Kind != xapidb.Ref {
			return
		}
		g.add("add_"+name, func(class *xapidb.Class, c *Call) (any, error) {
			return nil, c.DB.AddToSet(class.Name, c.Str(0), name, c.Str(1))
		}, g.self(), param{name: "value", typ: *fd.Type.Elem})
		g.add("remove_"+name, func(class *xapidb.Class, c *Call) (any, error) {
			return nil, c.DB.RemoveFromSet(class.Name, c.Str(0), name, c.Str(1))
		}, g.self(), param{name: "value", typ: *fd.Type.Elem})
	default:
	}
}

// records encodes as a struct of ref to record, in the order of the list.
type records []xapidb.Record

func (r records) refs() []string {
	refs := make([]string, len(r))
	for i := range r {
		refs[i] = r[i].Ref()
	}
	return refs
}

func getAll(class *xapidb.Class, c *Call) (any, error) { return c.DB.Refs(class.Name), nil }

func getAllRecords(class *xapidb.Class, c *Call) (any, error) {
	return records(c.DB.Records(class.Name)), nil
}

func getAllRecordsWhere(class *xapidb.Class, c *Call) (any, error) {
	found, err := c.DB.Where(class.Name, c.Str(0))
	return records(found), err
}

func getAllWhere(class *xapidb.Class, c *Call) (any, error) {
	found, err := c.DB.Where(class.Name, c.Str(0))
	return records(found).refs(), err
}

func getRecord(class *xapidb.Class, c *Call) (any, error) { return c.DB.Record(class.Name, c.Str(0)) }

func getByUUID(class *xapidb.Class, c *Call) (any, error) { return c.DB.ByUUID(class.Name, c.Str(0)) }

func getByNameLabel(class *xapidb.Class, c *Call) (any, error) {
	refs := []string{}
	for _, r := range c.DB.Records(class.Name) {
		if r.Get("name_label") == c.Str(0) {
			refs = append(refs, r.Ref())
		}
	}
	return refs, nil
}

func create(class *xapidb.Class, c *Call) (any, error) { return c.DB.Create(class.Name, c.Struct(0)) }

func destroy(class *xapidb.Class, c *Call) (any, error) {
	return nil, c.DB.Destroy(class.Name, c.Str(0))
}
