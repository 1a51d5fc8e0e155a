package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kedge/datastore/blockrecorder"
)

// Power cuts in the middle of what a store does seldom. The child repeats one operation while its clients write, and says when it
// begins and ends; the cuts are between the two.

// operationVar names the operation of a child of powercut_test.go.
const operationVar = "KEDGE_DATASTORE_TEST_OPERATION"

const (
	firstBoot  = "first boot"
	defragment = "defragmentation"
	save       = "snapshot"
	restored   = "restore"
)

const (
	shortOperationCuts = 4  // of each operation, by make test-datastore; a few more for the first boot
	operations         = 12 // in a recording
)

// powerOperation repeats an operation beside the writes.
func powerOperation(s *Store, operation string, flushes *blockrecorder.Counter, out *syncedPrinter) {
	c, err := s.NewClient()
	if err != nil {
		panic(err)
	}
	ctx, base := context.Background(), filepath.Dir(s.cfg.Dir)
	for n := range operations {
		time.Sleep(100 * time.Millisecond)
		out.printf("begin %d\n", flushes.Load())
		revision := int64(0)
		switch operation {
		case defragment:
			_, err = c.Defragment(ctx, Endpoint)
		case save, restored:
			var made Snapshot
			made, err = s.SaveSnapshot(ctx, snapshotOf(base, n))
			if err == nil && operation == restored {
				made, err = RestoreSnapshot(made.Path, restoredOf(base, n), "kedge", made.Revision, slog.New(slog.DiscardHandler))
			}
			revision = made.Revision
		}
		if err != nil {
			out.printf("error of operation %d: %v\n", n, err)
			return
		}
		out.printf("did %d %d %d\n", flushes.Load(), n, revision)
		if n > 1 { // the disk is small
			_ = os.Remove(snapshotOf(base, n-2))
			_ = os.RemoveAll(restoredOf(base, n-2))
		}
	}
	out.printf("operations are over\n")
}

func snapshotOf(base string, n int) string {
	return filepath.Join(base, fmt.Sprintf("snapshot-%d.db", n))
}
func restoredOf(base string, n int) string { return filepath.Join(base, fmt.Sprintf("restored-%d", n)) }

// poweredOperation is an operation that a child has begun, and when it was done.
type poweredOperation struct {
	begin, end int   // flushes; end is 0 while it is not done
	n          int   // number
	revision   int64 // of what was made
}

// cut returns a moment in the middle of an operation. The flush after the end may be a part of it.
func (p powered) cut(operation string, random *rand.Rand) int {
	if operation == firstBoot {
		return p.first + random.IntN(p.acks[0].flushes+2-p.first)
	}
	o := p.operations[random.IntN(len(p.operations))]
	end := o.end + 1
	if o.end == 0 {
		end = p.rec.Flushes()
	}
	return min(o.begin+random.IntN(end-o.begin+1), p.rec.Flushes())
}

// products checks what the operations have made that were done before the cut, on the disk after it.
func (p powered) products(dir string, flushes int) error {
	newest := -1
	for i, o := range p.operations {
		if o.end > 0 && o.end <= flushes {
			newest = i
		}
	}
	for n := range operations { // a snapshot that has its name is whole, whenever the power was cut
		if _, err := os.Stat(snapshotOf(dir, n)); err == nil {
			if _, err := VerifySnapshot(snapshotOf(dir, n)); err != nil {
				return err
			}
		}
	}
	if newest < 0 || p.operations[newest].revision == 0 {
		return nil
	}
	o := p.operations[newest]
	made, err := VerifySnapshot(snapshotOf(dir, o.n))
	if err != nil {
		return err
	}
	if p.operation == save {
		if made.Revision != o.revision {
			return fmt.Errorf("the snapshot is of revision %d, and was of %d", made.Revision, o.revision)
		}
		return nil
	}
	cfg := poweredConfig(restoredOf(dir, o.n))
	return serveOnce(cfg, func(s *Store) error {
		revision := s.transport.Load().server.KV().Rev()
		if revision < o.revision {
			return fmt.Errorf("the restored store is at revision %d, and was made with %d", revision, o.revision)
		}
		return nil
	})
}

// serveOnce runs a store until f returns.
func serveOnce(cfg Config, f func(s *Store) error) error {
	s := New(cfg, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		return err
	}
	err := f(s)
	cancel()
	return errors.Join(err, <-done)
}

// identity returns the cluster and the member that a store is, which must be serving.
func identity(s *Store) string {
	server := s.transport.Load().server
	return server.Cluster().ID().String() + "/" + server.MemberID().String()
}

// TestPowerCutDuring cuts the power while a store is created, defragmented, copied to a snapshot, and while a store is made from one.
// The usual compactions go on meanwhile. As [TestPowerCut] it loses nothing and always starts. A store that was created has one
// identity from the first write on, and a snapshot or a restored store that was said to be made is whole.
func TestPowerCutDuring(t *testing.T) {
	requireRecorder(t)
	requireLong(t)
	for _, operation := range []string{firstBoot, defragment, save, restored} {
		t.Run(operation, func(t *testing.T) {
			cuts := shortOperationCuts
			if n, ok := number(t, tortureVar); ok {
				cuts = max(cuts, int(n)/5)
			}
			if operation == firstBoot {
				cuts *= 2
			}
			random := seedFor(t)
			var table powerTable
			for done := 0; done < cuts; {
				p := recordOperation(t, operation)
				table.recorded(p)
				for range min(cutsPerRound/5, cuts-done) {
					flushes := p.cut(operation, random)
					table.cut(t, p, flushes, blockrecorder.Tails[random.IntN(len(blockrecorder.Tails))], random)
					done++
				}
			}
			table.print(t.Output())
		})
	}
}

// recordOperation has a store write to a new disk, and repeat an operation.
func recordOperation(t *testing.T, operation string) powered {
	t.Helper()
	t.Setenv(operationVar, operation)
	s := startPowered(t, nil, "")
	if operation == firstBoot {
		s.follow("some writes", func() bool { return len(s.acks) > 20 })
	} else {
		s.follow("the operations are over", func() bool { return s.over })
	}
	if s.end != "" {
		t.Fatal("the store has ended: " + s.end)
	}
	s.rec, s.operation = s.disk.Recording(), operation
	s.stop()
	if operation != firstBoot && len(s.operations) < operations {
		t.Fatalf("%d operations", len(s.operations))
	}
	return s.powered
}
