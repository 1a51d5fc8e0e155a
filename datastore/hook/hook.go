// Package hook makes the API server of this process use the datastore: it replaces the etcd clients that the Kubernetes
// libraries would dial with clients of the datastore.
//
// It is for package assembly, which calls [Install] once before it builds the API server. It is a package of its own because it
// imports the libraries' storage code, and the upstream test suites of that code import package datastore.
package hook

import (
	"slices"
	_ "unsafe" // for go:linkname

	"go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	_ "k8s.io/apiserver/pkg/storage/storagebackend/factory" // defines the variable below

	"kedge/datastore"
)

// newETCD3Client is a variable of the API server's library: the function with which it makes all of its etcd clients, for
// resource types, health checks, compaction, leases and allocators. No exported hook covers all of them (a storage
// decorator misses six), and kedge does not fork Kubernetes. So the linker makes this variable and the library's the same.
//
// If the library renamed its variable, this one would have no effect; if its type changed, it would be called with wrong
// arguments. TestMatchesUpstream reads the library's source and fails in both cases, and TestInstall checks that a storage
// of the library uses the datastore.
//
//go:linkname newETCD3Client k8s.io/apiserver/pkg/storage/storagebackend/factory.newETCD3Client
var newETCD3Client func(storagebackend.TransportConfig) (*kubernetes.Client, error)

// Store is a datastore of this process: kedge's own, or the external one.
type Store interface {
	NewClient() (*kubernetes.Client, error)
}

// Install makes the API server of this process use s where its configuration names datastore.Endpoint as its only etcd
// server. Other etcd servers are dialled as usual. Install changes the whole process. Call it once, before any part of an
// API server is built. Clients can be made once s is ready.
func Install(s Store) {
	dial := newETCD3Client
	newETCD3Client = func(c storagebackend.TransportConfig) (*kubernetes.Client, error) {
		if slices.Equal(c.ServerList, []string{datastore.Endpoint}) {
			return s.NewClient()
		}
		return dial(c)
	}
}
