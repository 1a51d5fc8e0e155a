// Package joining is what a machine that joins a cluster and the server that lets
// it in say to each other, and the machine's half of it: the client, the files that
// it keeps, and the renewal of its certificates.
//
// A machine's key is its identity. It is made once, never leaves the machine, and
// everything that a server signs is signed for it. Nothing that is secret is sent
// before the server has shown the certificate authority that the token names.
//
// It does not decide who may join: that is server/join. It may be imported by
// server/join and main.
package joining
