package appliance

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestInstallWitness: a witness is installed like a server, starts again without a token, and is removed without leftovers.
func TestInstallWitness(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t, "--disable-agent")
	token := f.WitnessToken(t)
	w := harness.NewNode("witness")
	f.GiveMachine(t, w)
	w.Witness = true
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", w.Name, w.Tail(40))
		}
		if err := w.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	install := append([]string{"install", "server", "--bin-dir=/root/bin", "--server=" + f.URL(), "--token=" + token}, w.Args()...)
	if out, err := w.RunKedge(install...); err != nil || !strings.Contains(out, "/root/bin/kedge server\n") {
		t.Fatalf("%v\n%s", err, out)
	}
	config, err := os.ReadFile(w.Machine.Disk("/etc/kedge/config.yaml"))
	if err != nil || !strings.Contains(string(config), "witness: true\n") || strings.Contains(string(config), token) {
		t.Errorf("the configuration is\n%s\n(%v)", config, err)
	}
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if out := f.Kedge(t, "server", "ls"); !strings.Contains(out, "witness  reachable") {
			return errors.New(out)
		}
		return nil
	})
	if out, err := w.RunKedge("install", "server", "--bin-dir=/root/bin"); err != nil {
		t.Fatalf("again: %v\n%s", err, out)
	}
	if _, err := os.Stat(w.Machine.Disk("/etc/kedge/token")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the token is still there: %v", err)
	}
	f.Kedge(t, "server", "remove", w.Name)
	select {
	case <-w.Done:
	case <-time.After(harness.Patient(20 * time.Second)):
		w.Stop(t, syscall.SIGKILL, 10*time.Second)
		t.Error("the witness goes on after its removal")
	}
	out, err := w.RunKedge("uninstall", "--purge")
	if err != nil || !strings.HasSuffix(out, "kedge is removed\n") || strings.Contains(out, "stays") {
		t.Errorf("uninstall: %v\n%s", err, out)
	}
}
