package secretsencryption

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kedge/internal/lifecycle"
)

// Store is the part of the datastore that this package uses. A caller of [Opener] closes it.
type Store interface {
	// Get returns the value of a key, as a majority of the servers has it, with its revision. Without the key the value is nil
	// and the revision 0. now is the datastore's revision.
	Get(ctx context.Context, key string) (value []byte, revision, now int64, err error)
	// Put writes the value of a key if it still has the revision, 0 for none, and returns the new revision.
	Put(ctx context.Context, key string, value []byte, revision int64) (written bool, now int64, err error)
	// Count returns the number of keys below a prefix.
	Count(ctx context.Context, prefix string) (int, error)
	// Page returns up to limit items from the key on that are below the prefix, and the key to go on with, empty at the end.
	Page(ctx context.Context, prefix, from string, limit int) (items []Item, next string, err error)
	// Rewrite replaces the values of items that still have their revisions, all or none, if the key guard has its revision too.
	Rewrite(ctx context.Context, guard string, revision int64, items []Item) (written bool, err error)
	// Compact deletes the history before now, in which the values are that were replaced.
	Compact(ctx context.Context) error
	// Changed wakes the caller after a change of a key after a revision. ended is closed if changes are not followed any more.
	Changed(ctx context.Context, key string, after int64) (changed lifecycle.Wakeup, ended <-chan struct{})
	Close()
}

// Item is a key with its value.
type Item struct {
	Key      string
	Value    []byte
	Revision int64 // of its last change
	Lease    int64 // with whose end the key is deleted; 0: none
}

// Opener opens the datastore while it serves.
type Opener func() (Store, error)

// Etcd returns an opener of the datastore behind new clients of etcd.
func Etcd(open func() (*clientv3.Client, error)) Opener {
	return func() (Store, error) {
		c, err := open()
		if err != nil {
			return nil, err
		}
		return etcd{c}, nil
	}
}

type etcd struct{ c *clientv3.Client }

var _ Store = etcd{}

func (e etcd) Close() { _ = e.c.Close() } // it always returns an error; see datastore.Store.NewClient

func (e etcd) Get(ctx context.Context, key string) (value []byte, revision, now int64, err error) {
	resp, err := e.c.Get(ctx, key)
	if err != nil {
		return nil, 0, 0, err
	}
	if len(resp.Kvs) == 0 {
		return nil, 0, resp.Header.Revision, nil
	}
	return resp.Kvs[0].Value, resp.Kvs[0].ModRevision, resp.Header.Revision, nil
}

func (e etcd) Put(ctx context.Context, key string, value []byte, revision int64) (written bool, now int64, err error) {
	resp, err := e.c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpPut(key, string(value))).Commit()
	if err != nil {
		return false, 0, err
	}
	return resp.Succeeded, resp.Header.Revision, nil
}

func (e etcd) Count(ctx context.Context, prefix string) (int, error) {
	resp, err := e.c.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return 0, err
	}
	return int(resp.Count), nil
}

func (e etcd) Page(ctx context.Context, prefix, from string, limit int) (items []Item, next string, err error) {
	if from == "" {
		from = prefix
	}
	resp, err := e.c.Get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(prefix)), clientv3.WithLimit(int64(limit)))
	if err != nil {
		return nil, "", err
	}
	for _, kv := range resp.Kvs {
		items = append(items, Item{Key: string(kv.Key), Value: kv.Value, Revision: kv.ModRevision, Lease: kv.Lease})
	}
	if resp.More {
		next = items[len(items)-1].Key + "\x00"
	}
	return items, next, nil
}

func (e etcd) Rewrite(ctx context.Context, guard string, revision int64, items []Item) (bool, error) {
	unchanged := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(guard), "=", revision)}
	var puts []clientv3.Op
	for _, i := range items {
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(i.Key), "=", i.Revision))
		puts = append(puts, clientv3.OpPut(i.Key, string(i.Value), clientv3.WithLease(clientv3.LeaseID(i.Lease))))
	}
	resp, err := e.c.Txn(ctx).If(unchanged...).Then(puts...).Commit()
	if err != nil {
		return false, err
	}
	return resp.Succeeded, nil
}

// compactKey is the key with which the API servers agree who compacts, and up to which revision. They learn from it that others
// have done it.
const compactKey = "compact_rev_key"

func (e etcd) Compact(ctx context.Context) error {
	_, _, now, err := e.Get(ctx, compactKey)
	if err != nil {
		return err
	}
	if _, err := e.c.Put(ctx, compactKey, strconv.FormatInt(now, 10)); err != nil {
		return err
	}
	if _, err := e.c.Compact(ctx, now); err != nil {
		return fmt.Errorf("delete the history of the datastore: %w", err)
	}
	return nil
}

func (e etcd) Changed(ctx context.Context, key string, after int64) (lifecycle.Wakeup, <-chan struct{}) {
	changed, ended := lifecycle.NewWakeup(), make(chan struct{})
	changes := e.c.Watch(ctx, key, clientv3.WithRev(after+1))
	go func() {
		defer close(ended)
		for c := range changes {
			if c.Err() != nil {
				return
			}
			changed.Wake()
		}
	}()
	return changed, ended
}

// errChanged is the error if somebody else has changed the record.
var errChanged = errors.New("the record of the encryption has changed meanwhile")

// readRecord returns the record, nil if there is none, with its revision.
func readRecord(ctx context.Context, s Store) (*record, int64, error) {
	data, revision, _, err := s.Get(ctx, recordKey)
	if err != nil {
		return nil, 0, fmt.Errorf("read the record of the encryption of Secrets: %w", err)
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
		return 0, fmt.Errorf("write the record of the encryption of Secrets: %w", err)
	case !written:
		return 0, errChanged
	}
	return now, nil
}
