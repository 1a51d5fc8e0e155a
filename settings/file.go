package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"kedge/internal/atomicfile"
)

// File is a configuration file.
type File struct {
	Name string
	Data []byte
}

// maxFile is the maximum size of a configuration file in bytes.
const maxFile = 1 << 20

// ReadFiles reads the configuration file at path and the drop-ins PATH.d/*.yaml, in the order of their names. A
// missing file is an error only if named is true, because the user has given its path.
func ReadFiles(path string, named bool) ([]File, error) {
	var names []string
	switch _, err := os.Stat(path); {
	case err == nil:
		names = append(names, path)
	case named || !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("configuration file %s: %w", path, errors.Unwrap(err))
	}
	dropins, err := filepath.Glob(filepath.Join(path+".d", "*.yaml"))
	if err != nil {
		return nil, err
	}
	slices.Sort(dropins)
	var files []File
	var errs []error
	for _, name := range append(names, dropins...) {
		if name == os.DevNull { // a usual way to give no file
			continue
		}
		data, err := atomicfile.ReadSmall(name, maxFile)
		if err != nil {
			errs = append(errs, fmt.Errorf("configuration file: %w", err))
		}
		files = append(files, File{name, data})
	}
	return files, errors.Join(errs...)
}

// readFiles adds the settings in files to v.
func (v Values) readFiles(files []File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, v.readFile(f))
	}
	return errors.Join(errs...)
}

func (v Values) readFile(f File) error {
	root, err := document(f)
	if err != nil || root == nil {
		return err
	}
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: want lines of the form \"flag: value\"", f.Name, root.Line)
	}
	var errs []error
	lines := map[string]int{} // line of each key in this file
	for i := 0; i+1 < len(root.Content); i += 2 {
		errs = append(errs, v.readKey(f.Name, root.Content[i], root.Content[i+1], lines))
	}
	return errors.Join(errs...)
}

// readKey adds the setting of one key to v.
func (v Values) readKey(file string, k, value *yaml.Node, lines map[string]int) error {
	name, add := strings.CutSuffix(k.Value, "+")
	at := Origin{File: file, Line: k.Line}
	row := v.key(name)
	if row == nil {
		if why, ok := OnlyK3s(name); ok {
			return fmt.Errorf("%s%s is a setting of k3s that kedge does not have: %s", at.place(), name, why)
		}
		return fmt.Errorf("%sunknown key %q%s", at.place(), name, DidYouMean(name, v.keys()))
	}
	if first, twice := lines[name]; twice {
		return fmt.Errorf("%s%s is already set in line %d; set it once", at.place(), name, first)
	}
	lines[name] = k.Line
	if add && row.kind != list {
		return fmt.Errorf("%s%q takes one value, so \"+\" cannot append to it", at.place(), name)
	}
	items, err := itemsOf(row, value)
	if err != nil {
		return fmt.Errorf("%s%s: %w", at.place(), name, err)
	}
	e := entry{origin: at}
	if add {
		e.items, e.origins = slices.Clone(v.set[name].items), slices.Clone(v.set[name].origins)
	}
	for _, item := range items {
		e.items, e.origins = append(e.items, item.Value), append(e.origins, Origin{File: file, Line: item.Line})
	}
	v.set[name] = e
	return nil
}

// key returns the row of a key, or nil.
func (v Values) key(name string) *Setting {
	for _, row := range v.rows {
		if row.Name == name && !row.NoKey {
			return row
		}
	}
	return nil
}

func (v Values) keys() (names []string) {
	for _, row := range v.rows {
		if !row.NoKey {
			names = append(names, row.Name)
		}
	}
	return names
}

// document returns the only YAML document of a file, or nil if the file is empty.
func document(f File) (*yaml.Node, error) {
	var root *yaml.Node
	for d := yaml.NewDecoder(bytes.NewReader(f.Data)); ; {
		var doc yaml.Node
		switch err := d.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return root, nil
		case err != nil:
			line, what := yamlError(err)
			if column := tabColumn(f.Data, line); column > 0 {
				return nil, fmt.Errorf("%s:%d:%d: not valid YAML: tab in the indentation; replace it by spaces", f.Name, line, column)
			}
			return nil, fmt.Errorf("%s:%d: not valid YAML: %s", f.Name, line, what)
		case len(doc.Content) == 0 || doc.Content[0].Tag == "!!null":
			// A file may end with "---".
		case root != nil:
			return nil, fmt.Errorf("%s:%d: a second YAML document begins here; a file can have only one, so remove the line \"---\"", f.Name, doc.Content[0].Line)
		default:
			root = doc.Content[0]
		}
	}
}

// tabColumn returns the column of a tab in the indentation of a line, or 0.
func tabColumn(data []byte, line int) int {
	lines := bytes.Split(data, []byte("\n"))
	if line < 1 || line > len(lines) {
		return 0
	}
	text := lines[line-1]
	if i := bytes.IndexByte(text, '\t'); i >= 0 && len(bytes.TrimLeft(text[:i], " -")) == 0 {
		return i + 1
	}
	return 0
}

// yamlError returns the line and the text of an error of the YAML library, which has no error type. Without a
// line in the text it returns line 1. For "did not find expected" the library's line is one too low.
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

// itemsOf returns the scalars of a value.
func itemsOf(row *Setting, v *yaml.Node) ([]*yaml.Node, error) {
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	switch {
	case v.Kind == yaml.ScalarNode:
		return []*yaml.Node{v}, nil
	case row.kind != list:
		return nil, errors.New("want one value")
	case v.Kind != yaml.SequenceNode:
		return nil, errors.New("want a value or a list of values")
	}
	for _, e := range v.Content {
		if e.Kind != yaml.ScalarNode {
			return nil, errors.New("want a list of plain values")
		}
	}
	return v.Content, nil
}
