// Package backend makes the pods of other nodes reachable: it keeps the kernel's routes,
// and the tunnel of backends that have one, in step with the Node objects of the API.
//
// Each round makes a plan from Node objects alone (plan.go and a file for each backend),
// compares it with the kernel, and writes the difference (kernel.go). Plan and comparison
// are always complete: a node that is added, removed or moved, and a route that another
// program removed, are the same kind of difference, and correct objects are not touched.
// All objects stay in place when kedge stops. Cleanup removes them.
//
// The package does not translate addresses, decide about connections or attach pods;
// packages nft, policy and cni do. Packages main and network may import it.
package backend
