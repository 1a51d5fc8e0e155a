package network

import (
	"cmp"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestBackends: pods of two machines meet in each of the ways that there are: as large
// packets as their MTU says pass undivided, larger ones are refused, bytes come as they
// were sent, and a connection lasts. How long is KEDGE_SOAK, in seconds.
func TestBackends(t *testing.T) {
	t.Parallel()
	for _, way := range []struct {
		mode string
		mtu  int
	}{{"vxlan", 1450}, {"host-gw", 1500}, {"wireguard-native", 1440}, {"udp", 1472}} {
		t.Run(way.mode, func(t *testing.T) {
			f := harness.NewFleet(t, "--flannel-backend="+way.mode)
			a := f.StartAgent(t)
			ns := f.Namespace(t)
			f.Apply(t, ns, harness.Shell("there", "exec probe measure :7000", "nodeName: "+a.Name+","))
			f.Apply(t, ns, harness.Shell("here", "exec sleep 36000", "nodeName: "+f.Name+","))
			f.WaitPod(t, ns, "here", false)
			to := f.WaitPod(t, ns, "there", false).Status.PodIP + ":7000"
			probe := func(args ...string) (string, error) {
				out, err := f.TryKubectl(nil, append([]string{"exec", "-n", ns, "here", "--", "probe"}, args...)...)
				return strings.TrimSpace(out), err
			}
			harness.Eventually(t, 20*time.Second, func() error { _, err := probe("soak", to, "0"); return err })
			if out, err := probe("whole", to, fmt.Sprint(way.mtu)); err != nil {
				t.Errorf("a packet of %d bytes: %v: %s", way.mtu, err, out)
			}
			if out, err := probe("whole", to, fmt.Sprint(way.mtu+1)); err == nil || !strings.Contains(out, "message too long") {
				t.Errorf("a packet of %d bytes is not refused: %v: %s", way.mtu+1, err, out)
			}
			out, err := probe("throw", to, "256")
			if err != nil {
				t.Errorf("%v: %s", err, out)
			}
			t.Logf("pod to pod: %s", out)
			if out, err = probe("soak", to, cmp.Or(os.Getenv("KEDGE_SOAK"), "5")); err != nil {
				t.Errorf("%v: %s", err, out)
			}
			t.Logf("a connection: %s", out)
		})
	}
}
