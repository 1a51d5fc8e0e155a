// Package directory maintains the list of the cluster's servers with the addresses of their APIs. It writes
// this server's entry, publishes the servers that answer as the endpoints of the service "kubernetes", and
// removes the servers whose nodes were deleted or which are not members of the datastore any more.
//
// The list is the ConfigMap kedge-servers in kube-system; each server writes its own entry. Without changes
// there are no writes: the leader calls the servers to check whether they answer, and no server renews a lease.
//
// It neither knows nor changes the members of the datastore itself, but through [Members]. The packages server
// and assembly may import it.
package directory
