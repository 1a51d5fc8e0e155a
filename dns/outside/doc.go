// Package outside answers questions about names that are not the cluster's: from a
// cache, or by asking other name servers.
//
//	Resolver   what a query meets: cache, then one question for all who wait for it
//	cache      answers as they are sent, bounded in bytes
//	group      name servers that are asked for the same names; the first that answers wins
//	upstream   one name server: is it there, and how it is asked
//
// What keeps names working when servers do not: a server that is slow is not waited
// for when there is another; one that is dead is left out until it answers again;
// when none answers, old answers are given (RFC 8767), and where there are none the
// failure is told at once.
//
// It knows no cluster and no Kubernetes. Only packages under dns may import it.
package outside
