package watches

import (
	"context"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

func slice(name, namespace, service string, addresses ...string) *discoveryv1.EndpointSlice {
	port, udp, tcp, ready, not := int32(6443), corev1.ProtocolUDP, corev1.ProtocolTCP, true, false
	other := int32(53)
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		Ports:      []discoveryv1.EndpointPort{{Port: &port, Protocol: &tcp}, {Port: &other, Protocol: &udp}, {}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: addresses, Conditions: discoveryv1.EndpointConditions{Ready: &ready}},
			{Addresses: []string{"192.0.2.99"}, Conditions: discoveryv1.EndpointConditions{Ready: &not}},
		},
	}
}

// TestFollowServers: the servers are told sorted, once each, of both families, and without those of other services.
func TestFollowServers(t *testing.T) {
	client := fake.NewClientset(slice("kubernetes", "default", "kubernetes", "192.0.2.2", "192.0.2.1"), slice("six", "default", "kubernetes", "2001:db8::1"),
		slice("web", "default", "web", "192.0.2.50"), slice("kubernetes", "other", "kubernetes", "192.0.2.51"))
	w := &Watches{client: client, informers: informers.NewSharedInformerFactory(client, 0)}
	told := make(chan []string, 20)
	if err := w.FollowServers(func(urls []string) { told <- urls }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- w.Run(ctx, func() { close(ready) }) }()
	<-ready
	until := func(what string, want ...string) {
		t.Helper()
		limit := time.After(10 * time.Second)
		for {
			select {
			case got := <-told:
				if slices.Equal(got, want) {
					return
				}
			case <-limit:
				t.Fatalf("%s: never told %q", what, want)
			}
		}
	}
	until("at first", "https://192.0.2.1:6443", "https://192.0.2.2:6443", "https://[2001:db8::1]:6443")
	if err := client.DiscoveryV1().EndpointSlices("default").Delete(ctx, "six", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	until("one family is gone", "https://192.0.2.1:6443", "https://192.0.2.2:6443")
	if w.Client() != client || w.Informers() == nil {
		t.Error("not what it was made with")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
