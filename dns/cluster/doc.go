// Package cluster knows the names of a cluster: those of the Kubernetes DNS
// specification 1.1, and what CoreDNS adds to it (names of endpoints of services
// with an address, names of pods by their address).
//
// An [Index] is told of services, endpoint slices and namespaces as they change
// and answers from maps. One service is one immutable record, replaced as a whole;
// a query looks up one record and reads it.
//
// It opens no socket and watches nothing. Only packages under dns may import it.
package cluster
