// Package backend makes the pods of other nodes reachable: it keeps the kernel's
// routes, and for VXLAN the tunnel, in step with the nodes that the API knows.
//
// Each node has a plan, made of nothing but Node objects (plan.go and a file for each
// way), and a comparison with the kernel that writes what differs (kernel.go). Both
// are whole every time: a node that comes, goes, moves, or a route that somebody
// removed, is the same kind of difference, and what does not differ is not touched.
// Everything stays in place when kedge stops. Cleanup removes it.
//
// It does not translate addresses, judge connections or attach pods; packages nft,
// policy and cni do. Packages main and network may import it.
package backend
