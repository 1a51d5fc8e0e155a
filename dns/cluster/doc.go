// Package cluster resolves the names of a cluster: the names of the Kubernetes DNS
// specification 1.1, and CoreDNS's additions (names of endpoints of services with a
// cluster IP, and names of pods by their address).
//
// An [Index] receives services, endpoint slices and namespaces as they change, and answers
// from maps. One service is one immutable record, replaced as a whole; a query looks up one
// record and reads it.
//
// The package opens no sockets and watches nothing. Only packages below dns may import it.
package cluster
