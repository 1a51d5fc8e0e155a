package bootstrap

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

const (
	// dnsService is the name that charts and tests expect, for any resolver.
	dnsService = "kube-dns"
	// dnsSettings is the name of the ConfigMap that the resolvers read.
	dnsSettings = "kedge-dns"
)

// ensureDNS reserves the addresses of the cluster's DNS by a service without a selector, and lets the nodes
// read its ConfigMap. Without addresses kedge's resolver is disabled; a service of that name then belongs to
// another resolver.
func ensureDNS(ctx context.Context, c kubernetes.Interface, addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	if err := ensureDNSRole(ctx, c); err != nil {
		return fmt.Errorf("grant nodes read access to %s: %w", dnsSettings, err)
	}
	if err := ensureDNSService(ctx, c, addrs); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := ensureDNSSlice(ctx, c, a); err != nil {
			return fmt.Errorf("create the endpoints of the resolvers' metrics: %w", err)
		}
	}
	return nil
}

// ensureDNSSlice gives the service an endpoint: its own address, on which each node's resolver listens. It is
// for programs that discover metrics endpoints; it does not affect routing, because the nodes' service proxy
// ignores that address.
func ensureDNSSlice(ctx context.Context, c kubernetes.Interface, a netip.Addr) error {
	family, name := discoveryv1.AddressTypeIPv4, dnsService+"-ipv4"
	if a.Is6() {
		family, name = discoveryv1.AddressTypeIPv6, dnsService+"-ipv6"
	}
	yes := true
	want := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: metav1.NamespaceSystem,
			Labels: map[string]string{
				"k8s-app": dnsService, discoveryv1.LabelServiceName: dnsService, discoveryv1.LabelManagedBy: "kedge",
			},
		},
		AddressType: family,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{a.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}}},
	}
	for _, p := range dnsPorts() {
		want.Ports = append(want.Ports, discoveryv1.EndpointPort{Name: &p.Name, Port: &p.Port, Protocol: &p.Protocol})
	}
	slices := c.DiscoveryV1().EndpointSlices(want.Namespace)
	old, err := slices.Get(ctx, want.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = slices.Create(ctx, want, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) { // created by another server
			return nil
		}
	case err == nil && !(equality.Semantic.DeepEqual(old.Endpoints, want.Endpoints) && equality.Semantic.DeepEqual(old.Ports, want.Ports)):
		next := old.DeepCopy()
		next.Endpoints, next.Ports, next.Labels = want.Endpoints, want.Ports, want.Labels
		_, err = slices.Update(ctx, next, metav1.UpdateOptions{})
	}
	return err
}

func dnsPorts() []corev1.ServicePort {
	return []corev1.ServicePort{
		{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP, TargetPort: intstr.FromInt32(53)},
		{Name: "dns-tcp", Port: 53, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(53)},
		{Name: "metrics", Port: 9153, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(9153)},
	}
}

// waitNamespace waits for a namespace that the API server creates at its first start.
func waitNamespace(ctx context.Context, c kubernetes.Interface, name string) error {
	for {
		_, err := c.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func ensureDNSService(ctx context.Context, c kubernetes.Interface, addrs []netip.Addr) error {
	want := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name: dnsService, Namespace: metav1.NamespaceSystem,
			Labels: map[string]string{"k8s-app": dnsService, "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "kedge"},
		},
		Spec: corev1.ServiceSpec{
			Type:  corev1.ServiceTypeClusterIP,
			Ports: dnsPorts(),
		},
	}
	policy := corev1.IPFamilyPolicySingleStack
	if len(addrs) > 1 {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	want.Spec.IPFamilyPolicy = &policy
	for _, a := range addrs {
		family := corev1.IPv4Protocol
		if a.Is6() {
			family = corev1.IPv6Protocol
		}
		want.Spec.ClusterIPs = append(want.Spec.ClusterIPs, a.String())
		want.Spec.IPFamilies = append(want.Spec.IPFamilies, family)
	}
	want.Spec.ClusterIP = want.Spec.ClusterIPs[0]

	services := c.CoreV1().Services(want.Namespace)
	old, err := services.Get(ctx, want.Name, metav1.GetOptions{})
	if err == nil && !equality.Semantic.DeepEqual(old.Spec.ClusterIPs, want.Spec.ClusterIPs) { // cluster IPs are immutable
		if err := services.Delete(ctx, want.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
		_, err = services.Create(ctx, want, metav1.CreateOptions{})
		return err
	}
	switch {
	case apierrors.IsNotFound(err):
		_, err = services.Create(ctx, want, metav1.CreateOptions{})
	case err == nil && !(equality.Semantic.DeepEqual(old.Spec.Ports, want.Spec.Ports) && len(old.Spec.Selector) == 0):
		next := old.DeepCopy()
		next.Spec.Ports, next.Spec.Selector = want.Spec.Ports, nil
		_, err = services.Update(ctx, next, metav1.UpdateOptions{})
	}
	return err
}

func ensureDNSRole(ctx context.Context, c kubernetes.Interface) error {
	return ensureSystemRole(ctx, c, "kedge:dns", []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{dnsSettings}, Verbs: []string{"get", "list", "watch"}},
	})
}

// ensureSystemRole grants the rules to the nodes' networks in kube-system.
func ensureSystemRole(ctx context.Context, c kubernetes.Interface, name string, rules []rbacv1.PolicyRule) error {
	if err := waitNamespace(ctx, c, metav1.NamespaceSystem); err != nil {
		return err
	}
	return ensureRole(ctx, c, metav1.ObjectMeta{Name: name, Namespace: metav1.NamespaceSystem},
		rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: NetworkGroup}, rules)
}
