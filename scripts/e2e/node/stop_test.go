package node

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// output is what a program has printed so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) has(text string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if strings.Contains(o.text.String(), text) {
		return nil
	}
	return fmt.Errorf("it has printed %q, not %q", o.text.String(), text)
}

// TestStopWithRequestsOpen: clients that wait for the node to say more do not keep it
// from stopping in order, in time.
func TestStopWithRequestsOpen(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("p", "echo begun; exec sleep 3600", ""))
	n.WaitPod(t, ns, "p", false)
	begin := func(says string, args ...string) {
		t.Helper()
		cmd := exec.Command(harness.Binary(), append([]string{"kubectl", "-n", ns}, args...)...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Kubeconfig, "KUBECACHEDIR="+filepath.Join(harness.BaseDir, "cache"))
		var out output
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill() // if it does not end with its server
			_ = cmd.Wait()
		})
		harness.Eventually(t, 20*time.Second, func() error { return out.has(says) })
	}
	begin("in exec", "exec", "p", "--", "sh", "-c", "echo in exec; exec sleep 3600")
	begin("begun", "logs", "-f", "p")
	begin("Running", "get", "pods", "--watch")
	begin("Forwarding from", "port-forward", "p", fmt.Sprint(n.APIPort+2001, ":8080"))
	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	log, err := os.ReadFile(n.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	if _, stop, _ := strings.Cut(string(log), "stopping; containers go on running"); strings.Contains(stop, "level=ERROR") || !strings.Contains(stop, "component=datastore") {
		t.Errorf("the stop was not in order:\n%s", stop)
	}
}
