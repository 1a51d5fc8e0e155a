// Package policies renders the network policies of a node into its table
// "kedge-NODE/policy": sets of peers and ports, a chain for each policy, and maps
// from pod addresses to the chains that decide about their connections. Callers
// stage changes, and Commit writes the difference in one transaction.
//
// The package knows neither the API nor selectors; network/policy compiles
// policies and tells this package what to write. Only packages below network may
// import it.
package policies
