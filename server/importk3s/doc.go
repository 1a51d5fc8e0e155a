// Package importk3s imports the objects of a k3s cluster, which are in a snapshot of k3s's etcd, into a cluster of kedge that
// runs ("kedge import k3s").
//
// [Read] opens the snapshot file: it decrypts what k3s has encrypted and decodes the objects. [choose] says which of them are
// k3s's own or are created by a new cluster itself. [Importer] creates the others through the API, as a client does. So
// Kubernetes checks each object, kedge's own key encrypts Secrets, and revisions and UIDs are those of the new cluster.
//
// It is not for the volumes' data, images, nodes, or for k3s's authorities and tokens, which the new cluster has of its own.
//
// Only package main imports it.
package importk3s
