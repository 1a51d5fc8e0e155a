// Package command is kedge's command line: the commands, their flags, their output, and their exit codes. A
// command resolves its settings (package settings), calls the function that does the work, and prints the
// result. Logic that another command, or a program that uses kedge as a library, could need is not here.
//
// Functions that link Kubernetes or containerd are fields of [Program], so that the tests of this package link
// fast. Only package main may import it.
package command
