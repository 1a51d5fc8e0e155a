// Package datastore is the store behind the Kubernetes API: etcd's own server, running in this process,
// reached by the API server through function calls instead of gRPC.
//
// It is for the control plane of one kedge server. A [Store] is a component: [Store.Run] opens the data
// directory and serves until its context ends, and [Store.NewClient] gives a client of it. Package hook below makes
// the API server in this process take all of its etcd clients from there.
//
// It begins alone and grows to several members, one on each server, by [Store.Admit]; [Store.Leadership] says who
// runs what must run once. Alone it listens nowhere, with others on one port for them.
//
// It is not a general key-value library, it is not for nodes, and it serves no clients on a port. What Kubernetes
// requires of its storage (conflicts, watches, paging, encryption) is Kubernetes' own etcd3 package above it,
// unchanged; raft, the write-ahead log and the revisions are etcd's below it, unchanged. What is here is the
// joint between them, and what keeps the store healthy with nobody looking.
//
// Package server and those below it may import it, and package main to configure it; nothing else. DESIGN.md beside this file
// has the states, the settings with their reasons, and the traps.
package datastore
