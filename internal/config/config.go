// Package config reads kedge's configuration files: YAML whose keys are the
// names of command line flags.
//
//	node-name: edge-1
//	node-label: [zone=a, disk=ssd]
//	kubelet-arg+: [max-pods=20]   # "+" appends to what earlier files gave
//
// Files are read in order, a later value replaces an earlier one. Flags and
// environment variables win over files, which is for the caller to see to.
// Mistakes are reported with file and line, and an unknown key with the nearest
// name that exists.
//
// It knows no flag by itself; only package main imports it.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Kind is what a flag takes.
type Kind int

// The kinds of flags.
const (
	String Kind = iota
	Bool
	Int
	Duration
	List // of strings
)

// Key is a flag that may be set in a file.
type Key struct {
	Name string
	Kind Kind
}

// Value is what the files say about one key.
type Value struct {
	Items   []string // one, or any number for a List
	Sources []string // FILE:LINE of each
	Source  string   // FILE:LINE of the key, the last one that counted
}

// Files returns path, if it exists, and then the *.yaml files of path's drop-in
// folder (config.yaml.d for config.yaml) in the order of their names. A path that
// the user named must exist.
func Files(path string, named bool) ([]string, error) {
	var files []string
	switch _, err := os.Stat(path); {
	case err == nil:
		files = append(files, path)
	case named || !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("configuration file %s: %w", path, errors.Unwrap(err))
	}
	dropins, err := filepath.Glob(filepath.Join(path+".d", "*.yaml"))
	if err != nil {
		return nil, err
	}
	slices.Sort(dropins)
	return append(files, dropins...), nil
}

// Load reads files and returns what they say, by key.
func Load(files []string, keys []Key) (map[string]Value, error) {
	values := map[string]Value{}
	var errs []error
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("configuration file: %w", err))
			continue
		}
		if err := load(file, data, keys, values); err != nil {
			errs = append(errs, err)
		}
	}
	return values, errors.Join(errs...)
}

func load(file string, data []byte, keys []Key, into map[string]Value) error {
	root, err := document(file, data)
	if err != nil || root == nil {
		return err
	}
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: want lines of the form \"flag: value\"", file, root.Line)
	}
	names := make([]string, len(keys))
	for i, k := range keys {
		names[i] = k.Name
	}
	var errs []error
	lines := map[string]int{} // where this file has a key
	for i := 0; i+1 < len(root.Content); i += 2 {
		k, v := root.Content[i], root.Content[i+1]
		name, add := strings.CutSuffix(k.Value, "+")
		at := fmt.Sprintf("%s:%d", file, k.Line)
		idx := slices.IndexFunc(keys, func(key Key) bool { return key.Name == name })
		if idx < 0 {
			errs = append(errs, fmt.Errorf("%s: unknown key %q%s", at, name, DidYouMean(name, names)))
			continue
		}
		if first, twice := lines[name]; twice {
			errs = append(errs, fmt.Errorf("%s: %s is in line %d already; give it once", at, name, first))
			continue
		}
		lines[name] = k.Line
		key := keys[idx]
		if add && key.Kind != List {
			errs = append(errs, fmt.Errorf("%s: %q takes one value, so \"+\" cannot append to it", at, name))
			continue
		}
		items, itemLines, err := key.items(v)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", at, name, err))
			continue
		}
		value := Value{Source: at}
		if add {
			value.Items, value.Sources = slices.Clone(into[name].Items), slices.Clone(into[name].Sources)
		}
		for i, item := range items {
			value.Items, value.Sources = append(value.Items, item), append(value.Sources, fmt.Sprintf("%s:%d", file, itemLines[i]))
		}
		into[name] = value
	}
	return errors.Join(errs...)
}

// document is the one in data, or nil when that is empty or has only comments.
func document(file string, data []byte) (*yaml.Node, error) {
	var root *yaml.Node
	for d := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var doc yaml.Node
		switch err := d.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return root, nil
		case err != nil:
			line, what := yamlError(err)
			return nil, fmt.Errorf("%s:%d: not valid YAML: %s", file, line, what)
		case len(doc.Content) == 0 || doc.Content[0].Tag == "!!null":
			// A file may end with "---".
		case root != nil:
			return nil, fmt.Errorf("%s:%d: a second YAML document begins here; a file has one, so take out the line \"---\"", file, doc.Content[0].Line)
		default:
			root = doc.Content[0]
		}
	}
}

// yamlError finds the line in the parser's message. The parser leaves out the first
// line, and counts from 0 when it is the structure and not a character that is wrong.
func yamlError(err error) (line int, what string) {
	what = strings.TrimPrefix(err.Error(), "yaml: ")
	if n, _ := fmt.Sscanf(what, "line %d: ", &line); n == 0 {
		return 1, what
	}
	_, what, _ = strings.Cut(what, ": ")
	if strings.HasPrefix(what, "did not find expected ") {
		line++
	}
	return line, what
}

// items reads a YAML value as what the key takes, with the line of each item.
func (k Key) items(v *yaml.Node) (items []string, lines []int, err error) {
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	if k.Kind == List {
		switch v.Kind {
		case yaml.ScalarNode:
			return []string{v.Value}, []int{v.Line}, nil
		case yaml.SequenceNode:
			for _, e := range v.Content {
				if e.Kind != yaml.ScalarNode {
					return nil, nil, errors.New("want a list of plain values")
				}
				items, lines = append(items, e.Value), append(lines, e.Line)
			}
			return items, lines, nil
		}
		return nil, nil, errors.New("want a value or a list of values")
	}
	if v.Kind != yaml.ScalarNode {
		return nil, nil, errors.New("want one value")
	}
	return []string{v.Value}, []int{v.Line}, k.check(v.Value)
}

func (k Key) check(s string) error {
	var err error
	switch k.Kind {
	case Bool:
		if _, err = strconv.ParseBool(s); err != nil {
			return fmt.Errorf("%q is neither true nor false", s)
		}
	case Int:
		if _, err = strconv.Atoi(s); err != nil {
			return fmt.Errorf("%q is not a whole number", s)
		}
	case Duration:
		if _, err = time.ParseDuration(s); err != nil {
			return fmt.Errorf("%q is not a duration such as 30s or 5m", s)
		}
	}
	return nil
}

// DidYouMean is the end of a message about name, which is none of names; it is empty
// when none is close.
func DidYouMean(name string, names []string) string {
	if best := Nearest(name, names); best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return ""
}

// Nearest returns the one of names that is most likely meant by name, or "" when
// none is close.
func Nearest(name string, names []string) string {
	name = strings.ToLower(strings.ReplaceAll(name, "_", "-"))
	best, bestDistance := "", max(2, len(name)/3)+1
	for _, n := range names {
		if d := distance(name, n); d < bestDistance {
			best, bestDistance = n, d
		}
	}
	return best
}

// distance is the number of letters to insert, delete, replace or swap with
// their neighbour to make a out of b (optimal string alignment).
func distance(a, b string) int {
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
