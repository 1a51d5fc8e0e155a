// Package ipam assigns the addresses of a node's pods and records their owners.
//
// Its guarantee: an address never has two owners, a released address becomes available
// again, and both hold when the process dies between any two instructions. A released
// address stays unused as long as the range allows: addresses that were never used come
// first, then the address released longest ago, so that packets, connections and DNS
// answers for the old pod do not reach a new one.
//
// The leases are in a journal in the run directory, written without fsync. That is
// sufficient: leases describe network namespaces, and namespaces live exactly as long as
// the running kernel. When the process dies, the page cache survives, and with it every
// acknowledged write. When the kernel dies (power cut, reboot), all namespaces are gone and
// no lease may survive; the journal names its boot and is discarded in any other, so the
// run directory need not be a tmpfs that a reboot empties.
//
// The package does not configure interfaces and does not know pods; an owner is a string,
// and the note of a lease belongs to the caller. Only packages below network may import it.
package ipam
