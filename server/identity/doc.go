// Package identity is the credentials of a control plane: its authorities, keys,
// certificates and fixed tokens, as files of the server's directory. They are made at
// the first boot and kept from then on, but for the certificates, which are made anew
// before they expire and when the machine has other addresses.
//
// It signs nothing for other machines (package join does that, with the authorities
// that are here), and says nothing about who may do what. It may be imported by server
// and main.
package identity
