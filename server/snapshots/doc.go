// Package snapshots takes snapshots of the cluster on a server, on request and by a schedule, and restores a server from one.
//
// A snapshot has everything that a bare machine needs to become the cluster's server again: the datastore, the authorities and
// keys, and the settings that are equal on all nodes. Package archive is its format, and the recovery key opens it, which
// [Keys] keeps in the cluster and in a file of every server.
//
// [Saver] needs a running datastore and its API. [Restore] works on a stopped server, or on a machine that has none yet.
// [Recovery] makes a stopped server the only one of its cluster, with the datastore that it has. The package is not for volumes,
// images, or what runs in pods.
//
// Package assembly imports it.
package snapshots
