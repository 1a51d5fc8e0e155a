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

	"kedge/internal/nodeaddr"
	"kedge/network/ipam"
)

// Annotation is the annotation in which a node publishes how its pods are reached. The
// node's own kubelet writes it: the API server does not let a node write to another node's
// object.
const Annotation = nodeaddr.Announced

// announcement is the value of Annotation, as JSON. All other data about a node follows
// from the Node object or, like the hardware address of its end of the tunnel, from the
// node's name.
type announcement struct {
	Mode Mode `json:"mode"`
	// Addresses are the tunnel's endpoints, if they are not the node's internal addresses.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Key is the node's public WireGuard key.
	Key string `json:"key,omitempty"`
}

func (a announcement) String() string {
	out, err := json.Marshal(a)
	if err != nil {
		panic(err) // strings and addresses can be written
	}
	return string(out)
}

// node is the part of a Node object that the backend uses.
type node struct {
	name    string
	ranges  []netip.Prefix // of its pods, at most one of each family
	addrs   []netip.Addr   // of the node
	tunnel  []netip.Addr   // endpoints for packets to its pods
	mode    Mode           // empty until the node has published it
	key     string         // public WireGuard key
	present []netip.Addr   // for this node: the addresses in addrs that the machine has
	// unproven are addresses that the node claims and that are not used: no server has seen
	// it connect from there (see package nodeaddr), or another node has connected from
	// there since.
	unproven []netip.Addr
}

// readNode reads a Node object with the ranges that belong to it. owns reports whether an
// address belongs to the node.
func readNode(o *corev1.Node, ranges []netip.Prefix, owns func(netip.Addr) bool) (node, error) {
	n := node{name: o.Name, ranges: ranges}
	proven := func(a netip.Addr) bool {
		if owns(a) {
			return true
		}
		if !slices.Contains(n.unproven, a) {
			n.unproven = append(n.unproven, a)
		}
		return false
	}
	for _, a := range o.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		ip, err := netip.ParseAddr(a.Address)
		if err != nil {
			return n, fmt.Errorf("node %s: address: %w", o.Name, err)
		}
		if ip = ip.Unmap(); proven(ip) {
			n.addrs = append(n.addrs, ip)
		}
	}
	n.tunnel = n.addrs
	if v := o.Annotations[Annotation]; v != "" {
		var announced announcement
		if err := json.Unmarshal([]byte(v), &announced); err != nil {
			return n, fmt.Errorf("node %s: annotation %s: %w", o.Name, Annotation, err)
		}
		n.mode, n.key = announced.Mode, announced.Key
		if len(announced.Addresses) > 0 {
			n.tunnel = nil
			for _, a := range announced.Addresses {
				if a = a.Unmap(); proven(a) {
					n.tunnel = append(n.tunnel, a)
				}
			}
		}
	}
	return n, nil
}

// errUnproven is the error for a node without a proven address.
func (n node) errUnproven() error {
	return fmt.Errorf("the address of node %s is not proven: it claims %v, but no server has seen it connect from there, or another node connects from there now; if the address is right, run \"kedge kubectl annotate node %s %s=%s\"",
		n.name, n.unproven, n.name, nodeaddr.Allowed, n.unproven[0])
}

// gateway returns the address of a node within its pod range of a family: its next hop in
// the tunnel.
func (n node) gateway(ipv6 bool) (netip.Addr, bool) {
	for _, r := range n.ranges {
		if r.Addr().Is6() == ipv6 {
			return ipam.Gateway(r), true
		}
	}
	return netip.Addr{}, false
}

// source returns the address from which this node itself sends to pods of other nodes: its
// own, as without a tunnel, so that a reply from a socket without a bound address has the
// address that the pod used. If the node has no address of the family, or has just lost it,
// it is the gateway. There is none if the node's pods do not have the family.
func (n node) source(ipv6 bool) (netip.Addr, bool) {
	gateway, ok := n.gateway(ipv6)
	if a, has := first(n.present, ipv6); has && ok {
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

// between returns the address of a peer to which packets are sent: IPv4 if both nodes have
// it, else IPv6. The peer chooses the same family.
func between(own, peer node) (netip.Addr, error) {
	for _, ipv6 := range []bool{false, true} {
		_, here := first(own.tunnel, ipv6)
		if there, ok := first(peer.tunnel, ipv6); ok && here {
			return there, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("node %s and this node have no address family in common: it has %v, and this node %v", peer.name, peer.tunnel, own.tunnel)
}

// plan is the complete content that the kernel should have of the backend.
type plan struct {
	links  []device
	routes []route
	rules  []netip.Prefix // sources whose packets use the node's own table first
	peers  []netip.Addr   // addresses of other nodes that see the pods' own addresses
}

// device is an interface of the backend.
type device struct {
	name       string
	mtu        int
	addrs      []netip.Addr
	vxlan      *vxlan // nil for others
	wireguard  bool   // of the kernel, or a TUN device
	neighbours map[netip.Addr]string
	forward    map[string]netip.Addr // hardware address to node address
}

// vxlan is the part of a VXLAN interface that cannot be changed after its creation.
type vxlan struct {
	vni, port int
	mac       string
	ipv6      bool // between the nodes
}

// route is a route of the backend. It is comparable: equal routes are the same route.
type route struct {
	dst   netip.Prefix
	via   netip.Addr // zero for a direct route
	src   netip.Addr // zero to let the kernel choose
	link  string     // name; empty to let the kernel find the interface of via
	table int        // unix.RT_TABLE_MAIN or the node's own
	tos   int        // type of service of the packets; 0 for all packets
	// unreachable marks an unreachable route: link, via and src are empty.
	unreachable bool
}

// names are the names and numbers that mark a node's objects in the kernel.
type names struct {
	link4, link6 string // interfaces, by the family between the nodes
	number       int    // of its table of routes, and the metric of its routes
}

// LinkNames returns the names of the interfaces of a node for traffic to other nodes.
func LinkNames(node string) []string {
	n := namesOf(node)
	return []string{n.link4, n.link6}
}

// namesOf derives the names of a node's objects. They depend only on its name, and the
// names of interfaces do not have the prefix of pods' interfaces (cni.LinkTag), which the
// rules of pods and services match.
func namesOf(node string) names {
	sum := sha256.Sum256([]byte("backend/" + node))
	text := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:5])) // 8 characters
	// The upper half is "kd": far from the numbers that people use for tables.
	return names{"kedge-" + text, "kedge6-" + text, 0x6b640000 | int(binary.BigEndian.Uint16(sum[:]))}
}

// tunnelAddr returns the hardware address of a node's end of the tunnel: locally
// administered, and derived from the name, so that it need not be published.
func tunnelAddr(node string) string {
	sum := sha256.Sum256([]byte("vtep/" + node))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^1 | 2
	return mac.String()
}

// byName sorts nodes, so that errors and plans do not depend on the order of a map.
func byName(nodes []node) []node {
	slices.SortFunc(nodes, func(a, b node) int { return cmp.Compare(a.name, b.name) })
	return nodes
}
