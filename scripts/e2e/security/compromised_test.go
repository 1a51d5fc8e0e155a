package security

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/nodeaddr"
	"kedge/internal/pki"
	"kedge/scripts/e2e/harness"
)

// Addresses that a node claims, and does not call from.
var (
	stolen  = netip.MustParseAddr("8.8.8.8")
	allowed = netip.MustParseAddr("203.0.113.77")
)

// clientAs is a client with an agent's key and one of its certificates, which calls from the
// agent's machine: what somebody can do who has taken the machine over.
func clientAs(t *testing.T, f *harness.Fleet, a *harness.Node, cert string) kubernetes.Interface {
	t.Helper()
	file := func(name string) string { return filepath.Join(a.DataDir(), "agent", name) }
	c, err := kubernetes.NewForConfig(&rest.Config{
		Host: f.URL(), QPS: -1,
		Dial:            func(_ context.Context, network, address string) (net.Conn, error) { return a.Dial(network, address) },
		TLSClientConfig: rest.TLSClientConfig{CAFile: file("server-ca.crt"), CertFile: file(cert), KeyFile: file("node.key"), ServerName: "kubernetes.default.svc"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// securityTable is the table of docs/security.md: what a node's user and its data path's
// user may write, by resource, as its first column has it.
func securityTable(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(harness.InProject("docs/security.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(text), "| Resource | ")
	if !ok {
		t.Fatal("docs/security.md has no table of what a node may write")
	}
	out := map[string]bool{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 || !strings.HasPrefix(line, "|") {
			if len(out) > 0 {
				break
			}
			continue
		}
		for name := range strings.SplitSeq(strings.Trim(strings.TrimSpace(cells[1]), "`"), "`, `") {
			out[name] = true
		}
	}
	return out
}

// mayWrite says what a role lets its holder change.
func mayWrite(t *testing.T, f *harness.Fleet, role string) []string {
	t.Helper()
	r, err := f.Client.RbacV1().ClusterRoles().Get(t.Context(), role, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, rule := range r.Rules {
		if !slices.ContainsFunc(rule.Verbs, func(v string) bool { return !slices.Contains([]string{"get", "list", "watch"}, v) }) {
			continue
		}
		out = append(out, rule.Resources...)
	}
	return out
}

// claims are tries to get what is another node's with all that the bad node has.
type claims struct {
	*takenOver
	kubelet, network  kubernetes.Interface // with the bad node's certificates
	badNode, goodNode *corev1.Node
}

// compromised makes claims for each row of the table in docs/security.md.
func compromised(t *testing.T, taken *takenOver) {
	c := &claims{takenOver: taken, kubelet: clientAs(t, taken.Fleet, taken.bad, "node.crt"), network: clientAs(t, taken.Fleet, taken.bad, "network.crt")}
	var err error
	if c.badNode, err = c.Client.CoreV1().Nodes().Get(t.Context(), c.bad.Name, metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	if c.goodNode, err = c.Client.CoreV1().Nodes().Get(t.Context(), c.good.Name, metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Run("every resource that it may write is in the table", c.allInTable)
	t.Run("nodes", c.nodes)
	t.Run("a node that registers again", c.registersAgain)
	t.Run("pods", c.pods)
	t.Run("what belongs to others' pods", c.ofOthersPods)
	t.Run("objects of other nodes", c.ofOtherNodes)
	t.Run("leases of load balancers", c.leases)
	t.Run("certificates", c.certificates)
	t.Run("services", c.services)
}

// forbidden fails the test unless err is the API's refusal. what is what the bad node would have.
func forbidden(t *testing.T, what string, err error) {
	t.Helper()
	if !apierrors.IsForbidden(err) {
		t.Errorf("%s: %v", what, err)
	}
}

func patchNode(t *testing.T, c kubernetes.Interface, name, patch string, sub ...string) (*corev1.Node, error) {
	return c.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, sub...)
}

// allInTable compares what the roles of nodes allow with the table.
func (c *claims) allInTable(t *testing.T) {
	table := securityTable(t)
	for _, role := range []string{"system:node", "system:kedge:network"} {
		for _, resource := range mayWrite(t, c.Fleet, role) {
			if !table[resource] {
				t.Errorf("%s may write %s, and the table of docs/security.md does not say what that leads to", role, resource)
			}
		}
	}
}

// nodes writes to its own Node and to others.
func (c *claims) nodes(t *testing.T) {
	ranges := fmt.Sprintf(`{"spec":{"podCIDRs":[%q],"podCIDR":%q}}`, c.goodNode.Spec.PodCIDRs[0], c.goodNode.Spec.PodCIDRs[0])
	if _, err := patchNode(t, c.kubelet, c.bad.Name, ranges); !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) {
		t.Errorf("another's pod range: %v", err)
	}
	for what, patch := range map[string]string{
		"an allowance for itself":       `{"metadata":{"annotations":{"kedge.io/allowed-addresses":"0.0.0.0/0"}}}`,
		"the label of servers":          `{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":"true"}}}`,
		"a label that only others give": `{"metadata":{"labels":{"node-restriction.kubernetes.io/x":"true"}}}`,
		"a taint":                       `{"spec":{"taints":[{"key":"x","effect":"NoExecute"}]}}`,
	} {
		_, err := patchNode(t, c.kubelet, c.bad.Name, patch)
		forbidden(t, what, err)
	}
	for what, patch := range map[string]string{
		"an annotation of another": `{"metadata":{"annotations":{"kedge.io/backend":"{}"}}}`, "a label of another": `{"metadata":{"labels":{"x":"y"}}}`,
	} {
		_, err := patchNode(t, c.kubelet, c.good.Name, patch)
		forbidden(t, what, err)
	}
	_, err := patchNode(t, c.kubelet, c.good.Name, `{"status":{"addresses":[]}}`, "status")
	forbidden(t, "the status of another", err)
	forbidden(t, "another that is deleted", c.kubelet.CoreV1().Nodes().Delete(t.Context(), c.good.Name, metav1.DeleteOptions{}))
	fresh := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "fresh"}}
	_, err = c.kubelet.CoreV1().Nodes().Create(t.Context(), fresh, metav1.CreateOptions{})
	forbidden(t, "a node of another name", err)
	_, err = patchNode(t, c.network, c.bad.Name, `{"metadata":{"annotations":{"x":"y"}}}`)
	forbidden(t, "its node, by the data path's user", err)

	// It may say that it has an address that no server has seen, and nothing follows.
	forged := nodeaddr.Format([]nodeaddr.Proof{{Address: stolen, Since: time.Now().Add(time.Hour), Allowed: true}})
	n, err := patchNode(t, c.kubelet, c.bad.Name, fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, nodeaddr.Proven, forged))
	if err != nil {
		t.Fatal(err)
	}
	if got := n.Annotations[nodeaddr.Proven]; got != c.badNode.Annotations[nodeaddr.Proven] || strings.Contains(got, stolen.String()) {
		t.Errorf("it proves to itself %s", got)
	}
}

// registersAgain registers the bad node with a pod range of its choice.
func (c *claims) registersAgain(t *testing.T) {
	// A kubelet registers its node when it starts.
	c.bad.Stop(t, syscall.SIGTERM, 15*time.Second)
	if err := c.Client.CoreV1().Nodes().Delete(t.Context(), c.bad.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: c.bad.Name}, Spec: corev1.NodeSpec{PodCIDRs: c.goodNode.Spec.PodCIDRs, PodCIDR: c.goodNode.Spec.PodCIDR}}
	_, err := c.kubelet.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{})
	forbidden(t, "with another's pod range", err)
	if err := c.bad.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return c.NodeIsReady(c.bad.Name) })
	c.Apply(t, c.ns, harness.Shell("on-bad", "exec sleep 3600", "nodeName: "+c.bad.Name+","))
	c.WaitPod(t, c.ns, "on-bad", false)
}

// pods writes to its own pods and to others.
func (c *claims) pods(t *testing.T) {
	pods := c.kubelet.CoreV1().Pods(c.ns)
	victim := c.WaitPod(t, c.ns, "on-good", false)
	addresses := fmt.Sprintf(`{"status":{"podIP":%q,"podIPs":[{"ip":%q}]}}`, victim.Status.PodIP, victim.Status.PodIP)
	_, err := pods.Patch(t.Context(), "on-bad", types.MergePatchType, []byte(addresses), metav1.PatchOptions{}, "status")
	forbidden(t, "another pod's address for a pod of its own", err)
	_, err = pods.Patch(t.Context(), "on-bad", types.MergePatchType, []byte(`{"status":{"hostIP":"192.0.2.1","hostIPs":[{"ip":"192.0.2.1"}]}}`), metav1.PatchOptions{}, "status")
	forbidden(t, "another machine's address as its pod's host", err)
	_, err = pods.Patch(t.Context(), "on-good", types.MergePatchType, []byte(addresses), metav1.PatchOptions{}, "status")
	forbidden(t, "the status of another's pod", err)
	forbidden(t, "another's pod that is deleted", pods.Delete(t.Context(), "on-good", metav1.DeleteOptions{}))
	forbidden(t, "another's pod that is evicted", pods.EvictV1(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "on-good", Namespace: c.ns}}))
	pod := func(on string, annotations map[string]string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "made", Annotations: annotations},
			Spec:       corev1.PodSpec{NodeName: on, Containers: []corev1.Container{{Name: "c", Image: "x"}}},
		}
	}
	_, err = pods.Create(t.Context(), pod(c.bad.Name, nil), metav1.CreateOptions{})
	forbidden(t, "a pod that is no static pod's copy", err)
	_, err = pods.Create(t.Context(), pod(c.good.Name, map[string]string{corev1.MirrorPodAnnotationKey: "x"}), metav1.CreateOptions{})
	forbidden(t, "a static pod's copy on another node", err)
}

// ofOthersPods reads and writes what pods of other nodes use.
func (c *claims) ofOthersPods(t *testing.T) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}, StringData: map[string]string{"a": "b"}}
	if _, err := c.Client.CoreV1().Secrets(c.ns).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for user, client := range map[string]kubernetes.Interface{"kubelet": c.kubelet, "data path": c.network} {
		_, err := client.CoreV1().Secrets(c.ns).Get(t.Context(), "theirs", metav1.GetOptions{})
		forbidden(t, user+": a Secret", err)
		_, err = client.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
		forbidden(t, user+": all Secrets, the nodes' keys among them", err)
		_, err = client.CoreV1().ServiceAccounts("kube-system").CreateToken(t.Context(), "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		forbidden(t, user+": a token of another's service account", err)
		_, err = client.CoreV1().PersistentVolumeClaims(c.ns).Patch(t.Context(), "x", types.MergePatchType, []byte(`{"status":{}}`), metav1.PatchOptions{}, "status")
		forbidden(t, user+": another's volume claim", err)
	}
}

// ofOtherNodes writes what other nodes say of themselves.
func (c *claims) ofOtherNodes(t *testing.T) {
	hold := c.good.Name
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: c.good.Name}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &hold}}
	_, err := c.kubelet.CoordinationV1().Leases("kube-node-lease").Update(t.Context(), lease, metav1.UpdateOptions{})
	forbidden(t, "another's heartbeat", err)
	forbidden(t, "another's CSINode", c.kubelet.StorageV1().CSINodes().Delete(t.Context(), c.good.Name, metav1.DeleteOptions{}))
	_, err = c.kubelet.StorageV1().CSINodes().Create(t.Context(), &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: "fresh"}}, metav1.CreateOptions{})
	forbidden(t, "a CSINode of another name", err)
	slice := &resourcev1.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}, Spec: resourcev1.ResourceSliceSpec{
		Driver: "d.example", NodeName: &c.good.Name, Pool: resourcev1.ResourcePool{Name: "p", ResourceSliceCount: 1},
	}}
	_, err = c.kubelet.ResourceV1().ResourceSlices().Create(t.Context(), slice, metav1.CreateOptions{})
	forbidden(t, "devices on another node", err)
}

// leases takes leases by which nodes have addresses of load balancers.
func (c *claims) leases(t *testing.T) {
	leases := c.network.CoordinationV1().Leases("kube-system")
	for _, name := range []string{"kedge-lb-" + c.good.Name, "some-operator"} {
		_, err := leases.Create(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		forbidden(t, "the lease "+name, err)
	}
	own := "kedge-lb-" + c.bad.Name
	if _, err := leases.Create(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: own}}, metav1.CreateOptions{}); err != nil {
		t.Errorf("its own lease: %v", err)
	}
	if err := c.Client.CoordinationV1().Leases("kube-system").Delete(t.Context(), own, metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

// certificates approves a request of its own.
func (c *claims) certificates(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.Request(key)
	if err != nil {
		t.Fatal(err)
	}
	r := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "evil"}, Spec: certificatesv1.CertificateSigningRequestSpec{
		Request: csr, SignerName: certificatesv1.KubeAPIServerClientSignerName, Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth},
	}}
	made, err := c.kubelet.CertificatesV1().CertificateSigningRequests().Create(t.Context(), r, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	made.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue}}
	_, err = c.kubelet.CertificatesV1().CertificateSigningRequests().UpdateApproval(t.Context(), "evil", made, metav1.UpdateOptions{})
	forbidden(t, "its own request that it approves", err)
}

// services makes services and endpoints.
func (c *claims) services(t *testing.T) {
	for user, client := range map[string]kubernetes.Interface{"kubelet": c.kubelet, "data path": c.network} {
		_, err := client.CoreV1().Services(c.ns).Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, metav1.CreateOptions{})
		forbidden(t, user+": a service", err)
		_, err = client.DiscoveryV1().EndpointSlices(c.ns).Create(t.Context(), &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: "x"}, AddressType: discoveryv1.AddressTypeIPv4}, metav1.CreateOptions{})
		forbidden(t, user+": endpoints", err)
	}
}

// TestClaimsLeadNowhere: in each of the ways between nodes, an address that a node claims
// gets into no route and no set of other nodes, and one that an administrator allows does.
func TestClaimsLeadNowhere(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"vxlan", "host-gw", "wireguard-native", "udp"} {
		t.Run(mode, func(t *testing.T) {
			f := harness.NewFleet(t, "--flannel-backend="+mode)
			bad, good := f.StartAgent(t), f.StartAgent(t)
			kubelet := clientAs(t, f, bad, "node.crt")
			// A kubelet that is stopped mends nothing that somebody else writes with its key.
			claim := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}},"status":{"addresses":[{"type":"InternalIP","address":%q},{"type":"InternalIP","address":%q}]}}`,
				nodeaddr.Proven, nodeaddr.Format([]nodeaddr.Proof{{Address: stolen, Since: time.Now()}}), addressOfNode(t, f, bad.Name), stolen)
			harness.Eventually(t, 20*time.Second, func() error { return hasWayTo(good, addressOfNode(t, f, bad.Name)) })
			if err := bad.Signal(9, 10*time.Second); err != nil {
				t.Fatal(err)
			}
			n, err := kubelet.CoreV1().Nodes().Patch(t.Context(), bad.Name, types.MergePatchType, []byte(claim), metav1.PatchOptions{}, "status")
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(n.Annotations[nodeaddr.Proven], stolen.String()) {
				t.Errorf("the servers have taken the claim for proven: %s", n.Annotations[nodeaddr.Proven])
			}
			// The good node has read it when it follows the next change, which leads somewhere.
			allow := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, nodeaddr.Allowed, allowed)
			claim = fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":%q},{"type":"InternalIP","address":%q},{"type":"InternalIP","address":%q}]}}`,
				addressOfNode(t, f, bad.Name), stolen, allowed)
			if _, err := kubelet.CoreV1().Nodes().Patch(t.Context(), bad.Name, types.MergePatchType, []byte(claim), metav1.PatchOptions{}, "status"); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Client.CoreV1().Nodes().Patch(t.Context(), bad.Name, types.MergePatchType, []byte(allow), metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
			for _, n := range []*harness.Node{f.Node, good} {
				harness.Eventually(t, 20*time.Second, func() error { return hasWayTo(n, allowed.String()) })
				if err := hasWayTo(n, stolen.String()); err == nil {
					t.Errorf("%s sends to the node what is for %s", n.Name, stolen)
				}
			}
		})
	}
}

func addressOfNode(t *testing.T, f *harness.Fleet, name string) string {
	t.Helper()
	n, err := f.Client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return n.Status.Addresses[0].Address
}

// hasWayTo says whether a node treats an address as another node's: a route or an element
// of a set names it.
func hasWayTo(n *harness.Node, address string) error {
	return n.Inside(func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: 0}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst != nil && r.Dst.IP.String() == address {
				return nil
			}
		}
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if err != nil {
			return err
		}
		for _, table := range tables {
			sets, err := conn.GetSets(table)
			if err != nil {
				return err
			}
			for _, s := range sets {
				elements, err := conn.GetSetElements(s)
				if err != nil {
					return err
				}
				for _, e := range elements {
					if len(e.Key) >= net.IPv4len && net.IP(e.Key[:net.IPv4len]).String() == address {
						return nil
					}
				}
			}
		}
		return fmt.Errorf("%s has no route to %s, and no set has it; there are %d routes", n.Name, address, len(routes))
	})
}
