// Package network is the pod network of a node: addresses, links, host ports and outbound
// traffic. DESIGN.md beside this file explains how the parts fit together.
//
// The package moves no packets. The kernel does, by links, routes and rules that this
// package writes and repairs; all of them stay in place when kedge stops, so that traffic
// continues while it restarts. Cleanup removes them for good.
//
// The package imports neither the other crafts nor packages of Kubernetes: methods pass in
// the API's data about the node. Packages main and agent may import it.
package network
