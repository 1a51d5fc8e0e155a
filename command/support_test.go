package command

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"kedge/settings"
)

// TestSupportBundle: a file for its owner only, which replaces none, and of which nothing is left after a failure.
func TestSupportBundle(t *testing.T) {
	root(t)
	p := newProgram()
	file := filepath.Join(t.TempDir(), "b")
	code, out, errOut := p.run("support-bundle", "--config=/dev/null", "--data-dir=/d", "-o", file)
	if want := fmt.Sprintf("not in it: journal: none\nwrote %s: 1 files, 0 KiB\n", file); code != 0 || out != want || settings.DataDir.In(p.node.Values) != "/d" {
		t.Errorf("exit code %d, %q, %q", code, out, errOut)
	}
	st, err := os.Stat(file)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if data, _ := os.ReadFile(file); len(data) == 0 {
		t.Error("the file is empty")
	}
	if code, _, errOut := p.run("support-bundle", "--config=/dev/null", "-o", file); code != 78 || errOut != "kedge: "+file+" exists; remove it, or name another file with --output\n" {
		t.Errorf("exit code %d, %q", code, errOut)
	}
	p.checked = errors.New("disk full")
	if code, _, _ := p.run("support-bundle", "--config=/dev/null", "-o", file+"2"); code != 1 {
		t.Errorf("exit code %d", code)
	}
	if _, err := os.Stat(file + "2"); err == nil {
		t.Error("a part of a bundle is left")
	}
	t.Chdir(t.TempDir())
	p.checked = nil
	if code, _, errOut := p.run("support-bundle", "--config=/dev/null"); code != 0 {
		t.Errorf("exit code %d, %q", code, errOut)
	}
	if found, _ := filepath.Glob("kedge-support-*.tar.zst"); len(found) != 1 {
		t.Errorf("wrote %q", found)
	}
}
