package runtime

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestExitCodesOutliveTheProcess has containers end while no process serves the node. How
// and when they ended, and what they said last, must be known to the next.
func TestExitCodesOutliveTheProcess(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	n.start()
	n.expect("imported")
	for _, way := range []struct {
		name string
		end  func()
	}{{"stopped", n.stop}, {"killed", n.kill}} {
		codes := map[string]int32{"zero": 0, "seven": 7}
		ids := map[string]string{}
		n.withCRI(func(ctx context.Context, c criClient) {
			for name, code := range codes {
				// A signal says when to end.
				ids[name] = n.runPod(ctx, c, way.name+"-"+name, "busybox:test",
					"sh", "-c", "trap 'echo last words; exit "+strconv.Itoa(int(code))+"' TERM; while :; do sleep 0.1; done")
			}
		})
		pids := map[string]int{}
		n.withCRI(func(ctx context.Context, c criClient) {
			for name, id := range ids {
				pids[name] = n.pid(ctx, c, id)
			}
		})
		time.Sleep(200 * time.Millisecond) // the shell has its trap
		way.end()
		for _, pid := range pids {
			p, err := os.FindProcess(pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		for name, pid := range pids {
			for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err != nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: process %d has not ended", name, pid)
				}
			}
		}
		ended := time.Now()
		time.Sleep(2 * time.Second) // so that the time of the start is another
		n.start()
		n.expect("imported")
		n.withCRI(func(ctx context.Context, c criClient) {
			for name, id := range ids {
				r, err := c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
				if err != nil {
					t.Fatal(err)
				}
				s := r.Status
				want := map[int32]string{0: "Completed", 7: "Error"}[codes[name]]
				if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != codes[name] || s.Reason != want {
					t.Errorf("%s, %s: %s with code %d (%s), want %d (%s)", way.name, name, s.State, s.ExitCode, s.Reason, codes[name], want)
				}
				if at := time.Unix(0, s.FinishedAt); at.After(ended.Add(time.Second)) || at.Before(ended.Add(-20*time.Second)) {
					t.Errorf("%s, %s: it ended at %s, want shortly before %s", way.name, name, at, ended)
				}
				log, err := os.ReadFile(filepath.Join(n.cfg.RunDir, "logs", way.name+"-"+name+".log"))
				if err != nil || !strings.Contains(string(log), "last words") {
					t.Errorf("%s, %s: its log is %q, %v", way.name, name, log, err)
				}
			}
			if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
				t.Error(err)
			}
		})
	}
	n.stop()
}
