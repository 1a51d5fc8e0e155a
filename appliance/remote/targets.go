package remote

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// Target is a node that will be upgraded.
type Target struct {
	Name   string
	Server bool
	Arch   string // as Go names it
	Ready  bool
	// Cordoned says that the administrator has cordoned it, before the rollout.
	Cordoned bool
}

// Targets returns the nodes of a cluster with these servers, and the servers without a node (bare), which have no tunnel.
func Targets(nodes []corev1.Node, servers []string) (targets []Target, bare []string) {
	bare = slices.Clone(servers)
	for _, n := range nodes {
		bare = slices.DeleteFunc(bare, func(name string) bool { return name == n.Name })
		targets = append(targets, Target{
			Name: n.Name, Server: slices.Contains(servers, n.Name), Arch: n.Status.NodeInfo.Architecture, Cordoned: n.Spec.Unschedulable,
			Ready: slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
				return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			}),
		})
	}
	return targets, bare
}
