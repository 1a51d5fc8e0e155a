// Package servicelb gives services of type LoadBalancer their addresses: those of the
// nodes, as k3s's ServiceLB does but without pods, or one of a pool, as MetalLB does.
//
// It only writes addresses into the services' status. That packets to them reach the
// endpoints is the service proxy's work, and that neighbours find the addresses of a pool
// is network/loadbalancer's; both on the nodes.
//
// [assign] decides, from objects alone; [Controller] reads the objects and writes what was
// decided. What is given to whom is kept in the services themselves and nowhere else.
// Only package main imports it.
package servicelb
