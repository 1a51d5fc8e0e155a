package e2e

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
)

// changed is what was written outside of the folders that a node in this world may
// write to, and is still there.
func (w *world) changed(t *testing.T) []string {
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
			if entries, err := os.ReadDir(path); err != nil || len(entries) > 0 || slices.Contains(watched, rel) {
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
	n := own(t)
	if err := prepareImages(n.dataDir()); err != nil {
		t.Fatal(err)
	}
	n.world = &world{Changes: filepath.Join(n.dir, "changes"), Keep: n.dir}
	w := n.world
	t.Cleanup(func() { n.world = nil }) // killall runs on the machine itself
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	ns := n.namespace(t)
	n.apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {key: value}}`)
	n.apply(t, ns, `{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {key: secret}}`)
	n.apply(t, ns, shellWith("p", "cat /c/key /s/key /sub; echo; awk '$2 == \"/m\" {print $3}' /proc/mounts; exec probe serve :8080 web",
		"volumes: [{name: c, configMap: {name: c}}, {name: s, secret: {secretName: s}}, {name: m, emptyDir: {medium: Memory}}, {name: e, emptyDir: {}}],",
		"ports: [{containerPort: 8080, hostPort: "+fmt.Sprint(n.apiPort+2001)+"}], volumeMounts: [{name: c, mountPath: /c}, {name: s, mountPath: /s}, {name: m, mountPath: /m}, {name: c, mountPath: /sub, subPath: key}, {name: e, mountPath: /e, subPath: a/b}],"))
	n.waitPod(t, ns, "p", false)
	eventually(t, 10*time.Second, func() error { return n.logsHave(ns, "p", "valuesecretvalue\ntmpfs\n") })
	if got := n.kubectl(t, "exec", "-n", ns, "p", "--", "sh", "-c", "touch /e/f && ls /e"); got != "f\n" {
		t.Errorf("exec prints %q", got)
	}
	eventually(t, 10*time.Second, func() error {
		return answers(fmt.Sprint("http://", n.address(t), ":", n.apiPort+2001, "/"), "web")
	})
	if lines := n.logLines(t, "executable file not found"); len(lines) > 0 {
		t.Errorf("it looks for programs of the host:\n%s", strings.Join(lines, "\n"))
	}
	n.kubectl(t, "delete", "pod", "-n", ns, "p")
	n.stop(t, syscall.SIGTERM, 10*time.Second)
	// The one exception: docs/decisions/device-plugin-path.md.
	allowed := func(path string) bool { return strings.HasPrefix(path, "/var/lib/kubelet/device-plugins") }
	changed := w.changed(t)
	if !slices.ContainsFunc(changed, allowed) {
		t.Errorf("not even the exception is seen: %v", changed)
	}
	for _, path := range changed {
		if !allowed(path) {
			t.Errorf("it has written %s", path)
		}
	}
}
