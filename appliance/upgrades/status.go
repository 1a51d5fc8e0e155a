package upgrades

import (
	"context"
	_ "embed" // for the definition
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

//go:embed definition.yaml
var definition []byte

const (
	// revision is that of definition.yaml. A server with an older one does not write over it: servers of several versions lead
	// in turn during an upgrade.
	revision = 1
	// revisionAnnotation has the revision of a definition.
	revisionAnnotation = "kedge.io/revision"

	establishPause = 200 * time.Millisecond
	establishLimit = time.Minute
)

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// define creates the kind, and waits until the API serves it.
func (c *Controller) define(ctx context.Context) error {
	if err := c.ensureDefinition(ctx); err != nil {
		return fmt.Errorf("define the kind Upgrade: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, establishLimit, errors.New("the API does not serve the kind Upgrade"))
	defer cancel()
	for {
		if _, err := c.any.Resource(resource).List(ctx, metav1.ListOptions{Limit: 1}); !apierrors.IsNotFound(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(establishPause):
		}
	}
}

func (c *Controller) ensureDefinition(ctx context.Context) error {
	object := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(definition, &object.Object); err != nil {
		return err
	}
	object.SetAnnotations(map[string]string{revisionAnnotation: strconv.Itoa(revision)})
	client := c.any.Resource(definitions)
	old, err := client.Get(ctx, object.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = client.Create(ctx, object, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	if n, err := strconv.Atoi(old.GetAnnotations()[revisionAnnotation]); err == nil && n >= revision {
		return nil
	}
	object.SetResourceVersion(old.GetResourceVersion())
	_, err = client.Update(ctx, object, metav1.UpdateOptions{})
	return err
}

// change changes the status of an upgrade, in the API too if that makes a difference.
func (c *Controller) change(ctx context.Context, u *Upgrade, f func(s *Status)) error {
	before := u.Status
	before.Nodes = slices.Clone(u.Status.Nodes)
	u.renew()
	f(&u.Status)
	if reflect.DeepEqual(before, u.Status) {
		return nil
	}
	// A JSON patch replaces the status as a whole: a merge would keep fields that are empty now. The test makes it fail for an
	// object of the same name that has taken the place of this one.
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/metadata/uid", "value": u.UID},
		{"op": "add", "path": "/status", "value": u.Status},
	})
	if err != nil {
		return err
	}
	_, err = c.any.Resource(resource).Patch(ctx, u.Name, types.JSONPatchType, patch, metav1.PatchOptions{}, "status")
	return err
}
