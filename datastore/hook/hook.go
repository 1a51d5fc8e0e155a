// Package hook gives the API server of this process its store: it puts the datastore's clients in the place
// of the etcd clients that the Kubernetes libraries would dial.
//
// It is for package server, which calls [Install] once while it builds the API server. It is a package of its
// own because it imports the libraries' storage code, and the upstream test suites of that code import
// package datastore.
package hook

import (
	"slices"
	_ "unsafe" // for go:linkname

	"go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	_ "k8s.io/apiserver/pkg/storage/storagebackend/factory" // defines the variable below

	"kedge/datastore"
)

// newETCD3Client is a variable of the API server's library: the one function through which it makes every
// etcd client it has, for resource types, health checks, compaction, leases and allocators alike. There is no
// exported way in that all of them pass (a storage decorator misses six), and a fork of Kubernetes is not
// wanted. So the linker is told that this variable and theirs are one.
//
// If theirs were renamed, this one would be alone in the program and set in vain; if its type changed, it
// would be called with the wrong arguments. TestMatchesUpstream reads the library's source and fails on
// either, and TestInstall makes a storage through the library and sees whose client it got.
//
//go:linkname newETCD3Client k8s.io/apiserver/pkg/storage/storagebackend/factory.newETCD3Client
var newETCD3Client func(storagebackend.TransportConfig) (*kubernetes.Client, error)

// Install makes the API server of this process use s wherever its configuration names datastore.Endpoint as
// its only etcd server; other servers it dials as ever. It changes the process as a whole. Call it once,
// before any part of an API server is built; clients can be had from when s is ready.
func Install(s *datastore.Store) {
	dial := newETCD3Client
	newETCD3Client = func(c storagebackend.TransportConfig) (*kubernetes.Client, error) {
		if slices.Equal(c.ServerList, []string{datastore.Endpoint}) {
			return s.NewClient()
		}
		return dial(c)
	}
}
