// Package trace explains what a node's rules do to a connection: it follows an
// imagined first packet through the parts of the network that have rules, each of
// which reads them from the kernel, compares them with what it meant to write,
// and says what they do and why. No packet is sent.
//
// It knows packets and steps, not rules: those who write rules implement Part.
// Packages below network may import it for that, and package main for the command
// "kedge net trace".
package trace
