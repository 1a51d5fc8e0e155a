package lifecycle

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestEndSupervision: a supervisor that is the parent is told to stop, and its answer awaited; another parent is left alone.
func TestEndSupervision(t *testing.T) {
	if os.Getenv("KEDGE_TEST_SUPERVISED") != "" {
		begin := time.Now()
		if err := EndSupervision(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); os.Getenv("KEDGE_TEST_SUPERVISED") == "supervise-daemon" && (took < 300*time.Millisecond || took >= supervisorLimit) {
			t.Errorf("the answer came after %s", took)
		}
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	for name, want := range map[string]int{"supervise-daemon": 100, "other": 7} {
		link := filepath.Join(t.TempDir(), name)
		if err := os.Symlink(shell, link); err != nil {
			t.Fatal(err)
		}
		// The exit code is 7 without a signal, and otherwise 100 and that of the child.
		cmd := exec.Command(link, "-c", `
			trap 'sleep 0.3; kill -TERM $child; wait $child; exit $((100 + $?))' TERM
			"$0" -test.run='TestEndSupervision$' >/dev/null & child=$!
			wait $child && exit 7`, self)
		cmd.Env = append(os.Environ(), "KEDGE_TEST_SUPERVISED="+name, "RC_SVCNAME=kedge")
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != want {
			t.Errorf("%s: %v, want exit code %d", name, err, want)
		}
	}
}
