// Package testhost is what tests that need a network of their own have in common:
// [Main] gives a test program namespaces of its own, [RequireRoot] and
// [RequireIsolation] skip with a reason, and hosts on a switch are those of
// package lan by a shorter way.
//
// It makes nothing itself. Only tests and test programs may import it.
package testhost
