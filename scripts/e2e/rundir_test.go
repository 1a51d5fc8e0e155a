package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestRunDirectoryOfAnother: whoever is started with the run directory of a running node
// is told so, and the node has kept its sockets and its containers.
func TestRunDirectoryOfAnother(t *testing.T) {
	t.Parallel()
	first := shared(t)
	socket := func() (modified string) {
		for _, name := range []string{"kedge.sock", "containerd/containerd.sock"} {
			st, err := os.Stat(filepath.Join(first.runDir(), name))
			if err != nil {
				t.Fatal(err)
			}
			modified += fmt.Sprintln(name, st.ModTime())
		}
		return modified
	}
	before := socket()
	second := own(t)
	if err := os.MkdirAll(second.dataDir(), 0o755); err != nil { // killall wants one
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(second.dir, "config.yaml"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("kedge: the run directory is in use: another kedge (process %d) runs with %s; stop it, or choose another with --run-dir\n", first.cmd.Process.Pid, first.runDir())
	for _, command := range []string{"server", "killall"} {
		out, err := second.command(command, "--run-dir="+first.runDir())
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || out != want {
			t.Errorf("%s: %v, and it says\n%s\nwant\n%s", command, err, out, want)
		}
	}
	if after := socket(); after != before {
		t.Errorf("sockets of the first node before:\n%safter:\n%s", before, after)
	}
	if out, err := exec.Command(binary(), "status", "--run-dir="+first.runDir()).CombinedOutput(); err != nil {
		t.Errorf("the first node: %v\n%s", err, out)
	}
}
