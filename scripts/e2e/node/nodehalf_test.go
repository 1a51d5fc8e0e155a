package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"kedge/internal/lifecycle"
	"kedge/scripts/e2e/harness"
)

// TestNodesHalfFails has parts of a server's node fail. The API answers meanwhile, in the
// same process, status says what is wrong, and it mends itself when that is over.
func TestNodesHalfFails(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	inTheWay := filepath.Join(n.DataDir(), "kubelet", "pods") // a file where the kubelet wants a folder
	if err := errors.Join(os.MkdirAll(filepath.Dir(inTheWay), 0o750), os.WriteFile(inTheWay, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := n.Launch(); err != nil {
		t.Fatal(err)
	}
	alive := func() {
		t.Helper()
		select {
		case <-n.Done:
			t.Fatalf("kedge ended: %v", n.Err)
		default:
		}
	}
	harness.Eventually(t, 90*time.Second, func() error {
		alive()
		if _, err := os.Stat(n.RunDir() + "/kedge.sock"); err != nil {
			return err
		}
		if k := n.StatusOf(t, "kubelet"); k.Restarts < 2 || !strings.Contains(k.Error, "kubelet/pods: not a directory") {
			return fmt.Errorf("the kubelet is %+v", k)
		}
		return nil
	})
	if a := n.StatusOf(t, "api"); a.State != lifecycle.Ready {
		t.Errorf("the API is %s", a.State)
	}
	if out, err := n.TryKubectl(nil, "get", "namespaces", "-o", "name"); err != nil || !strings.Contains(out, "namespace/kube-system") {
		t.Errorf("the API says %q, %v", out, err)
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitReady(2 * time.Minute); err != nil {
		t.Fatal(err)
	}

	// containerd cannot do without the folder of its network's configuration.
	before := n.StatusOf(t, "containerd")
	if before.Restarts != 0 {
		t.Errorf("containerd was restarted: %+v", before)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("before", "echo one; sleep 3600", ""))
	n.WaitPod(t, ns, "before", false)
	conf := filepath.Join(n.DataDir(), "cni", "net.d")
	kept, err := os.ReadDir(conf)
	if err != nil || len(kept) != 1 {
		t.Fatalf("configurations of the network: %v, %v", kept, err)
	}
	file := filepath.Join(conf, kept[0].Name())
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(conf); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		alive()
		if c := n.StatusOf(t, "containerd"); c.Restarts == 0 || !strings.Contains(c.LastError, "containerd gave up") {
			return fmt.Errorf("containerd is %+v", c)
		}
		return nil
	})
	if err := errors.Join(os.MkdirAll(conf, 0o755), os.WriteFile(file, text, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitReady(90 * time.Second); err != nil {
		t.Fatal(err)
	}
	if p, err := n.Pod(ns, "before"); err != nil || harness.ContainerStatus(p, "main").RestartCount != 0 || p.Status.Phase != corev1.PodRunning {
		t.Errorf("the pod that ran before: %v, %+v", err, p.Status)
	}
	n.Apply(t, ns, harness.Shell("after", "echo two", ""))
	if got := n.Output(t, ns, "after"); got != "two\n" {
		t.Errorf("a new pod printed %q", got)
	}
	alive()
}

// TestKubeletGivesUp has the kubelet fail where it would end its process: the user has
// changed a policy that upstream does not change over a state file. The server goes on
// without it, says so, and the cluster takes the node for gone.
func TestKubeletGivesUp(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if err := n.Signal(syscall.SIGTERM, 15*time.Second); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(n.DataDir(), "kubelet", "cpu_manager_state")
	text, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	flags := n.Flags
	n.Flags = append(slices.Clone(flags), "--kubelet-arg=cpu-manager-policy=static", "--kubelet-arg=kube-reserved=cpu=100m")
	if err := n.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 90*time.Second, func() error {
		select {
		case <-n.Done:
			t.Fatalf("kedge ended: %v", n.Err)
		default:
		}
		if _, err := os.Stat(n.RunDir() + "/kedge.sock"); err != nil {
			return err
		}
		k := n.StatusOf(t, "kubelet")
		if k.State != lifecycle.Failed || !strings.Contains(k.Error, "differs from state checkpoint policy") || !strings.Contains(k.Error, "restart kedge") {
			return fmt.Errorf("the kubelet is %+v", k)
		}
		return nil
	})
	harness.Eventually(t, 90*time.Second, func() error {
		ready := n.Kubectl(t, "get", "node", n.Name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if ready != "Unknown" {
			return fmt.Errorf("the node is Ready: %s", ready)
		}
		return nil
	})
	if now, err := os.ReadFile(state); err != nil || string(now) != string(text) {
		t.Errorf("the state file, in which nothing is wrong, has become %q, %v", now, err)
	}
	if err := n.Signal(syscall.SIGTERM, 15*time.Second); err != nil {
		t.Fatal(err)
	}
	n.Flags = flags
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedKubelet fills the kubelet's state files with garbage.
func TestDamagedKubelet(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("before", "sleep 3600", ""))
	n.WaitPod(t, ns, "before", false)
	if err := n.Signal(syscall.SIGTERM, 15*time.Second); err != nil {
		t.Fatal(err)
	}
	files := []string{"cpu_manager_state", "memory_manager_state", "allocated_pods_state", "actuated_pods_state", "dra_manager_state"}
	for i, name := range files {
		garbage := [][]byte{[]byte("garbage"), nil, []byte(`{"policyName":"none","checksum":1}`)}[i%3]
		if err := os.WriteFile(filepath.Join(n.DataDir(), "kubelet", name), garbage, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if said := n.LogLines(t, "kubelet/"+name+" "); len(said) != 1 || !strings.Contains(said[0], "a damaged state file of the kubelet was set aside") {
			t.Errorf("of %s the log says %q", name, said)
		}
		if kept, _ := filepath.Glob(filepath.Join(n.DataDir(), "kubelet", name+".damaged-*")); len(kept) != 1 {
			t.Errorf("of %s were kept %v", name, kept)
		}
	}
	if p, err := n.Pod(ns, "before"); err != nil || harness.ContainerStatus(p, "main").RestartCount != 0 {
		t.Errorf("the pod that ran: %v, %+v", err, p.Status)
	}
	n.Apply(t, ns, harness.Shell("after", "echo alive", ""))
	if got := n.Output(t, ns, "after"); got != "alive\n" {
		t.Errorf("a new pod printed %q", got)
	}
}

// TestEndedWhileAway has containers end while kedge does not run: the pods and the job know
// how.
func TestEndedWhileAway(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		ns := n.Namespace(t)
		dir := harness.HostDir(t)
		until := "while test ! -f /v/end; do sleep 0.1; done; date +%s >/v/$NAME; "
		spec := func(name, script string) string {
			return fmt.Sprintf(`{terminationGracePeriodSeconds: 1, restartPolicy: Never, volumes: [{name: v, hostPath: {path: %s}}],
				containers: [{name: main, image: %q, env: [{name: NAME, value: %s}], command: [sh, -c, %q], volumeMounts: [{name: v, mountPath: /v}]}]}`, dir, harness.Busybox, name, until+script)
		}
		for name, script := range map[string]string{"good": "exit 0", "bad": "exit 7"} {
			n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: %s}`, name, spec(name, script)))
			n.WaitPod(t, ns, name, false)
		}
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: batch/v1, kind: Job, metadata: {name: job}, spec: {backoffLimit: 0, template: {spec: %s}}}`, spec("job", "exit 0")))
		harness.Eventually(t, 30*time.Second, func() error {
			if out := n.Kubectl(t, "-n", ns, "get", "job", "job", "-o", "jsonpath={.status.ready}"); out != "1" {
				return fmt.Errorf("%q pods of the job are ready", out)
			}
			return nil
		})
		if err := n.Signal(sig, 15*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "end"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, 20*time.Second, func() error {
			for _, name := range []string{"good", "bad", "job"} {
				if harness.FileContent(dir, name) == "" {
					return errors.New(name + " has not ended")
				}
			}
			return nil
		})
		away := time.Now()
		time.Sleep(3 * time.Second) // the API's times are of whole seconds
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		for name, code := range map[string]int32{"good": 0, "bad": 7} {
			p := n.WaitPod(t, ns, name, true)
			s := harness.ContainerStatus(p, "main").State.Terminated
			want := map[int32]string{0: "Completed", 7: "Error"}[code]
			if s == nil || s.ExitCode != code || s.Reason != want || s.FinishedAt.After(away.Add(time.Second)) {
				t.Errorf("%s: %s: it is %s, %+v; want code %d, %s, before %s", sig, name, p.Status.Phase, s, code, want, away)
			}
		}
		harness.Eventually(t, 30*time.Second, func() error {
			if out := n.Kubectl(t, "-n", ns, "get", "job", "job", "-o", "jsonpath={.status.succeeded} {.status.failed}"); out != "1 " {
				return fmt.Errorf("succeeded, failed: %q", out)
			}
			return nil
		})
	}
}

// TestRunDirectoryGone removes the run directory of a running node. Its sockets are made
// again and its pods started anew.
func TestRunDirectoryGone(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [sleep, "3600"]}]}}`, harness.Busybox))
	n.WaitPod(t, ns, "p", false)
	entries, err := os.ReadDir(n.RunDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		_ = os.RemoveAll(filepath.Join(n.RunDir(), e.Name())) // what is mounted stays, as with rm -rf
	}
	harness.Eventually(t, 90*time.Second, func() error {
		select {
		case <-n.Done:
			t.Fatalf("kedge ended: %v", n.Err)
		default:
		}
		p, err := n.Pod(ns, "p")
		if err != nil {
			return err
		}
		if c := harness.ContainerStatus(p, "main"); c.RestartCount == 0 || c.State.Running == nil || !c.Ready {
			return fmt.Errorf("its container is %+v", c)
		}
		return nil
	})
	if err := n.WaitReady(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	if said := n.LogLines(t, "the run directory was removed while kedge ran"); len(said) != 1 {
		t.Errorf("the log says %q", said)
	}
	if out := n.Kubectl(t, "-n", ns, "exec", "p", "--", "echo", "hello"); out != "hello\n" {
		t.Errorf("exec said %q", out)
	}
	n.Apply(t, ns, harness.Shell("after", "echo alive", ""))
	if got := n.Output(t, ns, "after"); got != "alive\n" {
		t.Errorf("a new pod printed %q", got)
	}
}
