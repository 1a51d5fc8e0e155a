package appliance

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// earlierVar names an executable from before "kedge upgrade": scripts/build-earlier.sh builds one for make test-long.
const earlierVar = "KEDGE_TEST_EARLIER"

// The secrets with which machines join a cluster of the earlier kedge.
const (
	earlierToken       = "0123456789abcdef-upgraded-agents"
	earlierServerToken = "0123456789abcdef-upgraded-servers"
)

// newEarlierSite is [newUpgradeSite] with a server of the earlier kedge, which was put on the machine by hand.
func newEarlierSite(t *testing.T) *upgradeSite {
	t.Helper()
	earlier := os.Getenv(earlierVar)
	if earlier == "" {
		t.Skip("it needs an earlier executable: make test-long")
	}
	t.Parallel()
	s := &upgradeSite{Fleet: harness.NewPreparedFleet(t, func(n *harness.Node) { putByHand(t, n, earlier) }, "--token="+earlierToken, "--server-token="+earlierServerToken), t: t}
	s.ns = s.Namespace(t)
	s.Apply(t, s.ns, harness.Shell("steady", "trap 'exit 0' TERM; while true; do sleep 1; done", ""))
	s.WaitPod(t, s.ns, "steady", false)
	s.containers = s.running()
	return s
}

// badRelease makes a new version whose launcher is this one's and whose program has the fault.
func (s *upgradeSite) badRelease(f fault) string {
	s.t.Helper()
	f.Real, f.Version = "/opt/kedge/kedge", "v9.9.9-"+f.Fault
	text, err := json.Marshal(f)
	if err == nil {
		err = os.WriteFile(s.Machine.Disk("/root/badrelease.json"), text, 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	program, err := harness.BuiltProgram("badrelease")
	if err != nil {
		s.t.Fatal(err)
	}
	return s.place("badrelease", program.Data)
}

// upgradeBy begins an upgrade to an executable by itself, and starts kedge anew.
func (s *upgradeSite) upgradeBy(program string, args ...string) {
	s.t.Helper()
	out, err := s.Machine.Output(s.t.Context(), append([]string{program, "upgrade", "--observe=2s"}, args...)...)
	if err != nil || !strings.Contains(out, "The new version is ready.") {
		s.t.Fatalf("upgrade: %v\n%s", err, out)
	}
	s.stop()
}

// TestUpgradeFromEarlier upgrades a server from a version that knows neither "kedge upgrade" nor the boot guard: to versions with
// faults, which go back to it, to a good one, and back by "kedge upgrade rollback". Objects and containers stay.
func TestUpgradeFromEarlier(t *testing.T) {
	s := newEarlierSite(t)
	earlier := os.Getenv(earlierVar)
	for _, tc := range []struct{ fault, wait, reason string }{
		{"panic", "2m", "did not become healthy in 3 starts"},
		{"hang", "8s", "nothing has changed for 8s"},
	} {
		s.write(tc.fault)
		s.upgradeBy(s.badRelease(fault{Fault: tc.fault}), "--wait="+tc.wait)
		if o := s.supervise(nil); o.Result != "went back" || !strings.Contains(o.Reason, tc.reason) {
			t.Errorf("%s: %+v", tc.fault, o)
		}
		if !s.isAt(installedProgram, earlier) {
			t.Errorf("%s: the earlier executable is not in its place", tc.fault)
		}
		s.healthy(tc.fault)
		// It runs from its copy, until it is started again.
		s.stop()
		s.healthy(tc.fault)
	}
	good := s.newer("good")
	for _, how := range []string{"upgraded", "upgraded again"} {
		s.write(strings.ReplaceAll(how, " ", "-"))
		s.upgradeBy(good)
		if o := s.supervise(nil); o.Result != "upgraded" {
			t.Fatalf("%s: %+v", how, o)
		}
		if !s.isAt(installedProgram, s.Machine.Disk(good)) || !s.isAt("/var/lib/kedge/previous/kedge", earlier) {
			t.Errorf("%s: the executables are not in their places", how)
		}
		s.healthy(strings.ReplaceAll(how, " ", "-"))
		if how != "upgraded" {
			break
		}
		if out, err := s.RunKedge("upgrade", "rollback", "--observe=3s"); err != nil {
			t.Fatalf("rollback: %v\n%s", err, out)
		}
		s.stop()
		if o := s.supervise(nil); o.Result != "upgraded" || !s.isAt(installedProgram, earlier) {
			t.Errorf("rollback: %+v", o)
		}
		s.healthy("upgraded")
		s.stop()
		s.healthy("upgraded")
	}
	// From then on it is upgraded as every other.
	newest := s.newer("newest")
	s.upgrade("--file=" + newest)
	if o := s.supervise(nil); o.Result != "upgraded" || !s.isAt(installedProgram, s.Machine.Disk(newest)) {
		t.Errorf("the upgrade after it: %+v", o)
	}
	s.healthy("upgraded-again")
}

// TestUpgradeOfEarlierCluster upgrades three servers and two agents from a version that knows no "kedge upgrade", on each machine,
// under load. From a server, their nodes cannot be upgraded, and the message says what to do.
func TestUpgradeOfEarlierCluster(t *testing.T) {
	s := &clusterSite{upgradeSite: newEarlierSite(t), stop: make(chan struct{})}
	s.nodes = []*harness.Node{s.Node}
	for range 2 {
		n := harness.NewNode("server")
		s.GiveMachine(t, n)
		n.Flags = []string{"--server=" + s.URL(), "--token=" + earlierServerToken}
		s.add(t, n, os.Getenv(earlierVar))
	}
	for range 2 {
		s.add(t, s.NewAgent(t, "--token="+earlierToken), os.Getenv(earlierVar))
	}
	s.podOnEach(t)
	release := s.supervise(t)
	stopped := s.load(t)
	good, err := os.ReadFile(s.Machine.Disk(s.newer("good")))
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range s.nodes {
		if err := os.WriteFile(n.Machine.Disk("/root/good"), good, 0o755); err != nil {
			t.Fatal(err)
		}
		s.upgradeOne(t, n, "/root/good")
		if i == 0 {
			begin := time.Now()
			out, err := s.RunKedge("upgrade", "--all", "--file=/root/good")
			if err == nil || !strings.Contains(out, "is too old to answer this server; run \"kedge upgrade\" on that machine, by the new executable") {
				t.Errorf("--all with earlier nodes: %v\n%s", err, out)
			}
			t.Logf("--all with earlier nodes says so after %s:\n%s", harness.Since(begin), out)
		}
	}
	written := stopped()
	release()
	s.allHave(t, good, written)
	if out, err := s.RunKedge("upgrade", "--all", "--file=/root/good"); err != nil || strings.Count(out, ": has the version already\n") != len(s.nodes) {
		t.Errorf("--all afterwards: %v\n%s", err, out)
	}
	for _, n := range s.nodes {
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Error(err)
		}
	}
}

// upgradeOne upgrades one node of a cluster on its machine, and waits for the result.
func (s *clusterSite) upgradeOne(t *testing.T, n *harness.Node, program string) {
	t.Helper()
	out, err := n.Machine.Output(t.Context(), program, "upgrade", "--observe=2s")
	if err != nil || !strings.Contains(out, "The new version is ready.") {
		t.Fatalf("upgrade of %s: %v\n%s", n.Name, err, out)
	}
	if err := n.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 3*time.Minute, func() error {
		out, err := n.RunKedge("upgrade", "status", "-o=json")
		var st upgradeStatus
		if err == nil {
			err = json.Unmarshal([]byte(out), &st)
		}
		if err != nil || st.Trial != nil || len(st.History) != 1 || st.History[0].Result != "upgraded" {
			return fmt.Errorf("the upgrade of %s: %w\n%s", n.Name, err, out)
		}
		return nil
	})
	harness.Eventually(t, 60*time.Second, func() error { return s.NodeIsReady(n.Name) })
}
