// Package testhost gives tests several machines on one: hosts are network
// namespaces, joined by a switch that has a namespace of its own.
//
// A host has its own interfaces, addresses, routes, firewall rules and
// connection tracking. It shares everything else with the machine: files,
// processes, clock, and /sys as mounted, so a program started in a host is
// given its own directories by the caller. Nothing is created in the
// machine's own namespace and nothing is bound to a path: when the process
// that made the hosts ends, in whatever way, the kernel removes all of them.
//
// Only tests and test programs may import it. It needs root; RequireRoot
// skips a test with a reason.
package testhost
