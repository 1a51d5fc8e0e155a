package throwaway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
)

// manifest is one object of a file.
type manifest struct {
	file   string
	object *unstructured.Unstructured
}

// apply applies objects in their order in the files, and waits until all of them are
// available.
func (c *Cluster) apply(ctx context.Context, all []manifest, say func(string)) error {
	begin := time.Now()
	config, err := c.Config()
	if err != nil {
		return err
	}
	found, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return err
	}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return err
	}
	a := &applier{client: client, mapper: restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(found))}
	for _, m := range all {
		if err := a.apply(ctx, m); err != nil {
			return fmt.Errorf("apply %s of %s: %w", nameOf(m.object), m.file, err)
		}
	}
	for _, m := range all {
		if err := a.waitAvailable(ctx, m.object); err != nil {
			return fmt.Errorf("%s of %s is not available: %w", nameOf(m.object), m.file, err)
		}
	}
	say(fmt.Sprintf("%d objects of manifests are available (%s)", len(all), since(begin)))
	return nil
}

func nameOf(o *unstructured.Unstructured) string {
	return strings.ToLower(o.GetKind()) + "/" + o.GetName()
}

// readManifests reads files, and the files in folders whose extension is that of a manifest.
func readManifests(paths []string) ([]manifest, error) {
	var files []string
	for _, path := range paths {
		st, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		if !st.IsDir() {
			files = append(files, path)
			continue
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); slices.Contains([]string{".yaml", ".yml", ".json"}, ext) && !e.IsDir() {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
	}
	var all []manifest
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		objects, err := parse(data)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", file, err)
		}
		for _, o := range objects {
			all = append(all, manifest{file, o})
		}
	}
	return all, nil
}

func parse(data []byte) ([]*unstructured.Unstructured, error) {
	var all []*unstructured.Unstructured
	documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for {
		doc, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(doc, &o.Object); err != nil {
			return nil, err
		}
		if len(o.Object) == 0 {
			continue // nothing but comments
		}
		if o.GetKind() == "" || o.GetAPIVersion() == "" {
			return nil, errors.New("an object lacks its kind or apiVersion")
		}
		if !o.IsList() {
			all = append(all, o)
			continue
		}
		err = o.EachListItem(func(item runtime.Object) error {
			all = append(all, item.(*unstructured.Unstructured))
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
}

type applier struct {
	client dynamic.Interface
	mapper *restmapper.DeferredDiscoveryRESTMapper
}

// resource returns the client for the kind and namespace of an object.
func (a *applier) resource(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	kind := o.GroupVersionKind()
	mapping, err := a.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return nil, err
	}
	if mapping.Scope.Name() != meta.RESTScopeNameNamespace {
		return a.client.Resource(mapping.Resource), nil
	}
	namespace := o.GetNamespace()
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	return a.client.Resource(mapping.Resource).Namespace(namespace), nil
}

// patience bounds the retries of an object that depends on the effects of an earlier one: a
// custom resource on its definition, a pod on the service account of its namespace.
const patience = 20 * time.Second

func (a *applier) apply(ctx context.Context, m manifest) error {
	data, err := json.Marshal(m.object)
	if err != nil {
		return err
	}
	force := true
	for deadline := time.Now().Add(patience); ; {
		var to dynamic.ResourceInterface
		if to, err = a.resource(m.object); err == nil {
			_, err = to.Patch(ctx, m.object.GetName(), types.ApplyPatchType, data, metav1.PatchOptions{FieldManager: "kedge-up", Force: &force})
		}
		if err == nil || !retriable(err) || time.Now().After(deadline) {
			return err
		}
		a.mapper.Reset() // a definition may be new
		if stopped := pause(ctx, pollInterval); stopped != nil {
			return errors.Join(stopped, err)
		}
	}
}

// retriable reports whether an object that cannot be applied now may be applicable a moment
// later, when the objects that it depends on exist.
func retriable(err error) bool {
	var partly *discovery.ErrGroupDiscoveryFailed
	return meta.IsNoMatchError(err) || errors.As(err, &partly) || apierrors.IsNotFound(err) || apierrors.IsServiceUnavailable(err) ||
		apierrors.IsTooManyRequests(err) || apierrors.IsTimeout(err) || apierrors.IsInternalError(err) ||
		apierrors.IsForbidden(err) // a pod in a new namespace that has no service account yet
}

// waitAvailable waits until an object is available, if its status says so.
func (a *applier) waitAvailable(ctx context.Context, o *unstructured.Unstructured) error {
	to, err := a.resource(o)
	if err != nil {
		return err
	}
	for {
		now, err := to.Get(ctx, o.GetName(), metav1.GetOptions{})
		missing := ""
		if err == nil {
			if missing = lacks(now); missing == "" {
				return nil
			}
		}
		if stopped := pause(ctx, pollInterval); stopped != nil {
			if missing != "" {
				err = errors.New(missing)
			}
			return errors.Join(stopped, err)
		}
	}
}

// lacks returns why an object is not available, and "" when it is.
func lacks(o *unstructured.Unstructured) string {
	number := func(fields ...string) int64 {
		n, _, _ := unstructured.NestedInt64(o.Object, fields...)
		return n
	}
	if number("status", "observedGeneration") < o.GetGeneration() && slices.Contains([]string{"Deployment", "StatefulSet", "DaemonSet"}, o.GetKind()) {
		return "its controller has not observed it yet"
	}
	count := func(have, want int64) string {
		if have >= want {
			return ""
		}
		return fmt.Sprintf("%d of %d pods are available", have, want)
	}
	condition := func(kind string) string {
		list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
		for _, item := range list {
			if c, ok := item.(map[string]any); ok && c["type"] == kind {
				if c["status"] == "True" {
					return ""
				}
				return fmt.Sprintf("%s: %v %v", kind, c["reason"], c["message"])
			}
		}
		return "no condition " + kind
	}
	switch o.GetKind() {
	case "Deployment":
		return count(min(number("status", "availableReplicas"), number("status", "updatedReplicas")), number("spec", "replicas"))
	case "StatefulSet":
		return count(number("status", "availableReplicas"), number("spec", "replicas"))
	case "DaemonSet":
		return count(number("status", "numberAvailable"), number("status", "desiredNumberScheduled"))
	case "Pod":
		if phase, _, _ := unstructured.NestedString(o.Object, "status", "phase"); phase == "Succeeded" {
			return ""
		}
		return condition("Ready")
	case "Job":
		return condition("Complete")
	case "CustomResourceDefinition":
		return condition("Established")
	case "APIService":
		return condition("Available")
	}
	return ""
}
