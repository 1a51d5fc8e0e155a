package backend

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"kedge/network/ipam"
)

// Annotation is where a node says how its pods are reached. The node's own kubelet
// writes it: the API server lets no node write another's.
const Annotation = "kedge.io/backend"

// announcement is the value of Annotation, as JSON. Everything else that a node
// needs of another follows from the Node object or, like the hardware address of its
// end of the tunnel, from the node's name.
type announcement struct {
	Mode Mode `json:"mode"`
	// Addresses are where to send to, if not the node's internal addresses.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Key is the node's public key for WireGuard.
	Key string `json:"key,omitempty"`
}

func (a announcement) String() string {
	out, err := json.Marshal(a)
	if err != nil {
		panic(err) // strings and addresses can be written
	}
	return string(out)
}

// node is what matters here of a Node object.
type node struct {
	name   string
	ranges []netip.Prefix // of its pods, at most one of each family
	addrs  []netip.Addr   // its own
	tunnel []netip.Addr   // where packets for its pods are sent to
	mode   Mode           // empty until the node has said it
	key    string         // its public key for WireGuard
	here   []netip.Addr   // of this node: which of addrs the machine really has
}

func readNode(o *corev1.Node) (node, error) {
	n := node{name: o.Name}
	for _, s := range o.Spec.PodCIDRs {
		r, err := netip.ParsePrefix(s)
		if err != nil {
			return n, fmt.Errorf("node %s: pod range: %w", o.Name, err)
		}
		n.ranges = append(n.ranges, r.Masked())
	}
	for _, a := range o.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		ip, err := netip.ParseAddr(a.Address)
		if err != nil {
			return n, fmt.Errorf("node %s: address: %w", o.Name, err)
		}
		n.addrs = append(n.addrs, ip.Unmap())
	}
	n.tunnel = n.addrs
	if v := o.Annotations[Annotation]; v != "" {
		var said announcement
		if err := json.Unmarshal([]byte(v), &said); err != nil {
			return n, fmt.Errorf("node %s: annotation %s: %w", o.Name, Annotation, err)
		}
		n.mode, n.key = said.Mode, said.Key
		if len(said.Addresses) > 0 {
			n.tunnel = said.Addresses
		}
	}
	return n, nil
}

// gateway is the address of a node within its pod range of a family: its next hop in
// the tunnel.
func (n node) gateway(ipv6 bool) (netip.Addr, bool) {
	for _, r := range n.ranges {
		if r.Addr().Is6() == ipv6 {
			return ipam.Gateway(r), true
		}
	}
	return netip.Addr{}, false
}

// source is the address from which this node itself sends to pods of others: its own,
// as it would without a tunnel, so that whoever answers a pod from a socket that is
// bound to no address answers from the one that was asked. Where the node has none of
// the family, or has lost it a moment ago, it is the gateway. There is none if the
// node's pods do not have the family.
func (n node) source(ipv6 bool) (netip.Addr, bool) {
	gateway, ok := n.gateway(ipv6)
	if a, has := first(n.here, ipv6); has && ok {
		return a, true
	}
	return gateway, ok
}

func first(addrs []netip.Addr, ipv6 bool) (netip.Addr, bool) {
	i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Is6() == ipv6 })
	if i < 0 {
		return netip.Addr{}, false
	}
	return addrs[i], true
}

// between returns the address of a peer to which packets are sent: IPv4 where both
// nodes have it, else IPv6. Seen from the other end it is the same family.
func between(own, peer node) (netip.Addr, error) {
	for _, ipv6 := range []bool{false, true} {
		_, here := first(own.tunnel, ipv6)
		if there, ok := first(peer.tunnel, ipv6); ok && here {
			return there, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("node %s has no address of a family that this node has too: it has %v, and this node %v", peer.name, peer.tunnel, own.tunnel)
}

// plan is what the kernel should hold, and nothing else of ours besides.
type plan struct {
	links  []device
	routes []route
	rules  []netip.Prefix // sources whose packets are routed by the node's own table first
	peers  []netip.Addr   // addresses of other nodes that see the pods' own addresses
}

// device is an interface of ours.
type device struct {
	name       string
	mtu        int
	addrs      []netip.Addr
	vxlan      *vxlan // nil for others
	wireguard  bool   // the kernel's, or a TUN device
	neighbours map[netip.Addr]string
	forward    map[string]netip.Addr // hardware address to node address
}

// vxlan is what cannot be changed once the interface exists.
type vxlan struct {
	vni, port int
	mac       string
	ipv6      bool // between the nodes
}

// route is a route of ours. It is comparable: equal routes are the same route.
type route struct {
	dst   netip.Prefix
	via   netip.Addr // zero for directly
	src   netip.Addr // zero for the kernel's choice
	link  string     // name; empty to let the kernel find the interface of via
	table int        // unix.RT_TABLE_MAIN or the node's own
	tos   int        // of the packets that it is for; 0 for all
	// nowhere says that there is nobody: link, via and src are empty.
	nowhere bool
}

// names are the marks by which a node's objects in the kernel are known as its own.
type names struct {
	link4, link6 string // interfaces, by the family between the nodes
	number       int    // of its table of routes, and the metric of its routes
}

// marks derives the names of a node's objects. They depend on its name only, and the
// names of interfaces do not begin like those of pods' (cni.LinkTag), which the rules
// of pods and services go by.
func marks(node string) names {
	sum := sha256.Sum256([]byte("backend/" + node))
	text := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:5])) // 8 characters
	// Upper half "kd": far from the numbers that people give to tables.
	return names{"kedge-" + text, "kedge6-" + text, 0x6b640000 | int(binary.BigEndian.Uint16(sum[:]))}
}

// tunnelAddr is the hardware address of a node's end of the tunnel: locally
// administered, and derived, so that nobody has to be asked for it.
func tunnelAddr(node string) string {
	sum := sha256.Sum256([]byte("vtep/" + node))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^1 | 2
	return mac.String()
}

// byName sorts nodes, so that errors and plans do not depend on a map's order.
func byName(nodes []node) []node {
	slices.SortFunc(nodes, func(a, b node) int { return cmp.Compare(a.name, b.name) })
	return nodes
}
