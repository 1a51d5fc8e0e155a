// Package nft writes kedge's packet filter and address translation rules over
// netlink; no other package does. It runs no program of the host and changes no
// table of another program.
//
// Every table belongs to one node and to one part of it, and carries both in its
// name (see TableName): several nodes on one machine do not touch each other's
// rules, and an uninstall finds all of them. A table is written in one
// transaction: packets see the old rules or the new ones. Rules stay when kedge
// stops, and each rule carries a comment that says what it is for.
//
// The package holds what all tables share: the connection to the kernel,
// transactions, the comparison with what the kernel has, and the building blocks
// of rules. The tables themselves are in nft/pods, nft/policies and nft/services;
// what should be true is decided by their callers. Only packages below network
// may import this package.
package nft
