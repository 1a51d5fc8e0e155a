package harness

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// StartKubectl starts a kubectl that runs until the test ends.
func (n *Node) StartKubectl(t *testing.T, stdin io.Reader, stdout io.Writer, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, Binary(), append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Kubeconfig, "KUBECACHEDIR="+filepath.Join(BaseDir, "cache"))
	cmd.Stdin, cmd.Stdout = stdin, stdout
	cmd.WaitDelay = time.Second
	if err := n.Inside(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
}

// LineWriter returns a writer and what gives the next line written to it, or an error
// when there is none within ten seconds.
func LineWriter(t *testing.T) (io.Writer, func() (string, error)) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	out := make(chan string, 100)
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			out <- s.Text()
		}
	}()
	return w, func() (string, error) {
		select {
		case l := <-out:
			return l, nil
		case <-time.After(Patient(10 * time.Second)):
			return "", errors.New("nothing more is printed")
		}
	}
}
