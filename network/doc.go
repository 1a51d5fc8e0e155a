// Package network gives a node's pods their network: addresses, links, host
// ports and the way out of the cluster. DESIGN.md beside this file explains how
// the parts fit together.
//
// It moves no packet itself. The kernel does, by links, routes and rules that
// this package writes and repairs; all of them stay in place when kedge stops,
// so that traffic goes on while it restarts. Cleanup removes them for good.
//
// It does not import the other crafts or anything of Kubernetes: what the API
// knows about the node is told to it through methods. Packages main and agent
// may import it.
package network
