package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"kedge/internal/test/host"
)

// Addresses in the namespace of a bench.
const (
	apiAddress      = "127.0.0.1:18080"
	upstreamAddress = "127.0.0.2:53"
	kedgeAddress    = "10.43.0.10"
	corednsAddress  = "10.43.0.11"
)

// bench is a network namespace with an API server, a name server for outside names, and the resolvers that are
// started in it.
type bench struct {
	dir   string // for files; removed by close
	lan   *host.LAN
	host  *host.Host
	api   *http.Server
	zones []*dns.Server
}

func newBench(o objects) (b *bench, err error) {
	b = &bench{}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.dir, err = os.MkdirTemp("", "bench-dns"); err != nil {
		return b, err
	}
	if b.lan, err = host.NewLAN(); err != nil {
		return b, err
	}
	if b.host, err = b.lan.Host("bench", netip.MustParsePrefix("192.0.2.1/24")); err != nil {
		return b, err
	}
	// kedge makes its address local itself.
	lo, err := b.host.Netlink().LinkByName("lo")
	if err != nil {
		return b, err
	}
	address, err := netlink.ParseAddr(corednsAddress + "/32")
	if err != nil {
		return b, err
	}
	if err := b.host.Netlink().AddrAdd(lo, address); err != nil {
		return b, err
	}
	listener, err := b.host.Listen("tcp", apiAddress)
	if err != nil {
		return b, err
	}
	b.api = &http.Server{Handler: api(o), ReadHeaderTimeout: time.Minute}
	go b.api.Serve(listener)
	conn, err := b.host.ListenPacket("udp", upstreamAddress)
	if err != nil {
		return b, err
	}
	if listener, err = b.host.Listen("tcp", upstreamAddress); err != nil {
		return b, err
	}
	for _, s := range []*dns.Server{{PacketConn: conn}, {Listener: listener}} {
		s.Handler = dns.HandlerFunc(outsideName)
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go s.ActivateAndServe()
		<-started
		b.zones = append(b.zones, s)
	}
	return b, os.WriteFile(b.path("resolv.conf"), []byte("nameserver 127.0.0.2\n"), 0o644)
}

// outsideName answers every query for an address, and denies all other records.
func outsideName(w dns.ResponseWriter, m *dns.Msg) {
	a := new(dns.Msg).SetReply(m)
	if q := m.Question[0]; q.Qtype == dns.TypeA {
		a.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: net.IPv4(192, 0, 2, 80)}}
	} else {
		a.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: "example.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 3600}, Ns: "ns.example.", Mbox: "h.example.", Minttl: 3600}}
	}
	_ = w.WriteMsg(a)
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) close() error {
	var errs []error
	if b.api != nil {
		errs = append(errs, b.api.Close())
	}
	for _, s := range b.zones {
		errs = append(errs, s.Shutdown())
	}
	if b.lan != nil {
		errs = append(errs, b.lan.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
}

// resolver is a running resolver.
type resolver struct {
	name    string
	address string
	cmd     *exec.Cmd
}

// programs are built by make bench-dns.
const programs = "build/bench"

// kedge starts kedge's resolver.
func (b *bench) kedge(root string) (*resolver, error) {
	return b.start("kedge", kedgeAddress, filepath.Join(root, programs, "resolver"),
		"-api=http://"+apiAddress, "-addresses="+kedgeAddress, "-resolv-conf="+b.path("resolv.conf"))
}

// coredns starts CoreDNS like a cluster does: with the plugins and the cache of kubeadm's and k3s's Corefile.
// Those do not log queries either.
func (b *bench) coredns(root string) (*resolver, error) {
	corefile := fmt.Sprintf(`.:53 {
	bind %s
	errors
	prometheus %s:9153
	kubernetes cluster.local in-addr.arpa ip6.arpa {
		endpoint http://%s
		pods insecure
		fallthrough in-addr.arpa ip6.arpa
	}
	forward . %s
	cache 30
	loadbalance
}
`, corednsAddress, corednsAddress, apiAddress, upstreamAddress)
	if err := os.WriteFile(b.path("Corefile"), []byte(corefile), 0o644); err != nil {
		return nil, err
	}
	return b.start("CoreDNS", corednsAddress, filepath.Join(root, programs, "coredns"), "-conf", b.path("Corefile"))
}

// start starts a resolver and waits until it knows the cluster.
func (b *bench) start(name, address, program string, args ...string) (*resolver, error) {
	log, err := os.Create(b.path(name + ".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := b.host.Start(cmd); err != nil {
		return nil, fmt.Errorf("%w; run make bench-dns", err)
	}
	r := &resolver{name: name, address: address, cmd: cmd}
	deadline := time.Now().Add(60 * time.Second)
	for {
		m, err := b.ask(r, "svc-0.default.svc.cluster.local.", dns.TypeA)
		if err == nil && len(m.Answer) > 0 {
			return r, nil
		}
		if time.Now().After(deadline) {
			out, _ := os.ReadFile(log.Name())
			return nil, errors.Join(fmt.Errorf("%s does not answer (%v): %s", name, err, out), r.stop())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (r *resolver) stop() error {
	_ = r.cmd.Process.Signal(syscall.SIGTERM) // it may have exited
	done := make(chan error, 1)
	go func() { done <- r.cmd.Wait() }()
	select {
	case <-done:
		return nil
	case <-time.After(10 * time.Second):
		return r.cmd.Process.Kill()
	}
}

// dial opens a socket to a resolver inside the namespace.
func (b *bench) dial(r *resolver, network string) (net.Conn, error) {
	return b.host.Dial(context.Background(), network, r.address+":53")
}

// ask sends a query over TCP, so that the answer is not truncated.
func (b *bench) ask(r *resolver, name string, qtype uint16) (*dns.Msg, error) {
	conn, err := b.dial(r, "tcp")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c := &dns.Client{Net: "tcp", Timeout: 5 * time.Second}
	m, _, err := c.ExchangeWithConn(new(dns.Msg).SetQuestion(name, qtype), &dns.Conn{Conn: conn})
	return m, err
}
