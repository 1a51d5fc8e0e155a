package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	distribution "github.com/distribution/reference"
	"go.yaml.in/yaml/v3"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

// Limits of the sizes of files, in bytes.
const (
	maxManifest = 16 << 20
	maxChart    = 64 << 20
)

// manifestFiles returns the files that paths name: a folder stands for the manifests in it and below it, sorted by name.
func manifestFiles(paths []string) (files []string, err error) {
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		if !st.IsDir() {
			files = append(files, p)
			continue
		}
		found := 0
		err = filepath.WalkDir(p, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			switch filepath.Ext(name) {
			case ".yaml", ".yml", ".json":
				files, found = append(files, name), found+1
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		if found == 0 {
			return nil, fmt.Errorf("the folder %s has no manifest: no file ends with .yaml, .yml or .json", p)
		}
	}
	return files, nil
}

// readSmall reads a file that has at most limit bytes.
func readSmall(file, what string, limit int64) ([]byte, error) {
	if st, err := os.Stat(file); err == nil && st.Size() > limit {
		return nil, errorkind.Permanent(fmt.Errorf("%s has %d MiB, and %s can have at most %d MiB", file, st.Size()>>20, what, limit>>20))
	}
	return atomicfile.ReadSmall(file, limit)
}

// document is the part of an object that says what it is.
type document struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	Metadata   struct {
		Name string `yaml:"name"`
	} `yaml:"metadata"`
}

// readManifest reads a file with objects and returns the names of the images in them.
func readManifest(file string) (data []byte, images []string, err error) {
	if data, err = readSmall(file, "a manifest", maxManifest); err != nil {
		return nil, nil, err
	}
	if images, err = imagesIn(data); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	return data, images, nil
}

// imagesIn returns the names of the images in manifests. Objects must have what "kubectl apply" needs.
func imagesIn(data []byte) ([]string, error) {
	found := map[string]bool{}
	for d, n := yaml.NewDecoder(bytes.NewReader(data)), 1; ; n++ {
		var node yaml.Node
		err := d.Decode(&node)
		if errors.Is(err, io.EOF) {
			return slices.Sorted(maps.Keys(found)), nil
		}
		if err != nil {
			return nil, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
		}
		if len(node.Content) == 0 || node.Content[0].Tag == "!!null" {
			continue // between two lines "---"
		}
		var doc document
		if err := node.Decode(&doc); err != nil || doc.APIVersion == "" || doc.Kind == "" {
			return nil, fmt.Errorf("document %d is not an object of Kubernetes: it has no apiVersion or no kind", n)
		}
		if doc.Metadata.Name == "" && !strings.HasSuffix(doc.Kind, "List") {
			return nil, fmt.Errorf("document %d (%s) has no metadata.name", n, doc.Kind)
		}
		var value any
		if err := node.Decode(&value); err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		if err := collect(value, found, 0); err != nil {
			return nil, err
		}
	}
}

// maxDepth bounds the depth of objects. YAML's aliases can make objects that do not end.
const maxDepth = 100

// collect finds the images of all containers and volumes at any depth: pod templates are in objects of any kind.
func collect(value any, found map[string]bool, depth int) error {
	if depth > maxDepth {
		return errors.New("the objects are nested too deeply")
	}
	switch v := value.(type) {
	case []any:
		for _, e := range v {
			if err := collect(e, found, depth+1); err != nil {
				return err
			}
		}
	case map[string]any:
		for key, below := range v {
			switch key {
			case "containers", "initContainers", "ephemeralContainers":
				for _, c := range each(below) {
					if err := addImage(c["image"], found); err != nil {
						return err
					}
				}
			case "volumes":
				for _, c := range each(below) {
					if img, ok := c["image"].(map[string]any); ok {
						if err := addImage(img["reference"], found); err != nil {
							return err
						}
					}
				}
			}
			if err := collect(below, found, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func each(value any) (all []map[string]any) {
	items, _ := value.([]any)
	for _, e := range items {
		if m, ok := e.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

func addImage(value any, found map[string]bool) error {
	text, ok := value.(string)
	if !ok || text == "" {
		return nil
	}
	name, err := imageName(text)
	if err != nil {
		return err
	}
	found[name] = true
	return nil
}

// imageName returns the full name of an image.
func imageName(text string) (string, error) {
	name, err := distribution.ParseDockerRef(text)
	if err != nil {
		return "", errorkind.Permanent(fmt.Errorf("image name %q: %w", text, err))
	}
	return name.String(), nil
}

// ManifestImages returns the full names of the images that the manifests in files and folders need, sorted.
func ManifestImages(paths []string) ([]string, error) {
	files, err := manifestFiles(paths)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, f := range files {
		_, images, err := readManifest(f)
		if err != nil {
			return nil, err
		}
		for _, img := range images {
			found[img] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// readChart reads the archive of a Helm chart.
func readChart(file string) ([]byte, error) {
	data, err := readSmall(file, "a chart", maxChart)
	if err != nil {
		return nil, err
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s is not the archive of a chart; make one with \"helm package\"", file)
	}
	for t, left := tar.NewReader(io.LimitReader(z, maxChart)), maxItems; left > 0; left-- {
		h, err := t.Next()
		if err != nil {
			break
		}
		if dir, name := path.Split(path.Clean(h.Name)); name == "Chart.yaml" && strings.Count(dir, "/") == 1 {
			return data, nil
		}
	}
	return nil, fmt.Errorf("%s has no file Chart.yaml in its folder; make the archive with \"helm package\"", file)
}
