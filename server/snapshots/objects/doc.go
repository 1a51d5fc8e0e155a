// Package objects lists the snapshots of a cluster as objects of kind Snapshot (kedge.io/v1), so that "kubectl get snapshots"
// shows those of all servers and of S3.
//
// The objects follow the files, never the other way round: package snapshots takes and removes them. Each server lists its own
// files and the bucket. While there is no snapshot, the kind is not defined.
//
// Package assembly imports it.
package objects
