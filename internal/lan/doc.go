// Package lan joins network namespaces by a switch that has a namespace of its
// own: several machines on one, as far as the network goes.
//
// A host has its own interfaces, addresses, routes, firewall rules and
// connection tracking. Its cable can be pulled, and made slow, lossy or deaf in
// one direction. A host is not a machine: it shares files, processes and
// control groups with whoever made it; package machines adds those.
//
// Nothing is bound to a path: a switch, its hosts and their cables live for as
// long as somebody has their namespaces open or a process runs in them. In the
// namespace of the caller nothing is made but by [LAN.Attach]. Kernels without
// netem are enough: faults are made by a relay in this process.
//
// Everything needs root. Package machines and tests use it; it imports nothing
// of the house but netns.
package lan
