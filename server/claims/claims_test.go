package claims

import (
	"errors"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	v1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

func TestCheck(t *testing.T) {
	store := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	victim := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "victim"}}
	victim.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeInternalIP, Address: "2001:db8:0::1"},
		{Type: corev1.NodeExternalIP, Address: "203.0.113.1"},
	}
	if err := store.Add(victim); err != nil {
		t.Fatal(err)
	}
	j := Judge{v1listers.NewNodeLister(store), []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")}}
	for _, test := range []struct {
		what, address, source string
		want                  error
	}{
		{"that from which it calls", "192.0.2.7", "192.0.2.7", nil},
		{"one behind a router", "10.0.0.7", "192.0.2.7", nil},
		{"another node's", "192.0.2.1", "192.0.2.7", ErrTaken},
		{"another node's, written otherwise", "2001:db8::1", "192.0.2.7", ErrTaken},
		{"another node's, IPv4 in IPv6", "::ffff:192.0.2.1", "192.0.2.7", ErrTaken},
		{"another node's, from which it calls", "192.0.2.1", "192.0.2.1", nil},
		{"that of a router that both are behind", "203.0.113.1", "192.0.2.7", nil},
		{"a service's", "10.43.0.1", "192.0.2.7", ErrNobodys},
		{"a pod's, from which it calls", "10.42.1.5", "10.42.1.5", ErrNobodys},
		{"loopback", "127.0.0.1", "192.0.2.7", ErrNobodys},
		{"link-local", "fe80::1", "192.0.2.7", ErrNobodys},
		{"none", "x", "192.0.2.7", ErrNobodys},
	} {
		if err := j.Check("node", test.address, netip.MustParseAddr(test.source)); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("%s: %v", test.what, err)
		}
	}
	if err := j.Check("victim", "192.0.2.1", netip.MustParseAddr("192.0.2.9")); err != nil {
		t.Errorf("its own: %v", err)
	}
}
