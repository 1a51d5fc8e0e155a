package throwaway

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/internal/test/image"
	"kedge/scripts/e2e/harness"
)

// dayCluster is a cluster of one server and two agents for the scripts in testdata/day. Each
// script is a user's: a shell with kubectl, a namespace, a kubeconfig and a working
// folder of its own.
//
//	$NS              the namespace; also a good part of the names of what has none
//	$IMAGE, $IMAGE2  the same image, a box of small tools and probe, by two names
//	$SERVER          address of server-1
//	probe, kedge     programs of this machine; kedge means the clusters of the test
type dayCluster struct {
	clusters
	dir, programs, server string
}

const (
	dayImage  = "example.org/box:1"
	dayImage2 = "example.org/box:2"
)

// TestKubectlDay is what people do in their first week with a cluster.
func TestKubectlDay(t *testing.T) {
	t.Parallel()
	d := newDay(t)
	// The last two take nodes away: when nobody else needs them.
	for _, scripts := range [][]string{{"workloads", "apply", "look", "config", "configmaps", "volumes", "network", "top", "cron"}, {"scheduling", "nodes"}} {
		t.Run("together", func(t *testing.T) {
			for _, name := range scripts {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					if name == "top" {
						if _, err := d.kedge("kubectl", "get", "apiservice", "v1beta1.metrics.k8s.io").Output(); err != nil {
							t.Skip("the cluster has no metrics API for kubectl top to ask")
						}
					}
					d.script(t, name)
				})
			}
		})
	}
}

func newDay(t *testing.T) dayCluster {
	d := dayCluster{clusters: newClusters(t)}
	d.dir = filepath.Dir(d.clusters.dir)
	d.programs = filepath.Join(d.dir, "bin")
	if err := os.Mkdir(d.programs, 0o755); err != nil {
		t.Fatal(err)
	}
	probe := harness.InProject("build/e2e/probe")
	for name, target := range map[string]string{"kubectl": harness.Binary(), "kedge": harness.Binary(), "probe": probe} {
		if err := os.Symlink(target, filepath.Join(d.programs, name)); err != nil {
			t.Fatal(err)
		}
	}
	box, err := image.NewBusybox(dayImage)
	if err != nil {
		t.Fatal(err)
	}
	if box.Files["/bin/probe"], err = harness.BuiltProgram("probe"); err != nil {
		t.Fatal(err)
	}
	second := box
	second.Name = dayImage2
	archive := filepath.Join(d.dir, "day.tar")
	image.Write(t, archive, image.Docker, box, second)
	d.must(t, "up", "--name=day", "--agents=2", "--image="+archive)
	d.server = d.must(t, "kubectl", "get", "node", "server-1", "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
	return d
}

// script runs one in a namespace of its own, which goes with the cluster.
func (d dayCluster) script(t *testing.T, name string) {
	lib, err := filepath.Abs("testdata/day/lib.sh")
	if err != nil {
		t.Fatal(err)
	}
	ns, dir := "day-"+name, filepath.Join(d.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := os.ReadFile(d.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(own, kubeconfig, 0o600); err != nil {
		t.Fatal(err)
	}
	// A service account is there as soon as a pod can be made.
	prepare := `kubectl create namespace "$NS"; kubectl config set-context --current --namespace="$NS"; eventually kubectl get serviceaccount default; set -x`
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-euc", fmt.Sprintf(". %s; %s; . %s", lib, prepare, filepath.Join(filepath.Dir(lib), name+".sh")))
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+d.programs+":"+os.Getenv("PATH"), "KUBECONFIG="+own, "KEDGE_CLUSTERS="+d.clusters.dir,
		"KUBECACHEDIR="+filepath.Join(harness.BaseDir, "cache"), "NS="+ns, "IMAGE="+dayImage, "IMAGE2="+dayImage2, "SERVER="+d.server)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// What a script has left in the background ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		objects, _ := d.kedge("kubectl", "get", "all", "-o", "wide", "-n", ns).CombinedOutput()
		events, _ := d.kedge("kubectl", "events", "-n", ns).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		t.Errorf("%v; it ended with\n%s\n%s\n%s", err, strings.Join(lines[max(0, len(lines)-25):], "\n"), objects, events)
	}
}
