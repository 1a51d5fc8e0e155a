package runtime

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRunDirectoryRemoved removes the run directory under a running pod, with and without a
// process that serves the node. It must be as after a reboot: the pod's processes are gone,
// the pod is not ready, and new ones can be made.
func TestRunDirectoryRemoved(t *testing.T) {
	n := newNode(t)
	n.cfg.CNIConfDir = filepath.Join(n.cfg.DataDir, "cni") // where kedge has it
	n.importImage("busybox:test")
	n.start()
	n.expect("imported")
	remove := func() {
		// What is mounted cannot be removed, as with rm -rf.
		entries, err := os.ReadDir(n.cfg.RunDir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			_ = os.RemoveAll(filepath.Join(n.cfg.RunDir, e.Name()))
		}
	}
	for round, again := range []func(){
		func() {
			remove()
			n.expect("failed: " + n.cfg.Socket() + ": " + errRemoved.Error())
			n.expect("ready")
			n.expect("imported")
		},
		func() {
			n.kill()
			remove()
			n.start()
			n.expect("imported")
		},
	} {
		var pids []int
		n.withCRI(func(ctx context.Context, c criClient) {
			for _, name := range []string{"a", "b"} {
				id := n.runPod(ctx, c, name+strconv.Itoa(round), "busybox:test", "sh", "-c", "sleep 3600 & exec sleep 3600")
				pids = append(pids, n.pid(ctx, c, id))
			}
		})
		below, err := descendants(pids)
		if err != nil || len(below) != 2 {
			t.Fatalf("below %v are %v, %v; want one each", pids, below, err)
		}
		again()
		for _, pid := range append(pids, below...) {
			if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
				t.Errorf("round %d: process %d still runs", round, pid)
			}
		}
		if said := strings.Count(n.readLog(), "the run directory was removed under running pods"); said != round+1 {
			t.Errorf("round %d: it was said %d times", round, said)
		}
		n.withCRI(func(ctx context.Context, c criClient) {
			list, err := c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			if err != nil {
				t.Fatal(err)
			}
			for _, pod := range list.Items {
				if pod.State == cri.PodSandboxState_SANDBOX_READY {
					t.Errorf("round %d: pod %s is still ready", round, pod.Metadata.Name)
				}
			}
			n.pid(ctx, c, n.runPod(ctx, c, "after"+strconv.Itoa(round), "busybox:test", "sleep", "3600"))
			if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
				t.Error(err)
			}
		})
	}
	n.stop()
}
