// Package harness has what the end-to-end tests share: it boots nodes with real containers, on this machine or on machines of
// their own in network namespaces, and looks at them with kubectl and client-go, from outside, as users of kedge do.
//
// Each folder beside it is a package of tests, whose TestMain is [Main]. Most tests use the package's one node ([Shared]) and
// run in parallel, each in a namespace of its own; tests about starting and stopping have nodes of their own ([Own]), and
// tests about clusters a server with agents and other servers ([NewFleet]).
//
// Tests need root, the executable (`make build`; KEDGE_BIN names another) and programs for images (`make build-e2e`).
// KEDGE_KEEP=1 leaves the shared node running after a failure, to be looked at; KEDGE_E2E_PORT moves the ports that nodes
// listen on (16443 and up) and changes their names, so that two runs at once do not meet; KEDGE_E2E_SLOW=10 waits ten times
// as long as a quiet machine of two cores needs, for an emulated machine (without it three times as long).
//
// The package has no tests, and links no component of Kubernetes. Only the end-to-end tests import it.
package harness
