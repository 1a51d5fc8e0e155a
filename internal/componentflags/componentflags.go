// Package componentflags merges the flags that kedge gives to an upstream
// Kubernetes component with those that the user gives with --kubelet-arg and
// its siblings, and refuses those that users cannot give.
//
// It knows no component, and of flags those that all have; it may be imported by main,
// server and agent, and what is below them.
package componentflags

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Split takes an entry of user apart, which is as in [Merge].
func Split(arg string) (name, value string, hasValue bool) {
	return strings.Cut(strings.TrimLeft(arg, "-"), "=")
}

// Merge returns command line flags: the defaults, each replaced by what user
// says for the same name, and then the rest of user in its order. An entry of
// user is "name=value", with or without leading dashes, or just "name" for a
// flag that needs no value. A name can occur several times in user.
// from is the name of the kedge flag that user comes from, for error messages.
func Merge(defaults map[string]string, user []string, from string) ([]string, error) {
	given := map[string]bool{}
	var own []string
	for _, arg := range user {
		name, value, hasValue := Split(arg)
		if name == "" {
			return nil, fmt.Errorf("%s %q: want NAME=VALUE", from, arg)
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
