package runtime

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/internal/test/image"
)

// writeLayout writes a folder with an OCI layout that has images. Other images of the folder stay as blobs.
func writeLayout(t *testing.T, dir string, images ...image.Image) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "layout.tar")
	image.Write(t, file, image.OCI, images...)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(r)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(path), 0o755)
		}
		if err == nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestLayouts imports folders with OCI layouts over several starts: once, only what is new, and pinned as long as the layout
// has the image.
func TestLayouts(t *testing.T) {
	n := newNode(t)
	dir := filepath.Join(n.cfg.imagesDir(), "bundle")
	one := image.Image{Name: "example.org/one:1", Files: map[string]image.File{"/shared": {Data: []byte("shared")}, "/which": {Data: []byte("one")}}}
	two := image.Image{Name: "example.org/two:1", Files: map[string]image.File{"/which": {Data: []byte("two")}}}
	damaged := image.Image{Name: "example.org/damaged:1", Files: map[string]image.File{"/which": {Data: []byte("damaged")}}}
	writeLayout(t, dir, one)
	writeLayout(t, filepath.Join(n.cfg.imagesDir(), "bad"), damaged)
	bad := largest(t, filepath.Join(n.cfg.imagesDir(), "bad"))
	data, err := os.ReadFile(bad)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(bad, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(n.cfg.imagesDir(), "notes"), 0o755); err != nil { // not a layout
		t.Fatal(err)
	}
	n.start()
	n.expect("imported")
	n.wantPinned([]string{"example.org/one:1"})
	if log := n.readLog(); !strings.Contains(log, "image archive bad has the damaged part sha256:") {
		t.Errorf("the damaged layout is not named:\n%s", log)
	}
	// The content is on the disk once.
	blob := largest(t, dir)
	held, err := os.Stat(filepath.Join(n.cfg.root(), "io.containerd.content.v1.content", "blobs", "sha256", filepath.Base(blob)))
	if st, err2 := os.Stat(blob); err != nil || err2 != nil || !os.SameFile(st, held) {
		t.Errorf("the layer is there twice: %v, %v", err, err2)
	}
	n.stop()
	n.start()
	n.expect("imported")
	if c := strings.Count(n.readLog(), `msg="imported images"`); c != 1 {
		t.Errorf("%d imports in two starts, want 1", c)
	}
	n.wantPinned([]string{"example.org/one:1"})
	n.stop()

	// The index decides what is pinned.
	writeLayout(t, dir, two)
	n.start()
	n.expect("imported")
	n.wantPinned([]string{"example.org/two:1"})
	n.stop()
	writeLayout(t, dir, one, two)
	n.start()
	n.expect("imported")
	n.wantPinned([]string{"example.org/one:1", "example.org/two:1"})
	if log := n.readLog(); strings.Count(log, "copied=0 ") != 1 {
		t.Errorf("what containerd had was copied again:\n%s", log)
	}
	n.stop()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.expect("imported")
	n.wantPinned(nil)
	n.stop()
}

// largest returns the largest blob of a layout.
func largest(t *testing.T, dir string) (path string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	size := int64(-1)
	for _, f := range found {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() > size {
			path, size = f, st.Size()
		}
	}
	return path
}
