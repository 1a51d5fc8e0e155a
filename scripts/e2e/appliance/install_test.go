package appliance

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestInstallWithoutServiceManager: everything but the service is installed, the command that is printed runs the node, and
// nothing of it is left by "kedge uninstall --purge".
func TestInstallWithoutServiceManager(t *testing.T) {
	for _, dir := range []string{"/run/systemd/system", "/sbin/openrc-run"} {
		if _, err := os.Stat(dir); err == nil {
			harness.SkipLacking(t, "this machine has a service manager: %s", dir)
		}
	}
	n := harness.Own(t)
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// Folders of completion are the machine's: what is written there goes into an overlay.
	n.World = &harness.World{Changes: filepath.Join(n.Dir, "changes"), Keep: n.Dir}
	w := n.World
	// A package of the distribution has put a file of completion there that is kedge's own, byte for byte.
	script, err := n.RunKedge("completion", "fish")
	theirs := filepath.Join(w.Changes, "upper/usr/share/fish/vendor_completions.d/kedge.fish")
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(theirs), 0o755), os.WriteFile(theirs, []byte(script), 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.World = nil })
	config, bin := filepath.Join(n.Dir, "config.yaml"), filepath.Join(n.Dir, "bin")
	if err := os.WriteFile(config, []byte("# of the user\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(want int, args ...string) string {
		t.Helper()
		out, err := n.RunKedge(args...)
		code := 0
		if exit, ok := err.(*exec.ExitError); ok {
			code = exit.ExitCode()
		}
		if code != want {
			t.Fatalf("kedge %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	install := append([]string{"install", "server", "--bin-dir=" + bin}, n.Args()...)
	plan := run(0, append(install, "--dry-run")...)
	for _, text := range []string{"copy " + harness.Binary() + " to " + bin + "/kedge\n", "  +node-name: " + n.Name + "\n"} {
		if !strings.Contains(plan, text) {
			t.Errorf("the plan lacks %q:\n%s", text, plan)
		}
	}
	if _, err := os.Stat(bin); err == nil {
		t.Error("--dry-run has changed something")
	}
	command := bin + "/kedge server --config=" + config
	if out := run(0, append(install, "--node-label=a=b", "--node-label=c=d")...); !strings.Contains(out, "start at boot, as root:\n  "+command+"\n") {
		t.Errorf("it prints\n%s", out)
	}
	if out := run(0, "install", "server", "--bin-dir="+bin, "--config="+config, "--dry-run"); !strings.Contains(out, "nothing to change") {
		t.Errorf("a second time it prints\n%s", out)
	}
	// The other role is refused with the way forward.
	if out := run(78, "install", "agent", "--bin-dir="+bin, "--config="+config, "--server=https://192.0.2.1:6443", "--token=x"); !strings.Contains(out, "cannot become an agent") {
		t.Errorf("another role: %s", out)
	}
	if err := n.Launch(); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitReady(time.Minute); err != nil {
		t.Fatalf("%v\n%s", err, n.Tail(20))
	}
	if out := n.Kubectl(t, "get", "node", n.Name, "-o", "jsonpath={.metadata.labels.a} {.metadata.labels.c}"); out != "b d" {
		t.Errorf("labels %q", out)
	}
	// Nothing is removed under a running kedge.
	if out := run(1, "uninstall", "--config="+config); !strings.Contains(out, "in use: another kedge") {
		t.Errorf("it prints %s", out)
	}
	if _, err := os.Stat(bin + "/kedge"); err != nil {
		t.Error(err)
	}
	if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(n.DataDir(), "of-the-user")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	snapshot := filepath.Join(n.DataDir(), "snapshots", "before-upgrade-x.db")
	for _, path := range []string{snapshot, filepath.Join(n.DataDir(), "server.before-restore-20260101T000000Z", "tls", "server-ca.key")} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	run(0, "uninstall", "--config="+config) // the data stays
	for _, path := range []string{filepath.Join(n.DataDir(), "server", "tls"), snapshot} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	run(0, "install", "server", "--bin-dir="+bin, "--config="+config)
	if out := run(0, "uninstall", "--purge", "--config="+config); !strings.HasSuffix(out, "kedge: "+n.DataDir()+" stays, with files that are not kedge's: of-the-user\nkedge is removed\n") {
		t.Errorf("it prints\n%s", out)
	}
	var left []string
	for _, dir := range []string{n.DataDir(), n.RunDir(), bin, config, n.Kubeconfig, filepath.Join(w.Changes, "upper", "usr")} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && path != precious && path != theirs && (!d.IsDir() || dir == n.RunDir()) {
				left = append(left, fs.FormatDirEntry(d)+" in "+filepath.Dir(path)) // a device hides a file that the machine had
			}
			return nil
		})
	}
	if len(left) > 0 {
		t.Errorf("left: %s", strings.Join(left, "\n"))
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("a file of the user: %v", err)
	}
	if now, err := os.ReadFile(theirs); err != nil || string(now) != script {
		t.Errorf("a file of a package: %q, %v", now, err)
	}
	// Nothing of the node is left for the clean-up.
	if err := os.RemoveAll(n.DataDir()); err != nil {
		t.Error(err)
	}
}
