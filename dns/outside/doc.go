// Package outside resolves names outside the cluster: from a cache, or by querying upstream
// name servers.
//
//	Resolver   the path of a query: cache, then one upstream query for all clients with it
//	cache      answers in wire format, limited in bytes
//	group      name servers for the same names; the first answer wins
//	upstream   one name server: its health, and the exchange with it
//
// Names keep resolving when servers fail: another server is queried when one is slow; a
// server that is down is not used until it answers again; when none answers, stale answers
// are served (RFC 8767), and without one the failure is reported at once.
//
// The package knows nothing of the cluster or of Kubernetes. Only packages below dns may
// import it.
package outside
