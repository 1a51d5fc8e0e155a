package policy

import (
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"kedge/network/cni"
	"kedge/network/nft"
)

// directions in the order in which a connection is judged.
var directions = [2]nft.Direction{nft.Egress, nft.Ingress}

// engine keeps what should be true in step with what the API and the node say.
// Every change touches only what depends on it:
//
//	pod or its address     elements of the sets whose selectors match it
//	pod of this node       and its own entries in the maps of judged pods
//	policy                 its chains, and the judgement of pods of its namespace
//
// Sets and chains exist while something refers to them, and what refers to all
// of them in the end is a pod of this node. So policies for pods of other nodes
// cost a node nothing but their objects.
//
// It is not safe for concurrent use.
type engine struct {
	table      *nft.PolicyTable
	namespaces map[string]*namespace
	owners     map[string]*attachment
	byPod      map[podKey][]*attachment
	sets       map[string]*set   // by name
	groups     map[string]*group // by name
	cluster    map[string]*clusterPolicy
	inOrder    []*clusterPolicy  // of both tiers, by priority
	tiers      map[string]*chain // of cluster-wide policies, by name
	synced     bool              // the API's objects are known: pods may be judged
}

// namespace holds what belongs to it, whether the API has told of it or not.
type namespace struct {
	labels   labels.Set
	pods     map[string]*podEntry
	policies map[string]*policy
}

// podEntry is a pod twice: as the API has it, and with the addresses that this
// node has given it, which the API learns later.
type podEntry struct{ api, now *pod }

// attachment is what this node has given a pod.
type attachment struct {
	owner   string
	pod     podKey
	uid     string // empty if not known
	addrs   []netip.Addr
	groups  map[subject]*group // that judge it
	certain bool               // judged by what is known about the pod
}

func newAttachment(a cni.Attachment) *attachment {
	return &attachment{owner: a.Owner, pod: podKey{a.Namespace, a.Name}, uid: a.UID, addrs: a.Addrs}
}

type subject struct {
	direction nft.Direction
	addr      netip.Addr
}

func newEngine(table *nft.PolicyTable) *engine {
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

// tidy forgets a namespace of which nothing is left.
func (e *engine) tidy(name string) {
	if ns := e.namespaces[name]; ns != nil && ns.labels == nil && len(ns.pods) == 0 && len(ns.policies) == 0 {
		delete(e.namespaces, name)
	}
}

// setNamespace says which labels a namespace has; nil if it is gone.
func (e *engine) setNamespace(name string, to labels.Set) {
	ns := e.namespace(name)
	defer e.tidy(name)
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
		e.judgeNamespace(name)
	}
}

// setPod says what a pod is; nil if it is gone.
func (e *engine) setPod(key podKey, to *pod) {
	ns := e.namespace(key.namespace)
	defer e.tidy(key.namespace)
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
		e.name(key, to.addrs)
	}
	if !changed {
		return
	}
	for _, a := range e.byPod[key] {
		e.judge(a)
	}
}

// name finds attachments whose pod nobody remembers by the addresses that the
// API has of the pod.
func (e *engine) name(key podKey, addrs []netip.Addr) {
	for _, a := range slices.Clone(e.byPod[podKey{}]) {
		if slices.ContainsFunc(a.addrs, func(addr netip.Addr) bool { return slices.Contains(addrs, addr) }) {
			e.attach(&attachment{owner: a.owner, pod: key, addrs: a.addrs})
		}
	}
}

// refreshPod brings the sets in step with what is now known about a pod, and says
// whether that is something new.
func (e *engine) refreshPod(ns *namespace, key podKey, entry *podEntry) (changed bool) {
	now := entry.api
	if now != nil {
		addrs := slices.Clone(now.addrs)
		for _, a := range e.byPod[key] {
			if a.is(now) {
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
		var old, fresh []nft.Element
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

// is says whether an attachment is of this pod and not of an earlier or later
// one with its name. The runtime knows a static pod by another identifier than
// the API.
func (a *attachment) is(p *pod) bool {
	return a.uid == "" || a.uid == p.uid || a.uid == p.static
}

// setPolicy says what a policy is; nil if it is gone.
func (e *engine) setPolicy(key podKey, to *policy) {
	ns := e.namespace(key.namespace)
	defer e.tidy(key.namespace)
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
	e.judgeNamespace(key.namespace)
}

// judgeNamespace judges the pods of a namespace, known to the API or not.
func (e *engine) judgeNamespace(name string) {
	for _, a := range e.owners {
		if a.pod.namespace == name {
			e.judge(a)
		}
	}
}

// attach says which addresses a pod of this node has. The pod's name may be lost.
func (e *engine) attach(a *attachment) {
	e.detach(a.owner)
	a.groups = map[subject]*group{}
	e.owners[a.owner] = a
	e.byPod[a.pod] = append(e.byPod[a.pod], a)
	e.eachLocal(a, e.table.Insert)
	e.refreshAttached(a)
	e.judge(a)
	if a.pod != (podKey{}) {
		return
	}
	for namespace, ns := range e.namespaces {
		for name, p := range ns.pods {
			e.name(podKey{namespace, name}, p.api.addrs)
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
			e.table.Judge(d, addr, "")
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

// eachLocal does something with an attachment's elements in the sets of
// addresses that may connect to themselves.
func (e *engine) eachLocal(a *attachment, do func(string, nft.Element)) {
	for _, addr := range a.addrs {
		if name := itselfName(addr.Is6()); e.sets[name] != nil {
			do(name, nft.SameAddrElement(addr))
		}
	}
}

// judge chooses who decides about an attachment's connections. Without any policy
// in its namespace that is nobody, whatever the pod may be. With policies, a pod
// of which nothing is known is refused everything until something is, and so is
// one of which not even the name is left.
func (e *engine) judge(a *attachment) {
	if !e.synced {
		return
	}
	var p *pod
	ns := e.namespaces[a.pod.namespace]
	if ns != nil && ns.pods[a.pod.name] != nil {
		p = ns.pods[a.pod.name].now
	}
	// Cluster-wide policies select by labels of namespaces, which come by a watch of
	// their own.
	known := p != nil && a.is(p) && (ns.labels != nil || len(e.cluster) == 0)
	a.certain = known || a.pod != (podKey{}) && (ns == nil || len(ns.policies) == 0) && !e.clusterMaySelect(ns)
	for _, d := range directions {
		for _, addr := range a.addrs {
			s := subject{d, addr}
			before := a.groups[s]
			delete(a.groups, s)
			verdict := ""
			if !a.certain {
				verdict = nft.Refuse
			} else if known {
				if g := e.acquireGroup(d, addr.Is6(), ns, p); g != nil {
					a.groups[s], verdict = g, g.name
				}
			}
			e.table.Judge(d, addr, verdict)
			if before != nil {
				e.releaseGroup(before)
			}
		}
	}
}

// selecting returns the policies that judge a pod in a direction, by name.
func (ns *namespace) selecting(d nft.Direction, p *pod) []*policy {
	var out []*policy
	for _, name := range slices.Sorted(maps.Keys(ns.policies)) {
		if np := ns.policies[name]; np.applies[d] && np.subjects.Matches(p.labels) {
			out = append(out, np)
		}
	}
	return out
}

// judgeAll judges every attachment: what the API says is known for the first time.
func (e *engine) judgeAll() {
	e.synced = true
	for _, a := range e.owners {
		e.judge(a)
	}
}
