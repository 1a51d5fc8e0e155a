// Package lan joins network namespaces by a switch that has a namespace of its own. Each of
// the joined namespaces is a host: a machine as far as its network goes.
//
// A host has its own interfaces, addresses, routes, firewall rules and connection tracking.
// Its cable can be pulled. A host shares files, processes and control groups with its maker;
// package machine adds those of a machine.
//
// Nothing is bound to a path: a switch, its hosts and their cables exist for as long as a
// process has their namespaces open or runs in them. Nothing is made in the namespace of the
// caller, except by [LAN.Attach].
//
// Everything needs root. Package machine and tests import it.
package lan
