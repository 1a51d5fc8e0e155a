// Package joining is the protocol between a machine that joins a cluster and the server that
// admits it, and the machine's half of it: join tokens, the client, its files, and the renewal
// of its certificates. Agents and servers join by the same [Client], with the role as a field,
// and mark themselves as joined by the same [State]. A [Member] is an agent that has joined, and
// renews its certificates; package membership of server is its counterpart.
//
// A machine's key is its identity. It is made once, never leaves the machine, and servers sign
// everything for it. The machine sends no secret before the server has shown the certificate
// authority that the token names.
//
// The package does not decide who may join, and stores no tokens: that is server/join. It may be
// imported by packages of server, settings and assembly.
package joining
