// Package dns is the cluster's resolver: a component of the process on every node,
// which pods reach at the cluster's DNS address. It answers for the cluster's names
// and forwards all others; DESIGN.md says how.
//
//	dns            Resolver: life cycle, sockets, the way of a query
//	  dns/cluster    the cluster's names, from services and endpoint slices
//	  dns/outside    all other names: cache, name servers
//	  dns/custom     what the ConfigMap kedge-dns says
//	  dns/stats      metrics under CoreDNS's names
//	  dns/message    the wire format
//
// It is not for the node's own resolv.conf, which stays as it is, nor for service
// addresses other than its own. It may be imported by agent and main, and must not
// import another part of the product but internal packages.
package dns
