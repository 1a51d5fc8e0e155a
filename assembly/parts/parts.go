// Package parts says which parts of kedge a machine runs, by its role and its settings.
//
// It makes no part and knows no part's configuration, so that its tests link no component. It may be imported by assembly.
package parts

import (
	"kedge/internal/joining"
	"kedge/network/backend"
)

// Role is what a machine is in the cluster.
type Role int

const (
	// Server runs the control plane and a node.
	Server Role = iota
	// ServerOnly runs the control plane without a node.
	ServerOnly
	// Agent runs a node without a control plane.
	Agent
	// Witness runs a member of the datastore and nothing else.
	Witness
)

// Parts are the parts that a machine runs. The zero value runs none.
type Parts struct {
	ControlPlane bool // datastore, API server, controllers and scheduler
	Balancer     bool // the controller that gives Services of type LoadBalancer their addresses
	Node         bool // kubelet, container runtime and what they need
	Witness      bool // a member of the datastore without a control plane

	PodNetwork bool // addresses and links of pods, by kedge's own CNI plugin
	Policies   bool // NetworkPolicies; needs the pod network
	Services   bool // the service proxy
	DNS        bool // the cluster's resolver
	Announcer  bool // announces the addresses of load balancers on the node's links
}

// Of returns the parts of a machine with this role in a cluster with these settings.
func Of(role Role, cluster joining.Cluster) Parts {
	if role == Witness {
		return Parts{Witness: true}
	}
	p := Parts{ControlPlane: role != Agent, Node: role != ServerOnly}
	p.Balancer = p.ControlPlane && !cluster.NoBalancer
	if !p.Node {
		return p
	}
	p.PodNetwork = cluster.Backend != string(backend.None)
	// kedge's CNI plugin asks the policy engine before it attaches a pod; a foreign plugin does not.
	p.Policies = p.PodNetwork && !cluster.NoPolicy
	p.Services = !cluster.NoProxy
	p.DNS = !cluster.NoDNS
	// Without pools a load balancer's addresses are the nodes' own, which need no announcement.
	p.Announcer = !cluster.NoBalancer && len(cluster.Pools) > 0
	return p
}
