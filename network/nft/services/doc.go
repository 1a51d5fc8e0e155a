// Package services renders the services of a node into its table
// "kedge-NODE/services": the translation of cluster IPs, node ports, external and
// load balancer addresses to endpoints, and the source addresses that endpoints
// see. The cost of a change depends on the services that change, not on their
// number.
//
// The package does not choose which endpoints may be used; network/proxy does, and
// is with package main the only importer. Packet building blocks and transactions
// are those of network/nft.
package services
