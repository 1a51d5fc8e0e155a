package policy

import (
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"kedge/network/cni"
	"kedge/network/nft/policies"
)

// directions is the order in which the policies of a connection apply.
var directions = [2]policies.Direction{policies.Egress, policies.Ingress}

// engine keeps the table in step with the API and with the node's pods. Every change affects
// only the objects that depend on it:
//
//	pod or its address     elements of the sets whose selectors match it
//	pod of this node       and its own entries in the maps of subjects
//	policy                 its chains, and the assignment of the pods of its namespace
//
// Sets and chains exist while something refers to them, and all references start at pods
// of this node. Policies for pods of other nodes cost a node only the memory of their
// objects.
//
// It is not safe for concurrent use.
type engine struct {
	table      *policies.Table
	namespaces map[string]*namespace
	owners     map[string]*attachment
	byPod      map[podKey][]*attachment
	sets       map[string]*set   // by name
	groups     map[string]*group // by name
	cluster    map[string]*clusterPolicy
	inOrder    []*clusterPolicy  // of both tiers, by priority
	tiers      map[string]*chain // of cluster-wide policies, by name
	synced     bool              // the API's objects have been read: policies may be applied
}

// namespace holds the content of a namespace, whether the API has delivered the namespace
// or not.
type namespace struct {
	labels   labels.Set
	pods     map[string]*podEntry
	policies map[string]*policy
}

// podEntry is a pod in two forms: as the API has it, and with the addresses that this node
// has assigned, which the API receives later.
type podEntry struct{ api, now *pod }

// attachment is a pod of this node with its addresses.
type attachment struct {
	owner    string
	pod      podKey
	uid      string // empty if not known
	addrs    []netip.Addr
	groups   map[subject]*group // that apply to it
	resolved bool               // the policies of the pod are known and applied
}

func newAttachment(a cni.Attachment) *attachment {
	return &attachment{owner: a.Owner, pod: podKey{a.Namespace, a.Name}, uid: a.UID, addrs: a.Addrs}
}

type subject struct {
	direction policies.Direction
	addr      netip.Addr
}

func newEngine(table *policies.Table) *engine {
	return &engine{
		table:      table,
		namespaces: map[string]*namespace{},
		owners:     map[string]*attachment{}, byPod: map[podKey][]*attachment{},
		sets: map[string]*set{}, groups: map[string]*group{},
		cluster: map[string]*clusterPolicy{}, tiers: map[string]*chain{},
	}
}

func (e *engine) namespace(name string) *namespace {
	ns := e.namespaces[name]
	if ns == nil {
		ns = &namespace{pods: map[string]*podEntry{}, policies: map[string]*policy{}}
		e.namespaces[name] = ns
	}
	return ns
}

// pruneNamespace removes a namespace without content.
func (e *engine) pruneNamespace(name string) {
	if ns := e.namespaces[name]; ns != nil && ns.labels == nil && len(ns.pods) == 0 && len(ns.policies) == 0 {
		delete(e.namespaces, name)
	}
}

// setNamespace sets the labels of a namespace; nil if it is gone.
func (e *engine) setNamespace(name string, to labels.Set) {
	ns := e.namespace(name)
	defer e.pruneNamespace(name)
	if labels.Equals(ns.labels, to) && (ns.labels == nil) == (to == nil) {
		return
	}
	for _, s := range e.sets {
		if s.follows == nil || s.follows.namespaces == nil {
			continue
		}
		before, after := s.follows.namespaces.Matches(ns.labels), s.follows.namespaces.Matches(to)
		if before == after {
			continue
		}
		for _, p := range ns.pods {
			if p.now == nil || !s.follows.pods.Matches(p.now.labels) {
				continue
			}
			for _, el := range s.elements(p.now) {
				if after {
					e.table.Insert(s.name, el)
				} else {
					e.table.Delete(s.name, el)
				}
			}
		}
	}
	ns.labels = to
	if len(e.cluster) > 0 {
		e.applyNamespace(name)
	}
}

// setPod sets a pod; nil if it is gone.
func (e *engine) setPod(key podKey, to *pod) {
	ns := e.namespace(key.namespace)
	defer e.pruneNamespace(key.namespace)
	entry := ns.pods[key.name]
	if entry == nil {
		if to == nil {
			return
		}
		entry = &podEntry{}
		ns.pods[key.name] = entry
	}
	entry.api = to
	changed := e.refreshPod(ns, key, entry)
	if to == nil {
		delete(ns.pods, key.name)
	} else {
		e.nameAttachments(key, to.addrs)
	}
	if !changed {
		return
	}
	for _, a := range e.byPod[key] {
		e.apply(a)
	}
}

// nameAttachments assigns a pod to the attachments without a name that have one of its
// addresses.
func (e *engine) nameAttachments(key podKey, addrs []netip.Addr) {
	for _, a := range slices.Clone(e.byPod[podKey{}]) {
		if slices.ContainsFunc(a.addrs, func(addr netip.Addr) bool { return slices.Contains(addrs, addr) }) {
			e.attach(&attachment{owner: a.owner, pod: key, addrs: a.addrs})
		}
	}
}

// refreshPod updates the sets after a change of a pod, and reports whether its effective
// state changed.
func (e *engine) refreshPod(ns *namespace, key podKey, entry *podEntry) (changed bool) {
	now := entry.api
	if now != nil {
		addrs := slices.Clone(now.addrs)
		for _, a := range e.byPod[key] {
			if a.belongsTo(now) {
				addrs = append(addrs, a.addrs...)
			}
		}
		slices.SortFunc(addrs, netip.Addr.Compare)
		with := *now
		with.addrs = slices.Compact(addrs)
		now = &with
	}
	before := entry.now
	if samePod(now, before) {
		return false
	}
	entry.now = now
	for _, s := range e.sets {
		if s.follows == nil {
			continue
		}
		var old, fresh []policies.Element
		if before != nil && s.follows.matches(key.namespace, ns.labels, before) {
			old = s.elements(before)
		}
		if now != nil && s.follows.matches(key.namespace, ns.labels, now) {
			fresh = s.elements(now)
		}
		for _, el := range fresh {
			e.table.Insert(s.name, el)
		}
		for _, el := range old {
			e.table.Delete(s.name, el)
		}
	}
	return true
}

// belongsTo reports whether an attachment is of this pod and not of an earlier or later one
// with the same name. The runtime has another UID for a static pod than the API.
func (a *attachment) belongsTo(p *pod) bool {
	return a.uid == "" || a.uid == p.uid || a.uid == p.static
}

// setPolicy sets a policy; nil if it is gone.
func (e *engine) setPolicy(key podKey, to *policy) {
	ns := e.namespace(key.namespace)
	defer e.pruneNamespace(key.namespace)
	before := ns.policies[key.name]
	switch {
	case to == nil && before == nil:
		return
	case to == nil:
		delete(ns.policies, key.name)
	default:
		if before != nil {
			to.chains = before.chains
		}
		ns.policies[key.name] = to
		for _, c := range to.chains {
			c.policy = to
			e.rewriteChain(c)
		}
	}
	e.applyNamespace(key.namespace)
}

// applyNamespace applies policies to the attached pods of a namespace, known to the API or
// not.
func (e *engine) applyNamespace(name string) {
	for _, a := range e.owners {
		if a.pod.namespace == name {
			e.apply(a)
		}
	}
}

// attach adds an attached pod of this node. The pod's name may be unknown.
func (e *engine) attach(a *attachment) {
	e.detach(a.owner)
	a.groups = map[subject]*group{}
	e.owners[a.owner] = a
	e.byPod[a.pod] = append(e.byPod[a.pod], a)
	e.eachLocal(a, e.table.Insert)
	e.refreshAttached(a)
	e.apply(a)
	if a.pod != (podKey{}) {
		return
	}
	for namespace, ns := range e.namespaces {
		for name, p := range ns.pods {
			e.nameAttachments(podKey{namespace, name}, p.api.addrs)
		}
	}
}

// detach undoes attach.
func (e *engine) detach(owner string) {
	a := e.owners[owner]
	if a == nil {
		return
	}
	delete(e.owners, owner)
	left := slices.DeleteFunc(e.byPod[a.pod], func(b *attachment) bool { return a == b })
	if e.byPod[a.pod] = left; len(left) == 0 {
		delete(e.byPod, a.pod)
	}
	e.eachLocal(a, e.table.Delete)
	e.refreshAttached(a)
	for _, d := range directions {
		for _, addr := range a.addrs {
			e.table.Apply(d, addr, "")
		}
	}
	for _, g := range a.groups {
		e.releaseGroup(g)
	}
}

func (e *engine) refreshAttached(a *attachment) {
	if ns := e.namespaces[a.pod.namespace]; ns != nil && ns.pods[a.pod.name] != nil {
		e.refreshPod(ns, a.pod, ns.pods[a.pod.name])
	}
}

// eachLocal calls do for an attachment's elements in the sets of addresses that may connect
// to themselves.
func (e *engine) eachLocal(a *attachment, do func(string, policies.Element)) {
	for _, addr := range a.addrs {
		if name := itselfName(addr.Is6()); e.sets[name] != nil {
			do(name, policies.SameAddrElement(addr))
		}
	}
}

// apply assigns the chains that decide about an attachment's connections. Without a policy
// in its namespace, no chain is assigned. With policies, all connections of an unknown pod
// are denied until it is known; the same applies to an attachment without a pod's name.
func (e *engine) apply(a *attachment) {
	if !e.synced {
		return
	}
	var p *pod
	ns := e.namespaces[a.pod.namespace]
	if ns != nil && ns.pods[a.pod.name] != nil {
		p = ns.pods[a.pod.name].now
	}
	// Cluster-wide policies select by labels of namespaces, which arrive through another
	// watch.
	known := p != nil && a.belongsTo(p) && (ns.labels != nil || len(e.cluster) == 0)
	a.resolved = known || a.pod != (podKey{}) && (ns == nil || len(ns.policies) == 0) && !e.clusterMaySelect(ns)
	for _, d := range directions {
		for _, addr := range a.addrs {
			s := subject{d, addr}
			before := a.groups[s]
			delete(a.groups, s)
			verdict := ""
			if !a.resolved {
				verdict = policies.DenyAll
			} else if known {
				if g := e.acquireGroup(d, addr.Is6(), ns, p); g != nil {
					a.groups[s], verdict = g, g.name
				}
			}
			e.table.Apply(d, addr, verdict)
			if before != nil {
				e.releaseGroup(before)
			}
		}
	}
}

// selecting returns the policies that select a pod in a direction, by name.
func (ns *namespace) selecting(d policies.Direction, p *pod) []*policy {
	var out []*policy
	for _, name := range slices.Sorted(maps.Keys(ns.policies)) {
		if np := ns.policies[name]; np.applies[d] && np.subjects.Matches(p.labels) {
			out = append(out, np)
		}
	}
	return out
}

// applyAll applies policies to every attachment, once the API's objects have been read.
func (e *engine) applyAll() {
	e.synced = true
	for _, a := range e.owners {
		e.apply(a)
	}
}
