package informertrim

import (
	"reflect"
	"testing"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// meta is what all objects have that nobody on a node reads.
func meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: name, Namespace: "default", UID: "u", ResourceVersion: "7",
		Labels:          map[string]string{"app": "web", discoveryv1.LabelServiceName: "web", "service.kubernetes.io/headless": ""},
		Annotations:     map[string]string{corev1.LastAppliedConfigAnnotation: "{}", corev1.EndpointsLastChangeTriggerTime: "then", "kedge.io/address-pool": "lab"},
		ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kubectl"}},
		OwnerReferences: []metav1.OwnerReference{{Name: "owner"}}, Finalizers: []string{"one"}, GenerateName: "web-",
	}
}

// kept is the same without it.
func kept(name string, labels, annotations map[string]string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: "default", UID: "u", ResourceVersion: "7", Labels: labels, Annotations: annotations}
}

func ptr[T any](v T) *T { return &v }

func TestTransform(t *testing.T) {
	portNames := []corev1.ContainerPort{{Name: "http", ContainerPort: 80}}
	for _, c := range []struct{ given, want any }{
		{
			&corev1.Service{ObjectMeta: meta("web"), Spec: corev1.ServiceSpec{
				ClusterIP: "10.43.0.80", Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Protocol: "TCP", Port: 80}}}},
			&corev1.Service{ObjectMeta: func() metav1.ObjectMeta {
				m := kept("web", map[string]string{"service.kubernetes.io/headless": ""},
					map[string]string{corev1.EndpointsLastChangeTriggerTime: "then", "kedge.io/address-pool": "lab"})
				m.GenerateName = "web-"
				return m
			}(), Spec: corev1.ServiceSpec{ClusterIP: "10.43.0.80", Ports: []corev1.ServicePort{{Name: "http", Protocol: "TCP", Port: 80}}}},
		},
		{
			&discoveryv1.EndpointSlice{ObjectMeta: meta("web-x"), AddressType: discoveryv1.AddressTypeIPv4,
				Endpoints: []discoveryv1.Endpoint{{
					Addresses: []string{"10.42.0.5"}, NodeName: ptr("n1"), Zone: ptr("z"), Hostname: ptr("web-0"),
					Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}, Hints: &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "z"}}},
					TargetRef: &corev1.ObjectReference{Name: "web-0"}, DeprecatedTopology: map[string]string{"a": "b"},
				}},
				Ports: []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(80))}}},
			&discoveryv1.EndpointSlice{AddressType: discoveryv1.AddressTypeIPv4,
				ObjectMeta: kept("web-x", map[string]string{discoveryv1.LabelServiceName: "web", "service.kubernetes.io/headless": ""},
					map[string]string{corev1.EndpointsLastChangeTriggerTime: "then"}),
				Endpoints: []discoveryv1.Endpoint{{
					Addresses: []string{"10.42.0.5"}, NodeName: ptr("n1"), Zone: ptr("z"), Hostname: ptr("web-0"),
					Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}, Hints: &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "z"}}},
				}},
				Ports: []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(80))}}},
		},
		{
			&corev1.Pod{ObjectMeta: meta("web-0"),
				Spec: corev1.PodSpec{NodeName: "n1", HostNetwork: true, Hostname: "h", Containers: []corev1.Container{
					{Name: "a", Image: "a", Ports: portNames}, {Name: "b", Image: "b"}}},
				Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.42.0.5", PodIPs: []corev1.PodIP{{IP: "10.42.0.5"}}, Message: "m",
					Conditions: []corev1.PodCondition{{Type: corev1.PodReady}}}},
			&corev1.Pod{ObjectMeta: kept("web-0", meta("").Labels, nil),
				Spec:   corev1.PodSpec{NodeName: "n1", HostNetwork: true, Containers: []corev1.Container{{Name: "a", Ports: portNames}}},
				Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.42.0.5", PodIPs: []corev1.PodIP{{IP: "10.42.0.5"}}}},
		},
		{
			&corev1.Node{ObjectMeta: meta("n1"), Status: corev1.NodeStatus{
				Addresses: []corev1.NodeAddress{{Address: "192.0.2.1"}}, Images: []corev1.ContainerImage{{SizeBytes: 1}}}},
			&corev1.Node{ObjectMeta: func() metav1.ObjectMeta {
				m := meta("n1")
				m.ManagedFields, m.Annotations = nil, map[string]string{"kedge.io/address-pool": "lab"}
				return m
			}(), Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Address: "192.0.2.1"}}}},
		},
	} {
		got, err := Transform(c.given)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%T: %v\ngot  %+v\nwant %+v", c.given, err, got, c.want)
		}
	}
}

// TestShared: what many objects have is in memory once.
func TestShared(t *testing.T) {
	node := func() *string { return ptr(string([]byte("node-1"))) }
	var all []*discoveryv1.EndpointSlice
	for range 2 {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: string([]byte("default"))},
			Endpoints:  []discoveryv1.Endpoint{{NodeName: node()}, {NodeName: node()}, {NodeName: ptr("node-2")}, {}, {NodeName: node()}},
		}
		if _, err := Transform(s); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	a, b := all[0], all[1]
	if unsafe.StringData(a.Namespace) != unsafe.StringData(b.Namespace) || unsafe.StringData(*a.Endpoints[0].NodeName) != unsafe.StringData(*b.Endpoints[0].NodeName) {
		t.Error("two slices have texts of their own")
	}
	if a.Endpoints[0].NodeName != a.Endpoints[1].NodeName {
		t.Error("two endpoints of a node have pointers of their own")
	}
	if *a.Endpoints[2].NodeName != "node-2" || a.Endpoints[3].NodeName != nil || *a.Endpoints[4].NodeName != "node-1" {
		t.Errorf("endpoints on other nodes: %+v", a.Endpoints)
	}
}
