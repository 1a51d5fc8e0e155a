// Package loadbalancer makes neighbours find the addresses of services that are of a
// pool: one node of the cluster answers ARP (RFC 826) and neighbour solicitations
// (RFC 4861) for each of them and tells everybody when it begins to (RFC 5227, 4861).
//
//	Announcer   the component: which addresses there are, and which are this node's
//	members     which other nodes announce, from their leases
//	responder   the sockets: answers, and unasked announcements
//
// The addresses belong to no interface: packets to them are the service proxy's, whose
// rules send them to endpoints before the kernel looks for whom they are. Which service
// has which address is decided by server/servicelb. Only package main imports it.
package loadbalancer
