package harness

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
)

// LogLines are the lines of the node's log with text in them.
func (n *Node) LogLines(t *testing.T, text string) []string {
	t.Helper()
	log, err := os.ReadFile(n.LogFile())
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

// Run runs a kedge command with just these arguments.
func (n *Node) Run(args ...string) (string, error) {
	out, err := n.World.Command(n.Env, args...).CombinedOutput()
	if err != nil && len(out) == 0 {
		out = fmt.Append(nil, err)
	}
	return string(out), err
}

// Stop sends sig and checks how the node ends.
func (n *Node) Stop(t *testing.T, sig syscall.Signal, limit time.Duration) {
	t.Helper()
	begin := time.Now()
	if err := n.Signal(sig, limit); err != nil {
		t.Fatalf("%v\n%s", err, n.Tail(20))
	}
	t.Logf("%s took %s", sig, time.Since(begin).Round(time.Millisecond))
	if sig == syscall.SIGTERM && n.Err != nil {
		t.Errorf("after SIGTERM it ended with %v\n%s", n.Err, n.Tail(20))
	}
}

// Refusal runs the node, which must end by itself with exit code 1, or 78 where it stays so, and returns what
// it printed besides its log.
func (n *Node) Refusal(t *testing.T) string {
	t.Helper()
	_ = os.Remove(n.LogFile())
	if err := n.Launch(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-n.Done:
	case <-time.After(Patient(30 * time.Second)):
		t.Fatalf("still running:\n%s", n.Tail(20))
	}
	var exit *exec.ExitError
	if !errors.As(n.Err, &exit) || exit.ExitCode() != 1 && exit.ExitCode() != 78 {
		t.Errorf("it ended with %v, want exit code 1 or 78", n.Err)
	}
	log, err := os.ReadFile(n.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	var printed bytes.Buffer
	for line := range bytes.Lines(log) {
		if !bytes.HasPrefix(line, []byte("time=")) {
			printed.Write(line)
		}
	}
	n.World = nil // for the cleaning up
	return printed.String()
}

// StatusOf is what "kedge status" says of a component, which it must know.
func (n *Node) StatusOf(t *testing.T, name string) lifecycle.Status {
	t.Helper()
	status, err := n.TryStatusOf(name)
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// TryStatusOf is [Node.StatusOf] for a node that may not run.
func (n *Node) TryStatusOf(name string) (lifecycle.Status, error) {
	// The command's exit code says that something is not ready.
	out, err := exec.Command(Binary(), "status", "-o=json", "--run-dir="+n.RunDir()).Output()
	var r control.Report
	if bad := json.Unmarshal(out, &r); bad != nil {
		return lifecycle.Status{}, fmt.Errorf("status: %w", errors.Join(err, bad))
	}
	for _, c := range r.Components {
		if c.Name == name {
			return c, nil
		}
	}
	return lifecycle.Status{}, fmt.Errorf("status has no component %s:\n%s", name, out)
}

// Kedge runs a command that asks the node's process.
func (n *Node) Kedge(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.TryKedge(args...)
	if err != nil {
		t.Fatalf("kedge %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// TryKedge is [Node.Kedge] for commands that may fail.
func (n *Node) TryKedge(args ...string) (string, error) {
	var out bytes.Buffer
	i := 2 // before the arguments of a command and its subcommand
	cmd := exec.Command(Binary(), append(append(append([]string{}, args[:i]...), "--run-dir="+n.RunDir()), args[i:]...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}
