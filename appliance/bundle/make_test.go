package bundle

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"aead.dev/minisign"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// tinyELF returns the smallest file that is an executable for a machine: a header, and one segment that is the whole file.
func tinyELF(machine uint16, text string) []byte {
	out := make([]byte, 64+56, 64+56+len(text))
	copy(out, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(out[16:], 2) // executable
	le.PutUint16(out[18:], machine)
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[32:], 64) // the table of segments
	le.PutUint16(out[52:], 64)
	le.PutUint16(out[54:], 56)
	le.PutUint16(out[56:], 1)
	le.PutUint32(out[64:], 1) // to be loaded
	le.PutUint64(out[64+32:], uint64(cap(out)))
	le.PutUint64(out[64+40:], uint64(cap(out)))
	return append(out, text...)
}

const (
	amd64 = 62
	arm64 = 183
)

// material is what a bundle of a test is made of.
type material struct {
	programs  map[string][]byte // by architecture
	layouts   []string
	manifests map[string]string
	config    string
	key       *minisign.PrivateKey
}

// simple is a bundle with a bit of everything.
func simple(t *testing.T) material {
	return material{
		programs:  map[string][]byte{"amd64": tinyELF(amd64, "the program")},
		layouts:   []string{writeTestLayout(t, "docker.io/library/one:1", "shared layer", "layer of one")},
		manifests: map[string]string{"001-app.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"},
		config:    "node-label: [a=b]\n",
	}
}

// write writes the bundle.
func (m material) write(t *testing.T, path string) *Index {
	t.Helper()
	w, err := newWriter(path)
	if err != nil {
		t.Fatal(err)
	}
	w.index.MadeBy, w.index.Config = "test", m.config
	var all []Executable
	var archs []string
	for _, a := range []string{"amd64", "arm64"} {
		if p, ok := m.programs[a]; ok {
			all, archs = append(all, Executable{a, Part{Size: int64(len(p))}}), append(archs, a)
		}
	}
	if err := w.executables(t.Context(), all, func(e Executable) io.Reader { return bytes.NewReader(m.programs[e.Architecture]) }); err != nil {
		t.Fatal(err)
	}
	for _, name := range sortedNames(m.manifests) {
		item, err := w.file(t.Context(), name, []byte(m.manifests[name]))
		if err != nil {
			t.Fatal(err)
		}
		w.index.Manifests = append(w.index.Manifests, item)
	}
	o := Order{Output: path, Say: func(string) {}}
	for _, l := range m.layouts {
		o.Spec.Images = append(o.Spec.Images, Source{Layout: l})
	}
	if err := w.images(t.Context(), o, archs); err != nil {
		t.Fatal(err)
	}
	if err := w.finish(m.key); err != nil {
		t.Fatal(err)
	}
	return &w.index
}

func sortedNames(m map[string]string) (names []string) {
	for n := range m {
		names = append(names, n)
	}
	for i := range names {
		for j := range names[:i] {
			if names[i] < names[j] {
				names[i], names[j] = names[j], names[i]
			}
		}
	}
	return names
}

// writeTestLayout writes an OCI layout with an image for amd64 and returns its folder.
func writeTestLayout(t *testing.T, name string, layers ...string) string {
	t.Helper()
	return writeLayoutFor(t, name, "amd64", layers...)
}

func writeLayoutFor(t *testing.T, name, arch string, layers ...string) string {
	t.Helper()
	dir := t.TempDir()
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(mediaType string, data []byte) v1.Descriptor {
		d := digest.FromBytes(data)
		if err := os.WriteFile(filepath.Join(blobs, d.Encoded()), data, 0o644); err != nil {
			t.Fatal(err)
		}
		return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
	}
	marshal := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	config := put(v1.MediaTypeImageConfig, marshal(v1.Image{Platform: v1.Platform{OS: "linux", Architecture: arch}}))
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: config}
	for _, l := range layers {
		m.Layers = append(m.Layers, put(v1.MediaTypeImageLayer, []byte(l)))
	}
	d := put(v1.MediaTypeImageManifest, marshal(m))
	d.Annotations = map[string]string{nameAnnotation: name}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []v1.Descriptor{d}}
	for file, data := range map[string][]byte{v1.ImageIndexFile: marshal(index), v1.ImageLayoutFile: []byte(`{"imageLayoutVersion":"1.0.0"}`)} {
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// open opens a bundle that must be right.
func open(t *testing.T, path string) *File {
	t.Helper()
	b, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// check opens and verifies a bundle.
func check(path string) error {
	b, err := Open(path)
	if err != nil {
		return err
	}
	defer b.Close()
	return b.Verify(context.Background(), nil)
}

func sha(data []byte) [sha256.Size]byte { return sha256.Sum256(data) }

func sumOf(data string) string {
	s := sha256.Sum256([]byte(data))
	return hex.EncodeToString(s[:])
}

// tree returns the files and folders below a folder, with the content of files.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		switch {
		case info.Mode()&os.ModeSymlink != 0:
			all[rel], err = os.Readlink(path)
		case info.IsDir():
			all[rel] = "folder"
		default:
			var data []byte
			data, err = os.ReadFile(path)
			all[rel] = string(data)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func mustWrite(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want one with %q", err, text)
	}
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("the error has several lines: %v", err)
	}
}
