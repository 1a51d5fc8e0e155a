package server

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// ensureBootstrapObjects writes what upstream leaves to the installer: the
// binding that lets the API server call kubelets, what the nodes' networks may
// read, and the addresses of the service "kubernetes". It is called at every start and changes only what differs.
func ensureBootstrapObjects(ctx context.Context, rc *rest.Config, cfg Config) error {
	c, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return err
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "kedge:kubelet-api-admin"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:kubelet-api-admin"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: kubeletClientUser}},
	}
	if _, err := c.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("bind the API server's kubelet client: %w", err)
	}
	if err := ensureNetworkRole(ctx, c); err != nil {
		return fmt.Errorf("let nodes read what their network needs: %w", err)
	}
	if err := ensureLoadBalancer(ctx, c); err != nil {
		return fmt.Errorf("let the load balancer write addresses: %w", err)
	}
	if err := ensureDNS(ctx, c, cfg.ClusterDNS); err != nil {
		return fmt.Errorf("publish the cluster's DNS: %w", err)
	}
	if err := publishEndpoints(ctx, c, []netip.Addr{cfg.AdvertiseAddress}, int32(cfg.HTTPSPort)); err != nil {
		return fmt.Errorf("publish the API server's address: %w", err)
	}
	return nil
}

// NetworkGroup is the group of the users as which service proxy, policy and
// resolver of the nodes read the API. A kubelet's own user may see only the pods
// of its node, which is too little to route and judge by.
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

// ensureClusterRole lets somebody do what the rules say.
func ensureClusterRole(ctx context.Context, c kubernetes.Interface, name string, who rbacv1.Subject, rules []rbacv1.PolicyRule) error {
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
	roles := c.RbacV1().ClusterRoles()
	old, err := roles.Get(ctx, role.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = roles.Create(ctx, role, metav1.CreateOptions{})
	case err == nil && !equality.Semantic.DeepEqual(old.Rules, role.Rules): // an older kedge's
		role.ResourceVersion = old.ResourceVersion
		_, err = roles.Update(ctx, role, metav1.UpdateOptions{})
	}
	if err != nil {
		return err
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects:   []rbacv1.Subject{who},
	}
	if _, err := c.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}

// publishEndpoints makes the service "kubernetes" lead to the servers. Upstream
// does this with a lease for each server, renewed every ten seconds; a write
// when something changes is enough, since the set of servers is known.
func publishEndpoints(ctx context.Context, c kubernetes.Interface, servers []netip.Addr, port int32) error {
	name, protocol, ready := "https", corev1.ProtocolTCP, true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: "kubernetes", Namespace: metav1.NamespaceDefault,
			Labels: map[string]string{discoveryv1.LabelServiceName: "kubernetes"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &protocol}},
	}
	//nolint:staticcheck // Endpoints is deprecated, but old clients read it for this one service.
	legacy := &corev1.Endpoints{
		ObjectMeta: metav1.ObjectMeta{
			Name: "kubernetes", Namespace: metav1.NamespaceDefault,
			Labels: map[string]string{discoveryv1.LabelSkipMirror: "true"},
		},
		Subsets: []corev1.EndpointSubset{{Ports: []corev1.EndpointPort{{Name: name, Port: port, Protocol: protocol}}}},
	}
	for _, s := range servers {
		if s.Is6() {
			slice.AddressType = discoveryv1.AddressTypeIPv6
		}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{s.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
		legacy.Subsets[0].Addresses = append(legacy.Subsets[0].Addresses, corev1.EndpointAddress{IP: s.String()})
	}
	if err := ensureSlice(ctx, c, slice); err != nil {
		return err
	}
	endpoints := c.CoreV1().Endpoints(metav1.NamespaceDefault)
	old, err := endpoints.Get(ctx, legacy.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = endpoints.Create(ctx, legacy, metav1.CreateOptions{})
	case err == nil && !equality.Semantic.DeepEqual(old.Subsets, legacy.Subsets):
		legacy.ResourceVersion = old.ResourceVersion
		_, err = endpoints.Update(ctx, legacy, metav1.UpdateOptions{})
	}
	return err
}

func ensureSlice(ctx context.Context, c kubernetes.Interface, want *discoveryv1.EndpointSlice) error {
	slices := c.DiscoveryV1().EndpointSlices(want.Namespace)
	old, err := slices.Get(ctx, want.Name, metav1.GetOptions{})
	if err == nil && old.AddressType != want.AddressType { // immutable: the cluster changed its family
		if err := slices.Delete(ctx, want.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
		_, err = slices.Create(ctx, want, metav1.CreateOptions{})
		return err
	}
	switch {
	case apierrors.IsNotFound(err):
		_, err = slices.Create(ctx, want, metav1.CreateOptions{})
	case err == nil && !(equality.Semantic.DeepEqual(old.Endpoints, want.Endpoints) && equality.Semantic.DeepEqual(old.Ports, want.Ports)):
		want.ResourceVersion = old.ResourceVersion
		_, err = slices.Update(ctx, want, metav1.UpdateOptions{})
	}
	return err
}
