package datastore

import (
	"slices"
	_ "unsafe" // for go:linkname

	"go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	_ "k8s.io/apiserver/pkg/storage/storagebackend/factory" // defines the variable below
)

// newETCD3Client is a variable of the API server's library: the one function through which it makes every
// etcd client it has, for resource types, health checks, compaction, leases and allocators alike. There is no
// exported way in that all of them pass (storage decorators miss six), and a fork of Kubernetes is not wanted.
// So the linker is told that this variable and theirs are one.
//
// A change of the variable's name would leave this one alone in the program, and a change of its type would
// be worse. TestHookMatchesUpstream reads the library's source and fails on either, and TestHookIsUsed makes
// a storage through the library and sees whose client it has.
//
//go:linkname newETCD3Client k8s.io/apiserver/pkg/storage/storagebackend/factory.newETCD3Client
var newETCD3Client func(storagebackend.TransportConfig) (*kubernetes.Client, error)

// Install makes the API server of this process use s wherever its configuration names Endpoint as its only
// etcd server; for other servers it dials as ever. It is for the process as a whole and is called once, before
// any part of an API server is built.
func (s *Store) Install() {
	dial := newETCD3Client
	newETCD3Client = func(c storagebackend.TransportConfig) (*kubernetes.Client, error) {
		if slices.Equal(c.ServerList, []string{Endpoint}) {
			return s.NewClient()
		}
		return dial(c)
	}
}
