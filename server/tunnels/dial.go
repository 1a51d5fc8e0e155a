package tunnels

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"

	"kedge/internal/joining"
	"kedge/internal/tunnel"
)

// Kubelet connects to the kubelet of the node that an address of [joining.NodeAddress]
// stands for. The port is what the node says of itself, and is not looked at: a node
// knows where its kubelet listens.
func (h *Hub) Kubelet(ctx context.Context, _, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !joining.NodeAddresses.Contains(to.Addr()) {
		return nil, fmt.Errorf("%q does not stand for a node", address)
	}
	if h.cfg.OwnNode != "" && to.Addr() == joining.NodeAddress(h.cfg.OwnNode) {
		h.mu.Lock()
		own := h.own
		h.mu.Unlock()
		if !own.IsValid() {
			return nil, errors.New("the kubelet of this server is not prepared yet")
		}
		return (&net.Dialer{}).DialContext(ctx, "tcp", own.String())
	}
	return h.through(ctx, to.Addr(), tunnel.Destination{Kind: tunnel.Kubelet})
}

// Cluster connects to what webhooks, extension API servers and the API's proxy of pods
// and services lead to:
//
//   - what is no pod's and no service's address: from this machine, as always;
//   - a pod of this machine's own node: likewise, it is at the other end of a cable;
//   - a pod of a node that has a tunnel: through that, so that it need not be reachable;
//   - other pods and services: through this machine's data path, or through any node's
//     where this machine has none.
func (h *Hub) Cluster(ctx context.Context, network, address string) (net.Conn, error) {
	direct := func() (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, network, address) }
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return direct() // a name, which no pod or service of the cluster is called by
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if joining.NodeAddresses.Contains(to.Addr()) {
		return nil, fmt.Errorf("%w: not port %d of %s", ErrOnlyKubelet, to.Port(), h.nameOf(to.Addr()))
	}
	contains := func(p netip.Prefix) bool { return p.Contains(to.Addr()) }
	pod := slices.ContainsFunc(h.cfg.PodRanges, contains)
	if !pod && !slices.ContainsFunc(h.cfg.ServiceRanges, contains) {
		return direct()
	}
	owner := ""
	if pod && !h.cfg.ForeignPods {
		owner = h.owner(to.Addr())
	}
	d := tunnel.Destination{Kind: tunnel.Egress, Addr: to}
	switch {
	case owner != "" && owner == h.cfg.OwnNode:
		return direct()
	case owner != "" && h.connected(owner):
		return h.through(ctx, joining.NodeAddress(owner), d)
	case h.cfg.OwnNode != "":
		return direct()
	}
	via, ok := h.any()
	if !ok {
		return nil, fmt.Errorf("%w, nor has any other: %s can be reached through nodes only, since this server has none of its own", ErrNotConnected, address)
	}
	return h.through(ctx, via, d)
}

func (h *Hub) owner(a netip.Addr) string {
	h.mu.Lock()
	nodes := h.nodes
	h.mu.Unlock()
	if nodes == nil {
		return ""
	}
	return nodes.Owner(a)
}

func (h *Hub) connected(node string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sessions[joining.NodeAddress(node)]) > 0
}

// any is a node that has a session.
func (h *Hub) any() (netip.Addr, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.sessions) == 0 {
		return netip.Addr{}, false
	}
	skip := rand.N(len(h.sessions))
	for at := range h.sessions {
		if skip == 0 {
			return at, true
		}
		skip--
	}
	return netip.Addr{}, false
}
