// Package customkinds defines kedge's own kinds (kedge.io) in a cluster.
//
// What objects of a kind mean is not its business: the package of a kind has its definition and its controller. Packages of
// server that have a kind import it, and package assembly for those outside of server.
package customkinds

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

// RevisionAnnotation has the revision of a definition.
const RevisionAnnotation = "kedge.io/revision"

const (
	establishPause = 200 * time.Millisecond
	establishLimit = time.Minute
)

// Definitions is the resource of definitions.
var Definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// Kind is a kind of objects.
type Kind struct {
	Definition []byte // the CustomResourceDefinition, in YAML
	// Revision is that of Definition. A server with an older one does not write over it: servers of several versions run
	// beside each other during an upgrade.
	Revision int
	Resource schema.GroupVersionResource
}

// Define creates the kind or brings it up to date, and waits until the API serves it, a minute at most.
func (k Kind) Define(ctx context.Context, client dynamic.Interface) error {
	if err := k.ensure(ctx, client.Resource(Definitions)); err != nil {
		return fmt.Errorf("define %s: %w", k.Resource.GroupResource(), err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, establishLimit, errors.New("the API does not serve "+k.Resource.GroupResource().String()))
	defer cancel()
	for {
		if _, err := client.Resource(k.Resource).List(ctx, metav1.ListOptions{Limit: 1}); !apierrors.IsNotFound(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(establishPause):
		}
	}
}

func (k Kind) ensure(ctx context.Context, client dynamic.ResourceInterface) error {
	object := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(k.Definition, &object.Object); err != nil {
		return err
	}
	object.SetAnnotations(map[string]string{RevisionAnnotation: strconv.Itoa(k.Revision)})
	old, err := client.Get(ctx, object.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = client.Create(ctx, object, metav1.CreateOptions{})
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
		// Another server was faster, perhaps with an older revision.
		old, err = client.Get(ctx, object.GetName(), metav1.GetOptions{})
	}
	if err != nil {
		return err
	}
	if n, err := strconv.Atoi(old.GetAnnotations()[RevisionAnnotation]); err == nil && n >= k.Revision {
		return nil
	}
	object.SetResourceVersion(old.GetResourceVersion())
	_, err = client.Update(ctx, object, metav1.UpdateOptions{})
	return err
}
