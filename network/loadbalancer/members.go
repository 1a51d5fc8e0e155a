package loadbalancer

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

const (
	// renewEvery and deadAfter make a node's addresses move within three seconds of its
	// end: a lease that was renewed just before is dead 2.4 s later, noticed a quarter of
	// a second after that.
	renewEvery = time.Second
	deadAfter  = 2400 * time.Millisecond
	lookEvery  = 250 * time.Millisecond

	// LeaseLabel marks the leases of nodes that announce.
	LeaseLabel = "kedge.io/lb-announcer"
	// leasePrefix is before the node's name in the name of its lease.
	leasePrefix = "kedge-lb-"
	// annotationNetworks are the networks that a node is on.
	annotationNetworks = "kedge.io/lb-networks"
)

// member is a node that announces.
type member struct {
	name     string
	networks []netip.Prefix
}

// on says whether the node is on the network of an address.
func (m member) on(a netip.Addr) bool {
	return slices.ContainsFunc(m.networks, func(p netip.Prefix) bool { return p.Contains(a) })
}

// owner is the node of some that announces an address: one on its network if any is, and
// among those the one whose name and the address together have the highest hash. When a
// node comes or goes, only addresses move that must.
func owner(a netip.Addr, nodes []member) string {
	var best string
	var highest uint64
	near := slices.ContainsFunc(nodes, func(m member) bool { return m.on(a) })
	for _, m := range nodes {
		if near && !m.on(a) {
			continue
		}
		h := hash(m.name, a)
		if best == "" || h > highest || h == highest && m.name < best {
			best, highest = m.name, h
		}
	}
	return best
}

func hash(name string, a netip.Addr) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s/%s", a, name)
	// The last bytes of a name hardly reach the upper bits of FNV; mix them (MurmurHash3).
	v := h.Sum64()
	v ^= v >> 33
	v *= 0xff51afd7ed558ccd
	v ^= v >> 33
	v *= 0xc4ceb9fe1a85ec53
	return v ^ v>>33
}

// members knows from leases which nodes are alive. A lease is dead when it has not changed
// for a while by this node's clock: clocks of nodes are not compared.
type members struct {
	node string
	now  func() time.Time

	mu   sync.Mutex // guards what follows
	seen map[string]*sighting
}

type sighting struct {
	member
	renewed metav1.MicroTime
	at      time.Time // when the lease was seen to change, by our clock
}

func newMembers(node string) *members {
	return &members{node: node, now: time.Now, seen: map[string]*sighting{}}
}

// set takes a lease as it is now. One without a holder was let go.
func (m *members) set(l *coordinationv1.Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := strings.TrimPrefix(l.Name, leasePrefix)
	if l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity == "" || l.Spec.RenewTime == nil {
		delete(m.seen, name)
		return
	}
	s := m.seen[name]
	if s == nil {
		s = &sighting{member: member{name: name}}
		m.seen[name] = s
	}
	if s.renewed != *l.Spec.RenewTime {
		s.renewed, s.at = *l.Spec.RenewTime, m.now()
	}
	s.networks = nil
	for text := range strings.SplitSeq(l.Annotations[annotationNetworks], ",") {
		if p, err := netip.ParsePrefix(text); err == nil {
			s.networks = append(s.networks, p)
		}
	}
}

func (m *members) forget(l *coordinationv1.Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.seen, strings.TrimPrefix(l.Name, leasePrefix))
}

// alive are the other nodes whose leases are renewed, by name.
func (m *members) alive() []member {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []member
	for _, name := range slices.Sorted(maps.Keys(m.seen)) {
		if s := m.seen[name]; name != m.node && m.now().Sub(s.at) < deadAfter {
			out = append(out, s.member)
		}
	}
	return out
}

// renew writes this node's lease. hold is false to let go of it.
func renew(ctx context.Context, client kubernetes.Interface, node string, networks []netip.Prefix, hold bool) error {
	var text []string
	for _, p := range networks {
		text = append(text, p.String())
	}
	holder, now, seconds := node, metav1.NowMicro(), int32(deadAfter/time.Second)
	if !hold {
		holder = ""
	}
	leases := client.CoordinationV1().Leases(metav1.NamespaceSystem)
	want := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: leasePrefix + node, Namespace: metav1.NamespaceSystem, Labels: map[string]string{LeaseLabel: "true"},
			Annotations: map[string]string{annotationNetworks: strings.Join(text, ",")},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, RenewTime: &now, LeaseDurationSeconds: &seconds},
	}
	// Nobody else writes it, so no version is compared; an update would have to name one.
	body, err := json.Marshal(want)
	if err != nil {
		return err
	}
	_, err = leases.Patch(ctx, want.Name, types.MergePatchType, body, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		if !hold {
			return nil
		}
		_, err = leases.Create(ctx, want, metav1.CreateOptions{})
	}
	return err
}
