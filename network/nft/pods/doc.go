// Package pods renders what a node's pods need besides services and policies into
// the table "kedge-NODE/pods": host ports, source translation on the way out of
// the cluster, the guard against forged addresses, and the marks of packets that
// take a tunnel.
//
// The package knows no leases and no interfaces beyond the prefix of their names;
// package network decides what the table holds. Only packages below network may
// import it.
package pods
