package runtime

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testPlugin is the CNI program of these tests, which is this program once more: it
// gives every pod the same address, and notes how it was called beside its own path.
func testPlugin() error {
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	call := os.Getenv("CNI_COMMAND") + " " + os.Getenv("CNI_NETNS") + "\n"
	var conf struct {
		Notes string `json:"notes"`
	}
	if err := json.Unmarshal(input, &conf); err != nil {
		return err
	}
	f, err := os.OpenFile(conf.Notes, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(call); err != nil {
		return err
	}
	switch os.Getenv("CNI_COMMAND") {
	case "ADD":
		fmt.Printf(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":%q}],"ips":[{"address":"10.99.0.2/24","interface":0}]}`, os.Getenv("CNI_NETNS"))
	case "VERSION":
		fmt.Print(`{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}`)
	}
	return nil
}

// TestPodNetworkNamespace runs a pod with a network of its own.
func TestPodNetworkNamespace(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	notes := filepath.Join(filepath.Dir(n.cfg.DataDir), "notes")
	for _, dir := range []string{n.cfg.CNIBinDir, n.cfg.CNIConfDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(n.cfg.CNIBinDir, "kedge-test")); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"kedge-test","notes":%q}]}`, notes)
	if err := os.WriteFile(filepath.Join(n.cfg.CNIConfDir, "10-test.conflist"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	before := hostState(t)
	n.start()
	n.expect("imported")
	n.withCRI(func(ctx context.Context, c criClient) {
		pod, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: "own", Namespace: "default", Uid: "own"},
			Hostname: "own",
			Linux:    &cri.LinuxPodSandboxConfig{CgroupParent: n.cgroup()},
		}})
		if err != nil {
			t.Fatal(err)
		}
		status, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pod.PodSandboxId, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		if ip := status.Status.Network.GetIp(); ip != "10.99.0.2" {
			t.Errorf("pod's address is %q", ip)
		}
		var info struct{ Pid int }
		if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
			t.Fatal(err)
		}
		// Flags of lo, bit 0: up.
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/if_inet6", info.Pid))
		if err == nil && !strings.Contains(string(table), " lo\n") {
			t.Errorf("lo has no address, so it is down: %q", table)
		}
		cached, _ := filepath.Glob(filepath.Join(n.cfg.RunDir, "cni/cache/results/*"))
		if len(cached) != 1 {
			t.Errorf("the CNI library remembers %v under the run directory, want one result", cached)
		}
		if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
			t.Error(err)
		}
	})
	calls, err := os.ReadFile(notes)
	if err != nil {
		t.Fatal(err)
	}
	if want := "ADD " + n.cfg.state() + "/"; !strings.Contains(string(calls), want) {
		t.Errorf("plug-in was called with\n%swant a line with %s", calls, want)
	}
	if !strings.Contains(string(calls), "DEL "+n.cfg.state()+"/") {
		t.Errorf("plug-in was not told that the pod is gone:\n%s", calls)
	}
	n.stop()
	n.compare(before, hostState(t))
}
