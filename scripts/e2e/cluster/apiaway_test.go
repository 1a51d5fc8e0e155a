package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/lifecycle"
	"kedge/internal/namespaces"
	"kedge/scripts/e2e/harness"
)

// apiAway are pods on an agent, with a service and a policy: web answers client, and not
// stranger. What it asks, it asks from the pods' own networks, without the API.
type apiAway struct {
	agent            *harness.Node
	client, stranger *namespaces.Network
	direct, service  string // where web is
	name             string // of the service
}

func newAPIAway(t *testing.T, f *harness.Fleet, a *harness.Node) (x apiAway, ns string) {
	t.Helper()
	ns = f.Namespace(t)
	f.Apply(t, ns, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web}, spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}}`)
	here := "nodeName: " + a.Name + ","
	web := f.Servers(t, ns, "web", 1, here)[0]
	s := f.Service(t, ns, "web", "web", "")
	for _, name := range []string{"client", "stranger"} {
		f.Apply(t, ns, harness.Shell(name, "exec sleep 36000", here))
		f.WaitPod(t, ns, name, false)
	}
	return apiAway{
		agent: a, client: a.PodNetwork(t, ns, "client"), stranger: a.PodNetwork(t, ns, "stranger"),
		direct: net.JoinHostPort(web.Status.PodIP, "8080"), service: net.JoinHostPort(s.Spec.ClusterIP, "80"),
		name: "web." + ns + ".svc.cluster.local.",
	}, ns
}

// holds says what is not as the policy and the service have it.
func (x apiAway) holds() error {
	var errs []error
	for _, address := range []string{x.direct, x.service} {
		if conn, err := harness.DialFrom(x.client, "tcp", address); err != nil {
			errs = append(errs, fmt.Errorf("allowed: %w", err))
		} else {
			conn.Close()
		}
		if conn, err := harness.DialFrom(x.stranger, "tcp", address); err == nil {
			conn.Close()
			errs = append(errs, fmt.Errorf("%s answers a pod that the policy refuses", address))
		}
	}
	return errors.Join(errs...)
}

// named says why the service's name does not lead to it.
func (x apiAway) named() error {
	conn, err := harness.DialFrom(x.client, "udp", "10.43.0.10:53")
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, _, err := (&dns.Client{Timeout: 2 * time.Second}).ExchangeWithConn(new(dns.Msg).SetQuestion(x.name, dns.TypeA), &dns.Conn{Conn: conn})
	if err != nil {
		return err
	}
	want := netip.MustParseAddrPort(x.service).Addr().String()
	if len(answer.Answer) != 1 || answer.Answer[0].(*dns.A).A.String() != want {
		return fmt.Errorf("%s is %v, want %s", x.name, answer.Answer, want)
	}
	return nil
}

// TestAPIAway: policies are enforced, services served and names answered on a node whose
// server is gone; rules that others remove come back; and policies and services outlive
// the node's own process meanwhile, which takes them over. When the API is back, what it
// says holds again.
func TestAPIAway(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a := f.StartAgent(t)
	x, ns := newAPIAway(t, f, a)
	harness.Eventually(t, 20*time.Second, x.holds)
	harness.Eventually(t, 20*time.Second, x.named)

	// still checks that all holds for a while, as it would not if something timed out.
	still := func(what string, checks ...func() error) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			for _, check := range checks {
				if err := check(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
		}
	}
	f.Stop(t, syscall.SIGKILL, 15*time.Second)
	still("the server is gone", x.holds, x.named)

	x.removeRules(t)
	harness.Eventually(t, 10*time.Second, x.holds)

	a.Stop(t, syscall.SIGTERM, 15*time.Second)
	still("so is the agent's process", x.holds)
	if err := a.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		network, err := a.TryStatusOf("network")
		if err == nil && network.State != lifecycle.Ready {
			err = fmt.Errorf("the network is %s", network.State)
		}
		return err
	})
	still("the agent has started without a server", x.holds)

	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.WaitReady(90 * time.Second); err != nil {
		t.Fatal(err)
	}
	still("the server is back", x.holds)
	harness.Eventually(t, 20*time.Second, x.named)
	if err := f.Client.NetworkingV1().NetworkPolicies(ns).Delete(context.Background(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		conn, err := harness.DialFrom(x.stranger, "tcp", x.service)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// removeRules takes all of the node's rules away, as a firewall does that is loaded anew.
func (x apiAway) removeRules(t *testing.T) {
	t.Helper()
	if err := x.agent.Inside(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.FlushRuleset()
		return conn.Flush()
	}); err != nil {
		t.Fatal(err)
	}
}
