// Package bootstrap writes the objects that upstream leaves to a cluster's installer: the permissions to call
// kubelets, the permissions of the nodes' networks, and the service of the cluster's DNS.
//
// It is not for objects that controllers maintain: each server calls it once, when its API answers. Only the
// packages server and assembly import it.
package bootstrap

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
)

// KubeletClientUser is the user as which the API server calls kubelets. It is bound to the role
// system:kubelet-api-admin only.
const KubeletClientUser = "kube-apiserver-kubelet-client"

// Ensure writes the objects, and changes only those that differ. dns are the addresses of the cluster's
// resolver, none if kedge's resolver is disabled. If another server, which starts at the same time, changes an
// object between a read and a write, Ensure tries again.
func Ensure(ctx context.Context, rc *rest.Config, dns []netip.Addr) error {
	c, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return err
	}
	return ensure(ctx, c, dns)
}

func ensure(ctx context.Context, c kubernetes.Interface, dns []netip.Addr) error {
	overtaken := func(err error) bool { return apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) }
	backoff := wait.Backoff{Steps: 20, Duration: 10 * time.Millisecond, Factor: 1.3, Jitter: 0.5}
	return retry.OnError(backoff, overtaken, func() error { return try(ctx, c, dns) })
}

func try(ctx context.Context, c kubernetes.Interface, dns []netip.Addr) error {
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "kedge:kubelet-api-admin"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:kubelet-api-admin"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: KubeletClientUser}},
	}
	if err := ensureThere(ctx, c.RbacV1().ClusterRoleBindings(), binding); err != nil {
		return fmt.Errorf("bind the API server's kubelet client: %w", err)
	}
	if err := ensureNetworkRole(ctx, c); err != nil {
		return fmt.Errorf("grant the nodes' networks read access: %w", err)
	}
	if err := ensureLoadBalancer(ctx, c); err != nil {
		return fmt.Errorf("grant the load balancer write access to addresses: %w", err)
	}
	if err := ensureUpgrades(ctx, c); err != nil {
		return fmt.Errorf("grant the controller of upgrades what it needs: %w", err)
	}
	if err := ensureDNS(ctx, c, dns); err != nil {
		return fmt.Errorf("create the cluster's DNS service: %w", err)
	}
	return nil
}

// NetworkGroup is the group of the users as which the nodes' service proxy, policy engine and resolver read the
// API. A kubelet's own user can see only the pods of its node, which is not sufficient for routing and
// policies.
const NetworkGroup = "system:kedge:network"

func ensureNetworkRole(ctx context.Context, c kubernetes.Interface) error {
	read := []string{"get", "list", "watch"}
	return ensureClusterRole(ctx, c, NetworkGroup, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: NetworkGroup}, []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"services", "pods", "namespaces", "nodes"}, Verbs: read},
		{APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, Verbs: read},
		{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: read},
		{APIGroups: []string{"policy.networking.k8s.io"}, Resources: []string{"clusternetworkpolicies"}, Verbs: read},
		{APIGroups: []string{"apiextensions.k8s.io"}, Resources: []string{"customresourcedefinitions"}, Verbs: read,
			ResourceNames: []string{"clusternetworkpolicies.policy.networking.k8s.io"}},
		{APIGroups: []string{"", "events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"create", "patch", "update"}},
	})
}

// ensureClusterRole grants the rules to a subject in the whole cluster.
func ensureClusterRole(ctx context.Context, c kubernetes.Interface, name string, who rbacv1.Subject, rules []rbacv1.PolicyRule) error {
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects:   []rbacv1.Subject{who},
	}
	same := func(old *rbacv1.ClusterRole) bool { return equality.Semantic.DeepEqual(old.Rules, rules) }
	if err := ensureEqual(ctx, c.RbacV1().ClusterRoles(), role, same); err != nil {
		return err
	}
	return ensureThere(ctx, c.RbacV1().ClusterRoleBindings(), binding)
}

// ensureRole grants the rules to a subject in a namespace.
func ensureRole(ctx context.Context, c kubernetes.Interface, meta metav1.ObjectMeta, who rbacv1.Subject, rules []rbacv1.PolicyRule) error {
	role := &rbacv1.Role{ObjectMeta: meta, Rules: rules}
	binding := &rbacv1.RoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
		Subjects:   []rbacv1.Subject{who},
	}
	same := func(old *rbacv1.Role) bool { return equality.Semantic.DeepEqual(old.Rules, rules) }
	if err := ensureEqual(ctx, c.RbacV1().Roles(meta.Namespace), role, same); err != nil {
		return err
	}
	return ensureThere(ctx, c.RbacV1().RoleBindings(meta.Namespace), binding)
}

// creator is a client for creating one kind of object.
type creator[T any] interface {
	Create(ctx context.Context, object T, o metav1.CreateOptions) (T, error)
}

// updater is a client for creating and changing one kind of object.
type updater[T any] interface {
	creator[T]
	Get(ctx context.Context, name string, o metav1.GetOptions) (T, error)
	Update(ctx context.Context, object T, o metav1.UpdateOptions) (T, error)
}

// ensureEqual creates an object, or updates an object of an older kedge that differs.
func ensureEqual[T metav1.Object](ctx context.Context, client updater[T], object T, same func(old T) bool) error {
	old, err := client.Get(ctx, object.GetName(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = client.Create(ctx, object, metav1.CreateOptions{})
	case err == nil && !same(old):
		object.SetResourceVersion(old.GetResourceVersion())
		_, err = client.Update(ctx, object, metav1.UpdateOptions{})
	}
	return err
}

// ensureThere creates an object unless it exists.
func ensureThere[T any](ctx context.Context, client creator[T], object T) error {
	if _, err := client.Create(ctx, object, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}
