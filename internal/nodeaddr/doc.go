// Package nodeaddr decides which addresses of nodes are trusted. A node's own user writes
// addresses into its Node object, and a compromised machine can write any. Routes, sets of
// addresses and load balancers therefore use only addresses from which a server has seen the
// node call, or that an administrator has allowed. The servers record both in the annotation
// [Proven] of the Node object ([Prove]), and readers call [Owners], which gives each address
// to one node.
//
// The package only reads and compares objects: it reads no interface and calls no API. Any
// package of kedge may import it.
package nodeaddr
