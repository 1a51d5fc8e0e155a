// Package history checks whether a store is linearizable. It records the requests and
// answers of a test's clients with their times, and Porcupine decides whether one register
// for each key, changed at one instant between request and answer, explains them.
//
// The package knows neither the store nor the way to it: the clients of a test do. Only
// tests may import it.
package history

import (
	"errors"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// ErrNotDone is wrapped by the error of a write that has certainly had no effect. Any other error
// leaves open whether the write has had an effect or will have one.
var ErrNotDone = errors.New("the write was not done")

// History records the requests and answers of clients. Its methods may be called from several
// goroutines.
type History struct {
	began   time.Time
	stop    chan struct{}
	clients sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	ops    []porcupine.Operation
	failed int
	last   time.Time     // time of the last successful write
	gap    time.Duration // longest time without a successful write
}

// operation is the input of a porcupine operation. The value that was read is the output.
type operation struct {
	write      bool
	key, value string // value is the value of a write
}

// register holds the last written value of each key, which is empty at first.
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

// New makes a history without clients.
func New() *History {
	return &History{began: time.Now(), stop: make(chan struct{}), last: time.Now()}
}

// Client starts a client that makes one request after the other, with a pause after each, until
// the history ends. The argument of ask is the number of requests so far.
func (h *History) Client(pause func() time.Duration, ask func(n int)) {
	h.clients.Go(func() {
		for n := 0; ; n++ {
			ask(n)
			select {
			case <-h.stop:
				return
			case <-time.After(pause()):
			}
		}
	})
}

// Write records what a client writes. No value may be written twice for a key.
func (h *History) Write(client int, key, value string, write func() error) {
	op := porcupine.Operation{ClientId: client, Input: operation{write: true, key: key, value: value}, Call: h.now()}
	err := write()
	op.Return = h.now()

	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		h.gap = max(h.gap, time.Since(h.last))
		h.last = time.Now()
	} else {
		h.failed++
		if errors.Is(err, ErrNotDone) {
			return
		}
		op.Return = open
	}
	h.ops = append(h.ops, op)
}

// Read records a client's read; its value is empty for a key that was never written.
func (h *History) Read(client int, key string, read func() (string, error)) {
	op := porcupine.Operation{ClientId: client, Input: operation{key: key}, Call: h.now()}
	value, err := read()
	op.Output, op.Return = value, h.now()

	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failed++
		return
	}
	h.ops = append(h.ops, op)
}

// open is the return time of a write without a known result: it may still take effect, at any time.
const open = math.MaxInt64

// settled returns the operations without the open writes that nobody saw, and ends each of the others with the first read
// that saw it. The verdict is the same, since each value is written once: a write that nobody saw can stand last, and one
// that was seen took effect before that read ended. Porcupine would try all orders of the open writes, and a member
// that is cut off refuses hundreds.
func settled(ops []porcupine.Operation) []porcupine.Operation {
	type written struct{ key, value string }
	seen := map[written]int64{}
	for _, op := range ops {
		in := op.Input.(operation)
		if in.write {
			continue
		}
		what := written{in.key, op.Output.(string)}
		if first, ok := seen[what]; !ok || op.Return < first {
			seen[what] = op.Return
		}
	}
	var out []porcupine.Operation
	for _, op := range ops {
		if in := op.Input.(operation); in.write && op.Return == open {
			first, ok := seen[written{in.key, in.value}]
			if !ok {
				continue
			}
			op.Return = max(first, op.Call) // a read that ended before the call saw the future: for Porcupine to find
		}
		out = append(out, op)
	}
	return out
}

func (h *History) now() int64 { return time.Since(h.began).Nanoseconds() }

// leastOperations is the least number of operations of a meaningful history.
const leastOperations = 100

// End stops the clients and checks the history.
func (h *History) End(t testing.TB) {
	t.Helper()
	close(h.stop)
	h.clients.Wait()
	switch porcupine.CheckOperationsTimeout(register, settled(h.ops), time.Minute) {
	case porcupine.Ok:
	case porcupine.Illegal:
		t.Error("the history is not linearizable")
	case porcupine.Unknown:
		t.Error("the history could not be judged in time")
	}
	if len(h.ops) < leastOperations {
		t.Errorf("the history has only %d operations", len(h.ops))
	}
	t.Logf("the history has %d operations, %d failed, longest time without a write %v", len(h.ops), h.failed, h.gap.Round(time.Millisecond))
}
