package assembly

import (
	"context"
	"errors"

	"kedge/datastore"
	"kedge/internal/lifecycle"
)

// vital is the datastore, whose failure must end the process at once: requests that it has not answered would
// block the stop of the components that use it.
type vital struct{ store }

// Run implements lifecycle.Component.
func (v vital) Run(ctx context.Context, ready func()) error {
	err := v.store.Run(ctx, ready)
	if errors.Is(err, datastore.ErrFailed) {
		return lifecycle.AtOnce(err)
	}
	return err
}
