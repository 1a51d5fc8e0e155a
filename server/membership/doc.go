// Package membership is how a machine joins the servers of a cluster, what the servers have in common, and how a server is
// removed: the store's members, the list of servers, and the credentials that a new server gets.
//
// The requests of a join are those of package joining, for agents and servers alike. The package does not admit machines
// (package join), and does not know the API server. Packages server and assembly may
// import it.
package membership
