// Package directory knows the servers of the cluster and where their APIs are: it
// keeps this server's entry in the list that all share, publishes those that answer as
// the endpoints of the service "kubernetes", and takes out of the cluster the servers
// whose nodes were deleted or which are in the store no more.
//
// The list is the ConfigMap kedge-servers of kube-system, in which each server writes
// its own entry. Nothing is written while nothing changes: whether a server answers is
// asked of it, not of a lease that it renews.
//
// It does not know who is a member of the store, nor change that by itself: package
// datastore does, through [Members]. It may be imported by server and main.
package directory
