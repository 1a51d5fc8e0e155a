package datastore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

// seedFor returns a source of the random choices of a test, and prints its seed: with the seed of an earlier run in seedVar the
// test chooses the same. What clients write, and when, differs from run to run all the same.
func seedFor(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if n, ok := number(t, seedVar); ok {
		seed = n
	}
	t.Logf("%s=%d", seedVar, seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// number returns the number in a variable of the environment, if there is one.
func number(t testing.TB, name string) (uint64, bool) {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return 0, false
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(name, err)
	}
	return n, true
}

// tortured reports whether "make torture" runs this test, so that it takes as long as it needs.
func tortured() bool { return os.Getenv(tortureVar) != "" }

// runClientCommand runs a command of a machine's clients; see machines_test.go. Their writes compare the revision of the key, as
// those of the API server do: a write without an answer that is done later cannot undo the next one.
func (s *Store) runClientCommand(ctx context.Context, words []string) (answer string, known bool, err error) {
	switch words[0] {
	case "create", "read", "digest", "revision", "snapshot", "failpoints", "failpoint", "occupy", "bulk", "size":
	default:
		return "", false, nil
	}
	c, err := s.NewClient()
	if err != nil {
		return "", true, err
	}
	defer c.Close()
	switch words[0] {
	case "create": // key, value, revision of the key before; 0 for none
		before, err := strconv.ParseInt(words[3], 10, 64)
		if err != nil {
			return "", true, err
		}
		resp, err := c.OptimisticPut(ctx, words[1], []byte(words[2]), before, kubernetes.PutOptions{})
		if err != nil {
			return "", true, err
		}
		if !resp.Succeeded {
			return "conflict", true, nil
		}
		return fmt.Sprint(resp.Revision), true, nil
	case "read": // key; the answer is the revisions of the store and of the key, and the value
		got, err := c.Kubernetes.Get(ctx, words[1], kubernetes.GetOptions{})
		if err != nil {
			return "", true, err
		}
		if got.KV == nil {
			return fmt.Sprintf("%d 0 -", got.Revision), true, nil
		}
		return fmt.Sprintf("%d %d %s", got.Revision, got.KV.ModRevision, got.KV.Value), true, nil
	case "revision":
		got, err := c.KV.Get(ctx, checkKey)
		if err != nil {
			return "", true, err
		}
		return fmt.Sprint(got.Header.Revision), true, nil
	case "failpoints", "failpoint", "occupy":
		answer, err := runFailpointCommand(ctx, c, words)
		return strings.ReplaceAll(answer, "\n", " "), true, err
	case "bulk":
		return "ok", true, writeAndDelete(ctx, c)
	case "size": // of the database file
		t := s.transport.Load()
		if t == nil {
			return "", true, ErrNotServing
		}
		return fmt.Sprint(t.server.Backend().Size()), true, nil
	case "snapshot":
		_, err := s.SaveSnapshot(ctx, words[1])
		return "ok", true, err
	}
	revision, err := strconv.ParseInt(words[1], 10, 64)
	if err != nil {
		return "", true, err
	}
	answer, err = digestAt(ctx, c, revision)
	return answer, true, err
}

// bulkBytes is what the command "bulk" leaves unused in the database.
const bulkBytes = 20 << 20

// writeAndDelete makes the database large, and most of it free.
func writeAndDelete(ctx context.Context, c *kubernetes.Client) error {
	const each = 500 << 10
	for i := range bulkBytes / each {
		if _, err := c.Client.Put(ctx, fmt.Sprintf("/bulk/%d", i), strings.Repeat("x", each)); err != nil {
			return err
		}
	}
	deleted, err := c.Client.Delete(ctx, "/bulk/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	_, err = c.Client.Compact(ctx, deleted.Header.Revision)
	return err
}

// digestAt returns a text that tells all keys of a member at a revision, by its own database.
func digestAt(ctx context.Context, c *kubernetes.Client, revision int64) (string, error) {
	if _, err := c.KV.Get(ctx, checkKey); err != nil { // afterwards the member has everything that was acknowledged
		return "", err
	}
	got, err := c.KV.Get(ctx, "/", clientv3.WithPrefix(), clientv3.WithRev(revision), clientv3.WithSerializable())
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	for _, kv := range got.Kvs {
		fmt.Fprintf(sum, "%s %d %d %d %s\n", kv.Key, kv.CreateRevision, kv.ModRevision, kv.Version, kv.Value)
	}
	return fmt.Sprintf("%d-%x", len(got.Kvs), sum.Sum(nil)), nil
}

// asker is where a client sends its commands: a machine.
type asker interface {
	ask(line string) (string, error)
}

// ledger is what clients know of a store: for each of their keys the last write that was acknowledged, and the number of the last
// one that was tried. Its methods may be called by several goroutines.
type ledger struct {
	mu       sync.Mutex
	keys     map[string]*entry
	revision int64 // the highest that any client has seen
	writes   int   // acknowledged ones
	problems []string
}

type entry struct {
	acknowledged, tried int
	revision            int64 // of the acknowledged write
}

func newLedger() *ledger { return &ledger{keys: map[string]*entry{}} }

// valueOf returns the value of a write, all of which can be checked. Its length is between 100 and 2,100 bytes.
func valueOf(key string, sequence int) string {
	sum := crc32.ChecksumIEEE(fmt.Appendf(nil, "%s %d", key, sequence))
	return fmt.Sprintf("%d-%s", sequence, strings.Repeat(fmt.Sprintf("%08x", sum), 12+int(sum%250)))
}

func (l *ledger) problem(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.problems) < 10 {
		l.problems = append(l.problems, fmt.Sprintf(format, args...))
	}
}

// write writes a key once more. It reads the key first: it may hold a write that was not acknowledged.
func (l *ledger) write(to asker, key string) error {
	before, err := l.read(to, key)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.keys[key].tried++
	sequence := l.keys[key].tried
	l.mu.Unlock()
	answer, err := to.ask(fmt.Sprintf("create %s %s %d", key, valueOf(key, sequence), before))
	if err != nil || answer == "conflict" { // an earlier write of this client, which had no answer, was done meanwhile
		return err
	}
	revision, err := strconv.ParseInt(answer, 10, 64)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys[key].acknowledged, l.keys[key].revision = sequence, revision
	l.revision = max(l.revision, revision)
	l.writes++
	return nil
}

// read reads a key, compares the answer with what was known before the read, and returns the key's revision.
func (l *ledger) read(from asker, key string) (revision int64, err error) {
	l.mu.Lock()
	e := l.keys[key]
	if e == nil {
		e = &entry{}
		l.keys[key] = e
	}
	was, highest := *e, l.revision
	l.mu.Unlock()
	answer, err := from.ask("read " + key)
	if err != nil {
		return 0, err
	}
	var store int64
	var value string
	if _, err := fmt.Sscanf(answer, "%d %d %s", &store, &revision, &value); err != nil {
		return 0, fmt.Errorf("%q: %w", answer, err)
	}
	text, _, _ := strings.Cut(value, "-")
	sequence, _ := strconv.Atoi(text) // 0 without a value
	l.mu.Lock()
	tried := e.tried
	l.revision = max(l.revision, store)
	l.mu.Unlock()
	switch {
	case sequence < was.acknowledged || revision < was.revision:
		l.problem("%s is write %d of revision %d, and write %d of revision %d was acknowledged", key, sequence, revision, was.acknowledged, was.revision)
	case sequence > tried || sequence > 0 && value != valueOf(key, sequence):
		l.problem("%s of revision %d is not what was written: it begins with %.40q", key, revision, value)
	case store < highest:
		l.problem("a read after revision %d had revision %d", highest, store)
	}
	return revision, nil
}

// verify reads all keys and returns what is wrong with them, and with the writes until then.
func (l *ledger) verify(from asker) (problems []string) {
	l.mu.Lock()
	var keys []string
	for key := range l.keys {
		keys = append(keys, key)
	}
	highest := l.revision
	l.mu.Unlock()
	for _, key := range keys {
		if _, err := l.read(from, key); err != nil {
			l.problem("read %s: %v", key, err)
		}
	}
	answer, err := from.ask("revision")
	if n, numberErr := strconv.ParseInt(answer, 10, 64); errors.Join(err, numberErr) != nil || n < highest {
		l.problem("the store is at revision %s, and has been at %d, %v", answer, highest, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	problems, l.problems = l.problems, nil
	return problems
}

// keepWriting has clients write until stop is called. pick returns where a client writes next.
func (l *ledger) keepWriting(clients int, pick func(client int) asker) (stop func()) {
	ended := make(chan struct{})
	var all sync.WaitGroup
	for client := range clients {
		all.Go(func() {
			for {
				// An error is no problem by itself: the leader may have changed.
				_ = l.write(pick(client), fmt.Sprintf("/l/%d", client))
				select {
				case <-ended:
					return
				case <-time.After(time.Millisecond):
				}
			}
		})
	}
	return sync.OnceFunc(func() {
		close(ended)
		all.Wait()
	})
}

// await waits until so many more writes are acknowledged.
func (l *ledger) await(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.writes
	}
	until := count() + n
	for deadline := time.Now().Add(time.Minute); count() < until; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the clients do not write")
		}
	}
}
