// Package assembly puts kedge together: it composes the configurations of all components from settings and
// properties of the machine (compose.go), creates the components with their order (wire.go), and runs them
// (serve.go). It also has the functions of commands about a whole node: checking its machine, and killing its
// containers.
//
// It returns errors in settings as they are found; the command adds the place of each setting.
//
// It has no logic that could belong to a component. Only package main may import it.
package assembly
