package network

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// lookups is a shell's command that prints what names have.
func lookups(kind string, names ...string) string {
	return "probe lookup " + kind + " " + strings.Join(names, " ")
}

func TestNamesOfServicesAndPods(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {clusterIP: None, selector: {app: db}, ports: [{name: sql, port: 5432}]}}`)
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: db}, ports: [{name: http, port: 80, targetPort: 8080}]}}`)
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: early}, spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {app: late}, ports: [{port: 1}]}}`)
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: ready}, spec: {clusterIP: None, selector: {app: late}, ports: [{port: 1}]}}`)
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: out}, spec: {type: ExternalName, externalName: kubernetes.default.svc.cluster.local}}`)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: db}, spec: {serviceName: db, replicas: 2, podManagementPolicy: Parallel, selector: {matchLabels: {app: db}}, template: {metadata: {labels: {app: db}},
		spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [sleep, "3600"]}]}}}}`, harness.Busybox))
	n.Apply(t, ns, harness.ShellWith("late", "exec sleep 3600", "", "readinessProbe: {exec: {command: [\"false\"]}},"))
	var ips []string
	for _, name := range []string{"db-0", "db-1"} {
		ips = append(ips, n.WaitPod(t, ns, name, false).Status.PodIP)
	}
	var late string
	harness.Eventually(t, 30*time.Second, func() error {
		pod, err := n.Pod(ns, "late")
		if err == nil && pod.Status.PodIP == "" {
			err = fmt.Errorf("no address")
		}
		if err == nil {
			late = pod.Status.PodIP
		}
		return err
	})
	web, err := n.Client.CoreV1().Services(ns).Get(context.Background(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	sorted := slices.Sorted(slices.Values(ips))
	domain := ns + ".svc.cluster.local"
	script := strings.Join([]string{
		lookups("host", "web", "web."+ns, "web."+domain, "WEB."+domain+".", "db", "db-0.db", "db-1.db."+ns+".svc", "db-2.db."+domain+".", "early", "ready."+domain+".", "out", "kubernetes.default", "nothing."+domain+".", "web.nothing.svc.cluster.local."),
		lookups("host", strings.ReplaceAll(ips[0], ".", "-")+"."+ns+".pod.cluster.local"),
		lookups("srv", "_http._tcp.web", "_sql._tcp.db."+domain, "_ftp._tcp.web."+domain+"."),
		lookups("addr", web.Spec.ClusterIP, ips[1], "10.43.255.254"),
		lookups("cname", "out."+domain),
		lookups("txt", "dns-version.cluster.local."),
	}, "; ")
	want := []string{
		"web " + web.Spec.ClusterIP, "web." + ns + " " + web.Spec.ClusterIP, "web." + domain + " " + web.Spec.ClusterIP, "WEB." + domain + ". " + web.Spec.ClusterIP,
		"db " + strings.Join(sorted, " "), "db-0.db " + ips[0], "db-1.db." + ns + ".svc " + ips[1], "db-2.db." + domain + ". -", "early " + late, "ready." + domain + ". -",
		"out 10.43.0.1", "kubernetes.default 10.43.0.1", "nothing." + domain + ". -", "web.nothing.svc.cluster.local. -",
		strings.ReplaceAll(ips[0], ".", "-") + "." + ns + ".pod.cluster.local " + ips[0],
		"_http._tcp.web web." + domain + ".:80", "_sql._tcp.db." + domain + " db-0.db." + domain + ".:5432 db-1.db." + domain + ".:5432", "_ftp._tcp.web." + domain + ". -",
		web.Spec.ClusterIP + " web." + domain + ".", ips[1] + " " + strings.ReplaceAll(ips[1], ".", "-") + ".web." + domain + ". db-1.db." + domain + ".", "10.43.255.254 -",
		"out." + domain + " kubernetes.default.svc.cluster.local.",
		"dns-version.cluster.local. 1.1.0",
	}
	for name, more := range map[string]string{
		"of-a-pod":           "",
		"of-a-pod-with-host": "hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet,",
	} {
		began := time.Now()
		got := strings.Split(strings.TrimSpace(n.RunPod(t, ns, name, script, more)), "\n")
		for i, line := range want {
			if i >= len(got) || got[i] != line {
				t.Errorf("%s: line %d of\n%s\nis not %q", name, i+1, strings.Join(got, "\n"), line)
				break
			}
		}
		t.Logf("%s: %s with the pod's start", name, time.Since(began))
	}
	// The C program's resolver.
	if out := n.RunPod(t, ns, "in-c", "nslookup web."+domain, ""); !strings.Contains(out, web.Spec.ClusterIP) {
		t.Errorf("nslookup prints\n%s", out)
	}
	// From the node itself.
	if got := n.AskDNS(t, "10.43.0.10", "web."+domain+".", dns.TypeA); got != web.Spec.ClusterIP {
		t.Errorf("the node gets %q", got)
	}
}

func TestServiceOfDNS(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	s, err := n.Client.CoreV1().Services(metav1.NamespaceSystem).Get(context.Background(), "kube-dns", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Spec.ClusterIP != "10.43.0.10" || s.Labels["k8s-app"] != "kube-dns" {
		t.Errorf("got %+v", s)
	}
	ns := n.Namespace(t)
	out := n.RunPod(t, ns, "metrics", "probe get http://kube-dns.kube-system:9153/metrics", "")
	if !strings.Contains(out, "coredns_dns_requests_total{") {
		t.Errorf("metrics:\n%s", out)
	}
}

// outsideZone is a name server for outside names, next to the node: what ends in example.com
// has an address.
func outsideZone(t *testing.T, n *harness.Node, address string) (stop func()) {
	t.Helper()
	var pc net.PacketConn
	err := n.Inside(func() (err error) {
		pc, err = net.ListenPacket("udp", address+":53")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		a := new(dns.Msg).SetReply(m)
		q := m.Question[0]
		switch {
		case !strings.HasSuffix(q.Name, "example.com."):
			a.Rcode = dns.RcodeNameError
		case q.Qtype == dns.TypeA:
			a.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(192, 0, 2, 80)}}
		}
		w.WriteMsg(a)
	})}
	go s.ActivateAndServe()
	return func() { s.Shutdown() }
}

// TestNamesWithoutNetwork takes the node's name server away, restarts kedge without one,
// and brings it back; the cluster's names must not notice.
func TestNamesWithoutNetwork(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--node-ip=192.0.2.2")
	n.Network = harness.NewNetwork(t, "192.0.2.2/24")
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	resolvConf := filepath.Join(n.Dir, "resolv.conf")
	if err := os.WriteFile(resolvConf, []byte("nameserver 192.0.2.53\nnameserver 127.0.0.99\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.Flags = append(n.Flags, "--resolv-conf="+resolvConf)
	stop := outsideZone(t, n, "127.0.0.99")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	service, err := n.Client.CoreV1().Services(metav1.NamespaceSystem).Get(context.Background(), "kube-dns", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	server := service.Spec.ClusterIP
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("p", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "p", false)
	inPod := func(name, want string) {
		t.Helper()
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := n.TryKubectl(nil, "exec", "-n", ns, "p", "--", "probe", "lookup", "host", name)
			if err == nil && strings.TrimSpace(out) != name+" "+want {
				err = fmt.Errorf("got %q, want %q", out, want)
			}
			return err
		})
	}
	kubernetes := strings.TrimSuffix(server, ".10") + ".1"
	inPod("www.example.com", "192.0.2.80")
	inPod("kubernetes.default", kubernetes)
	if got := n.AskDNS(t, server, "nowhere.example.org.", dns.TypeA); got != "NXDOMAIN" {
		t.Errorf("a name that does not exist: %s", got)
	}

	// Settings are in force at once, and mistakes are told.
	apply := func(hosts string) {
		t.Helper()
		n.Apply(t, metav1.NamespaceSystem, fmt.Sprintf(`{apiVersion: v1, kind: ConfigMap, metadata: {name: kedge-dns}, data: {hosts: %q, rewrites: "shop.lan www.example.com"}}`, hosts))
	}
	apply("192.0.2.7 printer.lan")
	inPod("printer.lan", "192.0.2.7")
	inPod("shop.lan", "192.0.2.80")
	apply("printer.lan 192.0.2.7")
	n.WaitEvent(t, metav1.NamespaceSystem, "kedge-dns", "Mistake", "hosts, line 1: \"printer.lan\" is not an address")
	inPod("printer.lan", "192.0.2.7")

	stop()
	inPod("www.example.com", "192.0.2.80") // an old answer
	inPod("kubernetes.default", kubernetes)

	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	if got := n.AskDNS(t, server, "kubernetes.default.svc.cluster.local.", dns.TypeA); !strings.Contains(got, "refused") {
		t.Errorf("while kedge is stopped: %s", got)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	inPod("kubernetes.default", kubernetes)
	harness.Eventually(t, 20*time.Second, func() error {
		began := time.Now()
		got := n.AskDNS(t, server, "other.example.com.", dns.TypeA)
		if took := time.Since(began); got != "SERVFAIL" || took > time.Second {
			return fmt.Errorf("offline: %s after %s", got, took)
		}
		return nil
	})
	outsideZone(t, n, "127.0.0.99")
	inPod("other.example.com", "192.0.2.80")

	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	if out, err := n.Command("killall"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	err = n.Inside(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		routes, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_LOCAL, LinkIndex: lo.Attrs().Index}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF)
		for _, r := range routes {
			if r.Dst != nil && r.Dst.IP.String() == server {
				return fmt.Errorf("killall left the route %s", r)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestWithoutDNS(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--disable=coredns", "--node-ip=192.0.2.2")
	n.Network = harness.NewNetwork(t, "192.0.2.2/24")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	list, err := n.Client.CoreV1().Services(metav1.NamespaceSystem).List(context.Background(), metav1.ListOptions{})
	if err != nil || slices.ContainsFunc(list.Items, func(s corev1.Service) bool { return s.Name == "kube-dns" }) {
		t.Errorf("got %v %v", list.Items, err)
	}
	if lines := n.LogLines(t, "component=dns"); len(lines) > 0 {
		t.Errorf("it speaks: %v", lines)
	}
}
