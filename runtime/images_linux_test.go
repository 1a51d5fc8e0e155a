package runtime

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kedge/internal/test/image"
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
	busybox := image.BusyboxImage(t, "busybox:one")
	busybox.Files["/which"] = image.File{Data: []byte("one")}
	image.Write(t, file("docker.tar.gz"), image.Docker, busybox)
	busybox.Name, busybox.Files["/which"] = "registry.example.com/team/tool:v2", image.File{Data: []byte("two")}
	image.Write(t, file("oci.tar.zst"), image.OCI, busybox)
	busybox.Name, busybox.Files["/which"] = "latest", image.File{Data: []byte("three")}
	image.Write(t, file("tag-only.tar"), image.OCI, busybox)
	image.Write(t, file("foreign.tar"), image.Docker, image.Image{Name: "strange:1", Architecture: other,
		Files: map[string]image.File{"/a": {Data: []byte("a")}}})
	// Saved where only one of its architectures was present: the right one, the wrong one.
	busybox.Name, busybox.Missing = "several:right", []string{other, "s390x"}
	image.Write(t, file("several-right.tar"), image.OCI, busybox)
	image.Write(t, file("several-wrong.tar"), image.OCI, image.Image{Name: "several:wrong", Architecture: "s390x",
		Missing: []string{goruntime.GOARCH}, Files: map[string]image.File{"/a": {Data: []byte("b")}}})
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
		"image archive foreign.tar contains 1 image for linux/" + other + ", but this node runs linux/",
		"image archive several-wrong.tar contains 1 image for linux/s390x, but this node runs linux/" + goruntime.GOARCH + ";",
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

// TestJoinedArchives: what cat makes of several archives holds the images of all of them.
func TestJoinedArchives(t *testing.T) {
	n := newNode(t)
	n.start()
	n.expect("imported")
	dir := filepath.Dir(n.cfg.DataDir)
	archive := func(file, name string) []byte {
		img := image.Image{Name: name, Files: map[string]image.File{"/name": {Data: []byte(name)}}}
		image.Write(t, filepath.Join(dir, file), image.OCI, img)
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	one, two := archive("one.tar", "joined:one"), archive("two.tar", "joined:two")
	gz := slices.Concat(archive("three.tar.gz", "joined:three"), archive("four.tar.gz", "joined:four"))
	padding := make([]byte, 4096)
	var raw bytes.Buffer // what containerd's client logs, which is not for users
	logrus.SetOutput(&raw)
	defer logrus.SetOutput(os.Stderr)
	for name, tc := range map[string]struct {
		data     []byte
		want     []string
		sentence string
	}{
		"plain":               {slices.Concat(one, two), []string{"one", "two"}, ""},
		"padded":              {slices.Concat(one, padding, two, padding), []string{"one", "two"}, ""},
		"compressed":          {gz, []string{"three", "four"}, ""},
		"plain, compressed":   {slices.Concat(one, gz), []string{"one", "three", "four"}, ""},
		"garbage behind":      {slices.Concat(one, bytes.Repeat([]byte("no archive "), 1000)), []string{"one"}, "is damaged or not an image archive"},
		"the second is short": {slices.Concat(one, two[:1000]), []string{"one"}, "ends too early"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(dir, "joined.tar")
			if err := os.WriteFile(file, tc.data, 0o600); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err := ImportImages(t.Context(), n.cfg.Socket(), &out, []string{file})
			if (err == nil) != (tc.sentence == "") || err != nil && !strings.Contains(err.Error(), tc.sentence) {
				t.Errorf("said %v, want %q", err, tc.sentence)
			}
			var tags []string
			for line := range strings.Lines(out.String()) {
				if tag, ok := strings.CutPrefix(strings.TrimSpace(line), "docker.io/library/joined:"); ok {
					tags = append(tags, tag)
				}
			}
			if !slices.Equal(tags, tc.want) {
				t.Errorf("imported %v, want %v", tags, tc.want)
			}
		})
	}
	if raw.Len() > 0 {
		t.Errorf("beside the errors it printed %s", &raw)
	}
	n.stop()
}

// TestArchiveOfSameSizeAndTime replaces an archive in the folder by one that only its
// content tells apart.
func TestArchiveOfSameSizeAndTime(t *testing.T) {
	n := newNode(t)
	dir := n.cfg.imagesDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "a.tar")
	write := func(tag string) {
		image.Write(t, file, image.OCI, image.Image{Name: "same:" + tag, Files: map[string]image.File{"/tag": {Data: []byte(tag)}}})
		if err := os.Chtimes(file, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
	}
	size := func() int64 {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	write("one")
	before := size()
	n.start()
	n.expect("imported")
	n.stop()
	write("two") // into the same file: the inode is the same too
	if size() != before {
		t.Skip("the archives have other sizes")
	}
	n.start()
	n.expect("imported")
	n.wantPinned([]string{"docker.io/library/same:two"})
	n.stop()
	if c := strings.Count(n.readLog(), `msg="imported images"`); c != 2 {
		t.Errorf("%d imports, want 2", c)
	}
}

func TestOtherCompressionsAreNamed(t *testing.T) {
	for magic, want := range map[string]string{
		"\xfd7zXZ\x00rest": `is compressed with xz, which kedge does not read: unpack it with "xz -d"`,
		"\x04\x22\x4d\x18": "is compressed with lz4",
		"PK\x03\x04":       "is compressed with zip",
	} {
		_, err := decompress("a.tar.x", bufio.NewReader(strings.NewReader(magic)))
		var about *archiveError
		if !errors.As(readError("a.tar.x", err), &about) || !strings.Contains(about.Error(), "image archive a.tar.x "+want) {
			t.Errorf("%q: %v, want %q", magic, err, want)
		}
	}
	for _, name := range []string{"a.tar.xz", "a.tar.bz2", "a.tar.lz4", "a.txz"} {
		if !isArchive(name) {
			t.Errorf("nothing is said of %s in the folder", name)
		}
	}
}

// TestImportLeavesSpace: an archive that does not fit is refused before the disk is full.
func TestImportLeavesSpace(t *testing.T) {
	var free atomic.Int64
	free.Store(1 << 30)
	defer func(before func(string) (int64, int64, error)) { statfs = before }(statfs)
	statfs = func(string) (int64, int64, error) { return 10 << 30, free.Load(), nil }
	l := layers{"overlayfs", "/data/layers"}
	if err := l.fits("a.tar", 400<<20); err != nil {
		t.Errorf("it would fit: %v", err)
	}
	err := l.fits("a.tar", 600<<20)
	if err == nil || !strings.Contains(err.Error(), "image archive a.tar does not fit on the disk of /data/layers: it needs at least 600MiB; 1GiB are free, of which 512MiB are reserved") {
		t.Errorf("it does not fit: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := watchSpace(t.Context(), l.dir)
		defer stop()
		time.Sleep(time.Minute)
		if ctx.Err() != nil {
			t.Fatal("it ended although there was space")
		}
		free.Store(500 << 20)
		<-ctx.Done()
		var full *fullError
		if !errors.As(context.Cause(ctx), &full) {
			t.Errorf("it ended because of %v", context.Cause(ctx))
		}
	})
}
