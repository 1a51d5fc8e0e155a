// Package dns is the cluster's resolver: a component of the process on every node, which
// pods reach at the cluster DNS address. It answers queries for names of the cluster and
// forwards all others; DESIGN.md explains how.
//
//	dns            Resolver: life cycle, sockets, the path of a query
//	  dns/cluster    names of the cluster, from services and endpoint slices
//	  dns/outside    all other names: cache, upstream name servers
//	  dns/custom     the ConfigMap kedge-dns
//	  dns/stats      metrics under CoreDNS's names
//	  dns/message    the wire format
//
// The package does not change the node's own resolv.conf and claims no service address but
// its own. Packages agent and main may import it; of the product it imports only internal
// packages.
package dns
