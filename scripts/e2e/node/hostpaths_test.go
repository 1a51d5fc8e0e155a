package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestHostPaths: a CSI driver and a log collector, whose manifests have the host's places in them,
// find what they look for.
func TestHostPaths(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a := f.NewAgent(t, "--token="+f.NewToken(t), "--host-paths")
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	ns := f.Namespace(t)
	onAgent := fmt.Sprintf("nodeName: %s,", a.Name)
	f.Apply(t, ns, harness.Shell("says", "echo collected; exec sleep 3600", onAgent+` volumes: [{name: v, emptyDir: {}}],`))
	f.WaitPod(t, ns, "says", false)
	f.Apply(t, ns, harness.ShellWith("looks", `
		until grep -q collected /var/log/containers/says_*.log; do sleep 0.2; done
		ls -d /var/lib/kubelet/pods/*/volumes /var/lib/kubelet/plugins_registry && echo found; exec sleep 3600`,
		onAgent+` volumes: [{name: k, hostPath: {path: /var/lib/kubelet, type: Directory}}, {name: l, hostPath: {path: /var/log}}],`,
		`volumeMounts: [{name: k, mountPath: /var/lib/kubelet, mountPropagation: Bidirectional}, {name: l, mountPath: /var/log}], securityContext: {privileged: true},`))
	f.WaitPod(t, ns, "looks", false)
	harness.Eventually(t, 20*time.Second, func() error { return f.LogsHave(ns, "looks", "found") })

	// The volumes of its pods must not be left behind.
	a.Stop(t, syscall.SIGTERM, 20*time.Second)
	without := a.Flags
	a.Flags = nil
	for _, flag := range without {
		if flag != "--host-paths" {
			a.Flags = append(a.Flags, flag)
		}
	}
	if out, err := a.Command("agent"); err == nil || !strings.Contains(out, "kedge killall") {
		t.Errorf("without the flag it starts, or says: %v %s", err, out)
	}
	a.Flags = without
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(a.DataDir(), "kubelet")); err == nil {
		t.Error("there is a folder of the kubelet below the data directory as well")
	}
}
