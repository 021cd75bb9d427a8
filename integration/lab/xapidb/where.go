package xapidb

import (
	"fmt"
	"strings"
)

// expr is a parsed where-expression. lookup gives the database text of a field by its database name.
type expr interface {
	eval(lookup func(field string) (string, error)) (bool, error)
}

type (
	boolExpr bool
	notExpr  struct{ of expr }
	bothExpr struct {
		and         bool
		left, right expr
	}
	eqExpr struct{ left, right term }
	term   struct {
		field bool
		text  string
	}
)

func (e boolExpr) eval(func(string) (string, error)) (bool, error) { return bool(e), nil }

func (e notExpr) eval(lookup func(string) (string, error)) (bool, error) {
	v, err := e.of.eval(lookup)
	return !v, err
}

func (e bothExpr) eval(lookup func(string) (string, error)) (bool, error) {
	v, err := e.left.eval(lookup)
	if err != nil || v != e.and {
		return v, err
	}
	return e.right.eval(lookup)
}

func (e eqExpr) eval(lookup func(string) (string, error)) (bool, error) {
	l, err := e.left.value(lookup)
	if err != nil {
		return false, err
	}
	r, err := e.right.value(lookup)
	return l == r, err
}

func (t term) value(lookup func(string) (string, error)) (string, error) {
	if t.field {
		return lookup(t.text)
	}
	return t.text, nil
}

// parseWhere reads XAPI's filter language (upstream ocaml/database/db_filter_lex.mll and db_filter_parse.mly): comparisons of literals and fields, and, or, not,
// parentheses, true, false. "and" and "or" have equal precedence and group to the left; "not" binds weaker than both, so it negates all that follows it. Literals are
// double-quoted and have no escapes.
func parseWhere(text string) (expr, error) {
	tokens, err := lexWhere(text)
	if err != nil {
		return nil, err
	}
	p := whereParser{tokens: tokens}
	e, err := p.expression(0)
	if err != nil {
		return nil, err
	}
	if p.peek() != "" {
		return nil, fmt.Errorf("unexpected %s", p.peek())
	}
	return e, nil
}

// maxDepth bounds nesting, so that a hostile expression cannot exhaust the stack.
const maxDepth = 1000

// lexWhere cuts the text into keywords, = ( ), and literals, which keep their opening quote as a mark.
func lexWhere(text string) ([]string, error) {
	var tokens []string
	for i := 0; i < len(text); {
		switch {
		case strings.ContainsRune(" \t\n", rune(text[i])):
			i++
		case strings.ContainsRune("=()", rune(text[i])):
			tokens = append(tokens, text[i:i+1])
			i++
		case text[i] == '"':
			end := strings.IndexByte(text[i+1:], '"')
			if end < 0 {
				return nil, fmt.Errorf("literal without end")
			}
			tokens = append(tokens, text[i:i+1+end])
			i += end + 2
		default:
			word := keyword(text[i:])
			if word == "" {
				return nil, fmt.Errorf("unexpected character at %d", i)
			}
			tokens = append(tokens, word)
			i += len(word)
		}
	}
	return tokens, nil
}

func keyword(text string) string {
	for _, k := range []string{"true", "false", "field", "and", "or", "not"} {
		if strings.HasPrefix(text, k) {
			return k
		}
	}
	return ""
}

type whereParser struct {
	tokens []string
	at     int
}

func (p *whereParser) peek() string {
	if p.at < len(p.tokens) {
		return p.tokens[p.at]
	}
	return ""
}

func (p *whereParser) next() string {
	t := p.peek()
	p.at++
	return t
}

func (p *whereParser) expression(depth int) (expr, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested too deep")
	}
	left, err := p.primary(depth)
	if err != nil {
		return nil, err
	}
	for p.peek() == "and" || p.peek() == "or" {
		and := p.next() == "and"
		right, err := p.primary(depth)
		if err != nil {
			return nil, err
		}
		left = bothExpr{and: and, left: left, right: right}
	}
	return left, nil
}

func (p *whereParser) primary(depth int) (expr, error) {
	switch t := p.peek(); t {
	case "true", "false":
		p.next()
		return boolExpr(t == "true"), nil
	case "not":
		p.next()
		of, err := p.expression(depth + 1)
		return notExpr{of}, err
	case "(":
		p.next()
		inner, err := p.expression(depth + 1)
		if err == nil && p.next() != ")" {
			err = fmt.Errorf("missing )")
		}
		return inner, err
	}
	left, err := p.term()
	if err != nil {
		return nil, err
	}
	if p.next() != "=" {
		return nil, fmt.Errorf("missing =")
	}
	right, err := p.term()
	return eqExpr{left, right}, err
}

func (p *whereParser) term() (term, error) {
	t := p.next()
	field := t == "field"
	if field {
		t = p.next()
	}
	if !strings.HasPrefix(t, `"`) {
		return term{}, fmt.Errorf("expected a literal, found %q", t)
	}
	return term{field: field, text: t[1:]}, nil
}

// Where returns the records of a class for which the expression holds, oldest first. A text that does not parse is INVALID_VALUE [expression; reason]; a
// field that the class does not have is INTERNAL_ERROR.
func (db *DB) Where(class, expression string) ([]Record, error) {
	e, err := parseWhere(expression)
	if err != nil {
		return nil, Errorf("INVALID_VALUE", expression, err.Error())
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	t, err := db.table(class)
	if err != nil {
		return nil, err
	}
	out := []Record{}
	for el := t.births.Front(); el != nil; el = el.Next() {
		r := el.Value.(*row)
		ok, err := e.eval(func(field string) (string, error) { return t.text(r, field) })
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, t.record(r))
		}
	}
	return out, nil
}

func (t *table) text(r *row, field string) (string, error) {
	i, ok := t.class.dbIndex[field]
	if !ok {
		return "", Errorf("INTERNAL_ERROR", "missing column", t.class.Name, field)
	}
	if s, ok := r.values[i].(*refSet); ok {
		return dbString(s.slice()), nil
	}
	return dbString(r.values[i]), nil
}
