// Package accountkeys replaces the key that signs the tokens of service accounts, while all servers run.
//
// What the servers are to have is a record in the datastore ([record]), with the IDs of keys and never a key. The keys are in a
// file of each server, which package identity makes at the first start: the first signs, and tokens of all are accepted. A change
// goes through stages:
//
//	distribute   every server gets the new key and accepts its tokens; all sign with the old one
//	switch       every server signs with the new key
//	keep         tokens of the old key are still accepted, until an administrator finishes the change
//	drop         every server forgets the old key
//
// All but "keep" end when all servers have confirmed them. [Keeper] is the part of each server: it has the file, tells the API
// server and the controllers of another one, and answers the other servers. At a start it brings the file to what the record says.
// [Controller] is the part of the server that leads: it carries out a change, and waits while there is none. [Administration] is
// what an administrator can do, on any server.
//
// The package knows the datastore through [Store], and the API server through [API]. The packages server and assembly may
// import it.
package accountkeys
