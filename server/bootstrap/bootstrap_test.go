package bootstrap

import (
	"context"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
)

// TestBootstrapOvertaken: another server that starts at the same time writes every
// object just before this one does.
func TestBootstrapOvertaken(t *testing.T) {
	c := fake.NewClientset(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}})
	overtaken := 0
	c.PrependReactor("create", "*", func(action k8stesting.Action) (bool, runtime.Object, error) {
		create := action.(k8stesting.CreateAction)
		object, err := meta.Accessor(create.GetObject())
		if err != nil {
			return true, nil, err
		}
		gvr := action.GetResource()
		if _, err := c.Tracker().Get(gvr, action.GetNamespace(), object.GetName()); err == nil {
			return false, nil, nil
		}
		overtaken++
		if err := c.Tracker().Create(gvr, create.GetObject(), action.GetNamespace()); err != nil {
			return true, nil, err
		}
		return true, nil, apierrors.NewAlreadyExists(gvr.GroupResource(), object.GetName())
	})
	if err := ensure(context.Background(), c, nil); err != nil {
		t.Fatal(err)
	}
	roles, err := c.RbacV1().ClusterRoles().List(context.Background(), metav1.ListOptions{})
	if err != nil || len(roles.Items) < 2 || overtaken < len(roles.Items) {
		t.Errorf("%v; overtaken %d times, roles %v", err, overtaken, roles.Items)
	}
}

// TestDNSHasEndpoints: who looks for what has metrics finds the resolvers by the service's slices.
func TestDNSHasEndpoints(t *testing.T) {
	c := fake.NewClientset(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}})
	for _, addrs := range [][]netip.Addr{
		{netip.MustParseAddr("10.43.0.10"), netip.MustParseAddr("fd43::a")},
		{netip.MustParseAddr("10.44.0.10"), netip.MustParseAddr("fd43::a")}, // of another service range
	} {
		for range 2 {
			if err := ensureDNS(t.Context(), c, addrs); err != nil {
				t.Fatal(err)
			}
			list, err := c.DiscoveryV1().EndpointSlices("kube-system").List(t.Context(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=kube-dns"})
			if err != nil || len(list.Items) != 2 {
				t.Fatalf("%d slices, %v", len(list.Items), err)
			}
			for i, s := range list.Items {
				if got := s.Endpoints[0].Addresses[0]; got != addrs[i].String() || *s.Ports[2].Name != "metrics" || *s.Ports[2].Port != 9153 {
					t.Errorf("slice %s leads to %s, ports %v", s.Name, got, s.Ports)
				}
			}
		}
	}
}
