package parts

import (
	"testing"

	"kedge/internal/joining"
)

func TestOf(t *testing.T) {
	node := Parts{Node: true, PodNetwork: true, Policies: true, Services: true, DNS: true}
	server := node
	server.ControlPlane, server.Balancer = true, true
	with := func(p Parts, change func(*Parts)) Parts { change(&p); return p }
	for _, tc := range []struct {
		name    string
		role    Role
		cluster joining.Cluster
		want    Parts
	}{
		{"server", Server, joining.Cluster{Backend: "vxlan"}, server},
		{"agent", Agent, joining.Cluster{Backend: "vxlan"}, node},
		{"server without a node", ServerOnly, joining.Cluster{Backend: "vxlan", Pools: []string{"192.0.2.0/24"}}, Parts{ControlPlane: true, Balancer: true}},
		{"witness", Witness, joining.Cluster{Backend: "vxlan", Pools: []string{"192.0.2.0/24"}}, Parts{Witness: true}},
		{"foreign CNI plugin", Server, joining.Cluster{Backend: "none"}, with(server, func(p *Parts) { p.PodNetwork, p.Policies = false, false })},
		{"--disable-network-policy", Agent, joining.Cluster{Backend: "host-gw", NoPolicy: true}, with(node, func(p *Parts) { p.Policies = false })},
		{"--disable-kube-proxy", Agent, joining.Cluster{Backend: "vxlan", NoProxy: true}, with(node, func(p *Parts) { p.Services = false })},
		{"--disable=coredns", Server, joining.Cluster{Backend: "vxlan", NoDNS: true}, with(server, func(p *Parts) { p.DNS = false })},
		{"--lb-pool", Agent, joining.Cluster{Backend: "vxlan", Pools: []string{"192.0.2.0/24"}}, with(node, func(p *Parts) { p.Announcer = true })},
		{"--disable=servicelb", Server, joining.Cluster{Backend: "vxlan", NoBalancer: true, Pools: []string{"192.0.2.0/24"}}, with(server, func(p *Parts) { p.Balancer = false })},
	} {
		if got := Of(tc.role, tc.cluster); got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}
