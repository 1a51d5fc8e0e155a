package importk3s

import (
	"fmt"
	"slices"
	"strconv"
)

// missing returns the path of the first field that is in want and not, or with another value, in have; empty if there is none.
// Fields that only have has count for nothing: they are defaults of a later version, or what controllers add.
func missing(want, have any, path string) string {
	if want == nil || isEmpty(want) && isEmpty(have) {
		return ""
	}
	switch w := want.(type) {
	case map[string]any:
		h, ok := have.(map[string]any)
		if !ok {
			return orRoot(path)
		}
		for _, k := range sortedKeys(w) {
			if found := missing(w[k], h[k], path+"."+k); found != "" {
				return found
			}
		}
		return ""
	case []any:
		h, ok := have.([]any)
		if !ok || len(h) != len(w) {
			return orRoot(path)
		}
		for i := range w {
			if found := missing(w[i], h[i], path+"["+strconv.Itoa(i)+"]"); found != "" {
				return found
			}
		}
		return ""
	}
	if fmt.Sprint(want) != fmt.Sprint(have) { // numbers are int64 or float64
		return orRoot(path)
	}
	return ""
}

// orRoot returns a path for people, without the first dot.
func orRoot(path string) string {
	if path == "" {
		return "the object"
	}
	return path[1:]
}

// difference returns the first field in which an existing object lacks what is imported; empty if there is none.
func difference(want, have map[string]any) string { return missing(compared(want), compared(have), "") }

// compared returns the parts of an object that are compared.
func compared(o map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range o {
		if k != "status" && k != "metadata" && k != "apiVersion" && k != "kind" {
			out[k] = v
		}
	}
	if m, ok := o["metadata"].(map[string]any); ok {
		out["metadata"] = map[string]any{"labels": m["labels"], "annotations": m["annotations"]}
	}
	return out
}

// merged returns an object that has all of have, and over it all of want. Lists are replaced.
func merged(want, have any) any {
	w, ok := want.(map[string]any)
	h, both := have.(map[string]any)
	if !ok || !both {
		return want
	}
	out := map[string]any{}
	for k, v := range h {
		out[k] = v
	}
	for k, v := range w {
		if old, ok := h[k]; ok {
			v = merged(v, old)
		}
		out[k] = v
	}
	return out
}

// isEmpty reports whether a value says as much as none. The empty text, false and 0 say more: that a default is not wanted.
func isEmpty(v any) bool {
	switch x := v.(type) {
	case nil:
		return true
	case map[string]any:
		for _, item := range x {
			if !isEmpty(item) {
				return false
			}
		}
		return true
	case []any:
		return len(x) == 0
	}
	return false
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
