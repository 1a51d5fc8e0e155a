// Package peers connects the members of the datastore with each other, wherever their machines are.
//
// A [Mesh] listens for the other members on one port, exchanges heartbeats with them, finds them again after their
// machines have moved, and carries raft's connections: raft knows each member by a loopback address that never changes,
// and a proxy on that address forwards to the member. An [AddressBook] is the file with the members' addresses.
//
// The package does not decide which members the cluster has; raft does, by requests of package datastore. It knows
// nothing of what the store holds, and serves no clients.
//
// Only package datastore may import it.
package peers
