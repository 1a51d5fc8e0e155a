// Package external is a datastore outside of kedge: an etcd that the administrator runs, in place of package datastore's own.
//
// A [Store] is a component like datastore.Store, for the control plane of one server: [Store.Run] waits for the etcd and takes
// part in it until its context ends, [Store.NewClient] returns a client, and [Store.Leadership] says which server runs the
// components that must run once. No member of the etcd runs in kedge, so the servers agree by keys below /kedge/:
//
//	/kedge/cluster        the hash of the cluster's authority: the etcd is this cluster's
//	/kedge/servers/NAME   a server of the cluster; written when it is admitted, deleted when it is removed
//	/kedge/alive/NAME     a server that runs; ends with its lease
//	/kedge/leader         the name of the server that leads; ends with its lease
//
// A server renews its lease every two seconds. It believes that it leads only until three seconds before the etcd can end the lease.
//
// The package neither runs nor backs up an etcd, and stores nothing on this machine. Packages assembly and datastore/hook may
// import it.
package external
