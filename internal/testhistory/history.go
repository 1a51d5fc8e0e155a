// Package testhistory judges a store by what its clients were told: it records what they
// have read and written, and when, and lets Porcupine decide whether one register for
// each key, changed at one instant between question and answer, could have answered so.
//
// It knows neither the store nor how it is reached: the clients of a test do. It is no
// part of the product. Tests may import it.
package testhistory

import (
	"errors"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// ErrNotDone is wrapped by what a write returns that has certainly done nothing. Any
// other error leaves open whether it has, or will.
var ErrNotDone = errors.New("the write was not done")

// History is what clients have asked and been told. Its methods may be called at once.
type History struct {
	began   time.Time
	stop    chan struct{}
	clients sync.WaitGroup

	mu     sync.Mutex // guards what follows
	ops    []porcupine.Operation
	failed int
	last   time.Time     // when a write last succeeded
	gap    time.Duration // the longest time without one
}

// operation is a question: the input of porcupine's. What was read is the output.
type operation struct {
	write      bool
	key, value string // the value is what is written
}

// register holds what was written last for each key, and at first nothing.
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

// Client starts one that asks one thing after the other, with a pause after each, until
// the history ends. ask is told how many it has asked.
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
		op.Return = math.MaxInt64 // it may still happen, at any time
	}
	h.ops = append(h.ops, op)
}

// Read records what a client reads: empty for a key that was never written.
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

func (h *History) now() int64 { return time.Since(h.began).Nanoseconds() }

// leastOperations is how many make a history worth judging.
const leastOperations = 100

// End stops the clients and judges.
func (h *History) End(t testing.TB) {
	t.Helper()
	close(h.stop)
	h.clients.Wait()
	switch porcupine.CheckOperationsTimeout(register, h.ops, time.Minute) {
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
