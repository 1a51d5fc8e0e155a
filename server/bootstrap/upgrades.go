package bootstrap

import (
	"context"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/kubernetes"
)

// UpgradesUser is the user as which the controller of Upgrades acts.
const UpgradesUser = "system:kedge:upgrades"

// ensureUpgrades lets the controller define its kind, follow its objects, and drain nodes.
func ensureUpgrades(ctx context.Context, c kubernetes.Interface) error {
	read := []string{"get", "list", "watch"}
	definition := []string{"upgrades.kedge.io"}
	return ensureClusterRole(ctx, c, UpgradesUser, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: UpgradesUser}, []rbacv1.PolicyRule{
		{APIGroups: []string{"apiextensions.k8s.io"}, Resources: []string{"customresourcedefinitions"}, Verbs: []string{"create"}}, // a rule for it has no names
		{APIGroups: []string{"apiextensions.k8s.io"}, Resources: []string{"customresourcedefinitions"}, Verbs: []string{"get", "update"}, ResourceNames: definition},
		{APIGroups: []string{"kedge.io"}, Resources: []string{"upgrades"}, Verbs: read},
		{APIGroups: []string{"kedge.io"}, Resources: []string{"upgrades/status"}, Verbs: []string{"patch"}},
		{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "list", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "list"}},
		{APIGroups: []string{""}, Resources: []string{"pods/eviction"}, Verbs: []string{"create"}},
		{APIGroups: []string{"apps"}, Resources: []string{"daemonsets"}, Verbs: []string{"get"}},
		{APIGroups: []string{"", "events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"create", "patch", "update"}},
	})
}
