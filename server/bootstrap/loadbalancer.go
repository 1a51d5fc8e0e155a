package bootstrap

import (
	"context"

	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/kubernetes"
)

// LoadBalancerUser is the user as which server/servicelb acts.
const LoadBalancerUser = "system:kedge:servicelb"

// ensureLoadBalancer lets the controller write services' addresses, and lets the nodes write the leases by
// which they decide which of them announces an address.
func ensureLoadBalancer(ctx context.Context, c kubernetes.Interface) error {
	read := []string{"get", "list", "watch"}
	err := ensureClusterRole(ctx, c, LoadBalancerUser, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: LoadBalancerUser}, []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"get", "list", "watch", "update"}},
		{APIGroups: []string{""}, Resources: []string{"services/status"}, Verbs: []string{"patch"}},
		{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: read},
		{APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, Verbs: read},
		{APIGroups: []string{"", "events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"create", "patch", "update"}},
	})
	if err != nil {
		return err
	}
	return ensureSystemRole(ctx, c, "kedge:loadbalancer", []rbacv1.PolicyRule{
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"get", "list", "watch", "create", "patch"}},
	})
}
