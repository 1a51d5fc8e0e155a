// Package preflight finds out before kedge starts what this machine lacks:
// kernel features, limits, permissions, room, free ports. Each finding says in
// one sentence what is wrong and in one more what to do.
//
// Features are tried rather than looked up, because a configuration file says
// what a kernel could do and a trial says what it does here: in this container,
// under this security profile, on this file system. Trials run in namespaces of
// their own, which the kernel removes even if the process dies, and leave
// nothing behind.
//
// It changes nothing on the machine and mends nothing. It serves the command
// kedge check and, by Required, the start of every node. Only package main may
// import it.
package preflight
