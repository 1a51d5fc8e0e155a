package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/internal/test/await"
	testhost "kedge/internal/test/host"
)

// world is a resolver with its API, in the test program's own network.
type world struct {
	t      *testing.T
	client *fake.Clientset
	cfg    Config
	r      *Resolver
	stop   func()
}

// start runs a resolver whose host has the given name servers.
func start(t *testing.T, resolvConf string, objects ...runtime.Object) *world {
	t.Helper()
	testhost.RequireIsolation(t)
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte(resolvConf), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Addresses = []netip.Addr{netip.MustParseAddr("10.43.0.10"), netip.MustParseAddr("fd43::a")}
	cfg.Ranges = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")}
	cfg.ResolvConf = file
	objects = append(objects, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	w := &world{t: t, cfg: cfg, client: fake.NewClientset(objects...)}
	w.run()
	t.Cleanup(func() {
		w.stop()
		if err := Cleanup(cfg.Addresses); err != nil {
			t.Error(err)
		}
	})
	return w
}

// run starts a resolver and waits until it is ready.
func (w *world) run() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	factory := informers.NewSharedInformerFactory(w.client, 0)
	r, err := New(w.cfg, factory, w.client, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	factory.Start(ctx.Done())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- r.Run(ctx, sync.OnceFunc(func() { close(ready) })) }()
	select {
	case <-ready:
	case err := <-done:
		w.t.Fatalf("ended before it was ready: %v", err)
	case <-time.After(10 * time.Second):
		w.t.Fatal("not ready")
	}
	w.r = r
	w.stop = func() {
		cancel()
		factory.Shutdown()
		select {
		case err := <-done:
			if err != nil {
				w.t.Error(err)
			}
		case <-time.After(5 * time.Second):
			w.t.Error("does not stop")
		}
		w.stop = func() {}
	}
}

// exchange sends a query to one of the resolver's addresses over "udp" or "tcp".
func (w *world) exchange(network, server, name string, qtype uint16) *dns.Msg {
	w.t.Helper()
	c := &dns.Client{Net: network, Timeout: 10 * time.Second}
	m, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, qtype), "["+server+"]:53")
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	return m
}

// addresses returns the addresses of a name, sorted.
func (w *world) addresses(name string, qtype uint16) string {
	w.t.Helper()
	m := w.exchange("udp", "10.43.0.10", name, qtype)
	var out []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		case *dns.CNAME:
			out = append(out, rr.Target)
		case *dns.PTR:
			out = append(out, rr.Ptr)
		}
	}
	slices.Sort(out)
	if m.Rcode != dns.RcodeSuccess {
		out = append(out, dns.RcodeToString[m.Rcode])
	}
	return strings.Join(out, " ")
}

// eventually waits until a name has these addresses.
func (w *world) eventually(name string, qtype uint16, want string) {
	w.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		got := w.addresses(name, qtype)
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s is %q, want %q", name, got, want)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func clusterIP(name, ip string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec:       corev1.ServiceSpec{ClusterIP: ip, ClusterIPs: []string{ip}, Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}}},
	}
}

func externalName(name, target string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: target},
	}
}

func slice(service string, addrs ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service + "-a", Namespace: "default", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, a := range addrs {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s
}

// upstream is a name server on 127.0.0.2 with one name.
func upstream(t *testing.T, name, record string) {
	t.Helper()
	testhost.RequireIsolation(t)
	mux := dns.NewServeMux()
	mux.HandleFunc(".", func(w dns.ResponseWriter, m *dns.Msg) {
		a := new(dns.Msg).SetReply(m)
		rr, err := dns.NewRR(name + " 300 IN " + record)
		if err != nil {
			panic(err)
		}
		switch q := m.Question[0]; {
		case !strings.EqualFold(q.Name, name):
			a.Rcode = dns.RcodeNameError
		case rr.Header().Rrtype == q.Qtype:
			a.Answer = append(a.Answer, rr)
		}
		w.WriteMsg(a)
	})
	up := make(chan struct{})
	socket := await.Listener(t, func() (net.PacketConn, error) { return net.ListenPacket("udp", "127.0.0.2:53") })
	s := &dns.Server{PacketConn: socket, Handler: mux, NotifyStartedFunc: func() { close(up) }}
	failed := make(chan error, 1)
	go func() { failed <- s.ActivateAndServe() }()
	select {
	case <-up:
	case err := <-failed:
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Shutdown() })
}
