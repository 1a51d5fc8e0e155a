package dns

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"

	"kedge/dns/message"
)

// nodes has the names of the cluster's nodes and their internal addresses.
//
// Names with a dot are excluded: they are names outside the cluster, where they resolve
// already, and a machine that may join must not be able to claim one. For the same reason
// addresses have no reverse name of a node: a node's addresses are its own claim.
type nodes struct {
	mu sync.Mutex                              // serializes changes
	at atomic.Pointer[map[string][]netip.Addr] // by name in wire format; never nil, and immutable
}

func newNodes() *nodes {
	n := &nodes{}
	n.at.Store(&map[string][]netip.Addr{})
	return n
}

// set records the addresses of a node.
func (n *nodes) set(node *corev1.Node) {
	var addrs []netip.Addr
	for _, a := range node.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			addrs = append(addrs, ip.Unmap())
		}
	}
	n.put(node.Name, addrs)
}

func (n *nodes) remove(node *corev1.Node) { n.put(node.Name, nil) }

func (n *nodes) put(name string, addrs []netip.Addr) {
	if strings.Contains(name, ".") {
		return
	}
	key := message.WireName(name)
	n.mu.Lock()
	defer n.mu.Unlock()
	before := *n.at.Load()
	if slices.Equal(before[key], addrs) {
		return // a heartbeat
	}
	next := maps.Clone(before)
	if next[key] = addrs; len(addrs) == 0 {
		delete(next, key)
	}
	n.at.Store(&next)
}

// answer answers a query for the name of a node.
func (n *nodes) answer(q *message.Query, r *message.Reply, ttl uint32) bool {
	addrs, ok := (*n.at.Load())[string(q.Name())]
	if !ok {
		return false
	}
	addresses(addrs, q, r, ttl)
	return true
}

// addresses answers with the addresses of the type in the query. A name with addresses has
// no other records.
func addresses(addrs []netip.Addr, q *message.Query, r *message.Reply, ttl uint32) {
	r.Authoritative()
	for _, addr := range addrs {
		if want := q.Type; want == message.TypeANY || addr.Is4() && want == message.TypeA || addr.Is6() && want == message.TypeAAAA {
			r.Addr(message.Question, ttl, addr)
		}
	}
}
