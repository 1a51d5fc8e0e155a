package cluster

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// slowly takes eight megabytes a second and remembers what they were.
type slowly struct {
	sum   hash.Hash
	taken int
	begun time.Time
}

func (s *slowly) Write(b []byte) (int, error) {
	s.taken += len(b)
	time.Sleep(time.Until(s.begun.Add(time.Duration(s.taken) * time.Second / (8 << 20))))
	return s.sum.Write(b)
}

// TestLastBytesArrive: what a container has written before it was done is read to its end by
// who is slower, on a server and on an agent, with both protocols.
func TestLastBytesArrive(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a := f.NewAgent(t, "--token="+f.NewToken(t))
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	ns := f.Namespace(t)
	const files, megabytes = 2000, 24
	for pod, node := range map[string]string{"on-server": f.Name, "on-agent": a.Name} {
		f.Apply(t, ns, harness.Shell(pod, fmt.Sprintf(`
			dd if=/dev/urandom of=/tmp/much bs=1M count=%d 2>/dev/null
			mkdir /tmp/many; i=0; while [ $i -lt %d ]; do echo $i >/tmp/many/$i; i=$((i+1)); done
			sha256sum </tmp/much; exec sleep 3600`, megabytes, files), "nodeName: "+node+","))
	}
	for _, pod := range []string{"on-server", "on-agent"} {
		f.WaitPod(t, ns, pod, false)
		harness.Eventually(t, 60*time.Second, func() error { return f.LogsHave(ns, pod, "  -") })
		want, _, _ := strings.Cut(f.Kubectl(t, "logs", "-n", ns, pod), " ")
		for _, websockets := range []string{"true", "false"} {
			t.Run(pod+", websockets "+websockets, func(t *testing.T) {
				kubectl := func(args ...string) *exec.Cmd {
					cmd := exec.Command(harness.Binary(), append([]string{"kubectl"}, args...)...)
					cmd.Env = append(os.Environ(), "KUBECONFIG="+f.Kubeconfig, "KUBECACHEDIR="+filepath.Join(harness.BaseDir, "cache"),
						"KUBECTL_REMOTE_COMMAND_WEBSOCKETS="+websockets)
					return cmd
				}
				for range 3 {
					out, errs := &slowly{sum: sha256.New(), begun: time.Now()}, &bytes.Buffer{}
					cmd := kubectl("exec", "-n", ns, pod, "--", "cat", "/tmp/much")
					cmd.Stdout, cmd.Stderr = out, errs
					err := f.Inside(cmd.Run)
					if got := fmt.Sprintf("%x", out.sum.Sum(nil)); err != nil || got != want {
						t.Errorf("%d bytes of %d arrived: %v %s", out.taken, megabytes<<20, err, errs)
					}
				}
				dir := harness.HostDir(t)
				if out, err := outputOf(f.Node, kubectl("cp", "-n", ns, pod+":/tmp/many", filepath.Join(dir, "many"))); err != nil {
					t.Errorf("cp: %v\n%s", err, out)
				}
				if got, err := os.ReadDir(filepath.Join(dir, "many")); err != nil || len(got) != files {
					t.Errorf("%d files of %d arrived: %v", len(got), files, err)
				}
			})
		}
	}
}

// outputOf runs a command where the node is and returns all that it says.
func outputOf(n *harness.Node, cmd *exec.Cmd) (string, error) {
	var all bytes.Buffer
	cmd.Stdout, cmd.Stderr = &all, &all
	err := n.Inside(cmd.Run)
	return all.String(), err
}
