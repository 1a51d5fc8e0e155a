package datastore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

// watched is what one client has been told by its watches of all keys with a prefix, of which each goes on where the one before
// has ended. Every change must come once, in the order of revisions, and none may be missing: the version of a key counts its
// changes since it was created.
type watched struct {
	last     int64 // revision of the last event
	count    int
	versions map[string]int64 // of each key; 0 once it is deleted
	inLast   []string         // keys of the events of that revision
	problems []string
}

// change is an event, as text: a child may have been told of it.
type change struct {
	revision, version int64 // version is 0 for a deletion
	key               string
}

func changeOf(e *clientv3.Event) change {
	c := change{revision: e.Kv.GetModRevision(), version: e.Kv.GetVersion(), key: string(e.Kv.GetKey())}
	if e.Type == mvccpb.Event_DELETE {
		c.version = 0
	}
	return c
}

func (c change) String() string { return fmt.Sprintf("%d %d %s", c.revision, c.version, c.key) }

// newWatched is for watches that begin after a revision at which no key existed.
func newWatched(after int64) *watched { return &watched{last: after, versions: map[string]int64{}} }

func (w *watched) problem(format string, args ...any) {
	if len(w.problems) < 10 {
		w.problems = append(w.problems, fmt.Sprintf(format, args...))
	}
}

// add judges the next event.
func (w *watched) add(c change) {
	switch {
	case c.revision < w.last || c.revision == w.last && w.inLast == nil:
		w.problem("%v came after revision %d", c, w.last)
	case c.revision > w.last:
		w.inLast = nil
	case slices.Contains(w.inLast, c.key):
		w.problem("%v came twice", c)
	}
	if before := w.versions[c.key]; c.version != 0 && c.version != before+1 {
		w.problem("%v came after version %d", c, before)
	}
	w.last, w.inLast = max(w.last, c.revision), append(w.inLast, c.key)
	w.versions[c.key] = c.version
	w.count++
}

// follow judges the events of a watch of a store, from the last one on, up to a revision. It returns the error of the watch.
func (w *watched) follow(ctx context.Context, c *kubernetes.Client, prefix string, upTo int64) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if w.last >= upTo {
		return nil
	}
	for resp := range c.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(w.last+1), clientv3.WithProgressNotify()) {
		if err := resp.Err(); err != nil {
			return err
		}
		for _, e := range resp.Events {
			w.add(changeOf(e))
		}
		if w.last >= upTo {
			return nil
		}
	}
	return fmt.Errorf("the watch has ended at revision %d before %d: %w", w.last, upTo, ctx.Err())
}

// observer is a client that watches all keys of a cluster for ever. Where a watch ends, it begins the next one at another member.
type observer struct {
	*watched
	prefix   string
	pick     func(n int) *testNode
	ctx      context.Context // ends with the observer
	stop     func()
	stopped  sync.WaitGroup
	highest  int64 // revision in the head of a response
	restarts int
	at       atomic.Int64 // revision of the last event
}

// observe starts an observer. No key with the prefix may have existed before.
func observe(t *testing.T, prefix string, pick func(n int) *testNode) *observer {
	t.Helper()
	o := &observer{prefix: prefix, pick: pick}
	o.ctx, o.stop = context.WithCancel(context.Background())
	t.Cleanup(func() {
		o.stop()
		o.stopped.Wait()
	})
	got, err := newClient(t, pick(0).Store).Client.Get(t.Context(), prefix, clientv3.WithPrefix())
	if err != nil || len(got.Kvs) > 0 {
		t.Fatalf("%d keys, %v", len(got.Kvs), err)
	}
	o.watched = newWatched(got.Header.Revision)
	o.stopped.Go(func() {
		for n := 0; ; n++ {
			o.watch(pick(n))
			select {
			case <-o.ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	return o
}

// watch watches at one member until the watch ends.
func (o *observer) watch(n *testNode) {
	s := n.current.Load()
	c, err := s.NewClient()
	if err != nil {
		return
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(o.ctx))
	defer cancel()
	// etcd's client opens a watch of a store that has stopped again and again. An API server ends with its store.
	o.stopped.Go(func() {
		for ctx.Err() == nil && s.transport.Load() != nil {
			sleep(ctx, 50*time.Millisecond)
		}
		cancel()
	})
	o.restarts++
	for resp := range c.Watch(ctx, o.prefix, clientv3.WithPrefix(), clientv3.WithRev(o.last+1)) {
		if err := resp.Err(); err != nil {
			if errors.Is(err, rpctypes.ErrCompacted) {
				o.problem("a watch from revision %d: %v", o.last+1, err)
			}
			return
		}
		if len(resp.Events) > 0 && resp.Header.Revision < o.highest {
			o.problem("a response of revision %d after one of %d", resp.Header.Revision, o.highest)
		}
		o.highest = max(o.highest, resp.Header.Revision)
		for _, e := range resp.Events {
			o.add(changeOf(e))
		}
		o.at.Store(o.last)
	}
}

// end waits until the observer has been told of everything up to now, and checks that. The events must be those that a member
// tells of now, by its history.
func (o *observer) end(t *testing.T, n *testNode) {
	t.Helper()
	now := put(t, n, o.prefix+"end", "")
	n.c.await("the observer is told of the last write", func() error {
		if at := o.at.Load(); at < now {
			return fmt.Errorf("it is at revision %d of %d", at, now)
		}
		return nil
	})
	o.stop()
	o.stopped.Wait()
	for _, problem := range o.problems {
		t.Error("watches: " + problem)
	}
	history := newWatched(0)
	if err := history.follow(t.Context(), newClient(t, n.Store), o.prefix, now); err != nil {
		t.Error(err)
	}
	if history.count != o.count || len(history.problems) > 0 {
		t.Errorf("the observer was told of %d events, and the history has %d, with %v", o.count, history.count, history.problems)
	}
	t.Logf("%d events in %d watches", o.count, o.restarts)
}

// TestWatchedFindsFaults: what the other tests rely on notices each fault.
func TestWatchedFindsFaults(t *testing.T) {
	for name, tc := range map[string]struct {
		changes []change
		good    bool
	}{
		"in order":               {[]change{{5, 1, "a"}, {6, 2, "a"}, {6, 1, "b"}, {7, 0, "a"}, {8, 1, "a"}}, true},
		"twice":                  {[]change{{5, 1, "a"}, {5, 1, "a"}}, false},
		"an earlier revision":    {[]change{{6, 1, "a"}, {5, 1, "b"}}, false},
		"before the beginning":   {[]change{{4, 1, "a"}}, false},
		"a missing change":       {[]change{{5, 1, "a"}, {7, 3, "a"}}, false},
		"a missing deletion":     {[]change{{5, 1, "a"}, {7, 1, "a"}}, false},
		"a missing creation":     {[]change{{5, 2, "a"}}, false},
		"twice after a deletion": {[]change{{5, 1, "a"}, {6, 0, "a"}, {6, 0, "a"}}, false},
	} {
		w := newWatched(4)
		for _, c := range tc.changes {
			w.add(c)
		}
		if good := len(w.problems) == 0; good != tc.good {
			t.Errorf("%s: %v", name, w.problems)
		}
	}
}
