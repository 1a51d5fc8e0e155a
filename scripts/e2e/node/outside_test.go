package node

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// changed is what was written outside of the folders that a node in this world may
// write to, and is still there.
func changed(t *testing.T, w *harness.World) []string {
	t.Helper()
	upper := filepath.Join(w.Changes, "upper")
	var found []string
	err := filepath.WalkDir(upper, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, upper)
		// A folder that only leads to something is no change of its own.
		if d.IsDir() {
			if entries, err := os.ReadDir(path); err != nil || len(entries) > 0 || slices.Contains(harness.Watched, rel) {
				return err
			}
		}
		found = append(found, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestNothingOutsideAndNoPrograms boots a node that finds no program of the host, and
// sees the host's folders below overlays that keep what is written to them.
func TestNothingOutsideAndNoPrograms(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	n.World = &harness.World{Changes: filepath.Join(n.Dir, "changes"), Keep: n.Dir}
	w := n.World
	t.Cleanup(func() { n.World = nil }) // killall runs on the machine itself
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {key: value}}`)
	n.Apply(t, ns, `{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {key: secret}}`)
	n.Apply(t, ns, harness.ShellWith("p", "cat /c/key /s/key /sub; echo; awk '$2 == \"/m\" {print $3}' /proc/mounts; exec probe serve :8080 web",
		"volumes: [{name: c, configMap: {name: c}}, {name: s, secret: {secretName: s}}, {name: m, emptyDir: {medium: Memory}}, {name: e, emptyDir: {}}],",
		"ports: [{containerPort: 8080, hostPort: "+fmt.Sprint(n.APIPort+2001)+"}], volumeMounts: [{name: c, mountPath: /c}, {name: s, mountPath: /s}, {name: m, mountPath: /m}, {name: c, mountPath: /sub, subPath: key}, {name: e, mountPath: /e, subPath: a/b}],"))
	n.WaitPod(t, ns, "p", false)
	harness.Eventually(t, 10*time.Second, func() error { return n.LogsHave(ns, "p", "valuesecretvalue\ntmpfs\n") })
	if got := n.Kubectl(t, "exec", "-n", ns, "p", "--", "sh", "-c", "touch /e/f && ls /e"); got != "f\n" {
		t.Errorf("exec prints %q", got)
	}
	harness.Eventually(t, 10*time.Second, func() error {
		return harness.CheckAnswer(fmt.Sprint("http://", n.Address(t), ":", n.APIPort+2001, "/"), "web")
	})
	if lines := n.LogLines(t, "executable file not found"); len(lines) > 0 {
		t.Errorf("it looks for programs of the host:\n%s", strings.Join(lines, "\n"))
	}
	n.Kubectl(t, "delete", "pod", "-n", ns, "p")
	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	// The one exception: docs/decisions/device-plugin-path.md.
	allowed := func(path string) bool { return strings.HasPrefix(path, "/var/lib/kubelet/device-plugins") }
	changed := changed(t, w)
	if !slices.ContainsFunc(changed, allowed) {
		t.Errorf("not even the exception is seen: %v", changed)
	}
	for _, path := range changed {
		if !allowed(path) {
			t.Errorf("it has written %s", path)
		}
	}
}
