// Package unixsocket has two operations on unix sockets that the standard library lacks:
// [ListenPrivate] listens on a socket that only the process's own user may open, also in the moment
// after it was made; [RemoveStale] removes a socket on which no process listens any more, from a
// place that kedge shares with other programs.
//
// It serves no requests. It imports nothing of kedge, and any package may import it.
package unixsocket
