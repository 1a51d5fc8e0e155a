package network

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"

	"kedge/scripts/e2e/harness"
)

// agnhostPod is a pod that serves its name at TCP 80 (named web) and 81 and UDP 80.
func agnhostPod(name, labels string) string {
	container := func(n, args, port string) string {
		return fmt.Sprintf(`{name: %s, image: %q, args: [serve-hostname, %s], ports: [%s]}`, n, harness.Agnhost, args, port)
	}
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {%s}}, spec: {terminationGracePeriodSeconds: 1, containers: [%s, %s, %s]}}`, name, labels,
		container("web", `--tcp, --http=false, --port, "80"`, "{containerPort: 80, name: web}"),
		container("other", `--tcp, --http=false, --port, "81"`, "{containerPort: 81}"),
		container("udp", `--udp, --http=false, --port, "80"`, "{containerPort: 80, protocol: UDP}"))
}

// podConnects says whether a pod reaches an address, by agnhost in it.
func podConnects(n *harness.Node, namespace, pod, address, protocol string) error {
	out, err := n.TryKubectl(nil, "exec", "-n", namespace, pod, "-c", "web", "--", "/agnhost", "connect", "--timeout=1s", "--protocol="+protocol, address)
	if err != nil {
		return fmt.Errorf("%s: %s", pod, strings.TrimSpace(out))
	}
	return nil
}

func TestNetworkPolicies(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	one, two := n.Namespace(t), n.Namespace(t)
	n.Kubectl(t, "label", "namespace", two, "team=blue")
	n.Apply(t, one, agnhostPod("server", "app: server"))
	n.Apply(t, one, agnhostPod("friend", "app: friend"))
	n.Apply(t, two, agnhostPod("stranger", "app: friend"))
	ip := map[string]string{}
	for pod, ns := range map[string]string{"server": one, "friend": one, "stranger": two} {
		ip[pod] = n.WaitPod(t, ns, pod, false).Status.PodIP
	}
	where := map[string]string{"server": one, "friend": one, "stranger": two}

	// want lists connections as "from>to:port/protocol"; all others of those tried
	// must be refused.
	tried := []string{
		"friend>server:80/tcp", "friend>server:81/tcp", "friend>server:80/udp", "stranger>server:80/tcp", "stranger>server:81/tcp",
		"server>friend:80/tcp", "server>stranger:80/tcp", "server>stranger:80/udp",
	}
	check := func(want ...string) {
		t.Helper()
		for _, c := range tried {
			from, rest, _ := strings.Cut(c, ">")
			to, rest, _ := strings.Cut(rest, ":")
			port, protocol, _ := strings.Cut(rest, "/")
			allowed := false
			for _, w := range want {
				allowed = allowed || w == "all" || w == c
			}
			harness.Eventually(t, 20*time.Second, func() error {
				err := podConnects(n, where[from], from, net.JoinHostPort(ip[to], port), protocol)
				if allowed || err == nil && !allowed {
					if err == nil && !allowed {
						return fmt.Errorf("%s is allowed", c)
					}
					return err
				}
				return nil
			})
		}
		// The node itself always reaches its pods: probes come from there.
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip["server"], "80"), 2*time.Second)
		if err != nil {
			t.Errorf("from the node: %v", err)
			return
		}
		conn.Close()
	}
	policy := func(spec string) {
		t.Helper()
		n.Apply(t, one, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {matchLabels: {app: server}}, `+spec+`}}`)
	}
	out := []string{"server>friend:80/tcp", "server>stranger:80/tcp", "server>stranger:80/udp"}
	in := []string{"friend>server:80/tcp", "friend>server:81/tcp", "friend>server:80/udp", "stranger>server:80/tcp", "stranger>server:81/tcp"}

	check("all")
	policy(`policyTypes: [Ingress]`)
	check(out...)
	policy(`policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]`)
	check(append(out, "friend>server:80/tcp", "friend>server:81/tcp", "friend>server:80/udp")...)
	policy(`policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {app: friend}}}], ports: [{port: web}]}]`)
	check(append(out, "stranger>server:80/tcp")...)
	policy(`policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [` + ip["stranger"] + `/32]}}], ports: [{port: 81, endPort: 90}, {port: 80, protocol: UDP}]}]`)
	check(append(out, "friend>server:81/tcp", "friend>server:80/udp")...)
	policy(`policyTypes: [Egress]`)
	check(in...)
	policy(`policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{protocol: UDP}]}]`)
	check(append(in, "server>stranger:80/udp")...)
	n.Kubectl(t, "label", "namespace", two, "team=red", "--overwrite")
	check(in...)
	policy(`policyTypes: [Ingress, Egress], egress: [{ports: [{port: web}]}]`)
	check("server>friend:80/tcp", "server>stranger:80/tcp")
	n.Kubectl(t, "delete", "networkpolicy", "-n", one, "p")
	check("all")
}

// TestPolicyCutsEstablishedConnection: a connection ends when a policy comes that
// does not allow it, in whichever direction data flow, and goes on when it is
// allowed again in time.
func TestPolicyCutsEstablishedConnection(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, agnhostPod("server", "app: server"))
	n.Apply(t, ns, agnhostPod("client", "app: client"))
	ip := n.WaitPod(t, ns, "server", false).Status.PodIP
	n.WaitPod(t, ns, "client", false)
	server, client := n.PodNetwork(t, ns, "server"), n.PodNetwork(t, ns, "client")
	for _, sender := range []string{"client", "server"} {
		t.Run(sender+"-sends", func(t *testing.T) {
			var l net.Listener
			err := server.Do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(ip, "99")); return err })
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			out, err := harness.DialFrom(client, "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			in, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			from, to := out, in
			if sender == "server" {
				from, to = in, out
			}
			flows := func(limit time.Duration) bool {
				if _, err := from.Write([]byte("x")); err != nil {
					return false
				}
				to.SetReadDeadline(time.Now().Add(limit))
				_, err := io.ReadFull(to, make([]byte, 1))
				return err == nil
			}
			if !flows(2 * time.Second) {
				t.Fatal("the connection carries nothing")
			}
			n.Apply(t, ns, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: deny}, spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}}`)
			harness.Eventually(t, 10*time.Second, func() error {
				if flows(500 * time.Millisecond) {
					return errors.New("the connection still carries data")
				}
				return nil
			})
			n.Kubectl(t, "delete", "networkpolicy", "-n", ns, "deny")
			to.SetReadDeadline(time.Now().Add(20 * time.Second)) // the sender tries again ever more seldom
			if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
				t.Errorf("the connection did not go on: %v", err)
			}
		})
	}
}

// TestPolicyBeforeFirstPacket starts pods that send at once in a namespace that
// refuses it, and some in one that does not to show that it would be seen.
func TestPolicyBeforeFirstPacket(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	closed, open := n.Namespace(t), n.Namespace(t)
	n.Apply(t, open, agnhostPod("listener", "app: listener"))
	ip := n.WaitPod(t, open, "listener", false).Status.PodIP
	var conn net.PacketConn
	err := n.PodNetwork(t, open, "listener").Do(func() (err error) { conn, err = net.ListenPacket("udp", net.JoinHostPort(ip, "9")); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var fromClosed, fromOpen atomic.Int32
	go func() {
		buf := make([]byte, 64)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if strings.HasPrefix(string(buf[:n]), "closed") {
				fromClosed.Add(1)
			} else {
				fromOpen.Add(1)
			}
		}
	}()
	n.Apply(t, closed, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: deny}, spec: {podSelector: {}, policyTypes: [Egress]}}`)
	const pods = 8
	for i := range pods {
		for _, ns := range []string{closed, open} {
			word := "open"
			if ns == closed {
				word = "closed"
			}
			n.Apply(t, ns, harness.Shell(fmt.Sprint("p", i), fmt.Sprintf("probe send udp %s:9 %s; probe send udp %[1]s:9 %[2]s", ip, word), ""))
		}
	}
	for i := range pods {
		n.WaitPod(t, open, fmt.Sprint("p", i), true)
		n.WaitPod(t, closed, fmt.Sprint("p", i), true)
	}
	if got := fromOpen.Load(); got < pods {
		t.Errorf("only %d packets of pods that may send", got)
	}
	if got := fromClosed.Load(); got > 0 {
		t.Errorf("%d packets of pods that may not send", got)
	}
}

// TestPolicyOutlivesKedge: while kedge is restarted, killed, and its rules are
// removed by others, nothing that is refused gets through for longer than a repair
// takes, and nothing that is allowed is interrupted.
func TestPolicyOutlivesKedge(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {matchLabels: {app: server}}, ingress: [{ports: [{port: 80}]}]}}`)
	n.Apply(t, ns, agnhostPod("server", "app: server"))
	n.Apply(t, ns, agnhostPod("client", "app: client"))
	ip := n.WaitPod(t, ns, "server", false).Status.PodIP
	n.WaitPod(t, ns, "client", false)
	client := n.PodNetwork(t, ns, "client")

	var leaks, failures, successes atomic.Int32
	stop := make(chan struct{})
	done := make(chan struct{}, 2)
	try := func(port string, f func(error)) {
		defer func() { done <- struct{}{} }()
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			conn, err := harness.DialFrom(client, "tcp", net.JoinHostPort(ip, port))
			if err == nil {
				conn.Close()
			}
			f(err)
		}
	}
	go try("80", func(err error) {
		if err != nil {
			failures.Add(1)
		} else {
			successes.Add(1)
		}
	})
	go try("81", func(err error) {
		if err == nil {
			leaks.Add(1)
		}
	})
	restart := func(what string, sig syscall.Signal) {
		t.Helper()
		if err := n.Signal(sig, 20*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1500 * time.Millisecond) // nobody looks after the rules meanwhile
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		if l, f := leaks.Load(), failures.Load(); l > 0 || f > 0 {
			t.Errorf("%s: %d refused connections got through, %d allowed ones failed", what, l, f)
		}
	}
	restart("restart", syscall.SIGTERM)
	restart("kill", syscall.SIGKILL)
	close(stop)
	<-done
	<-done
	if successes.Load() < 50 {
		t.Errorf("only %d connections were made meanwhile: the test shows little", successes.Load())
	}

	refused := func() error {
		conn, err := harness.DialFrom(client, "tcp", net.JoinHostPort(ip, "81"))
		if err == nil {
			conn.Close()
			return errors.New("a refused connection gets through")
		}
		return nil
	}
	// Another program removes all rules, as a firewall does that is loaded anew. It
	// must be another process: the node knows its own changes.
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.DelTable(&nftables.Table{Name: "kedge-" + n.Name + "/policy", Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 3*time.Second, refused)

	if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	flags := n.Flags
	n.Flags = append(flags[:len(flags):len(flags)], "--disable-network-policy")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if refused() == nil {
		t.Error("policies are enforced although that is disabled")
	}
	if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	n.Flags = flags
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 5*time.Second, refused)
}

// clusterPolicyKind stands for the definition that users install; this one checks
// nothing.
const clusterPolicyKind = `{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition,
	metadata: {name: clusternetworkpolicies.policy.networking.k8s.io, annotations: {api-approved.kubernetes.io: unapproved}},
	spec: {group: policy.networking.k8s.io, scope: Cluster, names: {plural: clusternetworkpolicies, singular: clusternetworkpolicy, kind: ClusterNetworkPolicy},
	versions: [{name: v1alpha2, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]}}`

// TestClusterNetworkPolicy: the kind is installed while the node runs; the admin
// tier overrides a NetworkPolicy, which overrides the baseline tier.
func TestClusterNetworkPolicy(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Kubectl(t, "label", "namespace", ns, "cluster-policy="+ns)
	n.Apply(t, ns, agnhostPod("server", "app: server"))
	n.Apply(t, ns, agnhostPod("client", "app: client"))
	ip := n.WaitPod(t, ns, "server", false).Status.PodIP
	n.WaitPod(t, ns, "client", false)
	client := n.PodNetwork(t, ns, "client")
	want := func(port string, allowed bool) {
		t.Helper()
		harness.Eventually(t, 20*time.Second, func() error {
			conn, err := harness.DialFrom(client, "tcp", net.JoinHostPort(ip, port))
			if err == nil {
				conn.Close()
			}
			if (err == nil) != allowed {
				return fmt.Errorf("port %s: allowed: %v (%v), want %v", port, err == nil, err, allowed)
			}
			return nil
		})
	}
	n.Apply(t, ns, clusterPolicyKind)
	t.Cleanup(func() { n.TryKubectl(nil, "delete", "crd", "clusternetworkpolicies.policy.networking.k8s.io") })
	policy := func(name, tier, rules string) {
		t.Helper()
		manifest := fmt.Sprintf(`{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: %s}, spec: {tier: %s, priority: 10, subject: {namespaces: {matchLabels: {cluster-policy: %s}}}, %s}}`, name, tier, ns, rules)
		harness.Eventually(t, 20*time.Second, func() error { // the API serves the kind a moment after it is installed
			out, err := n.TryKubectl(strings.NewReader(manifest), "apply", "-f", "-")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	want("80", true)
	policy("baseline", "Baseline", `ingress: [{action: Deny, from: [{namespaces: {}}]}]`)
	want("80", false)
	n.Apply(t, ns, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: allow}, spec: {podSelector: {}, ingress: [{}]}}`)
	want("80", true)
	want("81", true)
	policy("admin", "Admin", `ingress: [{action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 81}}}]}]`)
	want("81", false)
	want("80", true)
	n.Kubectl(t, "delete", "networkpolicy", "-n", ns, "allow")
	want("80", false)
	n.Kubectl(t, "delete", "crd", "clusternetworkpolicies.policy.networking.k8s.io")
	want("80", true)
	want("81", true)
}
