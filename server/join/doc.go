// Package join admits machines to the cluster: it keeps the tokens and what is
// known of each node's key, answers the requests of joining machines on the API's
// port, and signs what they get. Names, groups and addresses in certificates are
// decided here; a machine only proves its key.
//
// Tokens and keys are Secrets of kube-system, which no node may read or write. It
// is no authentication for the API: that takes over with the certificates. It may
// be imported by server and main.
package join
