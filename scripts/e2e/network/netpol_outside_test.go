package network

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestPoliciesServicesAndNames: what policies say of pods holds for connections
// through services, from pods and from outside, in both families, and for the
// cluster's names.
func TestPoliciesServicesAndNames(t *testing.T) {
	t.Parallel()
	n := harness.OnLAN(t)
	ns := n.Namespace(t)
	n.Servers(t, ns, "web", 1, "")
	n.Apply(t, ns, harness.Shell("client", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "client", false)
	service := n.Service(t, ns, "web", "web", "type: NodePort, ipFamilyPolicy: RequireDualStack,")
	policy := func(name, spec string) {
		t.Helper()
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: %s}, spec: {%s}}`, name, spec))
	}
	want := func(what string, allowed bool, ask func() (string, error)) {
		t.Helper()
		harness.Eventually(t, 20*time.Second, func() error {
			if got, err := ask(); (err == nil) != allowed {
				return fmt.Errorf("%s: %q, %v; allowed should be %v", what, got, err, allowed)
			}
			return nil
		})
	}
	outside := func(what string, allowed4, allowed6 bool) {
		t.Helper()
		for node, allowed := range map[netip.Prefix]bool{harness.LANNodeV4: allowed4, harness.LANNodeV6: allowed6} {
			url := fmt.Sprintf("http://%s/", netip.AddrPortFrom(node.Addr(), uint16(service.Spec.Ports[0].NodePort)))
			want(what+" by "+url, allowed, func() (string, error) { return n.GetOutside(url, time.Second) })
		}
	}
	byName := func(pod string) func() (string, error) {
		return func() (string, error) { return getFrom(n.Node, ns, pod, "http://web."+ns+"/") }
	}

	outside("from outside without policies", true, true)
	want("by name without policies", true, byName("client"))

	policy("deny", "podSelector: {}, policyTypes: [Ingress, Egress]")
	outside("from outside, refused", false, false)
	want("by name, refused", false, byName("client"))

	policy("outside", fmt.Sprintf("podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: %s, except: [%s/32]}}, {ipBlock: {cidr: %s/128}}]}]",
		harness.LANOutsideV4.Masked(), harness.LANOutsideV4.Addr(), harness.LANOutsideV6.Addr()))
	outside("from outside, IPv6 only", false, true)
	policy("outside", fmt.Sprintf("podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: %s}}]}]", harness.LANOutsideV4.Masked()))
	outside("from outside, IPv4 only", true, false)

	// The usual policy for names, as it is written for clusters whose resolver is a pod.
	policy("names", `podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: 53, protocol: UDP}, {port: 53}]}]`)
	want("the name, but not whom it names", false, byName("client"))
	refused, _ := n.Trace(ns, "from", "client", "to", "web") // of a refused connection, it ends with an error
	for _, w := range []string{"policy " + ns + "/names", "allowed by none of " + ns + "/deny, " + ns + "/names", "refuses the connection from " + ns + "/client"} {
		if !strings.Contains(refused, w) {
			t.Errorf("no %q in the explanation:\n%s", w, refused)
		}
	}
	policy("client", `podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 8080}]}]`)
	want("allowed at one end only", false, byName("client"))
	policy("web", `podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]`)
	want("allowed at both ends", true, byName("client"))
	if out, err := n.Trace(ns, "from", "client", "to", "web"); err != nil || !strings.Contains(out, "allows the connection to "+ns+"/web-0") {
		t.Errorf("not explained: %v\n%s", err, out)
	}
	want("a pod reaches itself through its service", true, byName("web-0"))
}
