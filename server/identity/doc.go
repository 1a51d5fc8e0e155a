// Package identity has the credentials of a control plane: its authorities, keys, certificates and fixed
// tokens, as files in the server's directory. They are created at the first boot and kept, except certificates,
// which are renewed before they expire and when the machine's addresses change.
//
// It signs nothing for other machines (package join does, with these authorities), and has no authorization.
// The packages server and assembly may import it.
package identity
