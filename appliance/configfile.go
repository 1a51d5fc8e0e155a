package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Setting is a setting for the configuration file, as the user has given it.
type Setting struct {
	Key    string
	Values []string
	List   bool
	Drop   bool // the key is removed; it has no values
}

// EditConfig returns a configuration file with settings changed. Every other byte of the file stays: comments, the order
// of keys, empty lines. A key whose value is equal already is not touched, and a new key is appended. Items of a list keep
// their comments.
func EditConfig(data []byte, settings []Setting) ([]byte, error) {
	for _, s := range settings {
		edited, err := editKey(data, s)
		if err == nil {
			err = verify(data, edited, s)
		}
		if err != nil {
			return nil, err
		}
		data = edited
	}
	return data, nil
}

// verify returns an error if an edit has changed more or less than one key: text can have forms in which an entry is not
// what it seems to be, such as anchors to which other keys refer.
func verify(before, after []byte, s Setting) error {
	var old, made map[string]any
	if err := errors.Join(yaml.Unmarshal(before, &old), yaml.Unmarshal(after, &made)); err != nil {
		return fmt.Errorf("the file has a form in which %s cannot be changed; change it by hand: %w", s.Key, err)
	}
	root, err := rootOf(after)
	if err != nil {
		return err
	}
	at := -1
	if root != nil {
		at = keyIn(root, s.Key)
	}
	right := at < 0 && s.Drop || at >= 0 && !s.Drop && s.equals(root.Content[at].Value, root.Content[at+1])
	for _, m := range []map[string]any{old, made} {
		delete(m, s.Key)
		delete(m, s.Key+"+")
	}
	if !right || len(old)+len(made) > 0 && !reflect.DeepEqual(old, made) {
		return fmt.Errorf("the file has a form in which %s cannot be changed without a change of other keys; change it by hand", s.Key)
	}
	return nil
}

// editKey changes one key. The text is parsed anew for each key, so that positions are always those of the text.
func editKey(data []byte, s Setting) ([]byte, error) {
	root, err := rootOf(data)
	if err != nil {
		return nil, err
	}
	if root == nil {
		if s.Drop {
			return data, nil
		}
		return appendKey(data, len(lines(data)), s)
	}
	at := keyIn(root, s.Key)
	switch {
	case at < 0 && s.Drop, at >= 0 && !s.Drop && s.equals(root.Content[at].Value, root.Content[at+1]):
		return data, nil
	case root.Style&yaml.FlowStyle != 0 || root.Column != 1:
		return editWhole(data, s) // keys do not have lines of their own
	case at < 0:
		return appendKey(data, end(data, root, len(root.Content)-2), s)
	}
	text := lines(data)
	first, last := root.Content[at].Line-1, end(data, root, at)
	var entry []string
	if !s.Drop {
		made, err := s.replacing(root.Content[at], root.Content[at+1])
		if err != nil {
			return nil, err
		}
		entry = []string{made}
	}
	return []byte(strings.Join(slices.Concat(text[:first], entry, text[last:]), "")), nil
}

// rootOf returns the mapping in a configuration file, or nil if the file has no content.
func rootOf(data []byte) (*yaml.Node, error) {
	doc, err := document(data)
	if err != nil || doc == nil {
		return nil, err
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, errors.New("want lines of the form \"flag: value\"")
	}
	return root, nil
}

func document(data []byte) (*yaml.Node, error) {
	var doc yaml.Node
	err := yaml.NewDecoder(bytes.NewReader(data)).Decode(&doc)
	if errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0 {
		return nil, nil
	}
	return &doc, err
}

// keyIn returns the index of a key in a mapping, or -1. "key+" is the same key: in the first file there is nothing to
// append to.
func keyIn(root *yaml.Node, key string) int {
	for i := 0; i+1 < len(root.Content); i += 2 {
		if strings.TrimSuffix(root.Content[i].Value, "+") == key {
			return i
		}
	}
	return -1
}

// end returns the number of the line after the entry of a key, without the comments and empty lines that follow it.
func end(data []byte, root *yaml.Node, at int) int {
	text := lines(data)
	last := len(text)
	if at+2 < len(root.Content) {
		last = root.Content[at+2].Line - 1
	} else {
		// A document may end with "---" or "...".
		for i := root.Content[at].Line; i < len(text); i++ {
			if strings.HasPrefix(text[i], "---") || strings.HasPrefix(text[i], "...") {
				last = i
				break
			}
		}
	}
	for last > root.Content[at].Line {
		line := strings.TrimSpace(text[last-1])
		if line != "" && !strings.HasPrefix(line, "#") {
			break
		}
		last--
	}
	return last
}

// lines splits a text into lines with their ends.
func lines(data []byte) (out []string) {
	for line := range strings.Lines(string(data)) {
		out = append(out, line)
	}
	return out
}

// appendKey inserts a new key at a line.
func appendKey(data []byte, at int, s Setting) ([]byte, error) {
	entry, err := encode(&yaml.Node{Kind: yaml.ScalarNode, Value: s.Key}, s.node(nil))
	if err != nil {
		return nil, err
	}
	text := lines(data)
	if at > 0 && !strings.HasSuffix(text[at-1], "\n") {
		text[at-1] += "\n"
	}
	return []byte(strings.Join(slices.Concat(text[:at], []string{entry}, text[at:]), "")), nil
}

// replacing returns the text of an entry in place of another, whose comments it keeps.
func (s Setting) replacing(key, old *yaml.Node) (string, error) {
	name := *key
	name.Value, name.HeadComment, name.FootComment = s.Key, "", "" // these stay in the text
	value := s.node(old)
	value.LineComment, value.HeadComment = old.LineComment, ""
	if value.Kind == yaml.SequenceNode && value.Style&yaml.FlowStyle == 0 && value.LineComment != "" {
		name.LineComment, value.LineComment = value.LineComment, "" // the value begins in the next line
	}
	if n := len(value.Content); n > 0 {
		value.Content[n-1].FootComment = ""
	}
	return encode(&name, value)
}

// node returns the setting's value. Items that are in the old value too keep their nodes, and so their comments.
func (s Setting) node(old *yaml.Node) *yaml.Node {
	if !s.List {
		return scalar(s.Values[len(s.Values)-1])
	}
	out := &yaml.Node{Kind: yaml.SequenceNode}
	if len(s.Values) == 0 {
		out.Style = yaml.FlowStyle
	}
	if old != nil && old.Kind == yaml.SequenceNode {
		out.Style = old.Style
	}
	for _, v := range s.Values {
		item := scalar(v)
		if old != nil {
			for _, o := range old.Content {
				if o.Kind == yaml.ScalarNode && o.Value == v {
					item = o
				}
			}
		}
		out.Content = append(out.Content, item)
	}
	return out
}

// scalar returns the node of a text. Numbers and truth values, which settings read as text, need no quotes.
func scalar(text string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Value: text, Tag: "!!str"}
	if v, err := strconv.Atoi(text); err == nil && strconv.Itoa(v) == text {
		n.Tag = "!!int"
	}
	if text == "true" || text == "false" {
		n.Tag = "!!bool"
	}
	return n
}

// equals reports whether the file has this value for the setting.
func (s Setting) equals(key string, v *yaml.Node) bool {
	if key != s.Key {
		return false
	}
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	var have []string
	switch v.Kind {
	case yaml.ScalarNode:
		have = []string{v.Value}
	case yaml.SequenceNode:
		for _, item := range v.Content {
			have = append(have, item.Value)
		}
	default:
		return false
	}
	if !s.List {
		return len(have) == 1 && have[0] == s.Values[len(s.Values)-1]
	}
	return slices.Equal(have, s.Values)
}

// editWhole changes a file whose keys have no lines of their own: the whole file is written anew, with its comments.
func editWhole(data []byte, s Setting) ([]byte, error) {
	doc, err := document(data)
	if err != nil {
		return nil, err
	}
	root := doc.Content[0]
	at := keyIn(root, s.Key)
	switch {
	case s.Drop:
		root.Content = slices.Delete(root.Content, at, at+2)
	case at < 0:
		root.Content = append(root.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: s.Key}, s.node(nil))
	default:
		value := s.node(root.Content[at+1])
		value.LineComment = root.Content[at+1].LineComment
		root.Content[at].Value, root.Content[at+1] = s.Key, value
	}
	return marshal(doc)
}

func encode(key, value *yaml.Node) (string, error) {
	out, err := marshal(&yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{key, value}})
	return string(out), err
}

func marshal(n *yaml.Node) ([]byte, error) {
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(n), e.Close()); err != nil {
		return nil, fmt.Errorf("encode YAML: %w", err)
	}
	return out.Bytes(), nil
}

// Diff returns the lines that differ between two texts: removed lines with "-", new lines with "+".
func Diff(before, after []byte) string {
	a, b := lines(before), lines(after)
	// common[i][j] is the length of the longest common subsequence of a[i:] and b[j:]. Configuration files are short.
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out strings.Builder
	for i, j := 0, 0; i < len(a) || j < len(b); {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out.WriteString("-" + strings.TrimSuffix(a[i], "\n") + "\n")
			i++
		default:
			out.WriteString("+" + strings.TrimSuffix(b[j], "\n") + "\n")
			j++
		}
	}
	return out.String()
}
