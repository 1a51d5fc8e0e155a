package customkinds

import (
	"fmt"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
)

// TestDefine: a definition is created, and replaces an older one, and none that is newer.
func TestDefine(t *testing.T) {
	k := Kind{
		Definition: []byte("{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: things.kedge.io}, spec: {group: kedge.io}}"),
		Revision:   1,
		Resource:   schema.GroupVersionResource{Group: "kedge.io", Version: "v1", Resource: "things"},
	}
	api := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		k.Resource: "ThingList", Definitions: "CustomResourceDefinitionList",
	})
	client := api.Resource(Definitions)
	if err := k.Define(t.Context(), api); err != nil {
		t.Fatal(err)
	}
	revisionOf := func() string {
		t.Helper()
		o, err := client.Get(t.Context(), "things.kedge.io", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return o.GetAnnotations()[RevisionAnnotation] + " " + fmt.Sprint(o.Object["spec"] != nil)
	}
	if got := revisionOf(); got != "1 true" {
		t.Errorf("created: %s", got)
	}
	for before, want := range map[string]string{"0": "1 true", "2": "2 false", "": "1 true"} {
		old := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{
			"name": "things.kedge.io", "annotations": map[string]any{RevisionAnnotation: before},
		}}}
		if _, err := client.Update(t.Context(), old, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := k.Define(t.Context(), api); err != nil {
			t.Fatal(err)
		}
		if got := revisionOf(); got != want {
			t.Errorf("over revision %q: %s, want %s", before, got, want)
		}
	}
}
