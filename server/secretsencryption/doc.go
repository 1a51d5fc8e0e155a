// Package secretsencryption changes how Secrets are encrypted in the datastore, while all servers run: a new key, encryption on,
// encryption off.
//
// What the servers are to have is a record in the datastore ([record]), with the names and fingerprints of keys and never a key.
// The keys are in a file of each server, which package identity makes at the first start. A change goes through stages, and a
// stage ends when all servers have confirmed it:
//
//	distribute   every server can read with the new key; all write with the old one
//	switch       every server writes with the new key, and no write with the old one is under way
//	rewrite      the server that leads rewrites all Secrets that have the old key
//	drop         every server forgets the old key
//
// [Keeper] is the part of each server: it has the file, tells the API server of another one, and answers the other servers. At
// a start it brings the file to what the record says. [Controller] is the part of the server that leads: it carries out a
// change, and waits while there is none.
//
// The package knows the datastore through [Store], and the API server through [API]. The packages server and assembly may
// import it.
package secretsencryption
