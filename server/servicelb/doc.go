// Package servicelb assigns addresses to services of type LoadBalancer: the addresses of the nodes, like k3s's
// ServiceLB but without pods, or an address of a pool, like MetalLB.
//
// It only writes addresses into the services' status. The service proxy of each node forwards packets for these
// addresses to endpoints, and network/loadbalancer announces the addresses of pools to neighbours.
//
// [assign] decides based on objects only; [Controller] reads the objects and writes the decisions. The
// assignments are stored in the services themselves only. Only package assembly imports it.
package servicelb
