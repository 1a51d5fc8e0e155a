package tunnels

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"

	"kedge/internal/joining"
	"kedge/internal/lastbytes"
	"kedge/internal/tunnel"
)

// Kubelet connects to the kubelet of the node with the given [joining.NodeAddress]. It ignores the port, which
// the node itself has reported: the node knows where its kubelet listens.
func (h *Hub) Kubelet(ctx context.Context, _, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !joining.NodeAddresses.Contains(to.Addr()) {
		return nil, fmt.Errorf("%q is not the address of a node", address)
	}
	if h.cfg.OwnNode != "" && to.Addr() == joining.NodeAddress(h.cfg.OwnNode) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", h.cfg.OwnKubelet.String())
		if err != nil {
			return nil, err
		}
		return lastbytes.Guard(conn), nil
	}
	return h.through(ctx, to.Addr(), tunnel.Destination{Kind: tunnel.Kubelet})
}

// Node connects to kedge itself on another node. The error is errors.ErrUnsupported if that one is too old to answer.
func (h *Hub) Node(ctx context.Context, name string) (net.Conn, error) {
	conn, err := h.through(ctx, joining.NodeAddress(name), tunnel.Destination{Kind: tunnel.Node})
	if errors.Is(err, tunnel.ErrFrame) && errors.Is(err, io.EOF) {
		return nil, tooOld(name)
	}
	return conn, err
}

// tooOld is the error for a node whose version does not know the destination [tunnel.Node]: it closes the stream without an
// answer. A node that is ending can do the same.
type tooOld string

func (name tooOld) Error() string {
	return fmt.Sprintf("kedge on node %s is too old to answer this server; run \"kedge upgrade\" on that machine, by the new executable", string(name))
}

func (tooOld) Is(target error) bool { return target == errors.ErrUnsupported }

// Cluster connects to the targets of webhooks, extension API servers and the API's proxy of pods and services:
//
//   - an address outside the pod and service ranges: from this machine, directly;
//   - a pod of this machine's own node: directly too;
//   - a pod of a node with a tunnel: through the tunnel, so that the node need not be reachable;
//   - other pods and services: through this machine's data path, or through any node's tunnel if this machine
//     has no data path.
func (h *Hub) Cluster(ctx context.Context, network, address string) (net.Conn, error) {
	direct := func() (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, network, address) }
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return direct() // a host name; pods and services have none here
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
		return nil, fmt.Errorf("%w, and neither has any other node: this server has no node of its own, so it can reach %s only through other nodes", ErrNotConnected, address)
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

// any returns a random node that has a session.
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
