// The launcher is what users know as the kedge executable: a small program that
// carries the large one compressed, puts it where it belongs once, and becomes it.
//
// It keeps the file that is downloaded and carried around at a third of its size.
// Under the name kedge-cni it is the network plug-in itself and the large program
// is not involved, so that setting up a pod does not pay for the initialisation of
// a hundred megabytes. docs/decisions/packed-executable.md has the figures.
//
// It knows nothing of Kubernetes and of kedge's flags only --data-dir.
package main
