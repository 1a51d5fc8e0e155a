package datastore

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A history is what clients of several members have asked and been told, and when; porcupine decides whether one
// store could have answered so.
type history struct {
	began time.Time
	stop  chan struct{}
	wg    sync.WaitGroup

	mu     sync.Mutex
	ops    []porcupine.Operation
	failed int
	last   time.Time     // when a write last succeeded
	gap    time.Duration // the longest time without a successful write
}

type operation struct {
	write bool
	key   string
	value string // written
}

var register = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, op := range all {
			key := op.Input.(operation).key
			byKey[key] = append(byKey[key], op)
		}
		var out [][]porcupine.Operation
		for _, ops := range byKey {
			out = append(out, ops)
		}
		return out
	},
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		if in := input.(operation); in.write {
			return true, in.value
		}
		return output == state, state
	},
}

// record starts clients, each of which writes and reads through whichever member pick gives it.
func record(pick func(client int) *testNode, clients, keys int) *history {
	h := &history{began: time.Now(), stop: make(chan struct{}), last: time.Now()}
	for client := range clients {
		h.wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-h.stop:
					return
				default:
				}
				h.once(client, n, pick(client), fmt.Sprintf("/h/%d", rand.IntN(keys)))
				time.Sleep(time.Duration(1+rand.IntN(10)) * time.Millisecond)
			}
		})
	}
	return h
}

func (h *history) once(client, n int, node *testNode, key string) {
	c, err := node.current.Load().NewClient()
	if err != nil {
		return // it was not asked
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	op := porcupine.Operation{ClientId: client, Call: time.Since(h.began).Nanoseconds()}
	if rand.IntN(2) == 0 {
		in := operation{write: true, key: key, value: fmt.Sprintf("%d-%d", client, n)}
		_, err = c.Put(ctx, key, in.value)
		op.Input = in
	} else {
		var got *clientv3.GetResponse
		got, err = c.KV.Get(ctx, key)
		op.Input, op.Output = operation{key: key}, ""
		if err == nil && len(got.Kvs) == 1 {
			op.Output = string(got.Kvs[0].Value)
		}
	}
	op.Return = time.Since(h.began).Nanoseconds()

	h.mu.Lock()
	defer h.mu.Unlock()
	write := op.Input.(operation).write
	switch {
	case err == nil && write:
		h.gap = max(h.gap, time.Since(h.last))
		h.last = time.Now()
	case err != nil && write:
		op.Return = math.MaxInt64 // it may still happen, at any time
		h.failed++
	case err != nil:
		h.failed++
		return
	}
	h.ops = append(h.ops, op)
}

// end stops the clients and judges.
func (h *history) end(t *testing.T) {
	t.Helper()
	close(h.stop)
	h.wg.Wait()
	switch porcupine.CheckOperationsTimeout(register, h.ops, time.Minute) {
	case porcupine.Ok:
	case porcupine.Illegal:
		t.Error("the history is not linearizable")
	case porcupine.Unknown:
		t.Error("the history could not be judged in time")
	}
	if len(h.ops) < 100 {
		t.Errorf("only %d operations", len(h.ops))
	}
	t.Logf("%d operations, %d failed, longest time without a write %v", len(h.ops), h.failed, h.gap.Round(time.Millisecond))
}

// A history that no single store could have given must be found out.
func TestHistoryIsJudged(t *testing.T) {
	write := operation{write: true, key: "k", value: "1"}
	ops := []porcupine.Operation{
		{Input: write, Call: 0, Return: 10},
		{Input: operation{key: "k"}, Output: "", Call: 20, Return: 30},
	}
	if porcupine.CheckOperations(register, ops) {
		t.Error("a stale read was taken for linearizable")
	}
}
