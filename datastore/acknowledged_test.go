package datastore

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"go.etcd.io/etcd/client/v3/kubernetes"
)

// acknowledged holds the writes that a child process has reported as acknowledged.
type acknowledged struct {
	count    int
	revision int64                  // the highest seen
	last     map[int]acknowledgment // by writer
	watched  *watched               // what the child's watch was told
}

type acknowledgment struct {
	sequence int
	revision int64
}

func newAcknowledged() *acknowledged {
	return &acknowledged{last: map[int]acknowledgment{}, watched: newWatched(0)}
}

// note records a line of a child's output, and checks that revisions increase.
func (a *acknowledged) note(t *testing.T, line string) {
	t.Helper()
	var e change
	// The dot shows that the line was not cut short.
	if n, _ := fmt.Sscanf(line, "event %d %d %s", &e.revision, &e.version, &e.key); n == 3 && strings.HasSuffix(e.key, ".") {
		e.key = strings.TrimSuffix(e.key, ".")
		a.watched.add(e)
		a.revision = max(a.revision, e.revision) // it was handed out
		return
	}
	var writer int
	var ack acknowledgment
	// A line that the kill has cut short is no acknowledgment.
	if n, _ := fmt.Sscanf(line, "ack %d %d %d", &writer, &ack.sequence, &ack.revision); n != 3 {
		return
	}
	if before, ok := a.last[writer]; ok && ack.revision <= before.revision {
		t.Errorf("writer %d: revision %d after %d", writer, ack.revision, before.revision)
	}
	a.last[writer] = ack
	a.count++
	a.revision = max(a.revision, ack.revision)
}

// check looks for all acknowledged writes in a store. The store may hold one more of each writer, whose acknowledgment was
// cut off.
func (a *acknowledged) check(t *testing.T, s *Store) {
	t.Helper()
	c := newClient(t, s)
	for writer, ack := range a.last {
		got, err := c.Kubernetes.Get(t.Context(), childKey(writer), kubernetes.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got.Revision < a.revision {
			t.Errorf("the store is at revision %d, it has been at %d", got.Revision, a.revision)
		}
		if got.KV == nil {
			t.Errorf("%s is lost, it was acknowledged at %d", childKey(writer), ack.revision)
			continue
		}
		sequence, _, _ := strings.Cut(string(got.KV.Value), " ")
		if got.KV.ModRevision < ack.revision || got.KV.ModRevision == ack.revision && sequence != fmt.Sprint(ack.sequence) {
			t.Errorf("%s is write %s at revision %d, acknowledged was %d at %d",
				childKey(writer), sequence, got.KV.ModRevision, ack.sequence, ack.revision)
		}
	}
}

func randomMillis(limit int) int { return rand.IntN(limit) }
