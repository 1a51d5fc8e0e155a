// Package witness is a machine's half of being a witness: it joins the cluster, and keeps and renews the certificate of its
// member of the datastore. A witness votes and keeps a copy of the datastore, so that a cluster of two servers has a majority
// when one of them fails; it has no API, no keys of the cluster, and no node.
//
// The package does not run the datastore, and does not admit witnesses (package join). Package assembly may import it.
package witness
