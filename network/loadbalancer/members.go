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

	"kedge/internal/addresspool"
)

const (
	// renewEvery and deadAfter make a node's addresses move within three seconds of its
	// failure: a lease that was renewed just before expires 2.4 s later, which is noticed
	// within another quarter of a second.
	renewEvery = time.Second
	deadAfter  = 2400 * time.Millisecond
	checkEvery = 250 * time.Millisecond

	// LeaseLabel marks the leases of announcing nodes.
	LeaseLabel  = "kedge.io/lb-announcer"
	leasePrefix = addresspool.LeasePrefix
	// annotationNetworks has the networks of a node's interfaces.
	annotationNetworks = "kedge.io/lb-networks"
)

// member is an announcing node.
type member struct {
	name     string
	networks []netip.Prefix
}

// onNetworkOf reports whether the node is on the network of an address.
func (m member) onNetworkOf(a netip.Addr) bool {
	return slices.ContainsFunc(m.networks, func(p netip.Prefix) bool { return p.Contains(a) })
}

// owner returns the node that announces an address: if nodes are on its network, one of
// them, else any node; among the candidates, the one with the highest hash of name and
// address (rendezvous hashing). When a node is added or removed, only the necessary
// addresses move.
func owner(a netip.Addr, nodes []member) string {
	var best string
	var highest uint64
	near := slices.ContainsFunc(nodes, func(m member) bool { return m.onNetworkOf(a) })
	for _, m := range nodes {
		if near && !m.onNetworkOf(a) {
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

// members tracks by leases which nodes are alive. A lease is expired when it has not
// changed for a while by this node's clock: clocks of nodes are not compared.
type members struct {
	node string
	now  func() time.Time

	mu   sync.Mutex // guards what follows
	seen map[string]*leaseState
}

type leaseState struct {
	member
	renewed metav1.MicroTime
	at      time.Time // time of the last observed change, by this node's clock
}

func newMembers(node string) *members {
	return &members{node: node, now: time.Now, seen: map[string]*leaseState{}}
}

// set records the current state of a lease. A lease without a holder was released.
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
		s = &leaseState{member: member{name: name}}
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

// alive returns the other nodes with an unexpired lease, by name.
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

// renew writes this node's lease. With hold false it releases the lease.
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
	// No other node writes the lease, so no resource version is compared; an update would
	// have to name one.
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
