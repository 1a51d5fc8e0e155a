// Package nft writes kedge's packet filter and address translation rules, over
// netlink; no other package does. No host program is run and no table of
// anybody else is changed.
//
// Every table belongs to one node and one part of it and carries both in its
// name (see TableName), so that several nodes on a machine do not touch each
// other's rules and an uninstall finds all of them. A table is written in one
// transaction: packets see the old rules or the new ones. Rules stay when kedge
// stops, and each carries a comment that says what it is for.
//
// What should be true is decided by the callers; this package has no policy and
// keeps no state but what it wrote last, to repair it. Only packages under
// network may import it.
package nft
