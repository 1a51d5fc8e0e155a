// Package message parses DNS queries and writes DNS replies in wire format (RFC 1035, EDNS
// of RFC 6891) without allocations: every query of a node's pods passes it.
//
// It supports exactly one kind of message, a query with one question, and writes the record
// types that the cluster's names need. Replies of other name servers are parsed with
// github.com/miekg/dns, which supports every type.
//
// Only packages below dns may import it.
package message
