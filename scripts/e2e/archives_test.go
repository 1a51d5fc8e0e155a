package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/internal/testimage"
)

// logLines are the lines of the node's log with text in them.
func (n *node) logLines(t *testing.T, text string) []string {
	t.Helper()
	log, err := os.ReadFile(n.logFile())
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, text) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// TestImagesFolder: archives that cannot be used are named once each and keep nothing
// back; those that can are imported once, pinned, and again only when they change.
func TestImagesFolder(t *testing.T) {
	t.Parallel()
	n := own(t)
	if err := prepareImages(n.dataDir()); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(n.dataDir(), "images")
	small := func(tag, content string) testimage.Image {
		return testimage.Image{Name: "example.org/small:" + tag, Files: map[string]testimage.File{"/content": {Data: []byte(content)}}}
	}
	whole := filepath.Join(n.dir, "whole.tar")
	testimage.Write(t, whole, testimage.OCI, small("half", strings.Repeat("x", 100_000)))
	data, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("a-half.tar", data[:len(data)/2])
	write("b-text.tar", []byte("this is no archive\n"))
	write("c-empty.tar.gz", nil)
	write("notes.txt", []byte("not looked at"))
	foreign := small("foreign", "1")
	foreign.Architecture = "s390x"
	testimage.Write(t, filepath.Join(dir, "d-foreign.tar"), testimage.OCI, foreign)
	testimage.Write(t, filepath.Join(dir, "e-good.tar.zst"), testimage.Docker, small("good", "1"))
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"a-half.tar":     "image archive a-half.tar ends too early; copy it again, and rename it into the folder when it is complete",
		"b-text.tar":     "image archive b-text.tar ",
		"c-empty.tar.gz": "image archive c-empty.tar.gz ",
		"d-foreign.tar":  "image archive d-foreign.tar holds 1 image for linux/s390x, but this node runs linux/",
	} {
		lines := n.logLines(t, file)
		complaints := 0
		for _, l := range lines {
			if strings.Contains(l, "level=ERROR") {
				complaints++
				if !strings.Contains(l, want) || !strings.Contains(l, "copy it again") && !strings.Contains(l, "bring the archive for") && !strings.Contains(l, "neither manifest.json") {
					t.Errorf("of %s the log says %s", file, l)
				}
			}
		}
		if complaints != 1 {
			t.Errorf("of %s the log says %d things:\n%s", file, complaints, strings.Join(lines, "\n"))
		}
	}
	images := func() string {
		out, err := n.run("images", "ls", "--run-dir="+n.runDir())
		if err != nil {
			t.Fatalf("images ls: %v\n%s", err, out)
		}
		return out
	}
	// pinned is whether there is a line of the image, and whether it is pinned.
	pinned := func(list, name string) (there, yes bool) {
		for line := range strings.Lines(list) {
			if f := strings.Fields(line); len(f) > 0 && f[0] == name {
				return true, f[len(f)-1] == "pinned"
			}
		}
		return false, false
	}
	list := images()
	for _, name := range []string{"example.org/small:good", busybox, agnhost} {
		if there, yes := pinned(list, name); !there || !yes {
			t.Errorf("%s is not there and pinned:\n%s", name, list)
		}
	}
	for _, name := range []string{"example.org/small:half", "example.org/small:foreign"} {
		if there, _ := pinned(list, name); there {
			t.Errorf("%s is there:\n%s", name, list)
		}
	}

	restart := func() {
		t.Helper()
		n.stop(t, syscall.SIGTERM, 10*time.Second)
		if err := os.Remove(n.logFile()); err != nil {
			t.Fatal(err)
		}
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
	}
	// Nothing changed; one was touched; one is mended, one changed, one gone.
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(dir, "e-good.tar.zst"), later, later); err != nil {
		t.Fatal(err)
	}
	restart()
	if lines := n.logLines(t, "importing images"); len(lines) > 0 {
		t.Errorf("nothing has changed, but\n%s", strings.Join(lines, "\n"))
	}
	write("a-half.tar", data)
	testimage.Write(t, filepath.Join(dir, "e-good.tar.zst"), testimage.Docker, small("good", "2"))
	if err := os.Remove(filepath.Join(dir, "images.tar")); err != nil {
		t.Fatal(err)
	}
	restart()
	if lines := n.logLines(t, "importing images"); len(lines) != 2 {
		t.Errorf("two have changed, but\n%s", strings.Join(lines, "\n"))
	}
	list = images()
	if there, yes := pinned(list, "example.org/small:half"); !there || !yes {
		t.Errorf("the mended archive's image is not there and pinned:\n%s", list)
	}
	if there, yes := pinned(list, busybox); !there || yes {
		t.Errorf("the image whose archive is gone should be there and not pinned:\n%s", list)
	}

	t.Run("export, remove, import", func(t *testing.T) {
		archive := filepath.Join(n.dir, "exported.tar")
		for _, step := range []struct{ args, want string }{
			{"images export --run-dir=$RUN -o " + archive + " " + busybox, ""},
			{"images rm --run-dir=$RUN " + busybox, "removed " + busybox + "\n"},
			{"images import --run-dir=$RUN " + archive, busybox + "\n"},
		} {
			out, err := n.run(strings.Fields(strings.ReplaceAll(step.args, "$RUN", n.runDir()))...)
			if err != nil || !strings.HasPrefix(out, step.want) {
				t.Fatalf("%s: %v: %q", step.args, err, out)
			}
			there, _ := pinned(images(), busybox)
			if want := !strings.HasPrefix(step.args, "images rm"); there != want {
				t.Fatalf("after %s: there is %v", step.args, there)
			}
		}
		ns := n.namespace(t)
		if got := n.runPod(t, ns, "p", "echo imported", ""); got != "imported\n" {
			t.Errorf("a pod of it prints %q", got)
		}
		if out, err := n.run("images", "export", "--run-dir="+n.runDir(), "-o", filepath.Join(n.dir, "none.tar"), "example.org/none:1"); err == nil {
			t.Errorf("what is not there was exported: %s", out)
		}
		if left, _ := filepath.Glob(filepath.Join(n.dir, "*none.tar*")); len(left) > 0 {
			t.Errorf("a failed export leaves %v", left)
		}
		if out, err := n.run("images", "import", "--run-dir="+n.runDir(), filepath.Join(dir, "b-text.tar")); err == nil || !strings.HasPrefix(out, "kedge: image archive b-text.tar ") {
			t.Errorf("import of a text: %v: %s", err, out)
		}
	})
	t.Run("containerd's client", func(t *testing.T) {
		cmd := n.world.command(append(os.Environ(), "KEDGE_RUN_DIR="+n.runDir()), "ctr", "images", "ls", "name==example.org/small:good")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "io.cri-containerd.pinned=pinned") {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// run runs a kedge command with just these arguments.
func (n *node) run(args ...string) (string, error) {
	out, err := n.world.command(n.env, args...).CombinedOutput()
	if err != nil && len(out) == 0 {
		out = fmt.Append(nil, err)
	}
	return string(out), err
}
