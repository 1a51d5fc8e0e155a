package accountkeys

import (
	"context"
	"errors"
	"fmt"

	"kedge/internal/lifecycle"
)

// Store is the part of the datastore that this package uses. A caller of [Opener] closes it.
type Store interface {
	// Get returns the value of a key, as a majority of the servers has it, with its revision. Without the key the value is nil
	// and the revision 0. now is the datastore's revision.
	Get(ctx context.Context, key string) (value []byte, revision, now int64, err error)
	// Put writes the value of a key if it still has the revision, 0 for none, and returns the new revision.
	Put(ctx context.Context, key string, value []byte, revision int64) (written bool, now int64, err error)
	// Changed wakes the caller after a change of a key after a revision. ended is closed if changes are not followed any more.
	Changed(ctx context.Context, key string, after int64) (changed lifecycle.Wakeup, ended <-chan struct{})
	Close()
}

// Opener opens the datastore while it serves.
type Opener func() (Store, error)

// errChanged is the error if somebody else has changed the record.
var errChanged = errors.New("the record of the keys of service accounts' tokens has changed meanwhile")

// readRecord returns the record, nil if there is none, with its revision.
func readRecord(ctx context.Context, s Store) (*record, int64, error) {
	data, revision, _, err := s.Get(ctx, recordKey)
	if err != nil {
		return nil, 0, fmt.Errorf("read the record of the keys of service accounts' tokens: %w", err)
	}
	r, err := decodeRecord(data)
	return r, revision, err
}

// writeRecord replaces the record that has the revision, and returns the new one.
func writeRecord(ctx context.Context, s Store, r *record, revision int64) (int64, error) {
	data, err := r.encode()
	if err != nil {
		return 0, err
	}
	written, now, err := s.Put(ctx, recordKey, data, revision)
	switch {
	case err != nil:
		return 0, fmt.Errorf("write the record of the keys of service accounts' tokens: %w", err)
	case !written:
		return 0, errChanged
	}
	return now, nil
}
