// Package explain answers "kedge net trace": it finds out which addresses the
// names in a question mean, has package trace follow the connection through the
// node's rules, and prints what it found.
//
// It reads what the node knows of the API and changes nothing. Only package main
// imports it.
package explain
