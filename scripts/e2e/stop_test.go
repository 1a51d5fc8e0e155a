package e2e

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
	n := own(t)
	if err := prepareImages(n.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	ns := n.namespace(t)
	n.apply(t, ns, shell("p", "echo begun; exec sleep 3600", ""))
	n.waitPod(t, ns, "p", false)
	begin := func(says string, args ...string) {
		t.Helper()
		cmd := exec.Command(binary(), append([]string{"kubectl", "-n", ns}, args...)...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+n.kubeconfig, "KUBECACHEDIR="+filepath.Join(baseDir, "cache"))
		var out output
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill() // if it does not end with its server
			_ = cmd.Wait()
		})
		eventually(t, 20*time.Second, func() error { return out.has(says) })
	}
	begin("in exec", "exec", "p", "--", "sh", "-c", "echo in exec; exec sleep 3600")
	begin("begun", "logs", "-f", "p")
	begin("Running", "get", "pods", "--watch")
	begin("Forwarding from", "port-forward", "p", fmt.Sprint(n.apiPort+2001, ":8080"))
	n.stop(t, syscall.SIGTERM, 10*time.Second)
	log, err := os.ReadFile(n.logFile())
	if err != nil {
		t.Fatal(err)
	}
	if _, stop, _ := strings.Cut(string(log), "stopping; containers go on running"); strings.Contains(stop, "level=ERROR") || !strings.Contains(stop, "component=datastore") {
		t.Errorf("the stop was not in order:\n%s", stop)
	}
}
