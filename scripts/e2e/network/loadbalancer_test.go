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

	"github.com/vishvananda/netlink"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// waitAddresses waits until a service has addresses, and returns them.
func waitAddresses(t *testing.T, n *harness.Node, namespace, name string) []string {
	t.Helper()
	var out []string
	harness.Eventually(t, 20*time.Second, func() error {
		s, err := n.Client.CoreV1().Services(namespace).Get(context.Background(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		out = nil
		for _, i := range s.Status.LoadBalancer.Ingress {
			out = append(out, i.IP)
		}
		if len(out) == 0 {
			return errors.New("no address")
		}
		return nil
	})
	return out
}

func TestLoadBalancerAtNodes(t *testing.T) {
	t.Parallel()
	n := harness.OnLAN(t)
	ns := n.Namespace(t)
	n.Servers(t, ns, "web", 1, "")
	n.Servers(t, ns, "other", 1, "")
	n.Service(t, ns, "first", "web", "type: LoadBalancer, ipFamilyPolicy: RequireDualStack,")
	if got, want := fmt.Sprint(waitAddresses(t, n.Node, ns, "first")), fmt.Sprintf("[%s %s]", harness.LANNodeV4.Addr(), harness.LANNodeV6.Addr()); got != want {
		t.Errorf("addresses %s, want %s", got, want)
	}
	for _, a := range []string{harness.LANNodeV4.Addr().String(), harness.LANNodeV6.Addr().String()} {
		answered(t, func() (string, error) { return n.GetOutside("http://"+net.JoinHostPort(a, "80")+"/", 2*time.Second) }, "web-0")
	}
	// Another one wants the same port, and gets it when it is free.
	n.Service(t, ns, "second", "other", "type: LoadBalancer,")
	n.WaitEvent(t, ns, "second", "PortTaken", "used by service "+ns+"/first;")
	n.Kubectl(t, "delete", "service", "-n", ns, "first")
	waitAddresses(t, n.Node, ns, "second")
	answered(t, func() (string, error) {
		return n.GetOutside("http://"+harness.LANNodeV4.Addr().String()+"/", 2*time.Second)
	}, "other-0")
	// The API's own port is nobody's.
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: api}, spec: {type: LoadBalancer, ports: [{port: %d}]}}`, n.APIPort))
	n.WaitEvent(t, ns, "api", "PortTaken", "used by kedge itself")
	// What is no load balancer any more has no addresses.
	n.Kubectl(t, "patch", "service", "-n", ns, "second", "-p", `{"spec": {"type": "ClusterIP"}}`)
	harness.Eventually(t, 20*time.Second, func() error {
		s, err := n.Client.CoreV1().Services(ns).Get(context.Background(), "second", metav1.GetOptions{})
		if err == nil && len(s.Status.LoadBalancer.Ingress) > 0 {
			err = fmt.Errorf("it still has %v", s.Status.LoadBalancer.Ingress)
		}
		return err
	})
}

func TestLoadBalancerOfPool(t *testing.T) {
	t.Parallel()
	n := harness.OnLAN(t, "--lb-pool=198.51.100.200-198.51.100.210,2001:db8:51::200/120,lab=198.51.100.240/28")
	ns := n.Namespace(t)
	n.Servers(t, ns, "web", 1, "")
	n.Service(t, ns, "web", "web", "type: LoadBalancer, ipFamilyPolicy: RequireDualStack, externalTrafficPolicy: Local,")
	addrs := waitAddresses(t, n.Node, ns, "web")
	if got := fmt.Sprint(addrs); got != "[198.51.100.200 2001:db8:51::200]" {
		t.Errorf("addresses %s", got)
	}
	for i, a := range addrs {
		url := "http://" + net.JoinHostPort(a, "80")
		answered(t, func() (string, error) { return n.GetOutside(url+"/", 2*time.Second) }, "web-0")
		got, err := n.GetOutside(url+"/addr", 2*time.Second)
		if want := []string{harness.LANOutsideV4.Addr().String(), harness.LANOutsideV6.Addr().String()}[i]; harness.SeenAddress(got) != want {
			t.Errorf("the server sees %q, %v, want %s", got, err, want)
		}
		answered(t, func() (string, error) { return n.Get(url + "/") }, "web-0")
		// A port that no service has there is refused, not left to whoever else may have the address.
		harness.Eventually(t, 20*time.Second, func() error {
			if _, err := n.GetOutside("http://"+net.JoinHostPort(a, "9")+"/", 2*time.Second); err == nil || !strings.Contains(err.Error(), "refused") {
				return fmt.Errorf("another port of %s: %v", a, err)
			}
			return nil
		})
	}
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: asked, annotations: {kedge.io/address-pool: lab, kedge.io/loadBalancerIPs: 198.51.100.245}}, spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 81, targetPort: 8080}]}}`)
	if got := waitAddresses(t, n.Node, ns, "asked"); got[0] != "198.51.100.245" {
		t.Errorf("address %v", got)
	}
	answered(t, func() (string, error) { return n.GetOutside("http://198.51.100.245:81/", 2*time.Second) }, "web-0")

	// Restarted, it gives the same addresses and answers for them.
	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(waitAddresses(t, n.Node, ns, "web")); got != fmt.Sprint(addrs) {
		t.Errorf("addresses after the restart: %s", got)
	}
	answered(t, func() (string, error) { return n.GetOutside("http://"+addrs[0]+"/", 2*time.Second) }, "web-0")
	n.Kubectl(t, "delete", "service", "-n", ns, "asked")
	harness.Eventually(t, 20*time.Second, func() error {
		out, err := n.GetOutside("http://198.51.100.245:81/", time.Second)
		if err == nil || strings.Contains(err.Error(), "reset") {
			return fmt.Errorf("an address that nobody has answers: %q %v", out, err)
		}
		return nil
	})
}

func TestWithoutLoadBalancer(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--disable=servicelb", "--node-ip=192.0.2.2")
	n.Network = harness.NewNetwork(t, "192.0.2.2/24")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Service(t, ns, "web", "web", "type: LoadBalancer,")
	time.Sleep(2 * time.Second) // nothing tells that nothing happens
	s, err := n.Client.CoreV1().Services(ns).Get(context.Background(), "web", metav1.GetOptions{})
	if err != nil || len(s.Status.LoadBalancer.Ingress) != 0 {
		t.Errorf("got %v %v", s.Status, err)
	}
}

// TestLoadBalancerMoves: of several nodes one answers for an address of the pool, and
// another when that one is gone.
func TestLoadBalancerMoves(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t, "--lb-pool=192.0.2.200-192.0.2.209")
	nodes := []*harness.Node{f.Node}
	for range 2 {
		a := f.NewAgent(t, "--token="+f.NewToken(t))
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, a)
	}
	for _, n := range nodes {
		harness.Eventually(t, 60*time.Second, func() error { return f.NodeIsReady(n.Name) })
	}
	ns := f.Namespace(t)
	f.Servers(t, ns, "web", 1, "nodeName: "+f.Name+",") // on the one that stays
	client, err := f.LAN.Host("client", netip.MustParsePrefix("192.0.2.100/24"))
	if err != nil {
		t.Fatal(err)
	}
	cards := map[string]*harness.Node{} // by hardware address
	for _, n := range nodes {
		h, err := n.Machine.Host()
		if err != nil {
			t.Fatal(err)
		}
		links, err := h.Netlink().LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			if l.Attrs().HardwareAddr != nil {
				cards[l.Attrs().HardwareAddr.String()] = n
			}
		}
	}
	reach := func(addr string) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c, err := client.Dial(ctx, "tcp", addr+":80")
		if err == nil {
			c.Close()
		}
		return err
	}
	announcer := func(addr string) *harness.Node {
		t.Helper()
		var found *harness.Node
		harness.Eventually(t, 20*time.Second, func() error {
			if err := reach(addr); err != nil {
				return err
			}
			neighbours, err := client.Netlink().NeighList(0, netlink.FAMILY_V4)
			if err != nil {
				return err
			}
			for _, n := range neighbours {
				if n.IP.String() == addr {
					found = cards[n.HardwareAddr.String()]
				}
			}
			if found == nil {
				return fmt.Errorf("nobody of the cluster answers for %s: %v", addr, neighbours)
			}
			return nil
		})
		return found
	}

	// Addresses are spread over the nodes: one of a few is an agent's.
	for i := range 8 {
		name := fmt.Sprint("shop-", i)
		f.Service(t, ns, name, "web", "type: LoadBalancer,")
		addr := waitAddresses(t, f.Node, ns, name)[0]
		gone := announcer(addr)
		if gone == f.Node {
			continue
		}
		t.Cleanup(func() { // what is left on its disk goes with the machine
			if err := gone.Machine.PowerOn(); err != nil {
				t.Error(err)
			}
		})
		if err := gone.Machine.PowerOff(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		harness.Eventually(t, 20*time.Second, func() error { return reach(addr) })
		t.Logf("%s answered again %s after %s was switched off", addr, time.Since(begin).Round(10*time.Millisecond), gone.Name)
		if now := announcer(addr); now == gone {
			t.Errorf("%s, which is off, still has %s", gone.Name, addr)
		}
		return
	}
	t.Error("all of eight addresses are announced by the server")
}
