package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

// Spec is what a bundle is made of: the content of bundle.yaml. Paths in it are relative to the folder of that file.
type Spec struct {
	Executables []string  `yaml:"executables"` // of kedge, one for each architecture; empty for the running kedge
	Images      []Source  `yaml:"images"`
	Manifests   []string  `yaml:"manifests"` // files, and folders with files
	Charts      []string  `yaml:"charts"`    // archives
	Config      yaml.Node `yaml:"config"`    // settings
}

// Source is where images come from. Exactly one of its fields is set.
type Source struct {
	Archive string `yaml:"archive"` // all images of a file as "docker save" writes it, or of an OCI layout in a tar file
	Layout  string `yaml:"layout"`  // all images of a folder with an OCI layout
	Node    string `yaml:"node"`    // an image of the node that runs on this machine
	Pull    string `yaml:"pull"`    // an image of a registry
}

// UnmarshalYAML also accepts a text: the path of an archive or of a folder, which begins with "/", "./" or "../", or the
// name of an image to pull.
func (s *Source) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind != yaml.ScalarNode {
		type fields Source
		// Decode does not know the decoder's demand for known fields.
		for i := 0; node.Kind == yaml.MappingNode && i < len(node.Content); i += 2 {
			switch key := node.Content[i]; key.Value {
			case "archive", "layout", "node", "pull":
			default:
				return fmt.Errorf("line %d: unknown key %q of an image; the keys are archive, layout, node and pull", key.Line, key.Value)
			}
		}
		if err := node.Decode((*fields)(s)); err != nil {
			return err
		}
		n := 0
		for _, text := range []string{s.Archive, s.Layout, s.Node, s.Pull} {
			if text != "" {
				n++
			}
		}
		if n != 1 {
			return fmt.Errorf("line %d: an image has one of the keys archive, layout, node and pull", node.Line)
		}
		return nil
	}
	switch text := node.Value; {
	case text == "":
		return fmt.Errorf("line %d: the image has no name", node.Line)
	case strings.HasPrefix(text, "/"), strings.HasPrefix(text, "./"), strings.HasPrefix(text, "../"):
		s.Archive = text // a folder is found when it is read
	default:
		s.Pull = text
	}
	return nil
}

// ReadSpec reads bundle.yaml.
func ReadSpec(path string) (Spec, error) {
	var s Spec
	data, err := atomicfile.ReadSmall(path, maxConfig)
	if err != nil {
		return s, errorkind.Permanent(err)
	}
	if err := s.parse(data); err != nil {
		return s, errorkind.Permanent(fmt.Errorf("%s: %w", path, err))
	}
	dir := filepath.Dir(path)
	at := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for i := range s.Images {
		at(&s.Images[i].Archive)
		at(&s.Images[i].Layout)
		if st, err := os.Stat(s.Images[i].Archive); err == nil && st.IsDir() {
			s.Images[i].Archive, s.Images[i].Layout = "", s.Images[i].Archive
		}
	}
	for _, paths := range [][]string{s.Executables, s.Manifests, s.Charts} {
		for i := range paths {
			at(&paths[i])
		}
	}
	return s, nil
}

// Paths returns the files and folders that the bundle is made of.
func (s *Spec) Paths() []string {
	all := slices.Concat(s.Executables, s.Manifests, s.Charts)
	for _, img := range s.Images {
		all = append(all, img.Archive, img.Layout)
	}
	return all
}

func (s *Spec) parse(data []byte) error {
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(s); err != nil && !errors.Is(err, io.EOF) {
		var wrong *yaml.TypeError
		if errors.As(err, &wrong) {
			return errors.New(inWords(strings.Join(wrong.Errors, "; ")))
		}
		return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := d.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return errors.New("a second YAML document follows; the file can have only one")
	}
	if err := emptyItem(data); err != nil {
		return err
	}
	if k := s.Config.Kind; k != 0 && k != yaml.MappingNode && s.Config.Tag != "!!null" {
		return fmt.Errorf("line %d: config is not a list of lines of the form \"setting: value\"", s.Config.Line)
	}
	return nil
}

// emptyItem returns an error for an item that has no value, which the decoder leaves out without a word.
func emptyItem(data []byte) error {
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil || len(doc.Content) == 0 {
		return err
	}
	lines := doc.Content[0].Content
	for i := 0; i+1 < len(lines); i += 2 {
		key, list := lines[i], lines[i+1]
		for _, item := range list.Content {
			if list.Kind == yaml.SequenceNode && item.Kind == yaml.ScalarNode && (item.Value == "" || item.ShortTag() == "!!null") {
				return fmt.Errorf("line %d: %s has an empty item; remove it", item.Line, key.Value)
			}
		}
	}
	return nil
}

// misfit is what the decoder says of a value of another kind than the wanted one.
var misfit = regexp.MustCompile("cannot unmarshal !!([a-z]+)(?: `([^`]*)`)? into ([^ ;]+)")

// inWords is an error of the decoder without the names of Go's types.
func inWords(text string) string {
	text = strings.ReplaceAll(text, "in type bundle.Spec", "in a bundle; the keys are executables, images, manifests, charts and config")
	return misfit.ReplaceAllStringFunc(text, func(found string) string {
		parts := misfit.FindStringSubmatch(found)
		has := map[string]string{"seq": "a list", "map": "a mapping"}[parts[1]]
		if has == "" {
			has = fmt.Sprintf("%q", parts[2])
		}
		want := map[string]string{
			"bundle.Spec": `lines of the form "key: value"`, "[]bundle.Source": "a list of images", "[]string": "a list of paths",
		}[parts[3]]
		if want == "" {
			want = "a text"
		}
		return has + " stands where " + want + " must stand"
	})
}

// Settings returns the settings in the form of a configuration file.
func (s *Spec) Settings() (string, error) {
	if s.Config.Kind != yaml.MappingNode || len(s.Config.Content) == 0 {
		return "", nil
	}
	text, err := yaml.Marshal(&s.Config)
	return string(text), err
}
