// The launcher is the file that users know as the kedge executable: a small program that contains the large
// program compressed, unpacks it once, and executes it.
//
// It reduces the file that is downloaded and copied to a third of its size. Under the name kedge-cni it is the
// CNI plugin itself, without the large program, so that setting up a pod does not pay for the initialisation of
// a hundred megabytes. docs/decisions/packed-executable.md has the figures.
//
// It knows nothing of Kubernetes, and of kedge's settings only --data-dir and --config.
package main
