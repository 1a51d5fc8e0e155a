package commandline

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"kedge/scripts/e2e/harness"
)

// TestRunDirectoryOfAnother: whoever is started with the run directory of a running node
// is told so, and the node has kept its sockets and its containers.
func TestRunDirectoryOfAnother(t *testing.T) {
	t.Parallel()
	first := harness.Shared(t)
	socket := func() (modified string) {
		for _, name := range []string{"kedge.sock", "containerd/containerd.sock"} {
			st, err := os.Stat(filepath.Join(first.RunDir(), name))
			if err != nil {
				t.Fatal(err)
			}
			modified += fmt.Sprintln(name, st.ModTime())
		}
		return modified
	}
	before := socket()
	second := harness.Own(t)
	if err := os.MkdirAll(second.DataDir(), 0o755); err != nil { // killall wants one
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(second.Dir, "config.yaml"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("kedge: the run directory is in use: another kedge (process %d) runs with %s; stop it, or choose another with --run-dir\n", first.Cmd.Process.Pid, first.RunDir())
	for _, command := range []string{"server", "killall"} {
		out, err := second.Command(command, "--run-dir="+first.RunDir())
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || out != want {
			t.Errorf("%s: %v, and it says\n%s\nwant\n%s", command, err, out, want)
		}
	}
	if after := socket(); after != before {
		t.Errorf("sockets of the first node before:\n%safter:\n%s", before, after)
	}
	if out, err := exec.Command(harness.Binary(), "status", "--run-dir="+first.RunDir()).CombinedOutput(); err != nil {
		t.Errorf("the first node: %v\n%s", err, out)
	}
}
