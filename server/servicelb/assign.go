package servicelb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"kedge/internal/addresspool"
	"kedge/internal/nodeaddr"
)

// state is the input of the decision.
type state struct {
	pools    []addresspool.Pool
	reserved []portKey // ports of the nodes that kedge itself uses
	services []*corev1.Service
	nodes    []*corev1.Node
	slices   func(*corev1.Service) []*discoveryv1.EndpointSlice
}

// decision is the result for one service.
type decision struct {
	addresses []netip.Addr
	// A service without addresses has a reason, a CamelCase word for events, and a message.
	reason, message string
}

// Reasons of services without addresses.
const (
	reasonRequest   = "InvalidRequest"
	reasonPool      = "NoSuchPool"
	reasonExhausted = "NoFreeAddress"
	reasonTaken     = "AddressTaken"
	reasonPort      = "PortTaken"
	reasonNodes     = "NoNode"
)

// assign decides for all services. A service keeps its addresses if they are still valid; if services compete
// for an address, the older service gets it. The result depends only on the state, so that a new leader makes
// the same decisions as the one before.
func assign(st state) map[string]decision {
	out := map[string]decision{}
	owners := nodeaddr.Owners(st.nodes)
	byAge := slices.Clone(st.services)
	slices.SortFunc(byAge, func(a, b *corev1.Service) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(nameOf(a), nameOf(b)))
	})
	table := table{users: map[netip.Addr][]request{}}
	var waiting []request
	taken := map[portKey]*corev1.Service{}
	for _, s := range byAge {
		switch modeOf(s, len(st.pools) > 0) {
		case fromNodes:
			out[nameOf(s)] = assignNodes(st, owners, s, taken)
		case fromPool:
			r := requestOf(s)
			if now := currentAddresses(s); len(now) > 0 && st.canKeep(table, r, now) {
				table.use(r, now)
				out[nameOf(s)] = decision{addresses: now}
				continue
			}
			waiting = append(waiting, r)
		}
	}
	for _, r := range waiting {
		d := st.choose(table, r)
		table.use(r, d.addresses)
		out[nameOf(r.service)] = d
	}
	return out
}

// table has the services that use each address of a pool.
type table struct{ users map[netip.Addr][]request }

func (t table) use(r request, addrs []netip.Addr) {
	for _, a := range addrs {
		t.users[a] = append(t.users[a], r)
	}
}

// conflict returns the reason why a service cannot use an address, or "".
func (t table) conflict(r request, a netip.Addr) string {
	for _, o := range t.users[a] {
		if reason := r.incompatible(o); reason != "" {
			return fmt.Sprintf("%s is used by %s: %s", a, nameOf(o.service), reason)
		}
	}
	return ""
}

// incompatible returns the reason why two services cannot share an address, or "".
func (r request) incompatible(o request) string {
	switch {
	case r.sharing == "" || r.sharing != o.sharing:
		return "services can share an address only if both have the same value of the annotation kedge.io/" + annotationSharing
	case local(r.service) != local(o.service):
		return "services that share an address need the same externalTrafficPolicy"
	case local(r.service) && !sameSelector(r.service, o.service):
		return "services with externalTrafficPolicy Local can share an address only if they select the same pods"
	}
	for _, p := range ports(r.service) {
		if slices.Contains(ports(o.service), p) {
			return "both use port " + p.String()
		}
	}
	return ""
}

func sameSelector(a, b *corev1.Service) bool {
	if len(a.Spec.Selector) != len(b.Spec.Selector) {
		return false
	}
	for k, v := range a.Spec.Selector {
		if b.Spec.Selector[k] != v {
			return false
		}
	}
	return true
}

// canKeep reports whether the current addresses of a service are still valid for it.
func (st state) canKeep(t table, r request, now []netip.Addr) bool {
	if r.problem != nil || len(now) != len(wantedFamilies(st, r)) {
		return false
	}
	for i, a := range now {
		p, ok := addresspool.In(st.pools, a)
		if !ok || r.pool != "" && r.pool != p.Name || t.conflict(r, a) != "" || !slices.Contains(families(r.service), a.Is4()) {
			return false
		}
		if i > 0 && now[0].Is4() == a.Is4() {
			return false
		}
	}
	for _, a := range r.addresses {
		if !slices.Contains(now, a) {
			return false
		}
	}
	return true
}

// wantedFamilies returns the families of which a service gets an address: all of its families, but with
// PreferDualStack only those that a pool has.
func wantedFamilies(st state, r request) []bool {
	all := families(r.service)
	if p := r.service.Spec.IPFamilyPolicy; p == nil || *p != corev1.IPFamilyPolicyPreferDualStack {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(ipv4 bool) bool {
		return !slices.ContainsFunc(st.candidates(r), func(p addresspool.Pool) bool { return hasFamily(p, ipv4) })
	})
}

func hasFamily(p addresspool.Pool, ipv4 bool) bool {
	return slices.ContainsFunc(p.Ranges, func(r addresspool.Range) bool { return r.First.Is4() == ipv4 })
}

// candidates returns the pools that may serve a request, in order.
func (st state) candidates(r request) []addresspool.Pool {
	return slices.DeleteFunc(slices.Clone(st.pools), func(p addresspool.Pool) bool { return r.pool != "" && p.Name != r.pool })
}

// choose finds addresses for a service that keeps none.
func (st state) choose(t table, r request) decision {
	pools := st.candidates(r)
	switch {
	case r.problem != nil:
		return decision{reason: reasonRequest, message: r.problem.Error()}
	case len(st.pools) == 0:
		return decision{reason: reasonPool, message: "there are no address pools; configure one with --lb-pool"}
	case len(pools) == 0:
		return decision{reason: reasonPool, message: fmt.Sprintf("pool %q does not exist; there are %s", r.pool, names(st.pools))}
	}
	wanted := wantedFamilies(st, r)
	if len(r.addresses) > 0 {
		return st.chooseRequested(t, r, pools, wanted)
	}
	now := currentAddresses(r.service)
	slices.SortStableFunc(pools, func(a, b addresspool.Pool) int { // current addresses are kept if possible
		return cmp.Compare(common(b, now), common(a, now))
	})
	for _, p := range pools {
		var found []netip.Addr
		for _, ipv4 := range wanted {
			if a := t.find(p, r, ipv4); a.IsValid() {
				found = append(found, a)
			}
		}
		if len(found) == len(wanted) && len(found) > 0 {
			return decision{addresses: found}
		}
	}
	return decision{reason: reasonExhausted, message: "no free address of " + familyNames(wanted) + " in " + names(pools)}
}

// common returns the number of addresses that are in a pool.
func common(p addresspool.Pool, addrs []netip.Addr) (n int) {
	for _, a := range addrs {
		if p.Contains(a) {
			n++
		}
	}
	return n
}

// find returns an address of a pool: the current address, an address that can be shared, or a free one.
func (t table) find(p addresspool.Pool, r request, ipv4 bool) netip.Addr {
	for _, a := range currentAddresses(r.service) {
		if a.Is4() == ipv4 && p.Contains(a) && t.conflict(r, a) == "" {
			return a
		}
	}
	if r.sharing != "" {
		var shared []netip.Addr
		for a, users := range t.users {
			if a.Is4() == ipv4 && p.Contains(a) && len(users) > 0 && t.conflict(r, a) == "" {
				shared = append(shared, a)
			}
		}
		if len(shared) > 0 {
			return slices.MinFunc(shared, netip.Addr.Compare)
		}
	}
	return p.Find(ipv4, func(a netip.Addr) bool { return len(t.users[a]) == 0 })
}

func (st state) chooseRequested(t table, r request, pools []addresspool.Pool, wanted []bool) decision {
	for _, a := range r.addresses {
		switch _, ok := addresspool.In(pools, a); {
		case !ok:
			return decision{reason: reasonRequest, message: fmt.Sprintf("requested address %s is not in %s", a, names(pools))}
		case !slices.Contains(families(r.service), a.Is4()):
			return decision{reason: reasonRequest, message: fmt.Sprintf("requested address %s is not of the service's IP families", a)}
		}
		if why := t.conflict(r, a); why != "" {
			return decision{reason: reasonTaken, message: why}
		}
	}
	if len(r.addresses) != len(wanted) {
		return decision{reason: reasonRequest, message: "requests an address of only one family, but needs " + familyNames(wanted)}
	}
	return decision{addresses: r.addresses}
}

func names(pools []addresspool.Pool) string {
	var out []string
	for _, p := range pools {
		out = append(out, "pool "+p.Name)
	}
	return strings.Join(out, ", ")
}

func familyNames(ipv4 []bool) string {
	var out []string
	for _, is4 := range ipv4 {
		out = append(out, map[bool]string{true: "IPv4", false: "IPv6"}[is4])
	}
	return strings.Join(out, " and ")
}

// assignNodes gives a service the addresses of nodes. It records the service's ports in taken, so that no other
// service can have them.
func assignNodes(st state, owners map[netip.Addr]nodeaddr.Owner, s *corev1.Service, taken map[portKey]*corev1.Service) decision {
	for _, p := range ports(s) {
		if slices.Contains(st.reserved, p) {
			return decision{reason: reasonPort, message: fmt.Sprintf("port %s of the nodes is used by kedge itself; use another port, or an address of a pool (--lb-pool)", p)}
		}
		if o := taken[p]; o != nil {
			return decision{reason: reasonPort, message: fmt.Sprintf("port %s of the nodes is used by service %s; delete that service, use another port, or use an address of a pool (--lb-pool)", p, nameOf(o))}
		}
	}
	for _, p := range ports(s) {
		taken[p] = s
	}
	nodes := eligible(st.nodes)
	if local(s) {
		on := readyOn(st.slices(s))
		nodes = slices.DeleteFunc(nodes, func(n *corev1.Node) bool { return !on[n.Name] })
	}
	ready := slices.DeleteFunc(slices.Clone(nodes), func(n *corev1.Node) bool { return !isReady(n) })
	if len(ready) == 0 && len(nodes) > 0 {
		ready = nodes // no node is ready: keeping the addresses is better than having none
	}
	var out []netip.Addr
	for _, ipv4 := range families(s) {
		for _, n := range ready {
			if a := addressOf(n, ipv4, owners); a.IsValid() && !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	if len(out) == 0 {
		if local(s) {
			return decision{reason: reasonNodes, message: "no node has a ready endpoint, and externalTrafficPolicy is Local"}
		}
		return decision{reason: reasonNodes, message: "no node has an address of " + familyNames(families(s))}
	}
	return decision{addresses: out}
}

// eligible returns the nodes that may receive external traffic, sorted by name.
func eligible(nodes []*corev1.Node) []*corev1.Node {
	chosen := slices.ContainsFunc(nodes, func(n *corev1.Node) bool { return n.Labels[NodeLabel] == "true" })
	var out []*corev1.Node
	for _, n := range nodes {
		_, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]
		if excluded || n.DeletionTimestamp != nil || chosen && n.Labels[NodeLabel] != "true" {
			continue
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b *corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func isReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// addressOf returns a node's address of a family: the external address if there is one. Every node translates
// packets to an address of a load balancer, so an address that a node only claims must not be used.
func addressOf(n *corev1.Node, ipv4 bool, owners map[netip.Addr]nodeaddr.Owner) netip.Addr {
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, addr := range n.Status.Addresses {
			a, err := netip.ParseAddr(addr.Address)
			if err == nil && addr.Type == kind && a.Is4() == ipv4 && owners[a.Unmap()].Node == n.Name {
				return a
			}
		}
	}
	return netip.Addr{}
}
