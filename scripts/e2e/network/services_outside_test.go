package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

func TestServicesFromOutside(t *testing.T) {
	t.Parallel()
	n := harness.OnLAN(t)
	ns := n.Namespace(t)
	n.Servers(t, ns, "web", 2, "")
	n.Apply(t, ns, harness.Shell("client", "exec sleep 3600", ""))
	client := n.WaitPod(t, ns, "client", false)
	cluster := n.Service(t, ns, "cluster", "web", "type: NodePort, ipFamilyPolicy: RequireDualStack,")
	local := n.Service(t, ns, "local", "web", "type: LoadBalancer, ipFamilyPolicy: RequireDualStack, externalTrafficPolicy: Local, internalTrafficPolicy: Local,")
	nowhere := n.Service(t, ns, "nowhere", "nobody", "type: NodePort,")

	for _, c := range []struct {
		node, outside netip.Prefix
		clusterIP     string
	}{{harness.LANNodeV4, harness.LANOutsideV4, cluster.Spec.ClusterIPs[0]}, {harness.LANNodeV6, harness.LANOutsideV6, cluster.Spec.ClusterIPs[1]}} {
		at := func(port int32) string {
			return "http://" + netip.AddrPortFrom(c.node.Addr(), uint16(port)).String()
		}
		for _, s := range []*corev1.Service{cluster, local} {
			url := at(s.Spec.Ports[0].NodePort)
			answered(t, func() (string, error) { return n.GetOutside(url+"/", 2*time.Second) }, "web-0", "web-1")
			if got, err := n.GetOutside(url+"/addr", 2*time.Second); harness.SeenAddress(got) != c.outside.Addr().String() {
				t.Errorf("%s: the server sees %q, %v, want %s", s.Name, got, err, c.outside.Addr())
			}
			answered(t, func() (string, error) { return getFrom(n.Node, ns, "client", url+"/") }, "web-0", "web-1")
			answered(t, func() (string, error) { return n.Get(url + "/") }, "web-0", "web-1")
		}
		url := "http://" + net.JoinHostPort(c.clusterIP, "80") + "/addr"
		got, err := getFrom(n.Node, ns, "client", url)
		want := client.Status.PodIPs[0].IP
		if c.node.Addr().Is6() {
			want = client.Status.PodIPs[1].IP
		}
		if harness.SeenAddress(got) != want {
			t.Errorf("%s: the server sees %q, %v, want %s", url, got, err, want)
		}
	}
	if _, err := n.GetOutside(fmt.Sprint("http://", harness.LANNodeV4.Addr(), ":", nowhere.Spec.Ports[0].NodePort), 2*time.Second); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a service without endpoints: %v, want to be refused", err)
	}

	// Load balancers ask here whether they should send connections to this node.
	health := fmt.Sprint("http://", harness.LANNodeV4.Addr(), ":", local.Spec.HealthCheckNodePort, "/")
	harness.Eventually(t, 5*time.Second, func() error {
		got, err := n.GetOutside(health, 2*time.Second)
		if err == nil && !strings.Contains(got, `"localEndpoints": 2`) {
			err = fmt.Errorf("the health check answers %s", got)
		}
		return err
	})

	// The host's own firewall is loaded anew, which takes all rules away.
	url := fmt.Sprint("http://", harness.LANNodeV4.Addr(), ":", cluster.Spec.Ports[0].NodePort, "/")
	if err := n.Inside(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.FlushRuleset()
		conn.AddTable(&nftables.Table{Name: "firewall", Family: nftables.TableFamilyINet})
		return conn.Flush()
	}); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 10*time.Second, func() error { _, err := n.GetOutside(url, time.Second); return err })
	n.HostTable(t, "firewall")

	// Rules outlive the process, however it ends.
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		n.Stop(t, sig, 15*time.Second)
		if _, err := n.GetOutside(url, time.Second); err != nil {
			t.Errorf("after %v: %v", sig, err)
		}
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
	}

	// With no pod ready here, Local drops, and the health check says so.
	n.Kubectl(t, "delete", "pod", "-n", ns, "-l", "app=web")
	harness.Eventually(t, 10*time.Second, func() error {
		if got, err := n.GetOutside(health, 2*time.Second); err == nil || !strings.Contains(err.Error(), `"localEndpoints": 0`) {
			return fmt.Errorf("the health check answers %s, %v", got, err)
		}
		return nil
	})
}

// TestServiceAffinity: a client keeps its endpoint, and finds another when that goes.
func TestServiceAffinity(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Servers(t, ns, "web", 3, "")
	n.Apply(t, ns, harness.Shell("client", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "client", false)
	s := n.Service(t, ns, "web", "web", "sessionAffinity: ClientIP,")
	url := "http://" + s.Spec.ClusterIP + "/"
	var first string
	harness.Eventually(t, 10*time.Second, func() (err error) { first, err = n.Get(url); return err })
	same := func() string {
		t.Helper()
		name, err := n.Get(url)
		for range 10 {
			again, err2 := n.Get(url)
			if err != nil || err2 != nil || again != name {
				t.Fatalf("%q, %v answers, then %q, %v", name, err, again, err2)
			}
		}
		return name
	}
	// The other two may have come after the first answer.
	harness.Eventually(t, 10*time.Second, func() error {
		slices, err := n.Client.DiscoveryV1().EndpointSlices(ns).List(context.Background(), metav1.ListOptions{})
		if err != nil || len(slices.Items) != 1 || len(slices.Items[0].Endpoints) != 3 {
			return fmt.Errorf("endpoints %v, %v", slices, err)
		}
		return nil
	})
	first = same()
	n.Kubectl(t, "delete", "pod", "-n", ns, first)
	if now := same(); now == first {
		t.Errorf("%s is gone and answers", first)
	}
}

// TestServiceTerminatingEndpoints: what ends but still serves is used while there is
// nothing else (KEP-1669).
func TestServiceTerminatingEndpoints(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: web, labels: {app: web}}, spec: {terminationGracePeriodSeconds: 8, containers: [{name: main, image: %q,
		command: [sh, -c, "probe serve :8080 still-here & trap 'sleep 7; exit' TERM; wait"], readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}}]}}`, harness.Busybox))
	n.WaitPod(t, ns, "web", false)
	s := n.Service(t, ns, "web", "web", "type: NodePort, externalTrafficPolicy: Local, internalTrafficPolicy: Local,")
	ask := func() error { return harness.CheckAnswer("http://"+s.Spec.ClusterIP+"/", "still-here") }
	harness.Eventually(t, 10*time.Second, ask)
	n.Kubectl(t, "delete", "pod", "-n", ns, "web", "--wait=false")
	harness.Eventually(t, 5*time.Second, func() error {
		list, err := n.Client.DiscoveryV1().EndpointSlices(ns).List(context.Background(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range list.Items[0].Endpoints {
			if c := e.Conditions; c.Terminating != nil && *c.Terminating && c.Serving != nil && *c.Serving {
				return nil
			}
		}
		return fmt.Errorf("the endpoint does not end: %v", list.Items[0].Endpoints)
	})
	for range 10 {
		if err := ask(); err != nil {
			t.Fatalf("while it ends: %v", err)
		}
		time.Sleep(200 * time.Millisecond) // a while, so that a late change of the rules is seen
	}
}

// TestServiceUDPFlow: datagrams of one flow go to another endpoint when theirs is gone.
func TestServiceUDPFlow(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: one, labels: {app: echo}}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [probe, echo, udp, ":8080"]}]}}`, harness.Busybox))
	n.WaitPod(t, ns, "one", false)
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: echo}, spec: {selector: {app: echo}, ports: [{port: 53, targetPort: 8080, protocol: UDP}]}}`)
	s, err := n.Client.CoreV1().Services(ns).Get(context.Background(), "echo", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("udp", net.JoinHostPort(s.Spec.ClusterIP, "53"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func() error {
		if _, err := conn.Write([]byte("hello")); err != nil {
			return err
		}
		conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, err := conn.Read(make([]byte, 100))
		return err
	}
	harness.Eventually(t, 10*time.Second, ask)
	n.Kubectl(t, "delete", "pod", "-n", ns, "one")
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: two, labels: {app: echo}}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [probe, echo, udp, ":8080"]}]}}`, harness.Busybox))
	n.WaitPod(t, ns, "two", false)
	harness.Eventually(t, 20*time.Second, ask) // the kernel would keep the flow for as long as it is asked
}

func TestNetTrace(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	pods := n.Servers(t, ns, "web", 1, "")
	s := n.Service(t, ns, "web", "web", "type: NodePort,")
	n.Service(t, ns, "nowhere", "nobody", "")
	n.Apply(t, ns, harness.ShellWith("hosted", "exec probe serve :8080 hosted", "", fmt.Sprintf("ports: [{containerPort: 8080, hostPort: %d}],", n.APIPort+3001)))
	hosted := n.WaitPod(t, ns, "hosted", false).Status.PodIP
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"web"}, []string{"chain output", "services-4: " + s.Spec.ClusterIP + ":80/TCP", "service " + ns + "/web, 1 endpoint", "it reaches " + pods[0].Status.PodIP + ":8080, pod " + ns + "/web-0"}},
		{[]string{"from", "web-0", "to", "web"}, []string{"chain prerouting", "a pod that reaches itself through a service"}},
		{[]string{"from", "203.0.113.9", "to", fmt.Sprint(n.Address(t), ":", s.Spec.Ports[0].NodePort)}, []string{"node-ports-4", "to a pod of this machine"}},
		{[]string{"nowhere"}, []string{"which has no endpoints", "the connection is reset at once", "it ends here"}},
		{[]string{fmt.Sprint("node:", n.APIPort+3001)}, []string{"host ports of all node addresses", "it reaches " + hosted + ":8080"}},
		{[]string{"from", "hosted", "203.0.113.5:443"}, []string{"the outside sees the node's address", "it goes to 203.0.113.5:443, outside"}},
		{[]string{"web:81"}, []string{"no service has the port", "it ends here"}},
	} {
		harness.Eventually(t, 5*time.Second, func() error {
			out, err := n.Trace(ns, c.args...)
			for _, want := range c.want {
				if err == nil && !strings.Contains(out, want) {
					err = fmt.Errorf("%v does not say %q", c.args, want)
				}
			}
			if err == nil && strings.Contains(out, "PROBLEM") {
				err = fmt.Errorf("%v sees a problem", c.args)
			}
			if err != nil {
				err = fmt.Errorf("%w:\n%s", err, out)
			}
			return err
		})
	}
	if out, err := n.Trace(ns, "nothing"); err == nil || !strings.Contains(out, "there is no service or pod "+ns+"/nothing") {
		t.Errorf("an unknown name: %v, %s", err, out)
	}
}

// TestServicesWithoutDefaultRoute: on a machine that is on no network but its own, the
// node's processes reach services too, of which the API server is one.
func TestServicesWithoutDefaultRoute(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	n.Network = harness.NewNetwork(t, "198.51.100.10/24")
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Servers(t, ns, "web", 1, "")
	s := n.Service(t, ns, "web", "web", "")
	url := "http://" + s.Spec.ClusterIP + "/"
	answered(t, func() (string, error) { return n.Get(url) }, "web-0")
	answered(t, func() (string, error) { return getFrom(n, ns, "web-0", url) }, "web-0")
	if got, err := n.Get(url + "addr"); harness.SeenAddress(got) != "198.51.100.10" {
		t.Errorf("the server sees %q, %v, want the node's address", got, err)
	}
	if _, err := n.Get("http://" + s.Spec.ClusterIP + ":81/"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another port: %v", err)
	}
	if out, err := n.Command("check"); strings.Contains(out, "overlaps") {
		t.Errorf("the node's own route is taken for another's: %v\n%s", err, out)
	}
	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	if out, err := n.Command("killall"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	err := n.Inside(func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: 212}, netlink.RT_FILTER_PROTOCOL)
		if err == nil && len(routes) > 0 {
			err = fmt.Errorf("routes are left: %v", routes)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
