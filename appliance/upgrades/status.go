package upgrades

import (
	"context"
	_ "embed" // for the definition
	"encoding/json"
	"reflect"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Definition is the CustomResourceDefinition of the kind.
//
//go:embed definition.yaml
var Definition []byte

// Revision is the revision of [Definition]; it grows with each change.
const Revision = 1

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
	_, err = c.any.Resource(Resource).Patch(ctx, u.Name, types.JSONPatchType, patch, metav1.PatchOptions{}, "status")
	return err
}
