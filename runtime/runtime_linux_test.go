package runtime

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kedge/internal/test/image"
)

// criClient is the two services of the CRI on one connection.
type criClient struct {
	cri.RuntimeServiceClient
	cri.ImageServiceClient
}

// withCRI calls f with a client and a context that ends before the test does.
func (n *node) withCRI(f func(context.Context, criClient)) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	err := withClient(n.cfg.Socket(), func(c *containerd.Client) error {
		conn := connection(c)
		f(ctx, criClient{cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)})
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// runPod starts a pod on the host's network with one container, and returns the
// container's identity.
func (n *node) runPod(ctx context.Context, c criClient, name, image string, command ...string) string {
	n.t.Helper()
	namespaces := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	pod := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: filepath.Join(n.cfg.RunDir, "logs"),
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    n.cgroup(),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces},
		},
	}
	sandbox, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})
	if err != nil {
		n.t.Fatalf("run pod: %v", err)
	}
	container, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  sandbox.PodSandboxId,
		SandboxConfig: pod,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: image},
			Command:  command,
			LogPath:  name + ".log",
			Linux:    &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: namespaces}},
		},
	})
	if err != nil {
		n.t.Fatalf("create container: %v", err)
	}
	if _, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		n.t.Fatalf("start container: %v", err)
	}
	return container.ContainerId
}

// pid is the number of a running container's first process.
func (n *node) pid(ctx context.Context, c criClient, container string) int {
	n.t.Helper()
	status, err := c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: container, Verbose: true})
	if err != nil {
		n.t.Fatal(err)
	}
	if status.Status.State != cri.ContainerState_CONTAINER_RUNNING {
		n.t.Fatalf("container is %s: %s", status.Status.State, status.Status.Message)
	}
	_, after, _ := strings.Cut(status.Info["info"], `"pid":`)
	digits, _, _ := strings.Cut(after, ",")
	pid, err := strconv.Atoi(strings.TrimSpace(digits))
	if err != nil {
		n.t.Fatalf("no pid in %s", status.Info["info"])
	}
	return pid
}

func (n *node) importImage(name string) {
	n.t.Helper()
	if err := os.MkdirAll(n.cfg.imagesDir(), 0o755); err != nil {
		n.t.Fatal(err)
	}
	image.Write(n.t, filepath.Join(n.cfg.imagesDir(), "busybox.tar.zst"), image.Docker, image.BusyboxImage(n.t, name))
}

// TestNativeSnapshotter runs a pod where overlayfs is not to be used, and finds the
// node still choosing the same at the next start without being told.
func TestNativeSnapshotter(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	if err := os.MkdirAll(n.cfg.root(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.cfg.SnapshotterFile(), []byte("native\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n.start()
		n.expect("imported")
		n.withCRI(func(ctx context.Context, c criClient) {
			container := n.runPod(ctx, c, "copied", "busybox:test", "sleep", "3600")
			mounts, err := os.ReadFile("/proc/" + strconv.Itoa(n.pid(ctx, c, container)) + "/mounts")
			if err != nil || strings.HasPrefix(string(mounts), "overlay / ") {
				t.Errorf("the root is an overlay: %.60s, %v", mounts, err)
			}
			if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
				t.Error(err)
			}
		})
		n.stop()
	}
}

// TestPodsOutliveTheProcess runs a pod, stops and kills the process, and finds the
// pod again each time; then removes all of it and looks for what was left.
func TestPodsOutliveTheProcess(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	before := hostState(t)
	n.start()
	n.expect("imported")

	var container string
	var pid int
	n.withCRI(func(ctx context.Context, c criClient) {
		container = n.runPod(ctx, c, "sleeper", "busybox:test", "sleep", "3600")
		pid = n.pid(ctx, c, container)
		if got := statusLine(t, "/proc/"+strconv.Itoa(pid)+"/status", "Seccomp:"); got != "2" {
			t.Errorf("container's seccomp mode is %s, want 2 (a filter)", got)
		}
		out, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"echo", "hello"}, Timeout: 10})
		if err != nil || string(out.Stdout) != "hello\n" {
			t.Errorf("exec said %q, %v", out.GetStdout(), err)
		}
	})

	n.stop()
	n.start()
	n.withCRI(func(ctx context.Context, c criClient) {
		if now := n.pid(ctx, c, container); now != pid {
			t.Errorf("after a stop the container's pid is %d, was %d", now, pid)
		}
	})
	n.expect("imported")
	n.kill()
	n.start()
	n.expect("imported")
	n.withCRI(func(ctx context.Context, c criClient) {
		if now := n.pid(ctx, c, container); now != pid {
			t.Errorf("after a crash the container's pid is %d, was %d", now, pid)
		}
		out, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: []string{"echo", "hello"}, Timeout: 10})
		if err != nil || string(out.Stdout) != "hello\n" {
			t.Errorf("exec said %q, %v", out.GetStdout(), err)
		}
		if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
			t.Error(err)
		}
		left, err := c.ListContainers(ctx, &cri.ListContainersRequest{})
		if err != nil || len(left.Containers) > 0 {
			t.Errorf("containers left: %v, %v", left, err)
		}
	})
	if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
		t.Errorf("process %d of the removed container still runs", pid)
	}
	n.stop()
	n.compare(before, hostState(t))
	if log := n.readLog(); strings.Contains(log, "level=fatal") || strings.Contains(log, "level=panic") {
		t.Error("a part of containerd wanted to end the process")
	}
}

// TestContainerdGivesUp takes away a folder that containerd cannot do without. It
// must not end the process by itself, but let Run return, which is then called again in the
// same process: with the pods that ran, and for new ones.
func TestContainerdGivesUp(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	n.start()
	n.expect("imported")
	var first string
	var pid int
	n.withCRI(func(ctx context.Context, c criClient) {
		first = n.runPod(ctx, c, "first", "busybox:test", "sleep", "3600")
		pid = n.pid(ctx, c, first)
	})
	process := n.cmd.Process.Pid
	for round := range 3 {
		if err := os.RemoveAll(n.cfg.CNIConfDir); err != nil {
			t.Fatal(err)
		}
		n.expect("failed: " + errExited.Error())
		n.expect("ready")
		n.expect("imported")
		n.withCRI(func(ctx context.Context, c criClient) {
			if now := n.pid(ctx, c, first); now != pid {
				t.Errorf("round %d: the container's process is %d, was %d", round, now, pid)
			}
			out, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: first, Cmd: []string{"echo", "hello"}, Timeout: 10})
			if err != nil || string(out.Stdout) != "hello\n" {
				t.Errorf("round %d: exec said %q, %v", round, out.GetStdout(), err)
			}
			n.pid(ctx, c, n.runPod(ctx, c, "another-"+strconv.Itoa(round), "busybox:test", "sleep", "3600"))
		})
	}
	if n.cmd.Process.Pid != process {
		t.Error("it is another process")
	}
	n.withCRI(func(ctx context.Context, c criClient) {
		if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
			t.Error(err)
		}
	})
	n.stop()
}
