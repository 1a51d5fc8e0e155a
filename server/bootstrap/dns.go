package bootstrap

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

const (
	// dnsService is the name that charts and tests look for, whatever resolver is behind it.
	dnsService = "kube-dns"
	// dnsSettings is the ConfigMap that the resolvers follow.
	dnsSettings = "kedge-dns"
)

// ensureDNS keeps the addresses of the cluster's DNS for it, by a service without a
// selector, and lets the nodes read its ConfigMap. Without addresses there is no
// resolver of ours; a service of that name is then somebody else's.
func ensureDNS(ctx context.Context, c kubernetes.Interface, addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	if err := ensureDNSRole(ctx, c); err != nil {
		return fmt.Errorf("let nodes read %s: %w", dnsSettings, err)
	}
	return ensureDNSService(ctx, c, addrs)
}

// waitNamespace waits for a namespace that the API server makes at its first start.
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
			Type: corev1.ServiceTypeClusterIP,
			Ports: []corev1.ServicePort{
				{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP, TargetPort: intstr.FromInt32(53)},
				{Name: "dns-tcp", Port: 53, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(53)},
				{Name: "metrics", Port: 9153, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(9153)},
			},
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
	if err == nil && !equality.Semantic.DeepEqual(old.Spec.ClusterIPs, want.Spec.ClusterIPs) { // they cannot be changed
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

// ensureSystemRole lets the nodes' networks do in kube-system what the rules say.
func ensureSystemRole(ctx context.Context, c kubernetes.Interface, name string, rules []rbacv1.PolicyRule) error {
	if err := waitNamespace(ctx, c, metav1.NamespaceSystem); err != nil {
		return err
	}
	return ensureRole(ctx, c, metav1.ObjectMeta{Name: name, Namespace: metav1.NamespaceSystem},
		rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: NetworkGroup}, rules)
}
