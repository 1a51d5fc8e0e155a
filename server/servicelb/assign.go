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
)

// state is all that decides who gets which addresses.
type state struct {
	pools    []addresspool.Pool
	reserved []portKey // ports of the nodes that are kedge's own
	services []*corev1.Service
	nodes    []*corev1.Node
	slices   func(*corev1.Service) []*discoveryv1.EndpointSlice
}

// decision is what becomes of one service.
type decision struct {
	addresses []netip.Addr
	// A service that waits has a reason, one word for programs, and a message for people.
	reason, message string
}

// Reasons of services that wait.
const (
	reasonRequest   = "InvalidRequest"
	reasonPool      = "NoSuchPool"
	reasonExhausted = "NoFreeAddress"
	reasonTaken     = "AddressTaken"
	reasonPort      = "PortTaken"
	reasonNodes     = "NoNode"
)

// assign decides for all services at once. Who has an address keeps it as long as it may;
// among those that want the same, the older one wins. The result depends on nothing but
// the state, so that a new server decides as the one before did.
func assign(st state) map[string]decision {
	out := map[string]decision{}
	byAge := slices.Clone(st.services)
	slices.SortFunc(byAge, func(a, b *corev1.Service) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(nameOf(a), nameOf(b)))
	})
	table := table{users: map[netip.Addr][]request{}}
	var waiting []request
	taken := map[portKey]*corev1.Service{}
	for _, s := range byAge {
		switch modeOf(s, len(st.pools) > 0) {
		case ofNodes:
			out[nameOf(s)] = assignNodes(st, s, taken)
		case ofPool:
			r := requestOf(s)
			if now := given(s); len(now) > 0 && st.mayKeep(table, r, now) {
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

// table says who uses which address of a pool.
type table struct{ users map[netip.Addr][]request }

func (t table) use(r request, addrs []netip.Addr) {
	for _, a := range addrs {
		t.users[a] = append(t.users[a], r)
	}
}

// conflict is why a service cannot use an address, or "".
func (t table) conflict(r request, a netip.Addr) string {
	for _, o := range t.users[a] {
		if reason := r.incompatible(o); reason != "" {
			return fmt.Sprintf("%s is %s's: %s", a, nameOf(o.service), reason)
		}
	}
	return ""
}

// incompatible is why two services cannot share an address, or "".
func (r request) incompatible(o request) string {
	switch {
	case r.sharing == "" || r.sharing != o.sharing:
		return "services share an address when both have the same value of the annotation kedge.io/" + annotationSharing
	case local(r.service) != local(o.service):
		return "services that share an address need the same externalTrafficPolicy"
	case local(r.service) && !sameSelector(r.service, o.service):
		return "services with externalTrafficPolicy Local share an address only when they select the same pods"
	}
	for _, p := range ports(r.service) {
		if slices.Contains(ports(o.service), p) {
			return "both want port " + p.String()
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

// mayKeep says whether the addresses that a service has are such as it would be given.
func (st state) mayKeep(t table, r request, now []netip.Addr) bool {
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

// wantedFamilies are those of which a service gets an address: all of its own, but what
// it merely prefers only where a pool has it.
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

// candidates are the pools that may serve a request, in order.
func (st state) candidates(r request) []addresspool.Pool {
	return slices.DeleteFunc(slices.Clone(st.pools), func(p addresspool.Pool) bool { return r.pool != "" && p.Name != r.pool })
}

// choose finds addresses for a service that has none.
func (st state) choose(t table, r request) decision {
	pools := st.candidates(r)
	switch {
	case r.problem != nil:
		return decision{reason: reasonRequest, message: r.problem.Error()}
	case len(st.pools) == 0:
		return decision{reason: reasonPool, message: "there are no pools of addresses; name one with --lb-pool"}
	case len(pools) == 0:
		return decision{reason: reasonPool, message: fmt.Sprintf("there is no pool %q; there are %s", r.pool, names(st.pools))}
	}
	wanted := wantedFamilies(st, r)
	if len(r.addresses) > 0 {
		return st.chooseRequested(t, r, pools, wanted)
	}
	now := given(r.service)
	slices.SortStableFunc(pools, func(a, b addresspool.Pool) int { // what can be kept is kept
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

// common is how many of some addresses a pool has.
func common(p addresspool.Pool, addrs []netip.Addr) (n int) {
	for _, a := range addrs {
		if p.Contains(a) {
			n++
		}
	}
	return n
}

// find returns an address of a pool: one that the service has, or shares, or a free one.
func (t table) find(p addresspool.Pool, r request, ipv4 bool) netip.Addr {
	for _, a := range given(r.service) {
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
			return decision{reason: reasonRequest, message: fmt.Sprintf("%s, which it asks for, is not in %s", a, names(pools))}
		case !slices.Contains(families(r.service), a.Is4()):
			return decision{reason: reasonRequest, message: fmt.Sprintf("%s, which it asks for, is not of the service's families", a)}
		}
		if why := t.conflict(r, a); why != "" {
			return decision{reason: reasonTaken, message: why}
		}
	}
	if len(r.addresses) != len(wanted) {
		return decision{reason: reasonRequest, message: "it asks for an address of one family, and needs " + familyNames(wanted)}
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

// assignNodes gives a service the addresses of nodes. Ports that it gets are noted in
// taken: another service cannot have them.
func assignNodes(st state, s *corev1.Service, taken map[portKey]*corev1.Service) decision {
	for _, p := range ports(s) {
		if slices.Contains(st.reserved, p) {
			return decision{reason: reasonPort, message: fmt.Sprintf("port %s of the nodes is kedge's own; take another port, or an address of a pool (--lb-pool)", p)}
		}
		if o := taken[p]; o != nil {
			return decision{reason: reasonPort, message: fmt.Sprintf("port %s of the nodes is %s's; it is this service's when that one is gone, or take an address of a pool (--lb-pool)", p, nameOf(o))}
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
		ready = nodes // none looks healthy: to say nothing would help nobody
	}
	var out []netip.Addr
	for _, ipv4 := range families(s) {
		for _, n := range ready {
			if a := addressOf(n, ipv4); a.IsValid() && !slices.Contains(out, a) {
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

// eligible are the nodes that may take connections from outside, by name.
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

// addressOf is a node's address of a family: the external one where there is one.
func addressOf(n *corev1.Node, ipv4 bool) netip.Addr {
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, addr := range n.Status.Addresses {
			if a, err := netip.ParseAddr(addr.Address); err == nil && addr.Type == kind && a.Is4() == ipv4 {
				return a
			}
		}
	}
	return netip.Addr{}
}
