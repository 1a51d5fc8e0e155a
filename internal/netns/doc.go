// Package netns opens, creates and enters network namespaces.
//
// It is for the parts that configure pods (network/cni) and for the hosts of
// a switch (internal/lan): both must run a few system calls inside another
// namespace without ever leaving a thread of the Go scheduler behind in it.
// It is not a way to move a whole process, and it configures nothing.
// Anything in the house may import it; it imports nothing of the house.
package netns
