package settings

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kedge/internal/errorkind"
)

// Sources are the sources of settings. Flags take precedence over variables, and variables over files.
type Sources struct {
	Flags     map[string][]string              // command line, by name; each item as it was written
	Variables func(name string) (string, bool) // environment
	Files     []File                           // configuration files: a later file replaces the values of an earlier file
}

// Values has the values of settings and the origin of each value. It is immutable.
type Values struct {
	rows   []*Setting
	set    map[string]entry
	parsed map[string]any
}

// entry is the text of a setting.
type entry struct {
	items   []string
	origins []Origin // origin of each item
	origin  Origin   // origin of the whole: the last one that applied
}

// Origin is the place where a setting was made. It is zero for the command line.
type Origin struct {
	Variable string // environment variable
	File     string // configuration file
	Line     int
}

// place returns the start of a message about the setting; empty if the setting's name is sufficient.
func (o Origin) place() string {
	if o.File == "" {
		return ""
	}
	return fmt.Sprintf("%s:%d: ", o.File, o.Line)
}

// Resolve reads the values of rows from their sources and checks them. The error has all errors, each with its
// place. The returned values are those that could be parsed: for messages, and for commands that continue.
func Resolve(rows []*Setting, from Sources) (Values, error) {
	v := Values{rows: rows, set: map[string]entry{}, parsed: map[string]any{}}
	unreadable := v.readFiles(from.Files)
	for _, row := range rows {
		if items, ok := from.Flags[row.Name]; ok {
			v.set[row.Name] = entry{items: items, origins: make([]Origin, len(items))}
			continue
		}
		if row.NoVar || from.Variables == nil {
			continue
		}
		if text, ok := from.Variables(row.Variable()); ok && text != "" { // an empty variable counts as unset
			o := Origin{Variable: row.Variable()}
			v.set[row.Name] = entry{items: []string{text}, origins: []Origin{o}, origin: o}
		}
	}
	var errs []error
	for _, row := range rows {
		items := v.set[row.Name].items
		if _, set := v.set[row.Name]; !set && row.Default != "" {
			items = strings.Split(row.Default, ",")
			if row.kind != list {
				items = []string{row.Default}
			}
		}
		value, wrong := row.read(row, items)
		v.parsed[row.Name] = value
		errs = append(errs, wrong...)
	}
	wrong := v.Explain(errors.Join(errs...))
	if unreadable != nil {
		return v, errorkind.Permanent(errors.Join(unreadable, wrong))
	}
	return v, wrong
}

// Written is a setting as it was written.
type Written struct {
	Name  string
	Items []string
	Place string // where it was made
}

// Written returns all settings in the order of their rows. Secrets are in them.
func (v Values) Written() (all []Written) {
	for _, row := range v.rows {
		w := Written{Name: row.Name, Place: "default"}
		if given, ok := v.set[row.Name]; ok {
			w.Items, w.Place = given.items, "command line"
			switch o := given.origin; {
			case o.File != "":
				w.Place = fmt.Sprintf("%s:%d", o.File, o.Line)
			case o.Variable != "":
				w.Place = o.Variable
			}
		} else if row.Default != "" {
			w.Items = []string{row.Default}
		}
		all = append(all, w)
	}
	return all
}

// WithDefault returns the values with another value for a setting that the user has not made.
func (v Values) WithDefault(name, item string) Values {
	if v.IsSet(name) {
		return v
	}
	out := Values{rows: v.rows, set: maps.Clone(v.set), parsed: maps.Clone(v.parsed)}
	for _, row := range v.rows {
		if row.Name == name {
			out.parsed[name], _ = row.read(row, []string{item})
		}
	}
	return out
}

// IsSet reports whether the user has set a setting.
func (v Values) IsSet(name string) bool {
	_, ok := v.set[name]
	return ok
}

// Made is a setting that the user has made on the command line or in the environment.
type Made struct {
	Name  string
	Items []string // as they were written
	List  bool
	NoKey bool // configuration files cannot have it
}

// Made returns the settings that were not made in configuration files, in the order of their rows.
func (v Values) Made() (all []Made) {
	for _, row := range v.rows {
		e, ok := v.set[row.Name]
		if !ok || e.origin.File != "" {
			continue
		}
		m := Made{Name: row.Name, Items: slices.Clone(e.items), List: row.kind == list, NoKey: row.NoKey}
		if row.splits {
			m.Items = Split(m.Items)
		}
		all = append(all, m)
	}
	return all
}

// ItemsOf returns the text of a setting, and where it was made.
func (v Values) ItemsOf(name string) ([]string, Origin) {
	return v.set[name].items, v.set[name].origin
}

// Explain returns err with the place of each setting in it: the file and line, or the variable. Its exit code
// is that of usage errors if all errors are on the command line, and otherwise that of permanent errors.
func (v Values) Explain(err error) error {
	if err == nil {
		return nil
	}
	out, wrong, elsewhere := v.explain(err)
	switch {
	case !wrong:
		return err
	case elsewhere:
		return errorkind.Permanent(out)
	}
	return errorkind.BadUsage(out)
}

// explain returns err with its places, whether it is about a setting, and whether that setting was made outside the
// command line.
func (v Values) explain(err error) (out error, wrong, elsewhere bool) {
	if e, ok := errorkind.Unmark(err).(*errorkind.SettingError); ok {
		place, away := v.placeOf(e)
		return placedError{place + e.Text(v.userName), e}, true, away
	}
	many, ok := errorkind.Unmark(err).(interface{ Unwrap() []error })
	if !ok || errors.Join(many.Unwrap()...).Error() != err.Error() {
		var e *errorkind.SettingError
		if errors.As(err, &e) { // wrapped in another text, which is kept
			_, away := v.placeOf(e)
			return err, true, away
		}
		return err, false, false
	}
	var errs []error
	for _, e := range many.Unwrap() {
		one, w, away := v.explain(e)
		errs, wrong, elsewhere = append(errs, one), wrong || w, elsewhere || away
	}
	return errors.Join(errs...), wrong, elsewhere
}

// placeOf returns the file and line of the setting that an error is about, and whether it was made outside the command line.
// For two settings it returns the place of the first that is in a file.
func (v Values) placeOf(e *errorkind.SettingError) (place string, away bool) {
	for _, name := range []string{e.Name, e.Other} {
		given, ok := v.set[v.alias(name)]
		if !ok {
			continue
		}
		o := given.origin
		if i := slices.IndexFunc(given.items, func(item string) bool { return e.Item != "" && slices.Contains(Split([]string{item}), e.Item) }); i >= 0 {
			o = given.origins[i]
		}
		away = away || o != Origin{}
		if place == "" {
			place = o.place()
		}
	}
	return place, away
}

// userName returns the user's name for a setting: a flag, a variable, or a key.
func (v Values) userName(name string) string {
	name = v.alias(name)
	switch o := v.set[name].origin; {
	case o.File != "":
		return name
	case o.Variable != "":
		return o.Variable
	}
	return "--" + name
}

// alias returns the setting with the path of a setting's file, if the value came from there.
func (v Values) alias(name string) string {
	for _, row := range v.rows {
		if row.Name == name && row.File != "" && !v.IsSet(name) && v.IsSet(row.File) {
			return row.File
		}
	}
	return name
}

// placedError is an error with its place in the text.
type placedError struct {
	text string
	err  error
}

func (d placedError) Error() string { return d.text }
func (d placedError) Unwrap() error { return d.err }

// Split splits items that cannot contain commas, so that "a,b" and two items are equivalent.
func Split(items []string) []string {
	var out []string
	for _, item := range items {
		for part := range strings.SplitSeq(item, ",") {
			if part = strings.TrimSpace(part); part != "" {
				out = append(out, part)
			}
		}
	}
	return out
}

// Unknown returns a warning for each environment variable that looks like a setting and is not in rows: a
// mistyped variable would silently have no effect. It is not an error, because the environment may be made for
// another version. Variables in known are kedge's own.
func Unknown(environ []string, rows []*Setting, known ...string) (warnings []string) {
	var names []string
	for _, row := range rows {
		names = append(names, row.Name)
		known = append(known, row.Variable())
	}
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		rest, ours := strings.CutPrefix(name, "KEDGE_")
		if !ours || slices.Contains(known, name) {
			continue
		}
		warning := fmt.Sprintf("the environment variable %s is not a setting of kedge and has no effect", name)
		if best := Nearest(rest, names); best != "" {
			warning += "; did you mean " + (&Setting{Name: best}).Variable() + "?"
		}
		warnings = append(warnings, warning)
	}
	return warnings
}
