package appliance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// upgradeObject is what the test reads of an Upgrade.
type upgradeObject struct {
	Status struct {
		Phase, Message, Version string
		Nodes                   []struct {
			Name, Phase, Message string
			Cordoned             bool
		}
	}
}

func (s *clusterSite) upgradeNamed(t *testing.T, name string) (u upgradeObject, err error) {
	t.Helper()
	out, err := s.TryKubectl(nil, "get", "upgrade", name, "-o=json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &u)
	}
	return u, err
}

// awaitPhase waits until an Upgrade is in a phase.
func (s *clusterSite) awaitPhase(t *testing.T, name, phase string) (u upgradeObject) {
	t.Helper()
	harness.Eventually(t, 4*time.Minute, func() (err error) {
		if u, err = s.upgradeNamed(t, name); err == nil && u.Status.Phase != phase {
			err = fmt.Errorf("%+v", u.Status)
		}
		return err
	})
	return u
}

func (s *clusterSite) order(t *testing.T, name, spec string) {
	t.Helper()
	manifest := "{apiVersion: kedge.io/v1, kind: Upgrade, metadata: {name: " + name + "}, spec: " + spec + "}"
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := s.TryKubectl(strings.NewReader(manifest), "apply", "-f", "-")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// TestUpgradeObject upgrades a cluster by objects: one that waits for its window, one without a trusted key, a version that
// panics, and a good one, during which the servers that lead end one after the other. KEDGE_TEST_LONG makes it three servers
// with two agents in place of one with one.
func TestUpgradeObject(t *testing.T) {
	servers, agents := 1, 1
	if os.Getenv("KEDGE_TEST_LONG") != "" {
		servers, agents = 3, 2
	}
	s := newClusterSite(t, newUpgradeSite(t), servers, agents)
	site := newReleaseSite(t, s.Fleet)
	kedge, err := os.ReadFile(harness.Binary())
	if err != nil {
		t.Fatal(err)
	}
	want := otherVersion(kedge, "v9.0.0")
	site.release(t, "v9.0.0", want)
	site.release(t, "v8.0.0", fault{Real: "/opt/kedge/kedge", DataDir: "/var/lib/kedge", Fault: "panic"}.executable(t))
	for _, n := range s.nodes {
		if n.Agent {
			continue
		}
		site.knownTo(t, n)
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
	}
	release := s.supervise(t)

	for spec, text := range map[string]string{
		"{}":                             "give one of version, channel and url",
		"{version: v1, channel: stable}": "give one of version, channel and url",
		"{url: 'http://x/y'}":            "spec.url",
		"{version: v1, window: {start: '25:00', duration: 1h}}":                 "spec.window.start",
		"{version: v1, window: {start: '02:00', duration: 1h, days: [Monday]}}": "spec.window.days",
	} {
		out, err := s.TryKubectl(strings.NewReader("{apiVersion: kedge.io/v1, kind: Upgrade, metadata: {name: bad}, spec: "+spec+"}"), "apply", "-f", "-")
		if err == nil || !strings.Contains(out+err.Error(), text) {
			t.Errorf("%s: %v\n%s", spec, err, out)
		}
	}

	s.order(t, "untrusted", "{url: '"+site.url+"/v9.0.0'}")
	if u := s.awaitPhase(t, "untrusted", "Failed"); !strings.Contains(u.Status.Message, "trusts no key of releases") {
		t.Errorf("without a key: %+v", u)
	}
	for _, n := range s.nodes {
		site.trustedBy(t, n)
	}
	// A window that opens tomorrow. Others wait for it, since they begin in the order of their age.
	s.order(t, "later", "{url: '"+site.url+"/v9.0.0', window: {start: '"+time.Now().UTC().Add(-2*time.Hour).Format("15:04")+"', duration: 1h}}")
	if u := s.awaitPhase(t, "later", "Waiting"); !strings.Contains(u.Status.Message, "it waits for its window, which opens at ") {
		t.Errorf("outside of the window: %+v", u)
	}
	s.order(t, "panics", "{url: '"+site.url+"/v8.0.0', observe: 2s}")
	if u := s.awaitPhase(t, "panics", "Waiting"); u.Status.Message != "it begins when upgrade later has ended" {
		t.Errorf("beside another: %+v", u)
	}
	s.Kubectl(t, "delete", "upgrade", "later")
	u := s.awaitPhase(t, "panics", "Failed")
	wentBack := 0
	for _, n := range u.Status.Nodes {
		if n.Phase == "WentBack" && strings.Contains(n.Message, "did not become healthy in 3 starts") {
			wentBack++
		}
	}
	if wentBack != 1 || !strings.Contains(u.Status.Message, "the upgrade stopped at node ") {
		t.Errorf("a faulty version: %+v", u)
	}

	s.order(t, "good", fmt.Sprintf("{url: '%s', observe: 2s, drain: %v, window: {start: '00:00', duration: 24h, timeZone: Europe/Berlin}}", site.url+"/v9.0.0", servers > 1))
	u = s.awaitPhase(t, "good", "Succeeded")
	if u.Status.Version != "v9.0.0" || len(u.Status.Nodes) != len(s.nodes) || slices.ContainsFunc(u.Status.Nodes, func(n struct {
		Name, Phase, Message string
		Cordoned             bool
	}) bool {
		return n.Phase != "Upgraded" || n.Cordoned
	}) {
		t.Errorf("a good version: %+v", u)
	}
	for _, n := range s.nodes {
		if x, err := os.ReadFile(n.Machine.Disk(installedProgram)); err != nil || !bytes.Equal(x, want) {
			t.Errorf("%s has another executable, %v", n.Name, err)
		}
		if out := s.Kubectl(t, "get", "node", n.Name, "-o=jsonpath={.spec.unschedulable}"); out != "" {
			t.Errorf("%s is cordoned", n.Name)
		}
	}
	t.Logf("kubectl prints\n%s%s", s.Kubectl(t, "get", "upgrades"), s.Kubectl(t, "get", "events", "--field-selector=involvedObject.kind=Upgrade"))
	release()
	for _, n := range s.nodes {
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Error(err)
		}
	}
}
