// Package fleeting holds values that are large, seldom needed, and soon made: they are
// made when somebody asks, and forgotten when nobody has asked for a while.
//
// It is not a cache: a value depends on nothing that changes. Packages of every part
// may import it.
package fleeting

import (
	"sync"
	"time"
)

// Value is one such value. Its methods may be called from several goroutines.
type Value[T any] struct {
	build func() (T, error)
	keep  time.Duration

	mu      sync.Mutex // guards what follows
	made    bool
	value   T
	forget  *time.Timer
	lastUse time.Time
}

// New returns a value that build makes, one call at a time, and that is kept for the
// given time after it was last asked for.
func New[T any](keep time.Duration, build func() (T, error)) *Value[T] {
	return &Value[T]{build: build, keep: keep}
}

// Get returns the value, and makes it if need be. An error of build is returned and
// not kept: the next call tries again.
func (v *Value[T]) Get() (T, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.made {
		value, err := v.build()
		if err != nil {
			var none T
			return none, err
		}
		v.value, v.made = value, true
		v.forget = time.AfterFunc(v.keep, v.look)
	}
	v.lastUse = time.Now()
	return v.value, nil
}

// look forgets the value, unless it was asked for since; then it looks again later.
func (v *Value[T]) look() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if rest := v.keep - time.Since(v.lastUse); rest > 0 {
		v.forget.Reset(rest)
		return
	}
	var none T
	v.value, v.made = none, false
}
