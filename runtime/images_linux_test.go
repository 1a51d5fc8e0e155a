package runtime

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kedge/internal/testimage"
)

// TestImages puts good and bad archives into the folder and looks at what becomes
// of them, over several starts.
func TestImages(t *testing.T) {
	n := newNode(t)
	dir := n.cfg.imagesDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	other := "arm64"
	if goruntime.GOARCH == other {
		other = "amd64"
	}
	busybox := testimage.BusyboxImage(t, "busybox:one")
	busybox.Files["/which"] = testimage.File{Data: []byte("one")}
	testimage.Write(t, file("docker.tar.gz"), testimage.Docker, busybox)
	busybox.Name, busybox.Files["/which"] = "registry.example.com/team/tool:v2", testimage.File{Data: []byte("two")}
	testimage.Write(t, file("oci.tar.zst"), testimage.OCI, busybox)
	busybox.Name, busybox.Files["/which"] = "latest", testimage.File{Data: []byte("three")}
	testimage.Write(t, file("tag-only.tar"), testimage.OCI, busybox)
	testimage.Write(t, file("foreign.tar"), testimage.Docker, testimage.Image{Name: "strange:1", Architecture: other,
		Files: map[string]testimage.File{"/a": {Data: []byte("a")}}})
	// Saved where only one of its architectures was present: the right one, the wrong one.
	busybox.Name, busybox.Missing = "several:right", []string{other, "s390x"}
	testimage.Write(t, file("several-right.tar"), testimage.OCI, busybox)
	testimage.Write(t, file("several-wrong.tar"), testimage.OCI, testimage.Image{Name: "several:wrong", Architecture: "s390x",
		Missing: []string{goruntime.GOARCH}, Files: map[string]testimage.File{"/a": {Data: []byte("b")}}})
	whole, err := os.ReadFile(file("docker.tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"half.tar.gz":   whole[:len(whole)/2],
		"empty.tar":     {},
		"garbage.tar":   []byte(strings.Repeat("no archive ", 1000)),
		".hidden.tar":   whole,
		"notes.txt":     []byte("not for import"),
		"part.tar.part": whole,
	} {
		if err := os.WriteFile(file(name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}

	n.start()
	n.expect("imported")
	want := []string{"docker.io/library/busybox:one", "docker.io/library/several:right", "kedge.local/imported/tag-only:latest", "registry.example.com/team/tool:v2"}
	n.wantPinned(want)
	log := n.readLog()
	for _, sentence := range []string{
		"image archive foreign.tar holds 1 image for linux/" + other + ", but this node runs linux/",
		"image archive several-wrong.tar holds 1 image for linux/s390x, but this node runs linux/" + goruntime.GOARCH + ";",
		"image archive half.tar.gz ends too early",
		"image archive empty.tar ",
		"image archive garbage.tar ",
	} {
		if c := strings.Count(log, sentence); c != 1 {
			t.Errorf("log has %d times %q, want once", c, sentence)
		}
	}

	// Nothing is imported twice, and problems are said again.
	n.stop()
	n.start()
	n.expect("imported")
	log = n.readLog()
	if c := strings.Count(log, `msg="imported images"`); c != 4 {
		t.Errorf("%d imports in two starts, want 4 in the first and none in the second", c)
	}
	if c := strings.Count(log, "image archive half.tar.gz ends too early"); c != 2 {
		t.Errorf("the sentence about half.tar.gz was said %d times in two starts, want 2", c)
	}
	n.wantPinned(want)

	// A digest works offline as well as a tag; commands see the same images.
	var out bytes.Buffer
	ctx := t.Context()
	if err := ListImages(ctx, n.cfg.Socket(), &out); err != nil {
		t.Error(err)
	}
	for _, name := range want {
		if !strings.Contains(out.String(), name) {
			t.Errorf("list lacks %s:\n%s", name, &out)
		}
	}
	var exported bytes.Buffer
	if err := ExportImages(ctx, n.cfg.Socket(), &exported, []string{"busybox:one"}); err != nil {
		t.Error(err)
	}
	if err := RemoveImages(ctx, n.cfg.Socket(), &out, []string{"busybox:one"}); err != nil {
		t.Error(err)
	}
	if err := RemoveImages(ctx, n.cfg.Socket(), &out, []string{"busybox:one"}); err == nil || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("removing twice said %v", err)
	}
	carried := filepath.Join(filepath.Dir(n.cfg.DataDir), "carried.tar")
	if err := os.WriteFile(carried, exported.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if err := ImportImages(ctx, n.cfg.Socket(), &out, []string{carried}); err != nil {
		t.Error(err)
	}
	if !strings.Contains(out.String(), "docker.io/library/busybox:one\n") {
		t.Errorf("import printed %q", &out)
	}

	// An image whose archive is gone may be collected, one that was removed returns.
	if err := RemoveImages(ctx, n.cfg.Socket(), &out, []string{"busybox:one"}); err != nil {
		t.Error(err)
	}
	if err := os.Remove(file("oci.tar.zst")); err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.start()
	n.expect("imported")
	n.wantPinned([]string{"docker.io/library/busybox:one", "docker.io/library/several:right", "kedge.local/imported/tag-only:latest"})
	n.stop()
}

// wantPinned compares the names of pinned images, the pause image apart.
func (n *node) wantPinned(want []string) {
	n.t.Helper()
	n.withCRI(func(ctx context.Context, c criClient) {
		list, err := c.ListImages(ctx, &cri.ListImagesRequest{})
		if err != nil {
			n.t.Fatal(err)
		}
		got := map[string]bool{}
		for _, img := range list.Images {
			for _, tag := range img.RepoTags {
				if img.Pinned && !strings.HasPrefix(tag, pauseRepository) {
					got[tag] = true
				}
			}
			if img.Pinned && len(img.RepoDigests) == 0 && !strings.HasPrefix(strings.Join(img.RepoTags, ""), pauseRepository) {
				n.t.Errorf("image %v has no name by digest", img.RepoTags)
			}
		}
		if names := sortedKeys(got); strings.Join(names, " ") != strings.Join(want, " ") {
			n.t.Errorf("pinned images are %v, want %v", names, want)
		}
	})
}

func (n *node) readLog() string {
	n.t.Helper()
	text, err := os.ReadFile(n.logged.Name())
	if err != nil {
		n.t.Fatal(err)
	}
	return string(text)
}
