// Package message reads DNS questions and writes DNS answers in wire format
// (RFC 1035, EDNS of RFC 6891), without allocating: it is what every query of
// a node's pods goes through.
//
// It understands exactly one kind of message, a query with one question, and
// writes the records that the cluster's names need. What comes from other name
// servers is read with github.com/miekg/dns, which knows every type.
//
// Only packages under dns may import it.
package message
