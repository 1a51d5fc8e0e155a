package importk3s

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Outcome is what has become of an object.
type Outcome string

// The outcomes. With a dry run Created, Completed and Updated are what would be done.
const (
	Created   Outcome = "created"
	Completed Outcome = "completed" // the new cluster has created it itself, and it lacked something
	Updated   Outcome = "updated"   // it existed, differed, and was to be overwritten
	Unchanged Outcome = "unchanged" // it exists and has all that the snapshot's has
	Differs   Outcome = "differs"   // it exists, and was left as it is
	LeftOut   Outcome = "left out"
	Failed    Outcome = "failed"
)

// Entry is an object in the report, or several of one kind that are left out for the same reason.
type Entry struct {
	Outcome         Outcome
	Kind            string
	Namespace, Name string
	Count           int    // of objects, if they are several; Name is empty then
	Reason          string // why it is left out, has failed, or differs; what was changed in it
}

// Report is the result of an import.
type Report struct {
	Entries []Entry
	Notices []string // what the user has to do or to know
}

// Failures returns how many objects could not be imported.
func (r Report) Failures() (n int) {
	for _, e := range r.Entries {
		if e.Outcome == Failed {
			n++
		}
	}
	return n
}

func entryOf(u *unstructured.Unstructured, outcome Outcome, reason string) Entry {
	return Entry{Outcome: outcome, Kind: u.GetKind(), Namespace: u.GetNamespace(), Name: u.GetName(), Reason: reason}
}

// leftOut returns the entries of the objects that are left out. Those of kinds of which nothing is imported, and what owners create
// anew, are counted only.
func (c *choice) leftOut() (entries []Entry) {
	counts := map[Entry]int{}
	for o, reason := range c.left {
		if _, all := leftKinds[o.GroupVersionKind().GroupKind()]; all || reason == ofOwner || reason == ofTheSystem {
			counts[Entry{Outcome: LeftOut, Kind: o.GetKind(), Reason: reason}]++
			continue
		}
		entries = append(entries, entryOf(o.Unstructured, LeftOut, reason))
	}
	for e, n := range counts {
		e.Count = n
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Reason, b.Reason))
	})
	return entries
}

// notices returns what the user has to know about the objects that are imported.
func (c *choice) notices() (all []string) {
	seen := map[string]bool{}
	say := func(format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if !seen[text] {
			seen[text] = true
			all = append(all, text)
		}
	}
	for _, i := range slices.SortedFunc(maps.Keys(c.all), func(a, b id) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
	}) {
		o := c.all[i]
		if c.left[o] != "" {
			if c.left[o] == isChart {
				say("%s %s is left out: kedge deploys no charts. Its objects are imported as they are; upgrade them with helm.", o.GetKind(), o.GetName())
			}
			continue
		}
		switch o.GetKind() {
		case "PersistentVolume":
			if path := pathOf(o.Unstructured); path != "" {
				say("The data of PersistentVolume %s is not in the snapshot. Copy it from %s on %s to the same path on the node of the new cluster%s.", o.GetName(), path, nodeOf(o.Unstructured), ofThatName(o.Unstructured))
			}
		case "PersistentVolumeClaim":
			if class, _, _ := unstructured.NestedString(o.Object, "spec", "storageClassName"); class != "" && c.leavesOut("StorageClass", class) {
				say("The StorageClass %s is left out with k3s's provisioner: claims that are bound stay bound, and new ones need another class.", class)
			}
		case "Ingress":
			if class, _, _ := unstructured.NestedString(o.Object, "spec", "ingressClassName"); c.leavesOut("IngressClass", cmp.Or(class, "traefik")) {
				say("Traefik is left out: install an ingress controller for the Ingress objects.")
			}
		}
	}
	return all
}

// leavesOut reports whether an object without a namespace is in the snapshot and left out.
func (c *choice) leavesOut(kind, name string) bool {
	for i, o := range c.all {
		if i.Kind == kind && i.name == name && c.left[o] != "" {
			return true
		}
	}
	return false
}

// pathOf returns where on a node the data of a volume is; empty if it is elsewhere.
func pathOf(volume *unstructured.Unstructured) string {
	for _, kind := range []string{"hostPath", "local"} {
		if path, _, _ := unstructured.NestedString(volume.Object, "spec", kind, "path"); path != "" {
			return path
		}
	}
	return ""
}

// nodeOf returns the node that a volume names, for people.
func nodeOf(volume *unstructured.Unstructured) string {
	if name := hostOf(volume); name != "" {
		return "node " + name
	}
	return "the node where its pods ran"
}

// ofThatName says that the name of the node counts, if the volume has one.
func ofThatName(volume *unstructured.Unstructured) string {
	if hostOf(volume) == "" {
		return ""
	}
	return " that has this name; the pods run on no other"
}

// hostOf returns the name of the node to which a volume is bound; empty if there is none.
func hostOf(volume *unstructured.Unstructured) string {
	terms, _, _ := unstructured.NestedSlice(volume.Object, "spec", "nodeAffinity", "required", "nodeSelectorTerms")
	for _, term := range terms {
		m, _ := term.(map[string]any)
		expressions, _, _ := unstructured.NestedSlice(m, "matchExpressions")
		for _, e := range expressions {
			x, _ := e.(map[string]any)
			if values, _ := x["values"].([]any); x["key"] == "kubernetes.io/hostname" && len(values) == 1 {
				return fmt.Sprint(values[0])
			}
		}
	}
	return ""
}
