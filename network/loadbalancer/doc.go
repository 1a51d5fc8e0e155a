// Package loadbalancer announces the addresses of services that come from a pool: for each
// address, one node of the cluster answers ARP (RFC 826) and neighbour solicitations
// (RFC 4861), and sends unsolicited announcements when it starts to (RFC 5227, RFC 4861).
//
//	Announcer   the component: which addresses exist, and which are assigned to this node
//	members     the other announcing nodes, from their leases
//	responder   the sockets: answers, and unsolicited announcements
//
// The addresses belong to no interface: the service proxy's rules translate packets to them
// before the routing decision. Package server/servicelb assigns addresses to services. Only
// package main imports this package.
package loadbalancer
