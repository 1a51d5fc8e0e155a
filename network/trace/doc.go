// Package trace answers "kedge net trace": it finds the addresses that the names in
// a question mean, and takes an imagined first packet through the parts of the
// network that have rules. Each part reads its rules from the kernel, compares them
// with the rules that it meant to write, and says what they do to the packet and
// why. No packet is sent, and nothing is changed.
//
// The package knows the API's objects, packets and steps, but no rules: the packages
// that write rules implement Part, beside their tables. Packages below network may
// import it for that, and package main for the command.
package trace
