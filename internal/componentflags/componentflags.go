// Package componentflags merges kedge's own flags for an upstream Kubernetes component with the
// user's, from --kubelet-arg and its siblings, and refuses flags that users cannot set.
//
// It knows no component, and only flags that all components have. It may be imported by main,
// server, agent, and packages below them.
package componentflags

import (
	"maps"
	"slices"
	"strings"

	"kedge/internal/errorkind"
)

// Split splits an entry of user, as in [Merge].
func Split(arg string) (name, value string, hasValue bool) {
	return strings.Cut(strings.TrimLeft(arg, "-"), "=")
}

// Merge returns command line flags: the defaults, each replaced by user's value for the same
// name, and then the rest of user in its order. An entry of
// user is "name=value", with or without leading dashes, or just "name" for a
// flag that needs no value. A name can occur several times in user.
// from is the setting that user comes from, for error messages.
func Merge(defaults map[string]string, user []string, from string) ([]string, error) {
	given := map[string]bool{}
	var own []string
	for _, arg := range user {
		name, value, hasValue := Split(arg)
		if name == "" {
			return nil, errorkind.BadItem(from, arg, " %q: want NAME=VALUE", arg)
		}
		given[name] = true
		if hasValue {
			own = append(own, "--"+name+"="+value)
		} else {
			own = append(own, "--"+name)
		}
	}
	var out []string
	for _, name := range slices.Sorted(maps.Keys(defaults)) {
		if !given[name] {
			out = append(out, "--"+name+"="+defaults[name])
		}
	}
	return append(out, own...), nil
}

// Has reports whether user gives the flag called name.
func Has(user []string, name string) bool {
	return slices.ContainsFunc(user, func(arg string) bool {
		given, _, _ := Split(arg)
		return given == name
	})
}
