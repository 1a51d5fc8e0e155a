// Package ipam hands out the addresses of a node's pods and remembers to whom.
//
// Its promise: an address never has two owners, an address whose owner was
// released is found again, and both hold when the process dies between any two
// instructions. A freed address rests as long as the range allows: those never
// used come first, then the one freed longest ago, so that a packet, a
// connection or a DNS answer meant for the old pod does not reach a new one.
//
// What is remembered lives in a journal in the run directory, written without
// fsync. That is enough, and the reason is worth knowing: leases describe
// network namespaces, and namespaces live exactly as long as the kernel that
// runs. When the process dies the page cache survives, so every acknowledged
// write does too. When the kernel dies (power cut, reboot) all namespaces are
// gone and no lease may survive; the journal names the boot it belongs to and
// is discarded in any other, so the run directory need not be a tmpfs that a
// reboot empties.
//
// It does not configure interfaces and does not know what a pod is; an owner is
// a text and the note beside it belongs to the caller. Only packages under
// network may import it.
package ipam
