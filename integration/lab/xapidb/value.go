package xapidb

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// NullRef is the reference to nothing.
const NullRef = "OpaqueRef:NULL"

// DatetimeLayout is the wire form of a datetime: 20250319T04:16:24Z.
const DatetimeLayout = "20060102T15:04:05Z"

var epoch = time.Unix(0, 0).UTC()

// zero is the value of a field with no default.
//
// Canonical Go values: string (also enum), bool, int64, float64, time.Time (UTC), string (ref); sets are []string, []int64; maps are map[string]string,
// map[string]int64, map[string]float64, map[string][]string.
func (t Type) zero() any {
	switch t.Kind {
	case Bool:
		return false
	case Int:
		return int64(0)
	case Float:
		return float64(0)
	case Datetime:
		return epoch
	case Ref:
		return NullRef
	case Set:
		if t.Elem.Kind == Int {
			return []int64{}
		}
		return []string{}
	case Map:
		switch t.Elem.Kind {
		case Int:
			return map[string]int64{}
		case Float:
			return map[string]float64{}
		case Set:
			return map[string][]string{}
		default:
			return map[string]string{}
		}
	default:
		return ""
	}
}

// coerce turns v into the canonical value of the type. It accepts what XAPI's own decoder accepts: numeric strings for ints and floats, integers for
// floats; a bool must be a bool and a string a string (upstream ocaml-rpc rpc.ml).
func (t Type) coerce(v any) (any, error) {
	switch t.Kind {
	case Bool:
		if b, ok := v.(bool); ok {
			return b, nil
		}
	case Int:
		return coerceInt(v)
	case Float:
		return coerceFloat(v)
	case Datetime:
		return coerceTime(v)
	case Set:
		return t.coerceSet(v)
	case Map:
		return t.coerceMap(v)
	case Ref:
		if s, ok := v.(string); ok {
			if s == "" {
				return NullRef, nil
			}
			return s, nil
		}
	case String:
		if s, ok := v.(string); ok {
			return s, nil
		}
	}
	return nil, fmt.Errorf("a %T is no %s", v, t)
}

func coerceInt(v any) (any, error) {
	switch n := v.(type) {
	case int64:
		return n, nil
	case int:
		return int64(n), nil
	case string:
		i, err := strconv.ParseInt(strings.TrimSpace(n), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%q is no int", n)
		}
		return i, nil
	}
	rv := reflect.ValueOf(v)
	if rv.IsValid() && rv.CanInt() {
		return rv.Int(), nil
	}
	return nil, fmt.Errorf("a %T is no int", v)
}

func coerceFloat(v any) (any, error) {
	switch n := v.(type) {
	case float64:
		return n, nil
	case int64:
		return float64(n), nil
	case int:
		return float64(n), nil
	case string:
		f, err := strconv.ParseFloat(strings.TrimSpace(n), 64)
		if err != nil {
			return nil, fmt.Errorf("%q is no float", n)
		}
		return f, nil
	}
	return nil, fmt.Errorf("a %T is no float", v)
}

var timeLayouts = []string{DatetimeLayout, "20060102T15:04:05", time.RFC3339}

func coerceTime(v any) (any, error) {
	switch d := v.(type) {
	case time.Time:
		return d.UTC().Truncate(time.Second), nil
	case string:
		for _, layout := range timeLayouts {
			if parsed, err := time.Parse(layout, d); err == nil {
				return parsed.UTC(), nil
			}
		}
		return nil, fmt.Errorf("%q is no datetime", d)
	}
	return nil, fmt.Errorf("a %T is no datetime", v)
}

func (t Type) coerceSet(v any) (any, error) {
	switch list := v.(type) {
	case []string:
		if t.Elem.Kind != Int {
			return slices.Clone(list), nil
		}
	case []int64:
		if t.Elem.Kind == Int {
			return slices.Clone(list), nil
		}
	}
	rv := reflect.ValueOf(v)
	if !rv.IsValid() || rv.Kind() != reflect.Slice {
		return nil, fmt.Errorf("a %T is no set", v)
	}
	out := reflect.MakeSlice(reflect.TypeOf(t.zero()), 0, rv.Len())
	for i := range rv.Len() {
		e, err := t.Elem.coerce(rv.Index(i).Interface())
		if err != nil {
			return nil, err
		}
		out = reflect.Append(out, reflect.ValueOf(e))
	}
	return out.Interface(), nil
}

func (t Type) coerceMap(v any) (any, error) {
	rv := reflect.ValueOf(v)
	if !rv.IsValid() || rv.Kind() != reflect.Map || rv.Type().Key().Kind() != reflect.String {
		return nil, fmt.Errorf("a %T is no map", v)
	}
	out := reflect.MakeMapWithSize(reflect.TypeOf(t.zero()), rv.Len())
	for it := rv.MapRange(); it.Next(); {
		e, err := t.Elem.coerce(it.Value().Interface())
		if err != nil {
			return nil, err
		}
		out.SetMapIndex(reflect.ValueOf(it.Key().String()), reflect.ValueOf(e))
	}
	return out.Interface(), nil
}

// String names the type as the schema text does.
func (t Type) String() string {
	switch t.Kind {
	case Bool:
		return "bool"
	case Int:
		return "int"
	case Float:
		return "float"
	case Datetime:
		return "datetime"
	case Ref:
		return t.Class + " ref"
	case Set:
		return "set of " + t.Elem.String()
	case Map:
		return "map of string to " + t.Elem.String()
	}
	if t.Enum != "" {
		return "enum " + t.Enum
	}
	return "string"
}

// Coerce turns a decoded parameter into the canonical value of the type (see the package documentation for the Go types). The error is an *Error with
// code FIELD_TYPE_ERROR and the given name.
func (t Type) Coerce(name string, v any) (any, error) {
	out, err := t.coerce(v)
	if err != nil {
		return nil, Errorf("FIELD_TYPE_ERROR", name)
	}
	return out, nil
}

// dbString is the text that where-expressions compare with (upstream db_filter and sExpr): "true", decimal ints, refs as they are, "()" for what is empty.
func dbString(v any) string {
	switch x := v.(type) {
	case string:
		return x
	case bool:
		return strconv.FormatBool(x)
	case int64:
		return strconv.FormatInt(x, 10)
	case float64:
		return strconv.FormatFloat(x, 'g', 16, 64)
	case time.Time:
		return x.Format(DatetimeLayout)
	case []string:
		return quoteList(x)
	case []int64:
		return sexprList(x, func(i int64) string { return "'" + dbString(i) + "'" })
	case map[string]string:
		return sexprMap(x, func(s string) string { return "'" + s + "'" })
	case map[string]int64:
		return sexprMap(x, func(i int64) string { return "'" + dbString(i) + "'" })
	case map[string]float64:
		return sexprMap(x, func(f float64) string { return "'" + dbString(f) + "'" })
	case map[string][]string:
		return sexprMap(x, quoteList)
	}
	return ""
}

func quoteList(l []string) string {
	return sexprList(l, func(s string) string { return "'" + s + "'" })
}

func sexprList[V any](l []V, text func(V) string) string {
	parts := make([]string, len(l))
	for i, v := range l {
		parts[i] = text(v)
	}
	return "(" + strings.Join(parts, " ") + ")"
}

func sexprMap[V any](m map[string]V, text func(V) string) string {
	keys := slices.Sorted(maps.Keys(m))
	return sexprList(keys, func(k string) string { return "('" + k + "' " + text(m[k]) + ")" })
}

// equal compares two canonical values of one type.
func equal(a, b any) bool {
	switch x := a.(type) {
	case string, bool, int64:
		return a == b
	case float64:
		y, ok := b.(float64)
		return ok && (x == y || x != x && y != y)
	case time.Time:
		y, ok := b.(time.Time)
		return ok && x.Equal(y)
	case []string:
		y, ok := b.([]string)
		return ok && slices.Equal(x, y)
	case map[string]string:
		y, ok := b.(map[string]string)
		return ok && maps.Equal(x, y)
	}
	return reflect.DeepEqual(a, b)
}
