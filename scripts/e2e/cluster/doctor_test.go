package cluster

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/appliance/doctor"
	"kedge/scripts/e2e/harness"
)

// TestDoctorOfAgent: the doctor finds nothing on a server with an agent and on the agent, and says what an agent cannot
// find out; it says why an agent cannot join.
func TestDoctorOfAgent(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a := f.NewAgent(t)
	r, code := a.Doctor(t)
	if code != 3 || !strings.Contains(r.String(), "PROBLEM  join: this machine has not joined its cluster, and cannot: no join token is given; ") {
		t.Errorf("without a token: exit code %d\n%s", code, r)
	}
	a.Flags = append(a.Flags, "--token="+f.NewToken(t))
	r, code = a.Doctor(t)
	if code != 0 || !strings.Contains(r.String(), "WARNING  join: this machine has not joined its cluster yet; the server answers, and is the one that the token names; ") {
		t.Errorf("before it joins: exit code %d\n%s", code, r)
	}
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return f.NodeIsReady(a.Name) })
	if err := a.WaitReady(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	ns := f.Namespace(t)
	f.Apply(t, ns, harness.Shell("web", "exec probe serve :8080 web", "nodeName: "+a.Name+","))
	f.WaitPod(t, ns, "web", false)
	for _, n := range []*harness.Node{f.Node, a} {
		r, code := n.Doctor(t)
		if code != 0 || r.Has(doctor.Problem) || r.Has(doctor.Unknown) || r.Kedge != doctor.Running {
			t.Errorf("%s: exit code %d\n%s", n.Name, code, r)
		}
		for _, f := range r.Findings {
			if slices.Contains([]string{"mtu", "firewall", "ports", "certificates", "join"}, f.Check) {
				t.Errorf("%s: %+v", n.Name, f)
			}
		}
		if away := slices.ContainsFunc(r.Skipped, func(s doctor.Skipped) bool { return s.Check == "cluster" }); away != (n == a) {
			t.Errorf("%s skips %+v", n.Name, r.Skipped)
		}
	}
	a.Stop(t, syscall.SIGTERM, 10*time.Second)
	r, code = a.Doctor(t)
	if code != 3 || r.Kedge != doctor.Stopped || r.Node != a.Name || !strings.Contains(r.String(), "PROBLEM  kedge: kedge is not running (since ") {
		t.Errorf("stopped: exit code %d\n%s", code, r)
	}
}
