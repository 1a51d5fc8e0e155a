// Package datastore is the store behind the Kubernetes API: etcd's server, in this process, which the API server calls by
// function calls instead of gRPC.
//
// It serves the control plane of one kedge server. A [Store] is a component: [Store.Run] opens the data directory and
// serves until its context ends, and [Store.NewClient] returns a client. Package hook makes the API server in this process
// use these clients.
//
// A store begins with one member and grows to several, one on each server, by [Store.Admit]. [Store.Leadership] says which
// server runs the components that must run once. A store with one member listens nowhere; one with several listens on one
// port for the other members, through package peers.
//
// The package is not a general key-value library, is not for agents, and serves no clients on a port. Conflicts, watches,
// paging and encryption are Kubernetes' own etcd3 package above it; raft, the write-ahead log and revisions are etcd's
// below it; both are unchanged. This package connects the two, and keeps the store healthy without an administrator.
//
// Package server and the packages below it may import it, and package main to configure it. DESIGN.md describes its states,
// its settings with their reasons, and the traps.
package datastore
