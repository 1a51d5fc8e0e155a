package commandline

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"kedge/scripts/e2e/harness"
)

// TestRunScript runs what `make run` and `make stop` run, told by the environment to
// keep to a node of its own.
func TestRunScript(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	script := func(args ...string) (string, error) {
		cmd := exec.Command(harness.InProject("scripts/run.sh"), args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Kubeconfig)
		for _, flag := range n.Args() {
			name, value, _ := strings.Cut(strings.TrimPrefix(flag, "--"), "=")
			cmd.Env = append(cmd.Env, "KEDGE_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+value)
		}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.Dir+"/config.yaml", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Remember(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			_, _ = script("stop")
		}
	})
	out, err := script()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// From outside, by the address of the load balancer, and from a pod, by name.
	if got := strings.Count(out, "\nHello from kedge!\n"); got != 2 {
		t.Errorf("the application answered %d times, want 2:\n%s", got, out)
	}
	if !strings.Contains(out, " Ready ") {
		t.Errorf("no node is shown to be ready:\n%s", out)
	}
	out, err = script("stop")
	stopped = err == nil
	if err != nil {
		t.Fatalf("stop: %v\n%s", err, out)
	}
	if out, err := n.Command("status"); err == nil {
		t.Errorf("after the stop its status is\n%s", out)
	}
}
