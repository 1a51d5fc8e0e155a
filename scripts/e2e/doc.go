// Package e2e tests the executable from outside, as its users run it: it boots
// nodes with real containers and looks at them with kubectl and client-go.
//
// Most tests share one node and run in parallel, each in a namespace of its own;
// tests about starting and stopping have nodes of their own. Needs root and an
// executable (`make build`; KEDGE_BIN names another). KEDGE_KEEP=1 leaves the
// shared node running after a failure, to be looked at; KEDGE_E2E_PORT moves the
// ports that nodes listen on (16443 and up) and changes their names, so that two
// runs at once do not meet; KEDGE_E2E_SLOW=10 waits ten times as long for everything,
// for an emulated machine.
//
// It contains tests only; nothing imports it.
package e2e
