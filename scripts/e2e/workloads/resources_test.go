package workloads

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"kedge/scripts/e2e/harness"
)

// unified says whether the machine has cgroups of version 2 only.
func unified() bool {
	_, err := os.Stat(harness.Cgroups + "/cgroup.controllers")
	return err == nil
}

// cgroupOf is the folder of the cgroup whose name has id in it, of the controller
// (which version 2 does not ask for). It has to be below the node's own cgroup.
func cgroupOf(t *testing.T, n *harness.Node, controller, id string) string {
	t.Helper()
	root := harness.Cgroups
	if !unified() {
		root = filepath.Join(harness.Cgroups, controller)
	}
	found := ""
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // of a container that just ended
		}
		if err == nil && d.IsDir() && strings.Contains(d.Name(), id) && slices.ContainsFunc(n.CgroupNames(), func(own string) bool { return strings.Contains(path, "/"+own+"/") }) {
			found = path
			return fs.SkipAll
		}
		return err
	})
	if err != nil || found == "" {
		t.Fatalf("no cgroup of %s in %s: %v", id, root, err)
	}
	return found
}

// containerID is the runtime's name of a container.
func containerID(pod *corev1.Pod, name string) string {
	_, id, _ := strings.Cut(harness.ContainerStatus(pod, name).ContainerID, "://")
	return id
}

// podID is how a pod's identity is written in names of cgroups.
func podID(pod *corev1.Pod) string {
	if unified() {
		if _, err := os.Stat("/run/systemd/system"); err == nil {
			return "pod" + strings.ReplaceAll(string(pod.UID), "-", "_")
		}
	}
	return "pod" + string(pod.UID)
}

func TestResourcesAreCgroupSettings(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.ShellWith("sized", "exec sleep 3600", "", "resources: {requests: {cpu: 500m, memory: 32Mi}, limits: {cpu: 700m, memory: 64Mi}},"))
	n.Apply(t, ns, harness.Shell("unsized", "exec sleep 3600", ""))
	sized, unsized := n.WaitPod(t, ns, "sized", false), n.WaitPod(t, ns, "unsized", false)
	const mem = "67108864"
	// By version 1 and by version 2: the same numbers in other files.
	type setting struct{ controller, file, want string }
	settings := []setting{{"cpu", "cpu.shares", "512"}, {"cpu", "cpu.cfs_quota_us", "70000"}, {"cpu", "cpu.cfs_period_us", "100000"}, {"memory", "memory.limit_in_bytes", mem}}
	pod := append(settings, setting{"pids", "pids.max", "4096"})
	free := []setting{{"cpu", "cpu.shares", "2"}, {"cpu", "cpu.cfs_quota_us", "-1"}, {"memory", "memory.limit_in_bytes", "9223372036854771712"}}
	if unified() {
		settings = []setting{{"", "cpu.max", "70000 100000"}, {"", "memory.max", mem}}
		pod = append(settings, setting{"", "pids.max", "4096"})
		free = []setting{{"", "cpu.weight", "1"}, {"", "cpu.max", "max 100000"}, {"", "memory.max", "max"}}
	}
	check := func(id string, list []setting) {
		for _, s := range list {
			if got := harness.FileContent(cgroupOf(t, n, s.controller, id), s.file); got != s.want {
				t.Errorf("%s of %s is %q, want %q", s.file, id, got, s.want)
			}
		}
	}
	check(containerID(sized, "main"), settings)
	check(podID(sized), pod)
	check(containerID(unsized, "main"), free)
	if path := cgroupOf(t, n, "cpu", podID(sized)); !strings.Contains(path, "burstable") {
		t.Errorf("the pod's cgroup is %s", path)
	}
	weight := func(p *corev1.Pod) int {
		file := "cpu.shares"
		if unified() {
			file = "cpu.weight"
		}
		w, _ := strconv.Atoi(harness.FileContent(cgroupOf(t, n, "cpu", containerID(p, "main")), file))
		return w
	}
	if weight(sized) < 10*weight(unsized) {
		t.Errorf("weights are %d with and %d without a request", weight(sized), weight(unsized))
	}
	// The pod's cgroup goes with the pod.
	path := cgroupOf(t, n, "memory", podID(sized))
	n.Kubectl(t, "delete", "pod", "-n", ns, "sized", "--wait")
	harness.Eventually(t, 20*time.Second, func() error {
		if _, err := os.Stat(path); err == nil {
			return fmt.Errorf("%s is still there", path)
		}
		return nil
	})
}

func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.ShellWith("eats", "probe eat 200", "", "resources: {limits: {memory: 48Mi}},"))
	c := harness.ContainerStatus(n.WaitPod(t, ns, "eats", true), "main").State.Terminated
	if c == nil || c.ExitCode != 137 || c.Reason != "OOMKilled" {
		t.Errorf("container ended as %+v", c)
	}
	n.Apply(t, ns, harness.ShellWith("fits", "probe eat 20 & sleep 2; kill $!; true", "", "resources: {limits: {memory: 64Mi}},"))
	if got := n.Output(t, ns, "fits"); !strings.Contains(got, "ate 20") {
		t.Errorf("a container that keeps its limit printed %q", got)
	}
}

func TestProcessorLimitThrottles(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.ShellWith("spins", "exec probe spin 20", "", "resources: {limits: {cpu: 50m}},"))
	pod := n.WaitPod(t, ns, "spins", false)
	stat := func() (throttled int) {
		for line := range strings.Lines(harness.FileContent(cgroupOf(t, n, "cpu", containerID(pod, "main")), "cpu.stat")) {
			if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == "nr_throttled" {
				throttled, _ = strconv.Atoi(value)
			}
		}
		return throttled
	}
	for range 2 { // it grows, and goes on growing
		before := stat()
		harness.Eventually(t, 15*time.Second, func() error {
			if now := stat(); now <= before {
				return fmt.Errorf("nr_throttled is %d, as before", now)
			}
			return nil
		})
	}
}

// capable says whether this process has a capability, by its number, as kedge then has.
func capable(capability int) bool {
	for line := range strings.Lines(harness.FileContent("/proc/self/status")) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			bits, _ := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return bits>>capability&1 == 1
		}
	}
	return false
}

func TestQualityOfServiceClasses(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	for _, c := range []struct {
		name, resources string
		class           corev1.PodQOSClass
		least, most     int // of oom_score_adj
	}{
		{"guaranteed", "resources: {limits: {cpu: 20m, memory: 32Mi}},", corev1.PodQOSGuaranteed, -997, -997},
		{"burstable", "resources: {requests: {memory: 32Mi}},", corev1.PodQOSBurstable, 3, 999},
		{"best-effort", "", corev1.PodQOSBestEffort, 1000, 1000},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n.Apply(t, ns, harness.ShellWith(c.name, "cat /proc/self/oom_score_adj; exec sleep 3600", "", c.resources))
			pod := n.WaitPod(t, ns, c.name, false)
			if pod.Status.QOSClass != c.class {
				t.Errorf("class is %s", pod.Status.QOSClass)
			}
			path := cgroupOf(t, n, "memory", podID(pod))
			for _, class := range []corev1.PodQOSClass{corev1.PodQOSBurstable, corev1.PodQOSBestEffort} {
				if in := strings.Contains(path, strings.ToLower(string(class))); in != (c.class == class) {
					t.Errorf("cgroup is %s", path)
				}
			}
			score, err := strconv.Atoi(strings.TrimSpace(n.Kubectl(t, "logs", "-n", ns, c.name)))
			if err != nil {
				t.Fatal(err)
			}
			if c.least < 0 && !capable(unix.CAP_SYS_RESOURCE) {
				harness.SkipLacking(t, "not checked: oom_score_adj, which cannot be lowered on a machine without CAP_SYS_RESOURCE; the rest was")
			}
			if score < c.least || score > c.most {
				t.Errorf("oom_score_adj is %d, want %d to %d", score, c.least, c.most)
			}
		})
	}
}

// TestTimerSlack: an idle kedge lets its own threads be woken late, and no container's.
func TestTimerSlack(t *testing.T) {
	t.Parallel()
	if !capable(unix.CAP_SYS_NICE) {
		harness.SkipLacking(t, "without CAP_SYS_NICE kedge cannot have its threads woken late")
	}
	n := harness.Shared(t)
	ns := n.Namespace(t)
	harness.Eventually(t, time.Minute, func() error {
		if got := harness.FileContent("/proc", strconv.Itoa(n.Cmd.Process.Pid), "timerslack_ns"); got != "10000000" {
			return fmt.Errorf("kedge's own slack is %s ns", got)
		}
		return nil
	})
	const slack, usual = "cat /proc/self/timerslack_ns", "50000"
	n.Apply(t, ns, harness.Shell("prompt", slack+"; exec sleep 3600", ""))
	n.WaitPod(t, ns, "prompt", false)
	if got := strings.TrimSpace(n.Kubectl(t, "logs", "-n", ns, "prompt")); got != usual {
		t.Errorf("a container's slack is %s ns, want %s", got, usual)
	}
	if got := strings.TrimSpace(n.Kubectl(t, "exec", "-n", ns, "prompt", "--", "sh", "-c", slack)); got != usual {
		t.Errorf("that of a command in it is %s ns, want %s", got, usual)
	}
}
