package policy

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"kedge/internal/namespaces"
	"kedge/network/cni"
	"kedge/network/nft"
	"kedge/network/nft/policies"
)

// station is a node with pods, on which policies are in force.
type station struct {
	*lab
	engine *engine
}

func newStation(t testing.TB) *station {
	l := newLab(t)
	t.Cleanup(func() { nft.RemoveTables("node1") })
	s := &station{l, newEngine(policies.NewTable("node1"))}
	s.engine.applyAll()
	return s
}

// pod makes pod number i of namespace default with a label app.
func (s *station) pod(i int, app string) *namespaces.Network {
	ns := s.join(i)
	key := podKey{"default", app}
	addrs := []netip.Addr{podAddr(i, false), podAddr(i, true)}
	s.engine.setPod(key, &pod{key: key, uid: app, labels: labels.Set{"app": app}, addrs: addrs, peer: true})
	s.engine.attach(newAttachment(cni.Attachment{Owner: app, Namespace: "default", Name: app, UID: app, Addrs: addrs}))
	return ns
}

// policy applies a policy in namespace default. An empty specification removes it.
func (s *station) policy(name, spec string) {
	s.t.Helper()
	key := podKey{"default", name}
	if spec == "" {
		s.engine.setPolicy(key, nil)
	} else {
		np := &networkingv1.NetworkPolicy{}
		s.must(yaml.Unmarshal([]byte("{metadata: {namespace: default, name: "+name+"}, spec: {"+spec+"}}"), np))
		read, err := newPolicy(np)
		s.must(err)
		s.engine.setPolicy(key, read)
	}
	s.must(s.engine.table.Commit())
}

func (s *station) want(what string, from *namespaces.Network, network string, to netip.Addr, port uint16, want bool) {
	s.t.Helper()
	if got := as(want, func() bool { return s.reaches(from, network, to, port) }); got != want {
		s.t.Errorf("%s: passes: %v, want %v", what, got, want)
	}
}

// as repeats a check that should succeed: packets are late on a busy machine.
func as(want bool, try func() bool) bool {
	for deadline := time.Now().Add(2 * time.Second); ; {
		if got := try(); got == want || !want || time.Now().After(deadline) {
			return got
		}
	}
}

// reaches connects from a namespace, or from the node where that is nil.
func (s *station) reaches(from *namespaces.Network, network string, to netip.Addr, port uint16) (ok bool) {
	try := func() error {
		conn, err := net.DialTimeout(network, netip.AddrPortFrom(to, port).String(), quick)
		if err == nil {
			defer conn.Close()
			if strings.HasPrefix(network, "udp") {
				conn.SetDeadline(time.Now().Add(quick))
				conn.Write([]byte("?"))
				_, err = conn.Read(make([]byte, 1))
			}
		}
		ok = answered(err)
		return nil
	}
	if from == nil {
		s.must(try())
	} else {
		s.must(from.Do(try))
	}
	return ok
}

// answered reports whether a packet went to the other end and back: the port there is
// closed, which causes an answer.
func answered(err error) bool { return err == nil || errors.Is(err, syscall.ECONNREFUSED) }

const denyAll = `podSelector: {}, policyTypes: [Ingress, Egress]`

func TestNodeAndItsPods(t *testing.T) {
	s := newStation(t)
	a, b := s.pod(0, "a"), s.pod(1, "b")
	lo, err := netlink.LinkByName("lo")
	s.must(err)
	node := netip.MustParseAddr("192.0.2.1")
	s.must(netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: node.AsSlice(), Mask: net.CIDRMask(32, 32)}}))
	t.Cleanup(func() {
		netlink.AddrDel(lo, &netlink.Addr{IPNet: &net.IPNet{IP: node.AsSlice(), Mask: net.CIDRMask(32, 32)}})
	})
	s.policy("deny", denyAll)
	for _, v6 := range []bool{false, true} {
		s.want("pod to pod", a, "tcp", podAddr(1, v6), 80, false)
		s.want("pod to itself", a, "tcp", podAddr(0, v6), 80, true)
		s.want("node to pod, TCP", nil, "tcp", podAddr(0, v6), 80, true)
		s.want("node to pod, UDP", nil, "udp", podAddr(1, v6), 80, true)
	}
	s.want("pod to its node", a, "tcp", node, 80, false)
	s.policy("node", `podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 192.0.2.1/32}}], ports: [{port: 80}]}]`)
	s.want("pod to its node, allowed", a, "tcp", node, 80, true)
	s.want("to another port", a, "tcp", node, 81, false)
	s.want("another pod to the node", b, "tcp", node, 80, false)
}

// The resolver is an address of the node that policies see as a pod.
func TestResolverIsLikeAPod(t *testing.T) {
	s := newStation(t)
	a := s.pod(0, "a")
	lo, err := netlink.LinkByName("lo")
	s.must(err)
	dns := netip.MustParseAddr("10.43.0.10")
	route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: dns.AsSlice(), Mask: net.CIDRMask(32, 32)}, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
	s.must(netlink.RouteAdd(route))
	t.Cleanup(func() { netlink.RouteDel(route) })
	s.engine.setNamespace("kube-system", labels.Set{"kubernetes.io/metadata.name": "kube-system"})
	s.engine.setPod(podKey{"kube-system", "resolver"}, newResolver([]netip.Addr{dns}))
	s.policy("deny", denyAll)
	s.want("refused", a, "udp", dns, 53, false)
	for _, to := range []string{
		`to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: 53, protocol: UDP}, {port: 53}]`,
		`to: [{namespaceSelector: {}}], ports: [{port: dns, protocol: UDP}, {port: dns-tcp}]`,
		`ports: [{port: 53, protocol: UDP}, {port: 53}]`,
	} {
		s.policy("dns", `podSelector: {}, policyTypes: [Egress], egress: [{`+to+`}]`)
		s.want("UDP with "+to, a, "udp", dns, 53, true)
		s.want("TCP with "+to, a, "tcp", dns, 53, true)
		s.want("another port with "+to, a, "tcp", dns, 54, false)
	}
}

// translate redirects packets for one address to another, as services do.
func (s *station) translate(from, to netip.Addr, masquerade bool) {
	s.t.Helper()
	conn, err := nftables.New()
	s.must(err)
	table := conn.AddTable(&nftables.Table{Name: "services", Family: nftables.TableFamilyINet})
	s.t.Cleanup(func() { conn.DelTable(table); conn.Flush() })
	pre := conn.AddChain(&nftables.Chain{Name: "pre", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
	conn.AddRule(&nftables.Rule{Table: table, Chain: pre, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: from.AsSlice()},
		&expr.Immediate{Register: 1, Data: to.AsSlice()}, &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}})
	if masquerade {
		post := conn.AddChain(&nftables.Chain{Name: "post", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
		conn.AddRule(&nftables.Rule{Table: table, Chain: post, Exprs: []expr.Any{&expr.Masq{}}})
	}
	s.must(conn.Flush())
}

// Policies are about the pods at both ends, whatever the packet's addresses are in
// between.
func TestThroughAService(t *testing.T) {
	s := newStation(t)
	a, b, c := s.pod(0, "a"), s.pod(1, "b"), s.pod(2, "c")
	service := netip.MustParseAddr("10.43.0.99")
	s.translate(service, podAddr(1, false), true) // the server sees the node
	s.policy("deny", denyAll)
	s.want("pod to itself through a service", b, "tcp", service, 80, true)
	s.want("refused at both ends", a, "tcp", service, 80, false)
	s.policy("b", `podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}]}]`)
	s.want("still refused at the client", a, "tcp", service, 80, false)
	s.policy("a", `podSelector: {matchExpressions: [{key: app, operator: In, values: [a, c]}]}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: b}}}]}]`)
	s.want("allowed at both ends", a, "tcp", service, 80, true)
	s.want("to another port", a, "tcp", service, 81, false)
	s.want("another client", c, "tcp", service, 80, false)
}

// An ICMP error about an allowed connection arrives; the answers of a pod that may
// open none itself do, too.
func TestAnswersAndErrors(t *testing.T) {
	s := newStation(t)
	a, b := s.pod(0, "a"), s.pod(1, "b")
	s.policy("deny", denyAll)
	s.policy("udp", `podSelector: {}, ingress: [{ports: [{port: 80, protocol: UDP}]}], egress: [{ports: [{port: 80, protocol: UDP}]}], policyTypes: [Ingress, Egress]`)
	for _, v6 := range []bool{false, true} {
		s.want("port unreachable comes back", a, "udp", podAddr(1, v6), 80, true)
		s.want("port unreachable comes back", b, "udp", podAddr(0, v6), 80, true)
		s.want("another port", a, "udp", podAddr(1, v6), 81, false)
	}
}

// A policy without ports allows every protocol, one with ports none but theirs.
func TestPing(t *testing.T) {
	s := newStation(t)
	a := s.pod(0, "a")
	s.pod(1, "b")
	ping := func() bool {
		ok := false
		s.must(a.Do(func() error {
			conn, err := net.ListenPacket("ip4:icmp", "0.0.0.0")
			if err != nil {
				return err
			}
			defer conn.Close()
			echo := []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}
			if _, err := conn.WriteTo(echo, &net.IPAddr{IP: podAddr(1, false).AsSlice()}); err != nil {
				return nil
			}
			conn.SetReadDeadline(time.Now().Add(quick))
			buf := make([]byte, 100)
			n, _, err := conn.ReadFrom(buf)
			ok = err == nil && n > 0 && buf[0] == 0
			return nil
		}))
		return ok
	}
	if !as(true, ping) {
		t.Fatal("no answer without policies")
	}
	s.policy("p", `podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]`)
	if ping() {
		t.Error("answered although nothing is allowed")
	}
	s.policy("p", `podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]`)
	if !as(true, ping) {
		t.Error("no answer although everything from there is allowed")
	}
	s.policy("p", `podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress], ingress: [{ports: [{protocol: TCP}, {protocol: UDP}, {protocol: SCTP}]}]`)
	if ping() {
		t.Error("answered although only ports are allowed")
	}
}

// SCTP needs no implementation at the ends: an INIT chunk is tracked.
func TestSCTP(t *testing.T) {
	s := newStation(t)
	a := s.pod(0, "a")
	b := s.pod(1, "b")
	arrives := func(port byte) bool {
		var listener net.PacketConn
		s.must(b.Do(func() (err error) { listener, err = net.ListenPacket("ip4:132", "0.0.0.0"); return err }))
		defer listener.Close()
		s.must(a.Do(func() error {
			conn, err := net.ListenPacket("ip4:132", "0.0.0.0")
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.WriteTo(sctpInit(port), &net.IPAddr{IP: podAddr(1, false).AsSlice()})
			if errors.Is(err, unix.EPERM) {
				return nil
			}
			return err
		}))
		listener.SetReadDeadline(time.Now().Add(quick))
		_, _, err := listener.ReadFrom(make([]byte, 100))
		return err == nil
	}
	if !as(true, func() bool { return arrives(80) }) {
		t.Fatal("nothing arrives without policies")
	}
	s.policy("p", `podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress], ingress: [{ports: [{port: 80, protocol: SCTP}]}]`)
	if !as(true, func() bool { return arrives(80) }) {
		t.Error("the allowed port is refused")
	}
	if arrives(81) {
		t.Error("another port is allowed")
	}
}

// While rules change, not one packet of a pod that they are not about is lost, and
// none of a refused one gets through.
func TestChangesAreAtomic(t *testing.T) {
	s := newStation(t)
	a, b := s.pod(0, "a"), s.pod(1, "b")
	s.policy("deny-b", `podSelector: {matchLabels: {app: b}}, policyTypes: [Egress]`)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 100 {
			spec := ""
			if i%2 == 0 {
				spec = `podSelector: {matchLabels: {app: b}}, policyTypes: [Egress, Ingress], egress: [{to: [{podSelector: {matchLabels: {app: nobody}}}]}]`
			}
			s.policy("other", spec)
		}
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		if !as(true, func() bool { return s.reaches(a, "tcp", gateway4, 80) }) {
			t.Error("a pod that no policy selects is interrupted")
		}
		var err error
		s.must(b.Do(func() error {
			_, err = net.DialTimeout("tcp", "169.254.1.1:80", 5*time.Millisecond)
			return nil
		}))
		if errors.Is(err, syscall.ECONNREFUSED) {
			t.Error("a refused connection gets through while rules change")
		}
	}
}

// sctpInit is an SCTP packet that opens an association from port 1000 (RFC 9260,
// section 3), with the checksum that connection tracking verifies.
func sctpInit(port byte) []byte {
	p := []byte{
		1000 >> 8, 1000 & 0xff, 0, port, 0, 0, 0, 0, 0, 0, 0, 0, // ports, tag, checksum
		1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, // INIT
	}
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}
