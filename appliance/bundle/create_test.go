package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestSpec(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "layout"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "bundle.yaml")
	read := func(text string) (Spec, error) {
		mustWrite(t, file, []byte(text))
		return ReadSpec(file)
	}
	s, err := read("images:\n- ./a.tar\n- ./layout\n- archive: b.tar\n- layout: l\n- node: busybox\n- pull: nginx:1\n- nginx:2\nmanifests: [m]\ncharts: [/c.tgz]\nconfig:\n  node-label: [a=b]\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []Source{{Archive: dir + "/a.tar"}, {Layout: dir + "/layout"}, {Archive: dir + "/b.tar"}, {Layout: dir + "/l"}, {Node: "busybox"}, {Pull: "nginx:1"}, {Pull: "nginx:2"}}
	if !slices.Equal(s.Images, want) || !slices.Equal(s.Manifests, []string{dir + "/m"}) || !slices.Equal(s.Charts, []string{"/c.tgz"}) {
		t.Errorf("%+v", s)
	}
	if text, err := s.Settings(); err != nil || text != "node-label: [a=b]\n" {
		t.Errorf("settings %q, %v", text, err)
	}
	for text, want := range map[string]string{
		"image: [a]":                       "the keys are",
		"images: [{pul: a}]":               "unknown key \"pul\"",
		"images: [{pull: a, node: b}]":     "one of the keys",
		"images: [{}]":                     "one of the keys",
		"images: ['']":                     "no name",
		"images: a":                        `line 1: "a" stands where a list of images must stand`,
		"manifests: {a: b}":                "line 1: a mapping stands where a list of paths must stand",
		"charts: [[a]]":                    "line 1: a list stands where a text must stand",
		"[a]":                              `line 1: a list stands where lines of the form "key: value" must stand`,
		"images: [null]":                   "line 1: images has an empty item",
		"manifests:\n-\n- a":               "line 2: manifests has an empty item",
		"config: [a]":                      "setting: value",
		"images: [a]\n---\nimages: [b]":    "second YAML document",
		"images: [\n":                      "line",
		"x: " + strings.Repeat("a", 2<<20): "larger",
	} {
		_, err := read(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v", text, err)
		}
	}
	if s, err := read(""); err != nil || len(s.Images) != 0 {
		t.Errorf("an empty file: %+v, %v", s, err)
	}
}

func TestManifestImages(t *testing.T) {
	dir := t.TempDir()
	mustWrite(t, filepath.Join(dir, "a.yaml"), []byte(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
spec:
  template:
    spec:
      initContainers: [{name: i, image: busybox}]
      containers: [{name: c, image: "nginx:1.27"}, {name: d}]
      volumes: [{name: v, image: {reference: "registry.example.com/data:2"}}]
---
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, image: busybox}]}}
---
apiVersion: example.com/v1
kind: Anything
metadata: {name: x}
spec: {deep: {template: {spec: {ephemeralContainers: [{image: "deep:1"}]}}}, image: none}
`))
	mustWrite(t, filepath.Join(dir, "b.json"), []byte(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"j"},"spec":{"containers":[{"name":"c","image":"json@sha256:`+sumOf("")+`"}]}}`))
	mustWrite(t, filepath.Join(dir, "notes.txt"), []byte("not a manifest"))
	got, err := ManifestImages([]string{dir})
	want := []string{"docker.io/library/busybox:latest", "docker.io/library/deep:1", "docker.io/library/json@sha256:" + sumOf(""), "docker.io/library/nginx:1.27", "registry.example.com/data:2"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	for text, want := range map[string]string{
		"a: b":                        "not an object of Kubernetes",
		"just text":                   "not an object of Kubernetes",
		"apiVersion: v1\nkind: Pod\n": "no metadata.name",
		"apiVersion: v1\nkind: [\n":   "line",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{image: 'A B'}]}": "image name",
	} {
		bad := filepath.Join(t.TempDir(), "bad.yaml")
		mustWrite(t, bad, []byte(text))
		_, err := ManifestImages([]string{bad})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	large := filepath.Join(t.TempDir(), "large.yaml")
	mustWrite(t, large, nil)
	if err := os.Truncate(large, maxManifest+1<<20); err != nil {
		t.Fatal(err)
	}
	_, err = ManifestImages([]string{large})
	wantError(t, err, "has 17 MiB, and a manifest can have at most 16 MiB")
	_, err = ManifestImages([]string{t.TempDir()})
	wantError(t, err, "has no manifest")
	_, err = ManifestImages([]string{filepath.Join(dir, "missing")})
	wantError(t, err, "no such file")
}

func TestCharts(t *testing.T) {
	chart := func(names ...string) string {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		w := tar.NewWriter(z)
		for _, n := range names {
			if err := w.WriteHeader(&tar.Header{Name: n, Mode: 0o644, Size: 1}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		z.Close()
		file := filepath.Join(t.TempDir(), "c.tgz")
		mustWrite(t, file, out.Bytes())
		return file
	}
	if _, err := readChart(chart("c/values.yaml", "c/Chart.yaml")); err != nil {
		t.Error(err)
	}
	_, err := readChart(chart("c/values.yaml", "Chart.yaml", "c/sub/Chart.yaml"))
	wantError(t, err, "no file Chart.yaml")
	plain := filepath.Join(t.TempDir(), "c.tgz")
	mustWrite(t, plain, []byte("x"))
	_, err = readChart(plain)
	wantError(t, err, "helm package")
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	other := filepath.Join(dir, "elf")
	mustWrite(t, other, tinyELF(amd64, "of somebody else"))
	text := filepath.Join(dir, "text")
	mustWrite(t, text, []byte("#!/bin/sh\n"))
	strange := filepath.Join(dir, "strange")
	mustWrite(t, strange, tinyELF(8, "of a machine that kedge does not know"))
	for path, want := range map[string]string{other: "not that of kedge", text: "does not begin with an executable", strange: "for which there is no kedge", dir + "/missing": "no such file"} {
		_, err := Create(t.Context(), Order{Spec: Spec{Executables: []string{path}}, Output: out, Say: func(string) {}})
		wantError(t, err, want)
	}
	if _, err := os.Lstat(out); err == nil {
		t.Error("a refused bundle was written")
	}
}

func TestImagesAreRefused(t *testing.T) {
	one := writeTestLayout(t, "docker.io/library/one:1", "layer")
	for name, test := range map[string]struct {
		layouts []string
		want    string
	}{
		"another architecture":          {[]string{writeLayoutFor(t, "docker.io/library/one:1", "arm64", "layer")}, "not for amd64"},
		"one name for different images": {[]string{one, writeTestLayout(t, "docker.io/library/one:1", "other")}, "two images have the name"},
		"an image without a name":       {[]string{writeTestLayout(t, "latest", "layer")}, "not the full name"},
		"no layout":                     {[]string{t.TempDir()}, "not an OCI layout"},
		"a part is missing": {[]string{without(t, func(dir string) error {
			return os.Remove(filepath.Join(dir, "blobs/sha256", sumOf("layer")))
		})}, "is missing"},
		"a part is cut off": {[]string{without(t, func(dir string) error {
			return os.Truncate(filepath.Join(dir, "blobs/sha256", sumOf("layer")), 2)
		})}, "bytes and not"},
		"a part is damaged": {[]string{without(t, func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "blobs/sha256", sumOf("layer")), []byte("LAYER"), 0o644)
		})}, "is damaged"},
		"no index": {[]string{without(t, func(dir string) error { return os.Remove(filepath.Join(dir, v1.ImageIndexFile)) })}, "no such file"},
	} {
		dir := t.TempDir()
		w, err := newWriter(filepath.Join(dir, "b"))
		if err != nil {
			t.Fatal(err)
		}
		o := Order{Output: filepath.Join(dir, "b"), Say: func(string) {}}
		for _, l := range test.layouts {
			o.Spec.Images = append(o.Spec.Images, Source{Layout: l})
		}
		err = w.images(t.Context(), o, []string{"amd64"})
		w.abort()
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
}

// without returns a layout that was damaged.
func without(t *testing.T, damage func(dir string) error) string {
	t.Helper()
	dir := writeTestLayout(t, "docker.io/library/one:1", "layer")
	if err := damage(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestOutputIsNoDevice: a bundle takes the place of a file, and of nothing else.
func TestOutputIsNoDevice(t *testing.T) {
	dir := t.TempDir()
	pipe, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "link")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pipe", link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, link, dir} {
		_, err := newWriter(path)
		wantError(t, err, "is not a regular file")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
