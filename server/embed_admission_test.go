package server

import (
	"context"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	v1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	api "k8s.io/kubernetes/pkg/apis/core"

	"kedge/server/join"
)

func TestClaimedAddresses(t *testing.T) {
	store := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	victim := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "victim"}}
	victim.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeExternalIP, Address: "203.0.113.1"}}
	if err := store.Add(victim); err != nil {
		t.Fatal(err)
	}
	check := claimedAddresses{
		Handler: admission.NewHandler(admission.Create, admission.Update), nodes: v1listers.NewNodeLister(store),
		ranges: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")},
	}
	node := func(kind api.NodeAddressType, addr string) *api.Node {
		return &api.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}, Status: api.NodeStatus{Addresses: []api.NodeAddress{{Type: kind, Address: addr}}}}
	}
	agent := join.WithSource(context.Background(), netip.MustParseAddr("192.0.2.7"))
	for _, test := range []struct {
		what  string
		ctx   context.Context
		group string
		said  *api.Node
		old   *api.Node
		good  bool
	}{
		{"the address it calls from", agent, user.NodesGroup, node(api.NodeInternalIP, "192.0.2.7"), nil, true},
		{"one behind a router", agent, user.NodesGroup, node(api.NodeInternalIP, "10.0.0.7"), nil, true},
		{"another node's", agent, user.NodesGroup, node(api.NodeInternalIP, "192.0.2.1"), nil, false},
		{"another node's, as one from outside", agent, user.NodesGroup, node(api.NodeExternalIP, "192.0.2.1"), nil, false},
		{"that of a router that both are behind", agent, user.NodesGroup, node(api.NodeExternalIP, "203.0.113.1"), nil, true},
		{"another node's that it had", agent, user.NodesGroup, node(api.NodeInternalIP, "192.0.2.1"), node(api.NodeInternalIP, "192.0.2.1"), true},
		{"another node's from which it calls", join.WithSource(context.Background(), netip.MustParseAddr("192.0.2.1")), user.NodesGroup, node(api.NodeInternalIP, "192.0.2.1"), nil, true},
		{"a service's", agent, user.NodesGroup, node(api.NodeInternalIP, "10.43.0.1"), nil, false},
		{"a pod's", agent, user.NodesGroup, node(api.NodeInternalIP, "10.42.1.5"), nil, false},
		{"loopback", agent, user.NodesGroup, node(api.NodeInternalIP, "127.0.0.1"), nil, false},
		{"IPv4 in IPv6", agent, user.NodesGroup, node(api.NodeInternalIP, "::ffff:192.0.2.1"), nil, false},
		{"no address", agent, user.NodesGroup, node(api.NodeInternalIP, "x"), nil, false},
		{"a name", agent, user.NodesGroup, node(api.NodeHostName, "x"), nil, true},
		{"another node's, said by an administrator", agent, "system:masters", node(api.NodeInternalIP, "192.0.2.1"), nil, true},
		{"another node's, said by this process", context.Background(), user.NodesGroup, node(api.NodeInternalIP, "192.0.2.1"), nil, true},
	} {
		who := &user.DefaultInfo{Name: "system:node:node", Groups: []string{test.group}}
		var old runtime.Object
		operation := admission.Create
		if test.old != nil {
			old, operation = test.old, admission.Update
		}
		a := admission.NewAttributesRecord(test.said, old, api.Kind("Node").WithVersion("v1"), "", "node", api.Resource("nodes").WithVersion("v1"), "status", operation, nil, false, who)
		if err := check.Validate(test.ctx, a, nil); (err == nil) != test.good {
			t.Errorf("%s: %v", test.what, err)
		}
	}
}
