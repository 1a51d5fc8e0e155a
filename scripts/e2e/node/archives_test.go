package node

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/internal/test/image"
	"kedge/scripts/e2e/harness"
)

// archives is a node with archives of images in its folder, good ones and others.
type archives struct {
	*harness.Node
	folder string // of images
	whole  []byte // the archive of which half is there at first
}

// smallImage is an image of a few bytes.
func smallImage(tag, content string) image.Image {
	return image.Image{Name: "example.org/small:" + tag, Files: map[string]image.File{"/content": {Data: []byte(content)}}}
}

// write writes a file into the folder.
func (a *archives) write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(a.folder, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// list is what "kedge images ls" prints.
func (a *archives) list(t *testing.T) string {
	t.Helper()
	out, err := a.Run("images", "ls", "--run-dir="+a.RunDir())
	if err != nil {
		t.Fatalf("images ls: %v\n%s", err, out)
	}
	return out
}

// pinned says whether a list of images has a line of the image, and whether it is pinned.
func pinned(list, name string) (there, yes bool) {
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == name {
			return true, f[len(f)-1] == "pinned"
		}
	}
	return false, false
}

// restart starts the node again, with a new log.
func (a *archives) restart(t *testing.T) {
	t.Helper()
	a.Stop(t, syscall.SIGTERM, 10*time.Second)
	if err := os.Remove(a.LogFile()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestImagesFolder: archives that cannot be used are named once each and keep nothing
// back; those that can are imported once, pinned, and again only when they change.
func TestImagesFolder(t *testing.T) {
	t.Parallel()
	a := newArchives(t)
	a.goodAreThere(t)
	a.changesAreImported(t)
	t.Run("export, remove, import", a.exportRemoveImport)
	t.Run("containerd's client", a.client)
}

func newArchives(t *testing.T) *archives {
	t.Helper()
	a := &archives{Node: harness.Own(t)}
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	a.folder = filepath.Join(a.DataDir(), "images")
	whole := filepath.Join(a.Dir, "whole.tar")
	image.Write(t, whole, image.OCI, smallImage("half", strings.Repeat("x", 100_000)))
	var err error
	if a.whole, err = os.ReadFile(whole); err != nil {
		t.Fatal(err)
	}
	a.write(t, "a-half.tar", a.whole[:len(a.whole)/2])
	a.write(t, "b-text.tar", []byte("this is no archive\n"))
	a.write(t, "c-empty.tar.gz", nil)
	a.write(t, "notes.txt", []byte("not looked at"))
	foreign := smallImage("foreign", "1")
	foreign.Architecture = "s390x"
	image.Write(t, filepath.Join(a.folder, "d-foreign.tar"), image.OCI, foreign)
	image.Write(t, filepath.Join(a.folder, "e-good.tar.zst"), image.Docker, smallImage("good", "1"))
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	return a
}

// goodAreThere sees a complaint of each bad archive, and the images of the others.
func (a *archives) goodAreThere(t *testing.T) {
	for file, want := range map[string]string{
		"a-half.tar":     "image archive a-half.tar ends too early; copy it again, and rename it into the folder when it is complete",
		"b-text.tar":     "image archive b-text.tar ",
		"c-empty.tar.gz": "image archive c-empty.tar.gz ",
		"d-foreign.tar":  "image archive d-foreign.tar contains 1 image for linux/s390x, but this node runs linux/",
	} {
		lines := a.LogLines(t, file)
		complaints := 0
		for _, l := range lines {
			if strings.Contains(l, "level=ERROR") {
				complaints++
				if !strings.Contains(l, want) || !strings.Contains(l, "copy it again") && !strings.Contains(l, "provide the archive for") && !strings.Contains(l, "neither manifest.json") {
					t.Errorf("of %s the log says %s", file, l)
				}
			}
		}
		if complaints != 1 {
			t.Errorf("of %s the log says %d things:\n%s", file, complaints, strings.Join(lines, "\n"))
		}
	}
	list := a.list(t)
	for _, name := range []string{"example.org/small:good", harness.Busybox, harness.Agnhost} {
		if there, yes := pinned(list, name); !there || !yes {
			t.Errorf("%s is not there and pinned:\n%s", name, list)
		}
	}
	for _, name := range []string{"example.org/small:half", "example.org/small:foreign"} {
		if there, _ := pinned(list, name); there {
			t.Errorf("%s is there:\n%s", name, list)
		}
	}
}

// changesAreImported starts the node again, first with nothing changed but a time, and then with a mended archive, a changed
// one, and one that is gone.
func (a *archives) changesAreImported(t *testing.T) {
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(a.folder, "e-good.tar.zst"), later, later); err != nil {
		t.Fatal(err)
	}
	a.restart(t)
	if lines := a.LogLines(t, "importing images"); len(lines) > 0 {
		t.Errorf("nothing has changed, but\n%s", strings.Join(lines, "\n"))
	}
	a.write(t, "a-half.tar", a.whole)
	image.Write(t, filepath.Join(a.folder, "e-good.tar.zst"), image.Docker, smallImage("good", "2"))
	if err := os.Remove(filepath.Join(a.folder, "images.tar")); err != nil {
		t.Fatal(err)
	}
	a.restart(t)
	if lines := a.LogLines(t, "importing images"); len(lines) != 2 {
		t.Errorf("two have changed, but\n%s", strings.Join(lines, "\n"))
	}
	list := a.list(t)
	if there, yes := pinned(list, "example.org/small:half"); !there || !yes {
		t.Errorf("the mended archive's image is not there and pinned:\n%s", list)
	}
	if there, yes := pinned(list, harness.Busybox); !there || yes {
		t.Errorf("the image whose archive is gone should be there and not pinned:\n%s", list)
	}
}

// exportRemoveImport does with the command what the folder does at a start.
func (a *archives) exportRemoveImport(t *testing.T) {
	archive := filepath.Join(a.Dir, "exported.tar")
	for _, step := range []struct{ args, want string }{
		{"images export --run-dir=$RUN -o " + archive + " " + harness.Busybox, ""},
		{"images rm --run-dir=$RUN " + harness.Busybox, "removed " + harness.Busybox + "\n"},
		{"images import --run-dir=$RUN " + archive, harness.Busybox + "\n"},
	} {
		out, err := a.Run(strings.Fields(strings.ReplaceAll(step.args, "$RUN", a.RunDir()))...)
		if err != nil || !strings.HasPrefix(out, step.want) {
			t.Fatalf("%s: %v: %q", step.args, err, out)
		}
		there, _ := pinned(a.list(t), harness.Busybox)
		if want := !strings.HasPrefix(step.args, "images rm"); there != want {
			t.Fatalf("after %s: there is %v", step.args, there)
		}
	}
	ns := a.Namespace(t)
	if got := a.RunPod(t, ns, "p", "echo imported", ""); got != "imported\n" {
		t.Errorf("a pod of it prints %q", got)
	}
	if out, err := a.Run("images", "export", "--run-dir="+a.RunDir(), "-o", filepath.Join(a.Dir, "none.tar"), "example.org/none:1"); err == nil {
		t.Errorf("what is not there was exported: %s", out)
	}
	if left, _ := filepath.Glob(filepath.Join(a.Dir, "*none.tar*")); len(left) > 0 {
		t.Errorf("a failed export leaves %v", left)
	}
	if out, err := a.Run("images", "import", "--run-dir="+a.RunDir(), filepath.Join(a.folder, "b-text.tar")); err == nil || !strings.HasPrefix(out, "kedge: image archive b-text.tar ") {
		t.Errorf("import of a text: %v: %s", err, out)
	}
}

// client asks containerd's own client.
func (a *archives) client(t *testing.T) {
	cmd := a.World.Command(append(os.Environ(), "KEDGE_RUN_DIR="+a.RunDir()), "ctr", "images", "ls", "name==example.org/small:good")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "io.cri-containerd.pinned=pinned") {
		t.Errorf("%v: %s", err, out)
	}
}
