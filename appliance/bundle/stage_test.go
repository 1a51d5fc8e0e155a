package bundle

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// install stages and commits a bundle.
func install(t *testing.T, path, dataDir string) error {
	t.Helper()
	s, err := open(t, path).Stage(t.Context(), dataDir, "amd64", nil)
	if err != nil {
		return err
	}
	return s.Commit()
}

// pair returns two bundles, of which the second adds an image and changes a manifest.
func pair(t *testing.T) (older, newer string) {
	dir := t.TempDir()
	older, newer = filepath.Join(dir, "older"), filepath.Join(dir, "newer")
	m := simple(t)
	m.manifests["002-same.yaml"] = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: same}\n"
	m.write(t, older)
	m.layouts = append(m.layouts, writeTestLayout(t, "docker.io/library/two:1", "shared layer", "layer of two"))
	m.manifests["001-app.yaml"] += "data: {k: v}\n"
	m.write(t, newer)
	return older, newer
}

func TestStageAndCommit(t *testing.T) {
	older, newer := pair(t)
	data := filepath.Join(t.TempDir(), "data")
	if differs, err := open(t, older).Differs(data); err != nil || !differs {
		t.Errorf("differs from nothing: %v, %v", differs, err)
	}
	if err := install(t, older, data); err != nil {
		t.Fatal(err)
	}
	layer := filepath.Join(data, "images/bundle/blobs/sha256", sumOf("shared layer"))
	if string(mustRead(t, layer)) != "shared layer" {
		t.Error("the layer is not in the layout")
	}
	if found, err := readLayout(filepath.Join(data, "images/bundle")); err != nil || len(found) != 1 || found[0].Name != "docker.io/library/one:1" {
		t.Errorf("layout %+v, %v", found, err)
	}
	if differs, err := open(t, older).Differs(data); err != nil || differs {
		t.Errorf("differs from itself: %v, %v", differs, err)
	}
	// What is there is not copied again.
	before, err := os.Stat(layer)
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(t, newer).Stage(t.Context(), data, "amd64", func(done, total int64) {
		if want := int64(len("layer of two")); total < want || total > 2000 {
			t.Errorf("%d bytes are copied", total)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// Until the commit the older bundle is in use.
	app := filepath.Join(data, "bundle/current/manifests/001-app.yaml")
	if strings.Contains(string(mustRead(t, app)), "k: v") {
		t.Error("the newer manifest is in use before the commit")
	}
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mustRead(t, app)), "k: v") {
		t.Error("the newer manifest is not in use after the commit")
	}
	if after, err := os.Stat(layer); err != nil || !os.SameFile(before, after) {
		t.Errorf("the shared layer was written again: %v", err)
	}
	// Going back removes what only the newer one had.
	if err := install(t, older, data); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(data, "images/bundle/blobs/sha256", sumOf("layer of two"))); err == nil {
		t.Error("the layer of the newer bundle is left")
	}
	if entries, _ := os.ReadDir(filepath.Join(data, "bundle")); len(entries) != 2 {
		t.Errorf("left: %v", entries)
	}
}

// TestFailedStageLeavesNothing damages each content of a bundle, and what is wrong is found before anything is in use.
func TestFailedStageLeavesNothing(t *testing.T) {
	older, newer := pair(t)
	data := filepath.Join(t.TempDir(), "data")
	damage := func(path, text string) string {
		whole := string(mustRead(t, path))
		if !strings.Contains(whole, text) {
			t.Fatalf("no %q", text)
		}
		bad := filepath.Join(t.TempDir(), "bad")
		mustWrite(t, bad, []byte(strings.Replace(whole, text, strings.ToUpper(text), 1)))
		return bad
	}
	for _, text := range []string{"layer of one", "shared layer", "kind: configmap", "architecture"} {
		whole := older
		if text == "kind: configmap" {
			text = "kind: ConfigMap"
		}
		err := install(t, damage(whole, text), data)
		if !errors.As(err, new(*DamagedError)) {
			t.Errorf("%s: %v", text, err)
		}
		if _, err := os.Lstat(data); err == nil {
			t.Errorf("%s: left: %v", text, slices.Sorted(maps.Keys(tree(t, data))))
		}
	}
	if err := install(t, older, data); err != nil {
		t.Fatal(err)
	}
	before := tree(t, data)
	for _, text := range []string{"layer of two", "k: v"} {
		if err := install(t, damage(newer, text), data); !errors.As(err, new(*DamagedError)) {
			t.Errorf("%s: %v", text, err)
		}
		if after := tree(t, data); !maps.Equal(before, after) {
			t.Errorf("%s: the data directory has changed", text)
		}
	}
	if s, err := open(t, newer).Stage(t.Context(), data, "arm64", nil); err == nil || !strings.Contains(err.Error(), "not for arm64") {
		t.Errorf("another architecture: %v, %v", s, err)
	}
	if after := tree(t, data); !maps.Equal(before, after) {
		t.Error("another architecture: the data directory has changed")
	}
}

// TestFullDisk stages a bundle on file systems of every size: it is refused before, or taken back.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=72m"); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(t.TempDir(), "b")
	m := simple(t)
	m.layouts = []string{writeTestLayout(t, "docker.io/library/one:1", strings.Repeat("x", 2<<20), strings.Repeat("y", 1<<20))}
	m.write(t, path)
	// Refused before, with what is missing.
	mustWrite(t, filepath.Join(dir, "other"), make([]byte, 4<<20))
	if err := install(t, path, filepath.Join(dir, "data")); !errors.As(err, new(*SpaceError)) {
		t.Errorf("a disk that is too small: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	// Somebody else fills the disk meanwhile.
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	full := false
	_, err = open(t, path).Stage(t.Context(), filepath.Join(dir, "data"), "amd64", func(done, total int64) {
		if !full && done > total/2 {
			full = true
			for err := error(nil); err == nil; {
				_, err = fill.Write(make([]byte, 64<<10))
			}
		}
	})
	if err == nil || !full {
		t.Fatalf("the full disk went unnoticed: %v", err)
	}
	wantError(t, err, "is full")
	if _, err := os.Lstat(filepath.Join(dir, "data")); err == nil {
		t.Errorf("left: %v", slices.Sorted(maps.Keys(tree(t, filepath.Join(dir, "data")))))
	}
}

func TestInterruptedStageIsContinued(t *testing.T) {
	older, newer := pair(t)
	data := t.TempDir()
	if err := install(t, older, data); err != nil {
		t.Fatal(err)
	}
	// A run that was killed after Stage, and one in the middle of a file.
	if _, err := open(t, newer).Stage(t.Context(), data, "amd64", nil); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(data, "images/bundle/blobs/sha256/.tmp-"+sumOf("layer of two")), []byte("layer"))
	if err := os.Remove(filepath.Join(data, "images/bundle/blobs/sha256", sumOf("layer of two"))); err != nil {
		t.Fatal(err)
	}
	if err := install(t, newer, data); err != nil {
		t.Fatal(err)
	}
	if err := install(t, older, data); err != nil {
		t.Fatal(err)
	}
	clean := t.TempDir()
	if err := install(t, older, clean); err != nil {
		t.Fatal(err)
	}
	if a, b := tree(t, data), tree(t, clean); !maps.Equal(a, b) {
		t.Errorf("after interruptions %v, without %v", slices.Sorted(maps.Keys(a)), slices.Sorted(maps.Keys(b)))
	}
}

func TestDiff(t *testing.T) {
	older, newer := pair(t)
	delta := filepath.Join(t.TempDir(), "delta")
	x, err := Diff(t.Context(), open(t, older), open(t, newer), delta, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := check(delta); err != nil {
		t.Fatal(err)
	}
	if x.ID() != open(t, newer).Index.ID() || x.Base != open(t, older).Index.ID() {
		t.Error("the difference does not install the newer bundle")
	}
	if text := string(mustRead(t, delta)); strings.Contains(text, "shared layer") || strings.Contains(text, "the program") || !strings.Contains(text, "layer of two") {
		t.Error("the difference has what the older bundle has, or lacks what it has not")
	}
	withOlder, whole := t.TempDir(), t.TempDir()
	for _, step := range []struct{ path, dir string }{{older, withOlder}, {delta, withOlder}, {newer, whole}} {
		if err := install(t, step.path, step.dir); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := tree(t, withOlder), tree(t, whole); !maps.Equal(a, b) {
		t.Errorf("after the difference %v, after the whole %v", slices.Sorted(maps.Keys(a)), slices.Sorted(maps.Keys(b)))
	}
	// Elsewhere it is refused, and changes nothing.
	elsewhere := filepath.Join(t.TempDir(), "data")
	err = install(t, delta, elsewhere)
	if !errors.As(err, new(*BaseError)) {
		t.Errorf("elsewhere: %v", err)
	}
	if _, err := os.Lstat(elsewhere); err == nil {
		t.Error("elsewhere something is left")
	}
	// A machine whose copy of an image's description was damaged.
	damaged := t.TempDir()
	if err := install(t, older, damaged); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(damaged, "images/bundle/blobs/sha256", open(t, older).Index.Images[0].Descriptor.Digest.Encoded())
	mustWrite(t, manifest, bytes.Replace(mustRead(t, manifest), []byte("schemaVersion\":2"), []byte("schemaVersion\":3"), 1))
	if err := install(t, delta, damaged); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a damaged machine: %v", err)
	}
	// A machine with the images, and another manifest.
	if err := os.Remove(filepath.Join(withOlder, "bundle/current")); err != nil {
		t.Fatal(err)
	}
	if err := install(t, delta, withOlder); !errors.As(err, new(*BaseError)) {
		t.Errorf("without the manifests of the older one: %v", err)
	}
	if _, err := Diff(t.Context(), open(t, older), open(t, delta), filepath.Join(t.TempDir(), "x"), nil); err == nil {
		t.Error("a difference to a difference was made")
	}
	wantError(t, open(t, delta).Extract(t.Context(), filepath.Join(t.TempDir(), "x"), nil), "extract the whole")
	// Run by itself, it looks for the kedge that is installed.
	if out, code, _ := runAs(t, delta, "x86_64", "install", "server"); code != 78 && !strings.Contains(out, "kedge") {
		t.Errorf("run by itself: %q, exit code %d", out, code)
	}
}

func TestExtract(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	m := simple(t)
	m.programs["arm64"] = tinyELF(arm64, "another program")
	m.layouts = nil
	m.write(t, path)
	dir := filepath.Join(t.TempDir(), "out")
	if err := open(t, path).Extract(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		".": "folder", "manifests": "folder", "config.yaml": m.config, "manifests/001-app.yaml": m.manifests["001-app.yaml"],
		"kedge-linux-amd64": string(m.programs["amd64"]), "kedge-linux-arm64": string(m.programs["arm64"]),
	}
	if got := tree(t, dir); !maps.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	wantError(t, open(t, path).Extract(t.Context(), dir, nil), "exists")
	// Images are an OCI layout again, of which the same bundle can be made.
	older, _ := pair(t)
	from := filepath.Join(t.TempDir(), "out")
	if err := open(t, older).Extract(t.Context(), from, nil); err != nil {
		t.Fatal(err)
	}
	if found, err := readLayout(filepath.Join(from, "images")); err != nil || len(found) != 1 {
		t.Errorf("layout %v, %v", found, err)
	}
	// A damaged bundle leaves no folder.
	whole := mustRead(t, older)
	mustWrite(t, older, []byte(strings.Replace(string(whole), "layer of one", "layer of ten", 1)))
	bad := filepath.Join(t.TempDir(), "out")
	if err := open(t, older).Extract(t.Context(), bad, nil); !errors.As(err, new(*DamagedError)) {
		t.Errorf("damaged: %v", err)
	}
	if _, err := os.Lstat(bad); err == nil {
		t.Error("a damaged bundle leaves a folder")
	}
}

// TestInterruptedByTheUser ends what takes long at once, and leaves nothing.
func TestInterruptedByTheUser(t *testing.T) {
	older, newer := pair(t)
	stopped, stop := context.WithCancel(t.Context())
	stop()
	dir := t.TempDir()
	delta, data, out := filepath.Join(dir, "delta"), filepath.Join(dir, "data"), filepath.Join(dir, "out")
	if _, err := Diff(stopped, open(t, older), open(t, newer), delta, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("diff: %v", err)
	}
	if _, err := open(t, older).Stage(stopped, data, "amd64", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("stage: %v", err)
	}
	if err := open(t, older).Extract(stopped, out, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("extract: %v", err)
	}
	if err := open(t, older).Verify(stopped, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("verify: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
